"""Reading an activation store: vectors, the table of their rows, and the texts they were read from.

The files are described in manifest.py; store_write.py makes them, store_check.py verifies them, store_merge.py joins
and divides stores. Reads are batched TensorStore reads, safe from several threads; a `Store` can be pickled to a
process started by `spawn` (a forked one must not use TensorStore, which ends it with a message).
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts

from nla_jax.arrays import Ragged, Root, guard
from nla_jax.errors import StoreError
from nla_jax.manifest import MANIFEST, ROW_DTYPES, done_shards, read_manifest, shard_count

if TYPE_CHECKING:
    from nla_jax.store_check import Progress

Rows = slice | np.ndarray
SPLITS = ("av_sft", "ar_sft", "rl")  # a document's `docs/split` is an index into this, or -1
HELD_OUT = "held_out"  # the name of the documents in no split
EXPLANATIONS, SPLIT_FILE = "explanations.json", "splits.json"
_BLOCK = 1 << 18  # rows of a column read at a time


class Store:
    """An activation store, opened with `Store.open`.

    Attributes: `path`, `manifest` (dict), `n_rows`, `n_docs`, `d_model`, `layers` (0-based blocks), `complete`.
    Rows are given as a slice or as an integer array in any order, repeats allowed. Every method raises StoreError
    in one line when a row does not exist or what is read is damaged.
    """

    def __init__(self, root: Root, manifest: dict[str, Any]):
        self.root, self.path, self.manifest = root, root.path, manifest
        self.n_rows: int = manifest["n_rows"]
        self.n_docs: int = manifest["n_docs"]
        self.d_model: int = manifest["d_model"]
        self.layers: tuple[int, ...] = tuple(manifest["layers"])
        self.complete: bool = manifest["status"] == "complete"
        self._done: set[int] = set()  # of a store that is being written: shards known to be there

    @classmethod
    def open(cls, path: str | Path, *, complete: bool = True) -> Store:
        """Opens a store by its directory or URL; with `complete=False` also one whose extraction has not ended."""
        root = Root(path)
        manifest = read_manifest(root)
        store = cls(root, manifest)
        if complete and not store.complete:
            done = f"{len(done_shards(root))} of {shard_count(manifest)} shards"
            fix = "the same nla extract command again, which goes on where it stopped"
            raise StoreError(f"{path} is half-written", expected="every shard of vectors", got=done, fix=fix)
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Root(state["path"]), state["manifest"])  # type: ignore[misc]

    def __repr__(self) -> str:
        state = "" if self.complete else ", extracting"
        return f"Store({self.path!r}, {self.n_rows} rows of {self.n_docs} documents, D = {self.d_model}{state})"

    @cached_property
    def _vectors(self) -> ts.TensorStore:
        return self.root.open("vectors", final=self.complete)

    @cached_property
    def _columns(self) -> dict[str, ts.TensorStore]:
        return {name: self.root.open(f"rows/{name}") for name in ROW_DTYPES}

    @cached_property
    def _texts(self) -> Ragged:
        return Ragged(self.root, "docs/text_bytes", "docs/text_offsets")

    @cached_property
    def _ids(self) -> Ragged:
        return Ragged(self.root, "docs/id_bytes", "docs/id_offsets")

    @cached_property
    def _tokens(self) -> Ragged:
        return Ragged(self.root, "docs/tokens", "docs/token_offsets")

    def vectors(self, rows: Rows) -> np.ndarray:
        """Raw vectors of the rows: float32 [n, D], whatever dtype they are stored in."""
        index = self._index(rows, self.n_rows, "row")
        if not self.complete:
            self._require_done(index)
        if _size(index) == 0:
            return np.empty((0, self.d_model), np.float32)
        with guard(f"{self.path}: reading vectors"):
            found = self._vectors[index].read().result()
        found = found.astype(np.float32, copy=False)
        # Only finite vectors are ever written; a shard file that is gone reads as NaN.
        bad = np.isnan(found[:, 0])
        if bad.any():
            row = int(_numbers(index)[int(np.argmax(bad))])
            shard = row // self.manifest["shard_rows"]
            raise StoreError(
                f"{self.path}: row {row} has no vector", got=f"shard {shard} is gone", fix="nla data check"
            )
        return found

    def table(self, rows: Rows = slice(None)) -> dict[str, np.ndarray]:
        """Integers [n] of the rows: doc, position, token_id, role, layer, text_end (see manifest.ROW_DTYPES)."""
        return self._read_columns(tuple(ROW_DTYPES), rows)

    def _read_columns(self, names: tuple[str, ...], rows: Rows) -> dict[str, np.ndarray]:
        index = self._index(rows, self.n_rows, "row")
        if _size(index) == 0:
            return {name: np.empty(0, ROW_DTYPES[name]) for name in names}
        with guard(f"{self.path}: reading the table of rows"):
            with ts.Batch() as batch:
                futures = {name: self._columns[name][index].read(batch=batch) for name in names}
            return {name: future.result() for name, future in futures.items()}

    def doc_ids(self, docs: Rows) -> list[str]:
        return self._ids.strings(self._docs(docs))

    def texts(self, docs: Rows) -> list[str]:
        """The documents' texts; of a chat, as the template renders it."""
        return self._texts.strings(self._docs(docs))

    def tokens(self, docs: Rows) -> list[np.ndarray]:
        """The documents' token ids, int32 [T]: what the model was given."""
        return self._tokens.read(self._docs(docs))

    def prefixes(self, rows: Rows) -> list[str]:
        """The text of each row's document up to and including the row's token."""
        found = self._read_columns(("doc", "text_end"), rows)
        return self._texts.strings(found["doc"], found["text_end"])

    @cached_property
    def has_explanations(self) -> bool:
        return self.root.read(EXPLANATIONS) is not None

    @cached_property
    def _explanations(self) -> tuple[Ragged, ts.TensorStore]:
        if not self.has_explanations:
            raise StoreError(f"{self.path} holds no explanations", fix="nla teach")
        text = Ragged(self.root, "explanations/bytes", "explanations/offsets")
        return text, self.root.open("explanations/status")

    def explanations(self, rows: Rows) -> list[str | None]:
        """Warm-start explanations; None where there is none or it was dropped."""
        index = _numbers(self._index(rows, self.n_rows, "row"))
        texts = self._explanations[0].strings(index)
        return [t if s == 1 else None for t, s in zip(texts, self.explanation_status(index), strict=True)]

    def explanation_status(self, rows: Rows) -> np.ndarray:
        """uint8 [n]: 0 no explanation was asked for, 1 there is one, 2 the answer was dropped."""
        index = self._index(rows, self.n_rows, "row")
        if _size(index) == 0:
            return np.empty(0, np.uint8)
        with guard(f"{self.path}: reading explanations"):
            return self._explanations[1][index].read().result()

    @cached_property
    def splits(self) -> dict[str, Any] | None:
        """splits.json: per split its `fraction`, `docs` and `rows`; None before `write_splits`."""
        return self.root.read_json(SPLIT_FILE)

    @cached_property
    def doc_splits(self) -> np.ndarray:
        """int8 [n_docs]: index into SPLITS, or -1."""
        if self.splits is None:
            raise StoreError(f"{self.path} is not split", fix="nla data split")
        with guard(f"{self.path}: reading docs/split"):
            return self.root.open("docs/split").read().result()

    def rows_of(self, split: str) -> np.ndarray:
        """int64 row numbers, ascending, whose document is in the split ("av_sft", "ar_sft" or "rl"), or in none
        ("held_out")."""
        if split not in (*SPLITS, HELD_OUT):
            raise StoreError(f"split {split!r}", expected=" or ".join((*SPLITS, HELD_OUT)))
        wanted = self.doc_splits == (-1 if split == HELD_OUT else SPLITS.index(split))
        found = []
        for start in range(0, self.n_rows, _BLOCK):
            docs = self._read_columns(("doc",), slice(start, start + _BLOCK))["doc"]
            found.append(start + np.flatnonzero(wanted[docs]))
        return np.concatenate(found)

    def head(self, n: int = 10) -> list[dict[str, Any]]:
        """The first rows as dictionaries: table, doc_id, prefix, norm (None if not extracted yet), explanation."""
        rows = slice(0, n)
        table = self.table(rows)
        count = len(table["doc"])
        out: list[dict[str, Any]] = [{"row": i, **{k: int(v[i]) for k, v in table.items()}} for i in range(count)]
        ids, prefixes = self.doc_ids(table["doc"]), self.prefixes(rows)
        explanations = self.explanations(rows) if self.has_explanations else [None] * count
        for i, item in enumerate(out):
            norm = None
            if self.complete or i // self.manifest["shard_rows"] in done_shards(self.root):
                norm = float(np.linalg.norm(self.vectors(slice(i, i + 1))[0]))
            item.update(doc_id=ids[i], prefix=prefixes[i], norm=norm, explanation=explanations[i])
        return out

    def check(self, progress: Progress | None = None) -> list[str]:
        """Reads everything and returns what is wrong, one line each; empty when the store is sound."""
        from nla_jax.store_check import check

        return check(self, progress)

    def _require_done(self, index: slice | np.ndarray) -> None:
        needed = set(np.unique(_numbers(index) // self.manifest["shard_rows"]).tolist())
        if not needed <= self._done:
            self._done = done_shards(self.root)
        if not needed <= self._done:
            shard = min(needed - self._done)
            fix = "the same nla extract command again, which goes on where it stopped"
            raise StoreError(f"{self.path}: shard {shard} is not extracted yet", fix=fix)

    def _docs(self, docs: Rows) -> np.ndarray:
        return _numbers(self._index(docs, self.n_docs, "document"))

    def _index(self, rows: Rows, n: int, what: str) -> slice | np.ndarray:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(n)
            if step == 1:
                return slice(start, max(start, stop))
            return np.arange(start, stop, step)
        index = np.asarray(rows)
        if index.ndim != 1 or (index.size and not np.issubdtype(index.dtype, np.integer)):
            got = f"{index.dtype} of shape {index.shape}"
            raise StoreError(f"{self.path}: {what} numbers", expected="a slice or a 1-D integer array", got=got)
        index = index.astype(np.int64, copy=False)
        if index.size and not (0 <= index.min() and index.max() < n):
            wrong = int(index.min() if index.min() < 0 else index.max())
            raise StoreError(f"{self.path}: {what}", expected=f"0 to {n - 1}", got=wrong)
        return index


def _size(index: slice | np.ndarray) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


def _numbers(index: slice | np.ndarray) -> np.ndarray:
    return np.arange(index.start, index.stop) if isinstance(index, slice) else index


__all__ = ["EXPLANATIONS", "MANIFEST", "SPLITS", "SPLIT_FILE", "Rows", "Store"]
