"""How far a reconstruction is from its activation: every number by its full name. Definitions: DESIGN section 5.

With v_n = v * mse_scale / |v| for both sides: `mse_nrm` is the mean over D of (vhat_n - v_n)^2 (2 (1 - cosine) at
the default scale sqrt(D)), and `fve_nrm` is 1 - sum(mse_nrm) / (n * variance_nrm), where variance_nrm is the mean
over D of (v_n - mu)^2 with mu the un-normalised mean of v_n over the *training* set. Host code in float64.
"""

from __future__ import annotations

import numpy as np


def normalize(vectors_NxD: np.ndarray, scale: float) -> np.ndarray:
    """Rows scaled to L2 norm `scale`, float64; zero rows stay zero."""
    v = np.asarray(vectors_NxD, np.float64)
    return v * (scale / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12))


def cosine(predicted_NxD: np.ndarray, vectors_NxD: np.ndarray) -> np.ndarray:
    """Cosine per row, float64 [N]."""
    return np.sum(normalize(predicted_NxD, 1.0) * normalize(vectors_NxD, 1.0), axis=-1)


def mse_nrm(predicted_NxD: np.ndarray, vectors_NxD: np.ndarray, mse_scale: float) -> np.ndarray:
    """Direction error per row, float64 [N]: 0 for the same direction, 2 for an orthogonal guess at scale sqrt(D)."""
    difference = normalize(predicted_NxD, mse_scale) - normalize(vectors_NxD, mse_scale)
    return np.mean(difference**2, axis=-1)


def variance_nrm(vectors_NxD: np.ndarray, mse_scale: float) -> float:
    """The fve_nrm denominator: mean over rows and D of (v_n - mu)^2 with mu the un-normalised mean of v_n."""
    v = normalize(vectors_NxD, mse_scale)
    return float(np.mean((v - v.mean(axis=0, keepdims=True)) ** 2))


def fve_nrm(mse_nrm_N: np.ndarray, variance: float) -> float:
    """1 - sum(mse_nrm) / sum(variance): the headline number; a ratio of sums, not a mean of ratios."""
    return 1.0 - float(np.mean(mse_nrm_N)) / variance


def calibrated_fve(predicted_NxD: np.ndarray, vectors_NxD: np.ndarray, mse_scale: float) -> float:
    """Signed squared correlation between centred predictions and centred vectors, both at norm `mse_scale`.

    What the best scaling and shift of the predictions would explain. Unlike `fve_nrm`, which punishes a confident
    wrong direction, it is 0 for predictions that belong to other vectors."""
    p, v = normalize(predicted_NxD, mse_scale), normalize(vectors_NxD, mse_scale)
    p, v = p - p.mean(axis=0, keepdims=True), v - v.mean(axis=0, keepdims=True)
    power = float(np.sum(p * p)) * float(np.sum(v * v))
    inner = float(np.sum(p * v))
    return float(np.sign(inner) * inner**2 / power) if power > 0 else 0.0


def constant_floor(variance: float) -> float:
    """fve_nrm of the best constant prediction, 1 - 2 (1 - sqrt(1 - V)) / V: it is renormalised, so not 0."""
    return 1.0 - 2.0 * (1.0 - float(np.sqrt(max(1.0 - variance, 0.0)))) / variance
