"""`import_sets`: parquet sets of the exchange format into an activation store with splits and a build.

Every file is read once, in order, into scratch files beside the new store, and checked on the way; then the store is
written from those, document by document, and moved into place. Memory holds a block of vectors and some numbers per
row and document, so it does not grow with the width of the rows or the length of their texts.

What a table of rows cannot tell is recorded as absent: token ids are -1 (in rows/token_id and docs/tokens alike) and
roles 0. A document is the rows of one doc_id, its text the longest of theirs; without doc_id every row is a document
of its own. Of a set without n_raw_tokens the positions are 0, of one without texts the documents are empty.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nla_jax.arrays import Root
from nla_jax.build import SFT, Build, open_build, save_build, set_rows
from nla_jax.build_stats import round_scale, training_stats
from nla_jax.errors import InputError
from nla_jax.exchange import ImportRecord
from nla_jax.exchange_read import Block, SetFile, check_together, open_set
from nla_jax.manifest import StoreSpec
from nla_jax.sidecar import Sidecar
from nla_jax.store import SPLITS, Store
from nla_jax.store_place import new_root
from nla_jax.store_splits import write_splits
from nla_jax.store_write import IndexFiles, ShardWriter, seal_index, write_explanations
from nla_jax.tokenizer import Tokenizer

_TAIL = 64  # bytes in which a row's text may differ from its document's, where a character was cut
_BEGINNING = 256  # bytes by which texts of different sets are compared for the note on those that begin alike
_NONE, _DROPPED = -1, -2  # instead of an explanation's length

Progress = Callable[[str, int, int], None]  # (what is done, rows done, rows in all)
Note = Callable[[str], None]


def import_sets(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    drop_overlap: bool = False,
    tokenizer: Tokenizer | None = None,
    note: Note = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Build:
    """Reads sets into a new store `out`, whose splits are the stages in their sidecars.

    A document that is in two sets is an error; with `drop_overlap` it stays in the set that has it first, and its
    other rows are left out. With a `tokenizer` the sidecars are checked against it. What is odd but no error
    (dropped rows, unknown columns, rounded vectors) goes to `note`.
    """
    opened = [open_set(path) for path in files]
    if not opened:
        raise InputError("files to import", expected="at least one")
    facts = check_together(opened)
    if tokenizer is not None:
        for file in opened:
            file.sidecar.check(tokenizer, file.path)
    with new_root(out) as root:
        # Inside the new store's own temporary directory, which a killed run's successor removes.
        scratch = Path(tempfile.mkdtemp(dir=root.local, prefix="scratch."))
        try:
            with _Scratch(scratch, facts.d_model) as rows:
                for file in opened:
                    _read(file, rows, progress)
                _notes(opened, note)
                rows.flush()
                _write(root, rows, opened, facts, _kept(rows, drop_overlap, note), tokenizer, progress)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return open_build(out)


class _Scratch:
    """The rows of all files in the order read: vectors, texts and explanations on disk, numbers in memory."""

    def __init__(self, directory: Path, d_model: int):
        self.d_model = d_model
        self._files = {n: (directory / n).open("w+b") for n in ("vectors", "texts", "explanations")}
        self.doc, self.position, self.stage = array.array("i"), array.array("i"), array.array("b")
        self.text_end, self.explanation_end = array.array("q", [0]), array.array("q", [0])
        self.explanation_state = array.array("b")
        self.docs: dict[str, int] = {}
        self.doc_stage = array.array("b")

    def __enter__(self) -> _Scratch:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files.values():
            file.close()

    def __len__(self) -> int:
        return len(self.doc)

    def add(self, block: Block, stage: int, file: str, start: int) -> None:
        """Keeps a block whose first row is row `start` of the file."""
        n = len(block)
        self._files["vectors"].write(block.vectors.data)
        ids = block.doc_ids or [f"{file}:{start + i}" for i in range(n)]
        for i, doc_id in enumerate(ids):
            doc = self.docs.setdefault(doc_id, len(self.docs))
            if doc == len(self.doc_stage):
                self.doc_stage.append(stage)
            self.doc.append(doc)
            self.stage.append(stage)
            self.position.append(0 if block.positions is None else int(block.positions[i]))
            self._text("texts", self.text_end, "" if block.texts is None else block.texts[i])
            explanation = None if block.explanations is None else block.explanations[i]
            missing = _NONE if block.explanations is None else _DROPPED
            self.explanation_state.append(missing if explanation is None else 0)
            self._text("explanations", self.explanation_end, explanation or "")

    def _text(self, name: str, ends: array.array, text: str) -> None:
        data = text.encode()
        self._files[name].write(data)
        ends.append(ends[-1] + len(data))

    def flush(self) -> None:
        for file in self._files.values():
            file.flush()

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, D] of rows in any order; neighbours share a read."""
        out = np.empty((len(rows), self.d_model), np.float32)
        width, handle = 4 * self.d_model, self._files["vectors"].fileno()
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        for a, b in zip(starts, [*starts[1:], len(rows)], strict=True):
            view = out[a:b].data.cast("B")
            at = int(rows[a]) * width
            while len(view):
                n = os.preadv(handle, [view], at)
                if n <= 0:
                    raise InputError("the scratch file of vectors ended early", fix="the same command again")
                view, at = view[n:], at + n
        return out

    def text(self, row: int) -> bytes:
        return self._bytes("texts", self.text_end, row)

    def explanation(self, row: int) -> str | None:
        if self.explanation_state[row] != 0:
            return None
        return self._bytes("explanations", self.explanation_end, row).decode()

    def _bytes(self, name: str, ends: array.array, row: int) -> bytes:
        return os.pread(self._files[name].fileno(), ends[row + 1] - ends[row], ends[row])


def _read(file: SetFile, rows: _Scratch, progress: Progress) -> None:
    start = 0
    for block in file.blocks():
        rows.add(block, SPLITS.index(file.stage), file.path.name, start)
        start += len(block)
        progress(f"reading {file.path.name}", start, file.n_rows)
    if file.dropped == start and file.stage in SFT:
        column = "response" if file.stage == "av_sft" else "prompt"
        fix = "the sidecar that belongs to this file"
        raise InputError(f"{file.path}: {column}", expected="the template's text", got="none that fits", fix=fix)


def _notes(files: Sequence[SetFile], note: Note) -> None:
    for f in files:
        recorded = f.sidecar.raw.get("row_count")
        for count, what in (
            (f.dropped, "rows whose explanation does not fit the template: kept without one, and in no set"),
            (f.rewrapped, "responses in another wrapping: exported in the format's own"),
            (f.rounded, "vectors of float64 that float32 cannot hold exactly: rounded"),
        ):
            if count:
                note(f"{f.path}: {count:,} {what}")
        if f.unknown:
            note(f"{f.path}: columns that the format does not have are left out: {', '.join(f.unknown)}")
        if recorded is not None and recorded != f.n_rows:
            note(f"{f.path}: {f.n_rows:,} rows, its sidecar says {recorded}")


def _kept(rows: _Scratch, drop_overlap: bool, note: Note) -> np.ndarray:
    """int64 rows, in the order read, that no other set has a better claim to; InputError if sets share documents."""
    doc, stage, doc_stage = (np.frombuffer(a, a.typecode) for a in (rows.doc, rows.stage, rows.doc_stage))
    other = stage != doc_stage[doc]  # rows of a document that another set had first
    by_id = np.unique(doc[other])
    by_text, alike = _equal_texts(rows, np.flatnonzero(~other))
    if alike:
        note(f"{alike:,} documents begin with the same {_BEGINNING} bytes as one of another set")
    if not len(by_id) and not len(by_text):
        return np.arange(len(rows))
    names = list(rows.docs)
    shared = [*by_id.tolist(), *by_text.tolist()]
    what = f"{len(by_id):,} documents by id and {len(by_text):,} by text are in two sets"
    example = f"{names[shared[0]]!r} for one"
    if not drop_overlap:
        fix = "--drop-overlap, which leaves them in the set that has them first"
        raise InputError(what, expected="sets that share none", got=example, fix=fix)
    kept = np.flatnonzero(~(other | np.isin(doc, by_text)))
    note(f"{what} ({example}): {len(rows) - len(kept):,} rows left out")
    return kept


def _equal_texts(rows: _Scratch, kept: np.ndarray) -> tuple[np.ndarray, int]:
    """Documents whose text a document of another set has, and how many only begin alike."""
    stages = np.frombuffer(rows.doc_stage, rows.doc_stage.typecode)
    whole: dict[bytes, int] = {}
    beginnings: dict[bytes, int] = {}
    equal, alike = [], 0
    for doc, members in _documents(rows, kept):
        text = max(map(rows.text, members), key=len)
        if not text:
            continue
        stage = int(stages[doc])
        if whole.setdefault(_digest(text), stage) != stage:
            equal.append(doc)
        elif len(text) >= _BEGINNING:
            alike += beginnings.setdefault(_digest(text[:_BEGINNING]), stage) != stage
    return np.array(equal, np.int64), alike


def _documents(rows: _Scratch, kept: np.ndarray) -> Iterator[tuple[int, list[int]]]:
    """(number in the files, its rows) of each document, in the order of first appearance."""
    order = _in_documents(rows, kept)
    doc = np.frombuffer(rows.doc, rows.doc.typecode)[order]
    starts = np.flatnonzero(np.diff(doc, prepend=-1))
    for a, b in zip(starts, [*starts[1:], len(order)], strict=True):
        yield int(doc[a]), order[a:b].tolist()


def _in_documents(rows: _Scratch, kept: np.ndarray) -> np.ndarray:
    """The kept rows in the order of the store: documents together, otherwise as they were read."""
    return kept[np.argsort(np.frombuffer(rows.doc, rows.doc.typecode)[kept], kind="stable")]


def _write(
    root: Root,
    rows: _Scratch,
    files: Sequence[SetFile],
    facts: Sidecar,
    kept: np.ndarray,
    tokenizer: Tokenizer | None,
    progress: Progress,
) -> None:
    assert facts.layer_index is not None  # open_set refuses a set without
    order = _in_documents(rows, kept)
    names = list(rows.docs)
    index = IndexFiles(root)
    texts: dict[int, bytes] = {}
    stages = []
    for doc, members in _documents(rows, kept):
        text, ends = _join(names[doc], [rows.text(row) for row in members], index.n_rows, texts)
        positions = np.array([rows.position[row] for row in members], np.int32)
        stages.append(rows.doc_stage[doc])
        n = len(members)
        table: dict[str, np.ndarray] = {
            "doc": np.full(n, index.n_docs, np.int32),
            "position": positions,
            "token_id": np.full(n, -1, np.int32),
            "role": np.zeros(n, np.int8),
            "layer": np.full(n, facts.layer_index, np.int16),
            "text_end": ends,
        }
        index.add_rows(table)
        index.add_document(names[doc].encode(), text, np.full(int(positions.max()) + 1, -1, np.int32))
        progress("writing documents", index.n_rows, len(order))
    spec = StoreSpec(
        d_model=facts.d_model,
        layers=(facts.layer_index,),
        model={"name": facts.base_model},
        tokenizer={"fingerprint": None if tokenizer is None else tokenizer.fingerprint},
        settings={"kind": "imported"},
        corpus={
            "name": " + ".join(f.path.name for f in files),
            "files": [{"name": f.path.name, "stage": f.stage, "rows": f.n_rows} for f in files],
            "counts": {"documents": index.n_docs},
        },
    )
    seal_index(root, index, spec.fields())
    writer = ShardWriter(root)
    for shard in range(writer.n_shards):
        a, b = writer.rows(shard)
        writer.write_shard(shard, rows.vectors(order[a:b]))
        progress("writing vectors", b, len(order))
    writer.finish()

    inside = root.local or root.path
    if any(f.stage in SFT for f in files):
        state = np.frombuffer(rows.explanation_state, rows.explanation_state.typecode)[order]
        write_explanations(
            inside, map(rows.explanation, order.tolist()), {"provider": "imported"}, dropped=state == _DROPPED
        )
    write_splits(inside, assignment=np.array(stages, np.int8))
    absent: dict[str, list[str]] = {}
    for f in files:
        absent[f.stage] = sorted({*absent.get(f.stage, []), *f.absent})
    ImportRecord.write(root, {"absent": absent}, order, texts)
    _save(Store.open(inside), files, facts, progress)


def _join(doc_id: str, parts: list[bytes], first_row: int, texts: dict[int, bytes]) -> tuple[bytes, np.ndarray]:
    """A document's text, the longest of its rows', and where in it each row ends; what is not its beginning to the
    byte goes to `texts` under the row's number in the store."""
    whole = max(parts, key=len)
    ends = np.empty(len(parts), np.int32)
    for i, part in enumerate(parts):
        end = len(part)
        if not whole.startswith(part):
            end = len(os.path.commonprefix([whole, part]))
            while end > 0 and whole[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
            if len(part) - end > _TAIL:
                got = f"two that part at byte {end}"
                fix = "ids that are unique across the files"
                raise InputError(f"doc_id {doc_id!r}", expected="rows of one text", got=got, fix=fix)
            texts[first_row + i] = part
        ends[i] = end
    return whole, ends


def _save(store: Store, files: Sequence[SetFile], facts: Sidecar, progress: Progress) -> None:
    """The build of an imported store: its own statistics where the sidecars do not say."""
    rows, dropped = {}, {}
    for name in SPLITS:
        rows[name], dropped[name] = set_rows(store, name, store.layers[0])
    mse_scale = facts.mse_scale or math.sqrt(store.d_model)
    training = np.unique(np.concatenate(list(rows.values())))
    stats = training_stats(store, training, mse_scale, lambda done, total: progress("measuring", done, total))
    sidecars = {}
    for f in files:
        if f.stage not in sidecars and len(rows[f.stage]):
            raw = {**f.sidecar.raw, "row_count": len(rows[f.stage])}
            sidecars[f.stage] = dataclasses.replace(f.sidecar, raw=raw)
    scale, variance = facts.injection_scale, facts.variance_nrm
    full = dataclasses.replace(
        facts,
        injection_scale=round_scale(stats.norms["mean"]) if scale is None else scale,
        mse_scale=mse_scale,
        variance_nrm=stats.variance_nrm if variance is None else variance,
    )
    marker = {"char": facts.marker, "id": facts.marker_id, "left_id": facts.left_id, "right_id": facts.right_id}
    more = {"marker": {**marker, "count": None}, "imported": True, "variance_of_rows": stats.variance_nrm}
    save_build(store, full, sidecars, rows, dropped, stats, more)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[:16]
