"""Grouped-query attention behind one entry point.

Keys come in up to two parts: a *prefix* computed once and shared by every row (the constant part of an AV prompt),
and each row's own keys. One softmax runs over both, so sharing changes no number, only the work.

Three kernels. "plain" holds all scores at once and takes any positions, hence caches. "blocked" is for a sequence that
attends to itself: it walks over blocks of queries and gives each only the keys up to its own end, which halves the
work and keeps one block's scores in memory instead of T^2. "flash" (flash.py) keeps no scores in memory at all, where
the program is compiled for an accelerator that has such a kernel; elsewhere it is "blocked". NLA_FLASH=0 in the
environment does without it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nla_jax.models import flash
from nla_jax.models.layers import precision_of, soft_cap

# Queries per block: at least what keeps the products efficient, at most what keeps the scores small.
_MIN_BLOCK, _MAX_BLOCK, _BLOCKS = 128, 512, 8
_FLASH = 1024  # tokens from which "auto" is "flash"; flash.py says why
_MASKED = -1e30  # finite, so that a row without any visible key gives a mean of values instead of NaN


@dataclasses.dataclass(frozen=True)
class AttnSpec:
    """What does not change from block to block: the score scale, the soft-cap, and the kernel ("auto" chooses).

    `windows` are all values that `window` takes in the program where it is traced: without them "auto" is not "flash",
    whose masks are compiled in. `interpret` is for tests: "flash" is then splash attention everywhere, on other devices
    than TPUs step by step."""

    scale: float
    softcap: float | None = None
    kernel: str = "auto"
    windows: tuple[int, ...] = ()
    interpret: bool = False


def attend(
    q_BxTxNxH: jax.Array,
    k_BxKxSxH: jax.Array,
    v_BxKxSxH: jax.Array,
    spec: AttnSpec,
    *,
    q_pos_T: jax.Array,
    k_pos_S: jax.Array,
    window: jax.Array | int = 0,
    prefix: tuple[jax.Array, jax.Array] | None = None,
    prefix_lengths: jax.Array | None = None,
    cached: bool = False,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of T queries over a shared prefix and S own keys; returns [B, T, N, H].

    Positions are absolute token indices, [T] the same for all rows or [B, T]. A key is visible when it is not after
    the query and, where `window` > 0, fewer than `window` tokens before it. Without `cached`, the S keys are the T
    queries' own tokens. With it they are the slots of a cache; slots not filled yet must carry positions after every
    query. `prefix` holds keys and values [K, P, H] at positions 0..P-1, of which a row sees the first `prefix_lengths`
    [B] (all by default). `segments` [B, T] numbers the samples that are
    packed into a row, one after another: a token sees the prefix and its own segment, and no other.
    """
    T = q_BxTxNxH.shape[1]
    assert segments is None or not cached, "packed rows have no cache"
    segs = None if segments is None else (segments, segments)
    if isinstance(window, int):
        spec = dataclasses.replace(spec, windows=(window,))
    kernel = spec.kernel
    if kernel == "auto":
        kernel = "plain" if cached or T <= _MIN_BLOCK else "blocked"
        # Not in float32: those kernels do not let their products' precision be chosen (see `precision_of`).
        long = not cached and prefix is None and T >= _FLASH and q_BxTxNxH.dtype == jnp.bfloat16
        if long and spec.windows and os.environ.get("NLA_FLASH") != "0":
            kernel = "flash"
    if kernel == "flash":
        assert not cached and prefix is None and spec.windows, "the flash kernels know neither caches nor prefixes"
        return _flash(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, spec, q_pos_T, k_pos_S, jnp.asarray(window), segments)
    if kernel == "plain":
        return _plain(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, spec, q_pos_T, k_pos_S, window, prefix, prefix_lengths, segs)
    assert not cached, "the blocked kernel needs the queries' own keys"
    return _blocked(q_BxTxNxH, k_BxKxSxH, v_BxKxSxH, spec, q_pos_T, k_pos_S, window, prefix, prefix_lengths, segs)


def visible(
    q_pos: jax.Array,
    k_pos: jax.Array,
    window: jax.Array | int,
    segments: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """bool [1, T, S] or [B, T, S]: which keys each query may see; positions and segments [T], [S] or [B, T], [B, S]."""

    def pairs(q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.atleast_2d(q)[:, :, None], jnp.atleast_2d(k)[:, None, :]

    q, k = pairs(q_pos, k_pos)
    window = jnp.asarray(window)
    seen = (q >= k) & ((q - k < window) | (window <= 0))
    if segments is not None:
        q, k = pairs(*segments)
        seen &= q == k
    return seen


def _prefix_positions(size: int, lengths_B: jax.Array | None) -> jax.Array:
    """Positions of the prefix's keys, [P] or [B, P]: those that a row must not see stand after every query."""
    at = jnp.arange(size)
    return at if lengths_B is None else jnp.where(at[None] < lengths_B[:, None], at[None], jnp.iinfo(jnp.int32).max)


def _plain(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttnSpec,
    q_pos: jax.Array,
    k_pos: jax.Array,
    window: jax.Array | int,
    prefix: tuple[jax.Array, jax.Array] | None,
    lengths: jax.Array | None,
    segs: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    B, T, N, H = q.shape
    K = k.shape[1]
    precision = precision_of(q.dtype)
    q = q.reshape(B, T, K, N // K, H)

    def scores(equation: str, keys: jax.Array, key_pos: jax.Array, segs: Any = None) -> jax.Array:
        s = jnp.einsum(equation, q, keys, precision=precision, preferred_element_type=jnp.float32) * spec.scale
        s = soft_cap(s, spec.softcap)
        return jnp.where(visible(q_pos, key_pos, window, segs)[:, None, None], s, _MASKED)

    s_own = scores("btkgh,bksh->bkgts", k, k_pos, segs)
    top = jnp.max(s_own, axis=-1, keepdims=True)
    if prefix is not None:
        s_prefix = scores("btkgh,kph->bkgtp", prefix[0], _prefix_positions(prefix[0].shape[1], lengths))
        top = jnp.maximum(top, jnp.max(s_prefix, axis=-1, keepdims=True))
    # Weights are normalised after the product with the values: one pass less over the scores.
    top = jax.lax.stop_gradient(top)
    w_own = jnp.exp(s_own - top)
    total = jnp.sum(w_own, axis=-1)
    out = jnp.einsum("bkgts,bksh->bkgth", w_own.astype(v.dtype), v, precision=precision)
    if prefix is not None:
        w_prefix = jnp.exp(s_prefix - top)
        total = total + jnp.sum(w_prefix, axis=-1)
        out = out + jnp.einsum("bkgtp,kph->bkgth", w_prefix.astype(v.dtype), prefix[1], precision=precision)
    out = (out / total[..., None]).astype(v.dtype)
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H)


def _blocked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttnSpec,
    q_pos: jax.Array,
    k_pos: jax.Array,
    window: jax.Array | int,
    prefix: tuple[jax.Array, jax.Array] | None,
    lengths: jax.Array | None,
    segs: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    T = q.shape[1]
    size = min(max(-(-T // _BLOCKS), _MIN_BLOCK), _MAX_BLOCK)
    out = []
    for first in range(0, T, size):
        end = min(first + size, T)
        # Rematerialised: a backward pass must not keep every block's scores either.
        block = jax.checkpoint(_plain, static_argnums=(3,))
        own = q[:, first:end], k[:, :, :end], v[:, :, :end]
        q_at, k_at = q_pos[..., first:end], k_pos[..., :end]
        seg = None if segs is None else (segs[0][:, first:end], segs[1][:, :end])
        out.append(block(*own, spec, q_at, k_at, window, prefix, lengths, seg))
    return jnp.concatenate(out, axis=1)


def _flash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spec: AttnSpec,
    q_pos: jax.Array,
    k_pos: jax.Array,
    window: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    """What the platform has for which the program is compiled, which need not be this process's.

    The positions serve "blocked" alone: the others count from a row's start, which differences do not show."""
    (_, T, N, H), K = q.shape, k.shape[1]

    def blocked(q, k, v, segments, window, q_pos, k_pos):
        segs = None if segments is None else (segments, segments)
        return _blocked(q, k, v, spec, q_pos, k_pos, window, None, None, segs)

    def of(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        split = flash.on_mesh(flash.with_window(kernel, spec.windows, T))
        return lambda q, k, v, segments, window, q_pos, k_pos: split(q, k, v, segments, window)

    splash = functools.partial(flash.splash, scale=spec.scale, softcap=spec.softcap)
    kernels, otherwise = {}, blocked
    if flash.splits(N, K):
        kernels["tpu"] = of(splash)
        if spec.interpret:
            otherwise = of(functools.partial(splash, interpret=True))
        elif flash.cudnn_takes(q.dtype, H, spec.softcap, segments is not None):
            kernels["cuda"] = of(functools.partial(flash.cudnn, scale=spec.scale))

    # Rematerialised: the backward pass would otherwise be handed what each platform's kernel keeps, zeros for all but
    # one of them.
    @jax.checkpoint
    def run(*args):
        return jax.lax.platform_dependent(*args, default=otherwise, **kernels)

    return run(q, k, v, segments, window, q_pos, k_pos)
