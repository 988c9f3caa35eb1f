"""Directories that other programs can use: weights plus tokenizer, chat template, generation config and sidecar.

What is written loads in transformers (`AutoModelForCausalLM`, `AutoTokenizer`) and in the PyTorch reference's
inference client, which wants config.json, weights with one `embed_tokens.weight`, tokenizer files, nla_meta.yaml and,
for an AR, K + 1 blocks and value_head.safetensors.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax

from nla_jax.errors import SidecarError
from nla_jax.models.atomic import atomic_dir
from nla_jax.models.config import ModelConfig
from nla_jax.models.hf import MAX_SHARD_BYTES, Progress, Saved, write_checkpoint
from nla_jax.models.params import Params
from nla_jax.sidecar import NAME as SIDECAR
from nla_jax.sidecar import Sidecar, read_sidecar, write_sidecar

# Everything that a tokenizer of a supported family consists of, and what generation and redistribution need.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def copy_companions(source: Path, directory: Path) -> list[str]:
    """Copies tokenizer, template, generation and licence files, byte for byte; returns their names."""
    names = sorted(
        p.name for p in source.iterdir() if p.is_file() and any(fnmatch(p.name, pattern) for pattern in COMPANIONS)
    )
    for name in names:
        shutil.copyfile(source / name, directory / name)
    return names


def place_sidecar(sidecar: Sidecar | None, source: Path, directory: Path, *, role: str, cfg: ModelConfig) -> bool:
    """Writes `sidecar`, or copies the one in `source` unchanged if it has one; False where there is none.

    Raises SidecarError where it does not belong to a checkpoint of this role, width and depth."""
    if role == "model" or (sidecar is None and not (source / SIDECAR).is_file()):
        return False
    found = sidecar or read_sidecar(source)
    where = f"{source}/{SIDECAR}"
    if found.role not in (None, role):
        raise SidecarError(f"{where}: role", expected=role, got=found.role, fix="the sidecar of this checkpoint")
    if found.d_model != cfg.d_model:
        raise SidecarError(
            f"{where}: d_model", expected=cfg.d_model, got=found.d_model, fix="the sidecar of this checkpoint"
        )
    if role == "ar" and found.layer_index not in (None, cfg.n_layers - 1):
        raise SidecarError(
            f"{where}: layer_index",
            expected=f"{cfg.n_layers - 1} (the checkpoint has {cfg.n_layers} blocks)",
            got=found.layer_index,
            fix="the sidecar of this checkpoint",
        )
    if sidecar is None:
        shutil.copyfile(source / SIDECAR, directory / SIDECAR)
    else:
        write_sidecar(sidecar, directory)
    return True


def export_dir(
    params: Params,
    cfg: ModelConfig,
    hf_config: dict[str, Any],
    source: str | Path,
    out_dir: str | Path,
    *,
    role: str = "model",
    head: jax.Array | None = None,
    sidecar: Sidecar | None = None,
    dtype: str | None = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
    beside: Callable[[Path], None] | None = None,
) -> Saved:
    """Writes a complete Hugging Face directory as one move.

    `source` is the directory whose tokenizer, template and generation files go along (the one that the parameters
    came from), and whose sidecar is copied unless `sidecar` is given. `role` is "av", "ar" (with `head` [D, D],
    input-first) or "model" (no sidecar). `beside` may write more into the directory. The other options are those of
    `models.hf.write_checkpoint`."""
    source = Path(source)
    with atomic_dir(out_dir, overwrite=overwrite) as temporary:
        saved = write_checkpoint(
            params,
            cfg,
            hf_config,
            temporary,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            role=role,
            head=head,
            progress=progress,
        )
        copy_companions(source, temporary)
        place_sidecar(sidecar, source, temporary, role=role, cfg=cfg)
        if beside is not None:
            beside(temporary)
        return saved
