"""What is left of fve_nrm when the same explanation is put another way, or in part.

A change that keeps what a text says (its sentences in another order, other capitals and stops, a paraphrase) should
cost nothing; what it does cost was carried by something else than the meaning. Changes that take something away
(quotations, all but the quotations, all after the first tokens) say where the information is. A text that a change does
not apply to stays as it is and is counted; "of those changed" leaves it out. Paraphrase and translation ask a provider
and are done where one is given.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.errors import InputError
from nla_jax.evals import hosts
from nla_jax.evals.context import Context
from nla_jax.evals.result import Row, SuiteResult
from nla_jax.paraphrase import INSTRUCTION, Paraphraser, translation
from nla_jax.providers import Provider
from nla_jax.teacher_asking import Asking
from nla_jax.transforms import drop_quotes, noise, quoted_only, reorder_bullets, shuffle, truncate

NAME = "robustness"
needs: frozenset[str] = frozenset()

CHANGES: dict[str, Callable[[str, np.random.Generator], str]] = {
    "sentence shuffle": shuffle,
    "bullet reorder": reorder_bullets,
    "quote removal": drop_quotes,
    "quoted only": quoted_only,
    "case and punctuation noise": noise,
}
UNTOUCHED, EMPTY = "untouched text", "empty text"
_NOTHING = "the untouched texts explain nothing (fve_nrm at or under 0): no share of it"


@dataclass(frozen=True)
class Rewriter:
    """Who paraphrases and translates: a provider, a directory for its answers, and the languages by English name."""

    provider: Provider
    answers: str | Path
    languages: tuple[str, ...] = ("French",)
    asking: Asking | None = None
    note: Callable[[str], None] = lambda message: None

    def writers(self) -> dict[str, Paraphraser]:
        """By the name of the change."""
        wanted = {"paraphrase": INSTRUCTION} | {f"translation to {name}": translation(name) for name in self.languages}
        return {
            name: Paraphraser(self.provider, self.answers, asking=self.asking, instruction=instruction, note=self.note)
            for name, instruction in wanted.items()
        }

    def describe(self) -> dict[str, Any]:
        """What names it in an evaluation's settings; nothing secret."""
        return {name: writer.describe() for name, writer in self.writers().items()}


@dataclass(frozen=True)
class _Changed:
    name: str
    texts: list[str]
    note: str = ""


def run(ctx: Context, *, tokens: Sequence[int] = (10, 20, 40, 80), provider: Rewriter | None = None) -> SuiteResult:
    """The suite, on the first sample of each row of the headline. `tokens`: how many of the AR's tokens of the text
    are kept when it is cut. InputError under 1; TeacherError where the provider fails (what it answered is kept)."""
    if any(count < 1 for count in tokens):
        raise InputError("tokens to keep", expected="at least 1", got=list(tokens))
    data, m = ctx.data, ctx.data.main
    docs, vectors = data.docs[m], data.vectors[m]
    drawn = ctx.texts(1, m)
    texts, failed = [t[0] for t in drawn.text], drawn.failed[:, 0]
    changed = _changes(ctx, texts, sorted(set(tokens)), provider)
    read = ctx.read([*texts, "", *(text for change in changed for text in change.texts)])
    n = len(m)
    untouched = ctx.errors(read[:n], vectors, failed)
    empty = ctx.errors(np.repeat(read[n : n + 1], n, axis=0), vectors)

    rows = [ctx.fve(untouched, docs, note="the texts as they are")]
    rows.append(ctx.fve(empty, docs, control=EMPTY, note="what the AR makes of no text at all"))
    long: dict[str, list[np.ndarray]] = {"changed": [], "mse_nrm": [], "mse_nrm_untouched": []}
    for i, change in enumerate(changed):
        start = n + 1 + i * n
        errors = ctx.errors(read[start : start + n], vectors, failed)
        differs = np.array([a != b for a, b in zip(change.texts, texts, strict=True)], bool) & ~failed
        rows += _rows(ctx, change, errors, untouched, differs, docs)
        for name, values in zip(long, (differs, errors, untouched), strict=True):
            long[name].append(values)
    count = len(changed)
    columns: dict[str, Any] = {
        "row": np.tile(data.rows[m], count),
        "doc": np.tile(docs, count),
        "change": [change.name for change in changed for _ in range(n)],
        "text_untouched": texts * count,
        "text": [text for change in changed for text in change.texts],
        "failed": np.tile(failed, count),
        "mse_nrm_empty": np.tile(empty, count),
        **{name: np.concatenate(values) for name, values in long.items()},
    }
    notes = ["failed texts are not changed: they count as an orthogonal guess on both sides"] if failed.any() else []
    if provider is None:
        notes.append("paraphrase and translation: not done, they need a provider of texts (--teacher)")
    settings: dict[str, Any] = {"tokens": list(tokens), "variance_nrm": ctx.variance}
    settings["provider"] = None if provider is None else provider.describe()
    return SuiteResult(NAME, tuple(rows), tuple(notes), columns, settings, _series(rows))


def _changes(ctx: Context, texts: list[str], tokens: list[int], provider: Rewriter | None) -> list[_Changed]:
    assert ctx.nla.ar is not None
    tokenizer = ctx.nla.ar.tokenizer
    out = []
    for name, change in CHANGES.items():
        # From the text alone: what a row gets depends on no other row.
        seeds = ([ctx.seed, zlib.crc32(name.encode()), zlib.crc32(t.encode("utf-8", "surrogatepass"))] for t in texts)
        out.append(_Changed(name, [change(t, np.random.default_rng(s)) for t, s in zip(texts, seeds, strict=True)]))
    for count in tokens:
        note = "by the AR's tokenizer"
        out.append(_Changed(f"first {count} tokens", [truncate(t, count, tokenizer) for t in texts], note))
    for name, writer in ({} if provider is None else provider.writers()).items():
        ctx.note(f"{name} of {len(set(texts))} texts")
        new, reasons = hosts.by_first(functools.partial(_asked, writer, texts))
        why = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        note = f"by {writer.provider.name}:{writer.provider.model}"
        out.append(_Changed(name, new, f"{note}; no usable answer, text kept: {why}" if why else note))
    return out


def _asked(writer: Paraphraser, texts: list[str]) -> tuple[list[str], dict[str, int]]:
    """The texts in other words, and why some stayed as they are: how many, by reason."""
    return writer.apply_many(texts), dict(writer.reasons)


def _rows(
    ctx: Context, change: _Changed, errors: np.ndarray, untouched: np.ndarray, differs: np.ndarray, docs: np.ndarray
) -> list[Row]:
    """The share of texts that changed; then fve_nrm, its difference and what is kept of it: over all rows, and over
    those changed where that is not all of them."""
    share = ctx.row("share_changed", differs.astype(float), None, docs, group=change.name, note=change.note)
    parts = [(change.name, np.arange(len(docs)))]
    if differs.any() and not differs.all():
        parts.append((f"{change.name}, of those changed", np.flatnonzero(differs)))
    rows = [share]
    for group, at in parts:
        before, after, some = untouched[at], errors[at], docs[at]
        rows.append(ctx.fve(after, some, group=group))
        rows.append(ctx.fve(before, some, group=group, control=UNTOUCHED))
        rows.append(ctx.row("fve_nrm_change", (before - after) / ctx.variance, None, some, group=group))
        explained = 1.0 - before / ctx.variance
        if explained.sum() > 0:
            kept = ctx.row("fve_kept", 1.0 - after / ctx.variance, explained, some, group=group)
        else:
            documents = len(np.unique(some))
            kept = Row("fve_kept", None, n=len(some), documents=documents, group=group, note=_NOTHING)
        rows.append(kept)
    return rows


def _series(rows: list[Row]) -> dict[str, Any]:
    """fve_nrm after each change over all rows, as bars, beside that of the untouched text."""
    names = [r.group for r in rows if r.metric == "share_changed"]
    out = {}
    for control in ("", UNTOUCHED):
        some = [r for r in rows if r.metric == "fve_nrm" and r.control == control and r.group in names]
        out[control or "changed text"] = {
            "x": [r.group for r in some],
            "y": [r.value for r in some],
            "low": [r.low for r in some],
            "high": [r.high for r in some],
            "xlabel": "change",
            "ylabel": "fve_nrm",
            "title": "fve_nrm when the text is put another way",
        }
    return out
