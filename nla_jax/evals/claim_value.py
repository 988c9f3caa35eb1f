"""What each claim of an explanation is worth: the drop in fve_nrm when it is left out.

An explanation is split into its claims (nla_jax.claims) and read without each. Leaving out any words may cost
something, so beside every claim stands a random span of as many words out of the same text. A text with one claim is
reported apart: without it nothing is left.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from nla_jax import claims
from nla_jax.errors import InputError
from nla_jax.evals.context import Context
from nla_jax.evals.result import Row, SuiteResult

NAME = "claims"
needs: frozenset[str] = frozenset()

SPAN = "random span of the same length"
ONE = "texts with one claim"
PLACES = ("first", "middle", "last")


@dataclass(frozen=True)
class Values:
    """The claims of some texts, m in all. `owner` int64 [m] numbers the texts; `index` the claims of each from 0, of
    `count`. `without` are the texts without each claim, `span` those without as many words at random. `full`, `less`
    and `less_span` float64 [m]: mse_nrm of the whole text and of both."""

    owner: np.ndarray
    index: np.ndarray
    count: np.ndarray
    claim: list[str]
    without: list[str]
    span: list[str]
    full: np.ndarray
    less: np.ndarray
    less_span: np.ndarray

    @property
    def drop(self) -> np.ndarray:
        """In mse_nrm; divide by the variance for a drop in fve_nrm."""
        return self.less - self.full

    @property
    def drop_span(self) -> np.ndarray:
        return self.less_span - self.full

    @property
    def place(self) -> np.ndarray:
        """One of `PLACES` for each claim, "only" where the text has no other."""
        last = self.index == self.count - 1
        return np.where(self.count == 1, "only", np.where(self.index == 0, "first", np.where(last, "last", "middle")))


def values(ctx: Context, texts: list[str], vectors: np.ndarray) -> Values:
    """What leaving out costs, for each claim of texts that have not failed, about `vectors` [n, D]."""
    listed, owner = claims.all_variants(texts)
    found = [claims.split_claims(text) for text in texts]
    index = np.concatenate([np.arange(len(some)) for some in found] or [np.zeros(0, np.int64)]).astype(np.int64)
    count = np.array([len(some) for some in found], np.int64)[owner]
    said = [claim for some in found for claim in some]
    spans = []
    for claim, i, of in zip(said, index.tolist(), owner.tolist(), strict=True):
        seed = [ctx.seed, i, zlib.crc32(texts[of].encode("utf-8", "surrogatepass"))]
        spans.append(claims.without_span(texts[of], claim, np.random.default_rng(seed)))
    n, m = len(texts), len(listed)
    read = ctx.read([*texts, *listed, *spans])
    about = vectors[owner]
    full = ctx.errors(read[:n], vectors)[owner]
    less, less_span = ctx.errors(read[n : n + m], about), ctx.errors(read[n + m :], about)
    return Values(owner, index, count, said, listed, spans, full, less, less_span)


def check_threshold(idle: float) -> None:
    if not 0 <= idle < float("inf"):
        raise InputError("rise of mse_nrm under which a claim is idle", expected="0 or more", got=idle)


def run(ctx: Context, *, idle: float = 0.0) -> SuiteResult:
    """The suite, on the first sample of each row of the headline. `idle`: a claim adds nothing where mse_nrm without
    it rises by no more than this. InputError for a negative one, or where no text has a claim."""
    check_threshold(idle)
    data = ctx.data
    drawn = ctx.texts(1, data.main)
    ok = ~drawn.failed[:, 0]
    m = data.main[ok]
    texts = [t[0] for t, good in zip(drawn.text, ok.tolist(), strict=True) if good]
    found = values(ctx, texts, data.vectors[m])
    if not len(found.owner):
        got = f"{len(texts)} texts without a claim, and {int(np.sum(~ok))} that failed"
        raise InputError("claims", expected="an explanation with a claim in it", got=got, fix="a trained AV")
    docs = data.docs[m][found.owner]
    counts = np.bincount(found.owner, minlength=len(m))

    rows = [ctx.row("claims_per_text", counts.astype(float), None, data.docs[m], note="texts that did not fail")]
    some = np.flatnonzero(found.count > 1)
    if len(some):
        rows += _rows(ctx, found, some, docs, idle)
        for place in PLACES:
            at = some[found.place[some] == place]
            if len(at):
                rows += _rows(ctx, found, at, docs, idle, f"{place} claim")
    alone = np.flatnonzero(found.count == 1)
    if len(alone):
        about = "reading the empty text in place of the claim"
        share = (counts == 1).astype(float)
        rows.append(ctx.row("share_of_texts", share, None, data.docs[m], group=ONE))
        fall = found.drop[alone] / ctx.variance
        rows.append(ctx.row("fve_drop", fall, None, docs[alone], group=ONE, note=about))

    notes = [f"{int(np.sum(~ok))} failed texts left out"] if not ok.all() else []
    if (counts == 0).any():
        notes.append(f"{int(np.sum(counts == 0))} texts have no claim")
    if not len(some):
        notes.append("no text has two claims or more: no value of a claim among others")
    columns: dict[str, Any] = {
        "row": data.rows[m][found.owner],
        "doc": docs,
        "claim": found.index,
        "claims": found.count,
        "place": found.place.tolist(),
        "claim_text": found.claim,
        "text": [texts[i] for i in found.owner.tolist()],
        "text_without": found.without,
        "text_without_span": found.span,
        "mse_nrm": found.full,
        "mse_nrm_without": found.less,
        "mse_nrm_without_span": found.less_span,
    }
    settings = {"idle": idle, "variance_nrm": ctx.variance, "texts": len(m)}
    return SuiteResult(NAME, tuple(rows), tuple(notes), columns, settings, _series(rows))


def _rows(ctx: Context, found: Values, at: np.ndarray, docs: np.ndarray, idle: float, group: str = "") -> list[Row]:
    """Mean drop in fve_nrm and share of idle claims with their control, and the difference claim by claim."""
    v, docs = ctx.variance, docs[at]
    drop, span = found.drop[at], found.drop_span[at]
    useless = [(d <= idle).astype(float) for d in (drop, span)]
    about = f"mse_nrm rises by no more than {idle:g}"
    more = "drop less that of the span, claim by claim"
    return [
        ctx.row("fve_drop", drop / v, None, docs, group=group, denominator=ctx.denominator),
        ctx.row("fve_drop", span / v, None, docs, group=group, control=SPAN, denominator=ctx.denominator),
        ctx.row("fve_drop_over_span", (drop - span) / v, None, docs, group=group, note=more),
        ctx.row("idle_share", useless[0], None, docs, group=group, note=about),
        ctx.row("idle_share", useless[1], None, docs, group=group, control=SPAN, note=about),
    ]


def _series(rows: list[Row]) -> dict[str, Any]:
    """Mean drop by the claim's place in the text, beside that of random spans."""
    out = {}
    for control in ("", SPAN):
        some = [r for r in rows if r.metric == "fve_drop" and r.control == control and r.group.endswith(" claim")]
        if some:
            out[control or "claim"] = {
                "x": [r.group.removesuffix(" claim") for r in some],
                "y": [r.value for r in some],
                "low": [r.low for r in some],
                "high": [r.high for r in some],
                "xlabel": "place of the claim",
                "ylabel": "drop in fve_nrm",
                "title": "What leaving out one claim costs",
            }
    return out
