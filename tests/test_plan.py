"""`nla plan`: programs built from shapes and compiled for simulated devices, bad input, a real slice."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest
import step_cases as cases
from click.testing import CliRunner

from nla_jax.configs.chips import CHIPS
from nla_jax.errors import InputError
from nla_jax.models.config import ModelConfig
from nla_jax.models.lora import n_adapter_params
from nla_jax.models.params import n_params
from nla_jax.models.sharding import MeshSettings
from nla_jax.tools import cli
from nla_jax.train.plan import (
    Compiled,
    Compiler,
    Row,
    least_bytes,
    refused_bytes,
    report,
    roofline,
    row_of,
)
from nla_jax.train.plan_programs import extraction, joint_rl, n_ar_params, warm_start
from nla_jax.train.plan_slices import Chip, larger, parse_slice, why_not
from nla_jax.train.plan_stage import Call, Model, make_place
from nla_jax.train.plan_work import Lengths, Work, tree_bytes
from nla_jax.train.settings import LoRASettings, RLSettings, SFTSettings

GIB = 2.0**30
CHIP = Chip("toy", 1e12, 1e11, 1 * GIB, 1e11, 1e10)
CONFIG = {**cases.CASES["qwen2"], "vocab_size": 104, "num_key_value_heads": 2, "use_sliding_window": False}
MODEL = Model(ModelConfig.from_hf(CONFIG), 1, Lengths(11, 7, 5, 8, 2))
RL = RLSettings(target="t", store="s", av="a", ar="b", batch_size=8, samples=2, max_new_tokens=10, steps=5)
RL = dataclasses.replace(RL, remat="blocks")
SFT = SFTSettings(stage="av", target="t", store="s", batch_size=16, buckets=(16, 24))
SPLIT = MeshSettings(fsdp=2, tensor=2)


def said(key):
    """The key of programs of one setting."""
    return lambda varies: key


def place(settings=SPLIT, devices=8):
    return make_place(settings, jax.devices()[:devices])


@pytest.fixture(scope="module")
def rl_stage():
    return joint_rl(dataclasses.replace(RL, mesh=SPLIT), MODEL, place())


def test_joint_rl_is_made_of_the_programs_that_training_runs(rl_stage):
    names = [p.name for p in rl_stage.programs]
    assert names == [*("KL reference", "re-layout", "rollout", "reference log-probs", "AR update", "AV update")]
    still = joint_rl(dataclasses.replace(RL, mesh=SPLIT, train_ar=False), MODEL, place())
    assert [p.name for p in still.programs] == [*names[:4], "reward", "AV update"]
    assert [p.name for p in rl_stage.programs if p.once] == ["KL reference"]
    assert rl_stage.rows == 16


@pytest.mark.parametrize("change", [{"remat": "dots"}, {"accumulate": 2}, {"rollout_parts": 2}])
def test_programs_vary_with_what_they_say(change):
    """What was found of a program is kept while a search changes other settings: its code must be the same then."""

    def lowered(settings):
        one = place(MeshSettings(), 1)
        stage, outputs, texts = joint_rl(settings, MODEL, one), {}, {}
        for program in stage.programs:
            code = program.lower(outputs)
            outputs[program.name], texts[program.name] = code.out_info, code.as_text()
        return texts, {p.name: p.varies for p in stage.programs}

    before, varies = lowered(RL)
    after, _ = lowered(dataclasses.replace(RL, **change))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if set(change) & set(varies[name])} and changed


def test_residents_are_parameters_moments_and_reference(rl_stage):
    held = {name: tree_bytes(tree) for name, tree in rl_stage.residents.items()}
    # Over fsdp 2 x tensor 2; biases and norms are whole on more of them.
    cfg = MODEL.cfg
    assert held["AV state"] == pytest.approx(12 * n_params(cfg) / 4, rel=0.1)
    assert held["AR state"] == pytest.approx(12 * n_ar_params(MODEL.trunk) / 4, rel=0.1)
    assert held["KL reference"] == pytest.approx(4 * n_params(cfg) / 4, rel=0.1)
    assert held["AV state"] > 12 * n_params(cfg) / 4


@pytest.mark.parametrize("mesh", [SPLIT, pytest.param(MeshSettings(data=4, tensor=2), marks=pytest.mark.slow)])
def test_with_lora_all_roles_lie_on_one_base(mesh):
    """And it is read, not copied: the sampler's gathers it over fsdp, the others take it as it is."""
    lora = LoRASettings(rank=2)
    stage = joint_rl(dataclasses.replace(RL, mesh=mesh, lora=lora), MODEL, place(mesh))
    found = report(stage, place(mesh), CHIP, Compiler(said("lora")))
    split = 2 * mesh.fsdp
    base, cfg = found.residents["base"], MODEL.cfg
    assert base == pytest.approx(4 * n_params(cfg) / split, rel=0.1)
    adapters = n_adapter_params(cfg, lora.config)
    assert found.residents["KL reference"] == pytest.approx(4 * adapters / 2, rel=0.6)
    assert found.residents["AV state"] < 3.2 * found.residents["KL reference"] + 100
    rows = {row.name: row for row in found.rows}
    assert (rows["re-layout"].sent["all-gather"] > 0) == (mesh.fsdp > 1)
    # Fewer FLOPs by the products that would give the frozen weights' gradients.
    full = {p.name: p.work for p in joint_rl(dataclasses.replace(RL, mesh=mesh), MODEL, place(mesh)).programs}
    for name in ("AV update", "AR update"):
        assert 0.66 < rows[name].work.useful / full[name].useful < 0.75
    assert rows["rollout"].work == full["rollout"]


@pytest.fixture(scope="module")
def compiled(rl_stage, tmp_path_factory):
    """The report, the directory that was written, and what was told."""
    directory, told = tmp_path_factory.mktemp("plan"), []
    return report(rl_stage, place(), CHIP, Compiler(said("k"), directory, told.append)), directory, told


def test_stage_compiles_for_simulated_devices(rl_stage, compiled):
    found, _, told = compiled
    assert found.fits and not found.estimated
    assert found.mesh == {"data": 2, "fsdp": 2, "tensor": 2}
    assert told == [p.name for p in rl_stage.programs]
    for row, program in zip(found.rows, rl_stage.programs, strict=True):
        assert row.needs >= sum(map(tree_bytes, program.given)), row.name
        assert row.work.computed >= row.work.useful > 0 and row.work.moved > 0
        assert set(row.times) == {"compute", "memory", "links"}
    by_name = {row.name: row for row in found.rows}
    assert by_name["AV update"].sent["all-reduce"] > 0
    # The parameters are gathered over fsdp for the sampler.
    assert by_name["re-layout"].sent["all-gather"] > 0
    assert found.step_seconds == sum(r.seconds for r in found.rows if not r.once)


def test_what_was_found_is_kept(rl_stage, compiled, tmp_path):
    found, directory, _ = compiled
    again = Compiler(said("k"), directory, lambda name: pytest.fail(name))
    assert report(rl_stage, place(), CHIP, again) == found
    # Another key is another program, and a file that was cut short is made again.
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text()[:20])
    for key in ("other", "k"):
        told = []
        compiler = Compiler(said(key), tmp_path, told.append)
        assert row_of(rl_stage.programs[1], rl_stage, place(), CHIP, compiler) == found.rows[1]
        assert told == ["re-layout"]


@pytest.mark.parametrize("kind", ["av", "ar"])
def test_warm_start_has_the_typical_and_the_longest_rows(kind):
    stage = warm_start(
        dataclasses.replace(SFT, stage=kind, mesh=MeshSettings(fsdp=0)), MODEL, place(MeshSettings(fsdp=0))
    )
    assert [p.once for p in stage.programs] == [False, True]
    found = report(stage, place(MeshSettings(fsdp=0)), CHIP, Compiler(said(kind)))
    assert found.rows[1].needs > found.rows[0].needs


def test_extraction_on_one_device():
    one = place(MeshSettings(), 1)
    stage = extraction(MODEL, one, dtype="float32", batch_tokens=64, length=32, per_document=4)
    found = report(stage, one, CHIP, Compiler(said("x")))
    assert stage.rows == 64 and found.fits
    assert sum(found.rows[0].sent.values()) == 0
    assert found.rows[0].bound in ("compute", "memory")


def test_least_is_a_lower_bound(rl_stage, compiled):
    assert least_bytes(rl_stage) <= compiled[0].worst.total
    assert report(rl_stage, place(), CHIP, None).worst.total == pytest.approx(least_bytes(rl_stage))


def test_program_that_does_not_compile_leaves_those_after_it_unknown(rl_stage, monkeypatch):
    message = (
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (15.84G) exceeds available HBM (15.75G)."
    )

    class Refused:
        def lower(self, *args, **options):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    programs = tuple(
        dataclasses.replace(p, call=lambda out: Call(Refused(), ())) if p.name == "re-layout" else p
        for p in rl_stage.programs[:3]
    )
    stage = dataclasses.replace(rl_stage, programs=programs)
    found = report(stage, place(), CHIP, Compiler(said("refused")))
    assert not found.fits
    rows = {row.name: row for row in found.rows}
    assert rows["re-layout"].refused and rows["re-layout"].needs == pytest.approx(15.84 * GIB)
    assert rows["rollout"].refused and not rows["KL reference"].refused


def test_refusals_as_compilers_word_them():
    assert refused_bytes("Used 38.60G of 15.75G hbm. Exceeded hbm capacity by 22.85G.") == pytest.approx(38.6 * GIB)
    assert refused_bytes("required for HLO temporaries (512.5M) exceeds available HBM (1.0G)") == 512.5 * 2**20
    assert refused_bytes("INTERNAL: something else") is None


def test_roofline_by_hand():
    work = Work(useful=1e12, computed=4e12, moved=5e10)
    times = roofline(work, {"all-gather": 2e9, "all-reduce": 1e9}, CHIP, 2, "bfloat16")
    assert times == {"compute": 2.0, "memory": 0.5, "links": 0.3}
    assert roofline(work, None, CHIP, 2, "float32") == {"compute": 20.0, "memory": 0.5}
    row = Row("p", False, 1.0, 2.0, False, work, None, times)
    assert (row.bound, row.seconds, row.total) == ("compute", 2.0, 3.0)


# Slices, and the command -------------------------------------------------------------------------------------------


def test_slices():
    one = parse_slice("v5p:2x2x4")
    assert (one.chips, one.chip.name, one.chip.tpu) == (16, "v5p", True)
    assert one.chip.peak("bfloat16") == 459e12 and one.chip.peak("float32") == 459e12 / 6
    assert [s.name for s in larger(parse_slice("v5e:8x8"))] == ["v5e:8x16", "v5e:16x16"]
    for kind, facts in CHIPS.items():
        for name in facts["names"]:
            assert parse_slice(f"{kind}:{name}").name == f"{kind}:{name}"
    assert "nothing was compiled" in (why_not(parse_slice("h100:1x1x8")) or "")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("v5e-32", "v5e:4x8"),
        ("v5e:32", "v5e:4x8"),
        ("v5p:4x8", "v5p:2x4x4"),
        ("h100:8", "h100:1x1x8"),
        ("v9", "v5e:4x8"),
    ],
)
def test_wrong_slice_lists_those_that_work(name, fix):
    with pytest.raises(InputError) as caught:
        parse_slice(name)
    message = str(caught.value)
    assert "4x8" in message or "4x4x4" in message or "1x1x8" in message
    if ":" in name:
        assert fix in message


def nla(*arguments):
    """In a process of its own: the command sets the environment that jax is started with."""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    command = [sys.executable, "-c", "from nla_jax.tools.cli import main; main()", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config=tiny", "--slice", "v5e"], "v5e:1x1"),
        (["--config=tiny"], "--slice"),
        (["--config=tiny", "--slice", "v5e:4x8", "--stage", "sft"], "rl,av,ar,extract"),
        (["--config=qwen2_5_7b_l2", "--slice", "v5e:4x8"], "--config=qwen2_5_7b_l20"),
        (["--config=tiny", "--slice", "h100:1x1x8"], "config.target"),
        (["--config=qwen2_5_7b_l20", "--slice", "h100:1x1x8", "--config.mesh.fdsp=2"], "fsdp"),
        (["--config=qwen2_5_7b_l20", "--flops", "--layer", "28"], "0 to 27"),
    ],
)
def test_bad_input_is_one_line(arguments, says):
    result = CliRunner().invoke(cli.main, ["plan", *arguments], standalone_mode=True)
    assert result.exit_code == 2, result.output
    assert says in result.output and "Traceback" not in result.output
    assert result.output.count("\n") == 1


def test_without_libtpu_says_what_to_install():
    if importlib.util.find_spec("libtpu"):
        pytest.skip("libtpu is installed here")
    done = nla("--config=qwen2_5_7b_l20", "--slice", "v5e:4x8")
    assert done.returncode == 2
    assert "pip install 'jax[tpu]==" in done.stderr and done.stderr.count("\n") == 1


def test_gpu_slices_are_counted_and_say_so(tmp_path):
    out = tmp_path / "plan.json"
    done = nla("--config=qwen2_5_7b_l20", "--slice", "h100:1x1x8", "--search", "--stage", "rl,ar", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert "nothing was compiled" in done.stdout and "no forecast" in done.stdout
    found = json.loads(out.read_text())
    rl, ar = found["stages"]
    assert rl["fits"] and not rl["compiled"] and rl["flags"] == ["--config.rl.mesh.fsdp=4"]
    assert rl["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
    # Both states take 12 bytes a parameter, the reference 2: of 7.6 and 5.4 billion, over 4 chips.
    assert sum(rl["residents"].values()) / GIB == pytest.approx((14 * 7.616 + 12 * 5.449) * 1e9 / 4 / GIB, rel=0.01)
    assert ar["step_samples"] == 256 and ar["hours_of"] == "250,000 pairs"


def test_chip_alone_asks_for_its_smallest_slice(tmp_path):
    out = tmp_path / "plan.json"
    done = nla("--config=qwen2_5_7b_l20", "--slice", "h100", "--search", "--json", str(out))
    assert done.returncode == 0, done.stderr
    (rl,) = json.loads(out.read_text())["stages"]
    # 172 GB of parameters, moments and reference are kept, beside 15 GB that the sampler gathers.
    assert (rl["slice"], rl["flags"]) == ("h100:1x1x4", ["--config.rl.mesh.fsdp=4"])
    assert "h100:1x1x2" in done.stderr


def test_what_does_not_fit_is_told_with_what_to_change():
    done = nla("--config=llama3_3_70b_l53", "--slice", "h100:1x1x1")
    assert done.returncode == 3
    assert "DOES NOT FIT" in done.stdout and "larger slice" in done.stdout
    done = nla("--config=qwen2_5_7b_l20", "--slice", "h100:1x1x8")
    assert "--config.rl.mesh.fsdp=4 may fit" in done.stdout


def test_table_of_savings():
    done = nla("--config=qwen2_5_7b_l20", "--flops")
    assert done.returncode == 0, done.stderr
    assert "without shared prefix" in done.stdout and "(1.5" in done.stdout


def test_other_targets_are_read_from_their_directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    given = [f"--config.target={tmp_path}", "--config=tiny", "--slice", "h100:1x1x2", "--stage", "rl,extract"]
    assert "--layer" in nla(*given).stderr
    done = nla(*given, "--layer", "1")
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout


def test_compiled_survives_json():
    found = Compiled(1.0, False, {"all-gather": 2.0}, [[None, ["data", "fsdp"]], []], 3.0)
    assert Compiled(**json.loads(json.dumps(dataclasses.asdict(found)))) == found


@pytest.mark.slow
def test_real_slice(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu (pip install 'jax[tpu]')")
    config = {**CONFIG, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "plan.json"
    given = [f"--config.target={tmp_path}", "--config=tiny", "--layer", "1", "--no-cache", "--stage", "ar,extract"]
    given += ["--config.compute_dtype=bfloat16", "--config.ar.buckets=(128,)", "--json", str(out)]
    done = nla(*given, "--slice", "v5e:2x4", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    assert done.returncode == 0, done.stderr
    ar, extraction = json.loads(out.read_text())["stages"]
    for stage in (ar, extraction):
        assert stage["compiled"] and stage["fits"]
        assert all(0 < row["needs"] < 2**30 for row in stage["programs"])
    sent = ar["programs"][0]["sent"]
    assert sent["all-gather"] + sent["all-reduce"] > 0
    assert sum(extraction["programs"][0]["sent"].values()) == 0  # every chip has the whole trunk
