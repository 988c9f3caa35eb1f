"""Poisoned rows in the training steps: left out, counted, and everything else as if they were not there.

Where a step is said to be the same, it is bit for bit: the same program ran on the rows that count.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_cases as cases
from step_cases import gradient, same

from nla_jax.train.rl import (
    decode_layout,
    judge,
    policy_batch,
    policy_step,
    read_errors,
    reference_logprobs,
    rollout,
    step_keys,
)
from nla_jax.train.steps import ar_step, av_step, lm_step

POISON = {
    "nan": lambda v: np.where(np.arange(len(v)) == 3, np.nan, v),
    "all nan": lambda v: v * np.nan,
    "inf": lambda v: np.where(np.arange(len(v)) == 0, -np.inf, v),
    "zero": lambda v: 0 * v,
    "1e9 times": lambda v: 1e9 * v,
    "1e-9 times": lambda v: 1e-9 * v,
    "beyond float32": lambda v: 1e37 * v,
}
N, G = 4, 4


def finite(tree):
    return all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(tree))


def run(kind, batch):
    step, cfg, params = {
        "ar": (ar_step, cases.ar_config(), cases.ar_params()),
        "av": (av_step, cases.av_config(), cases.params()),
    }[kind]
    return step(cases.state(params), batch, cfg=cfg)


def usual(kind):
    return cases.ar_batch() if kind == "ar" else cases.av_batch()


@pytest.mark.parametrize("kind", ["ar", "av"])
def test_unusable_vectors_are_left_out_and_counted(kind):
    """The step is that of a batch in which those rows are not valid."""
    clean = usual(kind)
    without = dict(clean, valid=clean["valid"] & (np.arange(cases.ROWS) != 2))
    if kind == "av":
        without["loss_mask"] = clean["loss_mask"] & without["valid"][:, None]
    expected, told = run(kind, without)
    assert told["bad_vectors"] == 0
    for name, spoil in POISON.items():
        batch = dict(clean, vectors=clean["vectors"].copy())
        with np.errstate(over="ignore"):
            batch["vectors"][2] = spoil(batch["vectors"][2])
        after, metrics = run(kind, batch)
        assert metrics["bad_vectors"] == 1 and metrics["skipped"] == 0, name
        assert same(after, expected) and same(metrics["loss"], told["loss"]), name


@pytest.mark.parametrize("kind", ["ar", "av"])
def test_a_batch_with_nothing_to_learn_from(kind):
    """Every vector unusable: a gradient of zero, and parameters as they were."""
    batch = usual(kind)
    batch["vectors"][:] = np.nan
    after, metrics = run(kind, batch)
    params = cases.params() if kind == "av" else cases.ar_params()
    assert same(after.params, params) and metrics["loss"] == 0 and metrics["grad_norm"] == 0
    assert metrics["bad_vectors"] == cases.ROWS - 1  # one row is not valid anyway
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(gradient(after)))


def test_padding_and_texts_of_one_token_alone_teach_nothing():
    batch = cases.lm_batch()
    batch["segments"][:] = 0
    after, metrics = lm_step(cases.state(cases.params()), batch, cfg=cases.lm_config())
    assert same(after.params, cases.params()) and metrics["loss"] == 0
    batch["segments"][:] = 1 + np.arange(20)[None]  # every text has one token
    batch["positions"][:] = 0
    after, metrics = lm_step(cases.state(cases.params()), batch, cfg=cases.lm_config())
    assert same(after.params, cases.params()) and metrics["loss"] == 0


def test_explanations_without_a_token_are_read_at_the_prompts_end():
    """An AR prompt around nothing is still a text: finite, and it counts."""
    batch = cases.ar_batch()
    batch["lengths"][:3] = 1
    after, metrics = run("ar", batch)
    assert finite(after) and metrics["skipped"] == 0 and 0 < metrics["loss"] < 4


@pytest.mark.parametrize("spoilt", ["embedding of a token of one text", "head"])
def test_an_ar_that_has_broken_down_is_not_updated(spoilt):
    """NaN in its output: the loss says so, the step is skipped and counted, nothing changes."""
    ar, batch = cases.ar_params(), cases.ar_batch()
    if spoilt == "head":
        ar = ar.replace(head=ar.head.at[0, 0].set(jnp.nan))
    else:
        ar = ar.replace(trunk=ar.trunk.replace(embed=ar.trunk.embed.at[int(batch["tokens"][0, 0])].set(jnp.nan)))
    before = cases.state(ar)
    after, metrics = ar_step(cases.state(ar), batch, cfg=cases.ar_config())
    assert metrics["skipped"] == 1 and int(after.skipped) == 1 and int(after.step) == 0
    assert same(after.params, before.params) and same(after.opt, before.opt)


# Joint RL


def joint(v, ar=None, failed=(), valid=None, cfg=None):
    """Rollout, rewards and the AV's batch, as the joint step has them."""
    cfg = cfg or cases.rl_config()
    layout = decode_layout(cases.params(), cfg=cfg.av)
    samples = rollout(cases.params(), v, step_keys(np.uint32(0), np.uint32(3), rows=N, samples=G), cfg=cfg)
    reference = reference_logprobs(*layout, samples, v, cfg=cfg)
    texts = {name: x for name, x in cases.ar_batch().items() if name in ("tokens", "lengths")}
    texts |= {"failed": np.isin(np.arange(N * G), failed), "valid": np.ones(N, bool) if valid is None else valid}
    batch = {**texts, "vectors": v}
    judged = judge(read_errors(ar or cases.ar_params(), batch, cfg=cfg), batch, np.zeros(N * G, np.float32), cfg=cfg)
    return samples, judged, policy_batch(samples, v, judged, reference, cfg.av.norms)


def policy(batch, cfg=None):
    return policy_step(cases.state(cases.params()), batch, cfg=cfg or cases.rl_config())


@pytest.mark.parametrize("advantage", ["group_std", "batch_std"])
def test_unusable_activations_in_rl(advantage):
    """Their samples weigh nothing; the other groups' draws, rewards and updates are those without them."""
    v, cfg = cases.vectors(N, seed=7), cases.rl_config(advantage=advantage)
    valid = np.asarray([True, False, True, True])
    samples, judged, batch = joint(v, valid=valid, cfg=cfg)
    expected, told = policy(batch)
    assert judged.metrics["bad_vectors"] == 0 and told["skipped"] == 0
    others = np.repeat(valid, G)
    for name, spoil in POISON.items():
        bad = v.copy()
        with np.errstate(over="ignore"):
            bad[1] = spoil(bad[1])
        drawn, found, batch = joint(bad, cfg=cfg)
        np.testing.assert_array_equal(np.asarray(drawn.tokens)[others], np.asarray(samples.tokens)[others])
        np.testing.assert_array_equal(np.asarray(found.advantages)[others], np.asarray(judged.advantages)[others])
        np.testing.assert_array_equal(found.weight, others)
        assert finite(found) and found.metrics["bad_vectors"] == 1
        for metric in ("reward", "mse_nrm", "reward_std_in_group", "failed_share"):
            assert same(found.metrics[metric], judged.metrics[metric]), (name, metric)
        after, metrics = policy(batch)
        assert same(after, expected) and same(metrics["loss"], told["loss"]), name


def test_all_samples_failing_teaches_nothing():
    """Equal rewards have no advantage: what is left is the KL of the policy to itself, rounding."""
    _, judged, batch = joint(cases.vectors(N, seed=7), failed=range(N * G))
    np.testing.assert_array_equal(judged.advantages, 0)
    np.testing.assert_array_equal(judged.rewards, -2)
    assert judged.metrics["parse_failures"] == N * G and judged.metrics["failed_share"] == 1
    after, metrics = policy(batch)
    assert metrics["skipped"] == 0 and metrics["grad_norm"] < 1e-6 and finite(after)
    weight = np.zeros(N * G, np.float32)
    ar, metrics = run("ar", {**cases.ar_batch(), "weight": weight})
    assert same(ar.params, cases.ar_params()) and metrics["loss"] == 0


def test_every_activation_unusable_teaches_nothing():
    """Bit for bit: not even the KL's rounding."""
    _, judged, batch = joint(np.full((N, cases.D), np.nan, np.float32))
    assert judged.metrics["bad_vectors"] == N and finite(judged)
    after, metrics = policy(batch)
    assert same(after.params, cases.params()) and metrics["grad_norm"] == 0 and finite(metrics)


@pytest.mark.parametrize("reward", ["neg_mse", "neg_log_mse"])
def test_an_ar_that_says_nan_earns_what_a_failure_earns(reward):
    """For the samples that it cannot read; the AV goes on with finite parameters."""
    v, texts, ar = cases.vectors(N, seed=7), cases.ar_batch(), cases.ar_params()
    token = int(texts["tokens"][0, 0])
    hit = np.asarray([token in row[:n] for row, n in zip(texts["tokens"], texts["lengths"], strict=True)])
    assert 0 < hit.sum() < N * G
    ar = ar.replace(trunk=ar.trunk.replace(embed=ar.trunk.embed.at[token].set(jnp.nan)))
    cfg = cases.rl_config(reward=reward)
    _, judged, batch = joint(v, ar=ar, cfg=cfg)
    _, clean, _ = joint(v, cfg=cfg)
    np.testing.assert_allclose(judged.rewards[hit], -2 if reward == "neg_mse" else -np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(judged.rewards[~hit], clean.rewards[~hit])
    assert finite(judged)
    after, metrics = policy(batch)
    assert finite(after) and metrics["skipped"] == 0


def test_a_policy_that_has_broken_down_is_not_updated():
    """NaN in the AV: skipped, counted, unchanged."""
    _, _, batch = joint(cases.vectors(N, seed=7))
    broken = cases.params().replace(final_norm=cases.params().final_norm.at[0].set(jnp.nan))
    after, metrics = policy_step(cases.state(broken), batch, cfg=cases.rl_config())
    assert metrics["skipped"] == 1 and same(after.params, broken) and int(after.step) == 0
