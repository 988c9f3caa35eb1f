"""AV injection and AR reconstruction against the float64 decoder of reference.py."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, hf_weights, load, text_config
from reference import decoder, relative_error

from nla_jax.models.layers import embed
from nla_jax.models.params import truncate
from nla_jax.models.transformer import residual, run_blocks
from nla_jax.prompt import AVPrompt
from nla_jax.reconstructor import LENGTH_STEP, ARParams, init_head, pad_prompts, reconstruct_jit
from nla_jax.verbalizer import ADD_AFTER_BLOCK, add_norm_matched, av_prefix, inject, prefill

PROMPT = AVPrompt(ids=(5, 90, 17, 3, 44, 71, 8, 120, 33, 12, 64), marker=7)
IDS = np.asarray(PROMPT.ids)


def vectors(cfg, n=3):
    """Raw activations of very different sizes."""
    v = np.random.default_rng(8).normal(size=(n, cfg.d_model)).astype(np.float32)
    return v * np.asarray([[0.01], [30.0], [6e4]], np.float32)[:n]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("case", "scale"), [("qwen2", 150.0), ("gemma3_text", 60000.0)])
def test_injection_overwrites_exactly_one_row(case, scale, dtype):
    """Norm `injection_scale` to 1e-3 and the vector's own direction; every other row bit for bit as it was."""
    cfg, params = load(case)
    low = jax.tree.map(lambda p: p.astype(dtype), params.replace(layers=None))
    x = jnp.tile(embed(low, IDS[None], cfg), (3, 1, 1))
    out = inject(x, jnp.asarray(vectors(cfg)), marker=PROMPT.marker, injection_scale=scale)
    assert out.dtype == x.dtype == dtype
    row = np.asarray(out[:, PROMPT.marker], np.float64)
    np.testing.assert_allclose(np.linalg.norm(row, axis=-1), scale, rtol=1e-3)
    v = vectors(cfg).astype(np.float64)
    cosines = (row * v).sum(-1) / np.linalg.norm(row, axis=-1) / np.linalg.norm(v, axis=-1)
    assert (cosines > 1 - 1e-4).all()
    others = np.arange(len(IDS)) != PROMPT.marker
    np.testing.assert_array_equal(np.asarray(out[:, others]), np.asarray(x[:, others]))


def test_gemma_rows_are_scaled_embeddings_and_the_injected_one_is_not():
    cfg, params = load("gemma3_text")
    table = hf_weights(CONFIGS["gemma3_text"])["model.embed_tokens.weight"].astype(np.float64)
    x = embed(params, IDS[None], cfg)
    assert relative_error(x[0], table[IDS] * cfg.d_model**0.5) < 1e-6
    out = inject(x, jnp.asarray(vectors(cfg, 1)), marker=PROMPT.marker, injection_scale=80000.0)
    assert np.linalg.norm(out[0, PROMPT.marker]) == pytest.approx(80000.0, rel=1e-5)


def test_zero_vector_stays_finite():
    cfg, params = load("qwen2")
    x = embed(params, IDS[None], cfg)
    assert np.isfinite(inject(x, jnp.zeros((1, cfg.d_model)), marker=2, injection_scale=150.0)).all()


def _prefill(case, v, scale, mode="replace"):
    cfg, params = load(case)

    @jax.jit
    def run(params, v):
        prefix = av_prefix(params, PROMPT, cfg)
        return prefill(params, prefix, v, PROMPT, cfg, injection_scale=scale, mode=mode)[1]

    return run(params, jnp.asarray(v))


@pytest.mark.parametrize(("case", "scale"), [("qwen2", 9.0), ("gemma3_text", 20.0)])
def test_prefill_with_injection(case, scale):
    """Next-token logits after the prompt, the vector in place of the marker's (scaled) embedding."""
    config, cfg = text_config(CONFIGS[case]), load(case)[0]
    got = _prefill(case, vectors(cfg), scale)
    for row, v in enumerate(vectors(cfg).astype(np.float64)):

        def replace(x, v=v):
            x = x.copy()
            x[PROMPT.marker] = v / np.linalg.norm(v) * scale
            return x

        expected = decoder(hf_weights(CONFIGS[case]), config, IDS, embeddings=replace)[1][-1]
        assert relative_error(got[row], expected) < 1e-4
    assert relative_error(got[0], got[1]) > 0.01


def test_prefill_with_norm_matched_addition():
    """After block 1, the vector at the stream's own norm is added at the marker; the marker's embedding stays."""
    case = "gemma2"
    config, cfg = text_config(CONFIGS[case]), load(case)[0]
    got = _prefill(case, vectors(cfg), 1.0, mode="add_norm_matched")
    for row, v in enumerate(vectors(cfg).astype(np.float64)):

        def add(layer, x, v=v):
            if layer == 1:
                x = x.copy()
                x[PROMPT.marker] += v / np.linalg.norm(v) * np.linalg.norm(x[PROMPT.marker])
            return x

        expected = decoder(hf_weights(CONFIGS[case]), config, IDS, after_block=add)[1][-1]
        assert relative_error(got[row], expected) < 1e-4


def test_norm_matched_addition_touches_the_marker_only():
    cfg, params = load("llama")
    assert ADD_AFTER_BLOCK == 1
    x = jnp.tile(embed(params, IDS[None], cfg), (3, 1, 1))
    edit = add_norm_matched(jnp.asarray(vectors(cfg)), marker=4)

    @functools.partial(jax.jit, static_argnames="edit")
    def streams(x, edit):
        def keep(layer, x, kept):
            return kept.at[layer].set(x)

        return run_blocks(params, x, cfg, n_layers=2, edit=edit, tap=(keep, jnp.zeros((2, *x.shape))))[2]

    plain, edited = np.asarray(streams(x, None), np.float64), np.asarray(streams(x, edit), np.float64)
    np.testing.assert_array_equal(edited[0], plain[0])
    added = edited[1] - plain[1]
    others = np.arange(len(IDS)) != 4
    assert not added[:, others].any()
    v = vectors(cfg).astype(np.float64)
    size = np.linalg.norm(plain[1][:, 4], axis=-1, keepdims=True)
    assert relative_error(added[:, 4], v / np.linalg.norm(v, axis=-1, keepdims=True) * size) < 1e-5


# The AR.

TEXTS = [[5, 90, 17, 3, 44, 71, 8, 120, 33, 12, 64, 7, 9], [1], [100, 2, 3, 55, 5, 77, 7, 8, 31, 10, 11, 12, 13, 14]]


@pytest.mark.parametrize(("case", "blocks"), [("llama", 3), ("qwen2", 4), ("gemma3_text", 4)])
def test_ar_against_a_float64_decoder(case, blocks):
    """The first blocks, no final norm, the head at the last real token."""
    cfg, params = load(case)
    head = np.random.default_rng(3).normal(size=(cfg.d_model, cfg.d_model)).astype(np.float32)
    ar = ARParams(trunk=truncate(params, blocks), head=jnp.asarray(head))
    assert ar.trunk.final_norm is None and ar.trunk.lm_head is None
    ids, lengths = pad_prompts(TEXTS, pad_id=3)
    got = reconstruct_jit(ar, ids, lengths, cfg=cfg.truncated(blocks))
    assert got.dtype == jnp.float32 and got.shape == (3, cfg.d_model)
    weights, config = hf_weights(CONFIGS[case]), text_config(CONFIGS[case])
    for row, text in enumerate(TEXTS):
        stream = decoder(weights, config, np.asarray(text), n_layers=blocks)[0][-1][-1]
        assert relative_error(got[row], stream @ head) < 1e-4


def test_ar_with_a_fresh_head_predicts_the_stream_it_reads():
    cfg, params = load("llama")
    ids, lengths = pad_prompts(TEXTS)
    ar = ARParams(trunk=truncate(params, 3), head=init_head(cfg.d_model))
    got = reconstruct_jit(ar, ids, lengths, cfg=cfg.truncated(3))
    stream = jax.jit(residual, static_argnames=("cfg", "layer"))(params, ids, cfg=cfg, layer=2)
    for row, length in enumerate(lengths):
        assert relative_error(got[row], stream[row, length - 1]) < 1e-5


def test_ar_rows_do_not_depend_on_padding_or_neighbours():
    cfg, params = load("gemma3_text")
    ar = ARParams(trunk=truncate(params, 4), head=init_head(cfg.d_model))
    ids, lengths = pad_prompts(TEXTS, pad_id=0)
    together = reconstruct_jit(ar, ids, lengths, cfg=cfg.truncated(4))
    np.testing.assert_array_equal(together, reconstruct_jit(ar, *pad_prompts(TEXTS, pad_id=9), cfg=cfg.truncated(4)))
    reverse = reconstruct_jit(ar, ids[::-1], lengths[::-1], cfg=cfg.truncated(4))
    assert relative_error(reverse[::-1], together) < 1e-6


def test_padding_widths():
    ids, lengths = pad_prompts([[1, 2, 3], list(range(LENGTH_STEP + 1))], pad_id=7)
    assert ids.shape == (2, 2 * LENGTH_STEP) and lengths.tolist() == [3, LENGTH_STEP + 1]
    assert ids[0, :3].tolist() == [1, 2, 3] and (ids[0, 3:] == 7).all()
