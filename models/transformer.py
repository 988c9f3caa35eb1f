"""embed -> blocks -> residual stream or logits, with an optional shared prefix and key/value cache.

All blocks run in one `lax.scan` over the stacked parameters: one compiled body whatever the depth, and a trunk of n
blocks costs n blocks. Block-to-block differences (window, rotary table) are
small scanned arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.models.attention import AttnSpec, attend
from nla_jax.models.cache import Cache, Prefix
from nla_jax.models.config import ModelConfig
from nla_jax.models.errors import InputError
from nla_jax.models.layers import apply_rope, embed, gated, linear, rms_norm, rope_tables, unembed
from nla_jax.models.lora import is_adapted, row_of
from nla_jax.models.params import Layers, Params
from nla_jax.models.sharding import constrain


def forward(params: Params, tokens_BxT: jax.Array, cfg: ModelConfig) -> jax.Array:
    """Logits float32 [B, T, V] of right-padded token ids; padding after a row's end cannot change earlier logits."""
    x = run_blocks(params, embed(params, jnp.asarray(tokens_BxT), cfg), cfg)[0]
    return unembed(params, x, cfg)


def residual(params: Params, tokens_BxT: jax.Array, cfg: ModelConfig, layer: int) -> jax.Array:
    """The residual stream [B, T, D] after block `layer` (0-based; Hugging Face's hidden_states[layer + 1]).

    Only `layer` + 1 blocks are computed. The last block's value is the raw stream, before the final norm."""
    if not 0 <= layer < cfg.n_layers:
        raise InputError("layer", expected=f"0..{cfg.n_layers - 1}", got=layer, fix="layers count from 0: block K")
    return run_blocks(params, embed(params, jnp.asarray(tokens_BxT), cfg), cfg, n_layers=layer + 1)[0]


def residuals(params: Params, tokens_BxT: jax.Array, cfg: ModelConfig, layers: tuple[int, ...]) -> jax.Array:
    """The residual streams [len(layers), B, T, D] after several blocks, in one pass of max(layers) + 1 blocks."""
    x = embed(params, jnp.asarray(tokens_BxT), cfg)
    wanted = np.asarray(layers)
    kept = jnp.zeros((len(layers), *x.shape), x.dtype)

    def keep(layer: jax.Array, x: jax.Array, kept: jax.Array) -> jax.Array:
        return jnp.where((wanted == layer)[:, None, None, None], x[None], kept)

    return run_blocks(params, x, cfg, n_layers=max(layers) + 1, tap=(keep, kept))[2]


def run_blocks(
    params: Params,
    x_BxTxD: jax.Array,
    cfg: ModelConfig,
    *,
    first_layer: int = 0,
    n_layers: int | None = None,
    start: jax.Array | int = 0,
    prefix: Prefix | None = None,
    prefix_lengths: jax.Array | None = None,
    cache: Cache | None = None,
    edit: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    tap: tuple[Callable[..., Any], Any] | None = None,
    keep_kv: bool = False,
    remat: str = "none",
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
) -> tuple[jax.Array, Cache | None, Any]:
    """Runs the first `n_layers` blocks (all by default); returns the stream, the updated cache, the tap's state.

    Without a cache, the T tokens are the whole sequence after the prefix. With one, they are written to slots
    `start` .. start + T - 1 and attend to everything before them. `edit(layer, x)` may change the stream after a
    block (steering, norm-matched injection); `tap = (fn, state)` folds `state = fn(layer, x, state)` over blocks.
    `keep_kv` returns the T tokens' own keys and values as the cache, for use as a prefix or a prefill. `remat` is
    what a backward pass computes again instead of keeping it: "none", "dots" (all but the products with weights) or
    "blocks" (everything inside a block).

    With `first_layer`, x is the stream after block `first_layer` - 1, and only the blocks from there on run (one at
    least): a change of the stream at one block is followed to the logits without the blocks before it. Prefix and cache
    then hold the keys and values of these blocks alone. `prefix_lengths` [B] lets each row see only so many tokens of
    the prefix and stand right after them: rows that branch off one text at several places share what was read of it.

    Rows that hold several samples, one after another, come with `positions` and `segments` [B, T]: the absolute
    position of every token in its own sample (the prefix counted), and the sample's number. A token sees the prefix
    and its own segment.
    """
    n_layers = cfg.n_layers if n_layers is None else n_layers
    T = x_BxTxD.shape[1]
    assert 0 <= first_layer < n_layers, (first_layer, n_layers)
    assert prefix_lengths is None or prefix is not None, "lengths of a prefix that is not there"
    first: jax.Array | int = 0 if prefix is None else prefix.length
    if prefix_lengths is not None:
        first = prefix_lengths[:, None]
    assert segments is None or (cache is None and positions is not None), "packed rows need positions, and no cache"
    positions = first + _counting(start, T, first) if positions is None else positions
    tables = _tables(jnp.atleast_2d(positions), cfg)
    windows = jnp.asarray(cfg.windows, jnp.int32)
    slots = T if cache is None else cache.slots
    # Unfilled slots stand after every query, so causality alone hides them.
    key_pos = positions if cache is None else first + _counting(0, slots, first)
    tap_fn, tap_state = tap if tap is not None else (None, None)
    assert not (keep_kv and cache is not None), "a cache already holds the keys and values"

    # As scanned inputs the blocks' weights are known to the backward pass; indexed inside the body, a copy of each
    # would be kept for it. A trunk indexes: slicing the stack first would copy the trunk's weights in every call.
    stacks, structure = jax.tree.flatten(params.layers)
    apart = [first_layer == 0 and w.shape[0] == n_layers for w in stacks]

    def step(carry, scanned):
        x, cache, state = carry
        layer, rows = scanned
        weights = [row_of(w, layer) if row is None else row for w, row in zip(stacks, rows, strict=True)]
        p = jax.tree.unflatten(structure, weights)
        cos, sin = _table_of(tables, layer, cfg)
        own = layer - first_layer  # among the blocks that run
        shared = None if prefix is None else (prefix.k[own], prefix.v[own])

        def keys_and_values(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, Cache | None]:
            if cache is None:
                return k, v, None
            at = (own, 0, 0, start, 0)
            new = Cache(
                k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), at),
                v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), at),
            )
            return new.k[own], new.v[own], new

        seen = shared, prefix_lengths
        x, cache, kv = _block(p, x, cfg, cos, sin, positions, key_pos, windows[layer], seen, keys_and_values, segments)
        if edit is not None:
            x = edit(layer, x)
        if tap_fn is not None:
            state = tap_fn(layer, x, state)
        # Without this the compiler may split the stream's width instead of its rows, and run every row everywhere.
        return (constrain(x, "rows", None, None), cache, state), (kv if keep_kv else None)

    body = step
    if remat != "none":
        body = jax.checkpoint(step, prevent_cse=False, policy=_REMAT[remat])
    elif is_adapted(params.layers):
        # Of the frozen rows, scanned or not, a copy would be kept: only what is trained is known to the backward pass.
        body = jax.checkpoint(step, prevent_cse=False, policy=_but_rows)
    blocks = (jnp.arange(first_layer, n_layers), [w if whole else None for w, whole in zip(stacks, apart, strict=True)])
    x = constrain(x_BxTxD, "rows", None, None)
    (x, cache, state), kept = jax.lax.scan(body, (x, cache, tap_state), blocks)
    return x, Cache(*kept) if keep_kv else cache, state


def _weights_products(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps what `layers.linear` gives, which costs most to compute again."""
    return primitive.name == "custom_vjp_call"


_REMAT = {"blocks": None, "dots": _weights_products}


def _but_rows(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps everything for the backward pass but what `row_of` gives, at any of the steps that it is handed on in."""
    return primitive.name not in ("dynamic_slice", "squeeze", "stop_gradient")


def prefix_of(params: Params, tokens_P: jax.Array, cfg: ModelConfig) -> Prefix:
    """Keys and values of a token sequence that every later row starts with; differentiable in the parameters."""
    x = embed(params, jnp.asarray(tokens_P)[None], cfg)
    cache = run_blocks(params, x, cfg, keep_kv=True)[1]
    assert cache is not None
    return Prefix(k=cache.k[:, 0], v=cache.v[:, 0])


def _counting(start: jax.Array | int, size: int, beside: jax.Array | int) -> jax.Array:
    """start, start + 1, ...: [size], or [1, size] to be added to a column of numbers, one for each row."""
    counted = start + jnp.arange(size)
    return counted[None] if jnp.ndim(beside) == 2 else counted


def _tables(positions_BxT: jax.Array, cfg: ModelConfig) -> list[tuple[jax.Array, jax.Array]]:
    tables = [rope_tables(positions_BxT, cfg.rope, cfg.head_dim)]
    if cfg.rope_local is not None:
        tables.append(rope_tables(positions_BxT, cfg.rope_local, cfg.head_dim))
    return tables


def _table_of(
    tables: list[tuple[jax.Array, jax.Array]], layer: jax.Array, cfg: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    if len(tables) == 1:
        return tables[0]
    local = jnp.asarray(cfg.local_rope)[layer]
    (cos, sin), (cos_local, sin_local) = tables
    return jnp.where(local, cos_local, cos), jnp.where(local, sin_local, sin)


def _block(
    p: Layers,
    x: jax.Array,
    cfg: ModelConfig,
    cos: jax.Array,
    sin: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    window: jax.Array,
    seen: tuple[tuple[jax.Array, jax.Array] | None, jax.Array | None],
    keys_and_values: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, Cache | None]],
    segments: jax.Array | None,
) -> tuple[jax.Array, Cache | None, tuple[jax.Array, jax.Array]]:
    """One pre-norm block: attention and gated MLP, each added to the stream (Gemma norms each branch's output)."""
    B, T, _ = x.shape

    def norm(y: jax.Array, w: jax.Array) -> jax.Array:
        return rms_norm(y, w, eps=cfg.norm_eps, plus_one=cfg.norm_plus_one)

    y = norm(x, p.attn_norm)
    q = linear(y, p.wq, p.bq).reshape(B, T, cfg.n_heads, cfg.head_dim)
    k = linear(y, p.wk, p.bk).reshape(B, T, cfg.n_kv_heads, cfg.head_dim)
    v = linear(y, p.wv, p.bv).reshape(B, T, cfg.n_kv_heads, cfg.head_dim)
    if cfg.qk_norm:
        q, k = norm(q, p.q_norm), norm(k, p.k_norm)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    own = (k, v)
    k, v, cache = keys_and_values(k, v)
    spec = AttnSpec(scale=cfg.query_scale, softcap=cfg.attn_softcap, windows=cfg.windows)
    y = attend(
        q,
        k,
        v,
        spec,
        q_pos_T=q_pos,
        k_pos_S=k_pos,
        window=window,
        prefix=seen[0],
        prefix_lengths=seen[1],
        cached=cache is not None,
        segments=segments,
    )
    y = linear(y.reshape(B, T, -1), p.wo, p.bo)
    x = x + (norm(y, p.attn_post_norm) if cfg.post_norms else y)
    y = norm(x, p.mlp_norm)
    y = linear(gated(linear(y, p.gate, p.b_gate), linear(y, p.up, p.b_up), cfg.activation), p.down, p.b_down)
    x = x + (norm(y, p.mlp_post_norm) if cfg.post_norms else y)
    return x, cache, own
