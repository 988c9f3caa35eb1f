"""Several loaders that advance together: a step's activations, and the teacher pairs replayed beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_jax.errors import InputError
from nla_jax.loader import Batch, Loader


class JointLoader:
    """Batches {name: batch} of all loaders; `state()` and `restore()` are those of every one."""

    def __init__(self, loaders: Mapping[str, Loader]):
        self._loaders = dict(loaders)

    def __iter__(self) -> JointLoader:
        return self

    def __next__(self) -> dict[str, Batch]:
        return {name: next(loader) for name, loader in self._loaders.items()}

    def state(self) -> dict[str, Any]:
        return {name: loader.state() for name, loader in self._loaders.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self._loaders):
            expected, got = ", ".join(sorted(self._loaders)), ", ".join(sorted(map(str, state)))
            raise InputError("state of the loaders", expected=expected, got=got, fix="the settings of the first run")
        for name, loader in self._loaders.items():
            loader.restore(state[name])
