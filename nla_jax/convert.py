"""Checkpoint directory in, checkpoint directory out: dtype, sharding, format, and the making of an initial AR."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import jax

from nla_jax.errors import InputError
from nla_jax.export import copy_companions, export_dir, place_sidecar
from nla_jax.models import hf
from nla_jax.models.atomic import atomic_dir, check_output_dir
from nla_jax.models.config import ModelConfig, read_hf_config
from nla_jax.models.lora import attach, merge
from nla_jax.models.params import Params, truncate
from nla_jax.models.peft_io import load_adapters
from nla_jax.orbax_dir import is_orbax_dir, orbax_role, read_orbax, write_orbax
from nla_jax.reconstructor import init_head
from nla_jax.sidecar import NAME as SIDECAR
from nla_jax.sidecar import Sidecar, read_sidecar

Bar = Callable[[str], AbstractContextManager[hf.Progress | None]]


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion wrote: where, as what, of which shape, and whether a sidecar lies beside it."""

    path: Path
    role: str
    cfg: ModelConfig
    dtype: str
    saved: hf.Saved
    sidecar: bool


def convert_dir(
    source: Path,
    out: str | Path,
    *,
    to: str = "hf",
    dtype: str | None = None,
    role: str = "auto",
    layer: int | None = None,
    sidecar: str | Path | None = None,
    adapter: str | Path | None = None,
    max_shard_bytes: float = hf.MAX_SHARD_BYTES,
    overwrite: bool = False,
    bar: Bar = lambda label: nullcontext(),
) -> Converted:
    """Reads a Hugging Face directory, or an Orbax one that this made, and writes either.

    `role` "auto" is "ar" where a value head is, "av" where a sidecar is, else "model". Role "ar" of a directory that
    is no AR makes an initial one: its first `layer` + 1 blocks and an identity head. `sidecar` names a directory or
    file whose sidecar is taken (its role set to the new one) instead of the source's; an initial AR has its layer
    from there unless `layer` is given. `adapter` is a PEFT directory whose LoRA is added to the weights. `dtype` None
    keeps what is stored. `bar(label)` gives a context with a progress callback. Nothing is left behind on failure;
    raises an NLAError of one line."""
    check_output_dir(out, overwrite=overwrite)  # before the hours, not after them
    found = source_role(source)
    role = found if role == "auto" else role
    makes_ar = role == "ar" and found != "ar"
    if found == "ar" and role != "ar":
        what = f"{source} is an AR: it has no final norm or lm_head to make role {role} of"
        raise InputError(what, fix="its base model or its AV")
    if layer is not None and not makes_ar:
        raise InputError(
            "--layer", expected="--role ar and a source that is no AR yet", got=f"role {role}, source {found}"
        )
    given = None
    if role != "model" and (sidecar is not None or makes_ar):
        place = source if sidecar is None else Path(sidecar)
        base = read_sidecar(place) if sidecar is not None or (source / SIDECAR).is_file() else None
        if makes_ar:
            layer = _new_layer(source, layer, base, place)
        given = None if base is None else _sidecar_for(role, base, layer)
    if role == "av" and given is None and not (source / SIDECAR).is_file():
        fix = "--sidecar DIR to take one from elsewhere, or --role model"
        raise InputError(f"{source} has no {SIDECAR}", expected="the AV's sidecar", fix=fix)

    adapted = None
    if adapter is not None:
        full = ModelConfig.from_dir(source)
        adapted = load_adapters(adapter, full if layer is None else full.truncated(layer + 1))

    with bar("reading") as progress:
        cfg, params, head = _load(source, dtype, found, layer, progress)
    if adapted is not None:
        # A Hugging Face directory is written one tensor at a time, and merged so.
        params = (attach if to == "hf" else merge)(params, *adapted)
    hf_config = read_hf_config(source)
    if to == "orbax":
        with atomic_dir(out, overwrite=overwrite) as temporary:
            saved = write_orbax(params, cfg, hf_config, temporary, role=role, head=head)
            copy_companions(source, temporary)
            place_sidecar(given, source, temporary, role=role, cfg=cfg)
    else:
        with bar("writing") as progress:
            saved = export_dir(
                params,
                cfg,
                hf_config,
                source,
                out,
                role=role,
                head=head,
                sidecar=given,
                max_shard_bytes=max_shard_bytes,
                overwrite=overwrite,
                progress=progress,
            )
    path = Path(out).expanduser()
    return Converted(path, role, cfg, str(params.embed.dtype), saved, (path / SIDECAR).is_file())


def source_role(source: Path) -> str:
    """What a directory holds: "ar", "av" or "model"."""
    if is_orbax_dir(source):
        return orbax_role(source)
    if (source / hf.VALUE_HEAD).is_file():
        return "ar"
    return "av" if (source / SIDECAR).is_file() else "model"


def _new_layer(source: Path, layer: int | None, base: Sidecar | None, place: Path) -> int:
    """The layer at which an AR is cut from a model's blocks: as given, or as the sidecar says."""
    known = base.layer_index if base is not None else None
    layer = known if layer is None else layer
    if layer is None:
        fix = "--layer K: 0-based, the output of block K, Hugging Face's hidden_states[K+1]"
        raise InputError(f"{source} names no layer to cut an AR at", fix=fix)
    if known not in (None, layer):
        raise InputError("--layer", expected=f"{known}, the layer that the sidecar of {place} names", got=layer)
    n_layers = ModelConfig.from_dir(source).n_layers
    if not 0 <= layer < n_layers:
        raise InputError("--layer", expected=f"0..{n_layers - 1} (the blocks of {source})", got=layer)
    return layer


def _sidecar_for(role: str, base: Sidecar, layer: int | None) -> Sidecar:
    """A sidecar for a new role. What tells of the training of the checkpoint that it came with is left out."""
    kept = {"prompt_templates", "tokens", "extraction", "base_checkpoint", "extraction_layer_index"}
    raw = {key: value for key, value in base.raw.items() if key in kept}
    raw |= {"kind": "nla_model", "role": role, "d_model": base.d_model}
    return dataclasses.replace(
        base,
        kind="nla_model",
        role=cast(Any, role),
        layer_index=base.layer_index if layer is None else layer,
        injection_scale=None if role == "ar" else base.injection_scale,
        stage=None,
        raw=raw,
    )


def _load(
    source: Path, dtype: str | None, found: str, layer: int | None, progress: hf.Progress | None
) -> tuple[ModelConfig, Params, jax.Array | None]:
    """Parameters of `source` in `dtype`; with `layer`, its first blocks and an identity head."""
    if is_orbax_dir(source):
        cfg, params, head = read_orbax(source, dtype)
        if layer is not None:
            cfg, params = cfg.truncated(layer + 1), truncate(params, layer + 1)
    elif found == "ar":
        cfg, params, head = hf.load_ar(source, dtype, progress=progress)
    else:
        n_layers = None if layer is None else layer + 1
        cfg, params = hf.load_model(source, dtype, n_layers=n_layers, head=layer is None, progress=progress)
        head = None
    if layer is not None:
        head = init_head(cfg.d_model, params.embed.dtype)
    return cfg, params, head
