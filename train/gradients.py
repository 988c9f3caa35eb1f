"""A batch in micro-batches: its gradients, with the shared prompt prefix run once per step, or only what is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Batch = dict[str, Any]  # arrays by name; a batch may hold another one (replayed rows)
# loss(params, prefix, micro-batch) -> (its share of the whole batch's loss, what to report: scalars are summed over
# micro-batches, arrays are of their rows)
Loss = Callable[[Any, Any, Batch], tuple[jax.Array, dict[str, jax.Array]]]


def gradients(
    loss: Loss, params: Any, batch: Batch, *, accumulate: int = 1, prefix: Callable[[Any], Any] = lambda params: None
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """(loss, what it reports, gradient) of a batch whose rows are split into `accumulate` micro-batches.

    `loss` gives each micro-batch's *share* (its sum over the whole batch's count), so shares, sums and gradients add
    up to the whole batch's. `prefix(params)` are the keys and values that every row attends to: they are computed
    once, every micro-batch adds to their gradient, and that is pulled back through the prefix once at the end.
    Micro-batches are summed in float32, whatever the dtype of the parameters: a bfloat16 sum stops growing at a few
    hundred terms.
    """
    shared, pull = jax.vjp(prefix, params)
    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    if accumulate == 1:
        (total, told), (g_params, g_shared) = grad(params, shared, batch)
    else:
        micro = _split(batch, accumulate)
        first = jax.tree.map(lambda x: x[0], micro)
        zero = jax.tree.map(
            lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)),
            jax.eval_shape(lambda *args: _summed(grad(*args))[0], params, shared, first),
        )

        def add(carry: Any, one: Batch) -> tuple[Any, dict[str, jax.Array]]:
            found, of_rows = _summed(grad(params, shared, one))
            return jax.tree.map(jnp.add, carry, found), of_rows

        ((total, sums), (g_params, g_shared)), of_rows = jax.lax.scan(add, zero, micro)
        told = {**sums, **_joined(of_rows)}
    g_shared = jax.tree.map(lambda g, x: g.astype(x.dtype), g_shared, shared)
    return total, told, jax.tree.map(jnp.add, g_params, pull(g_shared)[0])


def _summed(found: Any) -> tuple[Any, dict[str, jax.Array]]:
    """What `value_and_grad` of a loss gives, without what it reports of rows, and that."""
    (value, told), grads = found
    of_rows = {name: x for name, x in told.items() if x.ndim}
    return ((value, {name: x for name, x in told.items() if not x.ndim}), grads), of_rows


def in_micro_batches(read: Callable[[Batch], Any], batch: Batch, parts: int) -> Any:
    """`read(batch)`, arrays whose rows are the batch's, computed in so many parts one after another: what it holds
    beside its results is that of one of them, as in `gradients`."""
    if parts == 1:
        return read(batch)
    return _joined(jax.lax.map(read, _split(batch, parts)))


def _split(batch: Batch, accumulate: int) -> Batch:
    """Row i * accumulate + j goes to micro-batch j: a batch sharded over its rows stays where it is."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), batch)


def _joined(parts: Any) -> Any:
    """Arrays [parts, rows of one, ...] with the batch's rows as they were before `_split`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)
