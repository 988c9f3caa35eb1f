"""Adapters beside a frozen base: what they compute, what they cost, and PEFT's format both ways."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, load, text_config, tokens
from safetensors.numpy import load_file, save_file

from nla_jax.models.config import ModelConfig
from nla_jax.models.errors import CheckpointError, ConfigError
from nla_jax.models.lora import TARGETS, LoRAConfig, attach, init_adapters, merge, n_adapter_params
from nla_jax.models.params import n_params
from nla_jax.models.peft_io import CONFIG, WEIGHTS, load_adapters, save_adapters
from nla_jax.models.transformer import forward

CASES = ("llama", "gemma3", "qwen2") if {"llama", "gemma3", "qwen2"} <= set(CONFIGS) else tuple(CONFIGS)[:3]
LORA = LoRAConfig(rank=3, alpha=5.0)


def _moved(cfg: ModelConfig, lora: LoRAConfig, seed: int = 0):
    """Adapters whose b is not zero any more."""
    adapters = init_adapters(cfg, lora, jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), len(adapters)))
    return {f: p.replace(b=0.3 * jax.random.normal(next(keys), p.b.shape)) for f, p in adapters.items()}


@pytest.mark.parametrize("case", CASES)
def test_fresh_adapters_change_nothing_and_moved_ones_do_what_merged_weights_do(case):
    cfg, params = load(case)
    ids = tokens()
    plain = forward(params, ids, cfg)
    fresh = forward(attach(params, init_adapters(cfg, LORA, jax.random.key(0)), LORA), ids, cfg)
    np.testing.assert_array_equal(fresh, plain)
    adapters = _moved(cfg, LORA)
    beside = forward(attach(params, adapters, LORA), ids, cfg)
    merged = forward(merge(params, adapters, LORA), ids, cfg)
    scale = np.abs(plain).max()
    assert np.abs(beside - plain).max() > 1e-2 * scale
    assert np.abs(beside - merged).max() < 2e-5 * scale


def test_merging_is_the_formula():
    cfg, params = load("qwen2")
    lora = LoRAConfig(rank=4, alpha=6.0, targets=("q_proj", "down_proj"), rslora=True)
    adapters = _moved(cfg, lora)
    merged = merge(params, adapters, lora)
    for field in ("wq", "down"):
        w, a, b = (np.asarray(x, np.float64) for x in (getattr(params.layers, field), *_pair(adapters[field])))
        np.testing.assert_allclose(getattr(merged.layers, field), w + np.matmul(a, b) * 6.0 / 2.0, atol=1e-5)
    np.testing.assert_array_equal(merged.layers.wk, params.layers.wk)


def _pair(pair):
    return pair.a, pair.b


def test_gradients_reach_the_adapters_alone_and_are_those_of_the_formula():
    cfg, params = load("qwen2")
    adapters, ids = _moved(cfg, LORA), tokens()

    def loss(adapters, base):
        return jnp.sum(jnp.sin(forward(attach(base, adapters, LORA), ids, cfg)))

    of_adapters, of_base = jax.jit(jax.grad(loss, argnums=(0, 1)))(adapters, params)
    for field in adapters:
        assert not np.any(getattr(of_base.layers, field)), field
    # By the chain rule from the merged weight's gradient G: dL/da = s G b^T, dL/db = s a^T G.
    G = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(forward(p, ids, cfg)))))(merge(params, adapters, LORA))
    for field, pair in of_adapters.items():
        g, a, b = (np.asarray(x, np.float64) for x in (getattr(G.layers, field), *_pair(adapters[field])))
        for got, want in (
            (pair.a, LORA.scale * g @ b.swapaxes(1, 2)),
            (pair.b, LORA.scale * a.swapaxes(1, 2) @ g),
        ):
            assert np.abs(got - want).max() < 2e-4 * np.abs(want).max(), field


def test_full_rank_reaches_every_weight():
    """At the rank of its smaller side an adapter can be any change: here that of one step of plain descent."""
    cfg, params = load("qwen2")
    lora = LoRAConfig(rank=cfg.d_model, alpha=float(cfg.d_model), targets=("q_proj",))
    change = 0.05 * np.random.default_rng(0).standard_normal(params.layers.wq.shape).astype(np.float32)
    a = np.broadcast_to(np.eye(cfg.d_model, dtype=np.float32), (cfg.n_layers, cfg.d_model, cfg.d_model))
    adapters = {
        "wq": init_adapters(cfg, lora, jax.random.key(0))["wq"].replace(a=jnp.asarray(a), b=jnp.asarray(change))
    }
    full = params.replace(layers=params.layers.replace(wq=params.layers.wq + change))
    got, want = (forward(p, tokens(), cfg) for p in (attach(params, adapters, lora), full))
    assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("case", CASES)
def test_peft_directory_round_trip(case, tmp_path):
    cfg, _ = load(case)
    lora = LoRAConfig(rank=2, alpha=7.0, targets=("q_proj", "v_proj", "down_proj"))
    adapters = _moved(cfg, lora)
    save_adapters(tmp_path, adapters, cfg, lora, base="some/model")
    again, found = load_adapters(tmp_path, cfg)
    assert found == lora
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    stored = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    np.testing.assert_array_equal(stored[key], np.asarray(adapters["wq"].b[1]).T)
    assert len(stored) == 2 * 3 * cfg.n_layers


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"target_modules": ["q_proj", "experts"]}, "target_modules"),
        ({"r": "3"}, "expected a number"),
        ({"r": 2}, "lora_A"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path, change, named):
    cfg, _ = load("qwen2")
    save_adapters(tmp_path, _moved(cfg, LORA), cfg, LORA, base="x")
    file = tmp_path / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=named):
        load_adapters(tmp_path, cfg)


def test_damaged_weights_are_refused_by_name(tmp_path):
    cfg, _ = load("qwen2")
    save_adapters(tmp_path, _moved(cfg, LORA), cfg, LORA, base="x")
    whole = load_file(tmp_path / WEIGHTS)
    name = sorted(whole)[0]
    for change in (lambda t: t.pop(name), lambda t: t.update(extra=t[name])):
        part = dict(whole)
        change(part)
        save_file(part, tmp_path / WEIGHTS)
        with pytest.raises(CheckpointError, match="lora_A|extra"):
            load_adapters(tmp_path, cfg)
    (tmp_path / WEIGHTS).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_adapters(tmp_path, cfg)


def test_bad_settings():
    cfg, _ = load("qwen2")
    for bad in ({"rank": 0}, {"alpha": 0.0}, {"targets": ()}, {"targets": ("experts",)}):
        with pytest.raises(ConfigError, match="lora"):
            LoRAConfig(**bad)
    with pytest.raises(ConfigError, match="rank"):
        init_adapters(cfg, LoRAConfig(rank=10_000), jax.random.key(0))


def test_released_shape_is_small_beside_its_base():
    """Qwen2.5-7B: rank 16 on all projections is the 40.4 million parameters that PEFT reports for it."""
    cfg = ModelConfig.from_hf(
        {
            **text_config(CONFIGS["qwen2"]),
            **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
            **{"num_key_value_heads": 4, "vocab_size": 152064, "head_dim": 128, "layer_types": None},
        }
    )
    assert n_adapter_params(cfg, LoRAConfig(rank=16)) == 40_370_176
    assert 40_370_176 / n_params(cfg) < 0.006
    assert set(TARGETS) == set(LoRAConfig().targets)
