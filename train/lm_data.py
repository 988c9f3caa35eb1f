"""Rows of tokens for language-model training: documents packed into rows of one length, shuffled anew every epoch.

Batches are {"tokens", "segments", "positions"}: int32 [B, T] as `run_blocks` takes packed rows; segment 0 is padding.
A document longer than a row goes on in another one, without what came before.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import grain
import numpy as np

from nla_jax.corpus import Document, open_corpus, tokenize_document
from nla_jax.epochs import Plan
from nla_jax.errors import InputError
from nla_jax.packing import pack
from nla_jax.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
_FORMAT = "nla_jax.lm_rows 1"


def token_pieces(documents: Iterable[Document], tokenizer: Tokenizer, length: int) -> list[np.ndarray]:
    """int32 token ids of each document with its end of sequence, in pieces of at most `length` tokens."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    pieces = []
    for document in documents:
        ids = tokenize_document(document, tokenizer, sys.maxsize).ids
        ids = np.concatenate([ids, np.asarray(end, np.int32)]).astype(np.int32)
        pieces += [ids[a : a + length] for a in range(0, len(ids), length)]
    return [p for p in pieces if len(p) > 1]


class _Rows:
    """Random access to batches: a grain source."""

    def __init__(
        self,
        pieces: list[np.ndarray],
        rows: list[np.ndarray],
        length: int,
        batch_size: int,
        seed: int,
        share: np.ndarray | None = None,
    ):
        self.pieces, self.rows, self.length = pieces, rows, length
        self.share = np.arange(batch_size) if share is None else share
        self.plan = Plan(((length, np.arange(len(rows))),), batch_size, seed, drop=True)

    def __len__(self) -> int:
        return sys.maxsize

    def __repr__(self) -> str:
        return f"_Rows({len(self.rows)} of {self.length} tokens)"

    def __getitem__(self, number: int) -> Batch:
        items = self.plan.batch(int(number))[1][self.share]
        out = {name: np.zeros((len(items), self.length), np.int32) for name in ("tokens", "segments", "positions")}
        for b, item in enumerate(items):
            at = 0
            for v, piece in enumerate(self.rows[item]):
                ids = self.pieces[piece]
                end = at + len(ids)
                out["tokens"][b, at:end], out["segments"][b, at:end] = ids, v + 1
                out["positions"][b, at:end] = np.arange(len(ids))
                at = end
        return out


class LMLoader:
    """An endless iterator over batches; `state()` is where it stands, `restore(state)` goes there.

    `share`: the rows of each batch that are read here; None for all.
    Attributes: `batches_per_epoch`, `report` (documents' pieces, tokens, share of padding)."""

    def __init__(
        self,
        pieces: list[np.ndarray],
        *,
        length: int,
        batch_size: int,
        seed: int,
        prefetch: int = 4,
        share: np.ndarray | None = None,
    ):
        lengths = np.asarray([len(p) for p in pieces])
        if not len(lengths):
            raise InputError("corpus", expected="at least one document of two tokens", got="none")
        rows = pack(lengths, length, length)
        if len(rows) < batch_size:
            raise InputError("batch_size", expected=f"at most the {len(rows)} rows of the corpus", got=batch_size)
        source = _Rows(pieces, rows, length, batch_size, seed, share)
        self.batches_per_epoch = len(source.plan.batches)
        self.report = {
            "pieces": len(pieces),
            "tokens": int(lengths.sum()),
            "padding": 1 - int(lengths.sum()) / (len(rows) * length),
        }
        digest = hashlib.sha256(f"{_FORMAT} {length} {batch_size} {seed}".encode())
        for piece in pieces:
            digest.update(piece.tobytes())
        self._key = digest.hexdigest()[:16]
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        self._batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))

    def __iter__(self) -> LMLoader:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def state(self) -> dict[str, Any]:
        return {"data": self._key, "next_batch": self._batches.get_state()["next_index"]}

    def restore(self, state: Mapping[str, Any]) -> None:
        if state.get("data") != self._key or not isinstance(state.get("next_batch"), int):
            fix = "the corpus and settings of the first run"
            raise InputError("state of the loader", expected=f"of data {self._key}", got=repr(state)[:100], fix=fix)
        self._batches.set_state({"next_index": state["next_batch"]})


def documents_of(corpus: Iterable[str]) -> Iterable[Document]:
    """The documents of several files, directories or hub names, one after another."""
    for source in corpus:
        yield from open_corpus(source)
