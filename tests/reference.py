"""A decoder in plain numpy and float64, from a config.json in the older spelling and tensors by their Hugging Face
names: one token after another and one head after another, sharing no code and no layout with the models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

_erf = np.vectorize(math.erf)


def relative_error(got: Any, expected: Any) -> float:
    """Largest deviation within a vector (last axis) over that vector's largest entry; the worst of all vectors."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float(np.max(np.abs(got - expected).max(axis=-1) / np.abs(expected).max(axis=-1)))


def attention(q, k, v, *, scale: float, window: int = 0, cap: float | None = None, offset: int = 0) -> np.ndarray:
    """q [T, N, H] at positions offset.., k and v [S, K, H] at positions 0..: causal, grouped, in float64."""
    T, N, _ = q.shape
    out = np.zeros(q.shape)
    for t in range(T):
        for n in range(N):
            first = max(0, offset + t - window + 1) if window else 0
            seen, head = slice(first, offset + t + 1), n // (N // k.shape[1])
            s = k[seen, head].astype(np.float64) @ q[t, n].astype(np.float64) * scale
            s = cap * np.tanh(s / cap) if cap else s
            w = np.exp(s - s.max())
            out[t, n] = w @ v[seen, head] / w.sum()
    return out


def decoder(
    weights: dict[str, np.ndarray],
    config: dict[str, Any],
    ids: np.ndarray,
    *,
    n_layers: int | None = None,
    embeddings: Callable[[np.ndarray], np.ndarray] = lambda x: x,
    after_block: Callable[[int, np.ndarray], np.ndarray] = lambda layer, x: x,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Residual streams [T, D] after every block, and the final-norm logits [T, V], of one sequence of ids [T].

    `embeddings` and `after_block` may change the stream before the first block and after each."""
    kind = config["model_type"]
    gemma = kind.startswith("gemma")
    d, n_heads = config["hidden_size"], config["num_attention_heads"]
    h = config.get("head_dim") or d // n_heads
    n_layers = config["num_hidden_layers"] if n_layers is None else n_layers
    scale = config["query_pre_attn_scalar"] ** -0.5 if gemma else h**-0.5
    eps = config["rms_norm_eps"]

    def w(name: str) -> np.ndarray:
        return weights[name].astype(np.float64)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        weight = w(name + ".weight") + (1.0 if gemma else 0.0)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        y = x @ w(name + ".weight").T
        return y + w(name + ".bias") if name + ".bias" in weights else y

    def activation(x: np.ndarray) -> np.ndarray:
        name = config.get("hidden_activation") or config["hidden_act"]
        if name == "silu":
            return x / (1 + np.exp(-x))
        if name == "relu":
            return np.maximum(x, 0)
        if name == "gelu":
            return x * (1 + _erf(x / math.sqrt(2))) / 2
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2

    def rotate(x: np.ndarray, local: bool) -> np.ndarray:
        theta = config["rope_local_base_freq"] if local else config.get("rope_theta", 10_000.0)
        out = np.empty_like(x)
        for i in range(h // 2):
            frequency = _scaled(theta ** (-2 * i / h), {} if local else config.get("rope_scaling") or {})
            angle = np.arange(len(x))[:, None] * frequency
            a, b = x[..., i], x[..., i + h // 2]
            out[..., i], out[..., i + h // 2] = (
                a * np.cos(angle) - b * np.sin(angle),
                b * np.cos(angle) + a * np.sin(angle),
            )
        return out

    x = w("model.embed_tokens.weight")[ids] * (math.sqrt(d) if gemma else 1.0)
    x = embeddings(x)
    streams = []
    for layer in range(n_layers):
        block = f"model.layers.{layer}."
        local = _is_local(config, layer)
        y = norm(x, block + "input_layernorm")
        q, k, v = (linear(y, f"{block}self_attn.{p}_proj").reshape(len(ids), -1, h) for p in "qkv")
        if kind in ("qwen3", "gemma3_text"):
            q, k = norm(q, block + "self_attn.q_norm"), norm(k, block + "self_attn.k_norm")
        q, k = (rotate(z, local and kind == "gemma3_text") for z in (q, k))
        window = config["sliding_window"] if local else 0
        y = attention(q, k, v, scale=scale, window=window, cap=config.get("attn_logit_softcapping"))
        y = linear(y.reshape(len(ids), -1), block + "self_attn.o_proj")
        x = x + (norm(y, block + "post_attention_layernorm") if gemma else y)
        y = norm(x, block + ("pre_feedforward_layernorm" if gemma else "post_attention_layernorm"))
        y = activation(linear(y, block + "mlp.gate_proj")) * linear(y, block + "mlp.up_proj")
        y = linear(y, block + "mlp.down_proj")
        x = x + (norm(y, block + "post_feedforward_layernorm") if gemma else y)
        x = after_block(layer, x)
        streams.append(x)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).astype(np.float64)
    logits = norm(x, "model.norm") @ head.T
    cap = config.get("final_logit_softcapping")
    return streams, cap * np.tanh(logits / cap) if cap else logits


def _is_local(config: dict[str, Any], layer: int) -> bool:
    kind = config["model_type"]
    if "layer_types" in config:
        return config["layer_types"][layer] == "sliding_attention"
    if kind == "qwen2":
        return config["use_sliding_window"] and layer >= config["max_window_layers"]
    period = {"gemma2": 2, "gemma3_text": config.get("sliding_window_pattern")}.get(kind)
    return kind == "mistral" or (period is not None and (layer + 1) % period != 0)


def _scaled(frequency: float, scaling: dict[str, Any]) -> float:
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind is None:
        return frequency
    if kind == "linear":
        return frequency / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = min(max((turns - low) / (high - low), 0.0), 1.0)  # share of the frequency that is left as it is
    return kept * frequency + (1 - kept) * frequency / scaling["factor"]
