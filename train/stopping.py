"""Being the only run on a directory, and being asked to stop."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from nla_jax.errors import InputError


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Holds the lock of a run's directory while the block runs; InputError if another process that lives holds it."""
    if jax.process_index() != 0:  # process 0 holds it for all processes of a run
        yield
        return
    with open(directory / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            fix = "waiting for it, or another directory"
            raise InputError(f"{directory} is being trained in by {holder}", fix=fix) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        # The file stays: removing it would let two runs hold locks of two files with one name.
        yield


class Asked(BaseException):
    """Raised by a signal where work may be broken off (see `Interrupt.breakable`). No Exception, so that only the loop
    catches it."""


class Interrupt:
    """Remembers SIGTERM and SIGINT while its block runs; a second one ends the process as if nothing handled it.

    With several processes JAX agrees among them on the step to stop at, and handles SIGTERM itself."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._breakable = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ():
            with contextlib.suppress(ValueError):  # not in the main thread: whoever is there handles them
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        self._restore()  # nothing is printed here: the signal may have come in the middle of printing
        if self._breakable:
            raise Asked

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """A block that changes nothing and may take long: a signal leaves it at once, through `Asked`."""
        if self.signal is not None:
            raise Asked
        self._breakable = jax.process_count() == 1  # the others would be left waiting for this one
        try:
            yield
        finally:
            self._breakable = False

    def asked(self, step: int) -> bool:
        """Whether to stop now; all processes are given the same answer."""
        if jax.process_count() > 1:
            if multihost_utils.reached_preemption_sync_point(step):
                self.signal = "SIGTERM"
        return self.signal is not None
