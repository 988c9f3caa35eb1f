"""The AV as functions over parameters: activation vectors in, sampled explanations (token ids) out.

The prompt is constant but for one vector. Keys and values of everything before the marker are computed once
(`av_prefix`), the few tokens from the marker on once per vector (`prefill`), and a vector's samples share that
prefill; only then does each sample cost its own tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from nla_jax.models.cache import Cache, Prefix, repeat_rows
from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import embed, unembed
from nla_jax.models.params import Params
from nla_jax.models.sampler import Samples, decode
from nla_jax.models.transformer import prefix_of, run_blocks
from nla_jax.prompt import AVPrompt

# Norm-matched addition happens after this block (0-based), as LoRA-based activation oracles were trained.
ADD_AFTER_BLOCK = 1


def rescale(vectors_NxD: jax.Array, norm: float) -> jax.Array:
    """Each row scaled to L2 norm `norm`, in float32 (zero rows stay zero): normalised *to* it, not divided by it."""
    v = vectors_NxD.astype(jnp.float32)
    return v * (norm / jnp.maximum(jnp.linalg.norm(v, axis=-1, keepdims=True), 1e-12))


def inject(x_NxTxD: jax.Array, vectors_NxD: jax.Array, *, marker: int, injection_scale: float) -> jax.Array:
    """Overwrites row `marker` of each sequence's embeddings with its vector at norm `injection_scale`.

    `x` is what enters block 0, after any embedding multiplier. A mask and `where` instead of an indexed update:
    it shards along any axis. Source: the reference's inject_at_marked_positions."""
    at = (jnp.arange(x_NxTxD.shape[1]) == marker)[None, :, None]
    return jnp.where(at, rescale(vectors_NxD, injection_scale).astype(x_NxTxD.dtype)[:, None, :], x_NxTxD)


def add_norm_matched(vectors_NxD: jax.Array, *, marker: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A `run_blocks` edit: after block 1, adds each vector at the marker, scaled to the stream's own norm there."""

    def edit(layer: jax.Array, x_NxTxD: jax.Array) -> jax.Array:
        size = jnp.linalg.norm(x_NxTxD[:, marker].astype(jnp.float32), axis=-1, keepdims=True)
        added = (rescale(vectors_NxD, 1.0) * size).astype(x_NxTxD.dtype)[:, None, :]
        here = (jnp.arange(x_NxTxD.shape[1]) == marker)[None, :, None] & (layer == ADD_AFTER_BLOCK)
        return jnp.where(here, x_NxTxD + added, x_NxTxD)

    return edit


def av_prefix(params: Params, prompt: AVPrompt, cfg: ModelConfig) -> Prefix | None:
    """Keys and values of the prompt before its marker; None where the marker is the first token."""
    return prefix_of(params, jnp.asarray(prompt.ids[: prompt.marker]), cfg) if prompt.marker else None


def prefill(
    params: Params,
    prefix: Prefix | None,
    vectors_NxD: jax.Array,
    prompt: AVPrompt,
    cfg: ModelConfig,
    *,
    injection_scale: float,
    mode: str = "replace",
) -> tuple[Cache, jax.Array]:
    """Reads the prompt from the marker on, once per vector: its keys and values, and the next token's logits [N, V]."""
    tail = jnp.asarray(prompt.ids[prompt.marker :])[None]
    x = jnp.broadcast_to(embed(params, tail, cfg), (vectors_NxD.shape[0], tail.shape[1], cfg.d_model))
    edit = None
    if mode == "replace":
        x = inject(x, vectors_NxD, marker=0, injection_scale=injection_scale)
    else:
        edit = add_norm_matched(vectors_NxD, marker=0)
    x, cache, _ = run_blocks(params, x, cfg, prefix=prefix, edit=edit, keep_kv=True)
    assert cache is not None
    return cache, unembed(params, x[:, -1:], cfg)[:, 0]


av_prefix_jit = functools.partial(jax.jit, static_argnames=("prompt", "cfg"))(av_prefix)


@functools.partial(
    jax.jit,
    static_argnames=("prompt", "cfg", "injection_scale", "mode", "samples", "max_new_tokens", "stop_ids"),
)
def sample_explanations(
    params: Params,
    prefix: Prefix | None,
    vectors_NxD: jax.Array,
    keys: jax.Array,
    *,
    prompt: AVPrompt,
    cfg: ModelConfig,
    injection_scale: float,
    mode: str = "replace",
    samples: int = 1,
    temperature: jax.Array | float = 1.0,
    max_new_tokens: int = 150,
    stop_ids: tuple[int, ...] = (),
) -> Samples:
    """Draws `samples` explanations per vector; row n * samples + g is sample g of vector n, drawn with `keys` there.

    `prefix` is `av_prefix(params, prompt, cfg)`: compute it once per parameter update and pass it to every batch.
    `vectors` are raw [N, D] activations; they are rescaled at injection. `keys` [N * samples] are typed PRNG keys
    (`models.sampler.row_keys`). The result is on device.
    """
    cache, logits = prefill(params, prefix, vectors_NxD, prompt, cfg, injection_scale=injection_scale, mode=mode)
    return decode(
        params,
        prefix,
        repeat_rows(cache, samples, cache.slots + max_new_tokens),
        len(prompt.ids) - prompt.marker,
        jnp.repeat(logits, samples, axis=0),
        keys,
        temperature,
        cfg=cfg,
        stop_ids=stop_ids,
        max_new_tokens=max_new_tokens,
    )
