"""What an fve_nrm is held against: predictions that use no explanation, the wrong one, or one that never saw h."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nla_jax import metrics
from nla_jax.evals.context import Context
from nla_jax.evals.result import Row

_BLOCK = 1 << 24  # numbers of a matrix of similarities held at a time


@dataclass(frozen=True)
class Control:
    """A control's errors float64 [m] and predictions [m, D] (None: none to calibrate) with the vectors and documents
    they belong to; `about` stands beside its rows. `note` says why there is none. `rows`: further rows; `columns`: for
    the dump, a value for each row of the set."""

    name: str
    errors: np.ndarray | None = None
    predicted: np.ndarray | None = None
    vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    docs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    about: str = ""
    note: str = ""
    rows: tuple[Row, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)


def other_documents(docs: np.ndarray) -> np.ndarray:
    """A pairing int64 [n] of each row with one of another document, by a shift: everything stays in use once. Rows of a
    document that has more than half of them cannot all be paired so."""
    order = np.argsort(docs, kind="stable")
    most = int(np.bincount(np.unique(docs, return_inverse=True)[1]).max())
    shift = max(most, len(docs) // 2)
    partner = np.empty(len(docs), np.int64)
    partner[order] = np.roll(order, -shift)
    return partner


def constant(ctx: Context) -> Control:
    """The floor of fve_nrm, which a constant direction at best reaches: by its formula, and measured on these rows."""
    m, name = ctx.data.main, "constant floor"
    mean, whose = ctx.data.train_mean_nrm, "training rows"
    if mean is None:
        mean, whose = metrics.normalize(ctx.data.vectors[m], ctx.mse_scale).mean(axis=0), "evaluated rows"
    predicted = np.repeat(mean[None], len(m), axis=0)
    floor = metrics.constant_floor(ctx.variance * ctx.data.vectors.shape[1] / ctx.mse_scale**2)
    formula = Row(
        "fve_nrm",
        floor,
        n=len(m),
        documents=len(np.unique(ctx.data.docs[m])),
        control=name,
        denominator=ctx.denominator,
        note="1 - 2 (1 - sqrt(1 - V)) / V: follows from the denominator alone, no interval",
    )
    return Control(
        "constant predictor",
        ctx.errors(predicted, ctx.data.vectors[m]),
        predicted,
        vectors=ctx.data.vectors[m],
        docs=ctx.data.docs[m],
        about=f"the mean direction of the {whose} for every row",
        rows=(formula,),
        columns={"mse_nrm_constant": ctx.errors(np.repeat(mean[None], len(ctx.data), 0), ctx.data.vectors)},
    )


def shuffled(ctx: Context, used: np.ndarray, failed: np.ndarray) -> Control:
    """Each reading against the vector of a row of another document."""
    name, data, m = "shuffled pairs", ctx.data, ctx.data.main
    partner = m[other_documents(data.docs[m])]
    apart = data.docs[partner] != data.docs[m]
    column = np.full(len(data), -1, np.int64)
    column[m[apart]] = partner[apart]
    if not apart.any():
        return Control(name, note=f"no {name}: the rows are of one document", columns={"shuffled_with": column})
    own, other = m[apart], partner[apart]
    return Control(
        name,
        ctx.errors(used[own], data.vectors[other], failed[own] | ~used[own].any(axis=1)),
        used[own],
        data.vectors[other],
        data.docs[own],
        "each reading against a vector of another document",
        columns={"shuffled_with": column},
    )


def nearest_training(ctx: Context, most: int) -> Control:
    """The explanation of the training vector that lies nearest by centred cosine, read by the AR."""
    name, data, m = "nearest training vector's text", ctx.data, ctx.data.main
    found = None if data.train is None else data.train(most, explained=True)
    if found is None or not len(found[0]) or found[1] is None:
        return Control(name, note=f"no {name}: the data has no training rows with explanations")
    vectors, texts = found[0], found[1]
    mean = data.train_mean_nrm
    if mean is None:
        mean = metrics.normalize(vectors, ctx.mse_scale).mean(axis=0)
    at = nearest(data.vectors[m], vectors, mean, ctx.mse_scale)
    chosen = [texts[i] or "" for i in at.tolist()]
    about = f"written by the teacher for the nearest of {len(vectors)} training vectors, by centred cosine"
    return _read_texts(ctx, name, "nearest", m, chosen, about)


def nearest(vectors: np.ndarray, among: np.ndarray, mean: np.ndarray, scale: float) -> np.ndarray:
    """int64 [n]: which of `among` [m, D] has the greatest cosine with each vector, both as v_n less `mean`."""
    query = metrics.normalize(metrics.normalize(vectors, scale) - mean, 1.0)
    best, at = np.full(len(query), -np.inf), np.zeros(len(query), np.int64)
    step = max(1, _BLOCK // max(len(query), among.shape[1]))
    for start in range(0, len(among), step):
        block = metrics.normalize(metrics.normalize(among[start : start + step], scale) - mean, 1.0)
        cosine = query @ block.T
        first = np.argmax(cosine, axis=1)
        value = cosine[np.arange(len(query)), first]
        better = value > best
        best, at = np.where(better, value, best), np.where(better, start + first, at)
    return at


def text_only(ctx: Context) -> Control:
    """The teacher's explanation of the row itself, written from its context without h, read by the AR."""
    name, teacher = "text-only writer", ctx.data.teacher
    m = np.array([i for i in ctx.data.main.tolist() if teacher[i] is not None], np.int64)
    if not len(m):
        return Control(name, note=f"no {name}: the data has no teacher's explanations of these rows")
    about = "written by the teacher from the text up to the position, without the activation"
    missing = len(ctx.data.main) - len(m)
    about += f"; {missing} rows have none" if missing else ""
    return _read_texts(ctx, name, "teacher", m, [teacher[i] or "" for i in m.tolist()], about)


def _read_texts(ctx: Context, name: str, short: str, rows: np.ndarray, texts: list[str], about: str) -> Control:
    """A control that is made of a text for some rows; columns say which, and what the AR made of them."""
    predicted = ctx.read(texts)
    bad = ~np.isfinite(predicted).all(axis=1)
    whole = np.full((len(ctx.data), predicted.shape[1]), np.nan, np.float32)
    whole[rows] = predicted
    written: list[str | None] = [None] * len(ctx.data)
    for i, text in zip(rows.tolist(), texts, strict=True):
        written[i] = text
    vectors = ctx.data.vectors[rows]
    return Control(
        name,
        ctx.errors(predicted, vectors, bad),
        np.where(bad[:, None], 0.0, predicted.astype(np.float64)),
        vectors,
        ctx.data.docs[rows],
        about,
        columns={f"text_{short}": written, f"predicted_{short}": whole},
    )
