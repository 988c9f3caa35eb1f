"""Keys and values of tokens already read: a shared prefix of one row, and a per-row cache.

The prefix is what every row has in common (an AV prompt up to its marker); it is computed once per parameter update.
The cache holds each row's own tokens after the prefix, in slots; it is allocated once, carried through the decode
loop and updated in place, never passed as scanned inputs and outputs (that would copy it every step).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from nla_jax.models.config import ModelConfig
from nla_jax.models.sharding import constrain


@struct.dataclass
class Prefix:
    """Keys and values [L, K, P, H] of P tokens at positions 0..P-1, shared by all rows."""

    k: jax.Array
    v: jax.Array

    @property
    def length(self) -> int:
        return self.k.shape[2]


@struct.dataclass
class Cache:
    """Keys and values [L, B, K, S, H]; slot s of every row is the token at position prefix length + s.

    Heads stand before slots so that attention is a batch of plain matrix products."""

    k: jax.Array
    v: jax.Array

    @property
    def slots(self) -> int:
        return self.k.shape[3]


def empty_cache(cfg: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """A cache of `slots` tokens for each of `batch` rows, zeroed."""
    shape = (cfg.n_layers, batch, cfg.n_kv_heads, slots, cfg.head_dim)
    return on_devices(Cache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype)))


def repeat_rows(cache: Cache, samples: int, slots: int) -> Cache:
    """Each row `samples` times in a row, with room for `slots` tokens: a group's samples share one prefill."""
    L, B, K, S, H = cache.k.shape

    def grow(x: jax.Array) -> jax.Array:
        x = jnp.broadcast_to(x[:, :, None], (L, B, samples, K, S, H)).reshape(L, B * samples, K, S, H)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, slots - S), (0, 0)))

    return on_devices(Cache(k=grow(cache.k), v=grow(cache.v)))


def on_devices(cache: Cache) -> Cache:
    """The cache split over rows and, where the mesh divides them, heads."""
    k, v = (constrain(x, "layers", "rows", "kv_heads", None, None) for x in (cache.k, cache.v))
    return Cache(k=k, v=v)
