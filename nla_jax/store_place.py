"""Where a new store is written, so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from nla_jax.arrays import Root
from nla_jax.errors import StoreError
from nla_jax.manifest import MANIFEST
from nla_jax.models.atomic import atomic_dir

_OWN = ("rows/", "docs/", "vectors/", "done/", "explanations/")  # what a store consists of, besides JSON files


@contextlib.contextmanager
def new_root(path: str | Path) -> Iterator[Root]:
    """Where a new store is written: a temporary directory beside `path`, or the URL itself.

    StoreError if something is there already. What a killed run left is removed first: its temporary directory, and
    under a URL the parts of a store that has no manifest.
    """
    root = Root(path)
    if root.local is None:
        if root.read(MANIFEST) is not None:
            raise StoreError(f"{path} holds a store already", expected="a new place", fix="another name")
        for prefix in _OWN:
            root.delete_below(prefix)
        yield root
        return
    target = root.local
    _require_free(target)
    with sole_writer(target), atomic_dir(target) as temporary:
        inside = Root(temporary)
        inside.path = root.path  # what errors are to name
        yield inside
        _require_free(target)


def _require_free(target: Path) -> None:
    if (target / MANIFEST).exists():
        fix = "another name; the same nla extract command again goes on with a store that is not finished"
        raise StoreError(f"{target} holds a store already", expected="an empty or new directory", fix=fix)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        got = "other files in it" if target.is_dir() else "a file"
        raise StoreError(f"{target}", expected="an empty or new directory", got=got, fix="another name")


@contextlib.contextmanager
def sole_writer(target: Path) -> Iterator[None]:
    """Makes this process the only one that writes `target` anew, and removes what killed ones left beside it.

    A lock file beside `target` says so while the process lives; StoreError if another living one holds it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.parent / f".{target.name}.lock"
    while True:
        file = open(lock, "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            fix = "waiting for it, or another name"
            raise StoreError(f"{target} is being written by another process", fix=fix) from None
        except OSError:
            break  # a file system without locks
        if os.fstat(file.fileno()).st_nlink:
            break
        file.close()  # its last holder removed it between our open and our lock
    try:
        _remove_leftovers(target)
        yield
        _remove_leftovers(target)
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        file.close()


def _remove_leftovers(target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    if target.is_dir():  # it was replaced: what it replaced is of no use
        for left in target.parent.glob(f".{target.name}.*.old"):
            shutil.rmtree(left, ignore_errors=True)
