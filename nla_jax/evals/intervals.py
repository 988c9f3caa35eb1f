"""95% intervals by bootstrap over documents: rows of one document resemble each other, and go together.

scipy.stats.bootstrap resamples documents, bias-corrected and accelerated (BCa); where that is not defined the
percentile interval stands in and the row's note says so. With few documents a bootstrap interval is too narrow, as a
normal one is beside Student's: both are widened by as much (Hesterberg 2015, "What teachers should know about the
bootstrap"). A number that is made of sums over rows is computed from the sums of each document, so that a resample
costs one small matrix product.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from nla_jax.evals.result import Row

SEED, RESAMPLES, LEVEL = 42, 2000, 0.95
ONE_DOCUMENT = "one document: no interval"
PERCENTILE = "percentile interval"
SAME = "the same in every resample"
FEW = 10  # documents; under it the interval is said to be rough
_BATCH = 1 << 24  # numbers held at a time

Estimate = tuple[float | None, float | None, float | None]  # value, low, high


def ratio(
    numerator_n: np.ndarray,
    denominator_n: np.ndarray,
    docs_n: np.ndarray,
    *,
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> Estimate:
    """sum(numerator) / sum(denominator) over rows, and its interval by document; the value is None without rows."""
    return sums(_ratio, (numerator_n, denominator_n), docs_n, seed=seed, resamples=resamples)[:3]


def mean(values_n: np.ndarray, docs_n: np.ndarray, *, seed: int = SEED, resamples: int = RESAMPLES) -> Estimate:
    """The mean over rows, and its interval by document."""
    return ratio(values_n, np.ones(len(values_n)), docs_n, seed=seed, resamples=resamples)


def statistic(
    fn: Callable[..., float],
    arrays: Sequence[np.ndarray],
    docs_n: np.ndarray,
    *,
    seed: int = SEED,
    resamples: int = RESAMPLES,
) -> Estimate:
    """fn(*arrays) of rows, whatever fn is (a median, say), and its interval by document."""
    return of_rows(fn, arrays, docs_n, seed=seed, resamples=resamples)[:3]


def row(
    metric: str,
    numerator: np.ndarray,
    denominator: np.ndarray | None,
    docs: np.ndarray,
    /,
    *,
    of: Callable[..., np.ndarray] | None = None,
    seed: int = SEED,
    resamples: int = RESAMPLES,
    **fields: Any,
) -> Row:
    """A Row of sum(numerator) / sum(denominator), or of the mean where `denominator` is None.

    `of` turns the ratio into the number that is reported (1 - x for an FVE), for the interval's ends as well.
    `fields` are those of Row (its `denominator` by name); a `note` is kept beside the interval's own."""
    below = np.ones(len(numerator)) if denominator is None else denominator
    fn = _ratio if of is None else lambda a, b: of(_ratio(a, b))
    return sums_row(metric, fn, (numerator, below), docs, seed=seed, resamples=resamples, **fields)


def sums_row(
    metric: str,
    fn: Callable[..., np.ndarray],
    arrays: Sequence[np.ndarray],
    docs: np.ndarray,
    *,
    seed: int = SEED,
    resamples: int = RESAMPLES,
    **fields: Any,
) -> Row:
    """A Row of what `sums` gives."""
    return _row(metric, sums(fn, arrays, docs, seed=seed, resamples=resamples), docs, fields)


def rows_row(
    metric: str,
    fn: Callable[..., float],
    arrays: Sequence[np.ndarray],
    docs: np.ndarray,
    *,
    seed: int = SEED,
    resamples: int = RESAMPLES,
    **fields: Any,
) -> Row:
    """A Row of what `statistic` gives."""
    return _row(metric, of_rows(fn, arrays, docs, seed=seed, resamples=resamples), docs, fields)


def sums(
    fn: Callable[..., np.ndarray], arrays: Sequence[np.ndarray], docs_n: np.ndarray, *, seed: int, resamples: int
) -> tuple[float | None, float | None, float | None, str]:
    """A smooth function of sums over rows, with its interval and a note on it.

    fn gets the sum of each array, [R] for one of shape [n] and [R, k] for one of [n, k], for R resamples at once, and
    returns [R]."""
    arrays = [np.asarray(a, np.float64) for a in arrays]
    docs, count = _documents(docs_n)
    if not len(docs):
        return None, None, None, ""
    perdoc = [_sum_by(a.reshape(len(a), -1), docs, count) for a in arrays]
    flat = [a.ndim == 1 for a in arrays]

    def of(weights: np.ndarray) -> np.ndarray:  # [R, documents]
        found = (weights @ s for s in perdoc)
        return fn(*(s[:, 0] if one else s for s, one in zip(found, flat, strict=True)))

    def resampled(index: np.ndarray, axis: int = -1) -> np.ndarray:
        chosen = np.moveaxis(index, axis, -1)
        lead = chosen.reshape(-1, chosen.shape[-1])
        return of(_counts(lead, count)).reshape(chosen.shape[:-1])

    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(of(np.ones((1, count)))[0])
        widest = max(count, *(s.shape[1] for s in perdoc))
        return (value, *_interval(resampled, value, count, seed, resamples, widest, vectorized=True))


def of_rows(
    fn: Callable[..., float], arrays: Sequence[np.ndarray], docs_n: np.ndarray, *, seed: int, resamples: int
) -> tuple[float | None, float | None, float | None, str]:
    """`statistic` with a note on its interval."""
    arrays = [np.asarray(a) for a in arrays]
    docs, count = _documents(docs_n)
    if not len(docs):
        return None, None, None, ""
    order = np.argsort(docs, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(docs))[:-1])

    def resampled(index: np.ndarray) -> float:
        at = np.concatenate([members[i] for i in index])
        return float(fn(*(a[at] for a in arrays)))

    value = float(fn(*arrays))
    return (value, *_interval(resampled, value, count, seed, resamples, 1, vectorized=False))


def _interval(
    fn: Callable, value: float, count: int, seed: int, resamples: int, widest: int, *, vectorized: bool
) -> tuple[float | None, float | None, str]:
    if not np.isfinite(value):
        return None, None, ""
    if count < 2:
        return None, None, ONE_DOCUMENT
    notes = [f"{count} documents: the interval is rough"] if count < FEW else []

    def draw(method: str, previous: Any = None) -> Any:
        return stats.bootstrap(
            (np.arange(count),),
            fn,
            n_resamples=0 if previous is not None else resamples,
            batch=max(1, _BATCH // widest),
            vectorized=vectorized,
            confidence_level=_level(count),
            method=method,
            bootstrap_result=previous,
            rng=np.random.default_rng(seed),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate distribution is handled here
        found = draw("BCa")
        drawn = found.bootstrap_distribution
        if np.ptp(drawn) <= 1e-12 * max(abs(value), 1.0):  # rounding, of which BCa would make an interval
            return value, value, "; ".join([SAME, *notes])
        interval = found.confidence_interval
        if not np.isfinite([interval.low, interval.high]).all():
            interval = draw("percentile", found).confidence_interval
            notes.insert(0, PERCENTILE)
    if not np.isfinite([interval.low, interval.high]).all():
        return None, None, "not defined in every resample: no interval"
    return float(interval.low), float(interval.high), "; ".join(notes)


def _level(count: int) -> float:
    """The level at which a bootstrap interval of `count` documents is as wide as Student's at LEVEL."""
    wide = stats.t.ppf((1 + LEVEL) / 2, count - 1) * np.sqrt(count / (count - 1))
    return float(1 - 2 * stats.norm.sf(wide))


def _row(
    metric: str, found: tuple[float | None, float | None, float | None, str], docs: np.ndarray, fields: dict[str, Any]
) -> Row:
    value, low, high, note = found
    if value is not None and not np.isfinite(value):
        value = None
    given = fields.pop("note", "")
    note = "; ".join(part for part in (given, note) if part)
    fields.setdefault("n", len(docs))
    return Row(metric, value, low, high, documents=len(np.unique(docs)), note=note, **fields)


def _documents(docs_n: np.ndarray) -> tuple[np.ndarray, int]:
    """Documents numbered from 0 without gaps: [n], and how many there are."""
    names, docs = np.unique(np.asarray(docs_n), return_inverse=True)
    return docs, len(names)


def _sum_by(values_nxk: np.ndarray, docs: np.ndarray, count: int) -> np.ndarray:
    order = np.argsort(docs, kind="stable")
    return np.add.reduceat(values_nxk[order], np.searchsorted(docs[order], np.arange(count)), axis=0)


def _counts(index_RxM: np.ndarray, count: int) -> np.ndarray:
    """How often each document was drawn in each resample, float64 [R, documents]."""
    R = len(index_RxM)
    at = index_RxM + np.arange(R)[:, None] * count
    return np.bincount(at.ravel(), minlength=R * count).reshape(R, count).astype(np.float64)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return numerator / denominator
