"""Joining stores and dividing one: documents and rows are copied in order, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.arrays import Root, canonical
from nla_jax.errors import StoreError
from nla_jax.manifest import manifest_hash
from nla_jax.store import EXPLANATIONS, SPLITS, Store
from nla_jax.store_place import new_root
from nla_jax.store_splits import write_splits
from nla_jax.store_write import DROPPED, IndexFiles, ShardWriter, seal_index, write_explanations

Progress = Callable[[int, int], None]  # (rows done, rows in all)
_SAME = ("d_model", "dtype", "layers", "model", "tokenizer")
_DOCS, _ROWS = 256, 1 << 16  # copied at a time


def merge(stores: Sequence[str | Path], out: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Writes the concatenation of complete stores to `out`; returns its manifest.

    All must hold the same layers of the same model, read through the same tokenizer, and no document twice.
    Explanations are carried over; splits too where all stores were split with one seed and the same fractions.
    """
    if len(stores) < 2:
        raise StoreError("stores to merge", expected="at least two", got=len(stores))
    sources = [Store.open(path) for path in stores]
    first = sources[0]
    for other in sources[1:]:
        for name in _SAME:
            if canonical(first.manifest[name]) != canonical(other.manifest[name]):
                raise StoreError(
                    f"{other.path} does not fit {first.path}",
                    expected=f"{name} = {_short(first.manifest[name])}",
                    got=_short(other.manifest[name]),
                    fix="stores of one model and the same layers",
                )
    settings = [s.manifest["settings"] for s in sources]
    names = sorted({name for s in settings for name in s})
    # A setting in which the stores differ is kept for each of them.
    joined = {
        name: settings[0].get(name)
        if all(canonical(s.get(name)) == canonical(settings[0].get(name)) for s in settings)
        else {"of_each": [s.get(name) for s in settings]}
        for name in names
    }
    corpora = [s.manifest["corpus"] for s in sources]
    counts: dict[str, int] = {}
    for corpus in corpora:
        for name, value in corpus.get("counts", {}).items():
            counts[name] = counts.get(name, 0) + value
    corpus = {"name": " + ".join(str(c.get("name")) for c in corpora), "merged": corpora, "counts": counts}
    fields = {**_fields(first), "settings": joined, "corpus": corpus}
    with new_root(out) as root:
        manifest = _copy([(s, None) for s in sources], root, fields, progress)
    splits = [s.splits for s in sources]
    if all(s is not None and s["seed"] is not None for s in splits):
        given = [(s["seed"], {n: s[n]["fraction"] for n in SPLITS}) for s in splits if s is not None]
        if all(g == given[0] for g in given):
            write_splits(out, given[0][1], given[0][0])
    return manifest


def split_store(path: str | Path, out: str | Path, progress: Progress | None = None) -> dict[str, Path | str]:
    """Writes each split of a store as a store of its own, `out/av_sft` and so on; returns where they are."""
    store = Store.open(path)
    codes = store.doc_splits
    written: dict[str, Path | str] = {}
    for i, name in enumerate(SPLITS):
        chosen = codes == i
        if not chosen.any():
            continue
        target = f"{str(out).rstrip('/')}/{name}"
        settings = {**store.manifest["settings"], "split": name}
        with new_root(target) as root:
            _copy([(store, chosen)], root, {**_fields(store), "settings": settings}, progress)
        written[name] = target
    return written


def _fields(store: Store) -> dict[str, Any]:
    left_out = ("hash", "status", "n_rows", "n_docs", "arrays")
    return {name: value for name, value in store.manifest.items() if name not in left_out}


def _copy(
    sources: list[tuple[Store, np.ndarray | None]], root: Root, fields: Mapping[str, Any], progress: Progress | None
) -> dict[str, Any]:
    """Copies the chosen documents (bool [n_docs], None for all) with their rows, vectors and explanations."""
    files = IndexFiles(root)
    for store, chosen in sources:
        first = files.n_docs
        kept = np.ones(store.n_docs, bool) if chosen is None else chosen
        for start in range(0, store.n_docs, _DOCS):
            docs = start + np.flatnonzero(kept[start : start + _DOCS])
            for parts in zip(store.doc_ids(docs), store.texts(docs), store.tokens(docs), strict=True):
                files.add_document(parts[0].encode(), parts[1].encode(), parts[2])
        number = first + np.cumsum(kept) - 1
        for rows in _row_blocks(store, chosen):
            table = store.table(rows)
            files.add_rows({**table, "doc": number[table["doc"]].astype(np.int32)})
    manifest = seal_index(root, files, fields)
    writer = ShardWriter(root)
    blocks = _vector_blocks(sources, manifest["shard_rows"])
    for shard, vectors in enumerate(blocks):
        writer.write_shard(shard, vectors)
        if progress is not None:
            progress(writer.rows(shard)[1], manifest["n_rows"])
    writer.finish()
    if any(store.has_explanations for store, _ in sources):
        _copy_explanations(sources, root)
    return writer.manifest


def _row_blocks(store: Store, chosen: np.ndarray | None, size: int = _ROWS) -> Iterator[np.ndarray]:
    """Numbers of the rows whose documents are chosen, in order, from `size` rows of the store at a time."""
    for start in range(0, store.n_rows, size):
        rows = np.arange(start, min(start + size, store.n_rows))
        if chosen is not None:
            rows = rows[chosen[store.table(slice(start, start + size))["doc"]]]
        if len(rows):
            yield rows


def _vector_blocks(sources: list[tuple[Store, np.ndarray | None]], size: int) -> Iterator[np.ndarray]:
    """The chosen rows' vectors, `size` rows at a time across the seams between stores."""
    waiting: list[np.ndarray] = []
    n = 0
    for store, chosen in sources:
        for rows in _row_blocks(store, chosen, size):
            while len(rows):
                part, rows = rows[: size - n], rows[size - n :]
                waiting.append(store.vectors(part))
                n += len(part)
                if n == size:
                    yield np.concatenate(waiting)
                    waiting, n = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _copy_explanations(sources: list[tuple[Store, np.ndarray | None]], root: Root) -> None:
    metas = []
    statuses = []
    for store, chosen in sources:
        meta = store.root.read_json(EXPLANATIONS) if store.has_explanations else None
        metas.append(
            None if meta is None else {k: v for k, v in meta.items() if k not in ("counts", "arrays", "store")}
        )
        for rows in _row_blocks(store, chosen):
            none = np.zeros(len(rows), np.uint8)
            statuses.append(store.explanation_status(rows) if store.has_explanations else none)
    known = [m for m in metas if m is not None]
    same = all(canonical(m) == canonical(known[0]) for m in known)

    def texts() -> Iterator[str | None]:
        for store, chosen in sources:
            for rows in _row_blocks(store, chosen, 1 << 10):
                yield from store.explanations(rows) if store.has_explanations else [None] * len(rows)

    dropped = np.concatenate(statuses) == DROPPED
    write_explanations(root.local or root.path, texts(), known[0] if same else {"merged": metas}, dropped=dropped)


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({manifest_hash({'value': value})[:8]})"
