"""Rows, a pair and planted readings for the tests of evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nla_jax.evals.context import Context, Samples
from nla_jax.evals.evalset import EvalSet
from nla_jax.pair import NLA
from nla_jax.tools.mini import make_mini

D, LAYER = 32, 2


def mini_nla(out: Path, variance: float | None = None, **options: Any) -> NLA:
    """A pair of width 32 without training, opened; no weights are read before they are used."""
    pair = make_mini(out, **{"d_model": D, "layer": LAYER, "dtype": "float32", "variance_nrm": variance, **options})
    return NLA.from_pretrained(str(pair.av), str(pair.ar), str(pair.target))


def vectors(n: int, seed: int = 0, d: int = D) -> np.ndarray:
    """Off-centre and of different norms, as residual streams are."""
    rng = np.random.default_rng(seed)
    raw = rng.standard_normal((n, d)) + np.linspace(-1, 1.5, d)
    return (raw * rng.uniform(5, 40, (n, 1))).astype(np.float32)


def rows(n: int = 200, per_document: int = 5, masked: int = 20, seed: int = 0, **changes: Any) -> EvalSet:
    """n rows of n / per_document documents, then `masked` ones, with training rows that have texts."""
    total = n + masked
    v = vectors(total, seed)
    train = vectors(300, seed + 1)
    unit = train.astype(np.float64) * math.sqrt(D) / np.linalg.norm(train.astype(np.float64), axis=1, keepdims=True)
    docs = np.concatenate([np.arange(n) // per_document, np.arange(masked) // per_document]).astype(np.int32)
    rng = np.random.default_rng(seed)
    positions = np.concatenate([rng.integers(50, 500, n), rng.integers(0, 50, masked)]).astype(np.int32)
    fields: dict[str, Any] = {
        "vectors": v,
        "docs": docs,
        "doc_ids": [f"doc {d}" for d in docs.tolist()],
        "positions": positions,
        "layer": LAYER,
        "contexts": [f"context {i}" for i in range(total)],
        "tokens": None,
        "teacher": [f"teacher {i}" if i % 3 else None for i in range(total)],
        "masked": np.arange(total) >= n,
        "rows": np.arange(total, dtype=np.int64),
        "source": {"path": "planted", "kind": "store", "hash": "h", "min_position": 50},
        "train_mean_raw": train.astype(np.float64).mean(axis=0),
        "train_mean_nrm": unit.mean(axis=0),
        "train_variance_nrm": float(np.mean((unit - unit.mean(axis=0)) ** 2)),
        "train": lambda n, explained=False: (train[:n], [f"train {i}" for i in range(len(train))][:n]),
    }
    return EvalSet(**{**fields, **changes})


class Planted(Context):
    """A context whose texts and readings are given: `text[i][g]`, and what the AR makes of a text.

    By default the text of a row is "row i" (sample g: "row i/g"), and the reading is the row's vector: a perfect
    pair. `reading`: a function of a text. `bad`: bool [n, k], the samples that failed."""

    def __init__(self, nla: NLA, data: EvalSet, reading=None, text=None, bad: np.ndarray | None = None, **options: Any):
        super().__init__(nla, data, **{"resamples": 400, **options})
        self.reading, self.written, self.bad = reading or self.perfect, text or self.named, bad
        self.asked: list[int] = []  # texts read, by call

    def named(self, row: int, sample: int) -> str:
        return f"row {row}" + (f"/{sample}" if sample else "")

    def perfect(self, text: str) -> np.ndarray:
        """The vector of the row that a text names, or of the training row; teachers' texts as noise."""
        kind, _, number = text.partition(" ")
        if kind == "row":
            return self.data.vectors[int(number.split("/")[0])]
        return np.random.default_rng(sum(text.encode())).standard_normal(self.data.vectors.shape[1])

    def texts(self, k: int = 1, rows: np.ndarray | None = None) -> Samples:
        at = range(len(self.data)) if rows is None else np.asarray(rows).tolist()
        found = [[self.written(i, g) for g in range(k)] for i in at]
        failed = np.zeros((len(found), k), bool) if self.bad is None else self.bad[list(at), :k]
        length = np.array([[len(t.split()) for t in row] for row in found], np.int32).reshape(len(found), k)
        return Samples(found, failed, length)

    def read(self, texts: Sequence[str]) -> np.ndarray:
        self.asked.append(len(texts))
        if not texts:
            return np.zeros((0, self.data.vectors.shape[1]), np.float32)
        return np.stack([np.asarray(self.reading(t), np.float32) for t in texts])


def columns(path: Path) -> dict[str, Any]:
    """A suite's table: arrays, [m, D] ones included; lists of text as they are."""
    table = pq.read_table(path)
    out: dict[str, Any] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if hasattr(column.type, "list_size"):
            out[name] = column.flatten().to_numpy().reshape(-1, column.type.list_size)
        elif str(column.type) in ("string", "large_string"):
            out[name] = column.to_pylist()
        else:
            out[name] = column.to_numpy(zero_copy_only=False)
    return out


def found(rows, metric: str, group: str = "", control: str = "") -> Any:
    """The one row of a metric, group and control."""
    some = [r for r in rows if (r.metric, r.group, r.control) == (metric, group, control)]
    assert len(some) == 1, (metric, group, control, [(r.metric, r.group, r.control) for r in rows])
    return some[0]
