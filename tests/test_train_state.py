"""The update: schedules in closed form, AdamW in float64, Muon's share of the parameters, and the gradient guard."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_cases as cases
from step_cases import same

from nla_jax.train.optimizer import block_matrices, make_optimizer, schedule
from nla_jax.train.settings import OptimizerSettings
from nla_jax.train.state import apply_gradients, cast, create

update = jax.jit(apply_gradients, static_argnums=2)
PEAK = 3e-3


def some(seed=0, dtype=jnp.float32, scale=1.0):
    """Two parameters, or gradients of them."""
    rng = np.random.default_rng(seed)
    make = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)}
    return {name: jnp.asarray(scale * x, dtype) for name, x in make.items()}


# Schedules


def closed_form(kind, i, steps, warm, end):
    if i < warm:
        return PEAK * (i + 1) / warm
    done = min((i - warm) / max(steps - 1 - warm, 1), 1)
    if kind == "linear":
        return PEAK * (1 - done * (1 - end))
    return PEAK * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2) if kind == "cosine" else PEAK


@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
@pytest.mark.parametrize(
    ("steps", "warmup", "warm"), [(40, 0.1, 4), (40, 5.0, 5), (40, 0.0, 0), (7, 1.0, 1), (3, 9, 3)]
)
def test_schedule(kind, steps, warmup, warm):
    """At every update: the first is not lost to a learning rate of 0, the peak follows the warm-up, and the last
    update has `end` of the peak."""
    settings = OptimizerSettings(lr=PEAK, schedule=kind, end=0.1, warmup=warmup, steps=steps)
    rate = schedule(settings, PEAK)
    got = [float(rate(jnp.asarray(i))) for i in range(steps + 3)]
    np.testing.assert_allclose(got, [closed_form(kind, i, steps, warm, 0.1) for i in range(steps + 3)], rtol=1e-5)
    assert got[0] == pytest.approx(PEAK / max(warm, 1)) and max(got) == pytest.approx(PEAK)
    if warm < steps:
        assert got[warm] == pytest.approx(PEAK)
        assert got[steps - 1] == pytest.approx(PEAK if kind == "constant" else 0.1 * PEAK, rel=1e-5)


def test_the_learning_rate_told_is_the_one_used():
    """Updates of constant gradients are the learning rate itself (AdamW's direction is then 1); skipped steps do not
    move the schedule on."""
    settings = OptimizerSettings(lr=PEAK, schedule="linear", end=0.1, warmup=3, steps=8, b2=0.9, clip=0.0)
    state = create({"a": jnp.zeros(3)}, settings)
    for i in range(8):
        if i == 4:
            state, metrics = update(state, {"a": jnp.full(3, jnp.nan)}, settings)
            assert metrics["skipped"] == 1
        before = state.params["a"]
        state, metrics = update(state, {"a": jnp.ones(3)}, settings)
        assert float(metrics["lr"]) == pytest.approx(closed_form("linear", i, 8, 3, 0.1), rel=1e-5)
        np.testing.assert_allclose(before - state.params["a"], metrics["lr"], rtol=1e-3)
    assert (int(state.step), int(state.skipped)) == (8, 1)


# AdamW


def test_adamw_with_clipping_equals_numpy():
    """Five updates in float64: bias-corrected moments, eps outside the root, decoupled decay, gradients over the clip
    scaled down to it."""
    settings = OptimizerSettings(
        lr=PEAK, schedule="cosine", warmup=2, steps=5, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1, clip=2.0
    )
    state = create(some(), settings)
    w = {k: np.asarray(x, np.float64) for k, x in some().items()}
    m, v = ({k: np.zeros(x.shape) for k, x in w.items()} for _ in range(2))
    for i in range(5):
        grads = some(10 + i, scale=(0.1, 3.0, 1.0, 0.2, 5.0)[i])
        g = {k: np.asarray(x, np.float64) for k, x in grads.items()}
        norm = math.sqrt(sum((x**2).sum() for x in g.values()))
        lr = closed_form("cosine", i, 5, 2, 0.1)
        for k in w:
            x = g[k] * min(1, 2.0 / norm)
            m[k], v[k] = 0.8 * m[k] + 0.2 * x, 0.95 * v[k] + 0.05 * x**2
            direction = m[k] / (1 - 0.8 ** (i + 1)) / (np.sqrt(v[k] / (1 - 0.95 ** (i + 1))) + 1e-3)
            w[k] -= lr * (direction + 0.1 * w[k])
        state, metrics = update(state, grads, settings)
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        assert float(metrics["lr"]) == pytest.approx(lr, rel=1e-5)
    for k in w:
        np.testing.assert_allclose(state.params[k], w[k], rtol=1e-5, atol=1e-7)


# The guard

BAD = {
    "nan": lambda g: {**g, "b": g["b"].at[2].set(jnp.nan)},
    "inf": lambda g: {**g, "a": g["a"].at[0, 0].set(-jnp.inf)},
    "huge": lambda g: jax.tree.map(lambda x: 1e4 * x, g),
    "beyond float32": lambda g: jax.tree.map(lambda x: 1e25 * x, g),
}


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bad_gradients_leave_everything_as_it_was(name, dtype):
    """Parameters and moments bit for bit; counted; and the update after them is as if they had not been."""
    settings = OptimizerSettings(name=name, lr=PEAK, schedule="constant", warmup=0.0, skip_above=1e3, weight_decay=0.1)
    state, _ = update(create(some(dtype=dtype), settings), some(1, dtype), settings)
    undisturbed, _ = update(state, some(2, dtype), settings)
    for number, (_, spoil) in enumerate(BAD.items(), start=1):
        before, (state, metrics) = state, update(state, spoil(some(3)), settings)
        assert same(state.params, before.params) and same(state.opt, before.opt)
        assert (int(state.step), int(state.skipped), float(metrics["skipped"])) == (1, number, 1)
    after, metrics = update(state, some(2, dtype), settings)
    assert same(after.params, undisturbed.params) and same(after.opt, undisturbed.opt) and metrics["skipped"] == 0
    assert (int(after.step), int(after.skipped)) == (2, 4)


def test_skip_above_is_a_bound_on_the_norm_before_clipping():
    settings = OptimizerSettings(lr=PEAK, skip_above=10.0, clip=1.0, steps=5)
    unit = {"a": jnp.asarray([0.6, 0.8])}
    for size, skipped in ((9.9, 0), (10.1, 1)):
        state = create({"a": jnp.zeros(2)}, settings)
        _, metrics = update(state, jax.tree.map(lambda x, size=size: size * x, unit), settings)
        assert metrics["skipped"] == skipped and float(metrics["grad_norm"]) == pytest.approx(size)


def test_moments_of_bfloat16_parameters_are_float32():
    """A second moment of 1e-12 would be there in bfloat16, the digits of its mean would not."""
    settings = OptimizerSettings(lr=1e-2, schedule="constant", warmup=0.0, b2=0.999, clip=0.0)
    states = {dtype: create(some(dtype=dtype), settings) for dtype in ("float32", "bfloat16")}
    for i in range(4):
        states = {d: update(s, some(20 + i, scale=1e-6), settings)[0] for d, s in states.items()}
    low = states["bfloat16"]
    assert {x.dtype.name for x in jax.tree.leaves(low.params)} == {"bfloat16"}
    moments = [optax.tree_utils.tree_get(s.opt, "nu") for s in states.values()]
    assert same(*moments)
    for a, b in zip(jax.tree.leaves(low.params), jax.tree.leaves(states["float32"].params), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.02, atol=0.02)
    assert cast({"i": jnp.arange(3), "x": jnp.ones(3)}, "bfloat16")["i"].dtype == jnp.int32


def test_equal_settings_share_one_optimizer():
    a, b = (OptimizerSettings(lr=PEAK, steps=5) for _ in range(2))
    assert make_optimizer(a) is make_optimizer(b) is not make_optimizer(dataclasses.replace(a, lr=1e-3))


# Muon

MUON = OptimizerSettings(
    name="muon", lr=0.02, adam_lr=1e-3, schedule="constant", warmup=0.0, clip=0.0, b1=0.9, b2=0.95, skip_above=1e9
)
MATRICES = ("wq", "wk", "wv", "wo", "gate", "up", "down")


def model(kind):
    return cases.params("gemma3_text") if kind == "av" else cases.ar_params()


def noise_like(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), tree)


@pytest.mark.parametrize("kind", ["av", "ar"])
def test_muon_takes_the_stacked_block_matrices_alone(kind):
    """Embedding, head, norms and biases get AdamW at `adam_lr`; of a matrix, every block's update has
    singular values about the learning rate, times sqrt(out / in) where that is above 1."""
    tree = model(kind)
    chosen = block_matrices(tree)
    layers = (chosen.trunk if kind == "ar" else chosen).layers
    assert {name for name, dims in vars(layers).items() if dims is not None} == set(MATRICES)
    count = len(jax.tree.leaves(chosen, is_leaf=lambda x: hasattr(x, "reduction_axis")))
    assert count == len(MATRICES)  # nothing outside the blocks
    grads = noise_like(tree)
    after, metrics = update(create(tree, MUON), grads, MUON)
    assert metrics["skipped"] == 0 and float(metrics["lr"]) == pytest.approx(0.02)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b, np.float64), after.params, tree)
    # Nesterov's momentum looks one step ahead: g + b1 g / (1 + b1), corrected, over the root of g^2.
    by_adam = jax.tree.map(lambda g: -1e-3 * (1 + 0.9 / 1.9) * np.sign(np.asarray(g, np.float64)), grads)
    trunk, of_adam = (t.trunk if kind == "ar" else t for t in (moved, by_adam))
    for name, delta in vars(trunk.layers).items():
        if name in MATRICES:
            _, rows, cols = delta.shape
            for block in range(len(delta)):
                s = np.linalg.svd(delta[block], compute_uv=False) / 0.02 / max(cols / rows, 1) ** 0.5
                # A square matrix of noise may have one that is nearly 0, which five iterations do not lift.
                assert s.max() < 1.3 and np.mean(s > 0.5) > 0.9, (name, s)
        elif delta is not None:
            np.testing.assert_allclose(delta, getattr(of_adam.layers, name), atol=2e-6, err_msg=name)
    np.testing.assert_allclose(trunk.embed, of_adam.embed, atol=2e-6)
    if kind == "ar":
        np.testing.assert_allclose(moved.head, by_adam.head, atol=2e-6)


def test_muon_treats_each_block_by_itself():
    """A block whose gradient is a thousand times larger moves as far as the others; its neighbours do not notice."""
    tree = cases.params()
    grads = noise_like(tree)
    louder = grads.replace(layers=grads.layers.replace(gate=grads.layers.gate.at[1].multiply(1000.0)))
    first, second = (update(create(tree, MUON), g, MUON)[0].params.layers.gate for g in (grads, louder))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_muon_adam_rate_defaults_to_a_quarter():
    settings = dataclasses.replace(MUON, adam_lr=0.0)
    tree = {"a": jnp.zeros(4)}
    after, _ = update(create(tree, settings), {"a": jnp.ones(4)}, settings)
    np.testing.assert_allclose(after.params["a"], -0.005 * (1 + 0.9 / 1.9), rtol=1e-4)
