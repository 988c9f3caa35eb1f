"""Writing an activation store, in the two phases of an extraction.

First the index (`create_index`): every document's text and tokens and the table of all rows. From then on the number
of rows is known. Then the vectors (`ShardWriter`), a shard at a time in any order by any number of processes: a shard
is written whole and then recorded in `done/`, so a kill loses at most the shard in flight, and what a second run
writes in its place is the same. The last one to finish marks the store complete.

Explanations and splits are added to a finished store later.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.arrays import (
    DTYPES,
    NUMBERS,
    SHORT_TEXT,
    TEXT,
    TOKENS,
    GrowingArray,
    GrowingText,
    Layout,
    Root,
    guard,
)
from nla_jax.errors import StoreError
from nla_jax.manifest import (
    ROW_DTYPES,
    StoreSpec,
    check_spec,
    done_key,
    read_manifest,
    shard_count,
    shard_range,
    write_manifest,
)
from nla_jax.models.atomic import atomic_dir
from nla_jax.store import EXPLANATIONS, Store
from nla_jax.store_place import new_root, sole_writer

OK, DROPPED = 1, 2  # explanations/status; 0 is none


@dataclass(frozen=True)
class IndexedDocument:
    """A tokenized document and the positions whose vectors are wanted.

    ids int32 [T], roles int8 [T], text_end int32 [T] (bytes of `text` up to and including the token), positions int
    [n] strictly ascending. Every position gives one row per layer of the specification.
    """

    doc_id: str
    text: str
    ids: np.ndarray
    roles: np.ndarray
    text_end: np.ndarray
    positions: np.ndarray


class IndexFiles:
    """The growing arrays of the first phase; also what merging and dividing stores write to."""

    def __init__(self, root: Root):
        self.rows = {name: GrowingArray(root, f"rows/{name}", dtype, NUMBERS) for name, dtype in ROW_DTYPES.items()}
        self._texts = GrowingText(root, "docs/text_bytes", "docs/text_offsets", TEXT)
        self._ids = GrowingText(root, "docs/id_bytes", "docs/id_offsets", SHORT_TEXT)
        self._tokens = GrowingText(root, "docs/tokens", "docs/token_offsets", TOKENS, "int32")
        self._n_tokens = GrowingArray(root, "docs/n_tokens", "int32", NUMBERS)
        self._hashes = IdHashes()

    @property
    def n_docs(self) -> int:
        return self._n_tokens.length

    @property
    def n_rows(self) -> int:
        return self.rows["doc"].length

    def add_document(self, doc_id: bytes, text: bytes, tokens: np.ndarray) -> None:
        self._hashes.add(doc_id)
        self._ids.append(doc_id)
        self._texts.append(text)
        self._tokens.append(np.asarray(tokens, np.int32))
        self._n_tokens.append([len(tokens)])

    def add_rows(self, table: Mapping[str, np.ndarray]) -> None:
        for name, column in self.rows.items():
            column.append(table[name])

    def close(self, root: Root) -> dict[str, Any]:
        """The manifest's `arrays` without the vectors; StoreError if there are no rows or a document came twice."""
        if self.n_rows == 0:
            fix = "longer documents, a smaller --min-position, or more of the corpus"
            raise StoreError(f"{root.path}: nothing to extract", expected="at least one position", got="none", fix=fix)
        arrays = {f"rows/{name}": column.close() for name, column in self.rows.items()}
        for text in (self._texts, self._ids, self._tokens):
            arrays.update(text.close())
        arrays["docs/n_tokens"] = self._n_tokens.close()
        twice = self._hashes.repeated()
        if twice is not None:
            name = Store(root, {**_SIZES, "n_docs": self.n_docs}).doc_ids(np.array([twice[0]]))[0]
            got = f"{name!r} as documents {twice[0]} and {twice[1]}"
            fix = "ids that are unique; --id-field none names documents by file and row"
            raise StoreError(f"{root.path}: a document id came twice", got=got, fix=fix)
        return arrays


_SIZES: dict[str, Any] = {"n_rows": 0, "n_docs": 0, "d_model": 0, "layers": [], "status": "extracting"}


class IdHashes:
    """Finds repeated ids with 16 bytes of memory per document."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, doc_id: bytes) -> None:
        self._bytes += hashlib.sha256(doc_id).digest()[:16]

    def repeated(self) -> tuple[int, int] | None:
        """The numbers of two documents with one id, the lowest second one; None if all differ."""
        hashes = np.frombuffer(bytes(self._bytes), "S16")  # comparisons stop at trailing zero bytes, which is harmless
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
        if not len(same):
            return None
        k = same[np.argmin(order[same + 1])]
        return int(order[k]), int(order[k + 1])


def create_index(
    path: str | Path,
    spec: StoreSpec,
    documents: Iterable[IndexedDocument],
    *,
    counts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Writes the first phase of a store and returns its manifest (status "extracting").

    `counts` is read after the last document, so it may be a mapping that the corpus is still filling. Documents
    without positions are left out and counted as `too_short`. On a disk the index is made in a temporary directory
    and moved to `path`; in an object store its manifest is written last. StoreError if `path` holds something.
    """
    too_short = 0
    with new_root(path) as root:
        files = IndexFiles(root)
        n_layers = len(spec.layers)
        layers = np.array(spec.layers, np.int16)
        for document in documents:
            _check_document(document)
            n = len(document.positions)
            if n == 0:
                too_short += 1
                continue
            at = np.repeat(np.asarray(document.positions, np.int64), n_layers)
            files.add_rows(
                {
                    "doc": np.full(len(at), files.n_docs, np.int32),
                    "position": at.astype(np.int32),
                    "token_id": document.ids[at],
                    "role": document.roles[at],
                    "layer": np.tile(layers, n),
                    "text_end": document.text_end[at],
                }
            )
            files.add_document(document.doc_id.encode(), document.text.encode(), document.ids)
        corpus = {**spec.corpus, "counts": {**(counts or {}), "too_short": too_short}}
        return seal_index(root, files, {**spec.fields(), "corpus": corpus})


def seal_index(root: Root, files: IndexFiles, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Closes an index and makes the empty vectors array; the manifest comes last."""
    arrays = files.close(root)
    sizes = {"n_rows": files.n_rows, "n_docs": files.n_docs}
    layout = Layout(fields["shard_rows"], fields["chunk_rows"])
    # NaN is never written, so that a shard which is missing cannot be taken for zeros.
    root.create("vectors", [files.n_rows, fields["d_model"]], fields["dtype"], layout, fill="NaN")
    return write_manifest(root, {**fields, **sizes, "status": "extracting", "arrays": arrays})


def _check_document(document: IndexedDocument) -> None:
    d, n = document, len(document.ids)
    positions = np.asarray(d.positions)
    sound = len(d.roles) == n == len(d.text_end)
    if len(positions):
        sound = sound and 0 <= positions[0] and positions[-1] < n and bool((np.diff(positions) > 0).all())
        sound = sound and int(d.text_end[positions[-1]]) <= len(d.text.encode())
    if not sound:
        got = f"{n} tokens, positions {positions.tolist()[:8]}"
        raise StoreError(f"document {d.doc_id!r}", expected="ascending positions inside its tokens and text", got=got)


class ShardWriter:
    """The second phase: writes shards of vectors into an index. Several processes may have one each.

    With a `spec`, StoreError names the first field in which the store differs from it.
    """

    def __init__(self, path: str | Path | Root, spec: StoreSpec | None = None):
        self.root = path if isinstance(path, Root) else Root(path)
        self.manifest = read_manifest(self.root)
        if spec is not None:
            check_spec(self.manifest, spec, self.root.path)
        self.n_shards = shard_count(self.manifest)
        self.complete: bool = self.manifest["status"] == "complete"
        self._dtype = DTYPES[self.manifest["dtype"]]
        self._array: Any = None

    def rows(self, shard: int) -> tuple[int, int]:
        """Rows [a, b) of a shard."""
        if not 0 <= shard < self.n_shards:
            raise StoreError(f"{self.root.path}: shard", expected=f"0 to {self.n_shards - 1}", got=shard)
        return shard_range(self.manifest, shard)

    def pending(self, process: int = 0, count: int = 1) -> list[int]:
        """Shards still to be written by process `process` of `count`: those with shard % count == process."""
        if self.complete:
            return []
        records = read_records(self.root, self.manifest)
        return [i for i in range(process, self.n_shards, count) if records[i] is None]

    def _record(self, shard: int) -> dict[str, Any] | None:
        return _parse_record(self.root.read(done_key(shard)), shard, self.manifest)

    def write_shard(self, shard: int, vectors: np.ndarray) -> None:
        """Writes a shard's vectors [b - a, D] and records it. Does nothing if the same vectors are recorded already.

        A vector that is not finite is a StoreError that names its document and position, and nothing is written:
        the model or its dtype is broken, and a store with holes would hide that.
        """
        a, b = self.rows(shard)
        wanted = (b - a, self.manifest["d_model"])
        where = f"{self.root.path}: shard {shard}"
        if vectors.shape != wanted:
            raise StoreError(where, expected=f"vectors of shape {wanted}", got=vectors.shape)
        values = np.ascontiguousarray(vectors, self._dtype)
        if not np.isfinite(values).all():
            self._refuse(a, values)
        digest = hashlib.sha256(values.tobytes()).hexdigest()
        recorded = self._record(shard)
        if recorded is not None:
            if recorded["sha256"] != digest:
                fix = "the same model, dtype and machine as the run that wrote it"
                raise StoreError(
                    f"{where} is recorded with other vectors", expected=recorded["sha256"], got=digest, fix=fix
                )
            return
        if self._array is None:
            self._array = self.root.open("vectors", write=True, final=False)
        with guard(f"{self.root.path}: writing shard {shard}"):
            self._array[a:b].write(values).result()
        self.root.write_json(done_key(shard), {"shard": shard, "rows": [a, b], "sha256": digest})

    def _refuse(self, a: int, values: np.ndarray) -> None:
        row = a + int(np.argmin(np.isfinite(values).all(axis=1)))
        store = Store(self.root, self.manifest)
        at = {name: int(column[0]) for name, column in store.table(slice(row, row + 1)).items()}
        name = store.doc_ids(np.array([at["doc"]]))[0]
        what = f"row {row} (document {name!r}, position {at['position']}, layer {at['layer']}) is not finite"
        raise StoreError(
            f"{self.root.path}: {what}", fix="--dtype float32 for the model; nla doctor checks its weights"
        )

    def finish(self) -> bool:
        """Marks the store complete once every shard is recorded; False while other processes still have some to write.

        Idempotent, and every process may call it: what it writes depends on the records alone.
        """
        if self.complete:
            return True
        records = [r for r in read_records(self.root, self.manifest) if r is not None]
        if len(records) < self.n_shards:
            return False
        digest = vectors_hash([r["sha256"] for r in records])
        shape = [self.manifest["n_rows"], self.manifest["d_model"]]
        entry = {"sha256": digest, "shape": shape, "dtype": self.manifest["dtype"]}
        arrays = {**self.manifest["arrays"], "vectors": entry}
        self.manifest = write_manifest(self.root, {**self.manifest, "status": "complete", "arrays": arrays})
        self.complete = True
        return True


def vectors_hash(shards: Sequence[str]) -> str:
    return hashlib.sha256("".join(shards).encode()).hexdigest()


def read_records(root: Root, manifest: Mapping[str, Any]) -> list[dict[str, Any] | None]:
    """The `done/` records of all shards; None for one that is missing or damaged."""
    n = shard_count(manifest)
    return [_parse_record(data, i, manifest) for i, data in enumerate(root.read_many([done_key(i) for i in range(n)]))]


def _parse_record(data: bytes | None, shard: int, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(data or b"{}")
        sound = record["shard"] == shard and record["rows"] == [*shard_range(manifest, shard)]
        return record if sound and isinstance(record["sha256"], str) else None
    except (ValueError, TypeError, KeyError):
        return None


def write_explanations(
    path: str | Path, texts: Iterable[str | None], meta: Mapping[str, Any], *, dropped: np.ndarray | None = None
) -> dict[str, Any]:
    """Writes one explanation per row of a complete store, replacing earlier ones; returns explanations.json.

    `meta` (provider, model, hash of the instruction and so on) is kept beside the counts. `dropped` bool [n_rows]
    tells rows whose answer was refused from rows never asked; None texts are one or the other.
    """
    store = Store.open(path)
    root = store.root
    with _replacing(root, "explanations") as target:
        text = GrowingText(target, "bytes", "offsets", SHORT_TEXT)
        status = GrowingArray(target, "status", "uint8", NUMBERS)
        counts = {"none": 0, "ok": 0, "dropped": 0}
        for row, value in enumerate(texts):
            if row >= store.n_rows:
                raise StoreError(f"{path}: explanations", expected=f"{store.n_rows}, one per row", got="more")
            code = OK if value is not None else DROPPED if dropped is not None and dropped[row] else 0
            text.append((value or "").encode("utf-8", "replace"))
            status.append([code])
            counts[("none", "ok", "dropped")[code]] += 1
        if status.length != store.n_rows:
            raise StoreError(f"{path}: explanations", expected=f"{store.n_rows}, one per row", got=status.length)
        arrays = {f"explanations/{k}": v for k, v in {**text.close(), "status": status.close()}.items()}
    written = {**meta, "counts": counts, "arrays": arrays, "store": store.manifest["hash"]}
    root.write_json(EXPLANATIONS, written)
    return written


@contextlib.contextmanager
def _replacing(root: Root, name: str) -> Iterator[Root]:
    """Where to write the arrays of `name`; on a disk the old ones stay until the new ones are complete."""
    if root.local is None:
        root.delete(EXPLANATIONS)
        root.delete_below(f"{name}/")
        yield Root(f"{root.path.rstrip('/')}/{name}")
        return
    target = root.local / name
    with sole_writer(target), atomic_dir(target, overwrite=True) as temporary:
        yield Root(temporary)
        # Without its JSON file a set of explanations does not exist, so a kill here leaves none, never a mixture.
        root.delete(EXPLANATIONS)
