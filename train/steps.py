"""The supervised steps: `step(state, batch, *, cfg) -> (state, metrics)`, jitted, the state donated.

`lm_step` predicts every next token of a text, `ar_step` regresses vectors on their explanations, `av_step` predicts
explanations from vectors. Batches are those of `nla_jax.loader` (and `train.lm_data`), plain or packed. Losses are
means over all that counts in the batch, also in micro-batches; metrics are device scalars.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from nla_jax.models.cache import Prefix
from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import embed, precision_of
from nla_jax.models.lora import LoRAConfig
from nla_jax.models.params import Params
from nla_jax.models.transformer import run_blocks
from nla_jax.packing import inject_packed
from nla_jax.prompt import AVPrompt
from nla_jax.reconstructor import ARParams, reconstruct
from nla_jax.train.adapted import whole
from nla_jax.train.gradients import Batch, gradients
from nla_jax.train.logprobs import token_logprobs
from nla_jax.train.objectives import mse_nrm, replace_unusable, usable
from nla_jax.train.settings import OptimizerSettings
from nla_jax.train.state import Metrics, TrainState, apply_gradients, cast, train_step
from nla_jax.verbalizer import add_norm_matched, av_prefix, inject


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What every step has: the model's shape, the update rule and the ways to save memory.

    `compute_dtype` is what parameters are cast to inside the step; `accumulate` micro-batches; `remat`: see
    `models.transformer.run_blocks`; `chunk` tokens of logits at a time; `lora`: what is trained are adapters."""

    model: ModelConfig
    optim: OptimizerSettings
    accumulate: int = 1
    compute_dtype: str = "float32"
    remat: str = "none"
    chunk: int = 1024
    lora: LoRAConfig | None = None


@dataclasses.dataclass(frozen=True)
class ARConfig(StepConfig):
    """`mse_scale`: norm of both sides before the error. Vectors of a norm outside `norms` are left out and counted."""

    mse_scale: float = 1.0
    norms: tuple[float, float] = (0.0, math.inf)


@dataclasses.dataclass(frozen=True)
class AVConfig(StepConfig):
    """`prompt` with its marker, the norm at which vectors are injected, and how ("replace" or "add_norm_matched")."""

    prompt: AVPrompt = AVPrompt((), 0)
    injection_scale: float = 1.0
    mode: str = "replace"
    norms: tuple[float, float] = (0.0, math.inf)

    @property
    def tail(self) -> int:
        """Prompt tokens from the marker on."""
        return len(self.prompt.ids) - self.prompt.marker


@train_step
def lm_step(state: TrainState, batch: Batch, *, cfg: StepConfig) -> tuple[TrainState, Metrics]:
    """One step of next-token prediction on `tokens`, `segments`, `positions` [B, T]; segment 0 is padding."""
    total = jnp.maximum(jnp.sum(_predicts(batch)), 1)

    def loss(params: Params, prefix: None, micro: Batch) -> tuple[jax.Array, Metrics]:
        params = cast(params, cfg.compute_dtype)
        logprobs = lm_logprobs(params, micro, cfg)
        return -jnp.sum(jnp.where(_predicts(micro), logprobs, 0.0)) / total, {}

    value, _, grads = gradients(loss, state.params, batch, accumulate=cfg.accumulate)
    state, metrics = apply_gradients(state, grads, cfg.optim)
    return state, {"loss": value, "tokens": total, **metrics}


def lm_logprobs(params: Params, batch: Batch, cfg: StepConfig) -> jax.Array:
    """Log-probability [B, T - 1] of each token given those before it in its segment."""
    x = embed(params, batch["tokens"][:, :-1], cfg.model)
    positions, segments = batch["positions"][:, :-1], batch["segments"][:, :-1]
    x = run_blocks(params, x, cfg.model, remat=cfg.remat, positions=positions, segments=segments)[0]
    return token_logprobs(params, x, batch["tokens"][:, 1:], cfg.model, chunk=cfg.chunk)


def _predicts(batch: Batch) -> jax.Array:
    """bool [B, T - 1]: token t + 1 belongs to the same text as token t."""
    segments = batch["segments"]
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


@train_step
def ar_step(
    state: TrainState, batch: Batch, base: Params | None = None, *, cfg: ARConfig
) -> tuple[TrainState, Metrics]:
    """One regression step of the AR: mean mse_nrm of the valid rows (an `ar_sft` batch).

    `base`: the frozen weights that adapters are trained on (train/adapted.py)."""
    state, metrics, _ = regression(state, batch, base, cfg)
    return state, metrics


def regression(
    state: TrainState, batch: Batch, base: Params | None, cfg: ARConfig
) -> tuple[TrainState, Metrics, jax.Array]:
    """What `ar_step` does, and the mse_nrm of every row under the parameters before it. RL adds `weight` [B]."""
    batch = guarded(batch, cfg.norms)
    total = jnp.maximum(jnp.sum(batch["weight"]), 1.0)

    def loss(trained: Any, prefix: None, micro: Batch) -> tuple[jax.Array, Metrics]:
        ar = cast(whole(trained, base, cfg.lora), cfg.compute_dtype)
        predicted = predict(ar, micro, cfg.model, remat=cfg.remat)
        errors = mse_nrm(predicted, micro["vectors"], cfg.mse_scale)
        return jnp.sum(errors * micro["weight"]) / total, {"errors": errors}

    value, told, grads = gradients(loss, state.params, batch, accumulate=cfg.accumulate)
    state, metrics = apply_gradients(state, grads, cfg.optim)
    return state, {"loss": value, "bad_vectors": jnp.sum(batch["bad"]), **metrics}, told["errors"]


def guarded(batch: Batch, norms: tuple[float, float]) -> Batch:
    """The batch with `weight` float32 (0 for rows that are not valid or whose vector is unusable), `bad` (which are
    unusable although valid) and vectors that are all finite."""
    valid, vectors = batch["valid"], batch["vectors"]
    good = usable(vectors, norms)
    weight = (valid & good).astype(jnp.float32) * batch.get("weight", jnp.ones(valid.shape))
    return {**batch, "vectors": replace_unusable(vectors, good), "weight": weight, "bad": valid & ~good}


def predict(ar: ARParams, batch: Batch, cfg: ModelConfig, *, remat: str = "none") -> jax.Array:
    """The AR's vectors for the batch's texts: float32 [B, D], or [B, V, D] of packed rows."""
    if "segments" not in batch:
        return reconstruct(ar, batch["tokens"], batch["lengths"], cfg, remat=remat)
    x = embed(ar.trunk, batch["tokens"], cfg)
    x = run_blocks(ar.trunk, x, cfg, positions=batch["positions"], segments=batch["segments"], remat=remat)[0]
    last = jnp.take_along_axis(x, batch["last"][:, :, None], axis=1)
    return jnp.matmul(last, ar.head, precision=precision_of(last.dtype)).astype(jnp.float32)


@train_step
def av_step(
    state: TrainState, batch: Batch, base: Params | None = None, *, cfg: AVConfig
) -> tuple[TrainState, Metrics]:
    """One step of cross-entropy on response and end-of-turn tokens (an `av_sft` batch), the mean over them.

    `base`: the frozen weights that adapters are trained on (train/adapted.py)."""
    batch = guarded(batch, cfg.norms)
    total = jnp.maximum(jnp.sum(av_mask(batch)), 1)

    def loss(trained: Any, prefix: Prefix | None, micro: Batch) -> tuple[jax.Array, Metrics]:
        params = cast(whole(trained, base, cfg.lora), cfg.compute_dtype)
        logprobs = av_logprobs(params, prefix, micro, cfg)
        return -jnp.sum(jnp.where(av_mask(micro), logprobs, 0.0)) / total, {}

    prefix = prefix_fn(cfg, base)
    value, _, grads = gradients(loss, state.params, batch, accumulate=cfg.accumulate, prefix=prefix)
    state, metrics = apply_gradients(state, grads, cfg.optim)
    return state, {"loss": value, "tokens": total, "bad_vectors": jnp.sum(batch["bad"]), **metrics}


def prefix_fn(cfg: AVConfig, base: Params | None = None) -> Any:
    """What is trained -> the keys and values of the prompt before its marker, in the compute dtype."""

    def prefix(trained: Any) -> Prefix | None:
        return av_prefix(cast(whole(trained, base, cfg.lora), cfg.compute_dtype), cfg.prompt, cfg.model)

    return prefix


def av_mask(batch: Batch) -> jax.Array:
    """bool [B, T - 1]: the tokens from the second on that count: responses of rows whose vector is usable."""
    if "segments" not in batch:
        return batch["loss_mask"][:, 1:] & (batch["weight"][:, None] > 0)
    # A sample's weight, at each of its tokens.
    samples = jnp.arange(batch["weight"].shape[1])[None, None, :] + 1
    own = jnp.any((batch["segments"][:, :, None] == samples) & (batch["weight"][:, None, :] > 0), axis=-1)
    return (batch["loss_mask"] & own)[:, 1:]


def av_logprobs(params: Params, prefix: Prefix | None, batch: Batch, cfg: AVConfig) -> jax.Array:
    """Log-probability [B, T - 1] of each token after the first, given the vectors; 0 inside the prompt.

    `params` are in the compute dtype. Logits are computed from the last prompt token on."""
    tokens, model = batch["tokens"], cfg.model
    x = embed(params, tokens[:, :-1], model)
    if "segments" in batch:
        assert cfg.mode == "replace", "norm-matched injection into packed rows"
        x = inject_packed(x, batch["vectors"], batch["markers"], injection_scale=cfg.injection_scale)
        positions, segments = batch["positions"][:, :-1], batch["segments"][:, :-1]
        x = run_blocks(params, x, model, prefix=prefix, remat=cfg.remat, positions=positions, segments=segments)[0]
        return token_logprobs(params, x, tokens[:, 1:], model, chunk=cfg.chunk)
    edit = None
    if cfg.mode == "replace":
        x = inject(x, batch["vectors"], marker=0, injection_scale=cfg.injection_scale)
    else:
        edit = add_norm_matched(batch["vectors"], marker=0)
    x = run_blocks(params, x, model, prefix=prefix, edit=edit, remat=cfg.remat)[0]
    first = cfg.tail - 1  # the prompt's last token predicts the response's first
    logprobs = token_logprobs(params, x[:, first:], tokens[:, first + 1 :], model, chunk=cfg.chunk)
    return jnp.pad(logprobs, ((0, 0), (first, 0)))
