"""`ModelConfig`: everything about an architecture that changes its arithmetic, read from a Hugging Face config.json.

Six families are known: Llama 2/3.x, Mistral, Qwen2/2.5, Qwen3, Gemma 2 and Gemma 3 (text, or the text part of the
multimodal wrapper). Both spellings of config.json are read: the older one (`rope_theta`, `rope_scaling`,
`rope_local_base_freq`, `sliding_window_pattern`) and the newer one (`rope_parameters`, `layer_types`). A field is
either read, known to leave the forward pass alone, or rejected by name; nothing is silently dropped.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from nla_jax.models.errors import ConfigError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
_MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

# What Hugging Face's own config classes assume when config.json leaves a field out (Gemma 3's often does).
_COMMON = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "attention_bias": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
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

# Read by the tokenizer, the sampler or nobody: none of these changes what a forward pass computes.
_HARMLESS = frozenset(
    """
    architectures model_type torch_dtype dtype transformers_version use_cache initializer_range attention_dropout
    hidden_dropout embd_pdrop resid_pdrop bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id
    cls_token_id mask_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id suppress_tokens
    begin_suppress_tokens max_position_embeddings max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences exponential_decay_length_penalty
    remove_invalid_values return_dict return_dict_in_generate output_scores output_hidden_states output_attentions
    torchscript pruned_heads chunk_size_feed_forward finetuning_task id2label label2id tokenizer_class prefix
    problem_type task_specific_params tf_legacy_loss use_bfloat16 _name_or_path name_or_path auto_map
    attn_implementation _attn_implementation _attn_implementation_autoset pretraining_tp cache_implementation
    is_decoder is_encoder_decoder cross_attention_hidden_size add_cross_attention tie_encoder_decoder
    boi_token_index eoi_token_index image_token_index image_token_id boi_token_id eoi_token_id mm_tokens_per_image
    vision_config unsloth_version unsloth_fixed _unsloth_fixed
    """.split()
)
_READ = frozenset(
    """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act hidden_activation rms_norm_eps tie_word_embeddings attention_bias mlp_bias rope_theta rope_scaling
    rope_parameters rope_local_base_freq sliding_window use_sliding_window max_window_layers layer_types
    sliding_window_pattern _sliding_window_pattern query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping text_config
    """.split()
)


@dataclasses.dataclass(frozen=True)
class RopeSpec:
    """Rotary frequencies. `kind` is "default", "linear" (positions divided by `factor`) or "llama3"
    (low frequencies divided by `factor`, smooth between the two bounds; `original_len` in tokens)."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_len: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A frozen, hashable description of one decoder.

    `windows[l]` is the sliding window of block l in tokens, itself included (0: the whole past); `local_rope[l]`
    says that block l rotates with `rope_local` instead of `rope` (Gemma 3's local blocks).
    """

    family: str
    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    windows: tuple[int, ...]
    rope: RopeSpec
    rope_local: RopeSpec | None = None
    local_rope: tuple[bool, ...] = ()
    norm_eps: float = 1e-6
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False  # Gemma: a second norm on each branch's output
    norm_plus_one: bool = False  # Gemma: the stored norm weight is an offset from 1
    scale_embeddings: bool = False  # Gemma: token embeddings are multiplied by sqrt(D)
    tied: bool = False
    query_scale: float = 1.0
    attn_softcap: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                "num_attention_heads",
                expected=f"a multiple of num_key_value_heads={self.n_kv_heads}",
                got=self.n_heads,
            )
        if len(self.windows) != self.n_layers:
            raise ConfigError("layer_types", expected=f"{self.n_layers} entries", got=len(self.windows))
        if self.head_dim % 2:
            raise ConfigError("head_dim", expected="an even number (rotary pairs)", got=self.head_dim)

    def truncated(self, n_layers: int) -> ModelConfig:
        """The same architecture with its first `n_layers` blocks only (an AR trunk has layer_index + 1)."""
        if not 1 <= n_layers <= self.n_layers:
            raise ConfigError("n_layers", expected=f"1..{self.n_layers}", got=n_layers)
        return dataclasses.replace(
            self, n_layers=n_layers, windows=self.windows[:n_layers], local_rope=self.local_rope[:n_layers]
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any], *, source: str = "config.json") -> ModelConfig:
        """Reads a parsed config.json; raises ConfigError naming the first field it cannot honour."""
        return _from_hf(config, source)

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Reads `path`/config.json."""
        return cls.from_hf(read_hf_config(path), source=str(Path(path) / "config.json"))


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint directory; ConfigError if it is missing or not a JSON object."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{file} does not exist", fix="point at a Hugging Face model directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error})", fix="copy the file again") from None
    if not isinstance(config, dict):
        raise ConfigError(str(file), expected="a JSON object", got=type(config).__name__)
    return config


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's fields: the nested `text_config` of a multimodal wrapper, or `config` itself."""
    nested = config.get("text_config")
    if not isinstance(nested, dict):
        return config
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return {**tied, **nested}


def truncate_hf_config(config: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """A copy of a config.json with `n_layers` blocks, as the reference writes for an AR."""
    out = json.loads(json.dumps(config))
    part = out["text_config"] if isinstance(out.get("text_config"), dict) else out
    part["num_hidden_layers"] = n_layers
    if isinstance(part.get("layer_types"), list):
        part["layer_types"] = part["layer_types"][:n_layers]
    return out


def _from_hf(config: dict[str, Any], source: str) -> ModelConfig:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise ConfigError(
            f"{source}: model_type",
            expected=" or ".join(_MODEL_TYPES),
            got=repr(model_type),
            fix="a checkpoint of a supported family; custom model code is never run",
        )
    family = _MODEL_TYPES[model_type]
    # A wrapper's own fields must be harmless too; its text part is what is computed.
    given = text_part(config)
    for field, value in {**config, **given}.items():
        if field not in _READ and field not in _HARMLESS and value not in (None, False, {}, [], 0):
            raise ConfigError(
                f"{source}: field {field!r} is not supported",
                got=repr(value)[:60],
                fix="a checkpoint without it, or remove the field if it changes nothing",
            )
    fields = {**_DEFAULTS[family], **given}

    def need(name: str) -> int:
        value = fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{source}: {name}", expected="a positive integer", got=repr(value))
        return value

    def number(name: str) -> float:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"{source}: {name}", expected="a positive number", got=repr(value))
        return float(value)

    gemma = family in ("gemma2", "gemma3")
    n_layers, n_heads, d_model = need("num_hidden_layers"), need("num_attention_heads"), need("hidden_size")
    head_dim = need("head_dim") if fields.get("head_dim") is not None else d_model // n_heads
    activation = fields.get("hidden_activation" if gemma else "hidden_act")
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"{source}: activation", expected=" or ".join(_ACTIVATIONS), got=repr(activation))
    bias = bool(fields["attention_bias"])
    if bias and family in ("mistral", "qwen2"):
        raise ConfigError(f"{source}: attention_bias", expected=f"false for {family}", got=True)
    if fields.get("mlp_bias") and family != "llama":
        raise ConfigError(f"{source}: mlp_bias", expected=f"false for {family}", got=True)
    if family == "gemma3" and fields["attn_logit_softcapping"] is not None:
        # transformers stores the field but never applies it, so there is no behaviour to agree with.
        raise ConfigError(f"{source}: attn_logit_softcapping", expected="null for gemma3", got=fields["attn_logit_softcapping"])
    sliding = _sliding_layers(family, fields, n_layers, source)
    window = need("sliding_window") if any(sliding) else 0
    rope, rope_local = _ropes(family, fields, source)
    return ModelConfig(
        family=family,
        vocab_size=need("vocab_size"),
        d_model=d_model,
        d_ff=need("intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=need("num_key_value_heads") if fields.get("num_key_value_heads") is not None else n_heads,
        head_dim=head_dim,
        windows=tuple(window if local else 0 for local in sliding),
        rope=rope,
        rope_local=rope_local,
        local_rope=tuple(sliding) if rope_local else (),
        norm_eps=number("rms_norm_eps"),
        activation=_ACTIVATIONS[activation],
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=bool(fields.get("mlp_bias")),
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        norm_plus_one=gemma,
        scale_embeddings=gemma,
        tied=bool(fields["tie_word_embeddings"]),
        query_scale=number("query_pre_attn_scalar") ** -0.5 if gemma else head_dim**-0.5,
        attn_softcap=_optional_cap(fields, "attn_logit_softcapping") if gemma else None,
        logit_softcap=_optional_cap(fields, "final_logit_softcapping") if gemma else None,
    )


def _optional_cap(fields: dict[str, Any], name: str) -> float | None:
    return None if fields.get(name) is None else float(fields[name])


def _sliding_layers(family: str, fields: dict[str, Any], n_layers: int, source: str) -> list[bool]:
    """Which blocks see a sliding window only."""
    if family == "llama":
        if fields.get("sliding_window"):
            raise ConfigError(f"{source}: sliding_window", expected="null for llama", got=fields["sliding_window"])
        return [False] * n_layers
    if family == "mistral":
        return [bool(fields.get("sliding_window"))] * n_layers
    if family.startswith("qwen") and not (fields["use_sliding_window"] and fields.get("sliding_window")):
        return [False] * n_layers
    types = fields.get("layer_types")
    if types is not None:
        unknown = set(types) - {"sliding_attention", "full_attention"}
        if unknown or len(types) != n_layers:
            raise ConfigError(
                f"{source}: layer_types",
                expected=f"{n_layers} entries, each full_attention or sliding_attention",
                got=f"{len(types)} entries, unknown {sorted(unknown)}",
            )
        return [t == "sliding_attention" for t in types]
    if family.startswith("qwen"):
        return [i >= int(fields["max_window_layers"]) for i in range(n_layers)]
    period = 2 if family == "gemma2" else int(fields.get("_sliding_window_pattern", fields["sliding_window_pattern"]))
    return [bool((i + 1) % period) for i in range(n_layers)]


def _ropes(family: str, fields: dict[str, Any], source: str) -> tuple[RopeSpec, RopeSpec | None]:
    """The rotary spec of the model and, for Gemma 3, that of its sliding-window blocks."""
    params = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or {}
    theta = fields.get("rope_theta") or 10_000.0
    if family != "gemma3":
        if "full_attention" in params or "sliding_attention" in params:
            raise ConfigError(f"{source}: rope_parameters", expected=f"one set for all blocks of {family}", got="a set per layer type")
        return _rope(scaling or params, float(theta), fields, source), None
    if "rope_type" in params or "rope_theta" in params:  # one flat set is the global blocks'
        params = {"full_attention": params}
    full = {**(params.get("full_attention") or {}), **scaling}
    local = params.get("sliding_attention") or {}
    return (
        _rope(full, float(theta), fields, source),
        _rope(local, float(fields["rope_local_base_freq"]), fields, source),
    )


def _rope(params: dict[str, Any], theta: float, fields: dict[str, Any], source: str) -> RopeSpec:
    kind = params.get("rope_type", params.get("type", "default"))
    theta = float(params.get("rope_theta") or theta)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if params.get("partial_rotary_factor", 1.0) not in (None, 1.0, 1):
        raise ConfigError(f"{source}: partial_rotary_factor", expected=1.0, got=params["partial_rotary_factor"])
    if kind == "default":
        spec = RopeSpec(theta=theta)
        known |= {"factor"} if params.get("factor") in (None, 1, 1.0) else set()
    elif kind == "linear":
        spec = RopeSpec(theta=theta, kind="linear", factor=_positive(params, "factor", source))
        known |= {"factor"}
    elif kind == "llama3":
        original = params.get("original_max_position_embeddings") or fields.get("max_position_embeddings")
        spec = RopeSpec(
            theta=theta,
            kind="llama3",
            factor=_positive(params, "factor", source),
            low_freq_factor=_positive(params, "low_freq_factor", source),
            high_freq_factor=_positive(params, "high_freq_factor", source),
            original_len=int(original or 0),
        )
        known |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        if not spec.original_len or math.isclose(spec.low_freq_factor, spec.high_freq_factor):
            raise ConfigError(f"{source}: llama3 rope", expected="original_max_position_embeddings and two different bounds", got=params)
    else:
        raise ConfigError(f"{source}: rope type", expected="default, linear or llama3", got=repr(kind))
    extra = {k: v for k, v in params.items() if k not in known and v is not None}
    if extra:
        raise ConfigError(f"{source}: {kind} rope field(s) not supported", got=extra)
    return spec


def _positive(params: dict[str, Any], name: str, source: str) -> float:
    value = params.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ConfigError(f"{source}: rope {name}", expected="a positive number", got=repr(value))
    return float(value)
