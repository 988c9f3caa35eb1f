"""Joint RL on a tiny pair: the policy step against numpy, the ratio on-policy, and what crosses between AV and AR.

The expected loss and its slopes come from float64 log-probabilities of the numpy decoder; the expected gradient from
one pass over whole, unshared sequences weighted by those slopes. Tolerances: losses 1e-5; gradients 1e-4 of each
parameter's largest entry; ratios 1e-5.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_cases as cases
from families import hf_weights
from reference import decoder
from step_cases import far, gradient, same

from nla_jax.train.rl import (
    decode_layout,
    judge,
    policy_batch,
    policy_step,
    read_errors,
    reference_logprobs,
    regression_batch,
    regression_step,
    rollout,
    step_keys,
)
from nla_jax.train.steps import ar_step

N, G = 4, 4
LOSS, GRADIENT, RATIO = 1e-5, 1e-4, 1e-5
DECAY = 0.3  # weight of replayed pairs


@functools.cache
def exact(kind):
    """Float64 log-probabilities of the usual batch's responses."""
    batch = cases.policy_rows() if kind == "policy" else cases.av_batch(seed=3)
    responses = batch["tokens"] if kind == "policy" else batch["tokens"][:, cases.TAIL :]
    return batch, responses, cases.exact_logprobs("qwen2", responses, batch["vectors"])


def pulled(kind, slope):
    batch, responses, _ = exact(kind)
    slope = np.asarray(slope, np.float32)
    return cases.whole_gradient(cases.params(), responses, batch["vectors"], slope, cases.config())


def expected_step(replay=False, own=False, **choices):
    batch, _, logp = exact("policy")
    loss, slope = cases.policy_loss(logp, batch, old=logp if own else None, **choices)
    grad = pulled("policy", slope)
    if replay:
        of_pairs, slope = cases.sft_loss(exact("av")[2], exact("av")[0])
        loss += DECAY * of_pairs
        grad = jax.tree.map(lambda a, b: a + DECAY * b, grad, pulled("av", slope))
    return loss, grad


@functools.cache
def stepped(accumulate=1, replay=False, **changes):
    batch = dict(exact("policy")[0])
    cfg = cases.rl_config(accumulate=accumulate, **{"on_policy_ratio": "sampled", "replay_av": DECAY, **changes})
    pairs = cases.av_batch(seed=3) if replay else None
    after, metrics = policy_step(cases.state(cases.params()), batch, pairs, cfg=cfg)
    return {k: float(v) for k, v in metrics.items()}, gradient(after)


def test_policy_step_equals_numpy():
    """Ratios inside and outside the clip range, both signs of advantages, samples that do not count; every metric."""
    batch, _, logp = exact("policy")
    metrics, grad = stepped()
    loss, expected = expected_step()
    assert metrics["loss"] == pytest.approx(loss, rel=LOSS) and far(grad, expected) < GRADIENT
    live = (np.arange(cases.NEW)[None] < batch["lengths"][:, None]) & (batch["weight"][:, None] > 0)
    off = np.exp(logp - batch["sampled"])[live] - 1
    assert 0.2 < np.mean(np.abs(off) > 0.2) < 0.8
    wanted = {
        "ratio_error": np.abs(off).mean(),
        "clipped": np.mean(np.abs(off) > 0.2),
        "entropy": -logp[live].mean(),
        "kl": ((batch["reference"] - logp)[live] ** 2 / 2).mean(),
        "length": batch["lengths"][batch["weight"] > 0].mean(),
        "grad_norm": np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(expected))),
    }
    for name, value in wanted.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize(
    ("accumulate", "replay", "choices"),
    [
        (2, False, {"aggregate": "token", "kl": "k3", "clip": 0.1, "beta": 0.5}),
        (4, True, {}),
    ],
    ids=["halves, per token, k3", "quarters with replay"],
)
def test_micro_batches_choices_and_replay(accumulate, replay, choices):
    """Again equal to numpy, hence to the whole batch."""
    names = {"clip": "clip_ratio", "beta": "kl_coef"}
    metrics, grad = stepped(accumulate, replay, **{names.get(k, k): v for k, v in choices.items()})
    loss, expected = expected_step(replay, **choices)
    assert metrics["loss"] == pytest.approx(loss, rel=LOSS) and far(grad, expected) < GRADIENT


# On-policy


@functools.cache
def rolled():
    """Vectors, samples of a rollout, their log-probabilities under the same parameters, and the AV."""
    cfg, v = cases.rl_config(), cases.vectors(N, seed=7)
    keys = step_keys(np.uint32(0), np.uint32(3), rows=N, samples=G)
    samples = rollout(cases.params(), v, keys, cfg=cfg)
    reference = reference_logprobs(*decode_layout(cases.params(), cfg=cfg.av), samples, v, cfg=cfg)
    return v, samples, reference


def live_of(samples):
    return np.arange(cases.NEW)[None] < np.asarray(samples.lengths)[:, None]


def ar_rows(v, samples, failed=()):
    """Texts for the AR in the place of explanations. What it gets of the AV is integers: they carry no gradient."""
    assert samples.tokens.dtype == jnp.int32 and samples.tokens.shape == (N * G, cases.NEW)
    batch = {k: x for k, x in cases.ar_batch().items() if k in ("tokens", "lengths")}
    return {**batch, "vectors": v, "valid": np.ones(N, bool), "failed": np.isin(np.arange(N * G), failed)}


def on_policy_batch(ar=None, **changes):
    v, samples, reference = rolled()
    cfg = cases.rl_config(**changes)
    batch = ar_rows(v, samples, failed=(2, 9))
    errors = read_errors(ar or cases.ar_params(), batch, cfg=cfg)
    judged = judge(errors, batch, np.zeros(N * G, np.float32), cfg=cfg)
    return policy_batch(samples, v, judged, reference, cfg.av.norms), judged


def test_ratio_is_one_on_policy():
    """The sampler's log-probabilities are those of the training pass: prefill, cache and prefix or none of them.

    Against float64 too, so that both are not wrong alike."""
    v, samples, reference = rolled()
    live = live_of(samples)
    assert len(set(np.asarray(samples.lengths).tolist())) > 3 and np.asarray(samples.stopped).any()
    rho = np.exp(np.asarray(reference, np.float64) - np.asarray(samples.logprobs))
    assert np.abs(rho[live] - 1).max() < RATIO
    np.testing.assert_array_equal(np.asarray(samples.logprobs)[~live], 0)
    rows = np.asarray(samples.tokens)
    logp = cases.exact_logprobs("qwen2", rows, np.repeat(v, G, axis=0))
    assert np.abs(np.exp(logp - np.asarray(samples.logprobs))[live] - 1).max() < RATIO
    batch, _ = on_policy_batch()
    _, metrics = policy_step(cases.state(cases.params()), batch, cfg=cases.rl_config())
    assert metrics["ratio_error"] < RATIO and metrics["clipped"] == 0 and metrics["kl"] < 1e-9
    assert metrics["length"] == pytest.approx(live.sum() / (N * G))


@pytest.mark.parametrize("parts", [2, 4])
def test_in_parts_it_is_the_same_rollout(parts):
    """The sampled tokens row by row, and the reference's log-probabilities, in parts as all at once."""
    v, whole, reference = rolled()
    cfg = cases.rl_config(accumulate=parts, rollout_parts=parts)
    keys = step_keys(np.uint32(0), np.uint32(3), rows=N, samples=G)
    samples = rollout(cases.params(), v, keys, cfg=cfg)
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(samples, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(samples.logprobs, whole.logprobs, rtol=0, atol=RATIO)
    found = reference_logprobs(*decode_layout(cases.params(), cfg=cfg.av), samples, v, cfg=cfg)
    np.testing.assert_allclose(found, reference, rtol=0, atol=RATIO)


def test_both_ratios_have_the_same_gradient_on_policy():
    """Minus the advantage times the score, weighted; the loss is minus the mean advantage."""
    batch, judged = on_policy_batch()
    _, samples, _ = rolled()
    found = {}
    for kind in ("self", "sampled"):
        after, metrics = policy_step(cases.state(cases.params()), batch, cfg=cases.rl_config(on_policy_ratio=kind))
        found[kind] = gradient(after)
        assert float(metrics["loss"]) == pytest.approx(-float(judged.advantages.mean()), abs=1e-5)
    assert far(found["sampled"], found["self"]) < 2e-5
    live, a = live_of(samples), np.asarray(judged.advantages)
    slope = np.where(live, -a[:, None] / live.sum(axis=1, keepdims=True) / (N * G), 0).astype(np.float32)
    expected = cases.whole_gradient(
        cases.params(), samples.tokens, np.repeat(rolled()[0], G, axis=0), slope, cases.config()
    )
    assert far(found["self"], expected) < GRADIENT


def test_own_ratio_forgets_how_it_was_sampled():
    """ "self" is 1 whatever the recorded log-probabilities: the numpy loss with the policy as its own past."""
    metrics, grad = stepped(on_policy_ratio="self")
    loss, expected = expected_step(own=True)
    assert metrics["loss"] == pytest.approx(loss, rel=LOSS, abs=1e-6) and far(grad, expected) < GRADIENT
    assert metrics["ratio_error"] > 0.1  # told all the same


def test_samples_depend_on_seed_step_row_and_sample_alone():
    keys = [step_keys(np.uint32(s), np.uint32(i), rows=r, samples=G) for s, i, r in ((0, 3, N), (0, 4, N), (1, 3, N))]
    data = [np.asarray(jax.random.key_data(k)) for k in keys]
    assert len(np.unique(np.concatenate(data), axis=0)) == 3 * N * G
    fewer = step_keys(np.uint32(0), np.uint32(3), rows=2, samples=G)
    np.testing.assert_array_equal(jax.random.key_data(fewer), data[0][: 2 * G])


# Rewards, and what crosses


@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_the_ar_learns_from_is_what_it_rewards(accumulate):
    """The update's forward pass tells every sample's error before it, beside replayed pairs; else it is `ar_step`."""
    v, samples, _ = rolled()
    cfg = cases.rl_config(accumulate=accumulate)
    batch = ar_rows(v, samples, failed=(0, 6, 7))
    teacher = {name: x[:8] for name, x in cases.ar_batch(seed=5).items()}
    rows = regression_batch(batch, teacher, samples=G)
    after, told = regression_step(cases.state(cases.ar_params()), rows, cfg=cfg.ar)
    expected, metrics = ar_step(cases.state(cases.ar_params()), rows, cfg=cfg.ar)
    assert far(gradient(after), gradient(expected)) < 1e-5
    assert {name: float(told[name]) for name in metrics} == pytest.approx(jax.tree.map(float, metrics), rel=LOSS)
    errors = np.asarray(told["errors"])
    assert errors.shape == (N * G + 8,)
    np.testing.assert_allclose(errors[: N * G], read_errors(cases.ar_params(), batch, cfg=cases.rl_config()), rtol=LOSS)
    weight = np.concatenate([~batch["failed"], np.ones(8)])
    assert metrics["loss"] == pytest.approx((errors * weight).sum() / weight.sum(), rel=LOSS)


@pytest.mark.parametrize(("kind", "accumulate"), [("neg_mse", 1), ("neg_log_mse", 4)])
def test_judge_equals_numpy(kind, accumulate):
    """Errors by the float64 decoder, failed samples, a penalty, and an activation that is not valid."""
    v, samples, _ = rolled()
    batch = ar_rows(v, samples, failed=(0, 6, 7))
    batch["valid"] = np.asarray([True, True, True, False])
    penalty = np.linspace(0, 0.3, N * G).astype(np.float32)
    cfg = cases.rl_config(reward=kind, advantage="batch_std", accumulate=accumulate)
    got = judge(read_errors(cases.ar_params(), batch, cfg=cfg), batch, penalty, cfg=cfg)
    head, errors = np.asarray(cases.ar_params().head, np.float64), np.zeros(N * G)
    for b, n in enumerate(batch["lengths"]):
        stream = decoder(hf_weights(cases.CASES["qwen2"]), cases.CASES["qwen2"], batch["tokens"][b, :n], n_layers=2)[0]
        p, h = stream[-1][-1] @ head, v[b // G].astype(np.float64)
        errors[b] = 2 - 2 * p @ h / np.linalg.norm(p) / np.linalg.norm(h)
    errors = np.where(batch["failed"], 2.0, errors)
    np.testing.assert_allclose(got.errors, errors, rtol=LOSS)
    rewards = (-errors if kind == "neg_mse" else -np.log(errors)) - penalty
    np.testing.assert_allclose(got.rewards, rewards, rtol=LOSS, atol=1e-6)
    centred = rewards.reshape(N, G) - rewards.reshape(N, G).mean(axis=1, keepdims=True)
    expected = centred / (np.sqrt((centred[:3] ** 2).mean()) + 1e-6)
    np.testing.assert_allclose(np.asarray(got.advantages).reshape(N, G), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got.weight, np.repeat([1, 1, 1, 0], G))
    live = slice(0, 3 * G)
    wanted = {
        "reward": rewards[live].mean(),
        "mse_nrm": errors[live].mean(),
        "reward_std_in_group": rewards[live].reshape(3, G).std(axis=1).mean(),
        "parse_failures": 3,
        "failed_share": 0.25,
        "bad_vectors": 0,
    }
    for name, value in wanted.items():
        assert float(got.metrics[name]) == pytest.approx(value, rel=1e-4), name


def test_the_av_learns_from_the_ar_through_advantages_alone():
    """Another AR that earns the same rewards (twice the head: the same directions) is the same update, bit for bit;
    one that earns others is another."""
    ar = cases.ar_params()
    twice, other = ar.replace(head=2 * ar.head), ar.replace(head=ar.head[::-1])
    batch, judged = on_policy_batch(ar)
    same_rewards, of_twice = on_policy_batch(twice)
    other_rewards, _ = on_policy_batch(other)
    assert same(judged.advantages, of_twice.advantages)
    cfg = cases.rl_config()
    after, twin, third = (
        policy_step(cases.state(cases.params()), b, cfg=cfg)[0] for b in (batch, same_rewards, other_rewards)
    )
    assert same(after, twin) and not same(after.params, third.params)


def test_ar_step_takes_the_rollouts_successful_samples():
    """Failed ones weigh nothing: whatever their texts, the update is the same."""
    v, samples, _ = rolled()
    rows = ar_rows(v, samples)
    batch = {"tokens": rows["tokens"], "lengths": rows["lengths"], "vectors": np.repeat(v, G, axis=0)}
    batch |= {"valid": np.ones(N * G, bool), "weight": 1.0 - np.isin(np.arange(N * G), (3, 4)).astype(np.float32)}
    other = {**batch, "tokens": batch["tokens"].copy()}
    other["tokens"][[3, 4]] = 50
    results = [ar_step(cases.state(cases.ar_params()), b, cfg=cases.ar_config()) for b in (batch, other)]
    assert same(results[0][0], results[1][0]) and results[0][1]["loss"] == results[1][1]["loss"]
    other["tokens"][5] = 50
    third = ar_step(cases.state(cases.ar_params()), other, cfg=cases.ar_config())
    assert not same(third[0].params, results[0][0].params)
