"""Which fields of a Hugging Face config.json matter to which family: data for models/config.py.

Every field is read by the families listed here, known to leave the forward pass alone, or rejected by name.
"""

from __future__ import annotations

from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

# What Hugging Face's own config classes assume when config.json leaves a field out (Gemma 3's often does).
_COMMON = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "attention_bias": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "vocab_size": 32000, "tie_word_embeddings": False, "mlp_bias": False, "hidden_act": "silu"},
    "mistral": {
        **_COMMON,
        "vocab_size": 32000,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "hidden_act": "silu",
    },
    "qwen2": {
        **_COMMON,
        "vocab_size": 151936,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "hidden_act": "silu",
    },
    "qwen3": {
        **_COMMON,
        "vocab_size": 151936,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "hidden_act": "silu",
    },
    "gemma2": {
        **_COMMON,
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {
        **_COMMON,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
}

# Read by the tokenizer, the sampler or nobody: none of these changes what a forward pass computes. (The published
# Gemma 2 files say `sliding_window` again as sliding_window_size, which transformers ignores.)
HARMLESS = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache initializer_range
    attention_dropout hidden_dropout embd_pdrop resid_pdrop bos_token_id eos_token_id pad_token_id
    unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id suppress_tokens begin_suppress_tokens max_length min_length do_sample early_stopping
    num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    exponential_decay_length_penalty remove_invalid_values return_dict return_dict_in_generate output_scores
    output_hidden_states output_attentions torchscript pruned_heads chunk_size_feed_forward finetuning_task
    id2label label2id tokenizer_class prefix problem_type task_specific_params tf_legacy_loss use_bfloat16
    _name_or_path name_or_path auto_map _commit_hash attn_implementation _attn_implementation
    _attn_implementation_autoset pretraining_tp cache_implementation is_decoder is_encoder_decoder
    cross_attention_hidden_size add_cross_attention tie_encoder_decoder boi_token_index eoi_token_index
    image_token_index image_token_id boi_token_id eoi_token_id mm_tokens_per_image vision_config
    unsloth_version unsloth_fixed _unsloth_fixed sliding_window_size model_max_length max_sequence_length
    """.split()
)
_SHARED = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps tie_word_embeddings rope_theta rope_scaling rope_parameters max_position_embeddings
    """
_GEMMA = "hidden_activation attention_bias sliding_window layer_types query_pre_attn_scalar final_logit_softcapping"
_QWEN = "hidden_act sliding_window use_sliding_window max_window_layers layer_types"
# What each family computes with. A field of another family is rejected, unless it is null or false: transformers
# would ignore it, and whoever wrote it expected otherwise.
READ_BY = {
    family: frozenset(f"{_SHARED} {own}".split())
    for family, own in {
        "llama": "hidden_act attention_bias mlp_bias",
        "mistral": "hidden_act sliding_window",
        "qwen2": _QWEN,
        "qwen3": f"{_QWEN} attention_bias",
        "gemma2": f"{_GEMMA} attn_logit_softcapping",
        "gemma3": f"{_GEMMA} sliding_window_pattern _sliding_window_pattern rope_local_base_freq text_config",
    }.items()
}
READ = frozenset().union(*READ_BY.values())
