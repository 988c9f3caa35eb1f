"""Training sets as parquet files with a sidecar each: the exchange format of the PyTorch reference, written.

Columns (nla/datagen/stage3_build.py there): `prompt` (AV and RL: chat messages with the literal <INJECT>; AR: the
whole text), `response` (AV: the tagged explanation), `activation_vector` (fixed-size list of float32, raw),
`n_raw_tokens` (tokens up to and including the position), `activation_layer`, `doc_id`, `detokenized_text_truncated`.
Vectors are handed to Arrow as one block per row group: as Python floats they would stall the collector, and as lists
of variable length they are corrupted beyond 4 GiB. exchange_import.py reads these files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax.arrays import NUMBERS, SHORT_TEXT, GrowingArray, GrowingText, Ragged, Root
from nla_jax.build import SFT, Build, open_build
from nla_jax.errors import InputError
from nla_jax.prompt import EXPLANATION_FIELD, INJECT, MARKER_FIELD, template_parts, wrap_explanation
from nla_jax.sidecar import Sidecar, sidecar_path, sidecar_to_dict, write_sidecar
from nla_jax.store import SPLITS, Store

PROMPT, RESPONSE, VECTOR = "prompt", "response", "activation_vector"
TOKENS, LAYER, DOC_ID, TEXT = "n_raw_tokens", "activation_layer", "doc_id", "detokenized_text_truncated"
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
OPTIONAL = {TOKENS: pa.int64(), LAYER: pa.int64(), DOC_ID: pa.string(), TEXT: pa.string()}
IMPORT_FILE = "import.json"
_GROUP_BYTES = 32 << 20  # of vectors in a row group
_GROUP_ROWS = 4096

Progress = Callable[[int, int], None]  # (rows done, rows in all)


@dataclass(frozen=True)
class Exported:
    """A set that was written: its name, parquet file and number of rows."""

    name: str
    path: Path
    rows: int


def set_schema(name: str, d_model: int, left_out: Sequence[str] = ()) -> pa.Schema:
    """The columns of a set's parquet file, in the reference's order."""
    fields = [(PROMPT, pa.string() if name == "ar_sft" else MESSAGES)]
    if name == "av_sft":
        fields.append((RESPONSE, pa.string()))
    fields.append((VECTOR, pa.list_(pa.float32(), d_model)))
    return pa.schema(fields + [(k, v) for k, v in OPTIONAL.items() if k not in left_out])


def av_messages(sidecar: Sidecar) -> list[dict[str, str]]:
    """The AV's prompt as a set has it: chat messages with <INJECT> where the vector goes."""
    assert sidecar.av_template is not None
    text = INJECT.join(template_parts(sidecar.av_template, MARKER_FIELD))
    return [{"role": "user", "content": text}]


class ImportRecord:
    """What is known of an imported table besides the store itself: import.json and the arrays below import/.

    `absent`: per set the optional columns that it did not have. `order`: int64 [n_rows], for each row of the store
    its place in the files as they were read (None: the same order). `texts`: row -> text, of those whose text is not
    the beginning of their document's, because a character was cut in two.
    """

    def __init__(self, root: Root):
        self._root = root
        self._info: dict[str, Any] = root.read_json(IMPORT_FILE) or {}

    def absent(self, name: str) -> list[str]:
        return self._info.get("absent", {}).get(name, [])

    @cached_property
    def order(self) -> np.ndarray | None:
        return self._root.open("import/order").read().result() if self._info.get("reordered") else None

    @cached_property
    def texts(self) -> dict[int, str]:
        if not self._info.get("texts"):
            return {}
        rows = self._root.open("import/text_rows").read().result()
        found = Ragged(self._root, "import/text_bytes", "import/text_offsets").strings(np.arange(len(rows)))
        return dict(zip(rows.tolist(), found, strict=True))

    @staticmethod
    def write(root: Root, info: dict[str, Any], order: np.ndarray, texts: dict[int, bytes]) -> None:
        reordered = bool((np.diff(order) < 0).any())
        if reordered:
            places = GrowingArray(root, "import/order", "int64", NUMBERS)
            places.append(order)
            places.close()
        if texts:
            rows = GrowingArray(root, "import/text_rows", "int64", NUMBERS)
            written = GrowingText(root, "import/text_bytes", "import/text_offsets", SHORT_TEXT)
            for row in sorted(texts):
                rows.append([row])
                written.append(texts[row])
            rows.close()
            written.close()
        root.write_json(IMPORT_FILE, {**info, "reordered": reordered, "texts": len(texts)})


def export_sets(
    store: Store | str | Path,
    name: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    with_text: bool = True,
    progress: Progress | None = None,
) -> list[Exported]:
    """Writes a set ("av_sft", "ar_sft", "rl", or "all" that there are) and its sidecar.

    `out` is a directory, for files named after their sets, or for one set a name that ends in .parquet. Nothing
    is in place before everything is written. Rows of an imported set come in the order they had.
    """
    built = open_build(store)
    names = list(built.sets) if name == "all" else [name]
    paths = _places(names, name, Path(out).expanduser(), overwrite)
    rows = {n: built.rows(n) for n in names}
    record = ImportRecord(built.store.root)
    if record.order is not None:
        rows = {n: r[np.argsort(record.order[r], kind="stable")] for n, r in rows.items()}
    total, done = sum(map(len, rows.values())), 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    with contextlib.ExitStack() as stack:
        temporary = {n: stack.enter_context(_temporary(paths[n])) for n in names}
        for n in names:
            left_out = {*record.absent(n), *(() if with_text else (TEXT,))}
            _write_parquet(built, n, rows[n], temporary[n], sorted(left_out), record, count)
        for n in names:
            sidecar_path(paths[n]).unlink(missing_ok=True)  # never beside another file's rows
            os.replace(temporary[n], paths[n])
            write_sidecar(_exported_sidecar(built, n, len(rows[n]), TEXT in _columns(paths[n])), paths[n])
    return [Exported(n, paths[n], len(rows[n])) for n in names]


def _places(names: list[str], asked: str, out: Path, overwrite: bool) -> dict[str, Path]:
    single = out.name.endswith(".parquet") and not out.is_dir()
    if single and asked == "all":
        raise InputError(f"{out}", expected="a directory for several sets", got="a .parquet name")
    if out.is_file() and not single:
        raise InputError(f"{out} is a file", expected="a directory, or a name that ends in .parquet")
    paths = {n: out if single else out / f"{n}.parquet" for n in names}
    for path in paths.values():
        for file in (path, sidecar_path(path)):
            if file.exists() and not overwrite:
                raise InputError(f"{file} is there already", fix="--overwrite, or another name")
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _write_parquet(
    built: Build,
    name: str,
    rows: np.ndarray,
    path: Path,
    left_out: list[str],
    record: ImportRecord,
    count: Callable[[int], None],
) -> None:
    d_model = built.store.d_model
    schema = set_schema(name, d_model, left_out)
    size = max(1, min(_GROUP_ROWS, _GROUP_BYTES // (4 * d_model)))
    sidecar = built.sidecar(name)
    # Dictionaries and compression would be tried on the vectors and given up, a block at a time.
    flat = _leaves(schema)
    vectors = next(leaf for leaf in flat if leaf.startswith(VECTOR))
    compression = {leaf: "none" if leaf == vectors else "zstd" for leaf in flat}
    repeated = [leaf for leaf in flat if leaf.startswith(f"{PROMPT}.") or leaf in (DOC_ID, LAYER)]
    writer = pq.ParquetWriter(path, schema, compression=compression, use_dictionary=repeated)
    with writer:
        for start in range(0, len(rows), size):
            block = rows[start : start + size]
            columns = _columns_of(built, name, block, sidecar, record)
            writer.write_batch(pa.record_batch([columns[f.name] for f in schema], schema=schema))
            count(len(block))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _leaves(schema: pa.Schema) -> list[str]:
    """Names of the parquet columns that a schema becomes."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema):
        pass
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]


def _columns(path: Path) -> list[str]:
    return pq.read_schema(path).names


def _columns_of(
    built: Build, name: str, rows: np.ndarray, sidecar: Sidecar, record: ImportRecord
) -> dict[str, pa.Array]:
    store = built.store
    table = store.table(rows)
    texts = store.prefixes(rows)
    if record.texts:
        texts = [record.texts.get(row, text) for row, text in zip(rows.tolist(), texts, strict=True)]
    flat = np.ascontiguousarray(store.vectors(rows)).reshape(-1)
    columns = {
        VECTOR: pa.FixedSizeListArray.from_arrays(pa.array(flat), store.d_model),
        TOKENS: pa.array(table["position"].astype(np.int64) + 1),
        LAYER: pa.array(table["layer"].astype(np.int64)),
        DOC_ID: pa.array(store.doc_ids(table["doc"]), pa.string()),
        TEXT: pa.array(texts, pa.string()),
    }
    explanations = [e or "" for e in store.explanations(rows)] if name in SFT else []
    if name == "ar_sft":
        assert sidecar.ar_template is not None
        before, after = template_parts(sidecar.ar_template, EXPLANATION_FIELD)
        columns[PROMPT] = pa.array([f"{before}{e}{after}" for e in explanations], pa.string())
    else:
        columns[PROMPT] = pa.array([av_messages(sidecar)] * len(rows), MESSAGES)
    if name == "av_sft":
        columns[RESPONSE] = pa.array([wrap_explanation(e) for e in explanations], pa.string())
    return columns


def _exported_sidecar(built: Build, name: str, n_rows: int, with_text: bool) -> Sidecar:
    """The set's sidecar, dated, with the row count of the file."""
    sidecar = built.sidecar(name)
    raw = sidecar_to_dict(sidecar)
    raw.setdefault("created_at", datetime.datetime.now(tz=datetime.UTC).isoformat())
    raw.setdefault("created_by", "nla_jax.exchange")
    raw["row_count"] = n_rows
    if with_text != raw.get("keep_debug_metadata", True):
        raw["keep_debug_metadata"] = with_text
    return dataclasses.replace(sidecar, raw=raw)


__all__ = ["SPLITS", "Exported", "ImportRecord", "export_sets", "set_schema"]
