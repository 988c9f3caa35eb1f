"""Parameters as an Orbax checkpoint in a directory that also holds config, tokenizer and sidecar.

    nla_jax.json    what the directory is: format, version, role, and the sizes of Orbax's files
    config.json     the Hugging Face config that the parameters belong to
    params/         Orbax, a tree {"embed", "layers": {field: stacked array}, "final_norm", "lm_head", "head"}

The tree is plain nested dicts, so that Orbax alone can read it; absent parameters have no entry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.errors import CheckpointError, NLAError
from nla_jax.models.config import ModelConfig
from nla_jax.models.hf import Saved, as_dtype, export_config
from nla_jax.models.params import Layers, Params, ParamSpec, param_specs

MARK = "nla_jax.json"
_FORMAT = "nla_jax parameters"
_AGAIN = "nla convert ... --to orbax again"


def is_orbax_dir(path: str | Path) -> bool:
    """True for a directory that `write_orbax` made."""
    return (Path(path) / MARK).is_file()


def orbax_role(path: str | Path) -> str:
    """What is stored: "model", "av" or "ar". CheckpointError where the directory's own description cannot be read."""
    return _read_mark(Path(path))["role"]


def _read_mark(path: Path) -> dict[str, Any]:
    try:
        mark = json.loads((path / MARK).read_text(encoding="utf-8"))
        good = mark["format"] == _FORMAT and mark["version"] == 1 and mark["role"] in ("model", "av", "ar")
        good = good and isinstance(mark["files"], dict)
    except (OSError, ValueError, TypeError, KeyError):
        good = False
    if not good:
        expected = f"{_FORMAT}, version 1, with a role and the sizes of its files"
        raise CheckpointError(f"{path / MARK}", expected=expected, fix=_AGAIN)
    return mark


def _sizes(path: Path) -> dict[str, int]:
    """Orbax's files by their path in the directory, and their bytes."""
    return {f.relative_to(path).as_posix(): f.stat().st_size for f in (path / "params").rglob("*") if f.is_file()}


def _tree(params: Params, head: Any) -> dict[str, Any]:
    layers = {name: value for name, value in vars(params.layers).items() if value is not None}
    tree = {
        "embed": params.embed,
        "layers": layers,
        "final_norm": params.final_norm,
        "lm_head": params.lm_head,
    }
    return {name: value for name, value in {**tree, "head": head}.items() if value is not None}


def write_orbax(
    params: Params,
    cfg: ModelConfig,
    hf_config: dict[str, Any],
    directory: Path,
    *,
    role: str,
    head: jax.Array | None = None,
) -> Saved:
    """Writes nla_jax.json, config.json and params/ into an existing directory."""
    import orbax.checkpoint as ocp  # takes seconds to import

    tree = _tree(params, head)
    config = export_config(hf_config, cfg, tree["embed"].dtype)
    (directory / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.resolve() / "params", tree)
        checkpointer.wait_until_finished()
    sizes = _sizes(directory)
    mark = {"format": _FORMAT, "version": 1, "role": role, "files": sizes}
    (directory / MARK).write_text(json.dumps(mark) + "\n", encoding="utf-8")
    leaves = jax.tree.leaves(tree)
    return Saved(len(leaves), sum(a.size for a in leaves), sum(sizes.values()), ("params",))


def read_orbax(path: str | Path, dtype: str | None = None) -> tuple[ModelConfig, Params, jax.Array | None]:
    """(config, parameters, head or None) of a directory that `write_orbax` made; `dtype` None keeps the stored one.

    Raises CheckpointError listing what is missing, unknown or misshapen."""
    import orbax.checkpoint as ocp

    path = Path(path).resolve()
    to = None if dtype is None else as_dtype(dtype)
    mark = _read_mark(path)
    role = mark["role"]
    # Found out here because Orbax, given a damaged directory, also prints pages from its threads.
    sizes = _sizes(path)
    damaged = sorted(name for name, size in mark["files"].items() if sizes.get(name) != size)
    if damaged:
        name = damaged[0]
        what = f"{path / name} is missing or truncated" + (f", and {len(damaged) - 1} more" if damaged[1:] else "")
        expected = f"{mark['files'][name]} bytes"
        raise CheckpointError(what, expected=expected, got=sizes.get(name, "no file"), fix="copy the directory again")
    cfg = ModelConfig.from_dir(path)
    square = ParamSpec((cfg.d_model, cfg.d_model), ("embed", "embed"))
    wanted = _tree(param_specs(cfg, head=role != "ar"), square if role == "ar" else None)
    # Orbax keeps the devices of the run that wrote; what is read here goes to this run's first.
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = _stored_tree(checkpointer, path / "params")
            _check(path, _flat(wanted), _flat(stored))
            abstract = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, as_dtype(to or m.dtype), sharding=place), stored
            )
            tree = checkpointer.restore(path / "params", abstract)
    except NLAError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged directory
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path}/params cannot be read by Orbax ({reason})", fix=_AGAIN) from None
    if to == np.float16 and not all(bool(jnp.isfinite(a).all()) for a in jax.tree.leaves(tree)):
        raise CheckpointError(
            f"{path}: a weight is too large for float16 (over 65504)", fix="bfloat16 or float32 instead"
        )
    head = tree.pop("head", None)
    layers = Layers(**{field: tree["layers"].get(field) for field in Layers.__dataclass_fields__})
    return cfg, Params(tree["embed"], layers, tree.get("final_norm"), tree.get("lm_head")), head


def _stored_tree(checkpointer: Any, path: Path) -> dict[str, Any]:
    metadata = checkpointer.metadata(path)
    tree = getattr(metadata, "item_metadata", metadata)
    tree = getattr(tree, "tree", tree)
    if not isinstance(tree, dict) or "embed" not in tree:  # a damaged directory only makes Orbax log a warning
        raise ValueError("its description is missing or damaged")
    return tree


def _flat(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    is_leaf = lambda x: hasattr(x, "shape")  # noqa: E731
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(keys, simple=True, separator="."): tuple(leaf.shape) for keys, leaf in pairs}


def _check(path: Path, wanted: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> None:
    problems = [
        ("missing", sorted(wanted.keys() - stored.keys())),
        ("unknown", sorted(stored.keys() - wanted.keys())),
        ("misshapen", sorted(k for k in wanted.keys() & stored.keys() if wanted[k] != stored[k])),
    ]
    listed = "; ".join(f"{len(names)} {what}: {', '.join(names[:6])}" for what, names in problems if names)
    if listed:
        raise CheckpointError(
            f"{path}: parameters do not fit config.json ({listed})", fix="the directory as it was written"
        )
