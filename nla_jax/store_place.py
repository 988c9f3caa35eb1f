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
_LOCK = ".lock"


@contextlib.contextmanager
def new_root(path: str | Path) -> Iterator[Root]:
    """Where a new store is written: a temporary directory beside `path`, or the URL itself.

    StoreError if something is there already. What a killed run left is removed first: temporary directories that
    no living process holds a lock on, and under a URL the parts of a store that has no manifest.
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
    remove_stale(target)
    with atomic_dir(target) as temporary:
        with locked(temporary):
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
def locked(temporary: Path) -> Iterator[None]:
    """Marks a temporary directory as in use while the process lives; the mark is gone before it is moved."""
    with open(temporary / _LOCK, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
        os.unlink(temporary / _LOCK)


def remove_stale(target: Path) -> None:
    """Removes what killed runs left beside `target`: temporary directories that no living process holds a lock on."""
    for left in target.parent.glob(f".{target.name}.*.tmp") if target.parent.is_dir() else ():
        with contextlib.suppress(OSError):
            with open(left / _LOCK) as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
    if target.is_dir():  # it was replaced: what it replaced is of no use
        for left in target.parent.glob(f".{target.name}.*.old"):
            shutil.rmtree(left, ignore_errors=True)
