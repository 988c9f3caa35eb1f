"""What a role trains, and the whole model it is a part of: all of its parameters, or adapters on a base that it shares.

`TrainState.params` is what is trained. With LoRA that is an adapter tree (of an AR, `ARParams` with one as its trunk),
and `base` holds the frozen target, in the compute dtype; without, `base` is None and what is trained is the model.
Every step takes both and calls `whole` inside its loss, which copies nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from nla_jax.errors import CheckpointError
from nla_jax.models.config import ModelConfig
from nla_jax.models.lora import LoRAConfig, adapter_specs, attach, init_adapters
from nla_jax.models.params import param_specs
from nla_jax.models.peft_io import load_adapters, read_lora, save_adapters
from nla_jax.models.placing import on_host, put
from nla_jax.reconstructor import ARParams, ar_specs

ADAPTER = "adapter"  # inside an exported AV or AR: its adapters in PEFT's format, beside the merged weights
_BASE = "base.txt"  # in it: the fingerprint of the weights that they belong to


def whole(trained: Any, base: Any, lora: LoRAConfig | None) -> Any:
    """The parameters that a role computes with: `Params` of an AV, `ARParams` of an AR."""
    if lora is None or base is None:
        return trained
    if isinstance(trained, ARParams):
        return trained.replace(trunk=attach(base, trained.trunk, lora))  # type: ignore[attr-defined, arg-type]
    return attach(base, trained, lora)


def trained_specs(role: str, cfg: ModelConfig, lora: LoRAConfig | None) -> Any:
    """The declared parameters of what is trained, as a tree of `ParamSpec`."""
    if lora is None:
        return param_specs(cfg) if role == "av" else ar_specs(cfg)
    adapters: Any = adapter_specs(cfg, lora)
    return adapters if role == "av" else ARParams(trunk=adapters, head=ar_specs(cfg).head)


def fresh(cfg: ModelConfig, lora: LoRAConfig, seed: int, dtype: str, to: Any = None) -> Any:
    """Adapters that change nothing yet, in the shardings `to`; the same on every mesh."""
    make = jax.jit(lambda key: init_adapters(cfg, lora, key, dtype), out_shardings=to)
    return make(jax.random.key(seed))


def read(path: Path, cfg: ModelConfig, dtype: str, base: str, to: Any = None) -> tuple[Any, LoRAConfig]:
    """The adapters that an export holds, and their settings. CheckpointError where it has none, or where they belong to
    another base than that of the fingerprint `base`."""
    folder = path / ADAPTER
    lora = settings_of(path)
    made_for = (folder / _BASE).read_text(encoding="utf-8").strip() if (folder / _BASE).is_file() else None
    if made_for not in (None, base):
        raise CheckpointError(
            f"{folder}: adapters of another base than the target",
            expected=f"weights {base[:12]}",
            got=f"{str(made_for)[:12]}",
            fix="the target that they were trained on, or lora.rank=0 to go on from the merged weights",
        )
    found, _ = load_adapters(folder, cfg, jnp.dtype(dtype))
    if to is not None:
        found = jax.tree.map(lambda x, at: put(on_host(x), at), found, to)
    return found, lora


def settings_of(path: Path) -> LoRAConfig:
    """The LoRA settings of an export's adapters; CheckpointError where it has none."""
    if not (path / ADAPTER).is_dir():
        raise CheckpointError(
            f"{path}: no adapters",
            expected=f"{ADAPTER}/, which a warm start with lora.rank above 0 writes",
            got="all of its weights were trained",
            fix="lora.rank=0, or a warm start with LoRA",
        )
    return read_lora(path / ADAPTER)


def write(folder: Path, adapters: Any, cfg: ModelConfig, lora: LoRAConfig, *, base: str, fingerprint: str) -> None:
    """`folder`/adapter, from adapters on the host: PEFT's two files, and which weights they belong to."""
    save_adapters(folder / ADAPTER, adapters, cfg, lora, base=base)
    (folder / ADAPTER / _BASE).write_text(fingerprint + "\n", encoding="utf-8")
