"""Directories of TensorStore arrays and small JSON files, on a disk or in an object store.

Everything a store holds is read and written through TensorStore's key-value layer, so a path may be a directory or
a URL (`gs://bucket/name`, `s3://bucket/name`, `file:///name`). A file is written to a temporary name, flushed and
renamed by that layer, hence whole or absent.

Arrays are zarr 3, cut into shards (one file each) of inner chunks (what one read fetches). Every inner chunk ends
in a CRC-32C, so a damaged one is an error when it is read. Two choices were measured with rows of 3584 float32 in
shards of 1024, on two cores: random rows are read 1.5 times as fast from a cold disk and 2 to 3 times as fast from
memory with one row per inner chunk as with 4 or 16, and the checksum costs nothing cold and a quarter warm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from nla_jax.errors import StoreError

# Shared, so that every handle of a process draws on the same threads and one bounded cache, however many rows there
# are. Vectors have a cache of their own: it keeps their shard indices, which the tables would otherwise push out.
# What is written, or read once from end to end, goes through no cache.
_CACHE_BYTES = 32 << 20
_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
_VECTOR_CONTEXT = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}}, _CONTEXT)
_UNCACHED = ts.Context({"cache_pool": {"total_bytes_limit": 0}}, _CONTEXT)

_UNKNOWN = 1 << 48  # length of an array that is still growing
_GAP, _SPAN = 1 << 12, 1 << 23  # elements: spans this near are one read, of at most this size
_FULL = re.compile(r"RESOURCE_EXHAUSTED|No space left|File too large|quota", re.IGNORECASE)

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@contextlib.contextmanager
def guard(what: str) -> Iterator[None]:
    """Turns TensorStore's errors (they are ValueErrors with a code in the text) into a StoreError of one line."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        text = str(error)
        code = re.search(r"\[os_error_code='(\d+)'\]", text)
        got = re.split(r" \[(?:tensorstore_spec|os_error_code|source locations|transform|domain)=", text)[0][:400]
        fix = None
        if _FULL.search(text):
            fix = "free space or another place, then the same command again: what is finished is kept"
        elif "NOT_FOUND" in text:
            fix = "nla data check"
        elif "FAILED_PRECONDITION" in text or "DATA_LOSS" in text or "INVALID_ARGUMENT" in text:
            fix = "nla data check, which names every damaged part"
        elif code or "PERMISSION_DENIED" in text:
            fix = "check the permissions and the place"
        raise StoreError(what, got=got, fix=fix) from None


@dataclass(frozen=True)
class Layout:
    """How an array is cut: elements (rows) per shard file and per inner chunk, and whether chunks are compressed."""

    shard: int
    chunk: int
    zstd: bool = False


NUMBERS = Layout(1 << 18, 1 << 12)  # 1 MiB shards of int32
TOKENS = Layout(1 << 20, 1 << 14, zstd=True)
TEXT = Layout(1 << 22, 1 << 16, zstd=True)
SHORT_TEXT = Layout(1 << 22, 1 << 14, zstd=True)  # ids and explanations, read a few hundred bytes at a time


def canonical(value: Any) -> str:
    """JSON with one spelling: what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


class Root:
    """A directory or URL prefix. `path` is what the user gave; keys are relative and use `/`."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.local = None if "://" in self.path else Path(self.path).expanduser().absolute()

    def __repr__(self) -> str:
        return f"Root({self.path!r})"

    @cached_property
    def _spec(self) -> dict[str, Any]:
        if self.local is not None:
            return {"driver": "file", "path": f"{self.local}/"}
        with guard(f"{self.path}: not a place that can be opened"):
            return ts.KvStore.Spec(self.path.rstrip("/") + "/").to_json()

    @cached_property
    def kv(self) -> ts.KvStore:
        with guard(self.path):
            return ts.KvStore.open(self._spec, context=_CONTEXT).result()

    def read(self, key: str) -> bytes | None:
        """A file's bytes, or None where there is none."""
        with guard(f"{self.path}: reading {key}"):
            found = self.kv.read(key.encode()).result()
        return bytes(found.value) if found.state == "value" else None

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        with guard(f"{self.path}: reading {keys[0]} and others" if keys else self.path):
            found = [f.result() for f in [self.kv.read(k.encode()) for k in keys]]
        return [bytes(r.value) if r.state == "value" else None for r in found]

    def write(self, key: str, data: bytes) -> None:
        with guard(f"{self.path}: writing {key}"):
            self.kv.write(key.encode(), data).result()

    def delete(self, key: str) -> None:
        with guard(f"{self.path}: removing {key}"):
            self.kv.write(key.encode(), None).result()

    def delete_below(self, prefix: str) -> None:
        with guard(f"{self.path}: removing {prefix}"):
            self.kv.delete_range(ts.KvStore.KeyRange(prefix.encode(), prefix[:-1].encode() + b"0")).result()

    def keys(self, prefix: str) -> list[str]:
        """Names of the files below `prefix` (which ends in `/`), sorted."""
        with guard(f"{self.path}: listing {prefix}"):
            # "0" is the character after "/".
            found = self.kv.list(ts.KvStore.KeyRange(prefix.encode(), prefix[:-1].encode() + b"0")).result()
        return sorted(k.decode("utf-8", "replace") for k in found)

    def read_json(self, key: str) -> Any:
        """A JSON file's value, or None where there is no file; StoreError if it is damaged."""
        data = self.read(key)
        if data is None:
            return None
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{self.path}/{key}: not readable as JSON", got=error, fix="nla data check") from None

    def write_json(self, key: str, value: Any) -> None:
        self.write(key, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())

    def create(self, name: str, shape: Sequence[int], dtype: str, layout: Layout, fill: Any = 0) -> ts.TensorStore:
        """A new array, empty; the first dimension is cut by `layout`, a second one is never cut."""
        inner: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
        if dtype in ("uint8", "int8"):
            inner = [{"name": "bytes"}]
        if layout.zstd:
            inner.append({"name": "zstd", "configuration": {"level": 3, "checksum": False}})
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {
            "chunk_shape": [layout.chunk, *shape[1:]],
            "codecs": [*inner, {"name": "crc32c"}],
            "index_codecs": index,
            "index_location": "end",
        }
        metadata = {
            "shape": list(shape),
            "data_type": dtype,
            "fill_value": fill,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [layout.shard, *shape[1:]]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        spec = {
            "driver": "zarr3",
            "kvstore": self._below(name),
            "metadata": metadata,
            "store_data_equal_to_fill_value": True,  # otherwise a shard of zeros would be no file at all
        }
        with guard(f"{self.path}: creating {name}"):
            return ts.open(spec, create=True, open=False, context=_UNCACHED).result()

    def open(self, name: str, *, write: bool = False, final: bool = True, cached: bool = True) -> ts.TensorStore:
        """An array that exists. `final`: nobody writes to it any more, so what was read once stays valid."""
        recheck: Any = "open" if final else True
        spec = {
            "driver": "zarr3",
            "kvstore": self._below(name),
            "recheck_cached_data": recheck,
            "recheck_cached_metadata": recheck,
            "store_data_equal_to_fill_value": True,
        }
        context = _VECTOR_CONTEXT if name == "vectors" else _CONTEXT
        if write or not cached:
            context = _UNCACHED
        with guard(f"{self.path}: {name}"):
            return ts.open(spec, open=True, read=True, write=write, context=context).result()

    def _below(self, name: str) -> dict[str, Any]:
        return {**self._spec, "path": f"{self._spec.get('path', '')}{name}/"}


class GrowingArray:
    """Writes a 1-D array whose length is known only at the end, holding one shard in memory.

    What lands on the disk depends on the elements alone, not on how they were handed over.
    """

    def __init__(self, root: Root, name: str, dtype: str, layout: Layout):
        self._what = f"{root.path}: writing {name}"
        self._array = root.create(name, [_UNKNOWN], dtype, layout)
        self._dtype, self._shard = np.dtype(dtype), layout.shard
        self._buffer, self._hash = bytearray(), hashlib.sha256()
        self._written = 0
        self.length = 0

    def append(self, values: np.ndarray | bytes | Sequence[int]) -> None:
        data = values if isinstance(values, bytes) else np.ascontiguousarray(values, self._dtype).tobytes()
        self._hash.update(data)
        self._buffer += data
        self.length += len(data) // self._dtype.itemsize
        while len(self._buffer) >= self._shard * self._dtype.itemsize:
            self._flush(self._shard)

    def _flush(self, n: int) -> None:
        size = n * self._dtype.itemsize
        with guard(self._what):
            block = np.frombuffer(bytes(self._buffer[:size]), self._dtype)
            self._array[self._written : self._written + n].write(block).result()
        del self._buffer[:size]
        self._written += n

    def close(self) -> dict[str, Any]:
        """Writes what is left and the final length; returns the array's entry for a manifest."""
        if self._buffer:
            self._flush(len(self._buffer) // self._dtype.itemsize)
        with guard(self._what):
            self._array.resize(exclusive_max=[self.length], resize_metadata_only=True).result()
        return {"sha256": self._hash.hexdigest(), "shape": [self.length], "dtype": str(self._dtype)}


class GrowingText:
    """Byte strings as `{prefix}bytes` and `{prefix}offsets` (int64, one more than there are strings)."""

    def __init__(self, root: Root, bytes_name: str, offsets_name: str, layout: Layout, dtype: str = "uint8"):
        self.names = (bytes_name, offsets_name)
        self._values = GrowingArray(root, bytes_name, dtype, layout)
        self._offsets = GrowingArray(root, offsets_name, "int64", NUMBERS)
        self._offsets.append([0])

    def append(self, value: np.ndarray | bytes) -> None:
        self._values.append(value)
        self._offsets.append([self._values.length])

    def close(self) -> dict[str, dict[str, Any]]:
        return dict(zip(self.names, (self._values.close(), self._offsets.close()), strict=True))


def read_spans(array: ts.TensorStore, starts: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """`array[start:end]` for every pair, in the order given; near ones share a read."""
    groups: list[tuple[int, int, list[int]]] = []
    for i in np.argsort(starts, kind="stable").tolist():
        start, end = int(starts[i]), int(ends[i])
        if groups:
            first, last, members = groups[-1]
            if start <= last + _GAP and max(end, last) - first <= _SPAN:
                members.append(i)
                groups[-1] = (first, max(end, last), members)
                continue
        groups.append((start, end, [i]))
    out: list[np.ndarray] = [np.empty(0, array.dtype.numpy_dtype)] * len(starts)
    with ts.Batch() as batch:
        futures = [array[first:last].read(batch=batch) if last > first else None for first, last, _ in groups]
    for (first, _, members), future in zip(groups, futures, strict=True):
        if future is not None:
            block = future.result()
            for i in members:
                out[i] = block[int(starts[i]) - first : int(ends[i]) - first]
    return out


class Ragged:
    """Reads what GrowingText wrote: one array of values and the offsets between its items."""

    def __init__(self, root: Root, values: str, offsets: str):
        self._what = f"{root.path}: reading {values}"
        self._values, self.offsets = root.open(values), root.open(offsets)

    def __len__(self) -> int:
        return self.offsets.shape[0] - 1

    def read(self, items: np.ndarray, limits: np.ndarray | None = None) -> list[np.ndarray]:
        """The items, each at most `limits` elements long."""
        items = np.asarray(items, np.int64)
        with guard(self._what):
            unique, inverse = np.unique(items, return_inverse=True)
            bounds = self.offsets[np.concatenate([unique, unique + 1])].read().result()
            starts, ends = bounds[: len(unique)], bounds[len(unique) :]
            if limits is not None:
                longest = np.zeros(len(unique), np.int64)
                np.maximum.at(longest, inverse, np.asarray(limits, np.int64))
                ends = np.minimum(ends, starts + longest)
            found = read_spans(self._values, starts, ends)
        if limits is None:
            return [found[i] for i in inverse]
        return [found[i][:limit] for i, limit in zip(inverse, limits, strict=True)]

    def strings(self, items: np.ndarray, limits: np.ndarray | None = None) -> list[str]:
        try:
            return [value.tobytes().decode("utf-8") for value in self.read(items, limits)]
        except UnicodeDecodeError as error:
            raise StoreError(self._what, expected="UTF-8", got=error, fix="nla data check") from None
