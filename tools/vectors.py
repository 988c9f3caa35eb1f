"""Activation vectors from files: .parquet (a list column), .npy, .npz. Never through Python floats.

Every row is checked as it is read (width, nulls, NaN, zero), so that an error names the row of the file.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax.errors import InputError, VectorError
from nla_jax.tools.inputs import parse_indices

DEFAULT_COLUMN = "activation_vector"
_BATCH_ROWS = 2048
_FIX = "vectors of the pair's own target, as float32"
_DROP = "leaving it out with --rows"


def read_vectors(
    path: Path, *, column: str | None = None, rows: str | None = None, d_model: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors float32 [N, D] and their row numbers int64 [N] in the file.

    `column` names the parquet column or the npz entry, `rows` selects (as `parse_indices`), `d_model` is the width
    to expect. Raises VectorError for anything that is not finite, non-zero rows of one width.
    """
    suffix = path.suffix.lower()
    if suffix not in (".parquet", ".npy", ".npz"):
        raise InputError(f"{path}: vectors", expected=".parquet, .npy or .npz", got=suffix or "no suffix")
    if suffix == ".parquet":
        return _from_parquet(path, column or DEFAULT_COLUMN, rows, d_model)
    array = _numpy_array(path, column)
    if array.dtype.kind not in "fiu":
        fix = "saving as float32 (numpy cannot read back bfloat16)" if array.dtype.kind == "V" else None
        raise VectorError(f"{path}: vectors", expected="float16, float32 or float64", got=array.dtype, fix=fix)
    array = array[None] if array.ndim == 1 else array
    if array.ndim != 2 or not array.size:
        raise VectorError(f"{path}: vectors", expected="shape [N, D]", got=list(array.shape))
    _check_width(path, array.shape[1], d_model)
    chosen = np.arange(len(array)) if rows is None else np.asarray(parse_indices(rows, len(array), "row"))
    out = np.empty((len(chosen), array.shape[1]), np.float32)
    for first in range(0, len(chosen), _BATCH_ROWS):
        part = chosen[first : first + _BATCH_ROWS]
        out[first : first + len(part)] = _checked(path, array[part], part)
    return out, chosen


def _numpy_array(path: Path, entry: str | None) -> np.ndarray:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = list(loaded.files)
            name = entry or (DEFAULT_COLUMN if DEFAULT_COLUMN in names else names[0] if len(names) == 1 else None)
            if name not in names:
                got = f"the entries {', '.join(names) or '(none)'}"
                raise VectorError(f"{path}: which entry", expected=name or "one", got=got, fix="--column NAME")
            return loaded[name]
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        # numpy's own message for a damaged file talks about pickles, which are never read here.
        got = "a damaged or foreign file" if "pickle" in str(error) else str(error)
        raise VectorError(
            f"{path}: not readable as {path.suffix}", got=got, fix="saving it again with np.save"
        ) from None


def _from_parquet(path: Path, column: str, rows: str | None, d_model: int | None) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column)
            total = file.metadata.num_rows
            if not total:
                raise VectorError(f"{path}: vectors", expected="at least one row", got=0)
            chosen = np.arange(total) if rows is None else np.asarray(parse_indices(rows, total, "row"))
            order = np.argsort(chosen)
            wanted = chosen[order]
            out: np.ndarray | None = None
            done = 0
            for lists, numbers in _parquet_batches(file, column, wanted):
                values = _checked(path, _matrix(path, lists, numbers, d_model), numbers)
                if out is None:
                    d_model = values.shape[1]
                    out = np.empty((len(chosen), d_model), np.float32)
                out[order[done : done + len(values)]] = values
                done += len(values)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (pa.ArrowException, OSError) as error:
        raise VectorError(f"{path}: not readable as parquet", got=error, fix="writing it again") from None
    assert out is not None  # something was chosen
    return out, chosen


def _check_column(path: Path, schema: Any, column: str) -> None:
    import pyarrow as pa

    def value_type(t):
        t = t.storage_type if isinstance(t, pa.ExtensionType) else t
        lists = pa.types.is_list(t) or pa.types.is_large_list(t) or pa.types.is_fixed_size_list(t)
        return t.value_type if lists else None

    vectors = [f.name for f in schema if (t := value_type(f.type)) is not None and pa.types.is_floating(t)]
    if column not in schema.names:
        fix = f"--column {vectors[0]}" if vectors else "a file with a list column of float32"
        raise VectorError(f"{path}: no column {column!r}", got=", ".join(schema.names) or "no columns", fix=fix)
    if column not in vectors:
        got = schema.field(column).type
        raise VectorError(f"{path}: column {column!r}", expected="lists of float16, float32 or float64", got=got)


def _parquet_batches(file: Any, column: str, wanted: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
    """The wanted rows (sorted), a batch at a time: the Arrow array of lists and the row numbers in the file."""
    end = 0
    for group in range(file.num_row_groups):
        at, end = end, end + file.metadata.row_group(group).num_rows
        if np.searchsorted(wanted, at) == np.searchsorted(wanted, end):
            continue
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=[column]):
            lo, hi = np.searchsorted(wanted, [at, at + len(batch)])
            numbers = wanted[lo:hi]
            if len(numbers):
                lists = batch.column(0)
                yield (lists if len(numbers) == len(batch) else lists.take(numbers - at)), numbers
            at += len(batch)


def _matrix(path: Path, lists: Any, rows: np.ndarray, width: int | None) -> np.ndarray:
    """An Arrow array of lists as [n, D]; `rows` are its row numbers in the file."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(lists, pa.ExtensionArray):
        lists = lists.storage
    nulls = np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))
    if len(nulls):
        raise VectorError(f"{path}: row {rows[nulls[0]]} is null", expected="a vector", fix=_DROP)
    widths = np.asarray(pc.list_value_length(lists))
    width = int(widths[0]) if width is None else width
    other = np.flatnonzero(widths != width)
    if len(other):
        got = f"{widths[other[0]]} numbers"
        raise VectorError(f"{path}: row {rows[other[0]]}", expected=f"{width} numbers (D)", got=got, fix=_FIX)
    if not width:
        raise VectorError(f"{path}: row {rows[0]}", expected="a vector", got="an empty list")
    flat = lists.flatten()
    if flat.null_count:
        at = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // width
        raise VectorError(f"{path}: row {rows[at]} has null entries", expected="numbers", fix=_DROP)
    return flat.to_numpy(zero_copy_only=False).reshape(-1, width)


def _check_width(path: Path, width: int, d_model: int | None) -> None:
    if d_model is not None and width != d_model:
        raise VectorError(f"{path}: width of the vectors", expected=f"{d_model} (D of the model)", got=width, fix=_FIX)


def _checked(path: Path, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """`values` as float32; VectorError naming the row of the file for NaN, infinity, or a zero vector."""
    with np.errstate(over="ignore"):  # an overflow shows as infinity below
        values = np.asarray(values, np.float32)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        row = rows[int(np.argmin(finite))]
        fix = "extracting it again in float32 or bfloat16, or leaving it out with --rows"
        raise VectorError(f"{path}: row {row} has NaN or infinite entries", expected="finite numbers", fix=fix)
    some = values.any(axis=1)
    if not some.all():
        row = rows[int(np.argmin(some))]
        raise VectorError(f"{path}: row {row} is all zero", expected="a vector with a direction", fix=_DROP)
    return values
