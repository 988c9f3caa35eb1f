"""Norms, rotary embeddings, the gated MLP, embedding and unembedding: pure functions over arrays.

Norms, rotary angles and soft-caps are computed in float32 whatever the dtype of the activations: squares and
exponentials of bfloat16 values lose the digits that the comparison with Hugging Face is made on.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.models.config import ModelConfig, RopeSpec
from nla_jax.models.int8 import Int8
from nla_jax.models.lora import Adapted
from nla_jax.models.params import Params
from nla_jax.models.sharding import constrain


def precision_of(dtype: Any) -> jax.lax.Precision:
    """Float32 products stay float32: TPUs and GPUs would otherwise round their inputs to bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def linear(x_BxTxI: jax.Array, w_IxO: jax.Array | Adapted | Int8, b_O: jax.Array | None = None) -> jax.Array:
    """x @ w (+ b), at the precision of x; an adapted w adds its low-rank change without being merged."""
    if isinstance(w_IxO, Adapted):
        frozen = w_IxO.w if isinstance(w_IxO.w, Int8) else jax.lax.stop_gradient(w_IxO.w)
        y = linear(x_BxTxI, frozen) + _product(_product(x_BxTxI, w_IxO.a), w_IxO.b) * w_IxO.scale
    elif isinstance(w_IxO, Int8):
        y = _scaled_product(x_BxTxI, w_IxO.q, w_IxO.scale)
    else:
        y = _product(x_BxTxI, w_IxO)
    return y if b_O is None else y + b_O[None, None, :]


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., I] @ w [I, O].

    The gradients are the usual ones, written as two products that need no transposed copy: autodiff's form of the
    second has XLA's CPU compiler write the incoming gradient out column by column, which cost a third of a step."""
    return jnp.matmul(x, w, precision=precision_of(x.dtype))


def _product_fwd(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, w), (x, w)


def _product_bwd(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = saved
    last, lead = x.ndim - 1, tuple(range(x.ndim - 1))
    dot = functools.partial(jax.lax.dot_general, precision=precision_of(x.dtype))
    return dot(dy, w, (((last,), (1,)), ((), ()))), dot(x, dy, ((lead, lead), ((), ()))).astype(w.dtype)


_product.defvjp(_product_fwd, _product_bwd)


@jax.custom_vjp
def _scaled_product(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    """x [B, T, I] @ q [I, O] times the scale [1, O] of each column. It has a gradient for x alone, and keeps no wide
    copy of q for that."""
    return jnp.matmul(x, q.astype(x.dtype), precision=precision_of(x.dtype)) * scale[None]


def _scaled_product_fwd(x: jax.Array, q: jax.Array, scale: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    return _scaled_product(x, q, scale), (q, scale)


def _scaled_product_bwd(saved: tuple[Any, ...], dy: jax.Array) -> tuple[Any, None, None]:
    q, scale = saved
    contract = ((dy.ndim - 1,), (1,)), ((), ())
    dx = jax.lax.dot_general(dy * scale[None], q.astype(dy.dtype), contract, precision=precision_of(dy.dtype))
    return dx, None, None


_scaled_product.defvjp(_scaled_product_fwd, _scaled_product_bwd)


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, plus_one: bool) -> jax.Array:
    """x / rms(x) over the last axis, times the weight, or times 1 + weight where `plus_one` (Gemma).

    Gemma multiplies in float32 and rounds once; the others round first, as Hugging Face does."""
    weight = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if plus_one:
        return (y * (1.0 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight * y.astype(x.dtype)


def inverse_frequencies(spec: RopeSpec, head_dim: int) -> np.ndarray:
    """Angular frequencies [head_dim/2] in radians per token, float32. llama3: Llama 3.1 model card's formula."""
    inv = 1.0 / (np.float32(spec.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)))
    if spec.kind == "linear":
        inv = inv / np.float32(spec.factor)
    elif spec.kind == "llama3":
        wavelength = 2 * np.pi / inv
        longest, shortest = spec.original_len / spec.low_freq_factor, spec.original_len / spec.high_freq_factor
        smooth = (spec.original_len / wavelength - spec.low_freq_factor) / (
            spec.high_freq_factor - spec.low_freq_factor
        )
        blended = (1 - smooth) * inv / spec.factor + smooth * inv
        inv = np.where(wavelength > longest, inv / spec.factor, np.where(wavelength < shortest, inv, blended))
    return inv.astype(np.float32)


def rope_tables(positions_BxT: jax.Array, spec: RopeSpec, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, head_dim/2] in float32 for integer positions; B is 1 where all rows have the same."""
    angles = positions_BxT.astype(jnp.float32)[:, :, None] * inverse_frequencies(spec, head_dim)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BxTxNxH: jax.Array, cos_BxTxH2: jax.Array, sin_BxTxH2: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of each head, Hugging Face's pairing."""
    cos, sin = cos_BxTxH2[:, :, None, :].astype(x_BxTxNxH.dtype), sin_BxTxH2[:, :, None, :].astype(x_BxTxNxH.dtype)
    x1, x2 = jnp.split(x_BxTxNxH, 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap): keeps |x| under `cap` (Gemma 2)."""
    return x if cap is None else jnp.tanh(x / cap) * cap


def activate(x: jax.Array, name: str) -> jax.Array:
    """The MLP's non-linearity by its name in `ModelConfig.activation`."""
    if name == "silu":
        return jax.nn.silu(x)
    if name == "relu":
        return jax.nn.relu(x)
    return jax.nn.gelu(x, approximate=name == "gelu_tanh")


@functools.partial(jax.checkpoint, static_argnums=2)
def gated(gate: jax.Array, up: jax.Array, name: str) -> jax.Array:
    """activation(gate) * up. Only the two inputs are kept for the backward pass: recomputing the rest costs less than
    writing it out and reading it back, four more arrays of the MLP's width."""
    return activate(gate, name) * up


def embed(params: Params, tokens_BxT: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Token embeddings [B, T, D]; Gemma's are multiplied by sqrt(D), rounded to the parameters' dtype first."""
    # On a mesh: looked up where the table's columns are, then sent to where the rows are. Left alone, the compiler
    # gives every device all rows. (While decoding, the table is whole along D.)
    sharded = tokens_BxT.shape[1] > 1
    tokens_BxT = constrain(tokens_BxT, "copies", None) if sharded else tokens_BxT
    x = jnp.take(params.embed, tokens_BxT, axis=0)
    x = constrain(x, "copies", None, "embed") if sharded else x
    if cfg.scale_embeddings:
        x = x * jnp.asarray(cfg.d_model**0.5, x.dtype)
    return x


def unembed(params: Params, x_BxTxD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Final norm, vocabulary projection and soft-cap: float32 logits [B, T, V]."""
    x = rms_norm(x_BxTxD, params.final_norm, eps=cfg.norm_eps, plus_one=cfg.norm_plus_one)
    if params.lm_head is None:
        logits = jnp.einsum(
            "btd,vd->btv", x, params.embed, precision=precision_of(x.dtype), preferred_element_type=jnp.float32
        )
    else:
        logits = jnp.einsum(
            "btd,dv->btv", x, params.lm_head, precision=precision_of(x.dtype), preferred_element_type=jnp.float32
        )
    return soft_cap(logits, cfg.logit_softcap)
