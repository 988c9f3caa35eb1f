"""Seals: size and sha256 of every file of a checkpoint, so that damage is found before it is trained on.

Orbax and OCDBT notice damage to their descriptions and indices, but restore a flipped byte in array data silently,
and some missing files too. A seal is written after Orbax has committed a step, as the last file of its directory: a
step without one was not finished, or was being deleted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEAL = "nla_jax.json"
_FORMAT = {"format": "nla_jax training checkpoint", "version": 1}


@dataclasses.dataclass(frozen=True)
class Seal:
    """`files`: path within the step's directory -> (bytes, sha256). `metrics`: of the evaluation at this step."""

    step: int
    metrics: Mapping[str, float]
    files: Mapping[str, tuple[int, str]]


def write_seal(directory: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Reads every file in `directory` and writes the seal, atomically."""
    files = {name: (size, _sha256(directory / name)) for name, size in _sizes(directory).items()}
    _write(directory, Seal(step, metrics, files))


def relabel(directory: Path, metrics: Mapping[str, float]) -> None:
    """Replaces the metrics of a seal that is there."""
    seal = read_seal(directory)
    if seal is not None:
        _write(directory, dataclasses.replace(seal, metrics=metrics))


def _write(directory: Path, seal: Seal) -> None:
    row = {**_FORMAT, "step": seal.step, "metrics": dict(seal.metrics), "files": dict(seal.files)}
    part = directory / (SEAL + ".tmp")
    with part.open("w", encoding="utf-8") as file:
        json.dump(row, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(directory / SEAL)


def read_seal(directory: Path) -> Seal | None:
    """The seal of a step; None where there is none. ValueError where it cannot be read."""
    try:
        row: dict[str, Any] = json.loads((directory / SEAL).read_text(encoding="utf-8"))
        if {key: row.get(key) for key in _FORMAT} != _FORMAT:
            raise ValueError
        files = {name: (int(size), str(digest)) for name, (size, digest) in row["files"].items()}
        return Seal(int(row["step"]), dict(row["metrics"]), files)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{SEAL} cannot be read") from None


def damage(directory: Path) -> str | None:
    """What is wrong with a step's files, None where all are as they were sealed. Reads all of them."""
    try:
        seal = read_seal(directory)
    except ValueError as error:
        return str(error)
    if seal is None:
        return "it was not finished"
    sizes = _sizes(directory)
    for name, (size, _) in seal.files.items():
        if sizes.get(name) != size:
            got = f"{sizes[name]} of its {size} bytes" if name in sizes else "missing"
            return f"{name}: {got}"
    # Hashing releases the interpreter; large checkpoints have many files.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, digest in zip(seal.files, pool.map(_sha256, [directory / n for n in seal.files]), strict=True):
            if digest != seal.files[name][1]:
                return f"{name}: its bytes have changed (sha256)"
    return None


def _sizes(directory: Path) -> dict[str, int]:
    files = sorted(f for f in directory.rglob("*") if f.is_file() and f.parent / f.name != directory / SEAL)
    return {f.relative_to(directory).as_posix(): f.stat().st_size for f in files if not f.name.endswith(SEAL + ".tmp")}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
