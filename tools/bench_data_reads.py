"""The stores and files that the data benchmark reads, and the ways of reading random rows of them with pyarrow."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq

from nla_jax.manifest import StoreSpec
from nla_jax.store import Store
from nla_jax.store_write import IndexedDocument, ShardWriter, create_index

PER_DOCUMENT, WORDS = 10, 250
_BLOCK = 1000  # rows of an export's record batches

Read = Callable[[np.ndarray], np.ndarray]  # row numbers [n], ascending -> float32 [n, D]


def random_store(path: Path, n_rows: int, d_model: int, dtype: str = "float32") -> Store:
    """A store of `n_rows` normal vectors, 10 of each document of 250 random words."""

    def documents() -> Iterator[IndexedDocument]:
        words = [f"w{i:x}" for i in range(5000)]
        for i in range(-(-n_rows // PER_DOCUMENT)):
            rng = np.random.default_rng(i)
            chosen = [words[j] + " " for j in (5000 * rng.random(WORDS) ** 2).astype(int)]
            at = np.sort(rng.choice(WORDS, min(PER_DOCUMENT, n_rows - i * PER_DOCUMENT), replace=False))
            ends = np.cumsum([len(w) for w in chosen]).astype(np.int32)
            roles = np.zeros(WORDS, np.int8)
            yield IndexedDocument(f"doc-{i}", "".join(chosen), np.arange(WORDS, dtype=np.int32), roles, ends, at)

    spec = StoreSpec(d_model, (20,), {"name": "random"}, {"fingerprint": "random"}, {}, {"name": "random"}, dtype)
    create_index(path, spec, documents())
    writer = ShardWriter(path)
    for shard in writer.pending():
        a, b = writer.rows(shard)
        writer.write_shard(shard, np.random.default_rng(shard).standard_normal((b - a, d_model), np.float32))
    writer.finish()
    return Store.open(path)


def export(store: Store, folder: Path) -> dict[str, Path]:
    """The same rows as the exchange format's parquet, as parquet of vectors alone in small row groups, and as an
    Arrow IPC file."""
    vector = pa.list_(pa.float32(), store.d_model)
    whole = pa.schema(
        [
            ("activation_vector", vector),
            ("n_raw_tokens", pa.int32()),
            ("activation_layer", pa.int32()),
            ("doc_id", pa.string()),
            ("detokenized_text_truncated", pa.string()),
        ]
    )
    bare = pa.schema([("activation_vector", vector)])
    paths = {name: folder / f"rows.{name}" for name in ("parquet", "vectors.parquet", "arrow")}
    with (
        pq.ParquetWriter(paths["parquet"], whole) as parquet,
        pq.ParquetWriter(paths["vectors.parquet"], bare, compression="none", use_dictionary=False) as vectors,
        pa.OSFile(str(paths["arrow"]), "wb") as sink,
        pa.ipc.new_file(sink, bare) as arrow,
    ):
        for a in range(0, store.n_rows, _BLOCK):
            rows = slice(a, a + _BLOCK)
            table = store.table(rows)
            values = pa.FixedSizeListArray.from_arrays(pa.array(store.vectors(rows).reshape(-1)), store.d_model)
            columns = [values, table["position"] + 1, table["layer"].astype(np.int32)]
            parquet.write_table(pa.table([*columns, store.doc_ids(table["doc"]), store.prefixes(rows)], whole))
            vectors.write_table(pa.table([values], bare), row_group_size=32)
            arrow.write_table(pa.table([values], bare))
    return paths


def readers(paths: dict[str, Path], d_model: int) -> dict[str, Read]:
    """Ways to read random rows with pyarrow, by name."""
    dataset = pa.dataset.dataset(paths["parquet"])
    local = threading.local()  # a ParquetFile must not be read by two threads at once

    def opened() -> pq.ParquetFile:
        if not hasattr(local, "file"):
            local.file = pq.ParquetFile(paths["vectors.parquet"], memory_map=True)
        return local.file

    groups = opened()
    sizes = [groups.metadata.row_group(i).num_rows for i in range(groups.metadata.num_row_groups)]
    firsts = np.concatenate([[0], np.cumsum(sizes)])
    table = pa.ipc.open_file(pa.memory_map(str(paths["arrow"]))).read_all()
    chunks = [chunk.flatten().to_numpy().reshape(-1, d_model) for chunk in table.column(0).chunks]

    def values(column: pa.ChunkedArray) -> np.ndarray:
        return column.combine_chunks().flatten().to_numpy().reshape(-1, d_model)

    def dataset_take(rows: np.ndarray) -> np.ndarray:
        return values(dataset.take(pa.array(rows), columns=["activation_vector"]).column(0))

    def row_groups(rows: np.ndarray) -> np.ndarray:
        group = np.searchsorted(firsts, rows, side="right") - 1
        needed, which = np.unique(group, return_inverse=True)
        starts = np.concatenate([[0], np.cumsum(np.asarray(sizes)[needed])])
        return values(opened().read_row_groups(needed.tolist()).column(0))[starts[which] + rows - firsts[group]]

    def arrow_take(rows: np.ndarray) -> np.ndarray:
        return values(table.take(pa.array(rows)).column(0))

    def mapped(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), d_model), np.float32)
        for i, row in enumerate(rows.tolist()):
            out[i] = chunks[row // _BLOCK][row % _BLOCK]
        return out

    return {
        "parquet, dataset.take": dataset_take,
        "parquet, row groups of 32 rows": row_groups,
        "Arrow IPC, memory-mapped, take": arrow_take,
        "Arrow IPC, memory-mapped, numpy copy of rows": mapped,
    }


def pipeline(read: Read, batches: list[np.ndarray], threads: int, prefetch: int) -> Iterator[np.ndarray]:
    """The batches through the same grain prefetching as the loader's."""
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    source = grain.MapDataset.source(batches).map(functools.partial(_call, read))
    return iter(source.to_iter_dataset(options))


def _call(read: Read, rows: np.ndarray) -> np.ndarray:
    return read(rows)
