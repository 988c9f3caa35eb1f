"""Meshes, and where arrays lie on them: one table from logical axes to mesh axes.

A mesh has three axes. Over "data" parameters are copied and rows split. Over "fsdp" both are split: each block's
matrices are gathered when their turn comes. Over "tensor" the products themselves are split: heads, MLP and vocabulary.

Axis types are Auto: the compiler carries shardings from parameters and batches through a step, and `constrain` pins
what it should not decide alone (the stream, the cache, logits that are sampled from). Explicit types would ask for an
out_sharding at every gather, repeat and cache update of the models (TRAPS 19) and compile to the same programs. The
models run unchanged where there is no mesh: `constrain` then does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nla_jax.models.config import ModelConfig
from nla_jax.models.errors import InputError
from nla_jax.models.params import ParamSpec, map_specs

AXES = ("data", "fsdp", "tensor")
Rules = Mapping[str, tuple[str, ...]]

# Logical axis -> mesh axes that split it. An axis that is not here is a mistake; () is whole everywhere.
RULES: Rules = {
    "rows": ("data", "fsdp"),  # of a batch
    "every": ("data", "fsdp", "tensor"),  # rows of what each device does for some of them alone
    "copies": ("data",),  # rows where "fsdp" splits something else of the same array
    "embed": ("fsdp",),  # D of a matrix
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "reads": ("tensor",),  # D that the AR's head predicts
    "width": (),  # D of a vector: norms and biases are too small to be gathered
    "head_dim": (),
    "layers": (),  # scanned over
    "rank": (),  # of an adapter
}
# While sampling every token would gather all matrices again: they are gathered once per rollout instead.
DECODE: Rules = {**RULES, "embed": ()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """How many devices along each axis. 0 is what the other axes leave: of `data`, or where `fsdp` is 0 too, of that
    alone."""

    data: int = 0  # copies of the parameters, each with its share of the rows
    fsdp: int = 1  # devices that parameters, optimizer and rows are split over
    tensor: int = 1  # devices that heads, MLP and vocabulary are split over

    def __post_init__(self) -> None:
        for name, least in (("data", 0), ("fsdp", 0), ("tensor", 1)):
            if getattr(self, name) < least:
                raise InputError(f"mesh.{name}", expected=f"{least} or more", got=getattr(self, name))

    def shape(self, devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) on so many devices; InputError where they do not make them up.

        Fewer than there are is allowed where no axis is 0."""
        data, fsdp, tensor = self.data, self.fsdp, self.tensor
        if fsdp == 0:
            data = data or 1
            fsdp = devices // (data * tensor)
        elif data == 0:
            data = devices // (fsdp * tensor)
        size = data * fsdp * tensor
        if size == 0 or size > devices or (0 in (self.data, self.fsdp) and size != devices):
            got = f"data {self.data}, fsdp {self.fsdp}, tensor {self.tensor}"
            expected = f"axes that make up the {devices} device{'s' * (devices > 1)} (0 is what the others leave)"
            raise InputError("mesh", expected=expected, got=got, fix=f"divisors of {devices}")
        return data, fsdp, tensor


def make_mesh(settings: MeshSettings, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of `settings` over `devices` (all there are by default); None for a single device.

    Neighbours on the mesh are neighbours on the network; where slices of a pod are joined by a slower one, that is
    what "data" crosses."""
    every = jax.devices() if devices is None else list(devices)
    shape = settings.shape(len(every))
    size = math.prod(shape)
    if size < len(every) and len(every) > jax.local_device_count():
        expected = f"all {len(every)} devices of the {jax.process_count()} processes"
        raise InputError("mesh", expected=expected, got=size, fix="mesh.data=0")
    if size == 1:
        return None
    return Mesh(_grid(shape, every[:size]), AXES, axis_types=(AxisType.Auto,) * 3)


def _grid(shape: tuple[int, int, int], devices: list[Any]) -> np.ndarray:
    slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
    if slices > 1:
        if shape[0] % slices:
            fix = f"--config.mesh.data={slices}, and what a slice has for the other axes"
            raise InputError("mesh.data", expected=f"a multiple of the {slices} slices", got=shape[0], fix=fix)
        inside = (shape[0] // slices, *shape[1:])
        return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def spec_of(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """The PartitionSpec of logical axes, None for a dimension that is whole. ValueError where two of them want one
    mesh axis."""
    taken: dict[str, str] = {}
    for axis in axes:
        for mesh_axis in () if axis is None else rules[axis]:
            if mesh_axis in taken:
                raise ValueError(f"{taken[mesh_axis]} and {axis} both want the mesh axis {mesh_axis!r}")
            taken[mesh_axis] = str(axis)
    return PartitionSpec(*(_entry(() if axis is None else rules[axis]) for axis in axes))


def _entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes


def rules_for(cfg: ModelConfig, mesh: Mesh | jax.sharding.AbstractMesh, rules: Rules = RULES) -> Rules:
    """The table for a model: key and value heads that are too few for "tensor" are copied, not split.

    InputError naming every size of the model that an axis does not divide."""
    copied = cfg.n_kv_heads % _size(mesh, rules["kv_heads"]) != 0
    rules = {**rules, "kv_heads": ()} if copied else rules
    sizes = {
        "heads": ("attention heads,", cfg.n_heads),
        "mlp": ("MLP width,", cfg.d_ff),
        "vocab": ("vocabulary,", cfg.vocab_size),
        "embed": ("model width,", cfg.d_model),
        "reads": ("model width,", cfg.d_model),
    }
    wrong = [
        f"{'*'.join(rules[axis])} {_size(mesh, rules[axis])} does not divide the {what} {size}"
        for axis, (what, size) in sizes.items()
        if size % _size(mesh, rules[axis])
    ]
    if wrong:
        got, fix = "; ".join(dict.fromkeys(wrong)), "an axis that divides it"
        raise InputError("mesh", expected="axes that divide the model's sizes", got=got, fix=fix)
    return rules


def copied_kv_heads(cfg: ModelConfig, mesh: Mesh) -> bool:
    """Whether key and value heads are too few to be split over "tensor", and are on all of its devices instead."""
    return cfg.n_kv_heads % _size(mesh, RULES["kv_heads"]) != 0


def _size(mesh: Mesh | jax.sharding.AbstractMesh, mesh_axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[a] for a in mesh_axes if a in mesh.shape)


def shardings(specs: Any, cfg: ModelConfig, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The NamedSharding of every parameter in a tree of `ParamSpec`s."""
    table = rules_for(cfg, mesh, rules)
    return map_specs(lambda spec: NamedSharding(mesh, spec_of(spec.axes, table)), specs)


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Of arrays [rows, ...]: over "data" and "fsdp", over "data" alone or not at all, whichever divides the rows."""
    return NamedSharding(mesh, _fitting((rows,), ("rows",), mesh, RULES))


def row_shards(mesh: Mesh | jax.sharding.AbstractMesh | None) -> int:
    """Into how many parts the rows of a batch are split."""
    return 1 if mesh is None else _size(mesh, RULES["rows"])


def _fitting(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | jax.sharding.AbstractMesh, rules: Rules
) -> PartitionSpec:
    """`spec_of` with the mesh axes that are there and divide their dimension; later ones are left out first."""
    entries = []
    for size, axis in zip(shape, axes, strict=True):
        wanted = tuple(a for a in (() if axis is None else rules[axis]) if a in mesh.shape)
        while wanted and size % _size(mesh, wanted):
            wanted = wanted[:-1]
        entries.append(_entry(wanted))
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """`x` laid out as its logical axes say, as far as the mesh divides its sizes; `x` itself where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(x.shape, axes, mesh, rules))


def constrain_rows(tree: Any) -> Any:
    """Arrays whose first dimension is the batch's, split over it and whole otherwise."""
    return jax.tree.map(lambda x: constrain(x, "rows", *(None,) * (x.ndim - 1)), tree)


def replicated(tree: Any) -> Any:
    """Arrays whole on every device: what every process is to read."""
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), tree)


def lay_out(params: Any, specs: Any, cfg: ModelConfig, rules: Rules = RULES) -> Any:
    """Parameters as their specs say; inside a jitted function, under a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params
    table = rules_for(cfg, mesh, rules)

    def one(spec: ParamSpec, x: Any) -> Any:  # also of several arrays, where a matrix is kept in 8 bits
        return jax.tree.map(lambda leaf: constrain(leaf, *spec.axes, rules=table), x)

    return jax.tree.map(one, specs, params, is_leaf=_is_spec)


def lay_out_by_layer(params: Any, specs: Any, cfg: ModelConfig, rules: Rules) -> Any:
    """`lay_out`, block by block: what is gathered of stacked parameters lies twice in memory for one block at a time,
    not for all of them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params
    table = rules_for(cfg, mesh, rules)

    def one(spec: ParamSpec, x: Any) -> Any:
        if spec.axes[0] != "layers":
            return x
        return jax.tree.map(lambda y: jax.lax.map(lambda z: constrain(z, *spec.axes[1:], rules=table), y), x)

    return lay_out(jax.tree.map(one, specs, params, is_leaf=_is_spec), specs, cfg, rules)


def _is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def mesh_of(*trees: Any) -> Mesh | None:
    """The mesh that arrays (or what stands for them) are sharded over; None where that is a single device."""
    for leaf in jax.tree.leaves(trees):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            assert isinstance(sharding.mesh, Mesh)
            return sharding.mesh
    return None


def under(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A block in which `constrain` knows the mesh; not for the inside of a jitted function."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def on_its_mesh(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Calls `fn` under the mesh of its first argument. What `jax.jit` makes keeps its `lower` and `trace`."""

    def under_mesh(inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **options: Any) -> Any:
            with under(mesh_of(first)):
                return inner(first, *args, **options)

        return call

    outer = functools.wraps(fn)(under_mesh(fn))
    for name in ("lower", "trace"):
        if hasattr(fn, name):
            setattr(outer, name, under_mesh(getattr(fn, name)))
    return outer
