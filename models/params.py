"""Every parameter declared once: shape, logical axes, initialisation.

`param_specs(cfg)` returns a `Params` tree whose leaves are `ParamSpec`s; abstract trees, shardings, random
initialisation and checkpoint conversion are maps over it. Parameters of all blocks are stacked on a leading axis
("layers") and scanned, so the first n blocks are `tree.map(lambda p: p[:n], params.layers)`.

Dimension letters: L blocks, D model, N heads, K kv heads, H head dim, F mlp, V vocabulary. Matrices are stored
input-first, [in, out]; Hugging Face stores [out, in].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from nla_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: `shape`, logical `axes` (one name per dimension: those of `models.sharding.RULES`), `init` and
    the fan-in it scales with."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"  # "normal" | "ones" | "zeros"
    fan_in: int = 1

    def __post_init__(self):
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


@struct.dataclass
class Layers:
    """Stacked block parameters; a field is None where the family has no such parameter."""

    attn_norm: Any  # [L, D]
    wq: Any  # [L, D, N*H]
    wk: Any  # [L, D, K*H]
    wv: Any  # [L, D, K*H]
    wo: Any  # [L, N*H, D]
    mlp_norm: Any  # [L, D]
    gate: Any  # [L, D, F]
    up: Any  # [L, D, F]
    down: Any  # [L, F, D]
    bq: Any = None  # [L, N*H]
    bk: Any = None  # [L, K*H]
    bv: Any = None  # [L, K*H]
    bo: Any = None  # [L, D]
    q_norm: Any = None  # [L, H]
    k_norm: Any = None  # [L, H]
    attn_post_norm: Any = None  # [L, D]
    mlp_post_norm: Any = None  # [L, D]
    b_gate: Any = None  # [L, F]
    b_up: Any = None  # [L, F]
    b_down: Any = None  # [L, D]


@struct.dataclass
class Params:
    """A decoder. `final_norm` and `lm_head` are None for a trunk; `lm_head` is None when tied to `embed`."""

    embed: Any  # [V, D]
    layers: Layers
    final_norm: Any = None  # [D]
    lm_head: Any = None  # [D, V]


def param_specs(cfg: ModelConfig, *, head: bool = True) -> Params:
    """The declared parameters of `cfg` as a tree of `ParamSpec`; `head=False` leaves out final norm and lm_head."""
    n, d, f, v = cfg.n_layers, cfg.d_model, cfg.d_ff, cfg.vocab_size
    q, kv, h = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim, cfg.head_dim

    def matrix(rows: int, cols: int, row_axis: str, col_axis: str) -> ParamSpec:
        return ParamSpec((n, rows, cols), ("layers", row_axis, col_axis), "normal", rows)

    def vector(size: int, axis: str, init: str) -> ParamSpec:
        return ParamSpec((n, size), ("layers", axis), init)

    norm_init = "zeros" if cfg.norm_plus_one else "ones"
    norm = vector(d, "width", norm_init)
    head_norm = vector(h, "head_dim", norm_init) if cfg.qk_norm else None
    layers = Layers(
        attn_norm=norm,
        wq=matrix(d, q, "embed", "heads"),
        wk=matrix(d, kv, "embed", "kv_heads"),
        wv=matrix(d, kv, "embed", "kv_heads"),
        wo=matrix(q, d, "heads", "embed"),
        mlp_norm=norm,
        gate=matrix(d, f, "embed", "mlp"),
        up=matrix(d, f, "embed", "mlp"),
        down=matrix(f, d, "mlp", "embed"),
        bq=vector(q, "heads", "zeros") if cfg.qkv_bias else None,
        bk=vector(kv, "kv_heads", "zeros") if cfg.qkv_bias else None,
        bv=vector(kv, "kv_heads", "zeros") if cfg.qkv_bias else None,
        bo=vector(d, "width", "zeros") if cfg.out_bias else None,
        q_norm=head_norm,
        k_norm=head_norm,
        attn_post_norm=norm if cfg.post_norms else None,
        mlp_post_norm=norm if cfg.post_norms else None,
        b_gate=vector(f, "mlp", "zeros") if cfg.mlp_bias else None,
        b_up=vector(f, "mlp", "zeros") if cfg.mlp_bias else None,
        b_down=vector(d, "width", "zeros") if cfg.mlp_bias else None,
    )
    return Params(
        embed=ParamSpec((v, d), ("vocab", "embed"), "normal", d),
        layers=layers,
        final_norm=ParamSpec((d,), ("width",), norm_init) if head else None,
        lm_head=ParamSpec((d, v), ("embed", "vocab"), "normal", d) if head and not cfg.tied else None,
    )


def map_specs(fn: Callable[[ParamSpec], Any], specs: Any) -> Any:
    """`jax.tree.map` over a tree whose leaves are `ParamSpec`s."""
    return jax.tree.map(fn, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def abstract_params(cfg: ModelConfig, dtype: Any = jnp.float32, *, head: bool = True) -> Params:
    """Shapes and dtypes of the parameters, without arrays."""
    return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype)), param_specs(cfg, head=head))


def init_params(cfg: ModelConfig, key: jax.Array, dtype: Any = jnp.float32, *, head: bool = True) -> Params:
    """Random parameters: matrices N(0, 1/fan_in), norms at identity, biases zero."""
    specs = param_specs(cfg, head=head)
    leaves, treedef = jax.tree.flatten(specs, is_leaf=lambda x: isinstance(x, ParamSpec))
    keys = jax.random.split(key, len(leaves))

    def one(spec: ParamSpec, k: jax.Array) -> jax.Array:
        if spec.init == "normal":
            return (jax.random.normal(k, spec.shape, jnp.float32) * spec.fan_in**-0.5).astype(dtype)
        return (jnp.ones if spec.init == "ones" else jnp.zeros)(spec.shape, dtype)

    return jax.tree.unflatten(treedef, [one(s, k) for s, k in zip(leaves, keys, strict=True)])


def n_params(cfg: ModelConfig, *, head: bool = True) -> int:
    """Number of scalars in the parameters of `cfg`."""
    shapes = jax.tree.leaves(map_specs(lambda s: int(np.prod(s.shape)), param_specs(cfg, head=head)))
    return sum(shapes)


def truncate(params: Params, n_layers: int) -> Params:
    """The first `n_layers` blocks and the embedding, without final norm and lm_head."""
    return Params(embed=params.embed, layers=jax.tree.map(lambda p: p[:n_layers], params.layers))
