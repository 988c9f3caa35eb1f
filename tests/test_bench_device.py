"""The device benchmark: it runs the plan's programs on real arrays, and its arithmetic is that done by hand."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_cases as cases
from click.testing import CliRunner

from nla_jax.models.config import ModelConfig
from nla_jax.models.sharding import MeshSettings
from nla_jax.tools import bench, bench_device, bench_device_run, plan_run, run_config
from nla_jax.tools.bench_device_arrays import make, named
from nla_jax.tools.bench_device_report import as_json, chip_of, limits_of, lines, row_of, summary
from nla_jax.tools.bench_device_run import DoesNotFitError, Measured, Runner, Timing, measure
from nla_jax.tools.plan import target_model
from nla_jax.train import rl, steps
from nla_jax.train.plan_stage import Call, Model, Program, Stage, make_place
from nla_jax.train.plan_work import Lengths, Work

CONFIG = {**cases.CASES["qwen2"], "vocab_size": 160, "num_hidden_layers": 2, "use_sliding_window": False}
RESPONSE = 30
# The same sizes in every test, so that each program is compiled once.
OVERRIDES = {
    **{"av.batch_size": "4", "av.buckets": "(64,)", "ar.batch_size": "4", "ar.buckets": "(64,)"},
    **{"rl.batch_size": "2", "rl.samples": "2", "rl.max_new_tokens": "32"},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


@pytest.fixture(scope="module")
def run(target):
    config = run_config.load("tiny")
    run_config.override(config, {"target": target, **OVERRIDES}.items(), "rl")
    return plan_run.Run(config, target_model(config, 0, RESPONSE), False, 32)


def stage_named(name, run):
    return plan_run.stage_of(run, name, plan_run.change_of(run, name), jax.devices())[0]


def runner(stage, run):
    return Runner(stage, run.model.cfg.vocab_size)


def arrays(call):
    """What the benchmark makes of a call's arguments, made anew."""
    beside = named(call)
    return {path: make(path, beside, CONFIG["vocab_size"]) for path in beside}


# The programs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rl_stage(run):
    return stage_named("rl", run)


def test_av_step_is_that_of_training(run):
    stage = stage_named("av", run)
    (program,) = stage.programs
    state, metrics = runner(stage, run).run(program, False)
    call = program.call({})
    own = arrays(call)
    given = jax.tree.unflatten(jax.tree.structure(call.args), list(own.values()))
    after, expected = steps.av_step(*given, **call.options)
    assert 3 < metrics["loss"] < 6  # near the logarithm of the vocabulary, as of any random weights
    assert metrics["bad_vectors"] == 0 and metrics["skipped"] == 0
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_allclose(state.params.embed, after.params.embed, rtol=1e-5, atol=1e-7)


def test_state_is_carried_from_call_to_call(run):
    stage = stage_named("ar", run)
    (program,) = stage.programs
    running = runner(stage, run)
    losses = []
    for _ in range(3):
        state, metrics = running.run(program, True)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 3 and losses[2] < losses[1] < losses[0]
    assert len(running.timings[program.name].seconds) == 3


def test_joint_step_runs_the_plans_programs_on_each_others_results(rl_stage, monkeypatch):
    lowered, drawn = [], []
    lower = Program.lower

    def spy(self, outputs):
        lowered.append(self.name)
        return lower(self, outputs)

    class Listening(Runner):
        def run(self, program, measured):
            if program.name == "rollout":
                # With the state as it is then.
                shapes = named(program.call(self.outputs))
                keys, vectors = (make((name,), shapes, CONFIG["vocab_size"]) for name in ("keys", "vectors"))
                params = jax.tree.map(lambda shape: self._held[id(shape)], rl_stage.residents["AV state"].params)
                drawn.append(rl.rollout(params, vectors, keys, cfg=config))
            result = super().run(program, measured)
            if program.name == "rollout":
                drawn.append(result)
            return result

    config = next(p for p in rl_stage.programs if p.name == "AV update").call({}).options["cfg"]
    monkeypatch.setattr(Program, "lower", spy)
    monkeypatch.setattr(bench_device_run, "Runner", Listening)
    found = measure(rl_stage, CONFIG["vocab_size"], rounds=1)
    assert found.refused is None
    assert lowered == [p.name for p in rl_stage.programs] == [t.name for t in found.timings]
    assert [len(t.seconds) for t in found.timings] == [1] * 6
    assert all(t.needs > 0 and t.compile_seconds > 0 for t in found.timings)
    # Twice, with the parameters of before and after the first update: what `rl.rollout` draws itself.
    assert len(drawn) == 4
    for ours, theirs in (drawn[:2], drawn[2:]):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=1e-5, atol=1e-6)
    timing = next(t for t in found.timings if t.name == "rollout")
    assert timing.drawn == int(np.asarray(drawn[3].lengths).sum()) and timing.cap == 32


def test_parameters_are_residents_and_made_once(rl_stage):
    # Or a model would be in memory twice.
    resident = {id(leaf) for leaf in jax.tree.leaves(dict(rl_stage.residents))}
    for program in rl_stage.programs:
        if not program.after:
            for path, leaf in named(program.call({})).items():
                assert id(leaf) in resident or math.prod(leaf.shape) <= 4 * 64, (program.name, path)


def test_arrays_are_usable(rl_stage):
    held = {p.name: arrays(p.call({})) for p in rl_stage.programs if not p.after}
    update = held["AV update"]
    tokens = np.asarray(update["batch", "tokens"])
    assert tokens.min() >= 0 and tokens.max() < 160 and len(np.unique(tokens)) > 30
    assert (np.asarray(update["batch", "lengths"]) == 32).all()
    embed = np.asarray(update["state", "params", "embed"])
    assert embed.std() == pytest.approx(0.02, rel=0.05) and abs(embed.mean()) < 1e-3
    assert abs(np.corrcoef(embed[:-1].ravel(), embed[1:].ravel())[0, 1]) < 0.05
    layers = {path[-1]: x for path, x in update.items() if "layers" in path and "opt" not in path}
    assert not np.array_equal(layers["gate"], layers["up"])
    assert (np.asarray(layers["attn_norm"]) == 1).all()
    assert all((np.asarray(x) == 0).all() for path, x in update.items() if "opt" in path)
    of_texts = held["AR update"]
    vectors = np.asarray(of_texts["batch", "vectors"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.sqrt(32), rel=0.4)
    assert np.asarray(of_texts["batch", "valid"]).all() and (np.asarray(of_texts["batch", "weight"]) == 1).all()


def test_keys_and_options_that_are_arrays():
    def fn(start, keys_B, temperature):
        return start

    key = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    place = make_place(MeshSettings(), jax.devices()[:1])
    given = (place.array((), jnp.int32), place.array(key.shape, key.dtype))
    options = {"static": (1, 2), "temperature": place.array((), jnp.float32)}
    made = arrays(Call(jax.jit(fn), given, options))
    assert set(made) == {("start",), ("temperature",), ("keys",)}
    assert int(made["start",]) == 0 and float(made["temperature",]) == 1.0
    assert made["keys",].shape == (3,)


@pytest.mark.parametrize("name", ["AR update", "AV update"])
def test_what_does_not_fit_is_one_line(rl_stage, name, monkeypatch):
    class Full:
        def memory_analysis(self):
            raise AssertionError

        def lower(self, *args, **options):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while\ntrying to allocate 9 bytes.")

    programs = tuple(
        dataclasses.replace(p, after=(), call=lambda out: Call(Full(), ()))
        if p.name == name
        else dataclasses.replace(p, call=rl_stage.programs[1].call, after=())
        for p in rl_stage.programs[1:]
    )
    found = measure(dataclasses.replace(rl_stage, programs=programs), CONFIG["vocab_size"], rounds=1)
    assert found.refused == f"{name}: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."
    text = "\n".join(lines(found, summary(found, limits_of("cpu", "float32", 1, 1), 1, 25.8), limits_of("x", "", 1, 1)))
    assert "a step of" not in text  # programs are missing


def test_what_surely_does_not_fit_is_not_tried(rl_stage):
    found = measure(rl_stage, CONFIG["vocab_size"], memory=1000.0)
    assert found.timings == () and "GiB of a chip at least" in found.refused
    with pytest.raises(DoesNotFitError, match="re-layout needs"):
        Runner(rl_stage, CONFIG["vocab_size"], memory=1000.0).run(rl_stage.programs[1], False)


# The arithmetic ----------------------------------------------------------------------------------------------------


def stage_of(name, programs, rows):
    return Stage(name, programs, {}, rows, "bfloat16")


def test_shares_by_hand():
    # 40 TFLOP useful and 60 computed in 0.5 s on 2 chips of 100 TFLOP/s, 200 GB moved by each at 1 TB/s.
    work = Work(useful=40e12, computed=60e12, moved=200e9)
    timing = Timing("AV step", False, work, (0.9, 0.4, 0.5))
    limits = limits_of("cpu", "bfloat16", 100.0, 1000.0)
    row = row_of(timing, limits, 2)
    assert row.seconds == 0.5 and (row.fastest, row.slowest, row.calls) == (0.4, 0.9, 3)
    assert row.mfu == pytest.approx(40e12 / 0.5 / 200e12) == pytest.approx(0.4)
    assert (row.limit, row.bound) == (pytest.approx(0.3), "compute")
    assert row.of_limit == pytest.approx(0.6) and row.of_bandwidth == pytest.approx(0.4)
    once = dataclasses.replace(timing, name="longest", once=True, seconds=(7.0,))
    programs = (Program("AV step", None, work), Program("longest", None, work, once=True))
    measured = Measured(stage_of("av", programs, 256), (timing, once))
    found = summary(measured, limits, 2, 25.8)
    assert (found.seconds, found.rate, found.mfu) == (0.5, 512.0, pytest.approx(0.4))
    text = "\n".join(lines(measured, found, dataclasses.replace(limits, chip="h100")))
    assert "512 samples/s, 256 a chip; MFU 40%" in text and "0.3 s, 60% of the time" in text
    assert "25.8 samples/s per H100" in text and "9.92x" in text  # 256 / 25.8
    assert "x" not in "\n".join(lines(measured, found, limits)).split("trained")[1]  # of another chip


def test_decode_against_the_bandwidth_by_hand():
    # 4 rows of 10 tokens, 9 steps after the first; 18 GB moved in 0.03 s at 1 TB/s: 60%.
    work = Work(1e9, 2e9, 18e9)
    timing = Timing("rollout", False, work, (0.03,), drawn=40, longest=10, cap=10)
    limits = limits_of("cpu", "bfloat16", 100.0, 1000.0)
    stage = stage_of("rl", (Program("rollout", None, work),), 4)
    measured = Measured(stage, (timing,))
    found = summary(measured, limits, 1, None)
    assert found.decode["of_bandwidth"] == pytest.approx(0.6)
    assert found.decode["tokens_per_s"] == pytest.approx(40 / 0.03)
    assert found.decode["bandwidth_tokens_per_s"] == pytest.approx(40 / 0.018)
    text = "\n".join(lines(measured, found, limits))
    assert "1333 tokens/s" in text and "2222, 60% of which" in text
    # Where all rows end after 4 tokens, 3 of 9 steps ran.
    early = Measured(stage, (dataclasses.replace(timing, drawn=14, longest=4),))
    assert summary(early, limits, 1, None).decode["of_bandwidth"] == pytest.approx(0.2)
    assert "token 4 of 10" in "\n".join(lines(early, summary(early, limits, 1, None), limits))


def test_chips_by_what_devices_call_themselves():
    assert chip_of("NVIDIA H100 80GB HBM3").name == "h100" and chip_of("NVIDIA H200").name == "h200"
    assert chip_of("TPU v5 lite").name == "v5e" and chip_of("TPU v5p").name == chip_of("TPU v5").name == "v5p"
    assert chip_of("TPU v6 lite").name == "v6e"
    # Slower cards of the name, and what is not known, have no limits but those that are given.
    for kind in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "cpu"):
        assert chip_of(kind) is None
    limits = limits_of("NVIDIA H100 80GB HBM3", "bfloat16", None, None)
    assert (limits.chip, limits.peak, limits.rate) == ("h100", 989e12, 3350e9)
    assert limits_of("NVIDIA H100 80GB HBM3", "float32", None, None).peak == 67e12
    assert limits_of("NVIDIA H100 PCIe", "bfloat16", 756, 2000).peak == 756e12
    row = row_of(Timing("x", False, Work(1, 1, 1), (1.0,)), limits_of("cpu", "float32", None, None), 1)
    assert row.mfu is row.limit is row.of_limit is row.of_bandwidth is None


def test_scaled_model_is_that_of_the_other_benchmarks():
    from nla_jax.configs.architectures import ARCHITECTURES

    whole = Model(ModelConfig.from_hf(ARCHITECTURES["Qwen/Qwen2.5-7B-Instruct"]["config"]), 20, Lengths())
    for scale in (1, 2, 4, 8):
        ours, theirs = bench_device.sized(whole, scale, None).cfg, ModelConfig.from_hf(bench.hf_config(scale))
        for name in ("d_model", "d_ff", "vocab_size", "n_heads", "n_kv_heads", "head_dim", "n_layers"):
            assert getattr(ours, name) == getattr(theirs, name), (scale, name)
    short = bench_device.sized(whole, 1, 8)
    assert (short.cfg.n_layers, short.layer, short.cfg.d_model) == (8, 5, 3584)  # 21 of 28 blocks are 6 of 8
    assert bench_device.sized(whole, 1, None) == whole


# The command -------------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(bench.main, ["device", *arguments])


def test_all_stages_from_the_command_line(target, tmp_path):
    out = tmp_path / "out.json"
    given = [f"--config.target={target}", "--config=tiny", "--layer", "0", "--rounds", "2", "--json", str(out)]
    given += [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    given += ["--response-tokens", str(RESPONSE), "--document-tokens", "32"]
    result = invoke(*given, "--peak-tflops", "0.1", "--bandwidth-gbs", "10", "--profile", str(tmp_path / "trace"))
    assert result.exit_code == 0, result.output
    assert "no accelerator found" in result.output and "decode:" in result.output
    found = json.loads(out.read_text())
    assert [s["stage"] for s in found["stages"]] == ["av", "ar", "rl", "extract"]
    for stage in found["stages"]:
        assert stage["refused"] is None and stage["rows_per_s"] > 0 and stage["reference_per_chip"] is None
        for row in stage["programs"]:
            assert row["mfu"] == pytest.approx(row["useful"] / row["seconds"] / (stage["chips"] * 0.1e12))
            assert len(row["all_seconds"]) == row["calls"] == (1 if row["once"] else 2)
            assert row["loss"] is None or math.isfinite(row["loss"])
        assert list((tmp_path / "trace" / stage["stage"]).rglob("*.xplane.pb")), stage["stage"]
    assert [s["chips"] for s in found["stages"]] == [1, 1, 1, 8]  # the config's mesh, and every device for extraction
    assert [row["name"] for row in found["stages"][2]["programs"]][2:4] == ["rollout", "reference log-probs"]


@pytest.mark.parametrize(
    ("arguments", "says", "code"),
    [
        (["--stage", "sft"], "av,ar,rl,extract", 2),
        (["--config=qwen2_5_7b_l2"], "--config=qwen2_5_7b_l20", 2),
        (["--scale", "3"], "power of two", 2),
        (["--blocks", "99"], "1 to 28", 2),
        (["--scale", "2048"], "power of two", 2),
        (["--stage", "av", "--config.av.batch_sice=3"], "batch_size", 2),
    ],
)
def test_bad_input_is_one_line(arguments, says, code):
    result = invoke(*arguments)
    assert result.exit_code == code and says in result.output, result.output
    assert "Traceback" not in result.output


def test_a_model_that_is_too_large_is_told_with_what_to_change(monkeypatch):
    monkeypatch.setattr(bench_device, "memory_of", lambda devices: 80e9)
    result = invoke("--stage", "av,rl", "--config.mesh.data=1")
    assert result.exit_code == bench_device.DOES_NOT_FIT
    assert result.output.count("DOES NOT FIT") == 2  # the other stages are still tried
    assert "--config.av.accumulate" in result.output and "--config.lora.rank" in result.output


def test_json_of_what_did_not_fit_is_json():
    measured = Measured(stage_of("av", (Program("p", None, Work()),), 4), (), "why")
    limits = limits_of("cpu", "float32", None, None)
    found = as_json(measured, summary(measured, limits, 1, None), limits, {"data": 1})
    assert json.loads(json.dumps(found))["refused"] == "why" and found["rows_per_s"] is None
