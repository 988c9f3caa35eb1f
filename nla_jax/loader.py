"""Batches of training examples from an activation store, through grain.

What batch i of a run holds is decided beforehand (epochs.py): prefetching threads cannot change it, one number is all
that has to be saved to go on bit-exactly, and all processes give the same bucket to the same step, each reading its
own share of the batch. Training on 1, 2 or 4 processes sees the same batches.

Vectors are read batch by batch, one TensorStore read each, and never kept; what grows with the rows is some 50 bytes
of numbers each. Threads read ahead, not processes: TensorStore does not survive a fork, and it releases the
interpreter while it reads.

Every batch is a dictionary of numpy arrays, b rows of it (`batch_size` / `processes`):

* all kinds: `vectors` float32 [b, D] raw; `row` int64 [b] and `doc` int32 [b] of the store; `valid` bool [b].
  A row that is not valid fills up an epoch's last batch: a copy of another with `row` and `doc` -1.
* av_sft: `tokens` int32 [b, T], the AV prompt from its marker on (so the marker is token 0; what stands before it is
  `loader.prompt`'s), then the response; `lengths` int32 [b]; `loss_mask` bool [b, T], True at the response and its
  end-of-turn token. The logits at t - 1 are to predict the token at t.
* ar_sft: `tokens` int32 [b, T] and `lengths` int32 [b]; the vector is predicted at token lengths - 1.
* packed: `tokens` [b, T] hold up to V samples, `segments` [b, T] their numbers from 1 (0 is padding) and `positions`
  [b, T] for `run_blocks`, the AV's counting its prefix. `vectors` [b, V, D], `row`, `doc`, `valid` [b, V]; for the AV
  `markers` [b, V], -1 for none, and `loss_mask`; for the AR `last` [b, V], where the vector is predicted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from nla_jax.epochs import Plan, bucket_groups, permutation
from nla_jax.errors import InputError
from nla_jax.examples import KINDS, Examples, Progress, make_examples
from nla_jax.packing import pack as pack_rows
from nla_jax.prompt import AVPrompt
from nla_jax.sidecar import Sidecar
from nla_jax.store import Store
from nla_jax.tokenizer import Tokenizer

BUCKETS = (96, 128, 160, 192, 256, 384)
Batch = dict[str, np.ndarray]
_STATE = {"format": "nla_jax.loader", "version": 1}


def make_loader(
    store: Store,
    rows: np.ndarray | None = None,
    *,
    kind: str,
    batch_size: int,
    tokenizer: Tokenizer | None = None,
    sidecar: Sidecar | None = None,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
    share: np.ndarray | None = None,
    buckets: Sequence[int] = BUCKETS,
    epochs: int | None = None,
    pack: bool = False,
    drop_remainder: bool = False,
    prefetch: int = 4,
    threads: int = 2,
    cache: str | Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Loader:
    """An iterator over the batches of `rows` (by default those of the split called `kind`).

    `kind`: "av_sft", "ar_sft" (both need a tokenizer and a sidecar) or "rl". `batch_size` counts the rows of one step
    over all `processes`, of which this is number `process`; or `share` are the rows of each batch that are read here,
    which may be any. `buckets`: lengths in tokens that batches are padded to;
    examples longer than the last are dropped and counted in `loader.report`. `epochs`: None never ends. `pack` puts
    several samples into rows of the last bucket's length. `prefetch` batches are read ahead by `threads` threads.
    `cache` and `progress`: of tokenizing (see `make_examples`).

    Every example comes once per epoch. The last batch, when it is not full, is filled up with rows that are not
    `valid`, or left out with `drop_remainder`. InputError for settings that make no sense, or when nothing is left.
    """
    sizes = _check(batch_size, process, processes, buckets, kind, pack, epochs)
    if sidecar is not None and sidecar.d_model != store.d_model:
        fix = "the sidecar of a pair for this store's model"
        raise InputError("sidecar: d_model", expected=f"{store.d_model}, as {store.path}", got=sidecar.d_model, fix=fix)
    if rows is None and len(store.layers) > 1:
        got = f"a store of layers {', '.join(map(str, store.layers))}"
        raise InputError("rows", expected="those of one layer", got=got, fix="open_build(store).rows(kind)")
    # Ascending, so that what one batch reads lies close together, and that their order here does not matter.
    rows = np.sort(store.rows_of(kind) if rows is None else np.asarray(rows, np.int64))
    examples = make_examples(
        store, rows, kind, tokenizer=tokenizer, sidecar=sidecar, longest=sizes[-1], cache=cache, progress=progress
    )
    n = len(examples.rows)
    if not n:
        got = ", ".join(f"{count} {reason}" for reason, count in examples.dropped.items()) or "no rows"
        raise InputError(f"{store.path}: no {kind} examples", expected="at least one", got=got, fix="nla data info")
    packs: list[np.ndarray] = []
    groups: tuple[tuple[int, np.ndarray], ...] = ((0, np.arange(n)),)
    if pack:
        order = permutation(n, seed, 0, "packs")
        most = math.ceil(sizes[-1] / examples.lengths.mean()) + 1
        packs = [order[members] for members in pack_rows(examples.lengths[order], sizes[-1], most)]
        groups = ((sizes[-1], np.arange(len(packs))),)
    elif kind != "rl":
        groups = bucket_groups(examples.lengths, sizes, batch_size, drop_remainder)
    plan = Plan(groups, batch_size, seed, drop_remainder)
    if not len(plan.batches):
        raise InputError("drop_remainder", expected=f"at least {batch_size} rows", got=len(packs) or n)
    pad = 0 if tokenizer is None or tokenizer.pad_id is None else tokenizer.pad_id
    if share is None:
        own = batch_size // processes
        share = np.arange(process * own, (process + 1) * own)
    batches = Batches(store, examples, packs, plan, share, pad, epochs)
    return Loader(batches, threads, prefetch)


def _check(
    batch_size: int, process: int, processes: int, buckets: Sequence[int], kind: str, pack: bool, epochs: int | None
) -> tuple[int, ...]:
    """The buckets, ascending; InputError for settings that make no sense together."""
    if kind not in KINDS:
        raise InputError("kind of batches", expected=" or ".join(KINDS), got=repr(kind))
    if processes < 1 or not 0 <= process < processes:
        raise InputError("process", expected=f"0 to {processes - 1}", got=process)
    if batch_size < 1 or batch_size % processes:
        raise InputError("batch_size", expected=f"a multiple of the {processes} processes", got=batch_size)
    if not buckets or min(buckets) < 1:
        raise InputError("buckets", expected="lengths in tokens", got=list(buckets))
    if pack and kind == "rl":
        raise InputError("pack", expected="av_sft or ar_sft, which have tokens", got=kind)
    if epochs is not None and epochs < 1:
        raise InputError("epochs", expected="at least 1, or None for no end", got=epochs)
    return tuple(sorted(set(buckets)))


class Batches:
    """Random access to the batches of a run: a grain source. `share` are the rows of a batch that this process reads.

    Reading is pure and safe from several threads."""

    def __init__(
        self,
        store: Store,
        examples: Examples,
        packs: list[np.ndarray],
        plan: Plan,
        share: np.ndarray,
        pad_id: int,
        epochs: int | None,
    ):
        self.store, self.examples, self.packs, self.plan, self.share = store, examples, packs, plan, share
        self.pad_id, self.epochs = pad_id, epochs
        self.width = max(map(len, packs), default=0)  # V, samples per packed row at most

    def __repr__(self) -> str:
        return f"Batches({self.examples.kind}, {len(self.examples.rows)} rows)"

    def __len__(self) -> int:
        return sys.maxsize if self.epochs is None else self.epochs * len(self.plan.batches)

    def __getitem__(self, number: int) -> Batch:
        size, items = self.plan.batch(int(number))
        first, items = items[0], items[self.share]
        return self._packed(size, items) if self.packs else self._plain(size, items, first)

    def _plain(self, size: int, items: np.ndarray, first: int) -> Batch:
        valid = items >= 0
        # What fills up is a copy, not zeros: the direction of a vector of zeros is not a number.
        items = np.where(valid, items, first)
        batch = {"vectors": self.store.vectors(self.examples.rows[items]), **self._origin(items, valid)}
        if self.examples.kind == "rl":
            return batch
        lengths = self.examples.lengths[items]
        tokens = np.full((len(items), size), self.pad_id, np.int32)
        for line, item in zip(tokens, items, strict=True):
            ids = self.examples.tokens(item)
            line[: len(ids)] = ids
        batch.update(tokens=tokens, lengths=lengths)
        if self.examples.prompt is not None:
            at = np.arange(size)[None]
            batch["loss_mask"] = (at >= self._unscored) & (at < lengths[:, None]) & valid[:, None]
        return batch

    def _packed(self, size: int, rows: np.ndarray) -> Batch:
        """Rows of packed samples; one of -1 is the first pack's, with nothing valid in it."""
        shape = (len(rows), self.width)
        items, starts, valid = np.zeros(shape, np.int64), np.full(shape, -1, np.int32), np.zeros(shape, bool)
        tokens = np.full((len(rows), size), self.pad_id, np.int32)
        segments, positions, scored = np.zeros_like(tokens), np.zeros_like(tokens), np.zeros(tokens.shape, bool)
        prompt = self.examples.prompt
        for b, row in enumerate(rows):
            members = self.packs[max(row, 0)]
            items[b] = members[0]
            if row < 0:
                continue
            items[b, : len(members)], valid[b, : len(members)] = members, True
            at = 0
            for v, item in enumerate(members):
                ids = self.examples.tokens(item)
                end = at + len(ids)
                tokens[b, at:end], segments[b, at:end], starts[b, v] = ids, v + 1, at
                positions[b, at:end] = np.arange(len(ids)) + (0 if prompt is None else prompt.marker)
                scored[b, at + self._unscored : end] = True
                at = end
        # One read, in ascending order, of what may come several times.
        unique, place = np.unique(items, return_inverse=True)
        vectors = self.store.vectors(self.examples.rows[unique])[place.reshape(shape)]
        batch = {"vectors": vectors, **self._origin(items, valid)}
        batch.update(tokens=tokens, segments=segments, positions=positions)
        if prompt is None:
            batch["last"] = np.where(valid, starts + self.examples.lengths[items] - 1, 0).astype(np.int32)
        else:
            batch.update(markers=starts, loss_mask=scored)
        return batch

    def _origin(self, items: np.ndarray, valid: np.ndarray) -> Batch:
        row, doc = self.examples.rows[items], self.examples.docs[items]
        return {"row": np.where(valid, row, -1), "doc": np.where(valid, doc, -1).astype(np.int32), "valid": valid}

    @functools.cached_property
    def _unscored(self) -> int:
        """Tokens at the beginning of an AV example that are prompt."""
        prompt = self.examples.prompt
        return 0 if prompt is None else len(prompt.ids) - prompt.marker

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides the batches, but for the share of this process and the number of epochs."""
        e, plan = self.examples, self.plan
        digest = hashlib.sha256()
        sizes = [(size, len(items)) for size, items in plan.groups]
        settings = [e.kind, e.sha256, self.store.manifest["hash"], sizes, plan.batch_size, plan.seed, plan.drop]
        digest.update(json.dumps([*settings, len(self.packs), self.pad_id]).encode())
        for array in (e.rows, e.lengths):
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]


class Loader(grain.DatasetIterator):
    """Iterates over batches; `state()` is where it stands, `restore(state)` goes there.

    A grain iterator, so that `grain.checkpoint.CheckpointSave(loader)` stores it in an Orbax checkpoint; its state is a
    small dictionary of JSON values, the same in all processes, which may be restored on another number of them.
    Attributes: `report` (rows given, used, dropped by reason, batches per epoch, share of tokens that is padding,
    batches by length), `prompt` (the AV's, else None), `batches_per_epoch`.
    """

    def __init__(self, batches: Batches, threads: int, prefetch: int):
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        super().__init__(iter(grain.MapDataset.source(batches).to_iter_dataset(options)))
        self._batches = batches
        self.batches_per_epoch: int = len(batches.plan.batches)
        self.prompt: AVPrompt | None = batches.examples.prompt

    def __repr__(self) -> str:
        return f"Loader({self._batches!r}, {self.batches_per_epoch} batches per epoch, next {self._number})"

    def __next__(self) -> Batch:
        number = self._number
        try:
            return next(self._parent)
        except StopIteration:
            raise
        except Exception:
            self._parent.set_state({"next_index": number})  # asked again, it tries the same batch again
            raise

    @property
    def _number(self) -> int:
        return self._parent.get_state()["next_index"]

    @property
    def epoch(self) -> int:
        """Epochs that have been gone through completely."""
        return self._number // self.batches_per_epoch

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        plan, examples = self._batches.plan, self._batches.examples
        shapes = {size: 0 for size, _ in plan.groups}
        for group, _ in plan.batches:
            shapes[plan.groups[group][0]] += 1
        report: dict[str, Any] = {
            "rows": len(examples.rows) + sum(examples.dropped.values()),
            "used": len(examples.rows),
            "dropped": examples.dropped,
            "batches_per_epoch": self.batches_per_epoch,
        }
        if examples.kind != "rl":
            room = plan.batch_size * sum(size * n for size, n in shapes.items())
            report.update(padding=1 - int(examples.lengths.sum()) / room, batches_by_length=shapes)
        return report

    def state(self) -> dict[str, Any]:
        """Where the next batch is, and of what data; JSON values, about 100 bytes."""
        return {**_STATE, "data": self._batches.fingerprint, "next_batch": self._number}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on after the batch that `state` was taken after; InputError if it is of other data or settings."""
        if {k: state.get(k) for k in _STATE} != _STATE or not isinstance(state.get("next_batch"), int):
            raise InputError("state of a loader", expected=f"{_STATE} and next_batch", got=repr(state)[:100])
        if state.get("data") != self._batches.fingerprint:
            fix = "the rows, explanations, tokenizer, seed, batch size, buckets and packing of the run that is resumed"
            got = state.get("data")
            raise InputError("state of another loader", expected=self._batches.fingerprint, got=got, fix=fix)
        number = state["next_batch"]
        if not 0 <= number <= len(self._batches):
            raise InputError("state of a loader: next_batch", expected=f"0 to {len(self._batches)}", got=number)
        self._parent.set_state({"next_index": number})

    get_state = state

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.restore(state)
