"""Small activation stores for tests, and the program that the kill tests kill (`python store_cases.py PATH ...`)."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nla_jax.errors import StoreError
from nla_jax.manifest import StoreSpec, index_exists
from nla_jax.store import Store
from nla_jax.store_write import IndexedDocument, ShardWriter, create_index

D = 16
SPEC = StoreSpec(
    d_model=D,
    layers=(1, 3),
    model={"name": "mini", "config_sha256": "c0", "weights": "w0", "n_layers": 4},
    tokenizer={"fingerprint": "f0"},
    settings={"seed": 0, "per_document": 5, "kind": "text"},
    corpus={"name": "letters"},
    shard_rows=16,
)
ALPHABET = list("abc xyz\n") + ["é", "ß", "日", "本", "🙂", "\u200d", "e\u0301"]


def documents(n: int = 24, prefix: str = "doc", first: int = 0) -> Iterator[IndexedDocument]:
    """Random texts of 1 to 40 one-letter tokens, some letters of several bytes; the texts of all numbers differ."""
    for i in range(first, first + n):
        rng = np.random.default_rng(i)
        letters = [*rng.choice(ALPHABET, int(rng.integers(1, 40))), f"#{i}"]
        ends = np.cumsum([len(c.encode()) for c in letters])
        positions = np.sort(rng.choice(len(letters), min(len(letters), 5), replace=False))
        yield IndexedDocument(
            doc_id=f"{prefix}/ü{i}",
            text="".join(letters),
            ids=rng.integers(0, 1000, len(letters)).astype(np.int32),
            roles=rng.integers(0, 6, len(letters)).astype(np.int8),
            text_end=ends.astype(np.int32),
            positions=positions,
        )


def vectors(shard: int, rows: tuple[int, int], d: int = D) -> np.ndarray:
    return np.random.default_rng(1000 + shard).standard_normal((rows[1] - rows[0], d)).astype(np.float32)


def fill(path: str | Path, shards: list[int] | None = None, spec: StoreSpec | None = None) -> ShardWriter:
    writer = ShardWriter(path, spec)
    for shard in writer.pending() if shards is None else shards:
        rows = writer.rows(shard)
        writer.write_shard(shard, vectors(shard, rows, writer.manifest["d_model"]))
    writer.finish()
    return writer


def build(path: str | Path, spec: StoreSpec = SPEC, **which) -> Store:
    create_index(path, spec, documents(**which), counts={"documents": which.get("n", 24)})
    fill(path)
    return Store.open(path)


def tree(path: Path) -> dict[str, str]:
    """sha256 of every file below a directory."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main(path: str, process: int, count: int, pause: float) -> None:
    """One process of an extraction: the index if there is none, then this process's shards, `pause` s each."""

    def slowly() -> Iterator[IndexedDocument]:
        for document in documents():
            time.sleep(pause / 8)
            yield document

    if process == 0 and not index_exists(path):
        create_index(path, SPEC, slowly(), counts={"documents": 24})
    while not index_exists(path):
        time.sleep(0.02)
    writer = ShardWriter(path, SPEC)
    for shard in writer.pending(process, count):
        rows = writer.rows(shard)
        time.sleep(pause)
        writer.write_shard(shard, vectors(shard, rows))
    writer.finish()


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    except StoreError as error:
        sys.exit(str(error))
