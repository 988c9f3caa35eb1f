"""The objectives of DESIGN section 6 as pure functions: direction error, rewards, advantages, policy loss, KL.

Everything is float32: differences of log-probabilities and of nearly parallel vectors lose all their digits in
bfloat16.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# What a failed sample earns: the direction error of an orthogonal guess is 2.
ORTHOGONAL = 2.0
_LEAST_MSE = 1e-6  # below this, -log mse would reward rounding


def usable(vectors_BxD: jax.Array, norms: tuple[float, float] = (0.0, math.inf)) -> jax.Array:
    """bool [B]: finite vectors whose norm is above 0 and in `norms`; the others are left out of every loss and counted.

    A norm far from the injection scale is a sink token or a damaged file, never something to learn from."""
    norm = jnp.linalg.norm(vectors_BxD.astype(jnp.float32), axis=-1)
    return jnp.isfinite(norm) & (norm > 0) & (norm >= norms[0]) & (norm <= norms[1])


def replace_unusable(vectors_BxD: jax.Array, usable_B: jax.Array) -> jax.Array:
    """The vectors with ones where they are unusable: NaN times a weight of 0 would still be NaN."""
    return jnp.where(usable_B[..., None], vectors_BxD.astype(jnp.float32), 1.0)


def normalize(v_BxD: jax.Array, scale: float) -> jax.Array:
    """Rows at L2 norm `scale`, float32; finite in value and gradient also for a row of zeros."""
    v = v_BxD.astype(jnp.float32)
    return v * (scale * jax.lax.rsqrt(jnp.maximum(jnp.sum(v * v, axis=-1, keepdims=True), 1e-24)))


def mse_nrm(predicted_BxD: jax.Array, vectors_BxD: jax.Array, mse_scale: float) -> jax.Array:
    """Direction error [B]: mean over D of (vhat_n - v_n)^2; 2 (1 - cosine) at mse_scale = sqrt(D)."""
    difference = normalize(predicted_BxD, mse_scale) - normalize(vectors_BxD, mse_scale)
    return jnp.mean(jnp.square(difference), axis=-1)


def rewards(mse_B: jax.Array, failed_B: jax.Array, kind: str = "neg_mse") -> jax.Array:
    """Reward [B] of each sample: -mse ("neg_mse") or -log mse ("neg_log_mse"); a failed one gets an orthogonal
    guess's."""
    if kind == "neg_mse":
        return jnp.where(failed_B, -ORTHOGONAL, -mse_B)
    return jnp.where(failed_B, -math.log(ORTHOGONAL), -jnp.log(jnp.maximum(mse_B, _LEAST_MSE)))


def advantages(rewards_NxG: jax.Array, kind: str = "group_std", live_N: jax.Array | None = None) -> jax.Array:
    """Advantages [N, G] within each group of samples of one activation (GRPO).

    "group_std": (r - mean) / (std + 1e-6), with the population standard deviation; "group_mean": r - mean;
    "batch_std": r - group mean, over the batch's standard deviation of that, in which only `live_N` groups count."""
    # Relative to a group's first reward: a mean of equal numbers need not be that number, and what rounding leaves
    # would be blown up by a standard deviation that is as small.
    centred = rewards_NxG - rewards_NxG[:, :1]
    centred = centred - jnp.mean(centred, axis=1, keepdims=True)
    if kind == "group_mean":
        return centred
    if kind == "group_std":
        std = jnp.sqrt(jnp.mean(jnp.square(centred), axis=1, keepdims=True))
    else:
        live = jnp.ones(centred.shape[0]) if live_N is None else live_N.astype(jnp.float32)
        variance = jnp.sum(jnp.mean(jnp.square(centred), axis=1) * live) / jnp.maximum(jnp.sum(live), 1.0)
        std = jnp.sqrt(variance)[None, None]
    return centred / (std + 1e-6)


def policy_terms(
    logprobs_BxT: jax.Array, old_BxT: jax.Array, advantages_B: jax.Array, clip_ratio: float
) -> tuple[jax.Array, jax.Array]:
    """Per-token loss -min(rho A, clip(rho, 1 - c, 1 + c) A) and rho, both [B, T]; `old` is a constant."""
    rho = jnp.exp(logprobs_BxT - jax.lax.stop_gradient(old_BxT))
    A = advantages_B[:, None]
    return -jnp.minimum(rho * A, jnp.clip(rho, 1 - clip_ratio, 1 + clip_ratio) * A), rho


def kl_terms(logprobs_BxT: jax.Array, reference_BxT: jax.Array, kind: str = "k2") -> jax.Array:
    """Per-token estimate of KL(policy | reference) [B, T] whose gradient is useful: k2 = (logp - ref)^2 / 2, or
    k3 = exp(ref - logp) - (ref - logp) - 1. (k1 has zero expected gradient; TRAPS 10.)"""
    difference = jax.lax.stop_gradient(reference_BxT) - logprobs_BxT
    if kind == "k2":
        return jnp.square(difference) / 2
    return jnp.exp(difference) - difference - 1


def token_weights(mask_BxT: jax.Array, weight_B: jax.Array, kind: str = "sample") -> jax.Array:
    """Weights [B, T] that sum to 1 (to 0 where nothing counts) and turn per-token terms into the loss.

    "sample": the mean over a sample's tokens, then over samples, each by its `weight`; "token": over all tokens."""
    mask = mask_BxT.astype(jnp.float32) * weight_B[:, None]
    if kind == "token":
        return mask / jnp.maximum(jnp.sum(mask), 1.0)
    tokens = jnp.maximum(jnp.sum(mask_BxT.astype(jnp.float32), axis=1, keepdims=True), 1.0)
    return mask / tokens / jnp.maximum(jnp.sum(weight_B), 1.0)
