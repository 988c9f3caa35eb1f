"""The same comparison as test_models_golden.py, live and on longer text: `pytest -m parity`, which needs torch.

Also what goldens cannot show: exported directories load in transformers, and decoding is its greedy decoding.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_changes import CHANGES
from families import CONFIGS, FAMILIES, changed, hf_weights, load, newer, text_config, to_params
from reference import relative_error

from nla_jax.models.cache import empty_cache
from nla_jax.models.config import ModelConfig
from nla_jax.models.hf import load_model, save_model
from nla_jax.models.layers import embed, unembed
from nla_jax.models.params import truncate
from nla_jax.models.sampler import decode, row_keys
from nla_jax.models.transformer import forward, residuals, run_blocks
from nla_jax.reconstructor import ARParams, init_head, pad_prompts, reconstruct

pytestmark = pytest.mark.parity
TOLERANCE = 1e-4
BATCH, LENGTH = 2, 144  # longer than one block of queries, so that the blocked kernel runs


@pytest.fixture(scope="module")
def hf():
    """make_goldens.py as a module: how a tiny checkpoint is loaded and run in transformers."""
    pytest.importorskip("torch", reason="needs the [parity] extra: torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra: torch and transformers")
    import make_goldens

    transformers.logging.set_verbosity_error()
    return make_goldens


def ids_for(vocab: int, batch: int = BATCH, length: int = LENGTH) -> np.ndarray:
    """Text ids: below 128, where the tiny multimodal checkpoint has its image tokens."""
    return np.random.default_rng(11).integers(0, min(vocab, 128), (batch, length)).astype(np.int32)


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_residuals_and_cached_decoding(hf, case, tmp_path):
    cfg, params = load(case)
    ids = ids_for(cfg.vocab_size)
    model = hf.load(CONFIGS[case], tmp_path / case)
    logits, streams = hf.logits_and_residuals(model, ids)
    cached = hf.cached_logits(model, ids)
    layers = tuple(range(cfg.n_layers))
    assert relative_error(jax.jit(forward, static_argnames="cfg")(params, ids, cfg=cfg), logits) < TOLERANCE
    run = jax.jit(residuals, static_argnames=("cfg", "layers"))
    assert relative_error(run(params, ids, cfg=cfg, layers=layers), streams) < TOLERANCE

    @jax.jit
    def read(cache, ids, start):
        x, cache, _ = run_blocks(params, embed(params, ids, cfg), cfg, cache=cache, start=start)
        return cache, unembed(params, x[:, -1:], cfg)

    cache, first = read(empty_cache(cfg, BATCH, LENGTH + 5), ids[:, : hf.PREFILL], 0)
    steps = [first]
    for t in range(hf.PREFILL, LENGTH):
        cache, step = read(cache, ids[:, t : t + 1], t)
        steps.append(step)
    assert relative_error(jnp.concatenate(steps, axis=1), cached) < TOLERANCE


@pytest.mark.parametrize("layout", ["older", "newer"])
def test_both_key_layouts_of_the_multimodal_save(hf, layout, tmp_path):
    """transformers and load_model read the same files."""
    model = hf.load(CONFIGS["gemma3"], tmp_path / layout, layout)
    cfg, params = load_model(tmp_path / layout)
    ids = ids_for(cfg.vocab_size, length=40)
    assert relative_error(forward(params, ids, cfg), hf.logits_and_residuals(model, ids)[0]) < TOLERANCE


@pytest.mark.parametrize("case", CHANGES)
def test_every_changed_field(hf, case, tmp_path):
    for label, change in CHANGES[case].items():
        config = changed(newer(CONFIGS[case]) if label.startswith("newer ") else CONFIGS[case], change)
        cfg = ModelConfig.from_hf(config)
        ids = ids_for(cfg.vocab_size, batch=1, length=48)
        expected = hf.logits_and_residuals(hf.load(config, tmp_path / case), ids)[0]
        with jax.disable_jit():
            got = forward(to_params(hf_weights(config)), ids, cfg)
        assert relative_error(got, expected) < TOLERANCE, label


@pytest.mark.parametrize("case", FAMILIES)
def test_exported_directory_loads_in_transformers(hf, case, tmp_path):
    """Without missing or unexpected keys, and it computes the same."""
    import transformers

    cfg, params = load(case)
    save_model(params, cfg, CONFIGS[case], tmp_path / "out")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    missing = [k for k in info["missing_keys"] if "vision_tower" not in k and "multi_modal" not in k]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = ids_for(cfg.vocab_size, batch=1, length=24)
    with jax.disable_jit():
        assert relative_error(forward(params, ids, cfg), hf.logits_and_residuals(model.eval(), ids)[0]) < TOLERANCE


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "gemma3_text"])
def test_greedy_decoding(hf, case, tmp_path):
    """Tokens and log-probabilities of a prefilled cache and the decode loop, against `generate`."""
    import torch

    cfg, params = load(case)
    ids, new = ids_for(cfg.vocab_size, batch=4, length=10), 24
    model = hf.load(CONFIGS[case], tmp_path / case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            torch.from_numpy(ids).long(),
            attention_mask=torch.ones(ids.shape, dtype=torch.long),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    expected = out.sequences[:, ids.shape[1] :].numpy()
    logprobs = torch.log_softmax(torch.stack(out.logits, dim=1), dim=-1).amax(dim=-1).numpy()

    x, cache, _ = run_blocks(params, embed(params, ids, cfg), cfg, cache=empty_cache(cfg, 4, ids.shape[1] + new))
    result = jax.jit(decode, static_argnames=("cfg", "stop_ids", "max_new_tokens"))(
        params,
        None,
        cache,
        ids.shape[1],
        unembed(params, x[:, -1:], cfg)[:, 0],
        row_keys(0, jnp.arange(4), 1),
        jnp.asarray(0.0),
        cfg=cfg,
        stop_ids=(),
        max_new_tokens=new,
    )
    np.testing.assert_array_equal(result.tokens, expected)
    np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3_text"])
def test_ar_is_the_truncated_model_with_identity_norm(hf, case, tmp_path):
    """As the reference builds its AR: the first blocks, the final norm replaced by identity, the last token read."""
    import torch

    cfg, params = load(case)
    blocks = 4
    model = hf.load(CONFIGS[case], tmp_path / case).model
    model.layers, model.norm = model.layers[:blocks], torch.nn.Identity()
    model.config.num_hidden_layers = blocks
    texts = [[5, 9, 100, 3, 7, 7, 81, 30, 2, 64, 11], [1], [9, 8, 7, 6, 5, 4, 3]]
    ids, lengths = pad_prompts(texts)
    ar = ARParams(trunk=truncate(params, blocks), head=init_head(cfg.d_model))
    got = reconstruct(ar, ids, lengths, cfg.truncated(blocks))
    for row, text in enumerate(texts):
        with torch.no_grad():
            expected = model(torch.tensor([text])).last_hidden_state[0, -1].numpy()
        assert relative_error(got[row], expected) < TOLERANCE


def test_tiny_checkpoints_read_what_they_name(hf, tmp_path):
    """The comparison is between the models that the configs name, not between twice the same class."""
    kinds = {type(hf.load(CONFIGS[case], tmp_path / case)).__name__ for case in FAMILIES}
    assert kinds == {
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
    }
    assert text_config(CONFIGS["gemma3"])["model_type"] == "gemma3_text"
