"""Warm start: the AR and the AV, each trained on (activation, teacher's explanation) pairs of a store."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.build import Build, open_build
from nla_jax.errors import InputError
from nla_jax.evals.controls import other_documents
from nla_jax.loader import Loader, make_loader
from nla_jax.models.sharding import on_its_mesh, replicated
from nla_jax.store import Store
from nla_jax.train import evaluate, roles
from nla_jax.train.adapted import whole
from nla_jax.train.evaluate import HeldOut
from nla_jax.train.fields import plain
from nla_jax.train.layout import make_layout
from nla_jax.train.settings import OptimizerSettings, RLSettings, SFTSettings
from nla_jax.train.state import Metrics, TrainState, cast, create
from nla_jax.train.steps import (
    ARConfig,
    AVConfig,
    StepConfig,
    ar_step,
    av_logprobs,
    av_mask,
    av_step,
    guarded,
    prefix_fn,
)
from nla_jax.train.texts import ar_prompts, ar_width, make_reader
from nla_jax.transforms import apply


def step_config(settings: SFTSettings | RLSettings, role: roles.Role, build: Build, optim: OptimizerSettings) -> Any:
    """`ARConfig` or `AVConfig` of a role."""
    # The injection scale is itself a typical norm.
    norms = build.injection_scale / settings.max_norm_ratio, build.injection_scale * settings.max_norm_ratio
    common: dict[str, Any] = {
        "model": role.cfg,
        "optim": optim,
        "accumulate": settings.accumulate,
        "compute_dtype": settings.compute_dtype,
        "remat": settings.remat,
        "chunk": settings.logit_chunk,
        "norms": norms,
        "lora": role.lora,
    }
    if role.role == "ar":
        return ARConfig(**common, mse_scale=role.mse_scale)
    scale = role.sidecar.need_injection_scale(role.path)
    return AVConfig(**common, prompt=role.prompt, injection_scale=scale, mode=role.sidecar.injection_mode)


class SFTTask:
    """The stages "ar" and "av" (see `train.loop.Task`)."""

    def __init__(self, settings: SFTSettings):
        if settings.transforms and settings.pack:
            raise InputError("transforms", expected="none where pack is set", got=settings.transforms, fix="pack=False")
        self.name = settings.stage
        self.layout = make_layout(settings.mesh)
        self.layout.spread(settings.batch_size, settings.accumulate, f"config.{self.name}.batch_size")
        self.build = open_build(settings.store)
        self.role = self._role(settings)
        self._loader = make_loader(
            self.build.store,
            self.build.rows(f"{self.name}_sft"),
            kind=f"{self.name}_sft",
            batch_size=settings.batch_size,
            share=self.layout.rows(settings.batch_size),
            tokenizer=self.role.tokenizer,
            sidecar=self.role.sidecar,
            seed=settings.seed,
            buckets=settings.buckets,
            pack=settings.pack,
        )
        if settings.epochs is not None:
            whole = settings.epochs * self._loader.batches_per_epoch
            settings = settings.with_steps(min(settings.steps, whole) if settings.steps else whole)
        self.settings = settings
        self.cfg: StepConfig = step_config(settings, self.role, self.build, settings.optim)
        self.best = ("eval/fve_nrm_teacher", "max") if self.name == "ar" else ("eval/loss", "min")
        self.held = self._held_out(settings)
        self._base: Any = None  # with LoRA: the target's frozen weights

    def _role(self, settings: SFTSettings) -> roles.Role:
        lora = settings.lora.config
        if settings.init is None:
            return roles.from_target(self.name, settings.target, self.build, lora)
        role = roles.from_checkpoint(self.name, settings.init, self.build)
        return role if lora is None else role.on_base(settings.target, lora)

    def _held_out(self, settings: SFTSettings) -> HeldOut | None:
        if not settings.eval_rows:
            return None
        return evaluate.held_out(self.build, settings.eval_store, settings.eval_rows, explained=True)

    def init(self) -> TrainState:
        s = self.settings
        if s.lora.rank:
            self._base = self.role.base(s.compute_dtype, self.layout, int8=s.lora.int8)
        return create(self.role.load(s.param_dtype, self.layout, seed=s.seed), s.optim)

    def _whole(self, state: TrainState) -> Any:
        return whole(state.params, self._base, self.role.lora)

    def loader(self) -> Loader:
        return self._loader

    def step(self, state: TrainState, batch: dict[str, np.ndarray], number: int) -> tuple[TrainState, Metrics]:
        if self.settings.transforms:
            batch = self._transformed(batch, number)
        given = {k: v for k, v in batch.items() if k not in ("row", "doc")}
        on_device = self.layout.put(given, self.settings.batch_size)
        if self.name == "ar":
            state, metrics = ar_step(state, on_device, self._base, cfg=self.cfg)
            return state, {**metrics, "fve_nrm": 1.0 - metrics["loss"] / self.build.variance_nrm}
        return av_step(state, on_device, self._base, cfg=self.cfg)

    def _transformed(self, batch: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
        """The AR's texts changed anew at every step; the others of the batch as they are."""
        texts = self.build.store.explanations(np.maximum(batch["row"], 0))
        rows = self.layout.rows(self.settings.batch_size)
        draws = (np.random.default_rng([self.settings.seed, number, int(i)]) for i in rows)
        changed = [apply(text or "", self.settings.transforms, rng) for text, rng in zip(texts, draws, strict=True)]
        width = batch["tokens"].shape[1]  # the bucket's, so that no other shapes are compiled
        tokens, lengths = ar_prompts(changed, self.role.tokenizer, self.role.sidecar, width)
        return {**batch, "tokens": tokens, "lengths": lengths}

    def evaluate(self, state: TrainState, number: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        if self.held is None:
            return {}, []
        return self._evaluate_ar(state, self.held) if self.name == "ar" else (self._evaluate_av(state, self.held), [])

    def _evaluate_ar(self, state: TrainState, held: HeldOut) -> tuple[dict[str, float], list[dict[str, Any]]]:
        role, size = self.role, min(self.settings.micro_batch, len(held))
        width = ar_width(role.tokenizer, role.sidecar, 1)
        read = make_reader(
            self._whole(state),
            role.cfg,
            role.tokenizer,
            role.sidecar,
            batch_size=size,
            width=width,
            compute_dtype=self.settings.compute_dtype,
            layout=self.layout,
        )
        texts = [text or "" for text in held.teacher]
        none = np.zeros(len(texts), bool)
        scores, errors = evaluate.text_scores(
            texts, none, held, read, role.mse_scale, self.build.variance_nrm, "teacher"
        )
        return scores, evaluate.sample_rows(held, texts, none, errors, 16)

    def _evaluate_av(self, state: TrainState, held: HeldOut) -> dict[str, float]:
        """Cross-entropy of held-out teacher texts given their own vectors, and given those of other documents."""
        settings = self.settings
        other = other_documents(held.docs)
        sums = np.zeros(3)
        batches = make_loader(
            self.build.store if settings.eval_store is None else Store.open(settings.eval_store),
            held.rows,
            kind="av_sft",
            batch_size=min(settings.micro_batch, -(-len(held) // self.layout.shards) * self.layout.shards),
            tokenizer=self.role.tokenizer,
            sidecar=self.role.sidecar,
            buckets=settings.buckets,
            epochs=1,
        )
        params = self._whole(state)
        prefix = on_its_mesh(jax.jit(prefix_fn(self.cfg)))(params)  # type: ignore[arg-type]
        for batch in batches:
            at = np.searchsorted(held.rows, np.maximum(batch["row"], held.rows[0]))
            swapped = held.vectors[other[at]]
            batch = {k: v for k, v in batch.items() if k not in ("row", "doc")}
            batch, swapped = self.layout.put_whole((batch, swapped))
            sums += np.asarray(_av_losses(params, prefix, batch, swapped, cfg=self.cfg))
        loss, shuffled = sums[0] / sums[2], sums[1] / sums[2]
        if (held.docs[other] == held.docs).any():  # too few documents for a control
            return {"eval/loss": loss}
        return {"eval/loss": loss, "eval/loss_shuffled": shuffled, "eval/loss_gain": shuffled - loss}

    def export(self, state: TrainState, directory: Path) -> list[Path]:
        return [self.role.export(state.params, directory, base=self._base, stage=f"{self.name}_sft")]

    def describe(self) -> dict[str, Any]:
        return {
            "settings": self.settings.to_dict(),
            "store": self.build.store.manifest["hash"],
            "from": str(self.role.path),
            "layer_index": self.build.layer,
            "variance_nrm": self.build.variance_nrm,
            "mse_floor": 2 * (1 - math.sqrt(max(0.0, 1 - self.build.variance_nrm))),
            "adapters": plain(self.role.lora),
            "data": dataclasses.asdict(self.role.prompt) if self.name == "av" else None,
        }


@jax.jit
def _sum_where(mask: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, x, 0.0))


def _losses(params: Any, prefix: Any, batch: Any, swapped: jax.Array, cfg: AVConfig) -> jax.Array:
    params = cast(params, cfg.compute_dtype)
    batch = guarded(batch, cfg.norms)
    mask = av_mask(batch)
    own, other = (
        -_sum_where(mask, av_logprobs(params, prefix, b, cfg)) for b in (batch, {**batch, "vectors": swapped})
    )
    return replicated(jnp.stack([own, other, jnp.sum(mask).astype(jnp.float32)]))


_av_losses = on_its_mesh(jax.jit(_losses, static_argnames=("cfg",)))
