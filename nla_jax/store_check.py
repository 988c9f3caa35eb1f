"""Verifying an activation store: everything is read once, a block at a time, and every fault gets one line."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nla_jax.arrays import DTYPES
from nla_jax.errors import StoreError
from nla_jax.manifest import ROLES, ROW_DTYPES, done_shards, read_manifest, shard_count, shard_range
from nla_jax.store import EXPLANATIONS, Store
from nla_jax.store_splits import check_splits
from nla_jax.store_write import read_records, vectors_hash

Progress = Callable[[int, int], None]  # (shards done, shards in all)
_BLOCK = 1 << 20  # elements of an array hashed at a time
_TEXT_BYTES = 1 << 23  # of document texts looked at together
_MOST = 20  # faults of one kind that are listed one by one
_ARRAYS = {
    **{f"rows/{name}": (dtype, "n_rows", 0) for name, dtype in ROW_DTYPES.items()},
    "docs/text_offsets": ("int64", "n_docs", 1),
    "docs/id_offsets": ("int64", "n_docs", 1),
    "docs/token_offsets": ("int64", "n_docs", 1),
    "docs/n_tokens": ("int32", "n_docs", 0),
    "docs/text_bytes": ("uint8", "", 0),
    "docs/id_bytes": ("uint8", "", 0),
    "docs/tokens": ("int32", "", 0),
}


def check(store: Store, progress: Progress | None = None) -> list[str]:
    """Problems of a store; a store that is being written is checked as far as it goes."""
    problems: list[str] = []
    try:
        read_manifest(store.root)
    except StoreError as error:
        problems.append(str(error))
    damaged = _check_arrays(store, problems)
    if not damaged:
        # Only where the arrays are what they were written as do their contents mean anything; and then a fault in
        # them is one of the writer's.
        for look in (_check_documents, _check_rows):
            with _collecting(problems):
                look(store, problems)
    _check_vectors(store, problems, progress)
    with _collecting(problems):
        _check_explanations(store, problems)
    if not damaged:
        with _collecting(problems):
            _check_split_files(store, problems)
    return problems


@contextlib.contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        problems.append(str(error))
    except (KeyError, TypeError, ValueError) as error:  # a JSON file with other contents than ours
        problems.append(f"unreadable: {type(error).__name__}: {error}")


def _check_arrays(store: Store, problems: list[str]) -> bool:
    before = len(problems)
    entries = store.manifest.get("arrays", {})
    for name, (dtype, size, more) in _ARRAYS.items():
        entry = entries.get(name)
        if entry is None:
            problems.append(f"manifest.json: arrays lacks {name}")
            continue
        wanted = [store.manifest[size] + more] if size else entry["shape"]
        with _collecting(problems):
            problems += _check_array(store, name, entry, dtype, wanted)
    return len(problems) > before


def _check_array(store: Store, name: str, entry: dict[str, Any], dtype: str, shape: list[int]) -> list[str]:
    array = store.root.open(name, cached=False)
    found = (list(array.shape), array.dtype.name)
    if found != (shape, dtype) or entry["shape"] != shape or entry["dtype"] != dtype:
        return [f"{name}: expected {dtype} of shape {shape}, got {found[1]} of shape {found[0]}"]
    digest = hashlib.sha256()
    for start in range(0, shape[0], _BLOCK):
        digest.update(_read(store, name, array, start, min(start + _BLOCK, shape[0])).tobytes())
    if digest.hexdigest() != entry["sha256"]:
        return [f"{name}: its contents are not what was written (sha256)"]
    return []


def _read(store: Store, name: str, array: Any, start: int, stop: int) -> np.ndarray:
    try:
        return array[start:stop].read().result()
    except ValueError as error:
        text = " ".join(str(error).split())[:200]
        raise StoreError(f"{name}: elements {start} to {stop} cannot be read", got=text) from None


def _offsets(store: Store, name: str, total: int, problems: list[str]) -> bool:
    array = store.root.open(name)
    last = 0
    for start in range(0, array.shape[0], _BLOCK):
        block = _read(store, name, array, start, min(start + _BLOCK, array.shape[0]))
        if (start == 0 and block[0] != 0) or block[0] < last or (np.diff(block) < 0).any():
            problems.append(f"{name}: not ascending from 0")
            return False
        last = int(block[-1])
    if last != total:
        problems.append(f"{name}: ends at {last}, there are {total} elements")
        return False
    return True


def _check_documents(store: Store, problems: list[str]) -> None:
    arrays = store.manifest["arrays"]
    for kind in ("text", "id", "token"):
        values = "docs/tokens" if kind == "token" else f"docs/{kind}_bytes"
        if not _offsets(store, f"docs/{kind}_offsets", arrays[values]["shape"][0], problems):
            raise StoreError("documents cannot be read further")
    n_tokens = store.root.open("docs/n_tokens").read().result()
    offsets = store.root.open("docs/token_offsets").read().result()
    if (np.diff(offsets) != n_tokens).any():
        problems.append("docs/n_tokens: not the lengths of docs/tokens")


def _check_rows(store: Store, problems: list[str]) -> None:
    """Rows point into their documents: position, token and a text end on a character boundary."""
    bounds = store.root.open("docs/text_offsets").read().result()
    rows_of_doc = _rows_of_docs(store, problems)
    if rows_of_doc is None:
        return
    layers = np.array(store.layers)
    doc = 0
    found: dict[str, int] = {}  # fault -> first row
    while doc < store.n_docs:
        # As many documents as have some megabytes of text together, at least one.
        end = max(doc + 1, int(np.searchsorted(bounds, bounds[doc] + _TEXT_BYTES, side="right")) - 1)
        end = min(end, doc + 4096, store.n_docs)
        texts = store._texts.read(np.arange(doc, end))
        tokens = store.tokens(slice(doc, end))
        for i, data in enumerate(texts):
            try:
                data.tobytes().decode("utf-8")
            except UnicodeDecodeError:
                problems.append(f"document {doc + i}: its text is not UTF-8")
        first, last = int(rows_of_doc[doc]), int(rows_of_doc[end])
        table = store.table(slice(first, last))
        lengths = np.array([len(t) for t in tokens])[table["doc"] - doc]
        sizes = np.array([len(t) for t in texts])[table["doc"] - doc]
        inside = (table["position"] >= 0) & (table["position"] < lengths)
        at_end = (table["text_end"] >= 0) & (table["text_end"] <= sizes)
        faults = {
            "position outside its document": ~inside,
            "text_end outside its document": ~at_end,
            "a role that does not exist": (table["role"] < 0) | (table["role"] >= len(ROLES)),
            "a layer that is not in the manifest": ~np.isin(table["layer"], layers),
        }
        wrong, cut = np.zeros(last - first, bool), np.zeros(last - first, bool)
        for k in np.flatnonzero(inside & at_end):
            d = int(table["doc"][k]) - doc
            wrong[k] = tokens[d][table["position"][k]] != table["token_id"][k]
            stop = int(table["text_end"][k])
            cut[k] = stop < sizes[k] and (int(texts[d][stop]) & 0xC0) == 0x80
        faults |= {"another token_id than its document has there": wrong, "text_end inside a character": cut}
        for what, bad in faults.items():
            if bad.any():
                found.setdefault(what, first + int(np.argmax(bad)))
        doc = end
    problems += [f"row {row}: {what}" for what, row in found.items()]


def _rows_of_docs(store: Store, problems: list[str]) -> np.ndarray | None:
    """int64 [n_docs + 1]: where each document's rows begin; None if rows are not in the order of documents."""
    counts = np.zeros(store.n_docs + 1, np.int64)
    last = 0
    for start in range(0, store.n_rows, _BLOCK):
        docs = store._read_columns(("doc",), slice(start, start + _BLOCK))["doc"]
        if docs[0] < last or (np.diff(docs) < 0).any() or docs[-1] >= store.n_docs:
            problems.append("rows/doc: not ascending document numbers")
            return None
        counts[1:] += np.bincount(docs, minlength=store.n_docs)
        last = int(docs[-1])
    if (counts[1:] == 0).any():
        problems.append(f"document {int(np.argmin(counts[1:]))} has no rows")
    return np.cumsum(counts)


def _check_vectors(store: Store, problems: list[str], progress: Progress | None) -> None:
    manifest = store.manifest
    with _collecting(problems):
        array = store.root.open("vectors", final=store.complete, cached=False)
        wanted = ((store.n_rows, store.d_model), manifest["dtype"])
        if (tuple(array.shape), array.dtype.name) != wanted:
            problems.append(f"vectors: expected {wanted[1]} of shape {wanted[0]}, got {array.dtype.name} {array.shape}")
            return
        records = read_records(store.root, manifest)
        present = done_shards(store.root)
        total = shard_count(manifest)
        extra = sorted(i for i in present if i >= total)
        if extra:
            problems.append(f"done/: records of shards {extra[:8]} that do not exist")
        mine: list[str] = []
        for shard, record in enumerate(records):
            if progress is not None:
                progress(shard, total)
            if record is None:
                if shard in present:
                    mine.append(f"done/ record of shard {shard} is damaged")
                elif store.complete:
                    mine.append(f"done/ record of shard {shard} is missing")
                continue
            a, b = shard_range(manifest, shard)
            try:
                values = _read(store, "vectors", array, a, b).astype(DTYPES[manifest["dtype"]], copy=False)
            except StoreError as error:
                mine.append(f"shard {shard} (rows {a} to {b}): {error}")
                continue
            if hashlib.sha256(values.tobytes()).hexdigest() != record["sha256"]:
                gone = "is missing" if np.isnan(values).all() else "is not what was written (sha256)"
                mine.append(f"shard {shard} (rows {a} to {b}) {gone}")
            elif not np.isfinite(values).all():
                mine.append(f"shard {shard} (rows {a} to {b}) holds values that are not finite")
        if progress is not None:
            progress(total, total)
        if store.complete and all(r is not None for r in records):
            digest = vectors_hash([r["sha256"] for r in records if r is not None])
            if manifest["arrays"].get("vectors", {}).get("sha256") != digest:
                mine.append("done/ records are not those the manifest was sealed with")
        problems += mine[:_MOST]
        if len(mine) > _MOST:
            problems.append(f"... and {len(mine) - _MOST} more faults in the vectors")


def _check_explanations(store: Store, problems: list[str]) -> None:
    meta = store.root.read_json(EXPLANATIONS)
    if meta is None:
        return
    before = len(problems)
    n = store.n_rows
    wanted = {"bytes": ("uint8", None), "offsets": ("int64", [n + 1]), "status": ("uint8", [n])}
    for name, (dtype, shape) in wanted.items():
        entry = meta["arrays"][f"explanations/{name}"]
        problems += _check_array(store, f"explanations/{name}", entry, dtype, shape or entry["shape"])
    if len(problems) > before:
        return
    if not _offsets(store, "explanations/offsets", meta["arrays"]["explanations/bytes"]["shape"][0], problems):
        return
    counts = np.zeros(3, np.int64)
    for start in range(0, n, 1 << 12):
        status = store.explanation_status(slice(start, start + (1 << 12)))
        if status.max(initial=0) > 2:
            problems.append(f"explanations/status: {int(status.max())} at rows from {start}")
            return
        counts += np.bincount(status, minlength=3)
        try:
            store.explanations(slice(start, start + (1 << 12)))
        except UnicodeDecodeError:
            problems.append(f"explanations from row {start}: not UTF-8")
    if dict(zip(("none", "ok", "dropped"), counts.tolist(), strict=True)) != meta["counts"]:
        problems.append(f"explanations: {counts.tolist()} by status, {EXPLANATIONS} says {meta['counts']}")


def _check_split_files(store: Store, problems: list[str]) -> None:
    if store.splits is None:
        return
    entry = store.splits["arrays"]["docs/split"]
    found = _check_array(store, "docs/split", entry, "int8", [store.n_docs])
    problems += found or check_splits(store)
