"""The training steps: chunks, the shared prefix, packed rows, micro-batches and devices change no loss and no gradient.

Expected gradients come from one pass over each whole, unshared sequence, weighted by slopes of the loss that numpy
has worked out in float64. Tolerances: losses 1e-5; gradients 1e-4 of each parameter's largest entry.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_cases as cases
from families import hf_weights
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from reference import decoder
from step_cases import TAIL, far, gradient

from nla_jax.models.params import abstract_params
from nla_jax.train.gradients import gradients
from nla_jax.train.logprobs import token_logprobs
from nla_jax.train.rl import policy_step
from nla_jax.train.state import cast, create
from nla_jax.train.steps import ar_step, av_step, lm_step

LOSS, GRADIENT = 1e-5, 1e-4


@functools.cache
def stepped(kind, case="qwen2", **changes):
    """(loss, gradient) of the usual batch of a kind."""
    step, batch, config, params = {
        "lm": (lm_step, cases.lm_batch, cases.lm_config, cases.params),
        "ar": (ar_step, cases.ar_batch, cases.ar_config, cases.ar_params),
        "av": (av_step, cases.av_batch, cases.av_config, cases.params),
    }[kind]
    after, metrics = step(cases.state(params(case)), batch(), cfg=config(case, **changes))
    return float(metrics["loss"]), gradient(after)


@functools.cache
def expected_av(case="qwen2"):
    """Loss in float64; the gradient of whole sequences."""
    batch = cases.av_batch()
    responses = batch["tokens"][:, TAIL:]
    loss, slope = cases.sft_loss(cases.exact_logprobs(case, responses, batch["vectors"]), batch)
    slope = slope.astype(np.float32)
    return loss, cases.whole_gradient(cases.params(case), responses, batch["vectors"], slope, cases.config(case))


def agree(got, expected, loss=LOSS, slope=GRADIENT):
    assert got[0] == pytest.approx(expected[0], rel=loss)
    assert far(got[1], expected[1]) < slope


# Log-probabilities in chunks


@pytest.mark.parametrize("case", cases.CASES)
def test_chunked_logprobs_equal_full_logits(case):
    """Whether chunks divide the length or not, down to one token of each row; tied and capped or not."""
    cfg, params = cases.config(case), cases.params(case)
    x = np.random.default_rng(0).normal(size=(3, 11, cases.D)).astype(np.float32)
    targets = cases.tokens((3, 11))
    weights = np.random.default_rng(1).normal(size=(3, 11)).astype(np.float32)
    # In float64: final norm, projection, soft-cap, log-softmax.
    w = {k: v.astype(np.float64) for k, v in hf_weights(cases.CASES[case]).items() if "layers" not in k}
    y = x.astype(np.float64)
    y /= np.sqrt((y**2).mean(-1, keepdims=True) + cfg.norm_eps)
    y *= w["model.norm.weight"] + (1 if cfg.norm_plus_one else 0)
    logits = y @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
    logits = cfg.logit_softcap * np.tanh(logits / cfg.logit_softcap) if cfg.logit_softcap else logits
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(logits, targets[:, :, None], -1)[:, :, 0]

    def run(params, x, chunk):
        out = token_logprobs(params, x, targets, cfg, chunk=chunk)
        return jnp.sum(out * weights), out

    run = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True), static_argnums=2)
    whole, _ = run(params, x, 1000)
    for chunk in (1, 9, 12, 33):
        grads, out = run(params, x, chunk)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        assert far(grads, whole) < 1e-5


def test_gradient_of_logprobs_is_that_of_a_softmax():
    """With respect to the stream, against central differences in float64 of the formula (qwen2: no cap)."""
    cfg, params = cases.config(), cases.params()
    x, targets = np.random.default_rng(2).normal(size=(2, 3, cases.D)), cases.tokens((2, 3))
    weight, head = (np.asarray(p, np.float64) for p in (params.final_norm, params.lm_head))

    def total(x):
        logits = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * weight @ head
        return np.take_along_axis(logits, targets[:, :, None], -1).sum() - np.log(np.exp(logits).sum(-1)).sum()

    expected = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[i] = 1e-5
        expected[i] = (total(x + step) - total(x - step)) / 2e-5
    got = jax.grad(lambda x: token_logprobs(params, x, targets, cfg, chunk=2).sum())(x.astype(np.float32))
    assert far(got, expected) < GRADIENT


def sizes_of_logits(step, *args, V, D, **static):
    """Tokens of every array of the step's program, backward pass included, that has a vocabulary's axis and is no
    parameter."""
    seen, sizes = set(), set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            for var in eqn.outvars:
                shape = getattr(var.aval, "shape", ())
                if V in shape and shape not in ((V,), (V, D), (D, V)):
                    sizes.add(int(np.prod(shape)) // V)
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns") and id(inner) not in seen:
                    seen.add(id(inner))
                    walk(inner)

    walk(step.trace(*args, **static).jaxpr.jaxpr)
    return sizes


@pytest.mark.parametrize("kind", ["lm", "av", "rl"])
def test_no_array_has_all_tokens_and_the_vocabulary(kind):
    """In a vocabulary of 5003, 16 rows and chunks of 32 tokens: logits of 32 tokens, and nothing larger. With chunks
    that hold everything there is."""
    V = 5003
    model = cases.config(vocab_size=V)
    state = jax.eval_shape(lambda p: create(p, cases.PLAIN), abstract_params(model))

    def sizes(chunk):
        if kind == "lm":
            return sizes_of_logits(
                lm_step, state, cases.lm_batch(16), V=V, D=cases.D, cfg=cases.lm_config(model=model, chunk=chunk)
            )
        if kind == "av":
            cfg = cases.av_config(model=model, chunk=chunk)
            return sizes_of_logits(av_step, state, cases.av_batch(), V=V, D=cases.D, cfg=cfg)
        cfg = cases.rl_config(av={"model": model, "chunk": chunk}, replay_av=0.1)
        return sizes_of_logits(policy_step, state, cases.policy_rows(), cases.av_batch(), V=V, D=cases.D, cfg=cfg)

    assert max(sizes(32)) == 32 and max(sizes(10_000)) >= 16 * cases.NEW


# The shared prefix


@pytest.mark.parametrize("case", cases.CASES)
def test_shared_prefix_gradients_equal_those_of_whole_prompts(case):
    """AV SFT: every parameter, what the prefix alone uses included (embeddings of its tokens)."""
    expected = expected_av(case)
    agree(stepped("av", case), expected)
    only_prefix = np.asarray(expected[1].embed)[[5, 90]]  # ids at the prompt's beginning, in no response of the test
    assert np.abs(only_prefix).max() > 1e-3
    assert (
        np.abs(np.asarray(stepped("av", case)[1].embed)[[5, 90]] - only_prefix).max() < 1e-4 * np.abs(only_prefix).max()
    )


# Micro-batches


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lm", {"accumulate": 2, "chunk": 9}),
        ("ar", {"accumulate": 4, "remat": "blocks"}),
        ("av", {"accumulate": 4, "remat": "dots", "chunk": 1000}),
    ],
)
def test_accumulated_equals_the_whole_batch(kind, changes):
    """Unequal lengths, and rows that do not count, in every micro-batch. Recomputed blocks and other chunks too."""
    agree(stepped(kind, **changes), stepped(kind), loss=1e-6, slope=2e-5)
    if kind == "av":
        agree(stepped(kind, **changes), expected_av())


def test_lm_loss_is_the_mean_over_all_texts():
    """In float64, text by text."""
    batch, losses = cases.lm_batch(), []
    for ids, segments in zip(batch["tokens"], batch["segments"], strict=True):
        for number in range(1, segments.max() + 1):
            text = ids[segments == number]
            logits = decoder(hf_weights(cases.CASES["qwen2"]), cases.CASES["qwen2"], text)[1][:-1]
            losses += list(np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, text[1:, None], -1)[:, 0])
    assert stepped("lm")[0] == pytest.approx(np.mean(losses), rel=LOSS)


def test_ar_loss_is_the_mean_direction_error():
    """In float64: the stream after the last block at the last token, through the head; rows that count alone."""
    batch, case = cases.ar_batch(), "qwen2"
    head, errors = np.asarray(cases.ar_params(case).head, np.float64), []
    for b, n in enumerate(batch["lengths"]):
        if batch["valid"][b] and batch["weight"][b]:
            streams, _ = decoder(hf_weights(cases.CASES[case]), cases.CASES[case], batch["tokens"][b, :n], n_layers=2)
            p, v = streams[-1][-1] @ head, batch["vectors"][b].astype(np.float64)
            errors.append(2 - 2 * (p @ v) / np.linalg.norm(p) / np.linalg.norm(v))
    assert 0 < len(errors) < len(batch["valid"])
    assert stepped("ar")[0] == pytest.approx(np.mean(errors), rel=LOSS)


# Packed rows


def packed(batch, kind, per_row=3, width=56):
    """The batch as the loader packs it: `per_row` samples one after another in each row; those not valid are left
    out, and rows end with places for samples that are none."""
    keep = np.flatnonzero(batch["valid"])
    rows = [keep[i : i + per_row] for i in range(0, len(keep), per_row)]
    B, places = len(rows), per_row + 1
    out = {name: np.zeros((B, width), np.int32) for name in ("tokens", "segments", "positions")}
    mask, at = np.zeros((B, width), bool), np.full((B, places), -1, np.int32)
    chosen, valid, weight = np.zeros((B, places), int), np.zeros((B, places), bool), np.ones((B, places), np.float32)
    first = cases.PROMPT.marker if kind == "av" else 0
    for b, members in enumerate(rows):
        chosen[b], start = members[0], 0
        for v, i in enumerate(members):
            n = int(batch["lengths"][i])
            here = slice(start, start + n)
            out["tokens"][b, here], out["segments"][b, here] = batch["tokens"][i, :n], v + 1
            out["positions"][b, here] = first + np.arange(n)
            mask[b, here] = batch["loss_mask"][i, :n] if kind == "av" else False
            at[b, v], chosen[b, v], valid[b, v] = (start if kind == "av" else start + n - 1), i, True
            start += n
    if kind == "av":
        return {**out, "vectors": batch["vectors"][chosen], "valid": valid, "markers": at, "loss_mask": mask}
    weight = batch["weight"][chosen]
    return {**out, "vectors": batch["vectors"][chosen], "valid": valid, "last": np.maximum(at, 0), "weight": weight}


@pytest.mark.parametrize("kind", ["ar", "av"])
def test_packed_equals_unpacked(kind):
    """Also where the vector of one of a row's samples is unusable."""
    step, batch, cfg, params = {
        "ar": (ar_step, cases.ar_batch(), cases.ar_config(), cases.ar_params()),
        "av": (av_step, cases.av_batch(), cases.av_config(), cases.params()),
    }[kind]
    for bad in (None, 4):
        if bad is not None:
            batch["vectors"][bad] = np.nan
        alone, told = step(cases.state(params), batch, cfg=cfg)
        together, metrics = step(cases.state(params), packed(batch, kind), cfg=cfg)
        agree((metrics["loss"], gradient(together)), (float(told["loss"]), gradient(alone)), loss=1e-6, slope=2e-5)
        assert metrics["bad_vectors"] == told["bad_vectors"] == (bad is not None)
        if kind == "av":
            assert metrics["tokens"] == told["tokens"]


# Devices


def on_devices(batch, sharded):
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data") if sharded else PartitionSpec()))


@pytest.mark.parametrize("kind", ["ar", "rl", pytest.param("av", marks=pytest.mark.slow)])
def test_eight_devices_equal_one(kind):
    """Rows over 8 devices, parameters on each: the same loss and gradients, in micro-batches too."""
    assert len(jax.devices()) >= 8
    if kind == "rl":
        cfg = cases.rl_config(on_policy_ratio="sampled")
        one, expected = policy_step(cases.state(cases.params()), cases.policy_rows(), cfg=cfg)
        state = on_devices(cases.state(cases.params()), False)
        eight, metrics = policy_step(state, on_devices(cases.policy_rows(), True), cfg=cfg)
        expected = (float(expected["loss"]), gradient(one))
    else:
        step, batch, params, cfg = {
            "ar": (ar_step, cases.ar_batch(), cases.ar_params(), cases.ar_config()),
            "av": (av_step, cases.av_batch(), cases.params(), cases.av_config(accumulate=2)),
        }[kind]
        eight, metrics = step(on_devices(cases.state(params), False), on_devices(batch, True), cfg=cfg)
        expected = stepped(kind)
    assert len(metrics["loss"].sharding.device_set) == 8
    agree((metrics["loss"], gradient(eight)), expected, loss=1e-6, slope=2e-5)


# bfloat16


@pytest.mark.parametrize("kind", ["ar", pytest.param("av", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_bfloat16_runs_and_agrees_loosely(kind, dtype):
    """Compute in bfloat16 under float32 masters, and all of it in bfloat16: the loss to 2%, the gradient to a tenth of
    its length; dtypes stay, moments are float32."""
    step, params, batch, cfg = {
        "ar": (ar_step, cases.ar_params(), cases.ar_batch(), cases.ar_config(compute_dtype="bfloat16", accumulate=4)),
        "av": (av_step, cases.params(), cases.av_batch(), cases.av_config(compute_dtype="bfloat16", accumulate=4)),
    }[kind]
    loss, expected = stepped(kind)
    after, metrics = step(cases.state(params, dtype=dtype), batch, cfg=cfg)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=0.02) and float(metrics["loss"]) != loss
    off = jax.tree.map(lambda a, b: a - b, gradient(after), expected)
    assert optax.tree.norm(off) < 0.1 * optax.tree.norm(expected)
    assert {p.dtype.name for p in jax.tree.leaves(after.params)} == {dtype}
    assert {m.dtype.name for m in jax.tree.leaves(after.opt)} == {"float32", "int32"}
    assert not cases.same(after.params, cases.state(params, dtype=dtype).params)


def test_micro_batches_are_summed_in_float32():
    """A mean of 1024 terms in bfloat16, of which a bfloat16 sum would lose half; also through the prefix."""
    x = np.random.default_rng(3).uniform(0.5, 1.5, size=(1024, 5)).astype(np.float32)
    w = jnp.ones(5, jnp.bfloat16)

    def loss(w, shared, micro):
        return jnp.sum((w + shared)[None] * micro["x"].astype(w.dtype)) / 1024, {}

    value, _, grad = gradients(loss, w, {"x": x}, accumulate=1024, prefix=lambda w: 2 * w)
    np.testing.assert_allclose(grad.astype(jnp.float32), 3 * x.mean(axis=0), rtol=0.01)
    assert float(value) == pytest.approx(3 * x.mean(axis=0).sum(), rel=0.01)


def test_logits_chunks_are_summed_in_float32():
    """The vocabulary's gradient in bfloat16: 256 chunks are as good as one."""
    cfg = cases.config()
    x, targets = np.random.default_rng(4).normal(size=(4, 1024, cases.D)), cases.tokens((4, 1024))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def slope(chunk, dtype):
        def loss(params):
            return token_logprobs(cast(params, dtype), jnp.asarray(x, dtype), targets, cfg, chunk=chunk).mean()

        return jax.grad(loss)(cases.params()).lm_head

    exact = slope(4096, "float32")
    off = [float(jnp.linalg.norm(slope(n, "bfloat16") - exact) / jnp.linalg.norm(exact)) for n in (4096, 16)]
    assert off[1] < 1.5 * off[0] < 0.02
