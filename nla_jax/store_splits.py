"""The warm-start and RL splits of a store: by document, and proved to be disjoint.

A document's split is decided by a hash of the seed and its id alone, so it is the same in every store that holds the
document, whatever the layer, the order or the other documents. Documents whose texts are equal are the exception:
they go together, by a hash of the text, because the same text on both sides of a split would be an overlap all the
same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.arrays import NUMBERS, GrowingArray
from nla_jax.errors import StoreError
from nla_jax.store import SPLIT_FILE, SPLITS, Store

DEFAULT_FRACTIONS = {"av_sft": 0.25, "ar_sft": 0.25, "rl": 0.5}
_DOCS = 1 << 10  # documents read at a time
_ROWS = 1 << 18


def write_splits(
    path: str | Path,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    *,
    assignment: np.ndarray | None = None,
) -> dict[str, Any]:
    """Divides a complete store's documents over av_sft, ar_sft and rl; returns splits.json.

    `fractions` (default 0.25, 0.25, 0.5) sum to at most 1; the rest of the documents belongs to no split. Instead of
    them, `assignment` int [n_docs] gives each document's index into SPLITS or -1 (for data that was split elsewhere).
    StoreError if a split would get no document, or if one text would be in two.
    """
    store = Store.open(path)
    ids, texts = document_hashes(store)
    if assignment is None:
        fractions = check_fractions(DEFAULT_FRACTIONS if fractions is None else fractions)
        codes = assign(ids, texts, list(fractions.values()), seed)
    else:
        codes = np.asarray(assignment, np.int8)
        if codes.shape != (store.n_docs,) or codes.min() < -1 or codes.max() >= len(SPLITS):
            raise StoreError(f"{path}: assignment", expected=f"{store.n_docs} numbers from -1 to {len(SPLITS) - 1}")
        fractions = {name: float((codes == i).mean()) for i, name in enumerate(SPLITS)}
    problems = overlaps(codes, ids, texts)
    if problems:
        raise StoreError(f"{path}: {problems[0]}", fix="an assignment that keeps equal texts together")
    rows = _rows_per_split(store, codes)
    written: dict[str, Any] = {"seed": seed if assignment is None else None, "store": store.manifest["hash"]}
    for i, name in enumerate(SPLITS):
        n_docs = int((codes == i).sum())
        if n_docs == 0 and fractions[name] > 0:
            fix = "more documents, another --seed, or a fraction of 0"
            raise StoreError(f"{path}: split {name} would be empty", got=f"{store.n_docs} documents", fix=fix)
        written[name] = {"fraction": fractions[name], "docs": n_docs, "rows": rows[i]}
    written["equal_texts"] = int(len(texts) - len(np.unique(texts)))
    if store.splits is not None:
        store.root.delete(SPLIT_FILE)  # a kill from here on leaves no splits, never a mixture
    store.root.delete_below("docs/split/")
    array = GrowingArray(store.root, "docs/split", "int8", NUMBERS)
    array.append(codes)
    written["arrays"] = {"docs/split": array.close()}
    store.root.write_json(SPLIT_FILE, written)
    return written


def check_fractions(fractions: Mapping[str, float]) -> dict[str, float]:
    """All three splits in order; StoreError unless they are numbers of at least 0 with a sum of 0 to 1."""
    unknown = sorted(set(fractions) - set(SPLITS))
    if unknown:
        raise StoreError(f"split {unknown[0]!r}", expected=" or ".join(SPLITS))
    out = {name: float(fractions.get(name, 0.0)) for name in SPLITS}
    total = math.fsum(out.values())
    if not all(0 <= f <= 1 for f in out.values()) or not 0 < total <= 1 + 1e-9:
        raise StoreError("fractions of the splits", expected="numbers of at least 0 with a sum of at most 1", got=out)
    return out


def document_hashes(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [n_docs, 2] hashes of every document's id and of its text: 32 bytes a document, however long they are."""
    ids, texts = np.empty((store.n_docs, 2), np.uint64), np.empty((store.n_docs, 2), np.uint64)
    for block in _blocks(store.n_docs, _DOCS):
        for i, (doc_id, text) in enumerate(zip(store.doc_ids(block), store.texts(block), strict=True), block.start):
            ids[i] = _hash(b"id", doc_id)
            texts[i] = _hash(b"text", text) if text else ids[i]  # documents without a text do not share one
    return ids, _joined(texts)


def assign(ids: np.ndarray, texts: np.ndarray, fractions: list[float], seed: int) -> np.ndarray:
    """int8 [n_docs] split codes from document_hashes; -1 beyond the fractions."""
    _, group, sizes = np.unique(texts, return_inverse=True, return_counts=True)
    alone = (sizes == 1)[group]
    keys = np.where(alone[:, None], ids, texts.view(np.uint64).reshape(-1, 2))
    uniform = np.array([_uniform(seed, key.tobytes()) for key in keys])
    edges = np.cumsum(fractions)
    if abs(edges[-1] - 1) < 1e-9:
        edges[-1] = 1.0  # every document belongs to a split, whatever the rounding of the sum
    codes = np.searchsorted(edges, uniform, side="right")
    return np.where(codes < len(fractions), codes, -1).astype(np.int8)


def overlaps(codes: np.ndarray, ids: np.ndarray, texts: np.ndarray) -> list[str]:
    """The proof that splits share no document: empty, or what two of them share."""
    problems = []
    used = codes >= 0
    for what, hashes in (("document id", _joined(ids)), ("text", texts)):
        _, group = np.unique(hashes[used], return_inverse=True)
        low, high = np.full(group.max(initial=-1) + 1, 127, np.int8), np.full(group.max(initial=-1) + 1, -1, np.int8)
        np.minimum.at(low, group, codes[used])
        np.maximum.at(high, group, codes[used])
        shared = np.flatnonzero(low != high)
        if len(shared):
            docs = np.flatnonzero(used)[np.flatnonzero(group == shared[0])][:2].tolist()
            several = f"{len(shared)} {what}{'s' if len(shared) > 1 else ''}"
            problems.append(f"{several} in two splits (documents {docs[0]} and {docs[1]})")
    return problems


def check_splits(store: Store) -> list[str]:
    """What is wrong with a store's splits; empty when they are as splits.json says and share nothing."""
    written = store.splits
    if written is None:
        return []
    codes = store.doc_splits
    if codes.shape != (store.n_docs,):
        return [f"docs/split has {len(codes)} entries for {store.n_docs} documents"]
    problems = []
    try:
        stored = {name: written[name] for name in SPLITS}
        seed, fractions = written["seed"], [float(s["fraction"]) for s in stored.values()]
        counts = {name: (s["docs"], s["rows"]) for name, s in stored.items()}
    except (KeyError, TypeError, ValueError) as error:
        return [f"{SPLIT_FILE}: not as write_splits makes it ({error!r})"]
    rows = _rows_per_split(store, codes)
    for i, name in enumerate(SPLITS):
        found = (int((codes == i).sum()), rows[i])
        if found != counts[name]:
            problems.append(f"split {name}: (documents, rows) are {found}, {SPLIT_FILE} says {counts[name]}")
    ids, texts = document_hashes(store)
    problems += [f"splits: {p}" for p in overlaps(codes, ids, texts)]
    if seed is not None and (assign(ids, texts, fractions, seed) != codes).any():
        problems.append(f"docs/split is not what seed {seed} and the fractions give")
    return problems


def _rows_per_split(store: Store, codes: np.ndarray) -> list[int]:
    counts = np.zeros(len(SPLITS) + 1, np.int64)
    for block in _blocks(store.n_rows, _ROWS):
        docs = store.table(block)["doc"]
        counts += np.bincount(codes[docs] + 1, minlength=len(counts))
    return counts[1:].tolist()


def _blocks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _hash(kind: bytes, text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(kind + b"\0" + text.encode()).digest()[:16], "<u8")


def _joined(hashes: np.ndarray) -> np.ndarray:
    """Pairs of uint64 as one comparable element each."""
    return np.ascontiguousarray(hashes).view([("a", np.uint64), ("b", np.uint64)]).reshape(-1)


def _uniform(seed: int, key: bytes) -> float:
    return int.from_bytes(hashlib.sha256(f"{seed}\0".encode() + key).digest()[:8], "little") / 2**64
