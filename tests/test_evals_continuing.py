"""Continuations of a pushed target against whole forward passes, one for each token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import load

from nla_jax.evals.continuing import continuations, read_text
from nla_jax.evals.patching import Patcher
from nla_jax.models.layers import embed, unembed
from nla_jax.models.sampler import row_keys
from nla_jax.models.transformer import run_blocks

LAYER, T, NEW = 2, 12, 7


def keys(n: int) -> jax.Array:
    return row_keys(1, jnp.zeros(n, jnp.uint32), 1)


def whole(cfg, params):
    """A function of (tokens, position, push, everywhere): logits [T, V] of a whole pass, float32."""

    @jax.jit
    def run(tokens, position, push, everywhere):
        def edit(layer, x):
            at = jnp.arange(x.shape[1])
            here = (layer == LAYER) & ((at == position) | (everywhere & (at > position)))
            return jnp.where(here[None, :, None], x + jnp.linalg.norm(x, axis=-1, keepdims=True) * push[None, None], x)

        return unembed(params, run_blocks(params, embed(params, tokens[None], cfg), cfg, edit=edit)[0], cfg)[0]

    def padded(tokens, position, push, everywhere):
        short = np.zeros(T + NEW, np.int32)
        short[: len(tokens)] = tokens
        return np.asarray(run(short, position, jnp.asarray(push, jnp.float32), everywhere))[: len(tokens)]

    return padded


@pytest.mark.parametrize(("case", "position"), [("qwen2", 8), ("gemma3_text", 8), ("gemma2", 0), ("mistral", 11)])
def test_greedy_continuations(case, position):
    cfg, params = load(case)
    rng = np.random.default_rng(4)
    text = rng.integers(0, 120, T).astype(np.int32)
    directions = rng.standard_normal((2, cfg.d_model))
    push = np.concatenate([np.zeros((1, cfg.d_model)), directions / np.linalg.norm(directions, axis=1, keepdims=True)])
    patcher, run = Patcher(cfg, params, LAYER), whole(cfg, params)
    read = read_text(patcher, text)
    prompts = np.repeat(text[None, position:], 3, axis=0)
    plain: list[np.ndarray] = []
    for everywhere in (False, True):
        found = continuations(
            patcher,
            read,
            prompts,
            np.full(3, position),
            push,
            keys(3),
            temperature=0.0,
            max_new_tokens=NEW,
            everywhere=everywhere,
        )
        for row in range(3):
            tokens, written = list(text), found.tokens[row]
            for token in written.tolist():
                logits = run(tokens, position, push[row], everywhere)[-1]
                assert logits[token] >= logits.max() - 1e-4
                tokens.append(token)
            clean = np.asarray(jax.nn.log_softmax(run(tokens, position, push[0], False)), np.float64)
            each = clean[np.arange(T - 1, T + NEW - 1), written]
            np.testing.assert_allclose(found.logprob[row], each.sum(), rtol=1e-4)
            np.testing.assert_allclose(found.coherence[row], each.mean(), rtol=1e-4)
        plain.append(found.tokens[0])
    np.testing.assert_array_equal(*plain)  # a push of zero is none, wherever it is applied


def test_samples_batches_and_stops():
    cfg, params = load("qwen2")
    text = np.random.default_rng(4).integers(0, 120, T).astype(np.int32)
    patcher = Patcher(cfg, params, LAYER)
    read = read_text(patcher, text)
    n = 70  # more than one batch
    positions = np.arange(n) % T
    options = {"temperature": 1.0, "max_new_tokens": NEW}
    many = row_keys(1, jnp.arange(n, dtype=jnp.uint32), 1)
    push = np.zeros((n, cfg.d_model))
    found = continuations(patcher, read, text[positions][:, None], positions, push, many, **options)
    row = 66
    alone = continuations(
        patcher, read, text[positions[[row]]][:, None], positions[[row]], push[:1], many[row : row + 1], **options
    )
    np.testing.assert_array_equal(alone.tokens[0], found.tokens[row])
    assert len({tuple(t) for t in found.tokens}) > n / 2 and not found.stopped.any()
    stop = int(found.tokens[row][2])
    ended = continuations(patcher, read, text[positions][:, None], positions, push, many, stops=[stop], **options)
    for before, after, stopped in zip(found.tokens, ended.tokens, ended.stopped, strict=True):
        at = np.flatnonzero(before == stop)
        assert stopped == bool(len(at))
        np.testing.assert_array_equal(after, before[: at[0] + 1] if len(at) else before)
