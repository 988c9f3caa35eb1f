"""Grouped-query attention behind one entry point.

Keys come in up to two parts: a *prefix* computed once and shared by every row (the constant part of an AV prompt),
and each row's own keys. One softmax runs over both, so sharing changes no number, only the work. `attend` picks a
kernel: "plain" holds all scores at once; "blocked" walks over blocks of queries so that memory grows with T, not T^2.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from nla_jax.models.layers import precision_of, soft_cap

# Scores of one query block are held at once; 512 queries keep a block's products large enough to be efficient.
BLOCK = 512
_MASKED = -1e30  # finite, so that a row without any visible key gives a mean of values instead of NaN


@dataclasses.dataclass(frozen=True)
class AttnSpec:
    """What does not change from block to block: the score scale, the soft-cap, and the kernel ("auto" chooses)."""

    scale: float
    softcap: float | None = None
    kernel: str = "auto"


def attend(
    q_BxTxNxH: jax.Array,
    k_BxSxKxH: jax.Array,
    v_BxSxKxH: jax.Array,
    spec: AttnSpec,
    *,
    q_pos_T: jax.Array,
    k_pos_S: jax.Array,
    window: jax.Array | int = 0,
    prefix: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Causal attention of T queries over a shared prefix and S own keys; returns [B, T, N, H].

    Positions are absolute token indices, the same for all rows. A key is visible when it is not after the query and,
    where `window` > 0, fewer than `window` tokens before it. Slots of a cache that are not filled yet must carry
    positions after every query. `prefix` holds keys and values [P, K, H] at positions 0..P-1.
    """
    kernel = spec.kernel
    if kernel == "auto":
        kernel = "blocked" if q_BxTxNxH.shape[1] > 2 * BLOCK else "plain"
    run = _blocked if kernel == "blocked" else _plain
    return run(q_BxTxNxH, k_BxSxKxH, v_BxSxKxH, spec, q_pos_T, k_pos_S, window, prefix)


def _mask(q_pos_T: jax.Array, k_pos_S: jax.Array, window: jax.Array | int) -> jax.Array:
    distance = q_pos_T[:, None] - k_pos_S[None, :]
    window = jnp.asarray(window)
    return (distance >= 0) & ((distance < window) | (window <= 0))


def _plain(q, k, v, spec: AttnSpec, q_pos, k_pos, window, prefix) -> jax.Array:
    B, T, N, H = q.shape
    K = k.shape[2]
    precision = precision_of(q.dtype)
    q = q.reshape(B, T, K, N // K, H)

    def scores(equation: str, keys: jax.Array, key_pos: jax.Array) -> jax.Array:
        s = jnp.einsum(equation, q, keys, precision=precision, preferred_element_type=jnp.float32) * spec.scale
        s = soft_cap(s, spec.softcap)
        return jnp.where(_mask(q_pos, key_pos, window)[None, None, None], s, _MASKED)

    s = scores("btkgh,bskh->bkgts", k, k_pos)
    if prefix is None:
        w = jax.nn.softmax(s, axis=-1).astype(v.dtype)
        out = jnp.einsum("bkgts,bskh->btkgh", w, v, precision=precision)
        return out.reshape(B, T, N, H)
    k_prefix, v_prefix = prefix
    P = k_prefix.shape[0]
    s_prefix = scores("btkgh,pkh->bkgtp", k_prefix, jnp.arange(P))
    w = jax.nn.softmax(jnp.concatenate([s_prefix, s], axis=-1), axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgtp,pkh->btkgh", w[..., :P], v_prefix, precision=precision)
    out = out + jnp.einsum("bkgts,bskh->btkgh", w[..., P:], v, precision=precision)
    return out.reshape(B, T, N, H)


def _blocked(q, k, v, spec: AttnSpec, q_pos, k_pos, window, prefix) -> jax.Array:
    B, T, N, H = q.shape
    pad = -T % BLOCK
    blocks = (T + pad) // BLOCK
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(B, blocks, BLOCK, N, H)
    q_pos = jnp.pad(q_pos, (0, pad), mode="edge").reshape(blocks, BLOCK)

    # Rematerialised: a backward pass must not keep every block's scores either.
    @jax.checkpoint
    def one(args):
        q_block, pos_block = args
        return _plain(q_block, k, v, spec, pos_block, k_pos, window, prefix)

    out = jax.lax.map(one, (jnp.moveaxis(q, 1, 0), q_pos))
    return jnp.moveaxis(out, 0, 1).reshape(B, T + pad, N, H)[:, :T]
