"""Adapters against PEFT itself, both ways: `pytest -m parity`, which needs torch, transformers and peft."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from families import CONFIGS, load, tokens
from reference import relative_error

from nla_jax.models import hf as ours
from nla_jax.models.config import ModelConfig
from nla_jax.models.lora import LoRAConfig, attach, init_adapters
from nla_jax.models.peft_io import load_adapters, save_adapters
from nla_jax.models.transformer import forward
from nla_jax.tools.convert import convert

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
CASES = ("llama", "qwen2", "gemma2")
LORA = LoRAConfig(rank=4, alpha=6.0, targets=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"), rslora=True)


@pytest.fixture(scope="module")
def hf():
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason="needs the [parity] extra: torch, transformers and peft")
    import make_goldens

    return make_goldens


def ids(vocab: int) -> np.ndarray:
    return np.asarray(tokens()) % vocab


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_with_what_is_saved_here(hf, case, tmp_path):
    import peft

    cfg, params = load(case)
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape),
        init_adapters(cfg, LORA, jax.random.key(0)),
    )
    save_adapters(tmp_path / "adapter", moved, cfg, LORA, base=str(tmp_path / "base"))
    model = hf.load(CONFIGS[case], tmp_path / "base")
    plain, _ = hf.logits_and_residuals(model, ids(cfg.vocab_size))
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"))
    theirs, _ = hf.logits_and_residuals(model.base_model.model, ids(cfg.vocab_size))
    assert relative_error(plain, theirs) > 100 * TOLERANCE
    assert relative_error(forward(attach(params, moved, LORA), ids(cfg.vocab_size), cfg), theirs) < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_is_computed_the_same_and_merged_the_same(hf, case, tmp_path):
    import peft
    import torch

    model = hf.load(CONFIGS[case], tmp_path / "base")
    wanted = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "up_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(model, wanted).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    cfg, params = load(case)
    adapters, lora = load_adapters(tmp_path / "adapter", cfg)
    theirs, _ = hf.logits_and_residuals(model.base_model.model, ids(cfg.vocab_size))
    assert relative_error(forward(attach(params, adapters, lora), ids(cfg.vocab_size), cfg), theirs) < TOLERANCE

    done = CliRunner().invoke(
        convert, [str(tmp_path / "base"), str(tmp_path / "merged"), "--adapter", str(tmp_path / "adapter")]
    )
    assert done.exit_code == 0, done.output
    merged = model.merge_and_unload().state_dict()
    got = ours.load_model(tmp_path / "merged")[1]
    assert ModelConfig.from_dir(Path(tmp_path / "merged")) == cfg
    for layer in range(cfg.n_layers):
        want = merged[f"model.layers.{layer}.self_attn.q_proj.weight"].numpy().T
        assert np.abs(np.asarray(got.layers.wq[layer]) - want).max() < 1e-5 * np.abs(want).max()
