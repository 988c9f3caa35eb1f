"""What training one model carries from step to step, the guarded update, and how a step is compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from nla_jax.models.sharding import mesh_of, on_its_mesh
from nla_jax.train.optimizer import make_optimizer, schedule
from nla_jax.train.settings import OptimizerSettings

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """`params` in the dtype they are kept in, `opt` the optimizer's moments (float32), `step` and `skipped` int32 [].

    `step` counts updates that were made, `skipped` those that were not."""

    step: jax.Array
    skipped: jax.Array
    params: Any
    opt: Any


def create(params: Any, settings: OptimizerSettings) -> TrainState:
    """A state at step 0. Moments are float32 also for bfloat16 parameters: a second moment needs its exponent range
    and its digits. They are made in the shards of their parameters."""
    mesh = mesh_of(params)
    if mesh is None:
        return _start(params, settings)
    beside = state_shardings(jax.eval_shape(lambda p: _start(p, settings), params), params)

    def rest(params: Any) -> tuple[jax.Array, jax.Array, Any]:
        state = _start(params, settings)
        return state.step, state.skipped, state.opt

    step, skipped, opt = jax.jit(rest, out_shardings=(beside.step, beside.skipped, beside.opt))(params)
    return TrainState(step, skipped, params, opt)


def _start(params: Any, settings: OptimizerSettings) -> TrainState:
    opt = make_optimizer(settings).init(cast(params, jnp.float32))
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, opt)


def state_shardings(state: Any, params: Any) -> Any:
    """The sharding of every leaf of a training state: what has the name and shape of a parameter lies like it, counts
    are whole everywhere. Both may be abstract."""
    mesh = mesh_of(params)
    assert mesh is not None
    known = {path: (leaf.shape, leaf.sharding) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def apply_gradients(state: TrainState, grads: Any, settings: OptimizerSettings) -> tuple[TrainState, Metrics]:
    """One update, or none where the gradient is not finite or its norm is over `settings.skip_above`.

    A finite loss can have a gradient that is not (TRAPS 9), hence the guard is on the gradient. A skipped step leaves
    parameters and moments as they were and is counted. Metrics: grad_norm (before clipping), lr, skipped (0 or 1).
    """
    grads = cast(grads, jnp.float32)
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & (norm <= settings.skip_above)
    params = cast(state.params, jnp.float32)
    # Zeros instead of what must not be used: NaN would get through `where` in the moments' arithmetic on some paths.
    safe = jax.tree.map(lambda g: jnp.where(good, g, 0.0), grads)
    updates, opt = make_optimizer(settings).update(safe, state.opt, params)
    new = jax.tree.map(lambda p, u, old: (p + u).astype(old.dtype), params, updates, state.params)

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)

    after = TrainState(
        step=state.step + good,
        skipped=state.skipped + ~good,
        params=keep(new, state.params),
        opt=keep(opt, state.opt),
    )
    lr = schedule(settings, settings.lr)(state.step)
    return after, {"grad_norm": norm, "lr": jnp.asarray(lr, jnp.float32), "skipped": (~good).astype(jnp.float32)}


def cast(tree: Any, dtype: Any) -> Any:
    """Floating-point leaves in `dtype`; differentiable."""
    dtype = jnp.dtype(dtype)
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def train_step(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles `fn(state, *batches, cfg=...) -> (state, metrics)`: the state is donated, and given back in the
    shardings it came in; metrics are whole on every device."""
    options: dict[str, Any] = {"static_argnames": ("cfg",), "donate_argnames": ("state",)}
    alone = jax.jit(fn, **options)

    @functools.lru_cache(maxsize=32)
    def sharded(structure: Any, shardings: tuple[Any, ...], metrics: NamedSharding) -> Any:
        out = jax.tree.unflatten(structure, shardings), metrics
        return jax.jit(fn, out_shardings=out, **options)

    def program(state: Any) -> Any:
        mesh = mesh_of(state)
        if mesh is None:
            return alone
        leaves, structure = jax.tree.flatten(state)
        return sharded(structure, tuple(x.sharding for x in leaves), NamedSharding(mesh, PartitionSpec()))

    @functools.wraps(fn)
    def step(state: Any, *batches: Any, **given: Any) -> Any:
        return program(state)(state, *batches, **given)

    # As `jax.jit`'s: of arguments that may be shapes alone, for the devices of their shardings.
    step.lower = lambda state, *batches, **given: program(state).lower(state, *batches, **given)  # type: ignore[attr-defined]
    step.trace = lambda state, *batches, **given: program(state).trace(state, *batches, **given)  # type: ignore[attr-defined]
    return on_its_mesh(step)
