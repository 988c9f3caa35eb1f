"""Writes tests/goldens/*.npz: what transformers computes for the tiny checkpoints of families.py.

    python tests/make_goldens.py            # needs torch, transformers, safetensors and numpy; no jax

Float32 on CPU, eager attention (the only kernel there that applies Gemma 2's soft-cap). Each checkpoint is written to
disk and loaded with `from_pretrained`, so that the configs and key names are read as users' files are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from config_changes import CHANGES
from families import (
    CONFIGS,
    GOLDENS,
    PREFILL,
    changed,
    hf_weights,
    newer,
    text_config,
    tokens,
    wrapped,
    write_checkpoint,
)

# Residual streams are kept at these positions only: the first, some inside and some beyond the sliding windows.
POSITIONS = (0, 3, 4, 5, 6, 11, 20, 31)


def load(config: dict[str, Any], folder: Path, layout: str = "newer") -> torch.nn.Module:
    """The checkpoint of `config` as a transformers model; raises if a tensor was missing or left over."""
    weights = hf_weights(config)
    if "text_config" in config:
        weights = wrapped(weights, layout)
    write_checkpoint(folder, config, weights)
    kind = transformers.AutoModelForImageTextToText if "text_config" in config else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    # The vision tower of the wrapper has no weights here: text never reaches it.
    missing = {k for k in info["missing_keys"] if "vision_tower" not in k and "multi_modal_projector" not in k}
    if missing or info["unexpected_keys"] or info["mismatched_keys"]:
        raise SystemExit(
            f"{folder.name}: missing {missing}, unexpected {info['unexpected_keys']}, {info['mismatched_keys']}"
        )
    return model.eval()


@torch.no_grad()
def logits_and_residuals(model: torch.nn.Module, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, T, V] and the raw output of every block [L, B, T, D] (the last is taken before the final norm)."""
    decoder = model.model.language_model if hasattr(model.model, "language_model") else model.model
    kept: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _module, _args, out: kept.append(out[0] if isinstance(out, tuple) else out))
        for block in decoder.layers
    ]
    logits = model(torch.from_numpy(ids).long(), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits.numpy(), torch.stack(kept).numpy()


@torch.no_grad()
def cached_logits(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T - PREFILL + 1, V] of a prefill's last token and of each later token read through the cache."""
    ids_t = torch.from_numpy(ids).long()
    out = model(ids_t[:, :PREFILL], use_cache=True)
    steps = [out.logits[:, -1]]
    for t in range(PREFILL, ids.shape[1]):
        out = model(ids_t[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits[:, -1])
    return torch.stack(steps, dim=1).numpy()


def results(config: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """Everything stored for one case."""
    ids = tokens()
    model = load(config, folder)
    logits, streams = logits_and_residuals(model, ids)
    out = {
        "logits": logits,
        "positions": np.asarray(POSITIONS),
        "residuals": streams[:, :, list(POSITIONS)],
        "cached_logits": cached_logits(model, ids)[:1],
    }
    others = {"newer spelling": load(newer(config), folder)}
    if "text_config" in config:
        others["older keys"] = load(config, folder, layout="older")
    for what, other in others.items():
        if not np.array_equal(logits_and_residuals(other, ids)[0], logits):
            raise SystemExit(f"{folder.name}: transformers does not read the {what} as the same model")
    return out


def changed_logits(case: str, folder: Path) -> dict[str, np.ndarray]:
    """Logits [B, V] of the last token for each change of each field."""
    out = {}
    for label, change in CHANGES.get(case, {}).items():
        base = newer(CONFIGS[case]) if label.startswith("newer ") else CONFIGS[case]
        config = changed(base, change)
        ids = np.minimum(tokens(), text_config(config)["vocab_size"] - 1)
        out[label] = logits_and_residuals(load(config, folder), ids)[0][:, -1]
    return out


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    GOLDENS.mkdir(exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    with tempfile.TemporaryDirectory() as tmp:
        for case, config in CONFIGS.items():
            arrays = results(config, Path(tmp) / case)
            changes = changed_logits(case, Path(tmp) / case)
            arrays |= {f"changed/{label}": x for label, x in changes.items()}
            arrays["made_with"] = np.asarray(", ".join(f"{k} {v}" for k, v in versions.items()))
            np.savez_compressed(GOLDENS / f"{case}.npz", **arrays)
            print(f"{case}: {(GOLDENS / f'{case}.npz').stat().st_size // 1024} KiB, {len(changes)} changes")


if __name__ == "__main__":
    main()
