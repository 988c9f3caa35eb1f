"""Patching one vector from what was read once, against whole forward passes with the stream edited there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, FAMILIES, hf_weights, load
from reference import decoder

from nla_jax.errors import InputError
from nla_jax.evals.patching import Patcher
from nla_jax.models.attention import AttnSpec, attend
from nla_jax.models.layers import embed, unembed
from nla_jax.models.transformer import residual, run_blocks

T, AT, M = 40, (0, 7, 21, 38), 4
LAYER = 2


def ids(vocab: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, min(vocab, 128), T).astype(np.int32)


def given(cfg, params, tokens) -> tuple[np.ndarray, np.ndarray]:
    """Positions [2n] and, in turn, the clean vector there and another one of its length."""
    h = np.asarray(residual(params, tokens[None], cfg, LAYER))[0, np.asarray(AT)]
    other = np.random.default_rng(5).standard_normal(h.shape)
    other *= np.linalg.norm(h, axis=1, keepdims=True) / np.linalg.norm(other, axis=1, keepdims=True)
    return np.repeat(np.asarray(AT), 2), np.stack([h, other.astype(np.float32)], axis=1).reshape(-1, cfg.d_model)


def whole_pass(cfg, params, tokens):
    """A function of position and vector: log-probabilities [T, V] of a forward pass with one entry overwritten."""

    @jax.jit
    def run(position, vector):
        def edit(at, x):
            here = (at == LAYER) & (jnp.arange(T) == position)[None, :, None]
            return jnp.where(here, vector[None, None], x)

        x = run_blocks(params, embed(params, tokens[None], cfg), cfg, edit=edit)[0]
        return jax.nn.log_softmax(unembed(params, x, cfg))[0]

    return lambda position, vector: np.asarray(run(position, jnp.asarray(vector)), np.float64)


def next_tokens(tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.stack([np.resize(tokens[p + 1 :], M) for p in positions])


@pytest.mark.parametrize("case", FAMILIES)
def test_equals_a_whole_pass_with_the_stream_edited(case):
    cfg, params = load(case)
    tokens = ids(cfg.vocab_size)
    patcher = Patcher(cfg, params, LAYER)
    reading = patcher.read(tokens)
    positions, vectors = given(cfg, params, tokens)
    after = next_tokens(tokens, positions)
    found = patcher.effects(reading, positions, vectors, after)
    run = whole_pass(cfg, params, tokens)
    for i, p in enumerate(positions.tolist()):
        m = min(M, T - p)  # offsets after the document's end mean nothing
        clean, expected = run(-1, vectors[i])[p : p + m], run(p, vectors[i])[p : p + m]
        kl = np.sum(np.exp(clean) * (clean - expected), axis=-1)
        np.testing.assert_allclose(found.kl[i, :m], kl, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.logprob[i, :m], expected[np.arange(m), after[i, :m]], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            found.logprob_reference[i, :m], clean[np.arange(m), after[i, :m]], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_array_equal(found.top[i, :m], expected.argmax(-1))
        np.testing.assert_array_equal(found.top_reference[i, :m], clean.argmax(-1))
        if i % 2 == 0:
            assert found.kl[i, :m].max() < 1e-5  # gold: the clean vector changes nothing
        else:
            assert found.kl[i, 0] > 1e-4  # and another one does
    logits = patcher.logits(reading, AT[1], vectors[3:4], M)
    assert logits.shape == (1, M, cfg.vocab_size)
    expected = run(AT[1], vectors[3])[AT[1] : AT[1] + M]
    np.testing.assert_allclose(np.asarray(jax.nn.log_softmax(logits[0])), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["gemma2", "gemma3_text", "mistral"])
def test_equals_float64_numpy(case):
    cfg, params = load(case)
    tokens = ids(cfg.vocab_size)
    positions, vectors = given(cfg, params, tokens)
    found = Patcher(cfg, params, LAYER).effects(
        Patcher(cfg, params, LAYER).read(tokens), positions, vectors, next_tokens(tokens, positions)
    )
    p, vector = int(positions[5]), vectors[5].astype(np.float64)

    def overwritten(layer: int, x: np.ndarray) -> np.ndarray:
        if layer == LAYER:
            x = x.copy()
            x[p] = vector
        return x

    weights, config = hf_weights(CONFIGS[case]), CONFIGS[case]
    logs = []
    for change in (lambda layer, x: x, overwritten):
        logits = decoder(weights, config, tokens, after_block=change)[1][p : p + M]
        logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    kl = np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), axis=-1)
    np.testing.assert_allclose(found.kl[5], kl, rtol=1e-3, atol=1e-6)


def test_more_rows_than_a_batch_and_a_mesh():
    """Batches, padding and devices change no number."""
    cfg, params = load("qwen2")
    tokens = ids(cfg.vocab_size)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    positions = rng.integers(0, T - M, 67)
    vectors = rng.standard_normal((67, cfg.d_model)).astype(np.float32)
    alone, split = Patcher(cfg, params, LAYER), Patcher(cfg, params, LAYER, mesh=mesh)
    a, b = (p.effects(p.read(tokens), positions, vectors, next_tokens(tokens, positions)) for p in (alone, split))
    np.testing.assert_allclose(a.kl, b.kl, rtol=1e-5, atol=1e-5)
    one = alone.effects(alone.read(tokens), positions[66:], vectors[66:], next_tokens(tokens, positions[66:]))
    np.testing.assert_allclose(a.kl[66:], one.kl, rtol=1e-5, atol=1e-5)


def test_the_last_block_and_a_reference_from_elsewhere():
    cfg, params = load("llama")
    tokens = ids(cfg.vocab_size)
    last = Patcher(cfg, params, cfg.n_layers - 1)
    reading = last.read(tokens)
    h = np.asarray(reading.final)[np.asarray(AT)]
    after = next_tokens(tokens, np.asarray(AT))[:, :1]
    assert last.effects(reading, np.asarray(AT), h, after).kl.max() < 1e-7
    # Position 7 given what stands at 21 predicts what is predicted at 21: nothing is left between them.
    swapped = last.effects(reading, np.array([7]), h[2:3], after[:1], h[2:3])
    assert swapped.kl.max() < 1e-7 and swapped.top[0, 0] == swapped.top_reference[0, 0]
    with pytest.raises(InputError, match=f"expected 0..{cfg.n_layers - 1}"):
        Patcher(cfg, params, cfg.n_layers)


@pytest.mark.parametrize("kernel", ["plain", "blocked"])
def test_rows_see_as_much_of_a_prefix_as_they_are_given(kernel):
    rng = np.random.default_rng(2)
    q, k, v = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 150, 4, 8), (3, 2, 150, 8), (3, 2, 150, 8))
    )
    prefix = tuple(jnp.asarray(rng.standard_normal((2, 9, 8)), jnp.float32) for _ in range(2))
    spec, lengths = AttnSpec(scale=0.4, kernel=kernel), jnp.asarray([0, 4, 9])
    positions = lengths[:, None] + jnp.arange(150)[None]
    for window in (0, 6):
        options = {"window": window, "prefix": prefix, "prefix_lengths": lengths}
        got = attend(q, k, v, spec, q_pos_T=positions, k_pos_S=positions, **options)
        for b, n in enumerate(lengths.tolist()):
            short = tuple(x[:, :n] for x in prefix) if n else None
            at = positions[b]
            row = (x[b : b + 1] for x in (q, k, v))
            expected = attend(*row, spec, q_pos_T=at, k_pos_S=at, window=window, prefix=short)
            np.testing.assert_allclose(got[b], expected[0], rtol=1e-5, atol=1e-5)
