"""What commands write: JSON, parquet, npy and HTML files, checked before the work and moved into place after it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from nla_jax import __version__
from nla_jax.errors import InputError
from nla_jax.tools.report import Report, Setup, layer_aliases, tallies

_ROWS_PER_GROUP = 4096


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | str | None]) -> None:
    """Raises InputError unless every output can be written without touching an input. Nothing is left behind."""
    read = [Path(i).resolve() for i in inputs if i is not None]
    seen: set[Path] = set()
    for path in (p for p in outputs if p is not None):
        final = path.resolve()
        if final.is_dir() or not path.name:
            raise InputError(f"{path}: output", expected="a file name", got="a directory")
        if final.exists() and not final.is_file():
            raise InputError(f"{path}: output", expected="a regular file", got="a device or pipe")
        if not final.parent.is_dir():
            raise InputError(f"{path}: output", expected="an existing directory", fix=f"mkdir -p {final.parent}")
        if final.exists() and any(_holds(i, final) for i in read):
            raise InputError(f"{path}: output is a file that this command reads", fix="another name")
        if final in seen:
            raise InputError(f"{path}: output", expected="a different name for each output", got="the same twice")
        seen.add(final)
        try:
            # Only trying shows it: the permission bits say nothing on a read-only file system, or to root.
            _beside(final).touch()
        except OSError as error:
            raise InputError(f"{path}: cannot write into {final.parent}", got=error.strerror) from None
        finally:
            with contextlib.suppress(OSError):
                _beside(final).unlink(missing_ok=True)


def _holds(source: Path, path: Path) -> bool:
    return source.exists() and (source.samefile(path) or (source.is_dir() and source in path.parents))


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name[:40]}.{os.getpid()}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the directory of `path`, moved to `path` when the block ends without an error."""
    final = path.resolve()  # what a link points to is replaced, not the link
    part = _beside(final)
    try:
        yield part
        os.replace(part, final)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write(path: Path | None, writer: Callable[[Path], None], what: str) -> None:
    """Runs `writer` on a temporary name, moves the file into place and says so on stderr; None writes nothing."""
    if path is None:
        return
    with replacing(path) as part:
        writer(part)
    click.echo(f"wrote {path} ({what})", err=True)


# -- JSON ---------------------------------------------------------------------------------------------------------


def setup_json(setup: Setup) -> dict[str, Any]:
    """The part that every JSON output begins with: versions, command line, models, layer, denominator, settings."""
    return {
        "format": f"nla_jax.{setup.command}",
        "format_version": 1,
        "versions": _versions(),
        "command": ["nla", *setup.arguments],
        "models": setup.models,
        "device": setup.device,
        "dtype": setup.dtype,
        "d_model": setup.d_model,
        "layer_index": setup.layer_index,
        "layer_aliases": layer_aliases(setup.layer_index),
        "mse_scale": setup.mse_scale,
        "fve_nrm_denominator": {
            "variance_nrm": setup.variance_nrm,
            "source": setup.variance_source,
            "constant_predictor_floor": setup.floor,
        },
        "settings": setup.settings,
    }


def report_json(report: Report) -> dict[str, Any]:
    """A report as JSON values: the setup, the text and its tokens, tallies, and every field of every explanation."""
    source = {"text": report.source} if isinstance(report.source, str) else {"messages": report.source}
    return {
        **setup_json(report.setup),
        **(source if report.source is not None else {}),
        "tokens": [dataclasses.asdict(view) for view in report.tokens],
        "summary": [dataclasses.asdict(t) for t in tallies(report)],
        "explanations": [dataclasses.asdict(e) for e in report.explanations],
    }


def write_json(path: Path, value: Any) -> None:
    """UTF-8 JSON with null for NaN and infinity, which JSON does not have."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, indent=1)
    # A lone surrogate (from a file name that is not UTF-8) becomes the escape that JSON has for it.
    path.write_bytes(text.encode("utf-8", "backslashreplace") + b"\n")


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def _versions() -> dict[str, str]:
    import jax

    return {"nla_jax": __version__, "jax": jax.__version__, "python": platform.python_version()}


# -- parquet and npy ----------------------------------------------------------------------------------------------


def write_report_parquet(path: Path, report: Report) -> None:
    """One row per explanation with all of its fields and, as in datasets, its `activation_vector`.

    `n_raw_tokens` counts the tokens up to and including the position. `nla verbalize` and `nla score` read the file.
    """
    import pyarrow as pa

    setup, rows = report.setup, report.explanations

    def table(first: int) -> Any:
        part = rows[first : first + _ROWS_PER_GROUP]
        index = np.asarray(report.index[first : first + _ROWS_PER_GROUP])
        columns = {name: pa.array([getattr(e, name) for e in part], kind) for name, kind in _fields().items()}
        after = [None if e.position is None else e.position + 1 for e in part]
        columns["n_raw_tokens"] = pa.array(after, pa.int32())
        columns["activation_layer"] = pa.array([setup.layer_index] * len(part), pa.int32())
        columns["activation_vector"] = vector_column(report.vectors[index])
        return pa.table(columns).replace_schema_metadata(_metadata(setup))

    _write_tables(path, (table(first) for first in range(0, len(rows), _ROWS_PER_GROUP)))


def write_rows_parquet(path: Path, setup: Setup, columns: dict[str, Any]) -> None:
    """Columns of one length: arrays [N], arrays [N, D] (fixed-size lists of float32), or lists of text."""
    import pyarrow as pa

    n = len(next(iter(columns.values())))

    def table(first: int) -> Any:
        part = {name: values[first : first + _ROWS_PER_GROUP] for name, values in columns.items()}
        arrays = {k: vector_column(v) if getattr(v, "ndim", 1) == 2 else pa.array(v) for k, v in part.items()}
        return pa.table(arrays).replace_schema_metadata(_metadata(setup))

    _write_tables(path, (table(first) for first in range(0, n, _ROWS_PER_GROUP)))


def write_npy(path: Path, vectors: np.ndarray) -> None:
    """float32 [N, D]. (Given a name, np.save would add .npy to it.)"""
    with path.open("wb") as file:
        np.save(file, np.ascontiguousarray(vectors, np.float32), allow_pickle=False)


def vector_column(vectors: np.ndarray) -> Any:
    """[N, D] as an Arrow array of fixed-size lists of float32 (lists of variable length corrupt past 4 GiB)."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def _fields() -> dict[str, Any]:
    import pyarrow as pa

    return {
        "row": pa.int64(),
        "position": pa.int32(),
        "token": pa.string(),
        "token_id": pa.int32(),
        "sample": pa.int32(),
        "text": pa.string(),
        "raw": pa.string(),
        "failed": pa.bool_(),
        "finish_reason": pa.string(),
        "cosine": pa.float64(),
        "mse_nrm": pa.float64(),
        "fve_nrm": pa.float64(),
        "norm": pa.float64(),
        "token_ids": pa.list_(pa.int32()),
        "logprobs": pa.list_(pa.float32()),
    }


def _metadata(setup: Setup) -> dict[bytes, bytes]:
    return {b"nla_jax": json.dumps(finite(setup_json(setup))).encode()}


def _write_tables(path: Path, tables: Iterable[Any]) -> None:
    import pyarrow.parquet as pq

    tables = iter(tables)
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
