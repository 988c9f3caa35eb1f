"""Directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nla_jax.models.errors import InputError


def check_output_dir(path: str | Path, *, overwrite: bool = False) -> Path:
    """`path` if it may be written to: absent, empty, or `overwrite`; InputError otherwise."""
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file", expected="a directory to write to", fix="another name")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(
            f"{path} is not empty", expected="an empty or new directory", fix="--overwrite, or another name"
        )
    return path


@contextlib.contextmanager
def atomic_dir(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `path`, moved to `path` when the block ends and removed if it raises.

    With `overwrite`, the old directory stays until the new one is complete."""
    path = check_output_dir(path, overwrite=overwrite)
    # A link is followed: the directory it names is replaced, and the link stays.
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise InputError(
            f"cannot write to {path.parent} ({error.strerror})", fix="another place for the output"
        ) from None
    try:
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp makes it private
        yield temporary
        if path.is_dir() and any(path.iterdir()):
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error})", fix="check free space and permissions"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
