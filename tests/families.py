"""Tiny checkpoints of every family: config.json dicts with no default left in a field that matters, and weights.

Weights are made from the tensor names alone, so that nothing but results needs to be stored: the script that asks
transformers for golden results (make_goldens.py) and the tests build the same checkpoints. Only numpy is needed to
make them; `to_params` is a second way from Hugging Face names to parameters, independent of models/hf.py.
"""

from __future__ import annotations

import copy
import functools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).parent / "goldens"
BATCH, LENGTH = 2, 32
PREFILL = 7  # tokens read at once before the cached decode goes on one by one

_SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 0.003,
    "max_position_embeddings": 512,
}
# Wavelengths of head_dim 10 at theta 300 are 6, 20, 61, 193 and 602 tokens: with 64 original tokens and bounds 1 and
# 4, one is kept (< 16), two are blended, two are divided (> 64).
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_MIXED = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "sliding_attention"]
_GEMMA3 = {
    **_SIZES,
    "model_type": "gemma3_text",
    "num_hidden_layers": 7,
    "head_dim": 10,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 23,
    "sliding_window": 5,
    "sliding_window_pattern": 3,
    "rope_theta": 700.0,
    "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    "rope_local_base_freq": 60.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
}

# In the older spelling of config.json. `llama2` is an older Llama: as many key heads as heads, tied, linear scaling.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        **_SIZES,
        "model_type": "llama",
        "num_hidden_layers": 5,
        "head_dim": 10,
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_theta": 300.0,
        "rope_scaling": _LLAMA3,
        "tie_word_embeddings": False,
    },
    "llama2": {
        **{k: v for k, v in _SIZES.items() if k != "num_key_value_heads"},
        "model_type": "llama",
        "num_hidden_layers": 5,
        "hidden_act": "relu",
        "rope_scaling": {"type": "linear", "factor": 2.5},
        "tie_word_embeddings": True,
    },
    "mistral": {
        **_SIZES,
        "model_type": "mistral",
        "num_hidden_layers": 5,
        "head_dim": 10,
        "hidden_act": "gelu",
        "sliding_window": 5,
        "rope_theta": 500.0,
        "tie_word_embeddings": False,
    },
    "qwen2": {
        **_SIZES,
        "model_type": "qwen2",
        "num_hidden_layers": 5,
        "head_dim": 10,
        "hidden_act": "silu",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        "rope_theta": 900.0,
        "tie_word_embeddings": False,
    },
    "qwen3": {
        **_SIZES,
        "model_type": "qwen3",
        "num_hidden_layers": 5,
        "head_dim": 16,
        "hidden_act": "silu",
        "attention_bias": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
        "layer_types": _MIXED,
        "rope_theta": 400.0,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        **_SIZES,
        "model_type": "gemma2",
        "num_hidden_layers": 5,
        "head_dim": 10,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": True,
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
        "sliding_window": 5,
        "rope_theta": 800.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        **_GEMMA3,
        "attention_bias": True,
        "final_logit_softcapping": 2.5,
        "tie_word_embeddings": False,
        "hidden_activation": "gelu",
    },
    "gemma3": {
        "model_type": "gemma3",
        "text_config": _GEMMA3,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
        },
        "mm_tokens_per_image": 4,
        "image_token_index": 130,
        "boi_token_index": 128,
        "eoi_token_index": 129,
        "tie_word_embeddings": True,
    },
}
FAMILIES = tuple(CONFIGS)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json."""
    return config.get("text_config", config)


def newer(config: dict[str, Any]) -> dict[str, Any]:
    """The same model as newer saves of transformers spell it: `rope_parameters` and `layer_types`."""
    config = copy.deepcopy(config)
    text = text_config(config)
    kind, n = text["model_type"], text["num_hidden_layers"]
    scaling = text.pop("rope_scaling", None) or {"rope_type": "default"}
    rope = {"rope_theta": text.pop("rope_theta", 10_000.0), **scaling}
    rope["rope_type"] = rope.pop("type", rope.get("rope_type"))
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": text.pop("rope_local_base_freq")}
        rope = {"full_attention": rope, "sliding_attention": local}
        period = text.pop("sliding_window_pattern")
        text["layer_types"] = [("sliding" if (i + 1) % period else "full") + "_attention" for i in range(n)]
    elif kind == "gemma2":
        text["layer_types"] = [("full" if i % 2 else "sliding") + "_attention" for i in range(n)]
    elif kind == "qwen2":
        first = text.pop("max_window_layers")
        text["layer_types"] = [("sliding" if i >= first else "full") + "_attention" for i in range(n)]
    text["rope_parameters"] = rope
    return config


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`config` with fields of its text part replaced; a value of `...` removes the field."""
    config = copy.deepcopy(config)
    text = text_config(config)
    for name, value in changes.items():
        text.pop(name, None)
        if value is not ...:
            text[name] = value
    return config


def tokens() -> np.ndarray:
    """Token ids int32 [BATCH, LENGTH], the same for every family."""
    raw = np.random.PCG64(zlib.crc32(b"tokens")).random_raw(BATCH * LENGTH)
    return (raw % np.uint64(128)).astype(np.int32).reshape(BATCH, LENGTH)


def _unit(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of unit variance seeded by a name. Made from raw bits: numpy never changes those, unlike its normals."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(11)) * 2.0**-53 - 0.5).reshape(shape) * 12**0.5


def hf_weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Float32 tensors of a checkpoint under the names of a text-only save, `model.layers.0...`.

    Biases are far from zero and norms far from constant, so that one left out or swapped shows."""
    text = text_config(config)
    kind = text["model_type"]
    d, f, v = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    h = text.get("head_dim") or d // heads
    gemma = kind.startswith("gemma")
    out: dict[str, np.ndarray] = {}

    def add(name: str, shape: tuple[int, ...], spread: float, centre: float = 0.0) -> None:
        out[name] = (centre + spread * _unit(name, shape)).astype(np.float32)

    def linear(name: str, rows: int, cols: int, bias: bool) -> None:
        add(f"{name}.weight", (rows, cols), 1.3 * cols**-0.5)
        if bias:
            add(f"{name}.bias", (rows,), 0.4)

    def norm(name: str, size: int) -> None:
        add(f"{name}.weight", (size,), 0.3, 0.0 if gemma else 1.0)

    add("model.embed_tokens.weight", (v, d), 0.3 if gemma else 1.0)
    qkv_bias = kind == "qwen2" or text.get("attention_bias", False)
    for i in range(text["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name, size in (("q_proj", heads * h), ("k_proj", kv_heads * h), ("v_proj", kv_heads * h)):
            linear(f"{block}.self_attn.{name}", size, d, qkv_bias)
        linear(f"{block}.self_attn.o_proj", d, heads * h, text.get("attention_bias", False))
        for name, rows, cols in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)):
            linear(f"{block}.mlp.{name}", rows, cols, text.get("mlp_bias", False))
        norm(f"{block}.input_layernorm", d)
        norm(f"{block}.post_attention_layernorm", d)
        if kind in ("qwen3", "gemma3_text"):
            norm(f"{block}.self_attn.q_norm", h)
            norm(f"{block}.self_attn.k_norm", h)
        if gemma:
            norm(f"{block}.pre_feedforward_layernorm", d)
            norm(f"{block}.post_feedforward_layernorm", d)
    norm("model.norm", d)
    if not text.get("tie_word_embeddings", gemma):
        add("lm_head.weight", (v, d), d**-0.5)
    return out


def wrapped(weights: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    """The names of a multimodal save: "older" (`language_model.model.`) or "newer" (`model.language_model.`)."""

    def rename(name: str) -> str:
        if layout == "older":
            return "language_model." + name
        return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name

    return {rename(name): w for name, w in weights.items()}


def write_checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    """A Hugging Face checkpoint directory: config.json and model.safetensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file({k: np.ascontiguousarray(w) for k, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def to_params(weights: dict[str, np.ndarray], dtype: Any = np.float32) -> Any:
    """Parameters from tensors named as a text-only save; what is tied or absent stays None."""
    import jax.numpy as jnp

    from nla_jax.models.params import Layers, Params

    gemma = "model.layers.0.pre_feedforward_layernorm.weight" in weights
    names = {
        "attn_norm": "input_layernorm.weight",
        "wq": "self_attn.q_proj.weight",
        "wk": "self_attn.k_proj.weight",
        "wv": "self_attn.v_proj.weight",
        "wo": "self_attn.o_proj.weight",
        "bq": "self_attn.q_proj.bias",
        "bk": "self_attn.k_proj.bias",
        "bv": "self_attn.v_proj.bias",
        "bo": "self_attn.o_proj.bias",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "mlp_norm": ("pre_feedforward" if gemma else "post_attention") + "_layernorm.weight",
        "attn_post_norm": "post_attention_layernorm.weight" if gemma else "",
        "mlp_post_norm": "post_feedforward_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "down": "mlp.down_proj.weight",
        "b_gate": "mlp.gate_proj.bias",
        "b_up": "mlp.up_proj.bias",
        "b_down": "mlp.down_proj.bias",
    }
    n = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("model.layers."))

    def stacked(name: str) -> Any:
        if f"model.layers.0.{name}" not in weights:
            return None
        return jnp.asarray(np.stack([weights[f"model.layers.{i}.{name}"].T for i in range(n)]), dtype)

    def single(name: str) -> Any:
        return jnp.asarray(weights[name].T, dtype) if name in weights else None

    return Params(
        embed=jnp.asarray(weights["model.embed_tokens.weight"], dtype),
        layers=Layers(**{field: stacked(name) for field, name in names.items()}),
        final_norm=single("model.norm.weight"),
        lm_head=single("lm_head.weight"),
    )


@functools.cache
def load(case: str) -> tuple[Any, Any]:
    """`ModelConfig` and float32 parameters of a tiny checkpoint."""
    from nla_jax.models.config import ModelConfig

    return ModelConfig.from_hf(CONFIGS[case]), to_params(hf_weights(CONFIGS[case]))


@functools.cache
def golden(case: str) -> dict[str, np.ndarray]:
    """What transformers computes for a tiny checkpoint (written by make_goldens.py)."""
    with np.load(GOLDENS / f"{case}.npz") as arrays:
        return dict(arrays)
