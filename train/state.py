"""What training one model carries from step to step, and the guarded update."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

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
    and its digits."""
    opt = make_optimizer(settings).init(cast(params, jnp.float32))
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, opt)


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
