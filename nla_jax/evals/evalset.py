"""The rows of an evaluation, and how they are chosen: the same ones every time, whatever the order of a store."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from nla_jax.errors import InputError
from nla_jax.extract import choose_positions

N, PER_DOCUMENT, MIN_POSITION, SEED = 1000, 5, 50, 42


class Train(Protocol):
    """Training rows to compare with: up to n of them, drawn by the seed, none of an evaluated document.

    Gives raw vectors float32 [m, D] and their explanations, None where there are none. `explained`: only rows that
    have one."""

    def __call__(self, n: int, explained: bool = False) -> tuple[np.ndarray, list[str | None] | None]: ...


@dataclass(frozen=True)
class EvalSet:
    """The rows of an evaluation, n in all; the masked ones come last.

    `vectors` float32 [n, D], raw. `docs` int32 [n], 0.. in order of appearance: the clusters of the bootstrap.
    `doc_ids` per row; `positions` int32 [n], 0-based tokens (-1: not known); `layer` K; `contexts` the text up to and
    including the position; `tokens` the whole document's token ids per row (what follows is known), None for a parquet
    set; `teacher` the warm-start explanation, where there is one. `masked` bool [n]: below `min_position`, or a special
    or template token: not in the headline. `rows` int64 [n] in the source. `source`: path, kind, hash, and how the rows
    were chosen. `notes`: what a reader must know of the choice. `train_mean_raw` and `train_mean_nrm` float64 [D] of
    the training rows (the second of v_n) and `train_variance_nrm` are None where the source has none; `train` draws
    such rows. `tokenizer`: its fingerprint, None where unknown. `model`: the source's record of the target.
    """

    vectors: np.ndarray
    docs: np.ndarray
    doc_ids: list[str]
    positions: np.ndarray
    layer: int
    contexts: list[str]
    tokens: list[np.ndarray] | None
    teacher: list[str | None]
    masked: np.ndarray
    rows: np.ndarray
    source: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    train_mean_raw: np.ndarray | None = None
    train_mean_nrm: np.ndarray | None = None
    train_variance_nrm: float | None = None
    train: Train | None = None
    tokenizer: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def main(self) -> np.ndarray:
        """int64 numbers of the rows that are in the headline."""
        return np.flatnonzero(~self.masked)

    @cached_property
    def hash(self) -> str:
        """sha256 of the rows and what they are compared by: two sets with one hash give the same numbers."""
        digest = hashlib.sha256()
        for array in (self.vectors, self.docs, self.positions, self.masked):
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        for text in (*self.contexts, *(t or "" for t in self.teacher)):
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        return digest.hexdigest()

    def take(self, index: np.ndarray) -> EvalSet:
        """The rows of an index, in its order; documents keep their numbers."""
        at = np.asarray(index, np.int64)
        chosen: dict[str, Any] = {
            name: getattr(self, name)[at] for name in ("vectors", "docs", "positions", "masked", "rows")
        }
        for name in ("doc_ids", "contexts", "tokens", "teacher"):
            values = getattr(self, name)
            chosen[name] = None if values is None else [values[i] for i in at.tolist()]
        return dataclasses.replace(self, **chosen)


def choose(
    docs: np.ndarray, left_out: np.ndarray, names: Mapping[int, str], n: int, per_document: int, seed: int
) -> np.ndarray:
    """Indices of up to n rows: documents in the order of a hash of (seed, id), in each up to `per_document` rows."""
    free = np.flatnonzero(~left_out)
    if not len(free):
        return free
    free = free[np.argsort(docs[free], kind="stable")]
    members = np.split(free, np.flatnonzero(np.diff(docs[free])) + 1)
    members.sort(key=lambda m: _rank(seed, names[int(docs[m[0]])]))
    chosen: list[np.ndarray] = []
    left = n
    for m in members:
        if left <= 0:
            break
        chosen.append(choose_positions(names[int(docs[m[0]])], m, min(per_document, left), seed))
        left -= len(chosen[-1])
    return np.concatenate(chosen)


def _rank(seed: int, doc_id: str) -> bytes:
    # Another hash than that of the positions, which would tie the choice of documents to them.
    return hashlib.sha256(f"eval\0{seed}\0{doc_id}".encode("utf-8", "surrogatepass")).digest()


def numbered(docs: np.ndarray) -> np.ndarray:
    """Documents by int32 numbers from 0 in order of appearance, [n]."""
    _, first, inverse = np.unique(docs, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first), dtype=np.int32)
    return rank[inverse]


def check_counts(**counts: int) -> None:
    """InputError for an option that is not at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')}", expected="at least 1", got=value)
