"""What the training vectors of a set look like: mean and variance of v_n, and norms, in one pass over the store.

v_n is a vector scaled to L2 norm `mse_scale`, as in metrics.py. Sums are float64, block by block (Chan, Golub and
LeVeque's update), so the result depends on the rows and their order alone, and not on how much memory there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nla_jax.errors import VectorError
from nla_jax.metrics import normalize
from nla_jax.store import Store

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
_BLOCK = 1 << 22  # elements read at a time
_ROUND = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)

Progress = Callable[[int, int], None]  # (rows done, rows in all)


@dataclass(frozen=True)
class Stats:
    """Of n vectors. `mu` float64 [D] is the un-normalised mean of v_n, `variance_nrm` the mean over rows and D of
    (v_n - mu)^2, `baseline_meannorm` the same with mu scaled to mse_scale. `norms` holds the mean and quantiles of the
    raw vectors' L2 norms."""

    n: int
    mu: np.ndarray
    variance_nrm: float
    baseline_meannorm: float
    norms: dict[str, float]


def training_stats(store: Store, rows: np.ndarray, mse_scale: float, progress: Progress | None = None) -> Stats:
    """The statistics of some rows of a store; VectorError for a zero vector, which has no direction."""
    if not len(rows):
        raise VectorError(f"{store.path}: training vectors", expected="at least one", got="none")
    mean = np.zeros(store.d_model)
    squares, n = 0.0, 0
    norms = np.empty(len(rows))
    size = max(1, _BLOCK // store.d_model)
    for start in range(0, len(rows), size):
        block = rows[start : start + size]
        raw = store.vectors(block)
        length = np.linalg.norm(raw.astype(np.float64), axis=1)
        if not length.all():
            row = int(block[int(np.argmin(length))])
            raise VectorError(f"{store.path}: row {row}", expected="a vector with a direction", got="zeros")
        norms[start : start + len(block)] = length
        v = normalize(raw, mse_scale)
        block_mean = v.mean(axis=0)
        delta = block_mean - mean
        total = n + len(block)
        squares += float(np.sum((v - block_mean) ** 2)) + float(delta @ delta) * n * len(block) / total
        mean += delta * (len(block) / total)
        n = total
        if progress is not None:
            progress(n, len(rows))
    variance = squares / (n * store.d_model)
    length_mu = float(np.linalg.norm(mean))
    # (v - c)^2 averages to the variance plus the square of how far c is from the mean; mu scaled is on mu's own ray.
    away = mse_scale - length_mu if length_mu > 0 else mse_scale
    found = {f"{q:g}": float(x) for q, x in zip(QUANTILES, np.quantile(norms, QUANTILES), strict=True)}
    return Stats(n, mean, variance, variance + away**2 / store.d_model, {"mean": float(norms.mean()), **found})


def round_scale(norm: float) -> float:
    """The smallest round number (one or one and a half digits) that is not below a norm: 143 gives 150."""
    power = 10.0 ** math.floor(math.log10(norm))
    return next(float(f"{m * power:.3g}") for m in (*_ROUND, 20.0) if m * power >= norm)
