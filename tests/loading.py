"""A small store with explanations for the loader's tests, and the program that they restart (`python loading.py`)."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import tokenizers
from store_cases import documents, fill
from tiny_tokenizers import LLAMA_CONFIG, llama_like, sidecar_dict, write

from nla_jax.loader import make_loader
from nla_jax.manifest import StoreSpec
from nla_jax.prompt import av_prompt_ids
from nla_jax.sidecar import Sidecar, parse_sidecar
from nla_jax.store import Store
from nla_jax.store_write import create_index, write_explanations
from nla_jax.tokenizer import Tokenizer

D = 48
MARKER = "㈎"
BUCKETS = (48, 72, 96, 128)
WORDS = "the quick brown fox jumps over lazy dog Hello world don't 12 34 <b> <|im_end|> é".split()


def tokenizer(directory: Path) -> Tokenizer:
    t = llama_like()
    t.add_tokens([tokenizers.AddedToken(MARKER, special=False, normalized=False)])
    return Tokenizer.from_dir(write(directory, t, LLAMA_CONFIG))


def sidecar(tok: Tokenizer) -> Sidecar:
    """Its marker's neighbours are looked up, everything else is written down."""
    ids = {"injection_char": MARKER, "injection_token_id": tok.encode(MARKER)[0]}
    raw = sidecar_dict(d_model=D)
    raw["tokens"].update(ids)
    prompt = av_prompt_ids(tok, parse_sidecar(raw))
    at = prompt.index(ids["injection_token_id"])
    raw["tokens"].update(injection_left_neighbor_id=prompt[at - 1], injection_right_neighbor_id=prompt[at + 1])
    return parse_sidecar(raw)


def explanations(n: int) -> list[str | None]:
    """1 to 22 words each; every 9th row has none, row 4 holds the marker and row 5 is too long for any bucket."""
    out: list[str | None] = []
    for i in range(n):
        rng = np.random.default_rng(i)
        text = " ".join(rng.choice(WORDS, int(rng.integers(1, 22))))
        out.append(None if i % 9 == 8 else text)
    out[4], out[5] = f"a {MARKER} b", "fox " * 200
    return out


def store(path: Path, n_docs: int = 31, d: int = D, layers: tuple[int, ...] = (1,), shard_rows: int = 16) -> Store:
    given = {"model": {"name": "mini"}, "tokenizer": {"fingerprint": "f"}, "corpus": {"name": "letters"}}
    create_index(path, StoreSpec(d_model=d, layers=layers, shard_rows=shard_rows, **given), documents(n_docs))
    fill(path)
    n = Store.open(path).n_rows
    write_explanations(path, explanations(n), {"provider": "words"})
    return Store.open(path)


def digest(batch: dict[str, np.ndarray]) -> str:
    parts = [f"{k} {v.dtype} {v.shape} ".encode() + v.tobytes() for k, v in sorted(batch.items())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main(root: str, settings: str, state: str, n: int) -> None:
    """Prints the digests of the `n` batches after a state, in a process of its own."""
    tok = Tokenizer.from_dir(Path(root) / "tokenizer")
    loader = make_loader(Store.open(Path(root) / "store"), tokenizer=tok, sidecar=sidecar(tok), **json.loads(settings))
    loader.restore(json.loads(state))
    print(json.dumps([digest(next(loader)) for _ in range(n)]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
