"""Log-probabilities of given tokens without ever holding [tokens, V]: vocabularies are 128k to 262k wide."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import unembed
from nla_jax.models.params import Params
from nla_jax.models.sharding import constrain, row_shards
from nla_jax.train.state import cast


def token_logprobs(
    params: Params, x_BxTxD: jax.Array, targets_BxT: jax.Array, cfg: ModelConfig, *, chunk: int = 1024
) -> jax.Array:
    """Log-probability float32 [B, T] of each target under the logits of the stream `x` (before the final norm).

    Some `chunk` tokens are projected at a time on each device, and projected again in the backward pass, but for a
    single chunk: the backward pass begins with its logits, and keeping them holds no more than making them. The chunks
    go along T, so that a batch sharded over B stays where it is; under a mesh each gathers the projection, so that few
    large ones cost least."""
    B, T, D = x_BxTxD.shape
    size = min(max(chunk * row_shards(jax.sharding.get_abstract_mesh()) // B, 1), T)
    pad = -T % size

    def chunks(y: jax.Array) -> jax.Array:
        y = jnp.pad(y, ((0, 0), (0, pad)) + ((0, 0),) * (y.ndim - 2))
        return jnp.moveaxis(y.reshape(B, (T + pad) // size, size, *y.shape[2:]), 1, 0)

    def one(params: Params, x: jax.Array, targets: jax.Array) -> jax.Array:
        logits = constrain(unembed(params, x, cfg), "rows", None, "vocab")
        chosen = jnp.take_along_axis(logits, targets[:, :, None], axis=-1)[:, :, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    if size == T:
        return one(params, x_BxTxD, targets_BxT)
    # What the chunks share gets the sum of their gradients, in its own dtype: hundreds of terms are float32's to add.
    shared: Any = params
    wide = cast(shared.replace(layers=None), jnp.float32)
    narrow = functools.partial(cast, dtype=x_BxTxD.dtype)
    xs = chunks(x_BxTxD), chunks(targets_BxT)
    again = jax.checkpoint(one)
    _, out = jax.lax.scan(lambda _, xs: (None, again(narrow(wide), *xs)), None, xs)
    return jnp.moveaxis(out, 0, 1).reshape(B, T + pad)[:, :T]
