"""Every training step and the rollout on meshes of 8 simulated devices: the single device's results.

Tolerances: losses 1e-6, the policy's, whose terms cancel, 1e-5; gradients 2e-5 of each parameter's largest entry;
sampled tokens the same, their log-probabilities to 1e-5.
"""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_cases as cases
from families import hf_weights, to_params
from jax.sharding import NamedSharding, PartitionSpec
from step_cases import far, gradient

from nla_jax.models.config import ModelConfig
from nla_jax.models.int8 import is_matrix, quantize_row, stack_shardings
from nla_jax.models.lora import LoRAConfig, adapter_specs, init_adapters
from nla_jax.models.params import ParamSpec, param_specs, truncate
from nla_jax.models.sharding import MeshSettings, under
from nla_jax.reconstructor import ARParams
from nla_jax.train.adapted import trained_specs
from nla_jax.train.layout import Layout, make_layout
from nla_jax.train.rl import (
    frozen,
    judge,
    policy_batch,
    policy_step,
    read_errors,
    reference_logprobs,
    rollout,
    step_keys,
)
from nla_jax.train.state import create
from nla_jax.train.steps import ar_step, av_step, lm_step

GRADIENT, LOGPROB = 2e-5, 1e-5
N, G = 4, 4
MESHES = {
    "8x1x1": MeshSettings(),
    "2x2x2": MeshSettings(fsdp=2, tensor=2),
    "1x4x2": MeshSettings(fsdp=0, tensor=2),
}
_SIZES = {"vocab_size": 104, "num_key_value_heads": 2}
FAMILIES = {
    # Two query heads share a key head; biases.
    "qwen2": {**cases.CASES["qwen2"], **_SIZES},
    # Tied, normed twice, embeddings multiplied; one key head, which two tensor shards need.
    "gemma3_text": {**cases.CASES["gemma3_text"], **_SIZES, "num_key_value_heads": 1},
    "llama": {**cases.CONFIGS["llama"], **cases._SMALL, **_SIZES, "num_hidden_layers": 2},
}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# Each step on the mesh that has all axes, of a tied and an untied family; the rest takes minutes.
CASES = [
    *((mesh, family) for mesh in ["2x2x2"] for family in ["qwen2"]),
    slow("2x2x2", "gemma3_text"),
    slow("2x2x2", "llama"),
    *(slow(mesh, family) for mesh in ["8x1x1", "1x4x2"] for family in ["qwen2", "gemma3_text"]),
]


def config(family):
    return ModelConfig.from_hf(FAMILIES[family])


@functools.cache
def params(family):
    return to_params(hf_weights(FAMILIES[family]))


def ar_params(family):
    head = np.eye(cases.D) + 0.2 * np.random.default_rng(5).normal(size=(cases.D,) * 2)
    return ARParams(trunk=truncate(params(family), 2), head=jnp.asarray(head, jnp.float32))


@functools.cache
def layout(mesh):
    return Layout() if mesh is None else make_layout(MESHES[mesh])


def placed(mesh, family, tree):
    """Parameters as `train.roles` places them; copies, since steps donate them."""
    cfg = config(family)
    specs = param_specs(cfg)
    if isinstance(tree, ARParams):
        cfg = cfg.truncated(2)
        square = ParamSpec((cfg.d_model,) * 2, ("embed", "reads"))
        specs = ARParams(trunk=param_specs(cfg, head=False), head=square)
    tree = jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
    to = layout(mesh).shardings(specs, cfg)
    return tree if to is None else jax.device_put(tree, to)


@functools.cache
def policy_rows(family):
    batch = dict(cases.policy_rows())
    rng, live = np.random.default_rng(6), np.arange(cases.NEW)[None] < batch["lengths"][:, None]
    own = np.asarray(cases._whole(params(family), batch["tokens"], batch["vectors"], config(family)))
    for name in ("sampled", "reference"):
        batch[name] = np.where(live, own + 0.3 * rng.normal(size=own.shape), 0).astype(np.float32)
    return batch


@functools.cache
def stepped(kind, mesh, family):
    """(loss, gradient, state) of a step."""
    cfg = config(family)
    av, ar = cases.av_config(model=cfg, accumulate=2), cases.ar_config(model=cfg.truncated(2))
    step, tree, batch, cfg = {
        "lm": (lm_step, params, cases.lm_batch(), cases.lm_config(model=cfg)),
        "ar": (ar_step, ar_params, cases.ar_batch(), ar),
        "av": (av_step, params, cases.av_batch(), av),
        "rl": (
            policy_step,
            params,
            policy_rows(family) if kind == "rl" else {},
            cases.rl_config(av={"model": cfg}, ar={"model": cfg.truncated(2)}, on_policy_ratio="sampled"),
        ),
    }[kind]
    optim = cfg.av.optim if kind == "rl" else cfg.optim
    state = create(placed(mesh, family, tree(family)), optim)
    before = jax.tree.map(lambda x: x.sharding, state)
    batch = {name: x[layout(mesh).rows(len(x))] for name, x in batch.items()}
    after, metrics = step(state, layout(mesh).put(batch, len(batch["tokens"])), cfg=cfg)
    if mesh is not None:
        assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, after, before))
        assert all(m.sharding.is_fully_replicated for m in metrics.values())
    return float(metrics["loss"]), gradient(after), after


@pytest.mark.parametrize("kind", ["lm", "ar", "av", "rl"])
@pytest.mark.parametrize(("mesh", "family"), CASES)
def test_a_step_is_that_of_one_device(kind, mesh, family):
    loss, grad, after = stepped(kind, mesh, family)
    expected, slope, _ = stepped(kind, None, family)
    assert loss == pytest.approx(expected, rel=1e-5 if kind == "rl" else 1e-6)
    assert far(grad, slope) < GRADIENT


@functools.cache
def rolled(mesh, family):
    """Samples, reference log-probabilities and what the AR says of the samples: on a mesh in two parts each."""
    cfg, parts = config(family), 1 if mesh is None else 2
    cfg = cases.rl_config(av={"model": cfg}, ar={"model": cfg.truncated(2)}, accumulate=parts, rollout_parts=parts)
    av = placed(mesh, family, params(family))
    put, n = layout(mesh).put_whole, N * G
    with under(layout(mesh).mesh):
        keys = step_keys(np.uint32(0), np.uint32(3), rows=N, samples=G)
    vectors = put(cases.vectors(N, seed=7))
    samples = rollout(av, vectors, keys, cfg=cfg)
    reference = reference_logprobs(*frozen(av, cfg=cfg.av), samples, vectors, cfg=cfg)
    texts = {k: x[:n] for k, x in cases.ar_batch().items() if k in ("tokens", "lengths")}
    batch = {**put({**texts, "failed": np.arange(n) % 5 == 1}), "vectors": vectors, "valid": put(np.ones(N, bool))}
    ar = placed(mesh, family, ar_params(family))
    judged = judge(read_errors(ar, batch, cfg=cfg), batch, put(np.zeros(n, np.float32)), cfg=cfg)
    rows = policy_batch(samples, vectors, judged, reference, cfg.av.norms)
    return jax.device_get((samples, reference, judged, rows)), samples


@pytest.mark.parametrize(("mesh", "family"), CASES)
def test_a_rollout_is_that_of_one_device(mesh, family):
    (samples, reference, judged, rows), on_device = rolled(mesh, family)
    (expected, of_reference, of_judged, of_rows), _ = rolled(None, family)
    assert len(np.unique(expected.tokens, axis=0)) > N and len(np.unique(expected.lengths)) > 1
    np.testing.assert_array_equal(samples.tokens, expected.tokens)
    np.testing.assert_array_equal(samples.lengths, expected.lengths)
    np.testing.assert_allclose(samples.logprobs, expected.logprobs, atol=LOGPROB)
    np.testing.assert_allclose(reference, of_reference, atol=LOGPROB)
    for a, b in zip(jax.tree.leaves((judged, rows)), jax.tree.leaves((of_judged, of_rows)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    shards = layout(mesh).shards
    assert {len(s.data) for s in on_device.tokens.addressable_shards} == {N * G // shards}


def in_8_bits(params):
    """Parameters with their blocks' matrices in 8 bits, where their wide ones lie."""

    def one(w):
        if not is_matrix(w.shape):
            return w
        at = w.sharding if isinstance(w.sharding, NamedSharding) else None
        stack = jax.tree.map(
            lambda *rows: jnp.stack(rows), *(quantize_row(r, None) for r in jnp.asarray(jax.device_get(w)))
        )
        return stack if at is None else jax.device_put(jax.device_get(stack), stack_shardings(at))

    return jax.tree.map(one, params)


@functools.cache
def adapted(mesh, family, int8=False):
    """A rollout and an update of both models whose adapters lie on one base; the AR's on its first two blocks."""
    model = config(family)
    trunk, lora = model.truncated(2), LoRAConfig(rank=4, alpha=8.0)
    cfg = cases.rl_config(
        accumulate=2,
        av={"model": model, "lora": lora},
        ar={"model": trunk, "lora": lora},
        on_policy_ratio="sampled",
    )
    base = placed(mesh, family, params(family))
    base = in_8_bits(base) if int8 else base

    def place(tree, specs, cfg):
        to = layout(mesh).shardings(specs, cfg)
        return jax.tree.map(jnp.array, tree) if to is None else jax.device_put(tree, to)

    def moved(cfg, seed):
        return jax.tree.map(
            lambda x: x + 0.02 * jax.random.normal(jax.random.key(seed), x.shape),
            init_adapters(cfg, lora, jax.random.key(seed)),
        )

    av = place(moved(model, 1), adapter_specs(model, lora), model)
    ar = ARParams(trunk=moved(trunk, 2), head=ar_params(family).head)
    ar = place(ar, trained_specs("ar", trunk, lora), trunk)
    put = layout(mesh).put_whole
    with under(layout(mesh).mesh):
        keys = step_keys(np.uint32(0), np.uint32(3), rows=N, samples=G)
    vectors = put(cases.vectors(N, seed=7))
    samples = jax.device_get(rollout(av, vectors, keys, base, cfg=cfg))
    reference = reference_logprobs(*frozen(av, base, cfg=cfg.av), put(samples), vectors, cfg=cfg)
    of_av, m_av = policy_step(create(av, cases.PLAIN), put(policy_rows(family)), None, base, cfg=cfg)
    of_ar, m_ar = ar_step(create(ar, cases.PLAIN), put(cases.ar_batch()), base, cfg=cfg.ar)
    return jax.device_get((samples, reference, m_av["loss"], m_ar["loss"], gradient(of_av), gradient(of_ar)))


@pytest.mark.parametrize(
    ("mesh", "int8"),
    [("2x2x2", False), slow("2x2x2", True), slow("1x4x2", False), slow("8x1x1", False)],
)
def test_adapters_on_a_shared_base_do_what_they_do_on_one_device(mesh, int8):
    samples, reference, av, ar, *slopes = adapted(mesh, "qwen2", int8)
    expected, of_reference, of_av, of_ar, *of_slopes = adapted(None, "qwen2", int8)
    np.testing.assert_array_equal(samples.tokens, expected.tokens)
    np.testing.assert_allclose(samples.logprobs, expected.logprobs, atol=LOGPROB)
    np.testing.assert_allclose(reference, of_reference, atol=LOGPROB)
    assert (float(av), float(ar)) == pytest.approx((float(of_av), float(of_ar)), rel=1e-5)
    assert all(far(slope, want) < GRADIENT for slope, want in zip(slopes, of_slopes, strict=True))


def test_moments_lie_with_their_parameters():
    """In shards from the start, under both optimizers; counts are whole."""
    for name in ("adamw", "muon"):
        optim = cases.OptimizerSettings(name=name, steps=3)
        state = create(placed("2x2x2", "qwen2", params("qwen2")), optim)
        mesh = layout("2x2x2").mesh
        split = {s.data.shape for s in state.params.layers.wq.addressable_shards}
        assert split == {(3, cases.D // 2, cases.D // 2)}
        moments = [x for x in jax.tree.leaves(state.opt) if x.shape == state.params.layers.wq.shape]
        assert moments and all({s.data.shape for s in m.addressable_shards} == split for m in moments)
        assert state.step.sharding == NamedSharding(mesh, PartitionSpec())
        assert {p.dtype.name for p in jax.tree.leaves(state.opt)} == {"float32", "int32"}


def test_no_collective_holds_the_rows_of_another_copy():
    """What a device is sent for a step does not grow with the number of copies of the parameters: weights, gradients
    and its own copy's rows, of which the token ids alone may be whole. (XLA decides; without the constraints in
    `run_blocks` and `embed` every device computes every row.)"""
    cfg, mesh = config("qwen2"), "2x2x2"
    rows = 24  # no other size here is 12 or 24
    batch = layout(mesh).put_whole(cases.av_batch(rows))
    state = create(placed(mesh, "qwen2", params("qwen2")), cases.PLAIN)
    text = av_step.lower(state, batch, cfg=cases.av_config(model=cfg)).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text)
    arrays = [(dtype, sizes.split(",")) for what in found for dtype, sizes in re.findall(r"(\w+)\[([\d,]+)\]", what)]
    assert len(arrays) > 10
    assert not [a for a in arrays if str(rows) in a[1] and a[0].startswith(("f", "bf"))]
