"""Which examples make up which batch of an epoch, as a function of the seed and the examples' lengths alone."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Plan:
    """Items in groups, shuffled inside their group every epoch and cut into batches, which are shuffled too.

    An item is the number of an example, or of a row of packed ones. `groups` are (tokens, items): the length that a
    group's batches are padded to, and its items, a multiple of `batch_size` in all groups but the last. The batch
    that is not full is filled up with -1, or, with `drop`, left out (other items every epoch).
    """

    groups: tuple[tuple[int, np.ndarray], ...]
    batch_size: int
    seed: int
    drop: bool = False

    @functools.cached_property
    def batches(self) -> np.ndarray:
        """[batches per epoch, 2]: group, and number in the group, of all batches, before shuffling."""
        counts = [(len(items) if self.drop else len(items) + self.batch_size - 1) for _, items in self.groups]
        return np.array([(g, i) for g, n in enumerate(counts) for i in range(n // self.batch_size)]).reshape(-1, 2)

    @functools.cached_property
    def _epoch(self) -> Callable[[int], tuple[np.ndarray, list[np.ndarray]]]:
        return functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The order of an epoch's batches, and the shuffled items of every group."""
        order = permutation(len(self.batches), self.seed, epoch, "batches")
        groups = enumerate(self.groups)
        return order, [items[permutation(len(items), self.seed, epoch, f"group {g}")] for g, (_, items) in groups]

    def batch(self, number: int) -> tuple[int, np.ndarray]:
        """Tokens and items [batch_size] of a batch, counted over all epochs; items ascend, -1 at the end is none."""
        epoch, i = divmod(number, len(self.batches))
        order, groups = self._epoch(epoch)
        group, i = self.batches[order[i]]
        items = np.sort(groups[group][i * self.batch_size : (i + 1) * self.batch_size])
        missing = np.full(self.batch_size - len(items), -1)
        return self.groups[group][0], np.concatenate([items, missing])


def bucket_groups(
    lengths: np.ndarray, buckets: Sequence[int], batch_size: int, drop: bool = False
) -> tuple[tuple[int, np.ndarray], ...]:
    """`Plan.groups` of examples by length: each goes to the smallest bucket that holds it.

    The longest of a bucket that make no whole batch move up to the next one, so that a single batch of an epoch is
    not full, however many buckets there are. Where that one is to be left out (`drop`), its group has a whole batch
    as well if there are that many, so that what is left out differs from epoch to epoch."""
    sizes = np.asarray(buckets)
    bucket_of = np.searchsorted(sizes, lengths)
    groups: list[tuple[int, np.ndarray]] = []
    rest = np.empty(0, np.int64)

    def longest(items: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The others, and the `n` longest, both ascending."""
        by_length = items[np.argsort(lengths[items], kind="stable")]
        return np.sort(by_length[: len(items) - n]), np.sort(by_length[len(items) - n :])

    for b, size in enumerate(buckets):
        items = np.sort(np.concatenate([np.flatnonzero(bucket_of == b), rest]))
        stay, rest = longest(items, len(items) % batch_size)
        if len(stay):
            groups.append((int(size), stay))
    if len(rest):
        size = int(sizes[np.searchsorted(sizes, lengths[rest].max())])
        if groups and (drop or groups[-1][0] == size):
            width, items = groups.pop()
            stay, more = longest(items, len(items) if width == size else batch_size)
            rest = np.sort(np.concatenate([more, rest]))
            if len(stay):
                groups.append((width, stay))
        groups.append((size, rest))
    return tuple(groups)


def permutation(n: int, seed: int, epoch: int, what: str) -> np.ndarray:
    """Sorts raw 64-bit draws, the one stream that NumPy promises not to change between versions."""
    digest = hashlib.sha256(f"{seed}\0{epoch}\0{what}".encode()).digest()
    return np.argsort(np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(n), kind="stable")
