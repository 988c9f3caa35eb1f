"""The models that training starts from and writes: where they come from, and everything an export needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from nla_jax import hub
from nla_jax.build import Build
from nla_jax.errors import ConfigError, InputError, SidecarError
from nla_jax.export import export_dir
from nla_jax.extract_run import weights_fingerprint
from nla_jax.hub import progress_bar
from nla_jax.models import hf
from nla_jax.models.config import ModelConfig, read_hf_config
from nla_jax.models.lora import LoRAConfig, adapter_specs
from nla_jax.models.params import Params, param_specs
from nla_jax.models.placing import on_host
from nla_jax.prompt import AVPrompt, build_av_prompt
from nla_jax.reconstructor import ARParams, init_head
from nla_jax.roles import AR, AV
from nla_jax.sidecar import Sidecar
from nla_jax.tokenizer import Tokenizer
from nla_jax.train import adapted
from nla_jax.train.layout import ONE_DEVICE, Layout


@dataclasses.dataclass(frozen=True)
class Role:
    """An AV or AR to be trained: `path` it is read from (the target's, or its own of an earlier stage), its config,
    sidecar and tokenizer; with LoRA, `lora` and the directory of the target, whose weights stay. No weight is read
    before `load` and `base`."""

    role: str
    path: Path
    own: bool  # `path` holds a trained AV or AR, not the target
    cfg: ModelConfig
    sidecar: Sidecar
    tokenizer: Tokenizer
    lora: LoRAConfig | None = None
    target: Path | None = None

    @property
    def prompt(self) -> AVPrompt:
        return build_av_prompt(self.tokenizer, self.sidecar)

    @property
    def mse_scale(self) -> float:
        return self.sidecar.need_mse_scale(self.path)

    def on_base(self, target: str, lora: LoRAConfig | None = None) -> Role:
        """The same, of which the adapters in its export are trained on, with the target as their base. InputError where
        `lora` is given and not theirs, CheckpointError where it has none."""
        theirs = adapted.settings_of(self.path)
        if lora not in (None, theirs):
            raise InputError("lora", expected=f"that of the adapters in {self.path}: {theirs}", got=lora)
        path = hub.resolve(target, role="target")
        full = ModelConfig.from_dir(path)
        if full.truncated(self.cfg.n_layers) != self.cfg:
            fix = f"the target it was made from, not {path}"
            raise ConfigError(f"{self.path}: not a model of the target's shape", fix=fix)
        return dataclasses.replace(self, lora=theirs, target=path)

    def specs(self) -> Any:
        """The declared parameters, as the tree that `load` gives."""
        return adapted.trained_specs(self.role, self.cfg, self.lora)

    def base(self, dtype: str, layout: Layout = ONE_DEVICE, *, int8: bool = False) -> Params:
        """The target's weights as adapters need them: of an AV all, of an AR its blocks; `int8`: models/int8.py."""
        of_av = self.role == "av"
        to = layout.shardings(param_specs(self.cfg, head=of_av), self.cfg)
        assert self.target is not None
        with progress_bar("reading target") as bar:
            n = None if of_av else self.cfg.n_layers
            options: dict[str, Any] = {"n_layers": n, "head": of_av, "int8": int8}
            return hf.load_model(self.target, dtype, shardings=to, progress=bar, **options)[1]

    def load(self, dtype: str, layout: Layout = ONE_DEVICE, *, seed: int = 0) -> Any:
        """What is trained: `Params` of an AV, `ARParams` of an AR, or adapters (train/adapted.py), which `seed` draws
        where they are new. An AR that is made from the target has an identity head."""
        to = layout.shardings(self.specs(), self.cfg)
        if self.lora is not None:
            return self._load_adapters(dtype, to, seed)
        with progress_bar(f"reading {self.role.upper()}") as bar:
            if self.role == "av":
                return hf.load_model(self.path, dtype, shardings=to, progress=bar)[1]
            of_trunk, of_head = (None, None) if to is None else (to.trunk, to.head)
            if self.own:
                _, trunk, head = hf.load_ar(self.path, dtype, shardings=of_trunk, head_sharding=of_head, progress=bar)
                return ARParams(trunk=trunk, head=head)
            n = self.cfg.n_layers
            _, trunk = hf.load_model(self.path, dtype, n_layers=n, head=False, shardings=of_trunk, progress=bar)
            return ARParams(trunk=trunk, head=self._identity(dtype, of_head))

    def _identity(self, dtype: str, to: Any) -> jax.Array:
        return jax.jit(lambda: init_head(self.cfg.d_model, dtype), out_shardings=to)()

    def _load_adapters(self, dtype: str, to: Any, seed: int) -> Any:
        of_trunk, of_head = (to, None) if self.role == "av" or to is None else (to.trunk, to.head)
        if self.own:
            assert self.target is not None
            adapters, _ = adapted.read(self.path, self.cfg, dtype, weights_fingerprint(self.target), of_trunk)
        else:
            assert self.lora is not None
            adapters = adapted.fresh(self.cfg, self.lora, seed, dtype, of_trunk)
        if self.role == "av":
            return adapters
        head = hf.load_head(self.path, dtype, sharding=of_head) if self.own else self._identity(dtype, of_head)
        return ARParams(trunk=adapters, head=head)

    def export(self, trained: Any, directory: Path, *, stage: str, base: Params | None = None) -> Path:
        """Writes directory/<role>, as one move: weights, tokenizer and sidecar, as `nla explain` and the reference
        read them; adapters are merged into them, and stand beside them in adapter/. Of several processes the first
        writes, and all have to call this: each holds a part."""
        params = adapted.whole(trained, base, self.lora)
        trunk, head = (params.trunk, params.head) if self.role == "ar" else (params, None)
        adapters = None
        if self.lora is not None:
            adapters = jax.tree.map(on_host, trained.trunk if self.role == "ar" else trained)
        out = directory / self.role
        if jax.process_index() != 0:
            hf.give_tensors(trunk, self.cfg, role=self.role, head=head)
            return out
        sidecar = dataclasses.replace(self.sidecar, kind="nla_model", role=self.role, stage=stage)  # type: ignore[arg-type]
        config = read_hf_config(self.path)

        def beside(folder: Path) -> None:
            if self.lora is not None and self.target is not None:
                of = {"base": str(self.target), "fingerprint": weights_fingerprint(self.target)}
                adapted.write(folder, adapters, self.cfg, self.lora, **of)

        options: dict[str, Any] = {"role": self.role, "head": head, "sidecar": sidecar, "beside": beside}
        export_dir(trunk, self.cfg, config, self.path, out, overwrite=True, **options)
        return out


def from_target(role: str, target: str, build: Build, lora: LoRAConfig | None = None) -> Role:
    """An AV or AR that starts as the target, with new adapters where `lora` is given: prompts, marker and scales are
    those of the store's training sets."""
    path = hub.resolve(target, role="target")
    cfg = ModelConfig.from_dir(path)
    if cfg.d_model != build.store.d_model or build.layer >= cfg.n_layers:
        raise ConfigError(
            f"{path}: {cfg.n_layers} blocks of width {cfg.d_model}",
            expected=f"the model that {build.store.path} was extracted from (width {build.store.d_model})",
            fix="target= the directory given to nla extract",
        )
    tokenizer = Tokenizer.from_dir(path)
    sidecar = build.sidecar(role)
    sidecar.check(tokenizer, f"{build.store.path}, {role} sidecar")
    own = cfg if role == "av" else cfg.truncated(build.layer + 1)
    if lora is not None:
        adapter_specs(own, lora)  # ConfigError where the rank is too large
    return Role(role, path, False, own, sidecar, tokenizer, lora, path)


def from_checkpoint(role: str, path_or_hub_id: str, build: Build) -> Role:
    """A trained AV or AR. Its own sidecar holds, not the store's; SidecarError where they contradict each other."""
    path = hub.resolve(path_or_hub_id, role=role)
    found = AV(path) if role == "av" else AR(path)
    theirs = build.sidecar(role)
    fields = ("d_model", "layer_index", "marker_id", "mse_scale", f"{role}_template")
    for field in fields if role == "ar" else (*fields, "injection_scale"):
        ours, other = getattr(found.sidecar, field), getattr(theirs, field)
        if ours is not None and other is not None and ours != other:
            raise SidecarError(
                f"{path}: {field}",
                expected=f"{other!r} (the training sets of {build.store.path})",
                got=repr(ours),
                fix="the AV and AR that were trained on this store, or nla build with their template and scale",
            )
    sidecar = found.sidecar
    if sidecar.variance_nrm is None:
        sidecar = dataclasses.replace(sidecar, variance_nrm=build.variance_nrm)
    return Role(role, path, True, found.cfg, sidecar, found.tokenizer)


def stop_ids(role: Role) -> tuple[int, ...]:
    """Every id that ends what the AV writes, of its files and its tokenizer."""
    ids = set(hf.stop_ids(role.path))
    if role.tokenizer.eos_id is not None:
        ids.add(role.tokenizer.eos_id)
    return tuple(sorted(ids))


def copy_of(params: Params) -> Params:
    """Another buffer with the same values: what the optimizer donates must not be the reference's."""
    return jax.tree.map(lambda x: x.copy(), params)
