"""What choosing pays: the fve_nrm of the sample that the AR ranks first among k, against the mean of k.

The AR ranks the samples of a row by the cosine of its reading with h; a failed text counts as an orthogonal guess in
the ranking as in the error. The best of k is its expectation over all choices of k of the K samples that were drawn
(order statistics), which cannot fall as k grows and does not hang on which sample came first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from nla_jax import metrics
from nla_jax.errors import InputError
from nla_jax.evals.context import Context
from nla_jax.evals.fve import usable
from nla_jax.evals.result import Row, SuiteResult

NAME = "best-of-k"
needs: frozenset[str] = frozenset()

MEAN = "mean of k"


def run(ctx: Context, *, k: int = 8) -> SuiteResult:
    """The suite, on `k` samples of each row of the headline: the best of 1, 2, 4, ... and k. InputError under 1."""
    if k < 1:
        raise InputError("samples of a row", expected="at least 1", got=k)
    data, m = ctx.data, ctx.data.main
    n, docs = len(m), data.docs[m]
    drawn = ctx.texts(k, m)
    texts, failed = [t for row in drawn.text for t in row], drawn.failed.reshape(-1)
    owner = np.repeat(np.arange(n), k)
    predicted, vectors = ctx.read(texts), data.vectors[m][owner]
    errors = ctx.errors(predicted, vectors, failed)
    cosine = metrics.cosine(usable(predicted, failed), vectors)
    ranked = in_rank_order(cosine.reshape(n, k), errors.reshape(n, k))
    plain = errors.reshape(n, k).mean(axis=1)

    rows: list[Row] = []
    for size in sizes(k):
        best = best_of(ranked, size)
        group = f"k={size}"
        note = f"expected over the choices of {size} of {k} samples" if 1 < size < k else ""
        rows.append(ctx.fve(best, docs, "fve_nrm_best", group=group, note=note))
        about = f"of all {k} samples: the same for every k"
        rows.append(ctx.fve(plain, docs, "fve_nrm_best", group=group, control=MEAN, note=about))
        if size > 1:
            gain = (plain - best) / ctx.variance
            rows.append(ctx.row("fve_nrm_gain", gain, None, docs, group=group, note="best less mean, row by row"))
    columns: dict[str, Any] = {
        "row": data.rows[m][owner],
        "doc": docs[owner],
        "sample": np.tile(np.arange(k), n),
        "text": texts,
        "failed": failed,
        "length": drawn.length.reshape(-1),
        "cosine": cosine,
        "mse_nrm": errors,
    }
    notes = ("failed samples rank and count as an orthogonal guess",) if failed.any() else ()
    settings = {"k": k, "variance_nrm": ctx.variance, "mse_scale": ctx.mse_scale}
    return SuiteResult(NAME, tuple(rows), notes, columns, settings, _series(rows))


def sizes(k: int) -> list[int]:
    """1, 2, 4, ... and k itself."""
    return [*(2**j for j in range(k.bit_length()) if 2**j < k), k]


def in_rank_order(cosine: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The errors [n, K] of each row, the sample that the AR ranks first in front."""
    return np.take_along_axis(errors, np.argsort(-cosine, axis=1, kind="stable"), axis=1)


def best_of(ranked: np.ndarray, k: int) -> np.ndarray:
    """The error [n] of the first-ranked among k of K samples, expected over all choices: the sample of rank r (from 0)
    is first in C(K - 1 - r, k - 1) of the C(K, k) choices."""
    samples = ranked.shape[1]
    weights, left = np.zeros(samples), 1.0
    for rank in range(samples - k + 1):
        weights[rank] = left * k / (samples - rank)
        left *= 1.0 - k / (samples - rank)
    return ranked @ weights


def _series(rows: list[Row]) -> dict[str, Any]:
    out = {}
    for control, name in (("", "best of k"), (MEAN, MEAN)):
        some = [r for r in rows if r.metric == "fve_nrm_best" and r.control == control]
        out[name] = {
            "x": [int(r.group[2:]) for r in some],
            "y": [r.value for r in some],
            "low": [r.low for r in some],
            "high": [r.high for r in some],
            "xlabel": "k",
            "ylabel": "fve_nrm",
            "title": "The sample the AR ranks first among k",
        }
    return out
