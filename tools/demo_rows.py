"""The rows of a demo's store with the stories they are of: probes, a baseline without an NLA, and examples."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nla_jax import metrics
from nla_jax.errors import InputError
from nla_jax.store import Store
from nla_jax.tools.world import FACT_KINDS, Story, last_word, stated
from nla_jax.tools.world_facts import known_facts, probes

EXAMPLES = 12
_PIECES = re.compile(r"\"[^\"]*\"|“[^”]*”|'[^']*'|[A-Za-z]+")  # what `stated` takes apart: quotations and words
_QUOTE = re.compile(r"\"([^\"]*)\"|“([^”]*)”")


@dataclasses.dataclass(frozen=True)
class Places:
    """Rows of a store with the stories they are of: `rows`, `docs` int [n]; `ends`: characters of each prefix."""

    rows: np.ndarray
    docs: np.ndarray
    names: list[str]
    stories: list[Story]
    ends: list[int]


def places(store: Store, stories: Mapping[str, Story], rows: np.ndarray) -> Places:
    """The rows with their stories; InputError where there are none, or of a document that is no such story."""
    table = store.table(rows)
    if not len(rows):
        raise InputError(f"{store.path}", expected="documents in the training sets and others in none", got="no rows")
    names = store.doc_ids(table["doc"])
    if unknown := set(names) - set(stories):
        raise InputError(f"document {min(unknown)!r} of {store.path}", expected="a story of the world's facts.jsonl")
    return Places(rows, table["doc"], names, [stories[name] for name in names], table["text_end"].tolist())


def training_rows(store: Store, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training sets, and all rows of the documents that are in none of them."""
    table = store.table()
    split = store.doc_splits[table["doc"]]
    here = np.ones(len(split), bool) if layer is None else table["layer"] == layer
    return np.flatnonzero(here & (split >= 0)), np.flatnonzero(here & (split < 0))


def fact_probes(store: Store, train: Places, test: Places) -> dict[str, Any]:
    """Kind -> what a linear read-out of h gets right, on rows whose prefix has told the fact."""
    told = [known_facts(s.stories, s.ends) for s in (train, test)]
    x, y = store.vectors(train.rows), store.vectors(test.rows)
    found = probes(x, train.stories, y, test.stories, train_known=told[0], test_known=told[1])
    return {kind: dataclasses.asdict(p) for kind, p in found.items()}


def last_token_fve(store: Store, train: np.ndarray, rows: np.ndarray, variance: float) -> float:
    """fve_nrm on `rows` of guessing, for each, the mean direction of the training rows with the same token: what can be
    had by naming the word that is read, and nothing else. Tokens that training has not get the mean of all."""
    scale = math.sqrt(store.d_model)
    directions = metrics.normalize(store.vectors(train), scale)
    tokens, which = np.unique(store.table(train)["token_id"], return_inverse=True)
    sums = np.stack([np.bincount(which, column) for column in directions.T], axis=1)
    of_token = sums / np.bincount(which)[:, None]
    wanted = store.table(rows)["token_id"]
    at = np.minimum(np.searchsorted(tokens, wanted), len(tokens) - 1)
    guess = np.where((tokens[at] == wanted)[:, None], of_token[at], directions.mean(0))
    return metrics.fve_nrm(metrics.mse_nrm(guess, store.vectors(rows), scale), variance)


# -- examples ----------------------------------------------------------------------------------------------------------


def examples(store: Store, at: Places, evaluations: Sequence[tuple[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Explanations before and after of one row each of the first held-out documents, not selected."""
    # The places in a document take turns, so that early and late ones are among them.
    turns: dict[int, list[int]] = {}
    for i, doc in enumerate(at.docs.tolist()):
        turns.setdefault(doc, []).append(i)
    picked = [rows[k % len(rows)] for k, rows in enumerate(turns.values())][:EXAMPLES]
    texts = store.texts(at.docs[picked])
    of_row = [{r["row"]: r for r in rows} for _, rows in evaluations]
    out = []
    for i, text in zip(picked, texts, strict=True):
        story, end = at.stories[i], at.ends[i]
        said = [found[int(at.rows[i])] for found in of_row]
        out.append(
            {
                "document": at.names[i],
                "row": int(at.rows[i]),
                "prefix": text[:end],
                "rest": text[end:],
                "facts": {k: {"value": story.facts[k], "told": story.known.get(k, end + 1) <= end} for k in FACT_KINDS},
                **{
                    side: {
                        "marked": marked(str(row["explanation"]), story, text[:end]),
                        "mse_nrm": row["mse_nrm"],
                        "cosine": row["cosine"],
                        "failed": bool(row["failed"]),
                    }
                    for side, row in zip(("before", "after"), said, strict=True)
                },
            }
        )
    return out


def marked(text: str, story: Story, prefix: str) -> list[tuple[str, str]]:
    """An explanation in pieces with what is to be said of each: "" (nothing), "true" or "false" (a stated fact),
    "quote" or "misquote" (a quotation that is, or is not, the last word of the prefix)."""
    pieces: list[tuple[str, str]] = []
    at = 0
    for match in _PIECES.finditer(text):
        verdict = ""
        if quoted := _QUOTE.fullmatch(match[0]):
            verdict = "quote" if "".join(q or "" for q in quoted.groups()).strip() == last_word(prefix) else "misquote"
        elif claim := stated(match[0]):
            ((kind, values),) = claim.items()
            verdict = "true" if story.facts[kind] in values else "false"
        if verdict:
            pieces += [(text[at : match.start()], ""), (match[0], verdict)]
            at = match.end()
    return [piece for piece in [*pieces, (text[at:], "")] if piece[0]]
