"""Whether the AR's reading of a text picks the activation that the text is about among others.

Candidates are ranked by centred cosine: both sides at the same length, less the mean of the training rows (of the
evaluated rows for want of these), since what all activations share says nothing about which one is meant. Random sets
of N candidates are not drawn: how many of all the others lie nearer than the true one decides the expected top-1 and
reciprocal rank over every set of N (hypergeometric), so the numbers carry no sampling noise. A tie counts as the
average over its orders, and a failed text ties with everything, which is chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_jax import metrics
from nla_jax.errors import InputError
from nla_jax.evals.context import Context
from nla_jax.evals.controls import other_documents
from nla_jax.evals.result import Row, SuiteResult

NAME = "retrieval"
needs: frozenset[str] = frozenset()

TIE = 1e-9  # cosines nearer to each other than this are equal: vectors have float32's precision
SHUFFLED, CHANCE = "shuffled pairs", "chance"
_BLOCK = 1 << 24  # numbers of the matrix of similarities held at a time


@dataclass(frozen=True)
class Ranks:
    """For each query, int64 [q]: how many of its `pool` negatives lie nearer than the true candidate, or as near."""

    above: np.ndarray
    tied: np.ndarray
    pool: np.ndarray

    def take(self, index: np.ndarray) -> Ranks:
        return Ranks(self.above[index], self.tied[index], self.pool[index])


def run(ctx: Context, *, candidates: Sequence[int] = (10, 100, 1000)) -> SuiteResult:
    """The suite, on the first sample of each row of the headline. `candidates`: sizes of the sets, the true one
    counted; those that there are too few rows for are left out with a note. InputError under 2 rows, or sizes."""
    data, m = ctx.data, ctx.data.main
    n, docs = len(m), data.docs[m]
    sizes = sorted(set(candidates))
    if not sizes or sizes[0] < 2:
        raise InputError("candidates of a retrieval", expected="sizes of 2 or more", got=list(candidates))
    if n < 2:
        raise InputError("retrieval", expected="at least 2 rows that are not masked", got=n, fix="more rows (--n)")
    drawn = ctx.texts(1, m)
    texts, failed = [t[0] for t in drawn.text], drawn.failed[:, 0]
    predicted, vectors = ctx.read(texts), data.vectors[m]
    mean, whose = _mean(ctx)
    query, target = _centred(predicted, failed, mean, ctx.mse_scale), _centred(vectors, None, mean, ctx.mse_scale)

    notes = [f"centred by the {whose}"]
    pools = {"": np.zeros(n, np.int64), "same document": docs}
    tokens = _tokens(ctx)
    if tokens is None:
        notes.append("no negatives of the same token: the rows do not say their tokens")
    else:
        pools["same token"] = tokens
    found = ranks(query, target, np.arange(n), pools)
    partner = other_documents(docs)
    apart = docs[partner] != docs
    wrong = ranks(query[partner], target, np.arange(n), pools)
    if not apart.any():
        notes.append(f"no {SHUFFLED}: the rows are of one document")

    fits = [size for size in sizes if size <= n]
    if len(fits) < len(sizes):
        missing = ", ".join(f"N={size}" for size in sizes if size > n)
        notes.append(f"left out: {missing}; there are {n} candidates")
    if not fits:
        fits = [n]
    rows: list[Row] = []
    for size in fits:
        note = f"expected over all sets of {size} of the {n} rows" if size < n else "all rows"
        rows += _rows(ctx, found[""], wrong[""], apart, docs, size, group=f"N={size}", note=note)
    for name in [name for name in pools if name]:
        some = np.flatnonzero(found[name].pool)
        if not len(some):
            notes.append(f"no negatives of the {name}: no two rows share one")
            continue
        sets = found[name].pool[some] + 1
        note = f"all rows of the {name}: {sets.min()} to {sets.max()} candidates, {sets.mean():.3g} on average"
        kept, shuffled = found[name].take(some), wrong[name].take(some)
        rows += _rows(ctx, kept, shuffled, apart[some], docs[some], None, group=name, note=note)

    columns: dict[str, Any] = {
        "row": data.rows[m],
        "doc": docs,
        "text": texts,
        "failed": failed,
        "predicted": predicted,
        "vector": vectors,
        "shuffled_with": np.where(apart, data.rows[m][partner], -1),
    }
    columns |= {} if tokens is None else {"token": tokens}
    for name, r in found.items():
        end = f"_{name.replace(' ', '_')}" if name else ""
        columns |= {f"above{end}": r.above, f"tied{end}": r.tied, f"negatives{end}": r.pool}
        columns |= {f"above{end}_shuffled": wrong[name].above, f"tied{end}_shuffled": wrong[name].tied}
    settings = {"candidates": sizes, "centre": whose, "tie": TIE, "mse_scale": ctx.mse_scale}
    return SuiteResult(NAME, tuple(rows), tuple(notes), columns, settings, _series(rows))


def ranks(query: np.ndarray, target: np.ndarray, truth: np.ndarray, pools: dict[str, np.ndarray]) -> dict[str, Ranks]:
    """Where the true candidate stands for each query: by cosine of unit (or zero) vectors [q, D] against [n, D], with
    `truth` int64 [q] the true one's row. A pool's labels int64 [n] say which rows are negatives of each other."""
    out = {name: Ranks(*(np.zeros(len(query), np.int64) for _ in range(3))) for name in pools}
    step = max(1, _BLOCK // max(target.shape))
    for start in range(0, len(query), step):
        at = np.arange(start, min(start + step, len(query)))
        cosine = query[at] @ target.T
        own = cosine[np.arange(len(at)), truth[at]][:, None]
        others = np.ones(cosine.shape, bool)
        others[np.arange(len(at)), truth[at]] = False
        above, tied = cosine > own + TIE, np.abs(cosine - own) <= TIE
        for name, labels in pools.items():
            among = others & (labels[None, :] == labels[truth[at], None])
            out[name].above[at] = np.sum(above & among, axis=1)
            out[name].tied[at] = np.sum(tied & among, axis=1)
            out[name].pool[at] = np.sum(among, axis=1)
    return out


def expected(found: Ranks, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(top-1, reciprocal rank) float64 [q], expected over the sets of `size` candidates: the true one and size - 1 of
    its negatives, all equally likely; `found.pool` is the same for all. None: all of a row's negatives, however many.

    With b of M negatives above and m = size - 1 drawn, top-1 is C(M - b, m) / C(M, m), and the reciprocal rank
    E[1 / (1 + X)] of the hypergeometric X has the closed form below. A tie of t is any b from above to above + t."""
    pool = int(found.pool.max(initial=0))
    if size is None:
        rank = np.arange(1, pool + 2)
        return _over_ties((rank == 1).astype(np.float64), found), _over_ties(1.0 / rank, found)
    m, b = size - 1, np.arange(pool + 1)
    steps = np.maximum(pool - b[:-1] - m, 0) / np.maximum(pool - b[:-1], 1)
    top = np.concatenate([[1.0], np.cumprod(steps)])
    reciprocal = (pool + 1 - (pool - b - m) * top) / ((b + 1) * (m + 1))
    return _over_ties(top, found), _over_ties(reciprocal, found)


def _over_ties(values: np.ndarray, found: Ranks) -> np.ndarray:
    """Mean of values[above], ..., values[above + tied] for each query."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    spread = (total[found.above + found.tied + 1] - total[found.above]) / (found.tied + 1)
    return np.where(found.tied == 0, values[found.above], spread)  # a difference of sums would round


def _rows(
    ctx: Context, found: Ranks, wrong: Ranks, apart: np.ndarray, docs: np.ndarray, size: int | None, **about: Any
) -> list[Row]:
    """top_1 and mrr with both controls. `wrong` are the ranks for another document's text, where `apart` bool [q]."""
    out = []
    values = expected(found, size)
    chance = chances(found.pool + 1 if size is None else np.full(len(docs), size))
    picked = np.flatnonzero(apart)
    shuffled = expected(wrong.take(picked), size) if len(picked) else values
    for i, metric in enumerate(("top_1", "mrr")):
        out.append(ctx.row(metric, values[i], None, docs, **about))
        group = about["group"]
        if len(picked):
            note = "the reading of a text about another document's row"
            out.append(ctx.row(metric, shuffled[i], None, docs[picked], group=group, note=note, control=SHUFFLED))
        n, documents, note = len(docs), len(np.unique(docs)), "by its formula: no interval"
        luck = float(np.mean(chance[i]))
        out.append(Row(metric, luck, n=n, documents=documents, group=group, control=CHANCE, note=note))
    return out


def chances(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1 / N, H_N / N) of a ranking by chance for sets of N candidates, float64 [q]."""
    harmonic = np.cumsum(1.0 / np.arange(1, int(sizes.max()) + 1))
    return 1.0 / sizes, harmonic[sizes - 1] / sizes


def _mean(ctx: Context) -> tuple[np.ndarray, str]:
    if ctx.data.train_mean_nrm is not None:
        return ctx.data.train_mean_nrm, "mean of the training rows"
    found = metrics.normalize(ctx.data.vectors[ctx.data.main], ctx.mse_scale).mean(axis=0)
    return found, "mean of the evaluated rows themselves, for want of the training set's"


def _centred(vectors: np.ndarray, failed: np.ndarray | None, mean: np.ndarray, scale: float) -> np.ndarray:
    """Unit vectors float64 [n, D] of v_n less the mean; zero where the text failed or a reading is no number."""
    good = np.isfinite(vectors).all(axis=1) & np.any(vectors, axis=1)
    if failed is not None:
        good &= ~failed
    used = np.where(good[:, None], vectors, 0.0)
    return np.where(good[:, None], metrics.normalize(metrics.normalize(used, scale) - mean, 1.0), 0.0)


def _tokens(ctx: Context) -> np.ndarray | None:
    """The token id at each row's position, int64 [headline rows]."""
    data = ctx.data
    if data.tokens is None:
        return None
    return np.array([int(data.tokens[i][data.positions[i]]) for i in data.main.tolist()], np.int64)


def _series(rows: list[Row]) -> dict[str, Any]:
    """top_1 by the number of candidates, and chance."""
    out = {}
    for control, name in (("", "the AR's reading"), (CHANCE, CHANCE)):
        some = [r for r in rows if r.metric == "top_1" and r.group.startswith("N=") and r.control == control]
        out[name] = {
            "x": [int(r.group[2:]) for r in some],
            "y": [r.value for r in some],
            "low": [r.low for r in some],
            "high": [r.high for r in some],
            "xlabel": "candidates",
            "ylabel": "top-1",
            "title": "The right activation is ranked first",
        }
    return out
