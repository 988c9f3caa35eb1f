"""One tensor at a time between host and devices, where a stack of them may be split over several processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nla_jax.models.lora import row_of


def put(tensor: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """A host array, which every process has in full, onto the devices."""
    if sharding is None:
        return jax.device_put(tensor)
    return jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index])


def of_row(sharding: NamedSharding | None) -> NamedSharding | None:
    """A stacked array's sharding without its leading axis."""
    if sharding is None:
        return None
    if sharding.spec and sharding.spec[0] is not None:
        raise ValueError(f"the leading (layers) axis must be unsharded, got {sharding.spec}")
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


@functools.lru_cache
def placer(sharding: NamedSharding | None) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
    """Writes a row of a stacked array in place: the array is donated."""

    def place(stack: jax.Array, row: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, row, layer, 0)

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


def on_host(array: Any) -> np.ndarray:
    """The whole array; every process that holds a part of it has to ask for it."""
    whole = _whole(array)
    return np.asarray(array if whole is None else _gather(whole)(array))


def row_on_host(stack: Any, row: int) -> np.ndarray:
    """One row of a stacked array, likewise, as `models.lora.row_of` gives it."""
    if isinstance(stack, np.ndarray):
        return stack[row]
    return np.asarray(_row(_whole(jax.tree.leaves(stack)[0]))(stack, np.int32(row)))


def _whole(array: Any) -> NamedSharding | None:
    """Where a whole copy of an array goes that is split over processes; None for any other, which can be fetched."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or array.is_fully_addressable:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec())


@functools.lru_cache
def _gather(whole: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=whole)


@functools.lru_cache
def _row(whole: NamedSharding | None) -> Callable[[jax.Array, Any], jax.Array]:
    return jax.jit(row_of, out_shardings=whole)
