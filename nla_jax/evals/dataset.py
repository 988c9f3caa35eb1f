"""Which rows are evaluated: of an activation store here, of a parquet set in dataset_parquet.py.

By default 1000 rows that no stage was trained on: 200 documents with 5 positions each, from position 50 on. Which
documents and positions is a matter of (seed, document id) alone, not of the order of a store. Early positions, special
tokens and what a chat template wrote are masked: kept, fewer, and reported apart.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.errors import InputError
from nla_jax.evals.dataset_parquet import from_parquet
from nla_jax.evals.evalset import (
    MIN_POSITION,
    PER_DOCUMENT,
    SEED,
    EvalSet,
    N,
    Train,
    check_counts,
    choose,
    numbered,
)
from nla_jax.extract import TEMPLATE_ROLE
from nla_jax.metrics import normalize
from nla_jax.store import EXPLANATIONS, HELD_OUT, SPLIT_FILE, SPLITS, Store

__all__ = ["EvalSet", "Train", "from_parquet", "from_store", "open_data"]

ALL = "all"
_BLOCK = 1 << 22  # elements of vectors read at a time
_MOST_TRAINING = 1 << 16  # training rows that the means are taken of


def open_data(path: str | Path, *, split: str = HELD_OUT, **choice: Any) -> EvalSet:
    """The rows of whatever `path` is: a parquet set by its name, else a store. See `from_store`, `from_parquet`."""
    if str(path).endswith(".parquet"):
        if split not in (HELD_OUT, ALL):
            raise InputError("--split", expected="none for a parquet set, which is one split", got=split)
        return from_parquet(path, **{k: v for k, v in choice.items() if k not in ("mse_scale", "special_ids")})
    return from_store(path, split=split, **choice)


def from_store(
    path: str | Path | Store,
    *,
    layer: int | None = None,
    split: str = HELD_OUT,
    n: int = N,
    per_document: int = PER_DOCUMENT,
    min_position: int = MIN_POSITION,
    seed: int = SEED,
    mse_scale: float | None = None,
    special_ids: Collection[int] = (),
) -> EvalSet:
    """Rows of an activation store: up to `n` of one split ("held_out", "av_sft", "ar_sft", "rl", or "all").

    Documents come in the order of a hash of (seed, id) and give up to `per_document` rows each; masked rows,
    chosen the same way, are up to n // 4 more. `layer` may be left out where the store has but one; `mse_scale` is the
    scale of v_n (default sqrt(D)). A store without splits gives all its documents, and a note says that they may have
    been trained on. InputError for a layer that is absent and for an empty selection."""
    check_counts(n=n, per_document=per_document)
    store = path if isinstance(path, Store) else Store.open(path)
    layer = _layer(store, layer)
    notes = []
    if store.splits is None:
        if split not in (HELD_OUT, ALL):
            raise InputError(f"{store.path} has no splits", expected=ALL, got=split, fix="--split all, or nla build")
        if split == HELD_OUT:
            notes.append("the data has no splits: whether its documents were trained on is not known")
        wanted = np.ones(store.n_docs, bool)
    else:
        wanted = _wanted(store, split)
        if split != HELD_OUT:
            notes.append(f"the rows are of split {split}, which may have been trained on: not a held-out result")
    table = store.table()
    rows = np.flatnonzero(wanted[table["doc"]] & (table["layer"] == layer))
    docs, positions = table["doc"][rows], table["position"][rows]
    special = np.isin(table["token_id"][rows], np.array(sorted(special_ids), np.int64))
    masked = (positions < min_position) | (table["role"][rows] == TEMPLATE_ROLE) | special
    names = dict(zip((u := np.unique(docs)).tolist(), store.doc_ids(u), strict=True)) if len(docs) else {}
    main = choose(docs, masked, names, n, per_document, seed)
    if not len(main):
        found = f"{len(rows)} rows of layer {layer} in split {split}"
        got = found + (f", all before position {min_position} or of special tokens" if len(rows) else "")
        fix = "a smaller --min-position, another --split, or a store with more documents"
        raise InputError(f"{store.path}: nothing to evaluate", expected="at least one row", got=got, fix=fix)
    aside = choose(docs, ~masked, names, n // 4, per_document, seed) if n // 4 else main[:0]
    chosen = np.concatenate([main, aside])
    at = rows[chosen]
    doc_of = docs[chosen]
    tokens: list[np.ndarray] | None = None
    if (table["token_id"][at] >= 0).all():
        by_doc = dict(zip((u := np.unique(doc_of)).tolist(), store.tokens(u), strict=True))
        tokens = [by_doc[d] for d in doc_of.tolist()]
    training = _Training(store, layer, set(doc_of.tolist()), seed) if store.splits is not None else None
    if training is not None and not len(training.rows):
        training = None
    means = training.means(mse_scale or math.sqrt(store.d_model)) if training is not None else (None, None, None)
    return EvalSet(
        vectors=store.vectors(at),
        docs=numbered(doc_of),
        doc_ids=[names[d] for d in doc_of.tolist()],
        positions=table["position"][at].astype(np.int32),
        layer=layer,
        contexts=store.prefixes(at),
        tokens=tokens,
        teacher=store.explanations(at) if store.has_explanations else [None] * len(at),
        masked=masked[chosen],
        rows=at.astype(np.int64),
        source={
            "path": str(store.path),
            "kind": "store",
            "hash": store.manifest["hash"],
            **{
                name: _file_hash(store, file) for name, file in (("splits", SPLIT_FILE), ("explanations", EXPLANATIONS))
            },
            "layer": layer,
            "split": split if store.splits is not None else ALL,
            "seed": seed,
            "n": n,
            "per_document": per_document,
            "min_position": min_position,
            "rows": len(main),
            "documents": len(np.unique(docs[main])),
            "masked_rows": len(aside),
            "training_rows": 0 if training is None else len(training.rows),
        },
        notes=tuple(notes),
        train_mean_raw=means[0],
        train_mean_nrm=means[1],
        train_variance_nrm=means[2],
        train=training,
        tokenizer=store.manifest["tokenizer"].get("fingerprint"),
        model=dict(store.manifest["model"]),
    )


class _Training:
    """The training rows of a store at one layer, and how they are drawn and averaged. See `Train`."""

    def __init__(self, store: Store, layer: int, evaluated: set[int], seed: int):
        self.store, self.seed = store, seed
        rows = np.sort(np.concatenate([store.rows_of(name) for name in SPLITS]))
        table = store.table(rows)
        self.rows = rows[table["layer"] == layer]
        docs = table["doc"][table["layer"] == layer]
        self.apart = self.rows[~np.isin(docs, np.array(sorted(evaluated), np.int64))]

    def __call__(self, n: int, explained: bool = False) -> tuple[np.ndarray, list[str | None] | None]:
        rows = self.apart
        if explained:
            rows = rows[self.store.explanation_status(rows) == 1] if self.store.has_explanations else rows[:0]
        draws = np.random.PCG64(self.seed).random_raw(max(len(rows), 1))[: len(rows)]
        rows = np.sort(rows[np.argsort(draws, kind="stable")[:n]])
        texts = self.store.explanations(rows) if self.store.has_explanations else None
        return self.store.vectors(rows), texts

    def means(self, scale: float) -> tuple[np.ndarray, np.ndarray, float]:
        """Of the raw vectors and of v_n, float64 [D], and the variance of v_n: all rows, or 65536 evenly apart."""
        rows = self.rows
        if len(rows) > _MOST_TRAINING:
            rows = rows[np.linspace(0, len(rows) - 1, _MOST_TRAINING).astype(np.int64)]
        raw, nrm, size, n = np.zeros(self.store.d_model), np.zeros(self.store.d_model), 0.0, 0
        step = max(1, _BLOCK // self.store.d_model)
        for start in range(0, len(rows), step):
            block = self.store.vectors(rows[start : start + step]).astype(np.float64)
            v = normalize(block, scale)
            raw, nrm, n = raw + block.sum(axis=0), nrm + v.sum(axis=0), n + len(block)
            size += float(np.sum(v * v))
        mu = nrm / n
        return raw / n, mu, (size / n - float(mu @ mu)) / self.store.d_model


def _file_hash(store: Store, name: str) -> str | None:
    """sha256 of a small file of the store, which the manifest's hash does not cover; it names its arrays by hash."""
    data = store.root.read(name)
    return None if data is None else hashlib.sha256(data).hexdigest()


def _layer(store: Store, layer: int | None) -> int:
    have = ", ".join(map(str, store.layers))
    if layer is None and len(store.layers) == 1:
        return store.layers[0]
    if layer is None:
        raise InputError(f"{store.path}: which layer", expected=f"one of {have}", got="none", fix="--layer K")
    if layer not in store.layers:
        fix = "a store of the pair's layer: nla extract --layer " + str(layer)
        raise InputError(f"{store.path}: layer {layer} is not in the store", expected=layer, got=have, fix=fix)
    return layer


def _wanted(store: Store, split: str) -> np.ndarray:
    """Which documents belong to a split, bool [n_docs]."""
    if split == ALL:
        return np.ones(store.n_docs, bool)
    if split not in (HELD_OUT, *SPLITS):
        raise InputError("--split", expected=", ".join((HELD_OUT, *SPLITS, ALL)), got=split)
    wanted = store.doc_splits == (-1 if split == HELD_OUT else SPLITS.index(split))
    if not wanted.any():
        fix = "nla build --fractions with less than 1 in all leaves documents out; --split all takes any"
        raise InputError(f"{store.path}: no document is in split {split}", expected="at least one", got=0, fix=fix)
    return wanted
