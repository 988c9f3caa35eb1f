"""What the target does with the AR's vector in place of its own: KL and cross-entropy over the tokens that follow.

The output of block K at a row's position is replaced, the blocks after it run on, and the next tokens' distributions
are compared with the untouched ones (patching.py). Variants: the AR's reading of the explanation at the length |h|; as
ablations nothing (zero), the mean vector, another document's vector (resample); as controls h itself (gold repatch), h
with noise as large as the reading's error, the reading of another document's explanation and of the text-only writer's.

Sums are over rows and tokens:
    CE recovered = (CE_ablation - CE_variant) / (CE_ablation - CE_clean)    KL recovered = 1 - KL_variant / KL_ablation
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from nla_jax.errors import InputError
from nla_jax.evals.context import Context
from nla_jax.evals.controls import other_documents
from nla_jax.evals.fve import mean_raw_of, usable
from nla_jax.evals.patching import AFTER, Patcher, documents, following, load_target
from nla_jax.evals.result import Row, SuiteResult
from nla_jax.metrics import normalize

NAME = "downstream"
needs: frozenset[str] = frozenset({"target", "tokens"})

RECONSTRUCTION = "reconstruction"
ABLATIONS = ("mean", "zero", "resample")
# Variant -> the name of the control as tables print it.
CONTROLS = {
    "gold": "gold repatch",
    "noise": "noise of matched norm",
    "shuffled": "shuffled pairs",
    "text_only": "text-only writer",
}
WINDOWS = (1, 4, 8, 16, 32)  # the next so many tokens
_OFFSETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of the curves
_GOLD = 0.01  # of the mean ablation's KL: more, and the stored vectors are not the target's own


@dataclass(frozen=True)
class Patched:
    """What was measured of n rows, offsets 1 .. T: `there` bool [n, T] is where the document has such a token.

    By variant, float64 [n, T] in nats, 0 where not `there`: `kl` from the clean distribution, `ce` of the true token.
    `valid` bool [n] by variant: whether the row has it. `ce_clean` [n, T]."""

    there: np.ndarray
    kl: dict[str, np.ndarray]
    ce: dict[str, np.ndarray]
    ce_clean: np.ndarray
    valid: dict[str, np.ndarray]


def run(ctx: Context, *, after: int = AFTER) -> SuiteResult:
    """The suite; `after`: how many tokens after the position are followed."""
    if after < 1:
        raise InputError("tokens after the position", expected="at least 1", got=after)
    data, notes = ctx.data, []
    assert data.tokens is not None and ctx.nla.target is not None
    left = np.array([len(t) for t in data.tokens]) - 1 - data.positions
    rows = data.main[left[data.main] > 0]
    if len(rows) < len(data.main):
        notes.append(f"{len(data.main) - len(rows)} of {len(data.main)} rows end their document: nothing follows them")
    settings = {"after": after, "layer": data.layer}
    if not len(rows):
        return SuiteResult(NAME, (), (*notes, "no row has a token after it: nothing to measure"), settings=settings)
    drawn = ctx.texts(1, rows)
    texts, failed = [t[0] for t in drawn.text], drawn.failed[:, 0]
    vectors = variants(ctx, rows, texts, notes)
    found = measure(ctx, rows, vectors, after)
    docs = data.docs[rows]
    windows = _windows(int(found.there.sum(axis=1).max()), after)
    head = max(w for w in windows if w <= 16)
    table = _headline(ctx, found, docs, windows, head)
    if failed.any():
        count = f"{failed.sum()} of {len(rows)} explanations failed (no closing tag, or cut)"
        notes.append(f"{count}: the AR read their raw text")
        if not failed.all():
            table += _recovered(
                ctx, found, docs, RECONSTRUCTION, "mean", head, among=~failed, part="; parsed ones alone"
            )
    table += _controls(ctx, found, docs, head)
    gold, mean = (float(found.kl[name][:, :head].sum()) for name in ("gold", "mean"))
    if gold > _GOLD * mean:
        notes.append(
            "putting h itself back changes the distributions: the stored vectors are not quite the target's own"
        )
    columns = _columns(ctx, rows, texts, failed, vectors, found)
    return SuiteResult(NAME, tuple(table), tuple(notes), columns, settings, _series(ctx, found, docs, windows))


def _windows(longest: int, after: int) -> list[int]:
    """Those of WINDOWS that differ: up to the first that holds all the tokens that any row has after it."""
    windows = [w for w in WINDOWS if w < after] + [after]
    return [w for i, w in enumerate(windows) if i == 0 or windows[i - 1] < longest]


def variants(ctx: Context, rows: np.ndarray, texts: list[str], notes: list[str]) -> dict[str, np.ndarray]:
    """What is put in place of h, by variant, float32 [n, D]; NaN where a row has none."""
    data = ctx.data
    h = data.vectors[rows].astype(np.float64)
    size = np.linalg.norm(h, axis=1, keepdims=True)
    mean, whose = mean_raw_of(ctx)
    notes.append(f"mean ablation: the {whose}")

    def at_length(read: np.ndarray) -> np.ndarray:
        """Readings at the length |h|; the mean vector for one without a direction."""
        unit = normalize(usable(read, np.zeros(len(read), bool)), 1.0)
        return np.where(unit.any(axis=1, keepdims=True), unit * size, mean[None])

    predicted = ctx.read(texts)
    lost = int((~usable(predicted, np.zeros(len(rows), bool)).any(axis=1)).sum())
    if lost:
        notes.append(f"{lost} readings have no direction (zero, or no number): the mean vector in their place")
    read = at_length(predicted)
    random = np.stack([direction(ctx.seed, int(row), h.shape[1]) for row in data.rows[rows]])
    partner = other_documents(data.docs[rows])
    apart = (data.docs[rows][partner] != data.docs[rows])[:, None]
    if not apart.any():
        notes.append("one document: no resample ablation and no shuffled pairs")
    out = {
        RECONSTRUCTION: read,
        "mean": np.repeat(mean[None], len(rows), axis=0),
        "zero": np.zeros_like(h),
        "resample": np.where(apart, h[partner], np.nan),
        "gold": h,
        "noise": h + random * np.linalg.norm(read - h, axis=1, keepdims=True),
        "shuffled": np.where(apart, normalize(read[partner], 1.0) * size, np.nan),
    }
    teacher = [data.teacher[i] for i in rows.tolist()]
    have = np.array([text is not None for text in teacher])
    if have.any():
        out["text_only"] = np.where(have[:, None], at_length(ctx.read([text or "" for text in teacher])), np.nan)
    return {name: vector.astype(np.float32) for name, vector in out.items()}


def direction(seed: int, row: int, size: int, use: int = 0) -> np.ndarray:
    """A random unit vector of a row, another for each `use`: the same whichever other rows are evaluated."""
    return normalize(np.random.default_rng((seed, row, use)).standard_normal((1, size)), 1.0)[0]


def measure(ctx: Context, rows: np.ndarray, vectors: dict[str, np.ndarray], after: int) -> Patched:
    """Runs the target on every document, and its later blocks for every variant of every row."""
    assert ctx.nla.target is not None
    ctx.use("target")
    patcher = Patcher(*load_target(ctx.nla.target, ctx.mesh), ctx.data.layer, mesh=ctx.mesh)
    ids, there = following(ctx.data, rows, after)
    valid = {name: np.isfinite(v).all(axis=1) for name, v in vectors.items()}
    kl = {name: np.zeros((len(rows), after)) for name in vectors}
    ce = {name: np.zeros((len(rows), after)) for name in vectors}
    clean = np.zeros((len(rows), after))
    place = {int(row): i for i, row in enumerate(rows)}
    bar = tqdm(total=len(rows), desc="patching", unit="vector", disable=not ctx.progress)
    for tokens, members in documents(ctx.data, rows, after):
        at = np.array([place[int(row)] for row in members])
        pairs = [(name, i) for name in vectors for i in at.tolist() if valid[name][i]]
        index = np.array([i for _, i in pairs])
        given = np.stack([vectors[name][i] for name, i in pairs])
        found = patcher.effects(patcher.read(tokens), ctx.data.positions[rows[index]], given, ids[index])
        for j, (name, i) in enumerate(pairs):
            kl[name][i] = np.where(there[i], found.kl[j], 0.0)
            ce[name][i] = np.where(there[i], -found.logprob[j], 0.0)
            clean[i] = np.where(there[i], -found.logprob_reference[j], 0.0)
        bar.update(len(members))
    bar.close()
    return Patched(there, kl, ce, clean, valid)


# -- the table ----------------------------------------------------------------------------------------------------


def _headline(ctx: Context, found: Patched, docs: np.ndarray, windows: list[int], head: int) -> list[Row]:
    """What the reconstruction recovers of each ablation: the headline window first."""
    out = []
    for ablation in ABLATIONS:
        for window in (head, *(w for w in windows if w != head)):
            out += _recovered(ctx, found, docs, RECONSTRUCTION, ablation, window)
    return out


def _controls(ctx: Context, found: Patched, docs: np.ndarray, head: int) -> list[Row]:
    out = []
    for name, control in CONTROLS.items():
        if name in found.kl:
            out += _recovered(ctx, found, docs, name, "mean", head, control=control)
    for name in (RECONSTRUCTION, *ABLATIONS, *CONTROLS):
        if name in found.kl and found.valid[name].any():
            v = found.valid[name]
            tokens = found.there[v, :head].sum(axis=1)
            control = CONTROLS.get(name, f"{name} ablation" if name in ABLATIONS else "")
            fields: dict[str, Any] = {"group": f"next {head}", "control": control, "note": f"{tokens.sum()} tokens"}
            out.append(ctx.row("kl", found.kl[name][v, :head].sum(axis=1), tokens, docs[v], **fields))
            out.append(ctx.row("ce", found.ce[name][v, :head].sum(axis=1), tokens, docs[v], **fields))
    tokens = found.there[:, :head].sum(axis=1)
    out.append(ctx.row("ce", found.ce_clean[:, :head].sum(axis=1), tokens, docs, group=f"next {head}", control="clean"))
    return out


def _recovered(
    ctx: Context,
    found: Patched,
    docs: np.ndarray,
    name: str,
    ablation: str,
    window: int,
    *,
    among: np.ndarray | None = None,
    part: str = "",
    control: str = "",
) -> list[Row]:
    """kl_recovered and ce_recovered of a variant against an ablation over the next `window` tokens."""
    v = found.valid[name] & found.valid[ablation]
    v = v if among is None else v & among
    if not v.any():
        return []
    kl, kl_ablated, ce, ce_ablated, clean = (
        x[v, :window].sum(axis=1)
        for x in (found.kl[name], found.kl[ablation], found.ce[name], found.ce[ablation], found.ce_clean)
    )
    tokens = found.there[v, :window].sum()
    group = f"next {window}, against {ablation}{part}"
    fields: dict[str, Any] = {"group": group, "control": control}
    rows = []
    for metric, above, below, of, unit in (
        ("kl_recovered", kl, kl_ablated, _one_minus, "KL(clean || {} ablation), {:.4g} nats a token"),
        (
            "ce_recovered",
            ce_ablated - ce,
            ce_ablated - clean,
            None,
            "CE of the {} ablation, {:+.4g} nats a token over clean",
        ),
    ):
        total = float(below.sum())
        fields["denominator"] = unit.format(ablation, total / tokens)
        fields["note"] = f"{tokens} tokens"
        if total > 0:
            rows.append(ctx.row(metric, above, below, docs[v], of=of, **fields))
        else:  # nothing was lost that could be recovered
            fields["note"] += "; the ablation does not raise it"
            rows.append(Row(metric, None, n=int(v.sum()), documents=len(np.unique(docs[v])), **fields))
    return rows


def _one_minus(x: np.ndarray) -> np.ndarray:
    return 1.0 - x


# -- the dump and the curves --------------------------------------------------------------------------------------


def _columns(
    ctx: Context,
    rows: np.ndarray,
    texts: list[str],
    failed: np.ndarray,
    vectors: dict[str, np.ndarray],
    found: Patched,
) -> dict[str, Any]:
    """Per row: `kl_NAME` and `ce_NAME` [n, T] in nats by offset, NaN where there is no such token or variant."""
    data = ctx.data
    out: dict[str, Any] = {
        "row": data.rows[rows],
        "doc": data.docs[rows],
        "doc_id": [data.doc_ids[i] for i in rows.tolist()],
        "position": data.positions[rows],
        "text": texts,
        "failed": failed,
        "tokens_after": found.there.sum(axis=1).astype(np.int32),
        "ce_clean": np.where(found.there, found.ce_clean, np.nan),
    }
    for name in found.kl:
        known = found.there & found.valid[name][:, None]
        out[f"kl_{name}"] = np.where(known, found.kl[name], np.nan)
        out[f"ce_{name}"] = np.where(known, found.ce[name], np.nan)
    return out | {"vector": data.vectors[rows], "vector_reconstruction": vectors[RECONSTRUCTION]}


def _series(ctx: Context, found: Patched, docs: np.ndarray, windows: list[int]) -> dict[str, Any]:
    """KL by offset of every variant, and KL recovered by window against every ablation."""
    out: dict[str, Any] = {}
    for name in (RECONSTRUCTION, *ABLATIONS, *CONTROLS):
        points = []
        for t in (t for t in _OFFSETS if name in found.kl and t <= found.there.shape[1]):
            v = found.valid[name] & found.there[:, t - 1]
            if v.any():
                points.append((t, ctx.row("kl", found.kl[name][v, t - 1], None, docs[v])))
        label = CONTROLS.get(name, f"{name} ablation" if name in ABLATIONS else name)
        if points:
            out[f"kl by offset, {label}"] = curve(
                points, label, "token after the position", "KL (nats)", "KL by offset"
            )
    for ablation in ABLATIONS:
        points = []
        for w in windows:
            kept = [r for r in _recovered(ctx, found, docs, RECONSTRUCTION, ablation, w) if r.metric == "kl_recovered"]
            points += [(w, r) for r in kept]
        if points:
            label = f"against {ablation}"
            out[f"kl_recovered, {label}"] = curve(points, label, "next tokens", "KL recovered", "KL recovered")
    return out


def curve(points: list[tuple[Any, Row]], label: str, xlabel: str, ylabel: str, title: str) -> dict[str, Any]:
    """A series of rows over x, as SuiteResult has them."""
    return {
        "x": [x for x, _ in points],
        "y": [r.value for _, r in points],
        "low": [r.low for _, r in points],
        "high": [r.high for _, r in points],
        "label": label,
        "xlabel": xlabel,
        "ylabel": ylabel,
        "title": title,
    }
