"""Safetensors directories: what they hold, reading one tensor at a time, writing shards as a stream.

A checkpoint directory holds `model.safetensors`, or shards named by `model.safetensors.index.json`. Only the headers
are read to learn names, shapes and dtypes. Tensors are read and written in slabs of rows, transposed and cast on the
way, so that a tensor costs its own size in host memory and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from nla_jax.models.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The format's names of the floating dtypes that parameters may have.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SLAB_BYTES = 8 << 20  # rows read or written at once
_TILE = 32  # rows transposed at once: their cache lines fit in L1, which makes it four times as fast as `.T` alone
_COPY_AGAIN = "download or copy the file again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `file`, its `shape` and `dtype` (the format's name), and the byte `offset` of its data."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. CheckpointError in one line if it is absent, truncated or not one."""
    if not file.is_file():
        raise CheckpointError(
            f"{file} does not exist", fix="download the missing file, or point at a complete directory"
        )
    try:
        with safe_open(file, "numpy"):  # the library checks the header against the size of the file
            pass
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise _diagnosis(file, error) from None
    header.pop("__metadata__", None)
    return {
        key: TensorInfo(file, tuple(t["shape"]), t["dtype"], 8 + size + t["data_offsets"][0])
        for key, t in header.items()
    }


def _diagnosis(file: Path, error: Exception) -> CheckpointError:
    """Says in words why a file is no safetensors file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            head = f.read(64)
    except OSError as problem:
        reason = f"{file} cannot be read ({problem.strerror})"
        return CheckpointError(reason, fix="check the file's permissions and its disk")
    if head.startswith(b"version https://git-lfs"):
        fix = "git lfs pull, or download the file itself"
        return CheckpointError(f"{file} is a Git LFS pointer, not the weights", fix=fix)
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        fix = "download it again, signed in if the model is gated"
        return CheckpointError(f"{file} is a web page, not weights", fix=fix)
    promised = _promised_size(file, size)
    if size < promised:
        return CheckpointError(f"{file} is truncated", expected=f"{promised} bytes", got=size, fix=_COPY_AGAIN)
    return CheckpointError(f"{file} is not a valid safetensors file ({error})", fix=_COPY_AGAIN)


def _promised_size(file: Path, size: int) -> int:
    """The size that what is left of a file speaks of; 0 where it says nothing that can be believed."""
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or 8 + length > size:
            return max(8, 8 + length) if length < 100 << 20 else 0  # the format's own limit for headers
        try:
            header = json.loads(f.read(length))
            return 8 + length + max(t["data_offsets"][1] for k, t in header.items() if k != "__metadata__")
        except (ValueError, TypeError, LookupError, AttributeError):
            return 0


def read_tensor(info: TensorInfo, dtype: np.dtype, *, transpose: bool = False) -> np.ndarray:
    """One tensor as a new contiguous array of `dtype`, transposed if asked to; the only large array this makes.

    Raises CheckpointError where a value does not fit float16, instead of turning it into an infinity."""
    shape = info.shape[::-1] if transpose else info.shape
    out = np.empty(shape, dtype)
    flat = out if transpose else out.reshape(-1, *info.shape[1:]) if info.shape else out.reshape(1)
    with info.file.open("rb") as f:
        f.seek(info.offset)
        for start, slab in _slabs(f, info):
            if slab.dtype != dtype:
                slab = _cast(slab, dtype, info)
            stop = start + len(slab)
            if not transpose:
                flat[start:stop] = slab
                continue
            for i in range(0, len(slab), _TILE):
                out[:, start + i : min(start + i + _TILE, stop)] = slab[i : i + _TILE].T
    return out


def _slabs(f: Any, info: TensorInfo) -> Iterator[tuple[int, np.ndarray]]:
    """The tensor's rows in order, some megabytes at a time: (index of the first row, rows)."""
    rows = info.shape[0] if info.shape else 1
    row_shape = info.shape[1:]
    source = DTYPES[info.dtype]
    per_row = int(np.prod(row_shape, dtype=np.int64)) * source.itemsize
    step = max(_TILE, _SLAB_BYTES // max(per_row, 1))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = bytearray(count * per_row)
        if f.readinto(raw) != len(raw):
            raise CheckpointError(f"{info.file} ended while it was read", fix=_COPY_AGAIN)
        yield start, np.frombuffer(raw, source).reshape(count, *row_shape)


def _cast(values: np.ndarray, dtype: np.dtype, info: TensorInfo) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(values).all():
        raise CheckpointError(
            f"{info.file}: a weight is too large for float16 (over 65504)", fix="bfloat16 or float32 instead"
        )
    return cast


class Checkpoint:
    """The tensors of a directory by name; headers are read when a file is first asked about.

    `keys` are all names that the index (or the single file) lists. `info(key)` locates one, or is None where the
    file that the index names does not hold it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        self._files = self._locate()
        self.keys = frozenset(self._files)

    def info(self, key: str) -> TensorInfo | None:
        file = self._files[key]
        if file not in self._headers:
            header = read_header(file)
            for name in header:
                other = self._files.get(name)
                if other is not None and other != file:
                    raise CheckpointError(
                        f"{self.path}: {name} is in two files",
                        expected=f"it in {other.name} alone, as {INDEX} says",
                        got=f"it in {file.name} too",
                        fix="files of one save only; remove the others",
                    )
            self._headers[file] = header
        return self._headers[file].get(key)

    def _locate(self) -> dict[str, Path]:
        single, index = self.path / SINGLE, self.path / INDEX
        if not index.is_file():
            if single.is_file():
                self._headers[single] = read_header(single)
                return dict.fromkeys(self._headers[single], single)
            raise self._nothing()
        names = self._read_index(index)
        if single.is_file() and set(names.values()) != {SINGLE}:
            raise CheckpointError(
                f"{self.path} holds both {SINGLE} and an index of shards",
                fix="remove what is left of the older save",
            )
        return {key: self.path / name for key, name in names.items()}

    def _read_index(self, index: Path) -> dict[str, str]:
        def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            seen: dict[str, Any] = {}
            for key, value in pairs:
                if seen.setdefault(key, value) != value:
                    raise CheckpointError(
                        f"{index}: {key} is in two files", got=f"{seen[key]} and {value}", fix=_COPY_AGAIN
                    )
            return seen

        try:
            parsed = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=no_doubles)
        except ValueError as error:
            raise CheckpointError(f"{index} is not valid JSON ({error})", fix=_COPY_AGAIN) from None
        names = parsed.get("weight_map") if isinstance(parsed, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
            raise CheckpointError(f"{index}: weight_map", expected="tensor names to file names", fix=_COPY_AGAIN)
        for name in set(names.values()):
            # A file name from a download must not lead out of the directory that was downloaded.
            if name != os.path.basename(name) or name in ("", ".", "..") or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: weight_map",
                    expected="names of .safetensors files beside it",
                    got=repr(name),
                    fix=_COPY_AGAIN,
                )
        return names

    def _nothing(self) -> CheckpointError:
        if not self.path.is_dir():
            return CheckpointError(f"{self.path} is not a directory", fix="point at a Hugging Face model directory")
        names = sorted(p.name for p in self.path.iterdir())
        what = f"{self.path} holds neither {SINGLE} nor {INDEX}"
        if any(re.fullmatch(r"pytorch_model.*\.bin|.*\.(pt|pth|ckpt)", name) for name in names):
            fix = "convert it to safetensors with its publisher's tools (pickled weights can run code, so never opened)"
            return CheckpointError(what, got="pickled weights only", fix=fix)
        if any(name.endswith(".safetensors") for name in names):
            return CheckpointError(what, got="shards without their index", fix=f"download {INDEX} too")
        return CheckpointError(what, fix="point at a Hugging Face model directory with its weights")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written: its name, shape and dtype."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def plan_shards(entries: list[Entry], max_bytes: float) -> list[list[Entry]]:
    """Splits entries, in order, into runs of at most `max_bytes` (a larger tensor gets a run of its own)."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def write_file(file: Path, entries: list[Entry], tensors: Iterable[np.ndarray]) -> int:
    """Writes one safetensors file from `tensors`, an iterable in the order of `entries`; returns its size in bytes.

    The library wants all tensors of a file in memory at once and, given one that is not contiguous, writes wrong
    bytes without a word; this takes one at a time and makes each contiguous. The layout (8-byte header length, JSON
    header padded to 8 bytes, data) is fixed by the format and checked against the library in the tests."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.key] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for entry, tensor in zip(entries, tensors, strict=True):
            if tensor.shape != entry.shape or tensor.dtype != entry.dtype:
                raise ValueError(
                    f"{entry.key}: promised {entry.shape} {entry.dtype}, got {tensor.shape} {tensor.dtype}"
                )
            _write_rows(f, tensor)
        f.flush()
        os.fsync(f.fileno())
    return 8 + len(text) + offset


def _write_rows(f: Any, tensor: np.ndarray) -> None:
    """The tensor's bytes in row order, a slab at a time, so that a transposed view is never copied whole."""
    rows = tensor if tensor.ndim else tensor.reshape(1)
    per_row = max(rows[:1].nbytes, 1)
    step = max(_TILE, _SLAB_BYTES // per_row)
    for start in range(0, len(rows), step):
        slab = rows[start : start + step]
        if not slab.flags.c_contiguous:
            packed = np.empty(slab.shape, slab.dtype)
            for i in range(0, slab.shape[-1], _TILE):
                packed[..., i : i + _TILE] = slab[..., i : i + _TILE]
            slab = packed
        f.write(slab.view(np.uint8).data)
