"""Corpora, targets and calls for the tests of `extract`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import nla_jax
from nla_jax.corpus import open_corpus
from nla_jax.extract import Settings
from nla_jax.extract_run import Extraction, extract
from nla_jax.store import Store
from nla_jax.tools.mini import make_mini

TOLERANCE = 1e-4  # of a vector's largest entry, in float32

WORDS = "the ships of the night go home before water finds light while people keep asking what was said".split()


def text(i: int, n_words: int) -> str:
    """Words of a document; no two documents are the same."""
    rng = np.random.default_rng(i)
    return f"Letter {i}: " + " ".join(rng.choice(WORDS, n_words))


def letters(n: int = 40, longest: int = 120) -> list[dict[str, Any]]:
    """JSON rows of 20 to `longest` words: some are too short for a position at 50."""
    return [{"id": f"letter-{i}", "text": text(i, 20 + i * 37 % (longest - 20))} for i in range(n)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_target(out: Path, **options: Any) -> Path:
    """A target of 4 blocks and width 32 with a small tokenizer of its own."""
    return make_mini(out, **{"d_model": 32, "dtype": "float32", **options}).target


def run(
    target: Path,
    corpus: Path,
    out: Path,
    layers: tuple[int, ...] = (2,),
    *,
    rows: slice | None = None,
    shard_rows: int = 32,
    batch_tokens: int = 512,
    **options: Any,
) -> Extraction:
    """`extract` with small shards; the fields of Settings among the options go there."""
    fields = {k: options.pop(k) for k in ("seed", "min_position", "per_document", "max_tokens") if k in options}
    opened = open_corpus(corpus, rows=rows, **{k: options.pop(k) for k in ("text_split",) if k in options})
    settings = Settings(layers, **fields)
    return extract(target, opened, out, settings, shard_rows=shard_rows, batch_tokens=batch_tokens, **options)


def alone(target: Path, store: Store, layer: int, docs: list[int]) -> list[np.ndarray]:
    """The residual streams [T, D] of whole documents, each in a forward pass of its own without padding."""
    cfg, params = nla_jax.load_model(target)
    return [np.asarray(nla_jax.residual(params, ids[None], cfg, layer)[0]) for ids in store.tokens(np.array(docs))]


def command(*args: object) -> list[str]:
    """The `nla` command for a process of its own, in which every warning is an error."""
    return [sys.executable, "-W", "error", "-m", "nla_jax.tools.cli", "extract", *map(str, args)]


def process(*args: object, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=300, **options)
