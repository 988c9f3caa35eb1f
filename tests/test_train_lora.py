"""LoRA through the stages: what is trained and what is not, what is written, and how much memory the roles share."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_cases as cases
import training
from training import World, bits, lines, restored

from nla_jax.errors import NLAError
from nla_jax.models import hf
from nla_jax.models.config import ModelConfig
from nla_jax.models.int8 import Int8, is_matrix, quantize_row
from nla_jax.models.lora import LoRAConfig, LowRank, attach, init_adapters
from nla_jax.models.params import abstract_params
from nla_jax.models.peft_io import load_adapters
from nla_jax.models.transformer import forward
from nla_jax.reconstructor import ARParams
from nla_jax.train.state import create
from nla_jax.train.steps import ar_step, av_step

RANK = 3
ADAM = {"name": "adamw", "lr": 5e-3, "schedule": "constant", "warmup": 0.0}
LORA = {"lora": {"rank": RANK, "alpha": 6.0}}
WARM = {**LORA, "optim": ADAM}
JOINT = {**LORA, "av_optim": ADAM, "ar_optim": ADAM}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return training.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def warm(world, tmp_path_factory) -> Any:
    """An AR and AV warm-started with LoRA: the directory of the run."""
    out = tmp_path_factory.mktemp("lora")
    for stage in ("ar", "av"):
        world.train(stage, out, steps=6, **WARM)
    return out


def pair(warm: Any) -> dict[str, Any]:
    return {role: str(warm / role / "export" / role) for role in ("av", "ar")}


@pytest.mark.parametrize("role", ["av", "ar"])
def test_an_export_is_the_target_with_its_adapters_added(world, warm, role):
    folder = warm / role / "export" / role
    cfg = ModelConfig.from_dir(folder)
    _, target = hf.load_model(world.target, "float32", n_layers=cfg.n_layers, head=role == "av")
    merged = hf.load_model(folder, "float32")[1] if role == "av" else hf.load_ar(folder, "float32")[1]
    adapters, lora = load_adapters(folder / "adapter", cfg)
    assert lora == LoRAConfig(rank=RANK, alpha=6.0)
    for field, w in vars(target.layers).items():
        got = getattr(merged.layers, field)
        if field in adapters:
            a, b = (np.asarray(x, np.float64) for x in (adapters[field].a, adapters[field].b))
            assert np.abs(b).max() > 0, field
            np.testing.assert_allclose(got, np.asarray(w, np.float64) + 2.0 * a @ b, atol=1e-6)
        elif w is not None:
            np.testing.assert_array_equal(got, w)  # frozen
    np.testing.assert_array_equal(merged.embed, target.embed)
    if role == "ar":
        head = np.asarray(hf.load_ar(folder, "float32")[2])
        assert np.abs(head - np.eye(len(head))).max() > 1e-3  # the head is trained in full


def test_joint_training_goes_on_with_the_warm_starts_adapters(world, warm, tmp_path):
    task = world.task("rl", **pair(warm), **JOINT)
    state = task.init()
    for role, trained in (("av", state.av.params), ("ar", state.ar.params.trunk)):
        folder = warm / role / "export" / role
        stored, _ = load_adapters(folder / "adapter", ModelConfig.from_dir(folder))
        assert bits(trained) == bits(stored)
    # The same explanations and scores as the merged pair's, which is what everything else reads.
    plain = world.task("rl", **pair(warm))
    beside, _ = task.evaluate(state, 0)
    merged, _ = plain.evaluate(plain.init(), 0)
    assert beside == pytest.approx(merged, abs=1e-4)
    result = training.quietly(task, tmp_path)
    assert result.reason == "finished" and len(result.exports) == 2
    rows = [row for row in lines(tmp_path / "rl") if "ratio_error" in row]
    assert rows[0]["ratio_error"] < 1e-4 and abs(rows[0]["kl"]) < 1e-4  # the reference is the AV it starts from
    for role in ("av", "ar"):
        before, after = (
            load_adapters(p / "adapter", ModelConfig.from_dir(p))[0]
            for p in (warm / role / "export" / role, tmp_path / "rl" / "export" / role)
        )
        assert all(np.abs(np.asarray(after[f].b - before[f].b)).max() > 0 for f in before)
        assert (tmp_path / "rl" / "export" / role / "adapter" / "base.txt").is_file()


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(world, warm, tmp_path):
    def task() -> Any:
        return world.task("rl", **pair(warm), **JOINT, save_every=2)

    training.quietly(task(), tmp_path / "whole")
    training.quietly(task(), tmp_path / "halves", stop_at=2)
    training.quietly(task(), tmp_path / "halves")
    (_, a, _), (_, b, _) = (restored(task(), tmp_path / name / "rl") for name in ("whole", "halves"))
    assert bits(a) == bits(b)
    assert [r for r in lines(tmp_path / "whole" / "rl")] == [r for r in lines(tmp_path / "halves" / "rl")]
    size = sum(x.nbytes for x in jax.tree.leaves(a))
    assert size < 0.8 * sum(x.nbytes for x in jax.tree.leaves(world.task("rl").init()))  # no base in a checkpoint


def held(make: Any) -> tuple[Any, int]:
    """What `make` returns, and the bytes of the arrays that it left on the devices, each buffer once."""
    gc.collect()
    before = {x.unsafe_buffer_pointer() for x in jax.live_arrays() if not x.is_deleted()}
    made = make()
    gc.collect()
    after = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if not x.is_deleted()}
    return made, sum(n for pointer, n in after.items() if pointer not in before)


def test_four_roles_hold_one_base(world, warm):
    """Target, AV, AR and KL reference: at most 1.2 times the base and what is trained."""
    task = world.task("rl", **pair(warm), **JOINT, eval_rows=0)
    loader = task.loader()
    state, size = held(task.init)
    base = sum(x.nbytes for x in jax.tree.leaves(task._base))
    trained = sum(x.nbytes for x in jax.tree.leaves(state))
    _, of_target = hf.load_model(world.target, "float32")
    assert base == sum(x.nbytes for x in jax.tree.leaves(of_target)) > 0
    assert base + trained <= size <= 1.2 * base + trained
    (after, _), more = held(lambda: task.step(state, next(loader), 0))
    # The old state was donated; what is new beside the new one are metrics and what the host had decoded.
    assert more - sum(x.nbytes for x in jax.tree.leaves(after)) < 0.1 * base


@pytest.mark.parametrize("role", ["ar", "av"])
@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_backward_keeps_no_copy_of_the_base(role, remat):
    """Beside its arguments a gradient step does not hold the frozen blocks again: not those of the AV, which the prompt
    before the marker and the rest go through, nor of the AR, whose blocks are the first of a base that goes on."""
    text = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": cases.V}
    cfg = ModelConfig.from_hf({**training.MODEL, **text, "num_attention_heads": 4, "head_dim": 64})
    lora, shape = LoRAConfig(rank=2), jax.ShapeDtypeStruct
    own = cfg if role == "av" else cfg.truncated(6)
    base = abstract_params(cfg)
    trained = jax.eval_shape(lambda key: init_adapters(own, lora, key), jax.random.key(0))
    batch = cases.av_batch(2) if role == "av" else cases.ar_batch(2)
    batch["vectors"] = np.zeros((2, 256), np.float32)
    if role == "ar":
        batch["tokens"] = batch["tokens"][:, :8]
        trained = ARParams(trunk=trained, head=shape((256, 256), jnp.float32))
    state = jax.eval_shape(lambda p: create(p, cases.PLAIN), trained)
    rows = jax.tree.map(lambda x: shape(x.shape, x.dtype), batch)
    step, of = (av_step, cases.av_config) if role == "av" else (ar_step, cases.ar_config)
    compiled = step.lower(state, rows, base, cfg=of(model=own, lora=lora, remat=remat)).compile()
    blocks = own.n_layers / 8 * sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(base.layers))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * blocks  # two blocks are in use at a time


def test_at_full_rank_a_step_is_that_of_full_fine_tuning():
    """With a = 1 and scale 1 the change is b, whose gradient is the weight's own: the same loss, and after the update
    the same model, when only that layer is trained."""
    # With Adam's usual eps even a gradient that is all rounding moves its weight by the learning rate.
    step = {"name": "adamw", "lr": 1e-2, "clip": 0.0, "b1": 0.9, "eps": 1e-3}
    cfg, optim = cases.av_config(), dataclasses.replace(cases.PLAIN, **step)
    cfg = dataclasses.replace(cfg, optim=optim)
    params, batch = cases.params(), cases.av_batch()
    D = cfg.model.d_model
    lora = LoRAConfig(rank=D, alpha=float(D), targets=("o_proj",))
    n, rows, cols = params.layers.wo.shape
    assert rows == cols == D
    one = jnp.broadcast_to(jnp.eye(D), (n, D, D))
    fresh = {"wo": LowRank(a=one, b=jnp.zeros((n, D, D)))}
    full, of_full = av_step(create(jax.tree.map(jnp.array, params), optim), batch, cfg=cfg)
    with_lora = dataclasses.replace(cfg, lora=lora)
    adapted, of_adapted = av_step(create(jax.tree.map(jnp.array, fresh), optim), batch, params, cfg=with_lora)
    assert float(of_adapted["loss"]) == pytest.approx(float(of_full["loss"]), rel=1e-6)
    np.testing.assert_array_equal(adapted.params["wo"].a, one)  # b is 0: a has no gradient yet
    change, want = adapted.params["wo"].b, full.params.layers.wo - params.layers.wo
    np.testing.assert_allclose(change, want, atol=2e-5 * float(jnp.abs(want).max()))
    assert float(jnp.abs(want).max()) > 5e-3


@pytest.mark.parametrize(
    ("stage", "changes", "says"),
    [
        ("rl", {"lora": {"rank": 4}, "av_optim": ADAM, "ar_optim": ADAM}, "no adapters"),
        ("rl", {"lora": {"rank": 4}, "av_optim": {"name": "muon"}}, "muon is for whole matrices"),
        ("av", {"lora": {"rank": 33}, "optim": ADAM}, "at most 32"),
        ("av", {"lora": {"rank": -1}, "optim": ADAM}, "config.av.lora.rank"),
        ("av", {"lora": {"rank": 2, "targets": ["lm_head"]}, "optim": ADAM}, "config.av.lora.targets"),
        ("ar", {"lora": {"rank": 2, "alpha": 0.0}, "optim": ADAM}, "config.ar.lora.alpha"),
        ("ar", {"lora": {"int8": True}, "optim": ADAM}, "config.ar.lora.int8"),
        ("ar", {"lora": {"rnak": 2}, "optim": ADAM}, "config.ar.lora.rank"),
    ],
)
def test_wrong_settings_are_said(world, stage, changes, says):
    with pytest.raises(NLAError, match=says):
        world.task(stage, **changes)


def test_a_warm_start_goes_on_from_its_own_adapters_alone(world, warm, tmp_path):
    init = str(warm / "av" / "export" / "av")
    task = world.task("av", init=init, **WARM)
    stored, _ = load_adapters(warm / "av" / "export" / "av" / "adapter", task.role.cfg)
    assert bits(task.init().params) == bits(stored)
    with pytest.raises(NLAError, match="that of the adapters"):
        world.task("av", init=init, optim=ADAM, lora={"rank": RANK + 1, "alpha": 6.0})
    # Adapters of one base are nothing to another.
    other = world.train("lm", tmp_path, steps=1).exports[0]
    with pytest.raises(NLAError, match="another base"):
        world.task("av", init=init, target=str(other), **WARM).init()


def test_a_base_in_8_bits(world, tmp_path):
    """Half of bfloat16's bytes, each weight within half a step of its column; trained on, exported, gone on with."""
    options = {"lora": {"rank": RANK, "alpha": 6.0, "int8": True}, "optim": ADAM}
    task = world.task("av", **options)
    base = task.role.base("float32", int8=True)
    _, target = hf.load_model(world.target, "float32")
    for field in ("wq", "wo", "gate", "down"):
        kept, w = getattr(base.layers, field), np.asarray(getattr(target.layers, field), np.float64)
        assert kept.q.dtype == np.int8 and kept.shape == w.shape
        step = np.abs(w).max(axis=1, keepdims=True) / 127.5  # as qwix has it
        np.testing.assert_allclose(kept.scale, step, rtol=1e-5)
        assert (np.abs(np.asarray(kept.wide(), np.float64) - w) <= 0.5001 * step).all()
    np.testing.assert_array_equal(base.embed, target.embed)
    size = sum(x.nbytes for x in jax.tree.leaves(base.layers))
    assert size < 0.3 * sum(x.nbytes for x in jax.tree.leaves(target.layers))
    for stage in ("ar", "av"):
        result = world.train(stage, tmp_path, steps=4, **options)
        assert result.reason == "finished"
    # What is written is what was trained: the rounded weights with the adapters added.
    merged = hf.load_model(tmp_path / "av" / "export" / "av", "float32")[1]
    adapters, _ = load_adapters(tmp_path / "av" / "export" / "av" / "adapter", task.role.cfg)
    a, b = (np.asarray(x, np.float64) for x in (adapters["up"].a, adapters["up"].b))
    np.testing.assert_allclose(merged.layers.up, np.asarray(base.layers.up.wide()) + 2.0 * a @ b, atol=1e-6)
    joint = {"lora": options["lora"], "av_optim": ADAM, "ar_optim": ADAM, "steps": 2}
    task = world.task("rl", **pair(tmp_path), **joint)
    assert training.quietly(task, tmp_path).reason == "finished"
    rows = [row for row in lines(tmp_path / "rl") if "ratio_error" in row]
    assert rows[0]["ratio_error"] < 1e-4 and abs(rows[0]["kl"]) < 1e-4


def test_8_bits_compute_what_their_wide_matrices_do():
    """Forward and gradient of the adapters; no wide copy is kept for the backward pass."""
    cfg, params = cases.av_config().model, cases.params()
    lora = LoRAConfig(rank=2, targets=("q_proj", "down_proj"))
    narrow = params.replace(
        layers=jax.tree.map(
            lambda w: (
                jax.tree.map(lambda *rows: jnp.stack(rows), *(quantize_row(r, None) for r in w))
                if is_matrix(w.shape)
                else w
            ),
            params.layers,
        )
    )
    wide = jax.tree.map(lambda w: w.wide() if isinstance(w, Int8) else w, narrow, is_leaf=lambda w: isinstance(w, Int8))
    adapters = jax.tree.map(lambda x: x + 0.05, init_adapters(cfg, lora, jax.random.key(0)))
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)

    def loss(adapters, base):
        logits = forward(attach(base, adapters, lora), ids, cfg)
        return jnp.mean(jnp.square(logits - jnp.roll(logits, 1, -1)))

    (got, slope), (want, expected) = (jax.jit(jax.value_and_grad(loss))(adapters, base) for base in (narrow, wide))
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    assert cases.far(slope, expected) < 1e-4


def test_without_qwix_it_is_said(world, monkeypatch):
    task, find = world.task("av", lora={"rank": 2, "int8": True}, optim=ADAM), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "qwix" else find(name))
    with pytest.raises(NLAError, match="nla_jax.int8"):
        task.init()
