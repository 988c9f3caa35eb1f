"""The sizes of the released pairs' targets, as their config.json state them: what `nla plan` builds their programs from
without a download. Data only.

`config`: the fields of config.json that the arithmetic depends on (Qwen/Qwen2.5-7B-Instruct, google/gemma-3-12b-it,
google/gemma-3-27b-it, meta-llama/Llama-3.3-70B-Instruct). `prompt` and `marker`: tokens of the AV prompt, and those of
them before the marker; `ar_prompt`: tokens of the AR prompt around an explanation. All three were counted with Qwen's
tokenizer and stand for the other families too, whose tokenizers differ by some ten tokens of 125.
"""

_PROMPTS = {"prompt": 125, "marker": 111, "ar_prompt": 21}
_GEMMA_3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}

ARCHITECTURES = {
    "Qwen/Qwen2.5-7B-Instruct": {
        **_PROMPTS,
        "config": {
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
        },
    },
    "google/gemma-3-12b-it": {
        **_PROMPTS,
        "config": {
            **_GEMMA_3,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
        },
    },
    "google/gemma-3-27b-it": {
        **_PROMPTS,
        "config": {
            **_GEMMA_3,
            "hidden_size": 5376,
            "intermediate_size": 21504,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "query_pre_attn_scalar": 168,
        },
    },
    "meta-llama/Llama-3.3-70B-Instruct": {
        **_PROMPTS,
        "config": {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
    },
}
