"""FLOPs against the compiler's count of unscanned programs, and against sums done by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import step_cases as cases

from nla_jax.configs.architectures import ARCHITECTURES
from nla_jax.configs.released import RELEASED
from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import embed, unembed
from nla_jax.models.params import abstract_params, n_params, param_specs
from nla_jax.models.transformer import run_blocks
from nla_jax.train.plan_work import (
    VERSIONS,
    Lengths,
    Split,
    Work,
    block_size,
    decoding,
    flops_table,
    forward,
    head_size,
    products,
    reading,
    step_flops,
    training,
)

QWEN = ModelConfig.from_hf(ARCHITECTURES["Qwen/Qwen2.5-7B-Instruct"]["config"])


@pytest.mark.parametrize("case", ["qwen2", "gemma3_text"])
def test_forward_is_what_the_compiler_counts(case):
    # One block, so that the scanned body is counted once and once is right; wide, so that products are nearly all.
    wide = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 1, "vocab_size": 2048}
    cfg = ModelConfig.from_hf({**cases.CASES[case], **wide, "num_key_value_heads": 2})
    cfg = dataclasses.replace(cfg, windows=(0,))
    B, T = 4, 64

    def fn(params, tokens):
        return unembed(params, run_blocks(params, embed(params, tokens, cfg), cfg)[0], cfg)

    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    counted = jax.jit(fn).lower(abstract_params(cfg), tokens).compile().cost_analysis()["flops"]
    # The plain kernel computes all T keys of each query.
    assert forward(cfg, B * T, T, B * T) == pytest.approx(counted, rel=0.03)


def test_sizes_are_those_of_the_declared_parameters():
    for facts in ARCHITECTURES.values():
        cfg = ModelConfig.from_hf(facts["config"])
        matrices = sum(
            spec.shape[1] * spec.shape[2]
            for spec in jax.tree.leaves(param_specs(cfg).layers, is_leaf=lambda x: hasattr(x, "fan_in"))
            if len(spec.shape) == 3
        )
        assert block_size(cfg) == matrices
        assert head_size(cfg) == cfg.d_model * cfg.vocab_size


def test_released_architectures():
    sizes = {pair["target"]: (pair["d_model"], pair["n_layers"]) for pair in RELEASED}
    found = {name: ModelConfig.from_hf(facts["config"]) for name, facts in ARCHITECTURES.items()}
    assert {name: (cfg.d_model, cfg.n_layers) for name, cfg in found.items()} == sizes
    # The parameter counts on the models' cards.
    billions = [7.62, 11.77, 27.01, 70.55]
    assert [n_params(cfg) / 1e9 for cfg in found.values()] == pytest.approx(billions, abs=0.005)


def test_architecture_is_that_of_the_published_file(shared_data):
    published = ModelConfig.from_dir(shared_data / "released" / "Qwen2.5-7B-Instruct")
    assert published == QWEN


def test_forward_by_hand():
    # A token of Qwen2.5-7B: 2 x 28 blocks of 233.06 million weights, and 4 x 28 heads x 128 per key and block.
    assert block_size(QWEN) == 3584 * (3584 + 512 + 512) + 3584 * 3584 + 3 * 3584 * 18944
    assert forward(QWEN, 1, 0) == 2 * 28 * block_size(QWEN)
    assert forward(QWEN, 1, 10) - forward(QWEN, 1, 0) == 4 * 28 * 128 * 10 * 28
    assert forward(QWEN, 1, 0, 1) - forward(QWEN, 1, 0) == 2 * 3584 * 152064


def test_window_bounds_the_keys():
    cfg = dataclasses.replace(QWEN, n_layers=2, windows=(8, 0))
    assert forward(cfg, 1, 100) - forward(cfg, 1, 0) == 4 * 28 * 128 * (8 + 100)


def test_sharing_a_prefix_changes_nothing_but_its_repetition():
    n, rows = Lengths(), 256
    shared = reading(QWEN, rows, 100, 100, Split(), 2, before=n.marker, shared=n.marker)
    alone = rows * (forward(QWEN, n.marker, n.marker / 2) + forward(QWEN, 100, n.marker + 50))
    assert alone - shared.useful == pytest.approx((rows - 1) * forward(QWEN, n.marker, n.marker / 2))


def test_training_counts_recomputation():
    read = reading(QWEN, 8, 100, 128, Split(), 2, useful_logits=50, padded_logits=64)
    weights = products(QWEN, 8, 100, 128, useful_logits=50, padded_logits=64)

    def update(remat, frozen=False, chunks=2):
        options = {"remat": remat, "logits": 8 * 64, "frozen": frozen, "chunks": chunks}
        return training(read, weights, QWEN, n_params(QWEN), Split(), **options)

    plain, dots, remat = (update(kind) for kind in ("none", "dots", "blocks"))
    logits = 2.0 * 8 * 64 * head_size(QWEN)
    assert plain.useful == remat.useful == 3 * read.useful
    assert plain.computed == pytest.approx(3 * read.computed + logits)  # logits in chunks are computed twice
    assert update("none", chunks=1).computed == pytest.approx(3 * read.computed)
    assert remat.computed == pytest.approx(4 * read.computed)
    assert remat.moved > plain.moved > 3 * read.moved
    # Of the blocks' products, attention's own are all that is computed again: 4 T^2 / 2 H N per row and block.
    attention = 8 * 28 * 4.0 * 28 * 128 * 128**2 / 2
    assert dots.computed == pytest.approx(plain.computed + attention, rel=1e-6)
    # Frozen weights: their gradients' products are not made, attention's backward pass is as before.
    assert update("none", frozen=True).useful == pytest.approx(3 * read.useful - weights.useful)
    assert weights.useful == pytest.approx(2.0 * 800 * (28 * block_size(QWEN)) + 2.0 * 400 * head_size(QWEN))


def test_bytes_shrink_with_chips():
    one = decoding(QWEN, 1024, Lengths(), 150, Split(), 1, 2)
    rows = decoding(QWEN, 1024, Lengths(), 150, Split(8, 1, 8), 1, 2)
    both = decoding(QWEN, 1024, Lengths(), 150, Split(8, 4, 32), 4, 2)
    assert one.computed == rows.computed == both.computed
    assert one.moved > rows.moved > both.moved
    # Every step reads the weights of the blocks and of the projection at least.
    weights = 2.0 * (28 * block_size(QWEN) + head_size(QWEN))
    assert rows.moved > 149 * weights and both.moved > 149 * weights / 4


def test_versions_by_hand():
    n = Lengths(prompt=10, marker=8, ar_prompt=3, response=6, tags=2)
    cfg = dataclasses.replace(QWEN, n_layers=4, windows=(0,) * 4)
    table = flops_table(cfg, 1, n)
    for stage, of in table.items():
        assert of["nla_jax"] == min(of.values())
        assert of["without any"] == max(of.values()), stage
    # A trunk of 2 of 4 blocks is half of the blocks' work; the AR has its map besides.
    assert table["extract"]["without truncated trunk"] == pytest.approx(2 * table["extract"]["nla_jax"])
    ar = {name: step_flops("ar", cfg, 1, n, 8, method) for name, method in VERSIONS.items()}
    assert ar["without shared prefix"] == ar["nla_jax"] < ar["without truncated trunk"] < 2 * ar["nla_jax"]
    # Response-only logits spare those of the prompt and of the last token's successor: 9 of 15, three passes.
    av = table["av"]["without response-only logits"] - table["av"]["nla_jax"]
    assert av == pytest.approx(3 * 2 * head_size(cfg) * 9)
    # In RL the log-probabilities of the policy, thrice, and of the reference.
    rl = table["rl"]["without response-only logits"] - table["rl"]["nla_jax"]
    assert rl == pytest.approx(4 * 2 * head_size(cfg) * 9)
    # A third of the AR's update more, where it reads once more.
    more = table["rl"]["without rewards from the update"] - table["rl"]["nla_jax"]
    assert more == pytest.approx(ar["nla_jax"] / 3)


def test_work_defaults_to_nothing():
    assert Work() == Work(0.0, 0.0, 0.0)
