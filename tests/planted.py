"""An evaluation whose texts and whose AR are given, so that what each number must be is known beforehand."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from nla_jax.evals.context import Context, Samples
from nla_jax.evals.evalset import EvalSet
from nla_jax.evals.result import Row, SuiteResult

D = 16


class Words:
    """A tokenizer whose tokens are words with the white space before them."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [m.span() for m in re.finditer(r"\s*\S+", text)]
        return list(range(len(spans))), spans


class Planted(Context):
    """`texts[i][g]` is sample g of row i; `reads` is the AR; vectors [n, D] or None for what the AR makes of text 0.
    The last `masked` rows are masked."""

    def __init__(
        self,
        texts: Sequence[Sequence[str]],
        reads: Callable[[str], np.ndarray],
        docs: Sequence[int],
        vectors: np.ndarray | None = None,
        *,
        failed: Any = None,
        positions: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
        masked: int = 0,
        mean: np.ndarray | None = None,
        variance: float = 0.7,
        seed: int = 42,
    ):
        n = len(texts)
        if vectors is None:
            vectors = np.stack([reads(row[0]) for row in texts])
        places = np.asarray(range(50, 50 + n) if positions is None else positions, np.int32)
        self.data = EvalSet(
            vectors=np.asarray(vectors, np.float32),
            docs=np.asarray(docs, np.int32),
            doc_ids=[f"d{d}" for d in docs],
            positions=places,
            layer=1,
            contexts=[""] * n,
            tokens=None if tokens is None else [np.full(p + 1, t) for p, t in zip(places, tokens, strict=True)],
            teacher=[None] * n,
            masked=np.arange(n) >= n - masked,
            rows=np.arange(n, dtype=np.int64) * 3,
            train_mean_nrm=mean,
        )
        self.given, self.reads = [list(row) for row in texts], reads
        self.fails = np.zeros((n, len(texts[0])), bool) if failed is None else np.asarray(failed, bool)
        self.seed, self.resamples, self.variance, self.variance_source = seed, 200, variance, "planted"
        self.mse_scale, self.orthogonal = float(np.sqrt(vectors.shape[1])), 2.0
        self.nla: Any = SimpleNamespace(ar=SimpleNamespace(tokenizer=Words()))
        self.noted: list[str] = []
        self.note = self.noted.append
        self.was_read: list[str] = []

    def texts(self, k: int = 1, rows: np.ndarray | None = None) -> Samples:
        at = list(range(len(self.data))) if rows is None else np.asarray(rows).tolist()
        length = np.array([[len(t.split()) for t in self.given[i][:k]] for i in at], np.int32)
        return Samples([self.given[i][:k] for i in at], self.fails[at, :k], length)

    def read(self, texts: Sequence[str]) -> np.ndarray:
        self.was_read += texts
        found = [np.asarray(self.reads(text), np.float32) for text in texts]
        return np.stack(found) if found else np.zeros((0, self.data.vectors.shape[1]), np.float32)


def vector(name: str, d: int = D) -> np.ndarray:
    """A random vector of a name, always the same."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).normal(size=d)


def bag_of_words(text: str) -> np.ndarray:
    """An AR that reads words without their order, case and punctuation; words that begin with "idle" say nothing."""
    words = sorted(w.casefold() for w in re.findall(r"\w+", text))
    return vector("") + sum((vector(w) for w in words if not w.startswith("idle")), np.zeros(D))


def ignores_text(text: str) -> np.ndarray:
    return vector("constant")


def row(result: SuiteResult, metric: str, group: str = "", control: str = "") -> Row:
    """The one row of that name."""
    (found,) = [r for r in result.rows if (r.metric, r.group, r.control) == (metric, group, control)]
    return found


def value(result: SuiteResult, metric: str, group: str = "", control: str = "") -> float:
    found = row(result, metric, group, control).value
    assert found is not None
    return found


def mse(predicted: np.ndarray, about: np.ndarray) -> np.ndarray:
    """2 (1 - cosine), float64: mse_nrm at the default scale, another way."""
    p, v = np.asarray(predicted, np.float32).astype(np.float64), np.asarray(about, np.float64)
    return 2.0 * (1.0 - np.sum(p * v, -1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(v, axis=-1))


def whole(result: SuiteResult) -> None:
    """What every result must be: columns of one length, intervals around their values, and nothing twice."""
    assert len({len(column) for column in result.columns.values()}) == 1
    names = [(r.metric, r.group, r.control) for r in result.rows]
    assert len(set(names)) == len(names)
    for r in result.rows:
        assert r.n > 0 and r.documents > 0
        if r.low is not None:
            assert r.low <= r.high and r.low - 0.2 <= r.value <= r.high + 0.2
    assert result.json()["suite"] == result.suite
    for s in result.series.values():
        assert len({len(s[name]) for name in ("x", "y", "low", "high")}) == 1
