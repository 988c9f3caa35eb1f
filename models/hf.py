"""Hugging Face checkpoint directories <-> parameters, both ways, one tensor at a time.

Reading goes straight to the devices: each tensor is read, transposed and cast on the host, and placed into its row of
the stacked array, which is updated in place. Host memory stays near the largest tensor (plus the result where the
device is the CPU). Writing is the reverse. Names, shapes and dtypes are all checked before the first byte is read.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from nla_jax.models.atomic import atomic_dir
from nla_jax.models.config import ModelConfig, text_part, truncate_hf_config
from nla_jax.models.errors import CheckpointError, ConfigError, InputError
from nla_jax.models.hf_keys import LM_HEAD, NORM, Slot, ignorable, layout_of, leaf, slots
from nla_jax.models.int8 import empty_stack, is_matrix, need_library, quantize_row
from nla_jax.models.lora import is_adapted
from nla_jax.models.params import Layers, Params, param_specs
from nla_jax.models.placing import of_row, on_host, placer, put, row_on_host
from nla_jax.models.safetensors_io import (
    DTYPES,
    INDEX,
    SINGLE,
    Checkpoint,
    Entry,
    TensorInfo,
    plan_shards,
    read_header,
    read_tensor,
    write_file,
)

VALUE_HEAD = "value_head.safetensors"
MAX_SHARD_BYTES = 5e9
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
_log = logging.getLogger(__name__)


def load_model(
    path: str | Path,
    dtype: Any = None,
    *,
    n_layers: int | None = None,
    head: bool = True,
    shardings: Params | None = None,
    progress: Progress | None = None,
    int8: bool = False,
) -> tuple[ModelConfig, Params]:
    """Reads a causal language model from a Hugging Face directory.

    `dtype` is "float32", "bfloat16" or "float16"; None keeps what is stored. `n_layers` reads the first n blocks only
    and returns a config of that depth; `head=False` leaves out the final norm and lm_head. `shardings` is a tree like
    the result with a NamedSharding for each (stacked) array, whose leading axis must be unsharded: every device then
    gets its own part of each tensor. `int8` keeps the blocks' matrices in 8 bits (models/int8.py). Raises ConfigError
    or CheckpointError, each naming all that is wrong.
    """
    if int8:
        need_library()
    to = None if dtype is None else as_dtype(dtype)
    full = ModelConfig.from_dir(path)
    cfg = full if n_layers is None else full.truncated(n_layers)
    checkpoint = Checkpoint(path)
    layout = layout_of(checkpoint.keys)
    wanted = slots(cfg, head=head, layout=layout)
    # A tied checkpoint may hold lm_head too; like transformers, we do not read it.
    known = {*slots(full, layout=layout), layout[1]}
    found = _match(checkpoint, wanted, known)
    return cfg, _read(found, cfg, head, to, shardings, progress, int8)


def load_ar(
    path: str | Path,
    dtype: Any = None,
    *,
    shardings: Params | None = None,
    head_sharding: NamedSharding | None = None,
    progress: Progress | None = None,
) -> tuple[ModelConfig, Params, jax.Array]:
    """Reads an AR directory: (config, trunk without final norm and lm_head, head [D, D] input-first).

    The trunk must hold exactly the blocks that config.json names, layer_index + 1 of them; a final norm or lm_head is
    tolerated (some exports have them) and not read. The head is `weight` in value_head.safetensors."""
    to = None if dtype is None else as_dtype(dtype)
    cfg = ModelConfig.from_dir(path)
    checkpoint = Checkpoint(path)
    layout = layout_of(checkpoint.keys)
    unused = checkpoint.keys & {layout[0] + NORM, layout[1]}
    found = _match(checkpoint, slots(cfg, head=False, layout=layout), unused)
    head_info = _head_info(Path(path) / VALUE_HEAD, cfg)
    if unused:
        _log.warning("%s: %s not read; an AR uses the raw output of its last block", path, " and ".join(sorted(unused)))
    trunk = _read(found, cfg, False, to, shardings, progress)
    return cfg, trunk, _put_head(head_info, to, head_sharding)


def load_head(path: str | Path, dtype: Any = None, *, sharding: NamedSharding | None = None) -> jax.Array:
    """The head [D, D] of an AR directory alone, input-first."""
    info = _head_info(Path(path) / VALUE_HEAD, ModelConfig.from_dir(path))
    return _put_head(info, None if dtype is None else as_dtype(dtype), sharding)


def _put_head(info: TensorInfo, dtype: np.dtype | None, sharding: NamedSharding | None) -> jax.Array:
    return put(read_tensor(info, dtype or DTYPES[info.dtype], transpose=True), sharding)


def stop_ids(path: str | Path) -> tuple[int, ...]:
    """All ids that end a generation: `eos_token_id` of generation_config.json and config.json together, sorted.

    Gemma names one in config.json and another in generation_config.json; either alone never stops some answers."""
    files = [Path(path) / "generation_config.json", Path(path) / "config.json"]
    ids: set[int] = set()
    for file in files:
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is not valid JSON ({error})", fix="copy the file again") from None
        for part in (config, config.get("text_config") or {}) if isinstance(config, dict) else ():
            given = part.get("eos_token_id")
            values = given if isinstance(given, list) else [] if given is None else [given]
            if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
                raise ConfigError(f"{file}: eos_token_id", expected="an id or a list of ids", got=repr(given))
            ids.update(values)
    return tuple(sorted(ids))


def hf_dtype(path: str | Path) -> str:
    """The dtype a checkpoint is stored in: "float32", "bfloat16" or "float16", read from the weights themselves."""
    checkpoint = Checkpoint(path)
    for key in sorted(checkpoint.keys, key=lambda k: not k.endswith("embed_tokens.weight")):
        if not ignorable(key) and (info := checkpoint.info(key)) is not None:
            return str(_stored(info))
    raise CheckpointError(f"{path} holds no tensors", fix="download the files again")


def as_dtype(name: Any) -> np.dtype:
    """A parameter dtype by name or as a dtype; InputError for any that parameters cannot have."""
    try:
        dtype = np.dtype(jnp.dtype(name))
    except TypeError:
        dtype = None
    if dtype is None or dtype not in DTYPES.values():
        raise InputError("dtype", expected="float32, bfloat16 or float16", got=repr(name))
    return dtype


def _stored(info: TensorInfo) -> np.dtype:
    if info.dtype not in DTYPES:
        raise CheckpointError(
            f"{info.file}: dtype {info.dtype} is not supported",
            expected=" or ".join(DTYPES),
            fix="the unquantized checkpoint in float32, bfloat16 or float16",
        )
    return DTYPES[info.dtype]


def _match(checkpoint: Checkpoint, wanted: dict[str, Slot], known: Set[str]) -> list[tuple[Slot, TensorInfo]]:
    """Where each wanted tensor lies, in file order. One CheckpointError lists everything that does not fit.

    `known` are names that may be there without being wanted. Files that hold nothing wanted are not opened."""
    unknown = sorted(key for key in checkpoint.keys if key not in wanted and key not in known and not ignorable(key))
    missing, misshapen, found = [], [], []
    for key, slot in wanted.items():
        info = checkpoint.info(key) if key in checkpoint.keys else None
        if info is None:
            missing.append(key)
        elif info.shape != slot.shape:
            misshapen.append(f"{key} {list(info.shape)} instead of {list(slot.shape)}")
        else:
            _stored(info)
            found.append((slot, info))
    problems = [("missing", missing), ("unknown", unknown), ("misshapen", misshapen)]
    if any(keys for _, keys in problems):
        listed = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems if keys)
        fix = "the config.json and weights of one save; nothing is filled in or left out"
        if missing == [LM_HEAD]:
            fix = (
                '"tie_word_embeddings": true in config.json if the model shares its embedding, or the complete weights'
            )
        raise CheckpointError(f"{checkpoint.path}: weights do not fit config.json ({listed})", fix=fix)
    return sorted(found, key=lambda pair: (pair[1].file.name, pair[1].offset))


def _some(keys: list[str], limit: int = 6) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _head_info(file: Path, cfg: ModelConfig) -> TensorInfo:
    header = read_header(file)
    square = (cfg.d_model, cfg.d_model)
    info = header.get("weight")
    if set(header) != {"weight"} or info is None or info.shape != square:
        got = ", ".join(f"{key} {list(t.shape)}" for key, t in header.items()) or "no tensors"
        raise CheckpointError(
            str(file), expected=f"weight {list(square)} alone", got=got, fix="the head saved with this AR"
        )
    _stored(info)
    return info


def _read(
    found: list[tuple[Slot, TensorInfo]],
    cfg: ModelConfig,
    head: bool,
    dtype: np.dtype | None,
    shardings: Params | None,
    progress: Progress | None,
    int8: bool = False,
) -> Params:
    """Reads the located tensors into a new tree; `dtype` None keeps each array's own (the widest of its blocks')."""
    specs = param_specs(cfg, head=head)
    stored: dict[tuple[str, bool], np.dtype] = {}
    for slot, info in found:
        place = (slot.field, slot.layer is None)
        stored[place] = np.dtype(jnp.promote_types(stored.get(place, DTYPES[info.dtype]), DTYPES[info.dtype]))
    total, done = sum(info.nbytes for _, info in found), 0
    arrays: dict[tuple[str, bool], Any] = {}
    for slot, info in found:
        place = (slot.field, slot.layer is None)
        to = dtype or stored[place]
        sharding = None if shardings is None else leaf(shardings, slot)
        tensor = read_tensor(info, to, transpose=slot.transpose)
        if slot.layer is None:
            arrays[place] = put(tensor, sharding)
        else:
            shape = leaf(specs, slot).shape
            narrow = int8 and is_matrix(shape)
            if place not in arrays:
                empty = empty_stack(shape, to, sharding) if narrow else jnp.zeros(shape, to, device=sharding)
                arrays[place] = empty
            given = put(tensor, of_row(sharding))
            row = quantize_row(given, sharding) if narrow else given
            arrays[place] = jax.tree.map(functools.partial(_place, layer=slot.layer), arrays[place], row)
        # Without this the next tensors would be read, and held, while the copies are still under way.
        jax.block_until_ready(arrays[place])
        done += info.nbytes
        if progress is not None:
            progress(done, total)
    layers = Layers(**{f.name: arrays.get((f.name, False)) for f in dataclasses.fields(Layers)})
    return Params(layers=layers, **{name: arrays.get((name, True)) for name in ("embed", "final_norm", "lm_head")})


def _place(stack: jax.Array, row: jax.Array, *, layer: int) -> jax.Array:
    at = stack.sharding if isinstance(stack.sharding, NamedSharding) else None
    return placer(at)(stack, row, np.int32(layer))


@dataclasses.dataclass(frozen=True)
class Saved:
    """What was written: number of tensors and of scalars, bytes of all weight files, and the files' names."""

    tensors: int
    params: int
    nbytes: int
    files: tuple[str, ...]


def save_model(
    params: Params, cfg: ModelConfig, hf_config: dict[str, Any], out_dir: str | Path, **options: Any
) -> Saved:
    """Writes a Hugging Face directory: config.json and weights, as one move when complete.

    The options are those of `write_checkpoint`, and `overwrite` to replace a directory that is not empty."""
    overwrite = options.pop("overwrite", False)
    with atomic_dir(out_dir, overwrite=overwrite) as temporary:
        return write_checkpoint(params, cfg, hf_config, temporary, **options)


def write_checkpoint(
    params: Params,
    cfg: ModelConfig,
    hf_config: dict[str, Any],
    directory: Path,
    *,
    dtype: Any = None,
    max_shard_bytes: float = MAX_SHARD_BYTES,
    role: str = "model",
    head: jax.Array | None = None,
    progress: Progress | None = None,
) -> Saved:
    """Writes config.json and weight files into an existing directory.

    `hf_config` is the config.json of the model that the parameters come from; its depth and dtype are made to fit,
    and of a multimodal one the text part is written. `dtype` None keeps each array's own. `role` "ar" writes no final
    norm and no lm_head, and `head` [D, D] (input-first) as value_head.safetensors; "av" and "model" are the same.
    """
    if role not in ("av", "ar", "model") or (head is not None) != (role == "ar"):
        raise ValueError(f"role {role!r} {'without a' if head is None else 'with a'} head")
    to = None if dtype is None else as_dtype(dtype)
    wanted = slots(cfg, head=role != "ar")
    adapted = is_adapted(params.layers)
    entries = []
    for key, slot in wanted.items():
        array = leaf(params, slot)
        spec_shape = leaf(param_specs(cfg, head=role != "ar"), slot).shape
        shape = None if array is None else tuple(array.shape)
        if adapted and shape is not None and slot.layer is not None:
            shape = (min(shape[0], spec_shape[0]), *shape[1:])  # of a base that goes on after the adapted blocks
        if shape != spec_shape:
            got = None if array is None else list(array.shape)
            raise CheckpointError(f"parameters do not fit their config at {key}", expected=list(spec_shape), got=got)
        entries.append(Entry(key, slot.shape, to or as_dtype(array.dtype)))
    config = export_config(hf_config, cfg, entries[0].dtype)
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    total, done, files, nbytes = sum(e.nbytes for e in entries), 0, [], 0
    shards = plan_shards(entries, max_shard_bytes)

    def tensors(shard: list[Entry]) -> Iterator[np.ndarray]:
        nonlocal done
        for entry in shard:
            yield _fetch(params, wanted[entry.key], entry)
            done += entry.nbytes
            if progress is not None:
                progress(done, total)

    for i, shard in enumerate(shards):
        files.append(SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors")
        nbytes += write_file(directory / files[-1], shard, tensors(shard))
    n_params = sum(int(np.prod(e.shape, dtype=np.int64)) for e in entries)
    if len(shards) > 1:
        names = {e.key: name for name, shard in zip(files, shards, strict=True) for e in shard}
        index = {
            "metadata": {"total_parameters": n_params, "total_size": total},
            "weight_map": dict(sorted(names.items())),
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if head is not None:
        entry = Entry("weight", (cfg.d_model, cfg.d_model), to or as_dtype(head.dtype))
        files.append(VALUE_HEAD)
        nbytes += write_file(directory / VALUE_HEAD, [entry], [_as(on_host(head), entry).T])
        n_params += int(np.prod(entry.shape))
    return Saved(len(entries) + (head is not None), n_params, nbytes, tuple(files))


def give_tensors(params: Params, cfg: ModelConfig, *, role: str = "model", head: jax.Array | None = None) -> None:
    """This process's part in a `write_checkpoint` that another process makes of arrays which all hold parts of: the
    same tensors in the same order, without writing anything."""
    for slot in slots(cfg, head=role != "ar").values():
        _tensor(params, slot)
    if head is not None:
        on_host(head)


def _tensor(params: Params, slot: Slot) -> np.ndarray:
    array = leaf(params, slot)
    return on_host(array) if slot.layer is None else row_on_host(array, slot.layer)


def _fetch(params: Params, slot: Slot, entry: Entry) -> np.ndarray:
    """One tensor on the host, as a checkpoint stores it (a transposed view)."""
    tensor = _as(_tensor(params, slot), entry)
    return tensor.T if slot.transpose else tensor


def _as(tensor: np.ndarray, entry: Entry) -> np.ndarray:
    if tensor.dtype == entry.dtype:
        return tensor
    with np.errstate(over="ignore"):
        cast = tensor.astype(entry.dtype)
    if entry.dtype == np.float16 and not np.isfinite(cast).all():
        raise CheckpointError(f"{entry.key} does not fit float16 (over 65504)", fix="bfloat16 or float32 instead")
    return cast


def export_config(hf_config: dict[str, Any], cfg: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The config.json to write beside parameters of `cfg`: text part only, their depth, their dtype.

    Raises ConfigError if the result would not be read back as `cfg`."""
    out = truncate_hf_config(_text_only(hf_config), cfg.n_layers)
    name = str(np.dtype(dtype))
    for field in ("torch_dtype", "dtype"):  # older and newer spelling
        if field in out or (field == "dtype" and "torch_dtype" not in out):
            out[field] = name
    if ModelConfig.from_hf(out) != cfg:
        raise ConfigError("config.json does not describe these parameters", fix="the config.json they were loaded with")
    return out


def _text_only(hf_config: dict[str, Any]) -> dict[str, Any]:
    """A multimodal config.json as that of its language model, which is all that is written; others unchanged."""
    if not isinstance(hf_config.get("text_config"), dict):
        return hf_config
    kept = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version")
    outer = {k: hf_config[k] for k in kept if k in hf_config}
    text = {**outer, **text_part(hf_config)}
    if "eos_token_id" in outer:  # the wrapper's list is what generation stops at
        text["eos_token_id"] = outer["eos_token_id"]
    return {**text, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
