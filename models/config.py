"""`ModelConfig`: everything about an architecture that changes its arithmetic, read from a Hugging Face config.json.

Six families are known: Llama 2/3.x, Mistral, Qwen2/2.5, Qwen3, Gemma 2 and Gemma 3 (text, or the text part of the
multimodal wrapper). Both spellings of config.json are read: the older one (`rope_theta`, `rope_scaling`,
`rope_local_base_freq`, `sliding_window_pattern`) and the newer one (`rope_parameters`, `layer_types`). A field is
either read, known to leave the forward pass alone, or rejected by name (config_fields.py); nothing is dropped in
silence.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from nla_jax.models.config_fields import ACTIVATIONS, DEFAULTS, HARMLESS, MODEL_TYPES, READ_BY
from nla_jax.models.config_fields import FAMILIES as FAMILIES
from nla_jax.models.errors import ConfigError


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
    # Where both say it, the wrapper's own holds: it is what ties the wrapper's output to its embedding.
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if "tie_word_embeddings" in config else {}
    return {**nested, **tied}


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
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{source}: model_type",
            expected=" or ".join(MODEL_TYPES),
            got=repr(model_type),
            fix="a checkpoint of a supported family; custom model code is never run",
        )
    family = MODEL_TYPES[model_type]
    # A wrapper's own fields must be harmless too; its text part is what is computed.
    given = text_part(config)
    if model_type == "gemma3" and (given is config or given.get("model_type", "gemma3_text") != "gemma3_text"):
        raise ConfigError(
            f"{source}: text_config", expected="an object of model_type gemma3_text", got=config.get("text_config")
        )
    # Gemma 2's published files repeat hidden_activation as hidden_act, which transformers ignores.
    known = HARMLESS | READ_BY[family] | ({"hidden_act"} if family.startswith("gemma") else set())
    for field, value in {**config, **given}.items():
        if field not in known and value not in (None, False, {}, [], 0):
            raise ConfigError(
                f"{source}: field {field!r} is not supported for {family}",
                got=repr(value)[:60],
                fix="a checkpoint without it, or remove the field if it changes nothing",
            )
    fields = _Fields(source, {**DEFAULTS[family], **given})
    gemma = family in ("gemma2", "gemma3")
    need, number = fields.integer, fields.number
    n_layers, n_heads, d_model = need("num_hidden_layers"), need("num_attention_heads"), need("hidden_size")
    head_dim = need("head_dim") if fields.get("head_dim") is not None else d_model // n_heads
    activation = fields.get("hidden_activation" if gemma else "hidden_act")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ConfigError(f"{source}: activation", expected=" or ".join(ACTIVATIONS), got=repr(activation))
    bias = fields.flag("attention_bias")
    if model_type == "gemma3" and fields.get("final_logit_softcapping") is not None:
        # transformers applies it to a text-only save but not to the wrapper: no behaviour to agree with.
        raise ConfigError(
            f"{source}: final_logit_softcapping",
            expected="null in a multimodal save",
            got=fields["final_logit_softcapping"],
        )
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
        activation=ACTIVATIONS[activation],
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        norm_plus_one=gemma,
        scale_embeddings=gemma,
        tied=fields.flag("tie_word_embeddings"),
        query_scale=number("query_pre_attn_scalar") ** -0.5 if gemma else head_dim**-0.5,
        attn_softcap=number("attn_logit_softcapping", optional=True),
        logit_softcap=number("final_logit_softcapping", optional=True),
    )


class _Fields(dict):
    """The fields of one config.json with defaults filled in; its readers reject values of the wrong type by name."""

    def __init__(self, source: str, values: dict[str, Any]):
        super().__init__(values)
        self.source = source

    def integer(self, name: str, minimum: int = 1) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{self.source}: {name}", expected=f"an integer of at least {minimum}", got=repr(value))
        return value

    def number(self, name: str, *, optional: bool = False) -> Any:
        if optional and self.get(name) is None:
            return None
        return _positive(self, name, self.source)

    def flag(self, name: str) -> bool:
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {name}", expected="true or false", got=repr(value))
        return bool(value)

    def group(self, name: str) -> dict[str, Any]:
        value = self.get(name)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{self.source}: {name}", expected="an object or null", got=repr(value))
        return value or {}


def _sliding_layers(family: str, fields: _Fields, n_layers: int, source: str) -> list[bool]:
    """Which blocks see a sliding window only."""
    window = fields.get("sliding_window")
    if family == "llama":
        return [False] * n_layers
    if family == "mistral":
        return [window is not None] * n_layers
    types = fields.get("layer_types")
    if types is not None:
        good = isinstance(types, list) and all(t in ("sliding_attention", "full_attention") for t in types)
        if not good or len(types) != n_layers:
            raise ConfigError(
                f"{source}: layer_types",
                expected=f"a list of {n_layers} entries, each full_attention or sliding_attention",
                got=repr(types)[:100],
            )
    if family.startswith("qwen"):
        if not fields.flag("use_sliding_window") or window is None:
            if "sliding_attention" in (types or ()):
                raise ConfigError(
                    f"{source}: layer_types", expected="full_attention only, without a window", got=repr(types)[:100]
                )
            return [False] * n_layers
        if types is None:
            first = fields.integer("max_window_layers", minimum=0)
            return [i >= first for i in range(n_layers)]
    if types is not None:
        return [t == "sliding_attention" for t in types]
    if family == "gemma2":
        return [bool((i + 1) % 2) for i in range(n_layers)]
    period = fields.integer(
        "_sliding_window_pattern" if "_sliding_window_pattern" in fields else "sliding_window_pattern"
    )
    return [bool((i + 1) % period) for i in range(n_layers)]


def _ropes(family: str, fields: _Fields, source: str) -> tuple[RopeSpec, RopeSpec | None]:
    """The rotary spec of the model and, for Gemma 3, that of its sliding-window blocks."""
    params = fields.group("rope_parameters")
    scaling = fields.group("rope_scaling")
    nested = {name for name in ("full_attention", "sliding_attention") if name in params}
    theta = 10_000.0 if fields.get("rope_theta") is None else fields.number("rope_theta")
    if bool(nested) != (family == "gemma3") and params:
        expected = (
            "one set for full_attention and one for sliding_attention" if not nested else "one set for all blocks"
        )
        raise ConfigError(f"{source}: rope_parameters", expected=f"{expected} in {family}", got=repr(params)[:100])
    if family != "gemma3":
        return _rope(scaling or params, theta, fields, source), None
    if set(params) - nested:
        raise ConfigError(
            f"{source}: rope_parameters", expected="full_attention and sliding_attention only", got=sorted(params)
        )
    sets = _Fields(f"{source}: rope_parameters", params)
    full, local = {**sets.group("full_attention"), **scaling}, sets.group("sliding_attention")
    return (
        _rope(full, theta, fields, source),
        _rope(local, fields.number("rope_local_base_freq"), fields, source),
    )


def _rope(params: dict[str, Any], theta: float, fields: _Fields, source: str) -> RopeSpec:
    kind = params.get("rope_type", params.get("type", "default"))
    if params.get("rope_theta") is not None:
        theta = _positive(params, "rope_theta", source)
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
        own = params.get("original_max_position_embeddings") is not None
        original = (
            _positive(params, "original_max_position_embeddings", source)
            if own
            else fields.integer("max_position_embeddings")
        )
        spec = RopeSpec(
            theta=theta,
            kind="llama3",
            factor=_positive(params, "factor", source),
            low_freq_factor=_positive(params, "low_freq_factor", source),
            high_freq_factor=_positive(params, "high_freq_factor", source),
            original_len=int(original),
        )
        known |= {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        if spec.low_freq_factor >= spec.high_freq_factor:
            raise ConfigError(f"{source}: llama3 rope", expected="low_freq_factor below high_freq_factor", got=params)
    else:
        raise ConfigError(f"{source}: rope type", expected="default, linear or llama3", got=repr(kind))
    extra = {k: v for k, v in params.items() if k not in known and v is not None}
    if extra:
        raise ConfigError(f"{source}: {kind} rope field(s) not supported", got=extra)
    return spec


def _positive(params: dict[str, Any], name: str, source: str) -> float:
    value = params.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{source}: {name}", expected="a positive number", got=repr(value))
    return float(value)
