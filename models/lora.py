"""Low-rank adapters: a small trained tree beside frozen weights that several roles share.

A weight W [L, I, O] acts as W + a b alpha / rank with a [L, I, R] and b [L, R, O] (Hu et al. 2021, arXiv 2106.09685).
`attach` puts base and adapters together into a `Params` that every function here takes: nothing is merged or copied,
so target, AV, AR and KL reference hold one base. Only what differs is differentiated: take gradients with respect to
the adapters, and call `attach` inside the loss.

R is the rank. An adapter tree is a dictionary from a `Layers` field to its `LowRank`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from nla_jax.models.config import ModelConfig
from nla_jax.models.errors import ConfigError
from nla_jax.models.int8 import Int8
from nla_jax.models.params import Layers, Params, ParamSpec, param_specs

# Names in Hugging Face checkpoints and PEFT configs -> fields of `Layers`.
TARGETS = {
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """`rank`; `alpha`: the change is scaled by alpha / rank, or alpha / sqrt(rank) where `rslora`; `targets`: which
    projections are adapted, by their Hugging Face names."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = tuple(TARGETS)
    rslora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError("lora.rank", expected="at least 1", got=self.rank)
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError("lora.alpha", expected="a positive number", got=self.alpha)
        unknown = [t for t in self.targets if t not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
            raise ConfigError("lora.targets", expected=f"some of {', '.join(TARGETS)}, once each", got=self.targets)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@struct.dataclass
class LowRank:
    """`a` [L, I, R] and `b` [L, R, O]."""

    a: Any
    b: Any


@struct.dataclass
class Adapted:
    """A frozen matrix with its change, in the matrix's place: `w` [..., I, O] (may be an `Int8`), `a` [..., I, R],
    `b` [..., R, O]."""

    w: Any
    a: Any
    b: Any
    scale: float = struct.field(pytree_node=False)

    @property
    def dtype(self) -> Any:
        return self.w.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the adapted blocks: the base's stack may have more."""
        return (self.a.shape[0], *self.w.shape[1:])

    def merged(self, row: Any) -> jax.Array:
        """Block `row` [I, O] with the change added: summed in float32, stored in the matrix's dtype."""
        w, a, b = (row_of(x, row) for x in (self.w, self.a, self.b))
        return _sum(w, a, b, self.scale)


def is_adapted(layers: Any) -> bool:
    """Whether some of these `Layers`' matrices are frozen and have changes."""
    return any(isinstance(x, Adapted) for x in vars(layers).values())


def row_of(stack: Any, row: Any) -> jax.Array:
    """A block's entry of a stack as a plain array: adapted ones with their change added, 8 bits made wide."""
    if isinstance(stack, Adapted):
        return stack.merged(row)
    if isinstance(stack, Int8):
        return jax.tree.map(lambda x: row_of(x, row), stack).wide().astype(stack.dtype)
    return jax.lax.dynamic_index_in_dim(stack, row, keepdims=False)


Adapters = dict[str, LowRank]


def adapter_specs(cfg: ModelConfig, lora: LoRAConfig) -> dict[str, LowRank]:
    """The adapters of `cfg` as a tree of `ParamSpec`. ConfigError where the rank exceeds a matrix's smaller side."""
    layers: Layers = param_specs(cfg).layers
    out = {}
    for target in lora.targets:
        spec: ParamSpec = getattr(layers, TARGETS[target])
        n, rows, cols = spec.shape
        if lora.rank > min(rows, cols):
            raise ConfigError(
                "lora.rank", expected=f"at most {min(rows, cols)}, {target}'s smaller side", got=lora.rank
            )
        # The rank is too small to split over devices; the other side is split as the matrix's own.
        a = ParamSpec((n, rows, lora.rank), ("layers", spec.axes[1], "rank"), "uniform", rows)
        b = ParamSpec((n, lora.rank, cols), ("layers", "rank", spec.axes[2]), "zeros")
        out[TARGETS[target]] = LowRank(a, b)
    return out


def init_adapters(cfg: ModelConfig, lora: LoRAConfig, key: jax.Array, dtype: Any = jnp.float32) -> Adapters:
    """a uniform in +-1/sqrt(I), b zero, as PEFT begins: a model with fresh adapters computes what its base does."""
    specs = adapter_specs(cfg, lora)
    out = {}
    for field, k in zip(specs, jax.random.split(key, len(specs)), strict=True):
        a, b = specs[field].a, specs[field].b
        bound = a.fan_in**-0.5
        drawn = jax.random.uniform(k, a.shape, jnp.float32, -bound, bound).astype(dtype)
        out[field] = LowRank(drawn, jnp.zeros(b.shape, dtype))
    return out


def attach(base: Params, adapters: Adapters, lora: LoRAConfig) -> Params:
    """The base with its adapted matrices in place, sharing its arrays. Adapters of fewer blocks than the base has serve
    its first blocks, as an AR's do; run such a model with a config of that many."""
    fields = {f: Adapted(getattr(base.layers, f), pair.a, pair.b, lora.scale) for f, pair in adapters.items()}
    return base.replace(layers=base.layers.replace(**fields))  # type: ignore[attr-defined]


def merge(base: Params, adapters: Adapters, lora: LoRAConfig) -> Params:
    """Plain parameters with the change added to the weights: summed in float32, stored in the weights' dtype."""
    fields = {f: _sum(getattr(base.layers, f), pair.a, pair.b, lora.scale) for f, pair in adapters.items()}
    return base.replace(layers=base.layers.replace(**fields))  # type: ignore[attr-defined]


def _sum(w: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    change = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST) * scale
    return (w.astype(jnp.float32) + change).astype(w.dtype)


def n_adapter_params(cfg: ModelConfig, lora: LoRAConfig) -> int:
    """Number of scalars in the adapters of `cfg`."""
    specs = adapter_specs(cfg, lora).values()
    return sum(math.prod(spec.shape) for pair in specs for spec in (pair.a, pair.b))
