"""Natural Language Autoencoders in JAX.

The names below are loaded on first use, so that ``import nla_jax`` and ``nla --help`` do not wait for jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nla_jax.hub import load_model
    from nla_jax.models.transformer import forward, residual
    from nla_jax.pair import NLA, Explanation

__version__ = "0.1.0"

__all__ = ["NLA", "Explanation", "__version__", "forward", "load_model", "residual"]

_HOME = {
    "NLA": "nla_jax.pair",
    "Explanation": "nla_jax.pair",
    "forward": "nla_jax.models.transformer",
    "load_model": "nla_jax.hub",
    "residual": "nla_jax.models.transformer",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value  # the next access does not come through here
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
