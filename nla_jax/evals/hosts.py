"""What the processes of one evaluation do alone and tell each other: text work in shares, files by process 0.

All processes run the same suites in step, because the devices of all compute every batch. So nothing may happen in one
of them alone that changes what it does next: what one finds, or cannot do, all of them learn. In a process of its own
everything here is a plain call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from nla_jax import errors
from nla_jax.errors import InputError, NLAError

T = TypeVar("T")
_LEAST = 1 << 12  # bytes told at a time; by powers of two from here, so that few programs are compiled


def first() -> bool:
    """Whether this is the process that writes and talks."""
    return jax.process_index() == 0


def noted(note: Callable[[str], None]) -> Callable[[str], None]:
    """`note` in process 0; elsewhere one that says nothing."""
    return note if first() else lambda message: None


def by_first(do: Callable[[], T]) -> T:
    """What `do` gives in process 0, which alone calls it, in every process: what JSON can hold."""
    return _told(do if first() else None)[0]


def spread(do: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """`do` of each item, in their order, each by one of the processes: what JSON can hold."""
    count = jax.process_count()
    if count == 1:
        return [do(item) for item in items]
    mine = items[jax.process_index() :: count]
    parts = _told(lambda: [do(item) for item in mine])
    out: list[Any] = [None] * len(items)
    for i, part in enumerate(parts):
        out[i::count] = part
    return out


def agree(what: Callable[[], Mapping[str, Any]]) -> None:
    """InputError in every process unless `what` gives the same in all of them; not called where there is one."""
    if jax.process_count() == 1:
        return
    said = _told(lambda: dict(what()))
    for name in said[0]:
        values = [one[name] for one in said]
        if any(value != values[0] for value in values):
            got = "; ".join(f"{value} in process {i}" for i, value in enumerate(values))
            fix = "the same command on all hosts, with models and data that they share or have copies of"
            raise InputError(f"the processes differ in {name}", expected="the same in all", got=got, fix=fix)


def _told(do: Callable[[], Any] | None) -> list[Any]:
    """What `do` gives in each process, in every process; None where there is none. An NLAError of one, the first that
    has any, is raised in all of them."""
    if jax.process_count() == 1:
        assert do is not None
        return [do()]
    mine: dict[str, Any] = {"value": None}
    try:
        mine = {"value": None if do is None else do()}
    except NLAError as error:
        mine = {"error": [type(error).__name__, str(error)]}
    said = [json.loads(one) for one in _gathered(json.dumps(mine).encode())]
    for one in said:
        if "error" in one:
            kind, line = one["error"]
            raise getattr(errors, kind, NLAError)(line)
    return [one["value"] for one in said]


def _gathered(mine: bytes) -> list[bytes]:
    """The bytes of each process, in every process."""
    sizes = _all(np.asarray([len(mine)], np.int32))[:, 0]
    room = _LEAST
    while room < sizes.max():
        room *= 2
    padded = np.frombuffer(mine.ljust(room, b" "), np.uint8)
    return [row[:size].tobytes() for row, size in zip(_all(padded), sizes.tolist(), strict=True)]


def _all(mine: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.process_allgather(mine)).reshape(jax.process_count(), -1)
