"""Logits, every block's residual stream and cached decoding against what transformers computed (float32, 1e-4).

The goldens are made by make_goldens.py; test_models_parity.py makes the same comparison live.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import (
    CONFIGS,
    FAMILIES,
    GOLDENS,
    PREFILL,
    golden,
    hf_weights,
    load,
    newer,
    text_config,
    tokens,
    wrapped,
    write_checkpoint,
)
from reference import decoder, relative_error

from nla_jax.models.cache import repeat_rows
from nla_jax.models.config import ModelConfig
from nla_jax.models.hf import load_model
from nla_jax.models.layers import embed, unembed
from nla_jax.models.params import param_specs
from nla_jax.models.transformer import forward, prefix_of, residuals, run_blocks

TOLERANCE = 1e-4

# Where a test runs a model once, op by op is faster than compiling it.
residuals_jit = jax.jit(residuals, static_argnames=("cfg", "layers"))


@pytest.mark.parametrize("case", FAMILIES)
def test_logits(case):
    cfg, params = load(case)
    with jax.disable_jit():
        logits = forward(params, tokens(), cfg)
    assert logits.dtype == jnp.float32
    assert relative_error(logits, golden(case)["logits"]) < TOLERANCE


@pytest.mark.parametrize("case", FAMILIES)
def test_residual_stream_of_every_block(case):
    cfg, params = load(case)
    streams = residuals_jit(params, tokens(), cfg=cfg, layers=tuple(range(cfg.n_layers)))
    assert relative_error(streams[:, :, golden(case)["positions"]], golden(case)["residuals"]) < TOLERANCE


@pytest.mark.parametrize("case", FAMILIES)
def test_cached_decode(case):
    """A prefill of some tokens, then one token at a time through the cache, as transformers decoded."""
    cfg, params = load(case)
    ids = jnp.asarray(tokens())
    cache, steps = None, []

    @jax.jit
    def read(cache, ids, start):
        x, cache, _ = run_blocks(params, embed(params, ids, cfg), cfg, cache=cache, start=start, keep_kv=cache is None)
        return cache, unembed(params, x[:, -1:], cfg)

    cache, logits = read(None, ids[:, :PREFILL], 0)
    cache = repeat_rows(cache, 1, ids.shape[1] + 3)  # three slots stay empty: they must stay invisible
    steps.append(logits)
    for t in range(PREFILL, ids.shape[1]):
        cache, logits = read(cache, ids[:, t : t + 1], t)
        steps.append(logits)
    got = jnp.concatenate(steps, axis=1)
    assert relative_error(got[:1], golden(case)["cached_logits"]) < TOLERANCE
    assert relative_error(got, golden(case)["logits"][:, PREFILL - 1 :]) < TOLERANCE


# One each of: no window, windows, windows with a soft-cap, windows with rotary frequencies of their own.
@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "gemma3_text"])
def test_shared_prefix(case):
    """Rows that share their first tokens as a prefix get the logits that transformers gives the whole sequence."""
    cfg, params = load(case)
    ids = tokens()[:1]

    @jax.jit
    def tail_logits(params, ids):
        prefix = prefix_of(params, ids[0, :PREFILL], cfg)
        x = run_blocks(params, embed(params, ids[:, PREFILL:], cfg), cfg, prefix=prefix)[0]
        return unembed(params, x, cfg)

    assert relative_error(tail_logits(params, ids), golden(case)["logits"][:1, PREFILL:]) < TOLERANCE


@pytest.mark.parametrize("case", FAMILIES)
def test_numpy_reference_is_what_transformers_computes(case):
    """The yardstick of other tests: the float64 decoder in reference.py."""
    config, weights = text_config(CONFIGS[case]), hf_weights(CONFIGS[case])
    streams, logits = decoder(weights, config, tokens()[0])
    assert relative_error(logits, golden(case)["logits"][0]) < 1e-5
    assert relative_error(np.stack(streams)[:, golden(case)["positions"]], golden(case)["residuals"][:, 0]) < 1e-5


@pytest.mark.parametrize("case", FAMILIES)
def test_both_spellings_of_config_are_the_same_model(case):
    """make_goldens.py refuses to write unless transformers, too, reads both as the same model."""
    old, new = CONFIGS[case], newer(CONFIGS[case])
    assert old != new
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)


@pytest.mark.parametrize("case", FAMILIES)
def test_declared_shapes_are_the_checkpoints(case):
    cfg, params = load(case)
    declared = jax.tree.map(lambda s: s.shape, param_specs(cfg), is_leaf=lambda s: hasattr(s, "axes"))
    assert jax.tree.map(lambda p: p.shape, params) == declared


LAYOUTS = [(case, None) for case in FAMILIES if case != "gemma3"] + [("gemma3", "older"), ("gemma3", "newer")]


@pytest.mark.parametrize(("case", "layout"), LAYOUTS)
def test_loaded_directory(case, layout, tmp_path):
    """models/hf.py reads a written checkpoint into the parameters that the independent converter makes."""
    weights = hf_weights(CONFIGS[case])
    write_checkpoint(tmp_path / case, CONFIGS[case], wrapped(weights, layout) if layout else weights)
    cfg, params = load_model(tmp_path / case)
    expected_cfg, expected = load(case)
    assert cfg == expected_cfg
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(("case", "layout"), [("llama", None), ("gemma3", "older"), ("gemma3", "newer")])
def test_loaded_trunk(case, layout, tmp_path):
    weights = hf_weights(CONFIGS[case])
    write_checkpoint(tmp_path / case, CONFIGS[case], wrapped(weights, layout) if layout else weights)
    n = 3
    cfg, trunk = load_model(tmp_path / case, n_layers=n, head=False)
    full_cfg, full = load(case)
    assert cfg == full_cfg.truncated(n) and trunk.final_norm is None and trunk.lm_head is None
    np.testing.assert_array_equal(trunk.embed, full.embed)
    expected = jax.tree.map(lambda p: np.asarray(p)[:n], full.layers)
    jax.tree.map(np.testing.assert_array_equal, trunk.layers, expected)


def test_goldens_are_small_and_say_what_made_them():
    files = sorted(GOLDENS.glob("*.npz"))
    assert [f.stem for f in files] == sorted(FAMILIES)
    assert sum(f.stat().st_size for f in files) < 1_000_000
    assert all("transformers" in str(golden(case)["made_with"]) for case in FAMILIES)
