"""What `nla plan` lowers and `tools/bench.py device` runs: programs, the stages they make up, and where arrays lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from nla_jax.models import int8, sharding
from nla_jax.models.config import ModelConfig
from nla_jax.models.params import ParamSpec, map_specs
from nla_jax.models.sharding import RULES, MeshSettings, make_mesh, row_shards
from nla_jax.train.optimizer import make_optimizer
from nla_jax.train.plan_work import Lengths, Split, Work
from nla_jax.train.settings import OptimizerSettings, RLSettings, SFTSettings
from nla_jax.train.state import TrainState, cast, state_shardings

Outputs = dict[str, Any]  # of programs that ran before: their results' shapes with shardings


@dataclasses.dataclass(frozen=True)
class Model:
    """What is planned for: the target's config, the layer that is explained, and tokens of prompts and responses."""

    cfg: ModelConfig
    layer: int
    lengths: Lengths
    injection_scale: float = 1.0

    @property
    def trunk(self) -> ModelConfig:
        return self.cfg.truncated(self.layer + 1)


@dataclasses.dataclass(frozen=True)
class Call:
    """A jitted function and what it is called with: shapes with shardings, results of other programs, static options.

    `carries`: the place among `args` of a state that is donated, and that the first result takes the place of."""

    fn: Any
    args: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    carries: int | None = None


UPDATE = ("remat", "accumulate")  # what an update varies with


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted program of a stage.

    `call(outputs)` is how it is called; `after` names the programs whose results that needs. `given` are what of the
    stage's residents is among its arguments: the rest lies beside it in memory, or `beside` where that is known to be
    less. `least`: bytes of a chip that it cannot do without, besides its arguments. `once`: it does not run in every
    step, and so costs memory only. `varies`: the settings of a search (plan_search.py) other than the mesh that change
    it. Residents' leaves are the arguments' own: known again by identity."""

    name: str
    call: Callable[[Outputs], Call]
    work: Work
    after: tuple[str, ...] = ()
    given: tuple[Any, ...] = ()
    least: float = 0.0
    beside: tuple[Any, ...] | None = None
    once: bool = False
    varies: tuple[str, ...] = ()

    def lower(self, outputs: Outputs) -> Any:
        """What `jax.jit(...).lower` gives."""
        call = self.call(outputs)
        return call.fn.lower(*call.args, **call.options)


@dataclasses.dataclass(frozen=True)
class Stage:
    """The programs of a stage in the order they run, and `residents`: trees that are in memory all the time.

    `rows` are the samples (of extraction: tokens) of a step."""

    name: str
    programs: tuple[Program, ...]
    residents: Mapping[str, Any]
    rows: int
    compute_dtype: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where arrays lie: on a mesh, or on one device."""

    mesh: Mesh | None
    device: Any

    @property
    def split(self) -> Split:
        if self.mesh is None:
            return Split()
        return Split(row_shards(self.mesh), self.mesh.shape["tensor"], self.mesh.size)

    def array(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec | None = None) -> jax.ShapeDtypeStruct:
        at: Any = SingleDeviceSharding(self.device)
        if self.mesh is not None:
            at = NamedSharding(self.mesh, PartitionSpec() if spec is None else spec)
        dtype = dtype if jnp.issubdtype(dtype, jax.dtypes.extended) else jnp.dtype(dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=at)

    def rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """Split over its first axis, as `train.layout.Layout.put` does."""
        return self.array(shape, dtype, None if self.mesh is None else sharding.row_sharding(self.mesh, shape[0]).spec)

    def params(self, specs: Any, cfg: ModelConfig, dtype: str, rules: sharding.Rules = RULES) -> Any:
        if self.mesh is None:
            return map_specs(lambda s: self.array(s.shape, dtype), specs)
        to = sharding.shardings(specs, cfg, self.mesh, rules)
        return jax.tree.map(
            lambda s, at: self.array(s.shape, dtype, at.spec), specs, to, is_leaf=lambda x: isinstance(x, ParamSpec)
        )

    def base(self, specs: Any, cfg: ModelConfig, settings: RLSettings | SFTSettings) -> Any:
        """The frozen weights beside adapters, as `train.roles.Role.base` loads them."""
        params = self.params(specs, cfg, settings.compute_dtype)
        if not settings.lora.int8:
            return params
        return jax.tree.map(lambda x: int8.abstract(x) if int8.is_matrix(x.shape) else x, params)

    def state(self, params: Any, optim: OptimizerSettings) -> TrainState:
        """A training state of these parameters, as `train.state.create` makes it."""

        def start(p: Any) -> TrainState:
            zero = jnp.zeros((), jnp.int32)
            return TrainState(zero, zero, p, make_optimizer(optim).init(cast(p, jnp.float32)))

        shapes = jax.eval_shape(start, params)
        if self.mesh is None:
            return jax.tree.map(lambda x: self.array(x.shape, x.dtype), shapes)
        return jax.tree.map(
            lambda x, at: self.array(x.shape, x.dtype, at.spec), shapes, state_shardings(shapes, params)
        )


def make_place(settings: MeshSettings, devices: list[Any]) -> Place:
    """InputError where the mesh's axes do not make up the devices."""
    return Place(make_mesh(settings, devices), devices[0])
