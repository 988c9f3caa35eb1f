"""Which claims recur: across samples of the same activation, and at neighbouring positions of its document.

Two claims are the same where their content words overlap enough (Jaccard index of the sets, no language model). A
claim that other samples make too is likelier read off the activation than made up; whether it is, calibration tells:
recurrence taken as the probability that leaving the claim out costs something (nla_jax.evals.claim_value).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_jax.claims import split_claims
from nla_jax.errors import InputError
from nla_jax.evals.claim_value import check_threshold, values
from nla_jax.evals.context import Context
from nla_jax.evals.controls import other_documents
from nla_jax.evals.result import Row, SuiteResult
from nla_jax.lexical_words import STOP

NAME = "agreement"
needs: frozenset[str] = frozenset()

OTHERS, SHUFFLED = "other documents", "recurrence of another document's claim"
SAMPLES, NEIGHBOURS = "samples of the row", "neighbouring positions"
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")

Words = frozenset[str]


def content_words(claim: str) -> Words:
    """What a claim is matched by: its words, case folded and without a possessive 's; those that name no topic
    (articles, prepositions, auxiliaries, ...) only where it has no others."""
    found = (w.casefold().replace("\u2019", "'").removesuffix("'s") for w in _WORD.findall(claim))
    words = frozenset(w for w in found if w)
    return words - STOP or words


def jaccard(a: Words, b: Words) -> float:
    """Size of the intersection over that of the union; 0 for two empty sets."""
    both = len(a & b)
    return both / (len(a) + len(b) - both) if both else 0.0


def recurrence(claim: Words, samples: Sequence[Sequence[Words]], threshold: float) -> float:
    """Share of the samples, each a list of claims, in which a claim matches; NaN without samples."""
    if not samples:
        return float("nan")
    return sum(any(jaccard(claim, other) >= threshold for other in some) for some in samples) / len(samples)


def run(ctx: Context, *, k: int = 8, overlap: float = 0.5, idle: float = 0.0, bins: int = 10) -> SuiteResult:
    """The suite, on `k` samples of each row of the headline. `overlap`: the Jaccard index from which on two claims are
    the same. `idle`: see the claims suite. `bins`: of equal width, for the calibration error. InputError for k under 2,
    another setting out of range, or where no text has a claim."""
    if k < 2:
        raise InputError("samples of a row", expected="at least 2, to compare", got=k)
    if not 0 < overlap <= 1:
        raise InputError("overlap of two claims", expected="over 0 and up to 1", got=overlap)
    if bins < 1:
        raise InputError("bins of a calibration", expected="at least 1", got=bins)
    check_threshold(idle)
    data, m = ctx.data, ctx.data.main
    docs = data.docs[m]
    drawn = ctx.texts(k, m)
    said = [
        {g: split_claims(row[g]) for g in np.flatnonzero(~fails).tolist()}
        for row, fails in zip(drawn.text, drawn.failed, strict=True)
    ]
    found = compare(said, docs, data.positions[m], overlap)
    if not len(found.row):
        raise InputError("agreement", expected="explanations with a claim in them", got="none", fix="a trained AV")
    rise = _rises(ctx, [row[0] for row in drawn.text], ~drawn.failed[:, 0], found)

    notes = [f"two claims are the same from a Jaccard index of their content words of {overlap:g} on"]
    rows = _recurrence(ctx, found, docs[found.row], notes)
    more, series = _calibration(ctx, found.rate[:, 0], rise, docs[found.row], idle, bins, notes)
    if drawn.failed.any():
        notes.append(f"{int(drawn.failed.sum())} of {drawn.failed.size} samples failed: left out")
    columns: dict[str, Any] = {
        "row": data.rows[m][found.row],
        "doc": docs[found.row],
        "position": data.positions[m][found.row],
        "sample": found.sample,
        "claim": found.number,
        "claim_text": [said[i][g][j] for i, g, j in zip(*found.names(), strict=True)],
        "mse_nrm_rise_without": rise,
    }
    for i, name in enumerate(("samples", "neighbours", "other_documents")):
        columns |= {f"recurrence_{name}": found.rate[:, i], f"compared_{name}": found.compared[:, i]}
    settings = {"k": k, "overlap": overlap, "idle": idle, "bins": bins, "variance_nrm": ctx.variance}
    return SuiteResult(NAME, (*rows, *more), tuple(notes), columns, settings, series)


@dataclass(frozen=True)
class Found:
    """The claims of all samples, m in all: each is claim `number` of sample `sample` of row `row`, int64 [m]. `rate`
    float64 [m, 3]: the share of samples that make it too, of the row's others, of the neighbouring positions', and of a
    row of another document; NaN where there are none. `compared` int64 [m, 3]: how many these were."""

    row: np.ndarray
    sample: np.ndarray
    number: np.ndarray
    rate: np.ndarray
    compared: np.ndarray

    def names(self) -> tuple[list[int], list[int], list[int]]:
        return self.row.tolist(), self.sample.tolist(), self.number.tolist()


def compare(said: Sequence[Mapping[int, list[str]]], docs: np.ndarray, positions: np.ndarray, overlap: float) -> Found:
    """How often each claim recurs. `said[i]`: the claims of each sample of row i that did not fail, by its number.
    Claims without a letter or a digit are passed over."""
    words = [{g: [content_words(c) for c in some] for g, some in row.items()} for row in said]
    beside, partner = neighbours(docs, positions), other_documents(docs)
    units, rates, counts = [], [], []
    for i, row in enumerate(words):
        near = [some for other in beside[i] for some in words[other].values()]
        far = list(words[partner[i]].values()) if docs[partner[i]] != docs[i] else []
        for g, some in row.items():
            others = [row[h] for h in row if h != g]
            for j, claim in enumerate(some):
                if claim:
                    units.append((i, g, j))
                    rates.append([recurrence(claim, samples, overlap) for samples in (others, near, far)])
                    counts.append([len(others), len(near), len(far)])
    at = np.array(units, np.int64).reshape(-1, 3)
    rate, compared = np.array(rates, np.float64).reshape(-1, 3), np.array(counts, np.int64).reshape(-1, 3)
    return Found(at[:, 0], at[:, 1], at[:, 2], rate, compared)


def _rises(ctx: Context, texts: list[str], ok: np.ndarray, found: Found) -> np.ndarray:
    """By how much mse_nrm rises without each claim, float64 [m]; NaN but for the claims of first samples that have
    others beside them."""
    first = np.flatnonzero(ok)
    worth = values(ctx, [texts[i] for i in first.tolist()], ctx.data.vectors[ctx.data.main][first])
    rise = np.where(worth.count > 1, worth.drop, np.nan)
    by_claim = dict(zip(zip(first[worth.owner].tolist(), worth.index.tolist(), strict=True), rise, strict=True))
    return np.array([by_claim[i, j] if g == 0 else np.nan for i, g, j in zip(*found.names(), strict=True)])


def _recurrence(ctx: Context, found: Found, docs: np.ndarray, notes: list[str]) -> list[Row]:
    """Mean recurrence over claims, in the row and beside it, with the same share of another document's samples."""
    rows = []
    far = np.isfinite(found.rate[:, 2])
    for i, group, lack in (
        (0, SAMPLES, "no row has two samples that did not fail"),
        (1, NEIGHBOURS, "no document has two rows with samples that did not fail"),
    ):
        rate = found.rate[:, i]
        has = np.isfinite(rate)
        if not has.any():
            notes.append(f"no recurrence across {group}: {lack}")
            continue
        note = "share of the other samples that make the claim, mean over claims"
        rows.append(ctx.row("recurrence", rate[has], None, docs[has], group=group, note=note))
        both = has & far
        if both.any():
            note, others = "share of the samples of a row of another document", found.rate[both, 2]
            rows.append(ctx.row("recurrence", others, None, docs[both], group=group, control=OTHERS, note=note))
    if not far.any():
        notes.append(f"no control by {OTHERS}: there are none with samples that did not fail")
    return rows


def neighbours(docs: np.ndarray, positions: np.ndarray) -> list[list[int]]:
    """For each row the rows beside it in its document, in the order of positions: the one before and the one after."""
    order = np.lexsort((positions, docs)).tolist()
    out: list[list[int]] = [[] for _ in order]
    for a, b in zip(order, order[1:], strict=False):
        if docs[a] == docs[b]:
            out[a].append(b)
            out[b].append(a)
    return out


def bin_of(confidence: np.ndarray, bins: int) -> np.ndarray:
    """Which of `bins` equal parts of [0, 1] each number is in, int64; 1 is in the last."""
    # The added bit keeps shares such as 3/10, which floats miss by a rounding, from the bin below.
    return np.minimum((confidence * bins + 1e-9).astype(np.int64), bins - 1)


def calibration_error(confidence: np.ndarray, outcome: np.ndarray, bins: int) -> float:
    """Expected calibration error: |mean outcome - mean confidence| of each bin, weighted by its share of the units."""
    at = bin_of(confidence, bins)
    return float(np.abs(np.bincount(at, outcome - confidence, bins)).sum() / len(at))


def _calibration(
    ctx: Context, rate: np.ndarray, drop: np.ndarray, docs: np.ndarray, idle: float, bins: int, notes: list[str]
) -> tuple[list[Row], dict[str, Any]]:
    """Recurrence as the probability that a claim has value, over claims of first samples with others beside them."""
    has = np.flatnonzero(np.isfinite(rate) & np.isfinite(drop))
    if not len(has):
        notes.append("no calibration: no first sample has two claims or more, with another sample to recur in")
        return [], {}
    rate, drop, docs = rate[has], drop[has], docs[has]
    worth = (drop > idle).astype(np.float64)
    about = f"{bins} bins; value: mse_nrm rises by more than {idle:g} without the claim; claims of first samples"
    rows = [
        ctx.row("claims_of_value", worth, None, docs, note=about),
        ctx.rows_row("ece", lambda c, o: calibration_error(c, o, bins), (rate, worth), docs, note=about),
    ]
    partner = other_documents(docs)
    apart = docs[partner] != docs
    if apart.any():
        shuffled, some = (rate[partner][apart], worth[apart]), docs[apart]
        rows.append(ctx.rows_row("ece", lambda c, o: calibration_error(c, o, bins), shuffled, some, control=SHUFFLED))
    else:
        notes.append(f"no control of the calibration ({SHUFFLED}): the claims are of one document")
    for name, at in (("of half of the samples or more", rate >= 0.5), ("of fewer", rate < 0.5)):
        if at.any():
            group = f"claims {name}"
            rows.append(ctx.row("fve_drop", drop[at] / ctx.variance, None, docs[at], group=group))
    at = bin_of(rate, bins)
    points = [ctx.row("value", worth[at == b], None, docs[at == b]) for b in np.unique(at)]
    curve = {
        "x": [float(rate[at == b].mean()) for b in np.unique(at)],
        "y": [p.value for p in points],
        "low": [p.low for p in points],
        "high": [p.high for p in points],
        "n": [p.n for p in points],
        "xlabel": "recurrence across samples",
        "ylabel": "share of claims with value",
        "title": "Calibration: does a claim that recurs have value?",
        "diagonal": True,
    }
    return rows, {"calibration": curve}
