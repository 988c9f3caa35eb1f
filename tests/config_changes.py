"""For each tiny checkpoint of families.py, one changed value (or more) of every config field that matters.

`CHANGES[case][label]` holds the fields to replace in the text part of the config (`...` removes one); the label is
the field that the change is about. A label that starts with "newer " changes the newer spelling of the config. The
results that transformers gives for each are among the goldens.
"""

from __future__ import annotations

from typing import Any

from families import CONFIGS

FULL, SLIDING = "full_attention", "sliding_attention"
_LLAMA3 = CONFIGS["llama"]["rope_scaling"]
_LINEAR = {"rope_type": "linear", "factor": 2.0}

# Shapes follow from these, so that a model which ignored one could not hold the changed checkpoint's tensors.
_SIZES: dict[str, dict[str, Any]] = {
    "vocab_size": {"vocab_size": 140},
    "hidden_size": {"hidden_size": 36},
    "intermediate_size": {"intermediate_size": 64},
    "num_hidden_layers": {"num_hidden_layers": 4},
    "num_attention_heads": {"num_attention_heads": 4},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "head_dim": {"head_dim": 12},
    "rms_norm_eps": {"rms_norm_eps": 0.05},
}
_NOT_GEMMA = {
    "num_key_value_heads null": {"num_key_value_heads": None},
    "hidden_act tanh": {"hidden_act": "gelu_new"},
    "hidden_act relu": {"hidden_act": "relu"},
    "rope_theta": {"rope_theta": 40.0},
    "rope_theta absent": {"rope_theta": ...},
    "rope_scaling": {"rope_scaling": {"type": "linear", "factor": 5.0}},
    "newer rope_parameters theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 35.0}},
    "newer rope_parameters linear": {"rope_parameters": {"rope_theta": 350.0, **_LINEAR}},
    "newer rope_parameters llama3": {"rope_parameters": {"rope_theta": 350.0, **_LLAMA3}},
}
_WINDOWED = {
    "sliding_window": {"sliding_window": 9},
    "sliding_window null": {"sliding_window": None},
}
_QWEN = {
    **_SIZES,
    **_NOT_GEMMA,
    **_WINDOWED,
    "use_sliding_window": {"use_sliding_window": False},
    "layer_types": {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL]},
    "head_dim absent": {"head_dim": ...},
}
_GEMMA = {
    **_SIZES,
    "hidden_activation": {"hidden_activation": "relu"},
    "sliding_window": {"sliding_window": 9},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 50},
    "final_logit_softcapping": {"final_logit_softcapping": 0.7},
    "attention_bias": {"attention_bias": False},
    "rope_theta": {"rope_theta": 40.0},
}

CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        **_SIZES,
        **_NOT_GEMMA,
        "head_dim absent": {"head_dim": ...},
        "tie_word_embeddings": {"tie_word_embeddings": True},
        "attention_bias": {"attention_bias": False},
        "mlp_bias": {"mlp_bias": False},
        "rope_scaling null": {"rope_scaling": None},
        "rope_scaling factor": {"rope_scaling": {**_LLAMA3, "factor": 9.0}},
        "rope_scaling low_freq_factor": {"rope_scaling": {**_LLAMA3, "low_freq_factor": 0.4}},
        "rope_scaling high_freq_factor": {"rope_scaling": {**_LLAMA3, "high_freq_factor": 12.0}},
        "rope_scaling original": {"rope_scaling": {**_LLAMA3, "original_max_position_embeddings": 16}},
        "max_position_embeddings": {
            "rope_scaling": {k: v for k, v in _LLAMA3.items() if k != "original_max_position_embeddings"},
            "max_position_embeddings": 20,
        },
    },
    "mistral": {
        **_SIZES,
        # transformers refuses null heads here; the two gelus are too close to each other to tell apart
        **{k: v for k, v in _NOT_GEMMA.items() if k not in ("num_key_value_heads null", "hidden_act tanh")},
        **_WINDOWED,
        "head_dim absent": {"head_dim": ...},
        "tie_word_embeddings": {"tie_word_embeddings": True},
    },
    "qwen2": {
        **_QWEN,
        "tie_word_embeddings": {"tie_word_embeddings": True},
        "max_window_layers": {"max_window_layers": 4},
    },
    "qwen3": {
        **{k: v for k, v in _QWEN.items() if k != "head_dim absent"},
        # transformers refuses layer_types that ask for a window where there is none
        "use_sliding_window": {"layer_types": ..., "use_sliding_window": False},
        "sliding_window null": {"layer_types": ..., "sliding_window": None},
        "num_hidden_layers": {"num_hidden_layers": 4, "layer_types": CONFIGS["qwen3"]["layer_types"][:4]},
        "tie_word_embeddings": {"tie_word_embeddings": False},
        "attention_bias": {"attention_bias": False},
        "max_window_layers": {"layer_types": ..., "max_window_layers": 3},
    },
    "gemma2": {
        **_GEMMA,
        "tie_word_embeddings": {"tie_word_embeddings": False},
        "attn_logit_softcapping": {"attn_logit_softcapping": 0.4},
        "attn_logit_softcapping null": {"attn_logit_softcapping": None},
        "final_logit_softcapping null": {"final_logit_softcapping": None},
        "layer_types": {"layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING]},
        "rope_scaling": {"rope_scaling": _LINEAR},
        "newer rope_parameters": {"rope_parameters": {"rope_theta": 350.0, **_LINEAR}},
    },
    "gemma3_text": {
        **_GEMMA,
        "tie_word_embeddings": {"tie_word_embeddings": True},
        "final_logit_softcapping null": {"final_logit_softcapping": None},
        "layer_types": {"layer_types": [FULL, FULL, SLIDING, FULL, SLIDING, SLIDING, SLIDING]},
        "sliding_window_pattern": {"sliding_window_pattern": 2},
        "sliding_window_pattern absent": {"sliding_window_pattern": ...},
        "rope_theta absent": {"rope_theta": ...},
        "rope_local_base_freq": {"rope_local_base_freq": 15.0},
        "rope_local_base_freq absent": {"rope_local_base_freq": ...},
        "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 7.0}},
        "rope_scaling null": {"rope_scaling": None},
        "newer rope_parameters full": {
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 95.0},
                SLIDING: {"rope_type": "default", "rope_theta": 60.0},
            }
        },
        "newer rope_parameters sliding": {
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
                SLIDING: {"rope_type": "linear", "factor": 2.0, "rope_theta": 60.0},
            }
        },
    },
    "gemma3": {
        "text_config": {"sliding_window": 9, "rope_theta": 40.0},
        "rope_local_base_freq": {"rope_local_base_freq": 15.0},
    },
}

# transformers writes `_sliding_window_pattern` beside layer_types but reads only the name without underscore, so
# there is no result of its own to compare with: here both names mean the same.
ALIASES = {"_sliding_window_pattern": "sliding_window_pattern"}


def field_of(label: str) -> str:
    """The config field that a label of `CHANGES` is about."""
    return label.removeprefix("newer ").split(" ")[0]
