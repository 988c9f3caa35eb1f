"""Where a run's arrays live: host arrays onto the mesh and back, each process its own rows.

Every process holds the rows that its devices need, and reads, tokenizes and parses those alone. Which ones they are
follows from the mesh; together they are the batch that one process would have, in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax.errors import InputError
from nla_jax.models import sharding
from nla_jax.models.config import ModelConfig
from nla_jax.models.sharding import MeshSettings, make_mesh, row_sharding, row_shards


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, or None for one device; the methods do the same for both."""

    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        """Into how many parts a batch is split."""
        return row_shards(self.mesh)

    def shardings(self, specs: Any, cfg: ModelConfig) -> Any:
        """Of a tree of `ParamSpec`s; None where there is one device."""
        return None if self.mesh is None else sharding.shardings(specs, cfg, self.mesh)

    def rows(self, n: int) -> np.ndarray:
        """The rows of a batch of `n` that this process holds, ascending."""
        return np.arange(n) if self.mesh is None else _rows(self.mesh, n)

    def put(self, batch: Any, n: int) -> Any:
        """Host arrays of this process's rows as arrays of all `n` rows on the devices."""
        if self.mesh is None:
            return jax.device_put(batch)
        rows = row_sharding(self.mesh, n)

        def one(x: Any) -> jax.Array:
            x = np.asarray(x)
            return jax.make_array_from_process_local_data(rows, x, (n, *x.shape[1:]))

        return jax.tree.map(one, batch)

    def put_whole(self, batch: Any) -> Any:
        """Host arrays that every process has in full, onto the devices."""
        return self.put(jax.tree.map(lambda x: np.asarray(x)[self.rows(len(x))], batch), len(jax.tree.leaves(batch)[0]))

    def local(self, tree: Any) -> Any:
        """This process's rows of device arrays, on the host."""
        if self.mesh is None or jax.process_count() == 1:
            return jax.device_get(tree)
        return jax.tree.map(_local_rows, tree)

    def whole(self, tree: Any) -> Any:
        """Device arrays on the host, in every process."""
        if self.mesh is None or jax.process_count() == 1:
            return jax.device_get(tree)
        return jax.device_get(_replicate(self.mesh)(tree))

    def spread(self, rows: int, accumulate: int, key: str) -> None:
        """InputError unless a step's rows can be split over the mesh, in micro-batches too."""
        parts = self.shards * accumulate
        if rows % parts:
            split = f"{self.shards} shards of the mesh" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")
            fix = f"a multiple, or --config.mesh.data and --config.mesh.fsdp whose product divides {rows // accumulate}"
            raise InputError(key, expected=f"{rows} samples of a step to be split over {split}", got=rows, fix=fix)


ONE_DEVICE = Layout()


def make_layout(settings: MeshSettings) -> Layout:
    """The layout of a run on all devices of all processes."""
    return Layout(make_mesh(settings))


@functools.lru_cache(maxsize=64)
def _rows(mesh: Mesh, n: int) -> np.ndarray:
    held = row_sharding(mesh, n).addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[index] for index in held if index is not None]))


def _local_rows(x: jax.Array) -> np.ndarray:
    """Of an array that is split over its rows alone."""
    parts = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start].data) for start in sorted(parts)])


@functools.lru_cache(maxsize=8)
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
