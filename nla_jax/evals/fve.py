"""How much of the activations the explanations carry, as the AR reads them: every FVE by its full name, with controls.

The headline is fve_nrm over the first sample of each row. Definitions: DESIGN section 5. What a failed text (no closing
tag, or cut by the length cap) would have said is not used: it counts as an orthogonal guess.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nla_jax import metrics
from nla_jax.evals import token_class
from nla_jax.evals.context import Context
from nla_jax.evals.controls import Control, constant, nearest_training, shuffled, text_only
from nla_jax.evals.result import Row, SuiteResult

NAME = "fve"
needs: frozenset[str] = frozenset()

_SCALAR = "the AR gives directions alone: its reading at the one length that fits these rows best; failed texts as zero"
_NORM = "the AR is trained on directions alone: its length is not meant to fit"


def run(ctx: Context, *, nearest: int = 20_000) -> SuiteResult:
    """The suite; `nearest`: training rows among which the nearest one is looked for."""
    data = ctx.data
    drawn = ctx.texts(1)
    texts, failed = [t[0] for t in drawn.text], drawn.failed[:, 0]
    predicted = ctx.read(texts)
    errors = ctx.errors(predicted, data.vectors, failed)
    used = usable(predicted, failed)
    cosine = metrics.cosine(used, data.vectors)
    classes = token_class.of(ctx)
    m, notes = data.main, list(ctx.notes)
    docs = data.docs[m]

    rows = [ctx.fve(errors[m], docs)]
    rows += _other_fves(ctx, errors, used, m, notes)
    rows += [
        ctx.row("cosine", cosine[m], None, docs, note="failed texts as 0"),
        ctx.rows_row("cosine_median", np.median, (cosine[m],), docs),
        ctx.rows_row("mse_nrm_median", np.median, (errors[m],), docs),
    ]
    rows += _lengths(ctx, predicted, failed, drawn.length[:, 0], m)
    rows += _groups(ctx, errors, used, classes, m)
    columns: dict[str, Any] = {
        "row": data.rows,
        "doc": data.docs,
        "doc_id": data.doc_ids,
        "position": data.positions,
        "masked": data.masked,
        "token_class": classes,
        "text": texts,
        "failed": failed,
        "length": drawn.length[:, 0],
        "mse_nrm": errors,
        "cosine": cosine,
        "vector": data.vectors,
        "predicted": predicted,
    }
    found = [constant(ctx), shuffled(ctx, used, failed), nearest_training(ctx, nearest), text_only(ctx)]
    for control in found:
        rows += _control_rows(ctx, control)
        notes += [control.note] if control.note else []
        columns |= control.columns
    if any(not c for c in classes):
        notes.append("token classes are not known: no model of the pair has the tokenizer of these rows")
    mean_raw, _ = mean_raw_of(ctx)
    columns["squared_from_mean"] = np.sum((data.vectors - mean_raw) ** 2, axis=1)
    settings = {"nearest": nearest, "layer": data.layer, "mse_scale": ctx.mse_scale, "variance_nrm": ctx.variance}
    return SuiteResult(NAME, tuple(rows), tuple(notes), columns, settings, _series(rows))


def usable(predicted: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """Readings float64 [n, D] with zeros, which have no direction, for failed texts and readings that are no number."""
    found = np.asarray(predicted, np.float64)
    bad = np.asarray(failed, bool) | ~np.isfinite(found).all(axis=1)
    return np.where(bad[:, None], 0.0, found)


def calibrated(ctx: Context, predicted: np.ndarray, vectors: np.ndarray, docs: np.ndarray, **fields: Any) -> Row:
    """The calibrated FVE (metrics.calibrated_fve) as a Row, with its interval."""
    p, v = metrics.normalize(predicted, ctx.mse_scale), metrics.normalize(vectors, ctx.mse_scale)
    sums = (p, v, np.sum(p * p, axis=1), np.sum(v * v, axis=1), np.sum(p * v, axis=1), np.ones(len(p)))
    fields.setdefault("denominator", "variance of the same rows")
    return ctx.sums_row("fve_calibrated", _calibrated, sums, docs, **fields)


def _calibrated(
    p: np.ndarray, v: np.ndarray, pp: np.ndarray, vv: np.ndarray, pv: np.ndarray, n: np.ndarray
) -> np.ndarray:
    inner = pv - np.sum(p * v, axis=-1) / n
    power_p, power_v = pp - np.sum(p * p, axis=-1) / n, vv - np.sum(v * v, axis=-1) / n
    # What is left of equal numbers after subtraction is rounding, not variance.
    flat = (power_p <= 1e-12 * pp) | (power_v <= 1e-12 * vv)
    power = np.where(flat, 1.0, power_p * power_v)
    return np.where(flat, 0.0, np.sign(inner) * inner**2 / power)


def meannorm_variance(ctx: Context) -> float:
    """The denominator of fve_meannorm: mean over D of (v_n - mu scaled to mse_scale)^2 over the rows that `variance` is
    of. |v_n| is the same for all, so it follows from the variance alone."""
    unit = ctx.mse_scale**2 / ctx.data.vectors.shape[1]
    away = math.sqrt(unit) - math.sqrt(max(unit - ctx.variance, 0.0))
    return ctx.variance + away**2


def mean_raw_of(ctx: Context) -> tuple[np.ndarray, str]:
    """The mean raw vector float64 [D] that fve_raw is measured from, and whose it is."""
    if ctx.data.train_mean_raw is not None:
        return ctx.data.train_mean_raw, "mean of the training rows"
    mean = ctx.data.vectors[ctx.data.main].astype(np.float64).mean(axis=0)
    return mean, "mean of the evaluated rows themselves, for want of the training set's"


def _other_fves(ctx: Context, errors: np.ndarray, used: np.ndarray, m: np.ndarray, notes: list[str]) -> list[Row]:
    data, docs = ctx.data, ctx.data.docs[m]
    base = meannorm_variance(ctx)
    h = data.vectors[m].astype(np.float64)
    mean, whose = mean_raw_of(ctx)
    if "evaluated" in whose or "evaluated" in ctx.variance_source:
        notes.append("the evaluated rows' own mean or variance is a denominator; that of a training set differs")
    unit = metrics.normalize(used[m], 1.0)
    spread = np.sum((h - mean) ** 2, axis=1)
    raw = (np.sum(h * h, axis=1), np.sum(h * unit, axis=1), np.sum(unit * unit, axis=1), spread)
    about = f"variance of h about the {whose}, {spread.mean() / h.shape[1]:.4g} per dimension"
    return [
        ctx.row(
            "fve_meannorm",
            errors[m],
            None,
            docs,
            of=lambda mse: 1.0 - mse / base,
            denominator=f"mean square from the mean direction {base:.4g} ({ctx.variance_source})",
        ),
        calibrated(ctx, used[m], data.vectors[m], docs),
        ctx.sums_row("fve_raw", _raw, raw, docs, denominator=about, note=_SCALAR),
        ctx.rows_row(
            "fve_nrm_median",
            lambda e: 1.0 - float(np.median(e)) / ctx.variance,
            (errors[m],),
            docs,
            denominator=ctx.denominator,
        ),
    ]


def _raw(hh: np.ndarray, hu: np.ndarray, uu: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """1 - sum |h - a u|^2 / sum |h - mean|^2 at the best single length a."""
    explained = np.where(uu > 0, hu**2 / np.where(uu > 0, uu, 1.0), 0.0)
    return 1.0 - (hh - explained) / spread


def _lengths(ctx: Context, predicted: np.ndarray, failed: np.ndarray, length: np.ndarray, m: np.ndarray) -> list[Row]:
    docs = ctx.data.docs[m]
    true = np.linalg.norm(ctx.data.vectors[m].astype(np.float64), axis=1)
    given = np.linalg.norm(predicted[m].astype(np.float64), axis=1)
    off = np.abs(given - true) / true
    ok = np.isfinite(off) & ~failed[m]
    cap = f"length cap {ctx.max_new_tokens} tokens"
    return [
        ctx.rows_row("norm_error_median", np.median, (off[ok],), docs[ok], note=_NORM),
        ctx.row("failed", failed[m].astype(float), None, docs, note=f"no closing tag, or cut; {cap}"),
        ctx.row("length", length[m].astype(float), None, docs, note=f"tokens of the AV's answer; {cap}"),
    ]


def _groups(ctx: Context, errors: np.ndarray, used: np.ndarray, classes: list[str], m: np.ndarray) -> list[Row]:
    data = ctx.data
    parts = [(f"layer {data.layer}", m)]
    parts += [(f"position {name}", m[at]) for name, at in buckets(data.positions[m], _first(ctx))]
    kinds = np.array([classes[i] for i in m.tolist()])
    parts += [(f"token class {name}", m[kinds == name]) for name in token_class.CLASSES]
    rows = [ctx.fve(errors[at], data.docs[at], group=group) for group, at in parts if len(at)]
    aside = np.flatnonzero(data.masked)
    if len(aside):
        group, docs = "masked", data.docs[aside]
        note = f"before position {_first(ctx)}, or special or template tokens: not in any other row"
        rows.append(ctx.fve(errors[aside], docs, group=group, note=note))
        rows.append(calibrated(ctx, used[aside], data.vectors[aside], docs, group=group))
    return rows


def _first(ctx: Context) -> int:
    return int(ctx.data.source.get("min_position", 0))


def buckets(positions: np.ndarray, first: int) -> list[tuple[str, np.ndarray]]:
    """(name, row numbers) of buckets that double from `first` on, four at most; those without rows are left out. From
    50: 50-99, 100-199, 200-399, 400+."""
    first = max(first, 1)
    edges = [first * 2**j for j in range(4)]
    out = [(f"0-{first - 1}", (positions >= 0) & (positions < first))]
    for low, high in zip(edges, edges[1:], strict=False):
        out.append((f"{low}-{high - 1}", (positions >= low) & (positions < high)))
    out.append((f"{edges[-1]}+", positions >= edges[-1]))
    return [(name, np.flatnonzero(at)) for name, at in out if at.any()]


def _control_rows(ctx: Context, control: Control) -> list[Row]:
    rows = list(control.rows)
    if control.errors is not None and len(control.errors):
        fields: dict[str, Any] = {"control": control.name, "note": control.about}
        rows.append(ctx.fve(control.errors, control.docs, **fields))
        if control.predicted is not None:
            rows.append(calibrated(ctx, control.predicted, control.vectors, control.docs, **fields))
    return rows


def _series(rows: list[Row]) -> dict[str, Any]:
    """fve_nrm by position bucket and by token class."""
    out = {}
    for kind, title in (("position", "fve_nrm by position"), ("token class", "fve_nrm by kind of token")):
        some = [r for r in rows if r.metric == "fve_nrm" and r.group.startswith(f"{kind} ")]
        if some:
            out[f"fve_nrm by {kind}"] = {
                "x": [r.group.removeprefix(f"{kind} ") for r in some],
                "y": [r.value for r in some],
                "low": [r.low for r in some],
                "high": [r.high for r in some],
                "xlabel": kind,
                "ylabel": "fve_nrm",
                "title": title,
            }
    return out
