"""Several short samples in one row of tokens, so that little of a batch is padding.

Samples stand one after another in a row. Each has a segment number (1, 2, ...; 0 is padding) and its own positions,
and `run_blocks(..., positions=, segments=)` lets a token see the shared prefix and its own segment alone, so that a
packed sample computes what it would alone. A row has up to V samples; vectors come as [B, V, D].
"""

from __future__ import annotations

import bisect

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.verbalizer import rescale


def pack(lengths: np.ndarray, capacity: int, most: int) -> list[np.ndarray]:
    """Indices of samples, one array per row, each of at most `capacity` tokens and `most` samples.

    Best fit, longest first: every sample goes to the fullest row that still has room for it."""
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    rows: list[list[int]] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        size = int(lengths[i])
        at = bisect.bisect_left(free, (size, -1))
        if at == len(free):
            rows.append([i])
            left, row = capacity - size, len(rows) - 1
        else:
            left, row = free.pop(at)
            rows[row].append(i)
            left -= size
        if left > 0 and len(rows[row]) < most:
            bisect.insort(free, (left, row))
    return [np.asarray(row) for row in rows]


def attention_mask(positions_BxT: np.ndarray, segments_BxT: np.ndarray, prefix: int = 0) -> np.ndarray:
    """bool [B, T, prefix + T]: which tokens (the shared prefix first) each token of packed rows sees.

    What `run_blocks` does with the same two arrays, written out for attention of one's own. Without sliding windows.
    """
    same = segments_BxT[:, :, None] == segments_BxT[:, None, :]
    earlier = positions_BxT[:, :, None] >= positions_BxT[:, None, :]
    shared = np.ones((*segments_BxT.shape, prefix), bool)
    return np.concatenate([shared, same & earlier], axis=2)


def spread(vectors_BxVxD: jax.Array, markers_BxV: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The vectors at their markers: float32 [B, T, D], zero elsewhere, and bool [B, T] of where they are.

    A marker of -1 is no place."""
    at = markers_BxV[:, :, None] == jnp.arange(length)[None, None, :]
    placed = jnp.einsum(
        "bvt,bvd->btd", at.astype(jnp.float32), vectors_BxVxD.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return placed, at.any(axis=1)


def inject_packed(
    x_BxTxD: jax.Array, vectors_BxVxD: jax.Array, markers_BxV: jax.Array, *, injection_scale: float
) -> jax.Array:
    """`verbalizer.inject` for packed rows: every marker's embedding overwritten by its vector at norm
    `injection_scale`."""
    placed, at = spread(rescale(vectors_BxVxD, injection_scale), markers_BxV, x_BxTxD.shape[1])
    return jnp.where(at[:, :, None], placed.astype(x_BxTxD.dtype), x_BxTxD)
