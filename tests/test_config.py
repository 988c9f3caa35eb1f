"""config.json: every field that matters changes the logits as it does in transformers; the rest is rejected by name."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from config_changes import ALIASES, CHANGES, field_of
from families import CONFIGS, changed, golden, hf_weights, newer, text_config, to_params, tokens
from reference import relative_error

from nla_jax.models.config import ModelConfig, RopeSpec, truncate_hf_config
from nla_jax.models.config_fields import HARMLESS, READ_BY
from nla_jax.models.errors import ConfigError
from nla_jax.models.params import abstract_params
from nla_jax.models.transformer import forward

EACH_CHANGE = [(case, label) for case, labels in CHANGES.items() for label in labels]


@pytest.mark.parametrize(("case", "label"), EACH_CHANGE)
def test_a_changed_field_changes_the_logits_as_in_transformers(case, label):
    base = newer(CONFIGS[case]) if label.startswith("newer ") else CONFIGS[case]
    config = changed(base, CHANGES[case][label])
    cfg = ModelConfig.from_hf(config)
    ids = np.minimum(tokens(), cfg.vocab_size - 1)
    params = to_params(hf_weights(config))
    with jax.disable_jit():  # each model runs once: op by op is faster than compiling it
        logits = forward(params, ids, cfg)[:, -1]
    assert jax.tree.map(lambda p: (p.shape, p.dtype), params) == jax.tree.map(
        lambda p: (p.shape, p.dtype), abstract_params(cfg)
    )
    expected, before = golden(case)[f"changed/{label}"], golden(case)["logits"][:, -1]
    assert relative_error(logits, expected) < 1e-4
    assert logits.shape != before.shape or relative_error(logits, before) > 1e-2


@pytest.mark.parametrize("family", READ_BY)
def test_every_field_that_is_read_has_such_a_change(family):
    """No field can be read without a test above."""
    cases = {"gemma3": ("gemma3_text", "gemma3")}.get(family, (family,))
    tested = {field_of(label) for case in cases for label in CHANGES[case]}
    # Without the field it names, max_position_embeddings is only the fallback of llama3 scaling: one family shows it.
    tested |= {"max_position_embeddings"} | {alias for alias, name in ALIASES.items() if name in tested}
    assert tested == READ_BY[family]


def test_labels_name_what_they_change():
    for case, label in EACH_CHANGE:
        assert field_of(label) in {*CHANGES[case][label], "text_config"}, (case, label)


def test_no_field_is_both_read_and_harmless():
    assert not HARMLESS & frozenset().union(*READ_BY.values())


def test_alias_of_the_sliding_window_pattern():
    old = CONFIGS["gemma3_text"]
    alias = changed(old, {"sliding_window_pattern": ..., "_sliding_window_pattern": 2})
    assert ModelConfig.from_hf(alias) == ModelConfig.from_hf(changed(old, {"sliding_window_pattern": 2}))


LLAMA3 = CONFIGS["llama"]["rope_scaling"]
REJECTED = [
    ("llama", {"model_type": "mixtral"}, "model_type"),
    ("llama", {"model_type": ...}, "model_type"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
    ("llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1], "long_factor": [2]}}, "longrope"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3]}}, "mrope_section"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
    ("llama", {"rope_scaling": {**LLAMA3, "beta_fast": 32}}, "beta_fast"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling"),
    ("llama", {"rope_parameters": [1], "rope_scaling": None}, "rope_parameters"),
    ("qwen2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters"),
    ("gemma3_text", {"rope_parameters": {"full_attention": 1e6}}, "full_attention"),
    ("llama", {"rope_theta": "1e6"}, "rope_theta"),
    ("llama", {"rope_theta": True}, "rope_theta"),
    ("llama", {"rope_theta": -1.0}, "rope_theta"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"num_experts": 8}, "num_experts"),
    ("llama", {"sliding_window": 4096}, "sliding_window"),
    ("llama", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"layer_types": ["full_attention"] * 5}, "layer_types"),
    ("qwen2", {"attention_bias": True}, "attention_bias"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias"),
    ("qwen3", {"use_sliding_window": False}, "layer_types"),
    ("qwen3", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("qwen3", {"layer_types": ["full_attention"] * 4 + ["chunked_attention"]}, "chunked_attention"),
    ("qwen3", {"layer_types": ["full_attention"] * 4 + [["sliding_attention"]]}, "layer_types"),
    ("qwen3", {"layer_types": "full_attention"}, "layer_types"),
    ("qwen2", {"max_window_layers": None}, "max_window_layers"),
    ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window"),
    ("mistral", {"sliding_window": "4096"}, "sliding_window"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("gemma2", {"sliding_window": None}, "sliding_window"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
    ("gemma2", {"attn_logit_softcapping": "50"}, "attn_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma2", {"hidden_activation": "quick_gelu"}, "quick_gelu"),
    ("llama", {"hidden_act": ["silu"]}, "activation"),
    ("llama", {"hidden_size": ...}, "hidden_size"),
    ("llama", {"hidden_size": "48"}, "hidden_size"),
    ("llama", {"hidden_size": 48.0}, "hidden_size"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers"),
    ("llama", {"num_hidden_layers": ...}, "num_hidden_layers"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
    ("llama", {"num_attention_heads": 5}, "num_attention_heads"),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads"),
    ("llama", {"head_dim": 9}, "head_dim"),
    ("llama", {"vocab_size": -1}, "vocab_size"),
    ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings"),
    ("llama", {"attention_bias": 1}, "attention_bias"),
    ("gemma3", {"model_type": "siglip"}, "text_config"),
]


@pytest.mark.parametrize(("case", "change", "named"), REJECTED, ids=[f"{c}-{n}" for c, _, n in REJECTED])
def test_unsupported_values_are_rejected_by_name(case, change, named):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(changed(CONFIGS[case], change), source="some/config.json")
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_wrapper_needs_its_text_part():
    for text in (None, "gemma3_text", []):
        with pytest.raises(ConfigError, match="text_config"):
            ModelConfig.from_hf({**CONFIGS["gemma3"], "text_config": text})


@pytest.mark.parametrize(("top", "nested"), [(True, False), (False, True), (None, False), (None, True)])
def test_tying_in_a_wrapper(top, nested):
    """The wrapper's own field holds (its output layer is what is tied); where it has none, the nested one."""
    config = changed(CONFIGS["gemma3"], {"tie_word_embeddings": nested})
    config.pop("tie_word_embeddings")
    if top is not None:
        config["tie_word_embeddings"] = top
    assert ModelConfig.from_hf(config).tied == (nested if top is None else top)


def test_fields_that_change_nothing_are_accepted():
    """Among them what published files carry beside the fields that are read."""
    for case, extra in {
        "llama": {"use_cache": False, "pretraining_tp": 1, "sliding_window": None, "torch_dtype": "bfloat16"},
        "gemma2": {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4096, "cache_implementation": "hybrid"},
        "gemma3": {"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    }.items():
        assert ModelConfig.from_hf(changed(CONFIGS[case], extra)) == ModelConfig.from_hf(CONFIGS[case])


def test_config_is_hashable_and_truncates():
    cfg = ModelConfig.from_hf(CONFIGS["gemma3_text"])
    assert hash(cfg) == hash(ModelConfig.from_hf(CONFIGS["gemma3_text"]))
    for spelling in (CONFIGS["gemma3_text"], newer(CONFIGS["gemma3_text"]), CONFIGS["gemma3"]):
        full = ModelConfig.from_hf(spelling)
        assert ModelConfig.from_hf(truncate_hf_config(spelling, 4)) == full.truncated(4)
    assert cfg.truncated(4).windows == (5, 5, 0, 5) and cfg.truncated(4).local_rope == (True, True, False, True)
    for n in (0, 8):
        with pytest.raises(ConfigError, match="n_layers"):
            cfg.truncated(n)


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "3"])
def test_config_file_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


# Published shapes of the models that pairs were released for. The Gemma files leave most fields to the defaults.
GEMMA_12B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "model_type": "gemma3_text",
        "num_attention_heads": 16,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
GEMMA_27B = changed(
    GEMMA_12B,
    {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
    },
)
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def _shape(cfg: ModelConfig) -> tuple[int, ...]:
    return cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_ff, cfg.vocab_size


@pytest.mark.parametrize(
    ("config", "shape", "query_scale"),
    [
        (GEMMA_12B, (48, 3840, 16, 8, 256, 15360, 262208), 256**-0.5),
        (GEMMA_27B, (62, 5376, 32, 16, 128, 21504, 262208), 168**-0.5),
    ],
    ids=["12b", "27b"],
)
@pytest.mark.parametrize("part", ["wrapper", "text"])
def test_gemma_3(config, shape, query_scale, part):
    cfg = ModelConfig.from_hf(config if part == "wrapper" else text_config(config))
    assert _shape(cfg) == shape and cfg.family == "gemma3"
    assert cfg.query_scale == pytest.approx(query_scale)
    assert cfg.rope == RopeSpec(theta=1e6, kind="linear", factor=8.0) and cfg.rope_local == RopeSpec(theta=1e4)
    assert cfg.windows == tuple(1024 if (i + 1) % 6 else 0 for i in range(cfg.n_layers))
    assert cfg.local_rope == tuple(w > 0 for w in cfg.windows)
    assert cfg.tied and cfg.qk_norm and cfg.post_norms and cfg.norm_plus_one and cfg.scale_embeddings
    assert cfg.activation == "gelu_tanh" and cfg.norm_eps == 1e-6
    assert cfg.attn_softcap is None and cfg.logit_softcap is None and not cfg.qkv_bias


def test_llama_3_3_70b():
    cfg = ModelConfig.from_hf(LLAMA_70B)
    assert _shape(cfg) == (80, 8192, 64, 8, 128, 28672, 128256)
    assert cfg.rope == RopeSpec(5e5, "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=8192)
    assert cfg.rope_local is None and not cfg.tied and set(cfg.windows) == {0} and cfg.norm_eps == 1e-5
    assert not (cfg.qkv_bias or cfg.out_bias or cfg.mlp_bias or cfg.qk_norm or cfg.post_norms)


@pytest.mark.parametrize(
    ("folder", "blocks"), [("Qwen2.5-7B-Instruct", 28), ("qwen2.5-7b-L20-av", 28), ("qwen2.5-7b-L20-ar", 21)]
)
def test_released_qwen_configs(shared_data, folder, blocks):
    cfg = ModelConfig.from_dir(shared_data / "released" / folder)
    assert _shape(cfg) == (blocks, 3584, 28, 4, 128, 18944, 152064)
    assert cfg.rope == RopeSpec(theta=1e6) and cfg.qkv_bias and not cfg.out_bias and not cfg.tied
    assert set(cfg.windows) == {0} and cfg.norm_eps == 1e-6 and cfg.activation == "silu"


def test_released_ar_is_the_truncated_base(shared_data):
    base = json.loads((shared_data / "released" / "Qwen2.5-7B-Instruct" / "config.json").read_text())
    ar = ModelConfig.from_dir(shared_data / "released" / "qwen2.5-7b-L20-ar")
    assert ar == ModelConfig.from_hf(truncate_hf_config(base, 21)) == ModelConfig.from_hf(base).truncated(21)


def test_mistral_7b_config(shared_data):
    cfg = ModelConfig.from_dir(shared_data / "tokenizers" / "mistral-7b-instruct-v0.3")
    assert _shape(cfg) == (32, 4096, 32, 8, 128, 14336, 32768)
    assert set(cfg.windows) == {0} and cfg.rope == RopeSpec(theta=1e6) and cfg.norm_eps == 1e-5
