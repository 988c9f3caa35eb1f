"""The three models of a pair on disk: what each directory holds, checked before any weight is read.

Weights are loaded on first use and can be dropped again, so that a machine which fits one model at a time can
still run all three.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from nla_jax.errors import CheckpointError, ConfigError, SidecarError
from nla_jax.hub import progress_bar
from nla_jax.models import hf
from nla_jax.models.config import ModelConfig
from nla_jax.models.params import Params, param_specs
from nla_jax.models.sharding import DECODE, shardings
from nla_jax.prompt import AVPrompt, build_av_prompt
from nla_jax.reconstructor import ARParams, ar_specs
from nla_jax.sidecar import Sidecar, read_sidecar
from nla_jax.tokenizer import Tokenizer
from nla_jax.verbalizer import av_prefix_jit


def default_dtype(path: Path) -> str:
    """The stored dtype on GPU and TPU; float32 on CPU, where half precision is slower and saves only memory."""
    return "float32" if jax.default_backend() == "cpu" else str(hf.hf_dtype(path))


def writer_shardings(cfg: ModelConfig, mesh: Mesh) -> Params:
    """Where the parameters of a model that writes lie: split over the mesh, so that none has to fit one device.

    Its embedding alone is whole along D: `models.layers.embed` looks single tokens up so."""
    specs = param_specs(cfg)
    return shardings(specs, cfg, mesh).replace(embed=shardings(specs, cfg, mesh, DECODE).embed)


@dataclasses.dataclass
class Target:
    """The explained model: tokenizer and its first layer_index + 1 blocks."""

    path: Path
    layer_index: int
    dtype: str | None = None
    tokenizer: Tokenizer = dataclasses.field(init=False)
    cfg: ModelConfig = dataclasses.field(init=False)
    _params: Params | None = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        full = ModelConfig.from_dir(self.path)
        if self.layer_index >= full.n_layers:
            raise ConfigError(
                f"{self.path}: layer_index {self.layer_index}",
                expected=f"under {full.n_layers} (the target's blocks, from 0)",
                fix="the target model that the pair was trained on",
            )
        self.cfg = full.truncated(self.layer_index + 1)
        self.tokenizer = Tokenizer.from_dir(self.path)

    def params(self) -> Params:
        if self._params is None:
            n_layers, dtype = self.cfg.n_layers, self.dtype or default_dtype(self.path)
            with progress_bar("reading target") as bar:
                self._params = hf.load_model(self.path, dtype, n_layers=n_layers, head=False, progress=bar)[1]
        return self._params

    def release(self) -> None:
        self._params = None


@dataclasses.dataclass
class AV:
    """The activation verbalizer: sidecar, prompt, stop ids, parameters and the keys and values of its prompt."""

    path: Path
    dtype: str | None = None
    sidecar: Sidecar = dataclasses.field(init=False)
    tokenizer: Tokenizer = dataclasses.field(init=False)
    cfg: ModelConfig = dataclasses.field(init=False)
    prompt: AVPrompt = dataclasses.field(init=False)
    stop_ids: tuple[int, ...] = dataclasses.field(init=False)
    _params: Params | None = dataclasses.field(default=None, init=False)
    _prefix: object = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        self.sidecar = read_sidecar(self.path)
        if self.sidecar.role not in (None, "av"):
            raise SidecarError(f"{self.path}: role", expected="av", got=self.sidecar.role, fix="swap --av and --ar")
        if self.sidecar.injection_scale is None:
            raise SidecarError(
                f"{self.path}/nla_meta.yaml: extraction.injection_scale is missing",
                expected="the L2 norm at which vectors are injected",
                fix="the AV's own sidecar, not the base model's or a dataset's",
            )
        self.cfg = ModelConfig.from_dir(self.path)
        _check_width(self.path, self.cfg, self.sidecar)
        self.tokenizer = Tokenizer.from_dir(self.path)
        self.sidecar.check(self.tokenizer, str(self.path))
        self.prompt = build_av_prompt(self.tokenizer, self.sidecar)
        self.stop_ids = _stop_ids(self.path, self.tokenizer)

    def load(self, mesh: Mesh | None = None) -> Params:
        """The parameters, read from their files; on a mesh every device gets its part alone."""
        to = None if mesh is None else writer_shardings(self.cfg, mesh)
        dtype = self.dtype or default_dtype(self.path)
        with progress_bar("reading AV") as bar:
            return hf.load_model(self.path, dtype, shardings=to, progress=bar)[1]

    def params(self) -> Params:
        """The parameters on one device, read once."""
        if self._params is None:
            self._params = self.load()
        return self._params

    def prefix(self):
        """Keys and values of the prompt before the marker, computed once."""
        if self._prefix is None:
            self._prefix = av_prefix_jit(self.params(), prompt=self.prompt, cfg=self.cfg)
        return self._prefix

    def release(self) -> None:
        self._params = self._prefix = None


@dataclasses.dataclass
class AR:
    """The activation reconstructor: sidecar, tokenizer, trunk and head."""

    path: Path
    dtype: str | None = None
    sidecar: Sidecar = dataclasses.field(init=False)
    tokenizer: Tokenizer = dataclasses.field(init=False)
    cfg: ModelConfig = dataclasses.field(init=False)
    _params: ARParams | None = dataclasses.field(default=None, init=False)

    def __post_init__(self):
        self.sidecar = read_sidecar(self.path)
        if self.sidecar.role not in (None, "ar"):
            raise SidecarError(f"{self.path}: role", expected="ar", got=self.sidecar.role, fix="swap --av and --ar")
        if self.sidecar.mse_scale is None:
            raise SidecarError(
                f"{self.path}/nla_meta.yaml: extraction.mse_scale is null (raw error)",
                expected="a number: scores compare directions",
                fix="an AR trained with mse_scale, such as the released ones",
            )
        if not (self.path / "value_head.safetensors").is_file():
            raise CheckpointError(
                f"{self.path}: value_head.safetensors does not exist",
                fix="an AR directory: its head is not part of the trunk's files",
            )
        self.cfg = ModelConfig.from_dir(self.path)
        _check_width(self.path, self.cfg, self.sidecar)
        blocks, layer = self.cfg.n_layers, self.sidecar.layer_index
        if layer is not None and blocks != layer + 1:
            raise SidecarError(
                f"{self.path}: {blocks} blocks",
                expected=f"layer_index + 1 = {layer + 1} (block K is hidden_states[K+1])",
                fix="the config.json and nla_meta.yaml that were saved together",
            )
        self.tokenizer = Tokenizer.from_dir(self.path)
        self.sidecar.check(self.tokenizer, str(self.path))

    @property
    def layer_index(self) -> int:
        return self.cfg.n_layers - 1

    def load(self, mesh: Mesh | None = None) -> ARParams:
        """The parameters, read from their files; on a mesh every device gets its part alone."""
        to = None if mesh is None else shardings(ar_specs(self.cfg), self.cfg, mesh)
        trunk_to, head_to = (None, None) if to is None else (to.trunk, to.head)
        dtype = self.dtype or default_dtype(self.path)
        with progress_bar("reading AR") as bar:
            _, trunk, head = hf.load_ar(self.path, dtype, shardings=trunk_to, head_sharding=head_to, progress=bar)
        return ARParams(trunk=trunk, head=head)

    def params(self) -> ARParams:
        """The parameters on one device, read once."""
        if self._params is None:
            self._params = self.load()
        return self._params

    def release(self) -> None:
        self._params = None


def _check_width(path: Path, cfg: ModelConfig, sidecar: Sidecar) -> None:
    if sidecar.d_model != cfg.d_model:
        raise SidecarError(
            f"{path}: d_model in nla_meta.yaml",
            expected=f"{cfg.d_model} (hidden_size in config.json)",
            got=sidecar.d_model,
            fix="the sidecar that belongs to this checkpoint",
        )


def _stop_ids(path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every id that ends an answer: generation_config.json, config.json and the tokenizer's own end of sequence."""
    ids = set(hf.stop_ids(path))
    if tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    if not ids:
        raise ConfigError(
            f"{path}: no end-of-sequence id", expected="eos_token_id in generation_config.json or config.json"
        )
    return tuple(sorted(ids))


def check_pair(av: AV | None, ar: AR | None, target: Target | None) -> None:
    """Raises if the roles cannot belong together: different widths, layers, scales, or AR templates."""
    widths = {role: m.cfg.d_model for role, m in (("av", av), ("ar", ar), ("target", target)) if m is not None}
    if len(set(widths.values())) > 1:
        named = ", ".join(f"{role} {d}" for role, d in widths.items())
        raise ConfigError(
            "d_model differs",
            expected="one width for target, AV and AR",
            got=named,
            fix="nla doctor on the directories",
        )
    if av is None or ar is None:
        return
    if av.sidecar.layer_index is not None and av.sidecar.layer_index != ar.layer_index:
        raise SidecarError(
            "AV and AR are of different pairs",
            expected=f"layer_index {av.sidecar.layer_index} (the AV's) in both",
            got=f"{ar.layer_index} (the AR's)",
            fix="the two halves of one release",
        )
    if av.sidecar.ar_template and ar.sidecar.ar_template and av.sidecar.ar_template != ar.sidecar.ar_template:
        raise SidecarError(
            "AV and AR are of different pairs: their AR templates differ", fix="the two halves of one release"
        )
