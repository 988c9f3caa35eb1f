"""The rows of a parquet set in the exchange format, chosen as those of a store are."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from nla_jax.errors import InputError
from nla_jax.evals.evalset import MIN_POSITION, PER_DOCUMENT, SEED, EvalSet, N, check_counts, choose, numbered
from nla_jax.exchange_read import open_set


def from_parquet(
    path: str | Path,
    *,
    layer: int | None = None,
    n: int = N,
    per_document: int = PER_DOCUMENT,
    min_position: int = MIN_POSITION,
    seed: int = SEED,
) -> EvalSet:
    """Rows of a set in the exchange format, chosen as in `from_store`. It knows neither what follows in the documents
    (`tokens` is None) nor training rows. Rows without doc_id count as documents of their own; a set without positions
    has no masked rows. Notes say which."""
    check_counts(n=n, per_document=per_document)
    opened = open_set(path)
    sidecar = opened.sidecar
    has = sidecar.need_layer_index(path)
    if layer not in (None, has):
        raise InputError(f"{path}: layer {layer} is not in the set", expected=layer, got=has, fix="a set of this layer")
    notes = [f"the rows are a set of stage {opened.stage}, which may have been trained on: not a held-out result"]
    ids: list[str] = []
    found: list[np.ndarray] = []
    for block in opened.blocks():
        start = len(ids)
        ids += block.doc_ids or [f"row {start + i}" for i in range(len(block))]
        found.append(np.full(len(block), -1) if block.positions is None else block.positions)
    positions = np.concatenate(found)
    if "doc_id" in opened.absent:
        notes.append("no doc_id: every row counts as a document, and intervals may be too narrow")
    if "n_raw_tokens" in opened.absent:
        notes.append("no n_raw_tokens: positions are not known, and no row is masked")
    names = sorted(set(ids))
    number = {name: i for i, name in enumerate(names)}
    docs = np.array([number[name] for name in ids], np.int64)
    order = np.lexsort((positions, docs))  # the choice must not depend on the order of the file
    early = (positions >= 0) & (positions < min_position)
    named = dict(enumerate(names))
    main = order[choose(docs[order], early[order], named, n, per_document, seed)]
    if not len(main):
        fix = "a smaller --min-position"
        got = f"{len(docs)} rows, all before position {min_position}"
        raise InputError(f"{path}: nothing to evaluate", expected="at least one row", got=got, fix=fix)
    aside = order[choose(docs[order], ~early[order], named, n // 4, per_document, seed)] if n // 4 else main[:0]
    at = np.concatenate([main, aside])
    vectors, contexts, teacher = _read(path, at)
    return EvalSet(
        vectors=vectors,
        docs=numbered(docs[at]),
        doc_ids=[ids[i] for i in at.tolist()],
        positions=positions[at].astype(np.int32),
        layer=has,
        contexts=contexts,
        tokens=None,
        teacher=teacher,
        masked=early[at],
        rows=at.astype(np.int64),
        source={
            "path": str(path),
            "kind": "parquet",
            "hash": _file_hash(path),
            "layer": has,
            "split": opened.stage,
            "seed": seed,
            "n": n,
            "per_document": per_document,
            "min_position": min_position,
            "rows": len(main),
            "documents": len(np.unique(docs[main])),
            "masked_rows": len(aside),
            "training_rows": 0,
        },
        notes=tuple(notes),
        model={"name": sidecar.base_model},
    )


def _read(path: str | Path, at: np.ndarray) -> tuple[np.ndarray, list[str], list[str | None]]:
    """Vectors, contexts and explanations of some rows of a set, in the order of `at`."""
    where = {row: i for i, row in enumerate(at.tolist())}
    opened, start = open_set(path), 0
    vectors = np.zeros((len(at), opened.sidecar.d_model), np.float32)
    contexts, teacher = [""] * len(at), [None] * len(at)  # type: tuple[list[str], list[str | None]]
    for block in opened.blocks():
        for row in sorted(where.keys() & range(start, start + len(block))):
            i = where[row]
            vectors[i] = block.vectors[row - start]
            contexts[i] = block.texts[row - start] if block.texts else ""
            teacher[i] = block.explanations[row - start] if block.explanations else None
        start += len(block)
    return vectors, contexts, teacher


def _file_hash(path: str | Path) -> str:
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
