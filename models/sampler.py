"""Autoregressive decoding from a prefilled cache: one loop, the cache carried in place.

Every row draws with its own key, so a row's tokens depend on its key and its prompt, not on the batch it ran in.
Sampling is greedy at temperature 0, else a plain softmax sample: no top-k or top-p, so that the returned
log-probabilities are those of the distribution that was sampled from (at temperature 1).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from nla_jax.models.cache import Cache, Prefix, on_devices
from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import embed, unembed
from nla_jax.models.params import Params
from nla_jax.models.sharding import constrain, constrain_rows
from nla_jax.models.transformer import run_blocks

_CHUNK = 512  # tokens of the vocabulary summed at a time when sampling


@struct.dataclass
class Samples:
    """R sampled tokens for each of B rows.

    tokens:   int32 [B, R]; after a row's end, 0.
    logprobs: float32 [B, R], the model's own (temperature 1) log-probability of each token; 0 after the end.
    lengths:  int32 [B], tokens up to and including the stop token.
    stopped:  bool [B]; True where a stop token was drawn ("stop"), False where the length cap cut the row ("length").
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    stopped: jax.Array


def row_keys(seed: int | jax.Array, ids_B: jax.Array, samples: int) -> jax.Array:
    """Keys [B * samples] from a seed, a 32-bit identity per row, and the sample number."""

    def one(row_id: jax.Array, sample: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row_id), sample)

    grid = jax.vmap(lambda i: jax.vmap(lambda g: one(i, g))(jnp.arange(samples, dtype=jnp.uint32)))
    return grid(jnp.asarray(ids_B, jnp.uint32)).reshape(-1)


def draw(
    logits_BxV: jax.Array, keys_B: jax.Array, step: jax.Array | int, temperature: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """One token per row and its temperature-1 log-probability. Temperature 0 takes the largest logit."""
    # Each row whole on one device: cumulative sums over a vocabulary that is split are slow and change its order. Split
    # first, as the products gave them, or the compiler gathers the whole vocabulary's matrix in every step instead.
    logits_BxV = constrain(constrain(logits_BxV, "rows", "vocab"), "every", None)
    keys_B = constrain(keys_B, "every")
    # Relative to the largest: large logits would otherwise swallow the digits of the log-probabilities.
    logits_BxV = logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True)
    uniform_B = jax.vmap(lambda k: 1.0 - jax.random.uniform(jax.random.fold_in(k, step)))(keys_B)  # in (0, 1]
    tokens = jax.lax.cond(
        jnp.asarray(temperature) > 0,
        lambda: _invert_cdf(logits_BxV / jnp.maximum(temperature, 1e-6), uniform_B),
        lambda: jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32),
    )
    chosen = jnp.take_along_axis(logits_BxV, tokens[:, None], axis=-1)[:, 0]
    return constrain(tokens, "rows"), constrain(chosen - jax.nn.logsumexp(logits_BxV, axis=-1), "rows")


def _invert_cdf(logits_BxV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The token at which the cumulative softmax reaches u: one random number per row instead of one per logit.

    Two levels (chunks of the vocabulary, then tokens of one chunk) keep the sums short, hence exact to float32
    rounding, and cheap for vocabularies of 100k to 260k."""
    B, V = logits_BxV.shape
    mass = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))
    mass = jnp.pad(mass, ((0, 0), (0, -V % _CHUNK))).reshape(B, -1, _CHUNK)
    chunk_cdf = jnp.cumsum(jnp.sum(mass, axis=-1), axis=-1)
    target = uniform_B * chunk_cdf[:, -1]
    chunk = jnp.argmax(chunk_cdf >= target[:, None], axis=-1)
    inside = jnp.cumsum(jnp.take_along_axis(mass, chunk[:, None, None], axis=1)[:, 0], axis=-1)
    before = jnp.take_along_axis(chunk_cdf, jnp.maximum(chunk - 1, 0)[:, None], axis=1)[:, 0]
    rest = target - jnp.where(chunk > 0, before, 0.0)
    # Rounding may leave a little more to reach than the chunk holds, or nothing: stay on tokens that have mass.
    rest = jnp.clip(rest, jnp.finfo(jnp.float32).tiny, inside[:, -1])
    return (chunk * _CHUNK + jnp.argmax(inside >= rest[:, None], axis=-1)).astype(jnp.int32)


def decode(
    params: Params,
    prefix: Prefix | None,
    cache: Cache,
    start: int,
    logits_BxV: jax.Array,
    keys_B: jax.Array,
    temperature: jax.Array | float,
    *,
    cfg: ModelConfig,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
) -> Samples:
    """Samples up to `max_new_tokens` per row, starting from the logits of the last prompt token.

    `cache` holds the prompt's own tokens in slots 0..start-1 and room for the new ones. To be compiled together with
    what fills it: as an argument of its own program it has the layout of arguments, of which the loop makes a copy in
    its own (compiled for TPU v5p, a rollout of Gemma-3-12B needs 22.4 GiB of a chip in one program, 37.4 in two).
    The loop ends when every row has drawn a stop token or the cap is reached.
    """
    B = logits_BxV.shape[0]
    assert cache.slots >= max_new_tokens, (cache.slots, max_new_tokens)
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)
    cache, keys_B = on_devices(cache), constrain(keys_B, "rows")

    token, logprob = draw(logits_BxV, keys_B, 0, temperature)

    def is_stop(token_B: jax.Array) -> jax.Array:
        return jnp.any(token_B[:, None] == stops[None, :], axis=-1)

    def more(state):
        step, done = state[0], state[2]
        return (step < max_new_tokens) & ~jnp.all(done)

    def body(state):
        step, token, done, cache, tokens, logprobs, lengths = state
        x = embed(params, token[:, None], cfg)
        x, cache, _ = run_blocks(params, x, cfg, start=start + step - 1, prefix=prefix, cache=cache)
        new, logprob = draw(unembed(params, x, cfg)[:, 0], keys_B, step, temperature)
        live = ~done
        new = jnp.where(live, new, 0)
        tokens = jax.lax.dynamic_update_slice(tokens, new[:, None], (0, step))
        logprobs = jax.lax.dynamic_update_slice(logprobs, jnp.where(live, logprob, 0.0)[:, None], (0, step))
        return step + 1, new, done | (live & is_stop(new)), cache, tokens, logprobs, lengths + live

    state = (
        jnp.asarray(1, jnp.int32),
        token,
        is_stop(token),
        cache,
        jnp.zeros((B, max_new_tokens), jnp.int32).at[:, 0].set(token),
        jnp.zeros((B, max_new_tokens), jnp.float32).at[:, 0].set(logprob),
        jnp.ones((B,), jnp.int32),
    )
    _, _, done, _, tokens, logprobs, lengths = jax.lax.while_loop(more, body, state)
    return constrain_rows(Samples(tokens=tokens, logprobs=logprobs, lengths=lengths, stopped=done))
