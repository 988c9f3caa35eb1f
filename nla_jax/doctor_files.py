"""What a directory is (target, AV, AR or data) and what its files hold, without loading weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nla_jax.doctor import Report
from nla_jax.errors import ConfigError, InputError, NLAError, SidecarError
from nla_jax.models.config import ModelConfig, read_hf_config
from nla_jax.models.hf import VALUE_HEAD, stop_ids
from nla_jax.models.hf_keys import NORM, layout_of
from nla_jax.models.safetensors_io import DTYPES, Checkpoint, TensorInfo, read_header
from nla_jax.sidecar import NAME, Sidecar, parse_sidecar, read_sidecar, sidecar_path
from nla_jax.tokenizer import Tokenizer

_ROLES = {"av": "AV", "actor": "AV", "ar": "AR", "critic": "AR"}


@dataclasses.dataclass
class Found:
    """One directory or data file. What could not be read is None, and the report says why.

    `tensors` maps every name that the index (or single file) lists to where it lies; None where its file is missing,
    unreadable or lacks it. `raw` is the sidecar's YAML even where it is not a valid sidecar.
    """

    path: Path
    kind: str
    config: dict[str, Any] | None = None
    cfg: ModelConfig | None = None
    sidecar: Sidecar | None = None
    raw: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    tensors: dict[str, TensorInfo | None] | None = None
    head: dict[str, TensorInfo] | None = None
    stop_ids: tuple[int, ...] = ()

    @property
    def is_model(self) -> bool:
        return self.kind != "dataset"

    def section(self, name: str) -> dict[str, Any]:
        """A mapping of the raw sidecar; empty where it is absent or something else."""
        value = self.raw.get(name)
        return value if isinstance(value, dict) else {}

    @property
    def embedding(self) -> TensorInfo | None:
        """Where the token embedding lies, if its file is there."""
        keys = self.tensors or {}
        return keys.get(layout_of(keys)[0] + "embed_tokens.weight")


def find(path: Path, report: Report) -> list[Found]:
    """What is at `path`; a folder of data files gives one entry for each sidecar in it."""
    if not path.exists():
        raise InputError(f"{path} does not exist", fix="the path of a checkpoint directory or of a dataset")
    if path.is_file():
        if path.name in (NAME, "config.json", VALUE_HEAD):
            return [_model(path.parent, report)]
        if not sidecar_path(path).is_file():
            raise InputError(
                f"{path}: no sidecar beside it", expected=sidecar_path(path).name, fix="a checkpoint directory"
            )
        return [_dataset(path, report)]
    if any((path / name).is_file() for name in ("config.json", NAME, VALUE_HEAD)):
        return [_model(path, report)]
    sidecars = sorted(path.glob(f"*.{NAME}"))
    if not sidecars:
        raise InputError(f"{path}", expected=f"config.json (a checkpoint) or *.{NAME} (data)", got="neither")
    return [_dataset(file, report) for file in sidecars]


def sample_rows(info: TensorInfo, limit: int, n: int = 64) -> np.ndarray:
    """`n` of a matrix's first `limit` rows, evenly spaced, as float32; nothing else of the file is read."""
    rows = np.unique(np.linspace(0, min(limit, info.shape[0]) - 1, n).astype(int))
    dtype, width = DTYPES[info.dtype], info.shape[1]
    out = np.empty((len(rows), width), np.float32)
    with info.file.open("rb") as f:
        for i, row in enumerate(rows):
            f.seek(info.offset + int(row) * width * dtype.itemsize)
            out[i] = np.frombuffer(f.read(width * dtype.itemsize), dtype)
    return out


def _dataset(path: Path, report: Report) -> Found:
    found = Found(path, "dataset", raw=_raw_sidecar(path))
    try:
        found.sidecar = read_sidecar(path)
        if found.sidecar.kind == "nla_model":
            report.warning(
                path, "sidecar kind", "the sidecar beside this data is a model's (kind nla_model)", "the dataset's own"
            )
        else:
            report.ok(path, "sidecar", f"dataset of width {found.sidecar.d_model}, layer {found.sidecar.layer_index}")
    except NLAError as error:
        report.error(path, "sidecar", error)
    return found


def _model(path: Path, report: Report) -> Found:
    found = Found(path, "target", raw=_raw_sidecar(path))
    checkpoint = None
    try:
        checkpoint = Checkpoint(path)
        found.tensors = dict.fromkeys(sorted(checkpoint.keys))
    except NLAError as error:
        report.error(path, "weights", error)
    found.kind = _kind(found)

    try:
        found.config = read_hf_config(path)
        found.cfg = cfg = ModelConfig.from_hf(found.config, source=str(path / "config.json"))
        report.ok(path, "config", f"{cfg.family}: {cfg.n_layers} blocks, D {cfg.d_model}, vocabulary {cfg.vocab_size}")
    except NLAError as error:
        report.error(path, "config", error)
    if checkpoint is not None:
        _headers(found, checkpoint, report)
    if found.kind == "AR":
        _value_head(found, report)
    if found.kind != "target" or found.raw or (path / NAME).is_file():
        _sidecar(found, report)
    try:
        found.tokenizer = Tokenizer.from_dir(path)
    except NLAError as error:
        report.error(path, "tokenizer", error)
    try:
        found.stop_ids = stop_ids(path)
    except ConfigError as error:
        report.error(path, "stop ids", error)
    return found


def _kind(found: Found) -> str:
    """By what the directory holds, and where that leaves it open by what its sidecar says."""
    if (found.path / VALUE_HEAD).is_file():
        return "AR"
    if not (found.path / NAME).is_file():
        return "target"
    keys = found.tensors or {}
    whole_model = layout_of(keys)[0] + NORM in keys
    said = _ROLES.get(str(found.raw.get("role")))
    return "AR" if said == "AR" and not whole_model else "AV"


def _raw_sidecar(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(sidecar_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _headers(found: Found, checkpoint: Checkpoint, report: Report) -> None:
    """Locates every tensor. Files that are not there are one finding together, damaged ones one each."""
    assert found.tensors is not None
    errors: dict[str, NLAError] = {}
    absent = []
    for key in found.tensors:
        try:
            found.tensors[key] = checkpoint.info(key)
            if found.tensors[key] is None:
                absent.append(key)
        except NLAError as error:
            errors.setdefault(str(error), error)
    missing = [e for e in errors.values() if "does not exist" in e.what]
    if missing:
        names = ", ".join(sorted(Path(e.what.split(" does not exist")[0]).name for e in missing))
        text = f"{len(missing)} weight files that the index names are missing: {names}"
        report.problem(found.path, "weights", text, "downloading them, or a complete directory")
    for damaged in errors.values():
        if damaged not in missing:
            report.error(found.path, "weights", damaged)
    if absent:
        text = f"{len(absent)} tensors are not in the file that the index names for them: {', '.join(absent[:3])}"
        report.problem(found.path, "weights", text, "the index and the weight files of one save")


def _value_head(found: Found, report: Report) -> None:
    if not (found.path / VALUE_HEAD).is_file():
        report.problem(
            found.path,
            "value head",
            f"{VALUE_HEAD} is missing: without its head an AR predicts nothing",
            "the complete AR directory; the head is a file of its own",
        )
        return
    try:
        found.head = read_header(found.path / VALUE_HEAD)
    except NLAError as error:
        report.error(found.path, "value head", error)


def _sidecar(found: Found, report: Report) -> None:
    try:
        found.sidecar = read_sidecar(found.path)
    except SidecarError as error:
        if "num_hidden_layers" in found.section("critic"):
            found.sidecar = _without_old_depth(found.raw)
        if found.sidecar is None:  # else the layer check says what is wrong, in words
            report.error(found.path, "sidecar", error)


def _without_old_depth(raw: dict[str, Any]) -> Sidecar | None:
    """The sidecar that is left without critic.num_hidden_layers, if that field was all that was wrong with it."""
    copy = json.loads(json.dumps(raw, default=str))
    copy["critic"].pop("num_hidden_layers")
    try:
        return parse_sidecar(copy)
    except SidecarError:
        return None
