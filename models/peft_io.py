"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from nla_jax.models.config import ModelConfig
from nla_jax.models.errors import CheckpointError
from nla_jax.models.hf_keys import LAYOUTS
from nla_jax.models.lora import TARGETS, Adapters, LoRAConfig, LowRank, adapter_specs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
_KEY = re.compile(
    r"base_model\.model\.(?P<before>.*?)layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<target>\w+)\."
    r"lora_(?P<side>[AB])(?:\.default)?\.weight"
)
# Settings of PEFT that change what an adapter computes, with the only value that is read here.
_PLAIN: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}


def save_adapters(
    path: str | Path,
    adapters: Adapters,
    cfg: ModelConfig,
    lora: LoRAConfig,
    *,
    base: str,
    layout: tuple[str, str] = LAYOUTS[0],
) -> None:
    """Writes `path`/adapter_config.json and adapter_model.safetensors; `base` names the model that they belong to.

    Matrices are stored output-first ([R, I] and [O, R]) in the adapters' dtype. Files are moved into place whole."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for target in lora.targets:
        pair = adapters[TARGETS[target]]
        for side, stack in (("A", pair.a), ("B", pair.b)):
            for layer, matrix in enumerate(np.asarray(stack)):
                name = f"{layout[0]}layers.{layer}.{_MODULE[target]}.{target}"
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = np.ascontiguousarray(matrix.T)
    config = {
        **_PLAIN,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter.") as part:
        save_file(tensors, Path(part) / WEIGHTS, metadata={"format": "pt"})
        (Path(part) / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(part) / name, folder / name)


def load_adapters(path: str | Path, cfg: ModelConfig, dtype: Any = jnp.float32) -> tuple[Adapters, LoRAConfig]:
    """Adapters of a model of `cfg` from a PEFT directory. CheckpointError for what this cannot represent, by name:
    other kinds of adapters, settings beyond plain LoRA, tensors that are missing, left over, or of another shape."""
    folder = Path(path)
    lora = read_lora(folder)
    tensors = _read_tensors(folder / WEIGHTS)
    found: dict[tuple[str, str, int], np.ndarray] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["target"] not in lora.targets:
            raise CheckpointError(f"{folder / WEIGHTS}: {key}", expected=f"LoRA of {', '.join(lora.targets)}")
        found[match["target"], match["side"], int(match["layer"])] = tensor.T
    out: Adapters = {}
    for target in lora.targets:
        spec = adapter_specs(cfg, lora)[TARGETS[target]]
        sides = []
        for side, shape in (("A", spec.a.shape), ("B", spec.b.shape)):
            rows = []
            for layer in range(shape[0]):
                at = (target, side, layer)
                stored = found.pop(at) if at in found else None
                if stored is None or stored.shape != shape[1:]:
                    raise CheckpointError(
                        f"{folder / WEIGHTS}: layers.{layer} {target} lora_{side}",
                        expected=f"shape {list(shape[1:])[::-1]}",
                        got="no such tensor" if stored is None else list(stored.shape[::-1]),
                        fix="adapters of the same base model, with as many blocks",
                    )
                rows.append(stored)
            sides.append(jnp.asarray(np.stack(rows), dtype))
        out[TARGETS[target]] = LowRank(*sides)
    if found:
        target, side, layer = min(found)
        raise CheckpointError(
            f"{folder / WEIGHTS}: layers.{layer} {target} lora_{side}",
            expected=f"adapters of {cfg.n_layers} blocks",
            got="one of a further block",
        )
    return out, lora


def read_lora(path: str | Path) -> LoRAConfig:
    """The settings of the adapters in a PEFT directory; CheckpointError as for `load_adapters`."""
    folder = Path(path)
    config = _read_config(folder / CONFIG)
    return LoRAConfig(
        rank=config["r"],
        alpha=config["lora_alpha"],
        targets=tuple(t for t in TARGETS if t in _targets(folder, config)),
        rslora=bool(config.get("use_rslora", False)),
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not a JSON object"
        raise CheckpointError(f"{file}: cannot be read", got=why, fix="a directory that PEFT saved") from None
    if str(config.get("peft_type", "")).upper() != "LORA":
        raise CheckpointError(f"{file}: peft_type", expected="LORA", got=config.get("peft_type"))
    for name, plain in _PLAIN.items():
        if config.get(name, plain) not in (plain, None) and config[name] != plain:
            raise CheckpointError(f"{file}: {name}", expected=plain, got=config[name], fix="merge it with PEFT first")
    for name, kind in (("r", int), ("lora_alpha", (int, float))):
        if not isinstance(config.get(name), kind) or isinstance(config.get(name), bool):
            raise CheckpointError(f"{file}: {name}", expected="a number", got=config.get(name))
    return config


def _targets(folder: Path, config: dict[str, Any]) -> list[str]:
    """The adapted projections: PEFT's config lists their names, or holds a pattern that module names must match."""
    named = config.get("target_modules")
    if isinstance(named, str):
        if named == "all-linear":
            return list(TARGETS)
        return [t for t in TARGETS if re.fullmatch(named, f"model.layers.0.{_MODULE[t]}.{t}")]
    unknown = sorted(set(named or []) - set(TARGETS))
    if not named or unknown:
        raise CheckpointError(
            f"{folder / CONFIG}: target_modules", expected=f"some of {', '.join(TARGETS)}", got=unknown or named
        )
    return list(named)


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own, which says little
        raise CheckpointError(f"{file}: cannot be read", got=str(error).split("\n")[0], fix="save it again") from None
