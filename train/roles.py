"""The models that training starts from and writes: where they come from, and everything an export needs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax

from nla_jax import hub
from nla_jax.build import Build
from nla_jax.errors import ConfigError, SidecarError
from nla_jax.export import export_dir
from nla_jax.hub import progress_bar
from nla_jax.models import hf
from nla_jax.models.config import ModelConfig, read_hf_config
from nla_jax.models.params import Params, param_specs
from nla_jax.prompt import AVPrompt, build_av_prompt
from nla_jax.reconstructor import ARParams, ar_specs, init_head
from nla_jax.roles import AR, AV
from nla_jax.sidecar import Sidecar
from nla_jax.tokenizer import Tokenizer
from nla_jax.train.layout import ONE_DEVICE, Layout


@dataclasses.dataclass(frozen=True)
class Role:
    """An AV or AR to be trained: `path` it is read from (the target's, or its own of an earlier stage), its config,
    sidecar and tokenizer. No weight is read before `load`."""

    role: str
    path: Path
    own: bool  # `path` holds a trained AV or AR, not the target
    cfg: ModelConfig
    sidecar: Sidecar
    tokenizer: Tokenizer

    @property
    def prompt(self) -> AVPrompt:
        return build_av_prompt(self.tokenizer, self.sidecar)

    @property
    def mse_scale(self) -> float:
        return self.sidecar.need_mse_scale(self.path)

    def specs(self) -> Any:
        """The declared parameters, as the tree that `load` gives."""
        return param_specs(self.cfg) if self.role == "av" else ar_specs(self.cfg)

    def load(self, dtype: str, layout: Layout = ONE_DEVICE) -> Any:
        """`Params` of an AV, `ARParams` of an AR; an AR that is made from the target has an identity head."""
        to = layout.shardings(self.specs(), self.cfg)
        with progress_bar(f"reading {self.role.upper()}") as bar:
            if self.role == "av":
                return hf.load_model(self.path, dtype, shardings=to, progress=bar)[1]
            of_trunk, of_head = (None, None) if to is None else (to.trunk, to.head)
            if self.own:
                _, trunk, head = hf.load_ar(self.path, dtype, shardings=of_trunk, head_sharding=of_head, progress=bar)
                return ARParams(trunk=trunk, head=head)
            n = self.cfg.n_layers
            _, trunk = hf.load_model(self.path, dtype, n_layers=n, head=False, shardings=of_trunk, progress=bar)
            make = functools.partial(init_head, self.cfg.d_model, dtype)
            return ARParams(trunk=trunk, head=make() if of_head is None else jax.jit(make, out_shardings=of_head)())

    def export(self, params: Any, directory: Path, *, stage: str) -> Path:
        """Writes directory/<role>, as one move: weights, tokenizer and sidecar, as `nla explain` and the reference
        read them. Of several processes the first writes, and all have to call this: each holds a part."""
        trunk, head = (params.trunk, params.head) if self.role == "ar" else (params, None)
        out = directory / self.role
        if jax.process_index() != 0:
            hf.give_tensors(trunk, self.cfg, role=self.role, head=head)
            return out
        sidecar = dataclasses.replace(self.sidecar, kind="nla_model", role=self.role, stage=stage)  # type: ignore[arg-type]
        config = read_hf_config(self.path)
        export_dir(trunk, self.cfg, config, self.path, out, role=self.role, head=head, sidecar=sidecar, overwrite=True)
        return out


def from_target(role: str, target: str, build: Build) -> Role:
    """An AV or AR that starts as the target: prompts, marker and scales are those of the store's training sets."""
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
    return Role(role, path, False, cfg if role == "av" else cfg.truncated(build.layer + 1), sidecar, tokenizer)


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
