"""Joint RL (DESIGN section 6): rollout, reward, one GRPO step of the AV and one regression step of the AR.

One optimizer step per rollout. The sampler and the training forward pass are the same functions over the same
parameters, so the probability ratio is 1 up to rounding; `ratio_error` reports how far from 1 it is.

    samples = rollout(av, vectors, keys)          device: prefix once, one prefill per vector, G samples share it
    reference = reference_logprobs(...)           device, while the host decodes and parses the samples' text
    ar, told = regression_step(ar, ...)           device; told["errors"] are of the AR before this update
    judged = judge(told["errors"], ...)           device: rewards, advantages
    av, _ = policy_step(av, ...)                  device; no gradient crosses the text, in either direction

What rewards a sample and what the AR learns from it is one forward pass of the AR. An AR that is not trained has
`read_errors` instead.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from nla_jax.models.cache import Prefix
from nla_jax.models.params import Params, param_specs
from nla_jax.models.sampler import Samples, row_keys
from nla_jax.models.sharding import (
    DECODE,
    constrain,
    constrain_rows,
    lay_out,
    lay_out_by_layer,
    mesh_of,
    on_its_mesh,
    replicated,
    under,
)
from nla_jax.reconstructor import ARParams, reconstruct
from nla_jax.train.adapted import trained_specs, whole
from nla_jax.train.gradients import Batch, gradients, in_micro_batches
from nla_jax.train.objectives import (
    advantages,
    kl_terms,
    mse_nrm,
    policy_terms,
    replace_unusable,
    rewards,
    token_weights,
    usable,
)
from nla_jax.train.settings import RLSettings
from nla_jax.train.state import Metrics, TrainState, apply_gradients, cast, train_step
from nla_jax.train.steps import ARConfig, AVConfig, av_logprobs, av_mask, guarded, prefix_fn, regression
from nla_jax.verbalizer import sample_explanations


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """The two models' step configurations and the objective's choices (see `train.settings.RLSettings`).

    `on_policy_ratio`: the old log-probabilities are the policy's own ("self", rho is exactly 1) or those recorded
    while sampling ("sampled"). `replay_av` weighs the cross-entropy of teacher pairs that is added to the AV's loss.
    The rollout draws for `rollout_parts` of the vectors one after another.
    """

    av: AVConfig
    ar: ARConfig
    stop_ids: tuple[int, ...]
    samples: int = 8
    max_new_tokens: int = 150
    reward: str = "neg_mse"
    advantage: str = "group_std"
    aggregate: str = "sample"
    clip_ratio: float = 0.2
    kl_coef: float = 0.01
    kl: str = "k2"
    on_policy_ratio: str = "self"
    replay_av: float = 0.0
    rollout_parts: int = 1

    @classmethod
    def of(cls, settings: RLSettings, av: AVConfig, ar: ARConfig, stop_ids: tuple[int, ...]) -> RLConfig:
        """What a stage's settings say of its steps: the fields that both have by the same name."""
        own = {field.name for field in dataclasses.fields(cls)} - {"av", "ar", "stop_ids"}
        return cls(av=av, ar=ar, stop_ids=stop_ids, **{name: getattr(settings, name) for name in own})


def frozen(trained: Any, base: Params | None = None, *, cfg: AVConfig) -> tuple[Params, Prefix | None]:
    """An AV that is only read, as the KL reference: in the compute dtype, with its prompt's keys and values.

    `trained` and `base` as everywhere here: train/adapted.py. The base is shared, not copied."""
    own, prefix = freeze(trained, base, cfg=cfg)
    return whole(own, base, cfg.lora), prefix


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg",))
def freeze(trained: Any, base: Params | None = None, *, cfg: AVConfig) -> tuple[Any, Prefix | None]:
    """What `frozen` computes: a copy of what is trained, and the prefix."""
    specs = trained_specs("av", cfg.model, cfg.lora)
    return lay_out(cast(trained, cfg.compute_dtype), specs, cfg.model), prefix_fn(cfg, base)(trained)


def decode_layout(trained: Any, base: Params | None = None, *, cfg: AVConfig) -> tuple[Params, Prefix | None]:
    """The AV as the sampler wants it, once per update: in the compute dtype, with its prompt's keys and values, and
    gathered over "fsdp", which would otherwise be done for every token."""
    own, gathered, prefix = lay_out_to_decode(trained, base, cfg=cfg)
    return whole(own, base if gathered is None else gathered, cfg.lora), prefix


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg",))
def lay_out_to_decode(
    trained: Any, base: Params | None = None, *, cfg: AVConfig
) -> tuple[Any, Params | None, Prefix | None]:
    """What `decode_layout` computes: what is trained and the base, None where it lies as the sampler wants it."""

    def gathered(tree: Any, specs: Any) -> Any:
        # Cast where they lie, so that what is gathered is the compute dtype.
        narrow = lay_out(cast(tree, cfg.compute_dtype), specs, cfg.model)
        return lay_out_by_layer(narrow, specs, cfg.model, DECODE)

    prefix = prefix_fn(cfg, base)(trained)
    apart = base is not None and jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1
    shared = gathered(base, param_specs(cfg.model)) if apart else None
    return gathered(trained, trained_specs("av", cfg.model, cfg.lora)), shared, prefix


@functools.partial(jax.jit, static_argnames=("rows", "samples"))
def step_keys(seed: jax.Array, step: jax.Array, *, rows: int, samples: int) -> jax.Array:
    """Keys [rows * samples] of one step's samples: they depend on (seed, step, row in the batch, sample) alone."""
    seed = jax.random.bits(jax.random.fold_in(jax.random.key(seed), step), dtype=jnp.uint32)
    return constrain(row_keys(seed, jnp.arange(rows, dtype=jnp.uint32), samples), "rows")


def rollout(
    trained: Any,
    vectors_NxD: jax.Array,
    keys: jax.Array,
    base: Params | None = None,
    *,
    cfg: RLConfig,
    temperature: float = 1.0,
) -> Samples:
    """G explanations of each vector, at temperature 1 without top-p or top-k; row n * G + g is sample g of vector n.

    Nothing waits for the device. Unusable vectors are replaced, so that they cannot spoil the batch."""
    with under(mesh_of(trained)):
        av, prefix = decode_layout(trained, base, cfg=cfg.av)
        return sample(av, prefix, vectors_NxD, keys, temperature, cfg=cfg)


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg",))
def sample(
    av: Params,
    prefix: Prefix | None,
    vectors_NxD: jax.Array,
    keys: jax.Array,
    temperature: jax.Array | float = 1.0,
    *,
    cfg: RLConfig,
) -> Samples:
    """What `rollout` computes of an AV in `decode_layout`. In parts, because the cache of all samples may be more than
    a chip has left beside the weights; each part reads these once per token."""
    N = vectors_NxD.shape[0]
    G = keys.shape[0] // N

    def draw(vectors: jax.Array, keys: jax.Array) -> Samples:
        return sample_explanations(
            av,
            prefix,
            vectors,
            keys,
            prompt=cfg.av.prompt,
            cfg=cfg.av.model,
            injection_scale=cfg.av.injection_scale,
            mode=cfg.av.mode,
            samples=G,
            temperature=temperature,
            max_new_tokens=cfg.max_new_tokens,
            stop_ids=cfg.stop_ids,
        )

    def of_vectors(rows: Batch) -> Samples:
        return jax.tree.map(lambda x: x.reshape(-1, G, *x.shape[1:]), draw(rows["vectors"], rows["keys"].reshape(-1)))

    vectors = replace_unusable(vectors_NxD, usable(vectors_NxD, cfg.av.norms))
    if cfg.rollout_parts == 1:
        return draw(vectors, keys)
    found = in_micro_batches(of_vectors, {"vectors": vectors, "keys": keys.reshape(N, G)}, cfg.rollout_parts)
    return constrain_rows(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found))


@struct.dataclass
class Judged:
    """What the AR says of N x G samples: `errors` mse_nrm, `rewards`, `advantages`, `weight` (0 where the vector is
    unusable), all float32 [N * G], and metrics."""

    errors: jax.Array
    rewards: jax.Array
    advantages: jax.Array
    weight: jax.Array
    metrics: Metrics


@train_step
def regression_step(
    state: TrainState, batch: Batch, base: Params | None = None, *, cfg: ARConfig
) -> tuple[TrainState, Metrics]:
    """`ar_step` of a `regression_batch`. Metrics have `errors` too: mse_nrm of every row before the update."""
    state, metrics, errors = regression(state, batch, base, cfg)
    return state, {**metrics, "errors": errors}


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg",))
def read_errors(ar: ARParams, batch: Batch, *, cfg: RLConfig) -> jax.Array:
    """mse_nrm [N * G] of samples, of an AR that is not trained. `batch`: `tokens` and `lengths` of the AR prompts
    [N * G, T], `vectors` [N, D]."""
    vectors = _per_sample(batch["vectors"], cfg.ar.norms, cfg.samples)
    ar = cast(ar, cfg.ar.compute_dtype)

    def read(rows: Batch) -> jax.Array:
        return reconstruct(ar, rows["tokens"], rows["lengths"], cfg.ar.model)

    texts = {name: batch[name] for name in ("tokens", "lengths")}
    return mse_nrm(in_micro_batches(read, texts, cfg.ar.accumulate), vectors, cfg.ar.mse_scale)


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg",))
def judge(errors: jax.Array, batch: Batch, penalty_B: jax.Array, *, cfg: RLConfig) -> Judged:
    """Rewards and advantages of samples, from their `errors` (the first N * G). `batch`: `vectors` [N, D], `valid` [N],
    `failed` [N * G]; `penalty_B` is subtracted from each reward."""
    G = cfg.samples
    good = usable(batch["vectors"], cfg.ar.norms)
    used = good & batch["valid"]
    weight = jnp.repeat(used.astype(jnp.float32), G)
    errors = errors[: len(weight)]
    # An AR that has broken down (NaN) must not pass its state on through the rewards.
    failed = batch["failed"] | ~jnp.isfinite(errors)
    errors = jnp.where(failed, 2.0, errors)
    reward = rewards(errors, failed, cfg.reward) - penalty_B
    grouped = reward.reshape(-1, G)
    live = jnp.maximum(jnp.sum(weight), 1.0)
    metrics = {
        "reward": jnp.sum(reward * weight) / live,
        "mse_nrm": jnp.sum(errors * weight) / live,
        "reward_std_in_group": jnp.sum(jnp.std(grouped, axis=1) * used) / jnp.maximum(jnp.sum(used), 1),
        "parse_failures": jnp.sum(batch["failed"] * weight),
        "failed_share": jnp.sum(batch["failed"] * weight) / live,
        "bad_vectors": jnp.sum(batch["valid"] & ~good),
    }
    found = advantages(grouped, cfg.advantage, used).reshape(-1)
    errors, reward, found, weight = constrain_rows((errors, reward, found, weight))
    return Judged(errors, reward, found, weight, replicated(metrics))


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg",))
def reference_logprobs(
    params: Params, prefix: Prefix | None, samples: Samples, vectors_NxD: jax.Array, *, cfg: RLConfig
) -> jax.Array:
    """Log-probabilities [B, R] of sampled tokens under the frozen AV, `params` and `prefix` in the compute dtype."""
    G = samples.tokens.shape[0] // vectors_NxD.shape[0]
    vectors = jnp.repeat(replace_unusable(vectors_NxD, usable(vectors_NxD, cfg.av.norms)), G, axis=0)

    def read(rows: Batch) -> jax.Array:
        return av_logprobs(params, prefix, rows, cfg.av)[:, cfg.av.tail - 1 :]

    batch = {"tokens": _with_tail(samples.tokens, cfg.av), "vectors": vectors}
    return constrain_rows(in_micro_batches(read, batch, cfg.av.accumulate))


def _with_tail(tokens_BxR: jax.Array, cfg: AVConfig) -> jax.Array:
    """The prompt from its marker on, before each sample."""
    tail = jnp.asarray(cfg.prompt.ids[cfg.prompt.marker :], jnp.int32)
    return jnp.concatenate([jnp.broadcast_to(tail, (tokens_BxR.shape[0], cfg.tail)), tokens_BxR], axis=1)


def policy_batch(
    samples: Samples, vectors_NxD: jax.Array, judged: Judged, reference_BxR: jax.Array, norms: tuple[float, float]
) -> Batch:
    """What `policy_step` takes, one row per sample."""
    G = samples.tokens.shape[0] // vectors_NxD.shape[0]
    return {
        "tokens": samples.tokens,
        "lengths": samples.lengths,
        "sampled": samples.logprobs,
        "reference": reference_BxR,
        "advantages": judged.advantages,
        "weight": judged.weight,
        "vectors": _per_sample(vectors_NxD, norms, G),
    }


@functools.partial(jax.jit, static_argnames=("samples", "multiple"))
def regression_batch(batch: Batch, teacher: Batch | None, *, samples: int, multiple: int = 1) -> Batch:
    """The AR's batch: the rollout's successful samples, and teacher pairs (an `ar_sft` batch) where they are replayed.

    Rows that are not valid fill it up to a `multiple`, so that it can be split over devices."""
    rows = {
        "tokens": batch["tokens"],
        "lengths": batch["lengths"],
        "vectors": jnp.repeat(batch["vectors"], samples, axis=0),
        "valid": jnp.repeat(batch["valid"], samples),
        "weight": 1.0 - batch["failed"].astype(jnp.float32),
    }
    if teacher is not None:
        teacher = {**teacher, "weight": jnp.ones(teacher["valid"].shape)}
        width = max(rows["tokens"].shape[1], teacher["tokens"].shape[1])
        for part in (rows, teacher):
            part["tokens"] = jnp.pad(part["tokens"], ((0, 0), (0, width - part["tokens"].shape[1])))
        rows = {name: jnp.concatenate([rows[name], teacher[name]]) for name in rows}
    missing = -len(rows["valid"]) % multiple
    if missing:
        rows = {name: jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))) for name, x in rows.items()}
        rows["lengths"] = jnp.maximum(rows["lengths"], 1)
    return constrain_rows(rows)


@on_its_mesh
@functools.partial(jax.jit, static_argnums=(1, 2))
def _per_sample(vectors: jax.Array, norms: tuple[float, float], samples: int) -> jax.Array:
    return constrain_rows(jnp.repeat(replace_unusable(vectors, usable(vectors, norms)), samples, axis=0))


@train_step
def policy_step(
    state: TrainState, batch: Batch, replay: Batch | None = None, base: Params | None = None, *, cfg: RLConfig
) -> tuple[TrainState, Metrics]:
    """One GRPO step of the AV on a `policy_batch`. `replay`: an `av_sft` batch whose cross-entropy, times
    `cfg.replay_av`, is added; `base`: the frozen weights that adapters are trained on.

    Metrics: loss, kl (estimate per token, against the frozen AV), clipped (share of tokens past the clip),
    ratio_error (mean |rho - 1| against the sampling log-probabilities), length (tokens per sample), entropy
    (minus the mean log-probability of the sampled tokens)."""
    live = jnp.arange(batch["tokens"].shape[1])[None, :] < batch["lengths"][:, None]
    batch = {**batch, "token_weight": token_weights(live, batch["weight"], cfg.aggregate), "live": live}
    rows = batch["weight"] > 0
    counted = jnp.maximum(jnp.sum(live & rows[:, None]), 1)
    scored = None
    if replay is not None:
        batch["replay"] = guarded(replay, cfg.av.norms)
        scored = jnp.maximum(jnp.sum(av_mask(batch["replay"])), 1)

    def loss(trained: Any, prefix: Prefix | None, micro: Batch) -> tuple[jax.Array, Metrics]:
        params = cast(whole(trained, base, cfg.av.lora), cfg.av.compute_dtype)
        rows = {"tokens": _with_tail(micro["tokens"], cfg.av), "vectors": micro["vectors"]}
        logprobs = av_logprobs(params, prefix, rows, cfg.av)[:, cfg.av.tail - 1 :]
        old = logprobs if cfg.on_policy_ratio == "self" else micro["sampled"]
        terms, _ = policy_terms(logprobs, old, micro["advantages"], cfg.clip_ratio)
        kl = kl_terms(logprobs, micro["reference"], cfg.kl)
        seen = micro["live"] & (micro["weight"] > 0)[:, None]
        # `where`, not a product alone: tokens after the end are not samples and may have any log-probability.
        value = jnp.sum(jnp.where(seen, (terms + cfg.kl_coef * kl) * micro["token_weight"], 0.0))
        if scored is not None:
            sft = av_logprobs(params, prefix, micro["replay"], cfg.av)
            value -= cfg.replay_av * jnp.sum(jnp.where(av_mask(micro["replay"]), sft, 0.0)) / scored
        rho = jnp.exp(jax.lax.stop_gradient(logprobs) - micro["sampled"])
        sums = {
            "kl": jnp.sum(jnp.where(seen, kl, 0.0)) / counted,
            "entropy": -jnp.sum(jnp.where(seen, logprobs, 0.0)) / counted,
            "clipped": jnp.sum(seen & (jnp.abs(rho - 1) > cfg.clip_ratio)) / counted,
            "ratio_error": jnp.sum(jnp.where(seen, jnp.abs(rho - 1), 0.0)) / counted,
        }
        return value, sums

    prefix = prefix_fn(cfg.av, base)
    value, sums, grads = gradients(loss, state.params, batch, accumulate=cfg.av.accumulate, prefix=prefix)
    state, metrics = apply_gradients(state, grads, cfg.av.optim)
    length = jnp.sum(batch["lengths"] * rows) / jnp.maximum(jnp.sum(rows), 1)
    return state, {"loss": value, "length": length, **sums, **metrics}
