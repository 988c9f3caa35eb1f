"""Every function of train/objectives.py against float64 numpy written here: values, and slopes by central differences.

Tolerances: values 1e-5, gradients 1e-4, relative to the largest entry of the expected array.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.train import objectives

VALUE, SLOPE = 1e-5, 1e-4


def close(got, expected, tolerance):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


def slope(fn, x, step=1e-6):
    """The gradient of a float64 function of an array to a number, by central differences."""
    out = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        moved = x.copy()
        moved[i] += step
        high = fn(moved)
        moved[i] -= 2 * step
        out[i] = (high - fn(moved)) / (2 * step)
    return out


def check(jax_fn, numpy_fn, x, value=VALUE, gradient=SLOPE):
    """Values, and the gradient of a random weighting of them, of two functions of one array."""
    expected = numpy_fn(x)
    got = jax.jit(jax_fn)(x.astype(np.float32))
    assert got.dtype == jnp.float32
    close(got, expected, value)
    weights = np.random.default_rng(99).normal(size=expected.shape)
    grad = jax.jit(jax.grad(lambda y: jnp.sum(jax_fn(y) * weights.astype(np.float32))))(x.astype(np.float32))
    close(grad, slope(lambda y: float((numpy_fn(y) * weights).sum()), x), gradient)


def single(x):
    """float64 numbers that float32 holds exactly."""
    return np.asarray(x, np.float32).astype(np.float64)


# Direction error


def np_normalize(v, scale):
    return v * scale / np.sqrt((v**2).sum(axis=-1, keepdims=True))


def np_mse_nrm(predicted, vectors, scale):
    return ((np_normalize(predicted, scale) - np_normalize(vectors, scale)) ** 2).mean(axis=-1)


@pytest.mark.parametrize("scale", [math.sqrt(7), 1.0, 42.0])
def test_mse_nrm(scale):
    """Of rows of norms 1e-3 to 1e3; equal to 2 (1 - cosine) at sqrt(D)."""
    rng = np.random.default_rng(0)
    sizes = np.asarray([1e-3, 1.0, 1.0, 30.0, 1e3])[:, None]
    vectors = single(rng.normal(size=(5, 7)) * sizes[::-1])
    predicted = single(rng.normal(size=(5, 7)) * sizes)
    predicted[1] = single(-3 * vectors[1])
    predicted[2] = single(vectors[2] * 0.5 + 0.01 * rng.normal(size=7))  # nearly parallel
    expected = np_mse_nrm(predicted, vectors, scale)
    close(objectives.mse_nrm(predicted, vectors, scale), expected, VALUE)
    np.testing.assert_allclose(objectives.mse_nrm(predicted, vectors, scale)[2], expected[2], rtol=1e-3)
    for i in range(5):  # row by row: the gradient goes as one over the norm
        v = vectors[i : i + 1].astype(np.float32)
        grad = jax.grad(lambda p, v=v: objectives.mse_nrm(p, v, scale)[0])(predicted[i : i + 1].astype(np.float32))

        def fn(p, i=i):
            return float(np_mse_nrm(p, vectors[i : i + 1], scale)[0])

        want = slope(fn, predicted[i : i + 1], step=1e-6 * np.linalg.norm(predicted[i]))
        close(grad, want, SLOPE) if i != 1 else np.testing.assert_allclose(grad, 0, atol=1e-5)
    if scale == math.sqrt(7):
        lengths = np.linalg.norm(predicted, axis=1) * np.linalg.norm(vectors, axis=1)
        close(expected, 2 * (1 - (predicted * vectors).sum(axis=1) / lengths), 1e-12)


def test_mse_nrm_of_a_row_of_zeros_is_finite():
    """A prediction of zeros is no direction: the error is the mean square of the other side, 1 at sqrt(D)."""
    v = np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32)
    value, grad = jax.value_and_grad(lambda p: objectives.mse_nrm(p, v, 3.0).sum())(np.zeros((2, 9), np.float32))
    assert float(value) == pytest.approx(2.0, rel=1e-6) and np.isfinite(grad).all()
    assert np.isfinite(jax.grad(lambda u: objectives.mse_nrm(v, u, 3.0).sum())(np.zeros((2, 9), np.float32))).all()


def test_bfloat16_vectors_are_compared_in_float32():
    rng = np.random.default_rng(2)
    a, b = (jnp.asarray(rng.normal(size=(4, 64)), jnp.bfloat16) for _ in range(2))
    got = objectives.mse_nrm(a, b, 8.0)
    assert got.dtype == jnp.float32
    close(got, np_mse_nrm(np.asarray(a, np.float64), np.asarray(b, np.float64), 8.0), VALUE)


def test_usable_and_replaced_vectors():
    v = np.ones((9, 4), np.float32)
    v[1, 2], v[2, 0], v[3, 1] = np.nan, np.inf, -np.inf
    v[4], v[5], v[6], v[7] = 0, 1e30, 5, 1e-3  # 1e30: its norm is not a float32
    assert np.asarray(objectives.usable(v)).tolist() == [1, 0, 0, 0, 0, 0, 1, 1, 1]
    usable = objectives.usable(v, (0.01, 4.0))  # norms 2, 10 and 0.002
    assert np.asarray(usable).tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1]
    replaced = np.asarray(objectives.replace_unusable(v, usable))
    np.testing.assert_array_equal(replaced, np.ones((9, 4)))
    packed = np.stack([v, 2 * v])  # [B, V, D], as of packed rows
    assert objectives.usable(packed).shape == (2, 9)
    np.testing.assert_array_equal(objectives.replace_unusable(packed, objectives.usable(packed))[1, 0], [2] * 4)


def test_a_replaced_row_sends_no_nan_back():
    """What a weight of 0 alone would not do."""
    v = np.ones((3, 4), np.float32)
    v[1] = np.nan

    def loss(predicted):
        good = objectives.usable(v)
        errors = objectives.mse_nrm(predicted, objectives.replace_unusable(v, good), 2.0)
        return jnp.sum(errors * good)

    value, grad = jax.value_and_grad(loss)(np.random.default_rng(3).normal(size=(3, 4)).astype(np.float32))
    assert np.isfinite(value) and np.isfinite(grad).all() and (grad[1] == 0).all() and np.abs(grad[0]).max() > 0


# Rewards and advantages


def test_rewards():
    mse = single([0.0, 1e-9, 0.3, 1.9, 4.0, 0.5])
    failed = np.asarray([0, 0, 0, 0, 0, 1], bool)
    close(objectives.rewards(mse, failed), [0, -1e-9, -0.3, -1.9, -4, -2], VALUE)
    expected = [-math.log(1e-6), -math.log(1e-6), -math.log(0.3), -math.log(1.9), -math.log(4), -math.log(2)]
    close(objectives.rewards(mse, failed, "neg_log_mse"), expected, VALUE)


@pytest.mark.parametrize("kind", ["neg_mse", "neg_log_mse"])
def test_gradient_of_rewards(kind):
    """-1 or -1 / mse; none through a failed sample."""
    mse = single([0.3, 1.9, 0.5])
    grad = jax.grad(lambda m: objectives.rewards(m, jnp.asarray([False, False, True]), kind).sum())(jnp.asarray(mse))
    close(grad, [-1, -1, 0] if kind == "neg_mse" else [-1 / mse[0], -1 / mse[1], 0], SLOPE)


def np_advantages(r, kind):
    out = r - r.mean(axis=1, keepdims=True)
    if kind == "group_std":
        return out / (r.std(axis=1, keepdims=True) + 1e-6)
    return out / (out.std() + 1e-6) if kind == "batch_std" else out


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "batch_std"])
def test_advantages(kind):
    r = single(-np.random.default_rng(4).uniform(0.1, 2, size=(6, 5)))
    check(lambda x: objectives.advantages(x, kind), lambda x: np_advantages(x, kind), r)
    got = np.asarray(objectives.advantages(r.astype(np.float32), kind))
    np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-5)
    if kind == "group_std":
        np.testing.assert_allclose(got.std(axis=1), 1, rtol=1e-4)
        np.testing.assert_allclose(objectives.advantages(7 * r.astype(np.float32) + 3, kind), got, atol=1e-4)


@pytest.mark.parametrize("kind", ["group_std", "group_mean", "batch_std"])
@pytest.mark.parametrize("size", [2, 3, 5, 7, 8])
def test_equal_rewards_have_no_advantage(kind, size):
    """All failed, or all the same: nothing to learn, whatever rounding makes of the mean (float32, compiled)."""
    for reward in (-2.0, -math.log(2), -0.1, -1.2345678):
        r = np.full((4, size), reward, np.float32)
        got = jax.jit(objectives.advantages, static_argnums=1)(r, kind)
        np.testing.assert_array_equal(got, np.zeros((4, size)))


def test_one_group_of_equal_rewards_leaves_the_others_alone():
    r = single(-np.random.default_rng(5).uniform(0.1, 2, size=(3, 4)))
    r[1] = -2.0
    got = np.asarray(objectives.advantages(r.astype(np.float32)))
    close(got[[0, 2]], np_advantages(r[[0, 2]], "group_std"), VALUE)
    np.testing.assert_array_equal(got[1], 0)


def test_groups_that_do_not_count_leave_the_batchs_deviation_alone():
    r = single(-np.random.default_rng(6).uniform(0.1, 2, size=(4, 3)))
    r[2] = [0.0, -50.0, 90.0]
    live = np.asarray([True, True, False, True])
    got = np.asarray(objectives.advantages(r.astype(np.float32), "batch_std", jnp.asarray(live)))
    close(got[live], np_advantages(r[live], "batch_std"), VALUE)
    assert np.isfinite(objectives.advantages(r.astype(np.float32), "batch_std", jnp.zeros(4, bool))).all()


# Policy loss and KL

OLD = single(np.random.default_rng(7).uniform(-4, -0.5, size=(6, 5)))
# On both sides of, and inside, the clip range 0.8 .. 1.2, in every row.
SHIFT = np.asarray([math.log(0.5), math.log(0.9), 0.01, math.log(1.1), math.log(1.7)])
ADVANTAGES = single([1.3, -0.7, 0.0, 2.0, -1.1, 0.4])


def np_policy(logprobs, clip):
    rho = np.exp(logprobs - OLD)
    a = ADVANTAGES[:, None]
    return -np.minimum(rho * a, np.clip(rho, 1 - clip, 1 + clip) * a)


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_policy_terms(clip):
    logprobs = single(OLD + SHIFT)
    old, a = OLD.astype(np.float32), ADVANTAGES.astype(np.float32)
    check(lambda x: objectives.policy_terms(x, old, a, clip)[0], lambda x: np_policy(x, clip), logprobs)
    terms, rho = objectives.policy_terms(logprobs.astype(np.float32), old, a, clip)
    close(rho, np.exp(logprobs - OLD), VALUE)
    grad = jax.grad(lambda x: objectives.policy_terms(x, old, a, clip)[0].sum())(logprobs.astype(np.float32))
    # Clipped where going on would overshoot: too likely with A > 0, too unlikely with A < 0. Never the other way.
    assert grad[0, 4] == 0 and grad[0, 0] != 0 and grad[1, 0] == 0 and grad[1, 4] != 0
    assert (grad[2] == 0).all() and (terms[2] == 0).all()
    of_old = jax.grad(lambda o: objectives.policy_terms(logprobs.astype(np.float32), o, a, clip)[0].sum())(old)
    np.testing.assert_array_equal(of_old, 0)


def test_on_policy_gradient_is_the_score_times_the_advantage():
    """rho is 1, where the clipped and the plain term tie: -A, whole, not a part of it; also against itself."""
    x, a = OLD.astype(np.float32), ADVANTAGES.astype(np.float32)
    for old in (lambda y: x, lambda y: y):
        grad = jax.grad(lambda y, old=old: objectives.policy_terms(y, old(y), a, 0.2)[0].sum())(x)
        np.testing.assert_array_equal(grad, np.broadcast_to(-a[:, None], x.shape))


def np_kl(logprobs, reference, kind):
    d = reference - logprobs
    return d**2 / 2 if kind == "k2" else np.exp(d) - d - 1


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_terms(kind):
    rng = np.random.default_rng(8)
    reference = OLD
    logprobs = single(reference + rng.normal(size=OLD.shape))
    logprobs[0] = reference[0]
    check(
        lambda x: objectives.kl_terms(x, reference.astype(np.float32), kind),
        lambda x: np_kl(x, reference, kind),
        logprobs,
    )
    x = logprobs.astype(np.float32)
    terms = objectives.kl_terms(x, reference.astype(np.float32), kind)
    assert (np.asarray(terms) >= 0).all() and (terms[0] == 0).all()
    of_reference = jax.grad(lambda r: objectives.kl_terms(x, r, kind).sum())(reference.astype(np.float32))
    np.testing.assert_array_equal(of_reference, 0)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_gradient_points_to_the_reference_on_average(kind):
    """Over all tokens of a distribution: k2's expected gradient on-policy is the KL's own; k3's has its sign.

    (k1's is zero: TRAPS 10.)"""
    rng = np.random.default_rng(9)
    logits, other = rng.normal(size=(2, 11))
    p = np.exp(logits) / np.exp(logits).sum()
    log_q = other - np.log(np.exp(other).sum())

    def sampled(x):
        logp = jax.nn.log_softmax(x)
        return jnp.sum(p.astype(np.float32) * objectives.kl_terms(logp, log_q.astype(np.float32), kind))

    def kl(x):
        x = x - np.log(np.exp(x).sum())
        return float((np.exp(x) * (x - log_q)).sum())

    grad, exact = np.asarray(jax.grad(sampled)(logits.astype(np.float32)), np.float64), slope(kl, logits)
    if kind == "k2":
        close(grad, exact, SLOPE)
    else:
        assert grad @ exact > 0


# Aggregation


def np_weights(mask, weight, kind):
    out = np.zeros(mask.shape)
    if kind == "token":
        n = sum(int(m.sum()) for m, w in zip(mask, weight, strict=True) if w)
        for b in range(len(mask)):
            out[b] = mask[b] * weight[b] / max(n, 1)
        return out
    for b in range(len(mask)):
        if mask[b].any():
            out[b] = mask[b] / mask[b].sum() * weight[b] / max(weight.sum(), 1)
    return out


@pytest.mark.parametrize("kind", ["sample", "token"])
def test_token_weights(kind):
    lengths = np.asarray([1, 4, 6, 3, 0])
    mask = np.arange(6)[None] < lengths[:, None]
    for weight in ([1.0, 1, 0, 1, 0], [1.0, 1, 1, 1, 0], [0.0] * 5):
        w = np.asarray(weight, np.float32)
        got = np.asarray(objectives.token_weights(jnp.asarray(mask), jnp.asarray(w), kind))
        np.testing.assert_allclose(got, np_weights(mask, w.astype(np.float64), kind), rtol=1e-6, atol=0)
        assert got.sum() == pytest.approx(1.0 if w.any() else 0.0, rel=1e-6) and not got[~mask].any()
    if kind == "sample":
        per_sample = objectives.token_weights(jnp.asarray(mask[:4]), jnp.ones(4), kind).sum(axis=1)
        np.testing.assert_allclose(per_sample, 0.25, rtol=1e-6)  # a long explanation counts as much as a short one
