"""Held-out evaluation while training: what the AV writes about vectors it never saw, read back by the AR.

Numbers are float64 on the host (nla_jax.metrics). A failed sample counts as an orthogonal guess (mse_nrm 2), as in the
reward. Controls: pairs shuffled across documents, the constant predictor's floor, the teacher's texts, explanations
with their sentences shuffled and with their quotes dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nla_jax import metrics
from nla_jax.build import Build
from nla_jax.errors import StoreError
from nla_jax.evals.controls import other_documents
from nla_jax.store import Store
from nla_jax.transforms import TRANSFORMS

Read = Callable[[list[str]], np.ndarray]  # texts -> float32 [n, D], the AR's vectors


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Rows that no stage trains on: `vectors` float32 [n, D] raw, `rows` int64 and `docs` int32 [n] of the store,
    `contexts` (the text up to the position) and `teacher` (the warm-start explanation, where there is one)."""

    vectors: np.ndarray
    rows: np.ndarray
    docs: np.ndarray
    contexts: list[str]
    teacher: list[str | None]

    def __len__(self) -> int:
        return len(self.rows)


def held_out(build: Build, eval_store: str | None, n: int, *, explained: bool = False) -> HeldOut:
    """`n` rows at most, spread over the documents: of those that are in no split, or, in a store that is not the one
    trained on, of any; `explained`: with a teacher's explanation. StoreError where there are none."""
    store, layer = build.store if eval_store is None else Store.open(eval_store), build.layer
    trained = store.manifest["hash"] == build.store.manifest["hash"]  # also by another path
    if store.d_model != build.store.d_model:
        expected, fix = f"vectors of width {build.store.d_model}", "activations of the same target"
        raise StoreError(f"{store.path}: eval_store", expected=expected, got=store.d_model, fix=fix)
    docs_ok = store.doc_splits == -1 if trained else np.ones(store.n_docs, bool)
    table = store.table()
    free = rows = np.flatnonzero(docs_ok[table["doc"]] & (table["layer"] == layer))
    if explained and len(rows):
        rows = rows[store.explanation_status(rows) == 1] if store.has_explanations else rows[:0]
    if not len(rows):
        named = f"{store.path}: no held-out rows at layer {layer}"
        if len(free):
            fix = "nla teach STORE ... --rows av_sft,ar_sft,held_out, or eval_rows=0"
            raise StoreError(f"{named} with an explanation", expected="explanations of held-out rows too", fix=fix)
        raise StoreError(
            named,
            expected="documents that are in no training set",
            got="all of them are in one" if trained else "none",
            fix="nla build --fractions 0.24,0.24,0.48 --overwrite, or eval_store=ANOTHER_STORE, or eval_rows=0",
        )
    # One position of every document, then a second of each, ...: intervals are over documents. Which is the first goes
    # round from document to document: early positions alone would be another population.
    docs = table["doc"][rows]
    first = np.searchsorted(docs, docs)
    turn = (np.arange(len(rows)) - first + docs) % (np.searchsorted(docs, docs, side="right") - first)
    rows = np.sort(rows[np.argsort(turn, kind="stable")[:n]])
    teacher: list[str | None] = [None] * len(rows)
    if store.has_explanations:
        teacher = store.explanations(rows)
    return HeldOut(store.vectors(rows), rows, table["doc"][rows], store.prefixes(rows), teacher)


def text_scores(
    texts: list[str], failed: np.ndarray, held: HeldOut, read: Read, mse_scale: float, variance: float, name: str = ""
) -> tuple[dict[str, float], np.ndarray]:
    """fve_nrm, cosine and calibrated FVE of one text per row, with shuffled pairs as control; and mse_nrm [n]."""
    predicted = read(texts)
    errors = metrics.mse_nrm(predicted, held.vectors, mse_scale)
    bad = failed | ~np.isfinite(errors)
    errors = np.where(bad, 2.0, errors)
    predicted = np.where(bad[:, None], 0.0, predicted)
    end = f"_{name}" if name else ""
    out = {
        f"eval/fve_nrm{end}": metrics.fve_nrm(errors, variance),
        f"eval/cosine{end}": float(np.mean(metrics.cosine(predicted, held.vectors))),
        f"eval/fve_calibrated{end}": metrics.calibrated_fve(predicted, held.vectors, mse_scale),
    }
    other = other_documents(held.docs)
    apart = held.docs[other] != held.docs
    if apart.any():
        predicted, shuffled = predicted[apart], held.vectors[other][apart]
        wrong = np.where(bad[apart], 2.0, metrics.mse_nrm(predicted, shuffled, mse_scale))
        out[f"eval/fve_shuffled{end}"] = metrics.fve_nrm(wrong, variance)
        out[f"eval/fve_shuffled_calibrated{end}"] = metrics.calibrated_fve(predicted, shuffled, mse_scale)
    return out, errors


def changed_text_scores(
    texts: list[str],
    failed: np.ndarray,
    held: HeldOut,
    read: Read,
    mse_scale: float,
    variance: float,
    changes: Mapping[str, Callable[[str, np.random.Generator], str]] = TRANSFORMS,
) -> dict[str, float]:
    """fve_nrm of the texts after each change: how much hangs on order, quotes and spelling."""
    out = {}
    for name, change in changes.items():
        rng = np.random.default_rng(0)
        predicted = read([change(text, rng) for text in texts])
        errors = metrics.mse_nrm(predicted, held.vectors, mse_scale)
        errors = np.where(failed | ~np.isfinite(errors), 2.0, errors)
        out[f"eval/fve_nrm_{name}"] = metrics.fve_nrm(errors, variance)
    return out


def sample_rows(
    held: HeldOut, texts: list[str], failed: np.ndarray, errors: np.ndarray, n: int
) -> list[dict[str, Any]]:
    """The first `n` rows for samples.jsonl."""
    return [
        {
            "row": int(held.rows[i]),
            "doc": int(held.docs[i]),
            "context": held.contexts[i],
            "explanation": texts[i],
            "failed": bool(failed[i]),
            "cosine": 1.0 - float(errors[i]) / 2,
            "mse_nrm": float(errors[i]),
        }
        for i in range(min(n, len(held)))
    ]
