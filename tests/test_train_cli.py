"""`nla train` on the command line: a whole stage in a process of its own, and one clear line for what cannot work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import training
import yaml
from training import World

from nla_jax.build import BUILD_FILE
from nla_jax.tools.cli import main
from nla_jax.tools.mini import make_mini


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return training.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def variants(world, tmp_path_factory) -> dict[str, str]:
    """Directories that something is wrong with."""
    place = tmp_path_factory.mktemp("variants")
    found = {"missing": str(place / "nothing here"), "empty": str(place / "empty")}
    (place / "empty").mkdir()
    unbuilt = Path(shutil.copytree(world.store, place / "unbuilt"))
    (unbuilt / BUILD_FILE).unlink()
    full = Path(shutil.copytree(world.store, place / "full"))
    training.build_sets(world, full, (0.3, 0.3, 0.4))
    wide = make_mini(place / "wide", d_model=64, dtype="float32")
    cut = Path(shutil.copytree(world.av, place / "cut"))
    for file in cut.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    edits: dict[str, Any] = {
        "scale": lambda c: c["extraction"].update(injection_scale=99.0),
        "layer": lambda c: c.update(extraction_layer_index=2),
        "template": lambda c: c["prompt_templates"].update(av="Other <concept>{injection_char}</concept>"),
        "no sidecar": None,
    }
    for name, edit in edits.items():
        copy = Path(shutil.copytree(world.av, place / name))
        file = copy / "nla_meta.yaml"
        if edit is None:
            file.unlink()
            continue
        content = yaml.safe_load(file.read_text())
        edit(content)
        file.write_text(yaml.safe_dump(content, allow_unicode=True))
        found[name] = str(copy)
    found["no sidecar"] = str(place / "no sidecar")
    found |= {"unbuilt": str(unbuilt), "full": str(full), "cut": str(cut)}
    return found | {"wide": str(wide.target), "wide av": str(wide.av), "av": str(world.av), "ar": str(world.ar)}


def train(capsys, *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *map(str, args)])
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


@pytest.mark.parametrize(
    ("stage", "assignments", "message"),
    [
        ("rl", {"rl.av": "missing"}, "nothing here"),
        ("rl", {"rl.ar": "missing"}, "nothing here"),
        ("rl", {"rl.av": "empty"}, "empty"),
        ("rl", {"store": "missing"}, "nothing here"),
        ("rl", {"store": "unbuilt"}, "has no training sets.*nla build"),
        ("rl", {"store": "full"}, "no held-out rows.*nla build --fractions .* or eval_store"),
        ("rl", {"rl.av": "ar"}, "expected av, got ar"),
        ("rl", {"rl.ar": "av"}, "expected ar, got av"),
        ("rl", {"rl.av": "wide av"}, "d_model: expected 32"),
        ("rl", {"rl.av": "scale"}, "injection_scale: expected .* got 99"),
        ("rl", {"rl.av": "layer"}, "layer_index: expected 1 .* got 2"),
        ("rl", {"rl.av": "template"}, "av_template: expected"),
        ("rl", {"rl.av": "no sidecar"}, "nla_meta.yaml"),
        ("rl", {"rl.av": "cut"}, "cut"),
        ("rl", {"rl.batch_size": "=4000"}, "config.rl.batch_size: expected at most 184"),
        ("rl", {"rl.replay_arr": "=0.5"}, "replay_arr.*replay_ar"),
        ("rl", {"rl.samples": "=1"}, "config.rl.samples: expected 2 or more"),
        ("rl", {"rl.eval_store": "missing"}, "nothing here"),
        ("ar", {"target": "wide"}, "expected the model that .* was extracted from"),
        ("ar", {"target": "missing"}, "nothing here"),
        ("ar", {"ar.init": "av"}, "expected ar, got av"),
        ("ar", {"ar.buckets": "=4"}, "no ar_sft examples"),
        ("av", {"store": "full"}, "no held-out rows"),
        ("av", {"av.init": "missing"}, "nothing here"),
        ("av", {"av.transforms": "=noise:0.5"}, "config.av.transforms"),
        ("lm", {"lm.corpus": "missing"}, "nothing here"),
        ("lm", {"lm.tokenizer": "empty"}, "empty"),
        ("lm", {"lm.batch_size": "=100000"}, "batch_size: expected at most"),
        ("lm", {"lm.model.vocab_size": "=10"}, "vocab_size: expected at least"),
        ("lm", {"lm.model.model_type": "=mamba"}, "mamba"),
        ("lm", {"lm.model.hidden_size": "=0"}, "hidden_size"),
    ],
)
def test_what_cannot_work_is_one_line(world, variants, stage, assignments, message, tmp_path, capsys):
    config, out = world.config_file(tmp_path / "config.py"), tmp_path / "run"
    values = {k: v[1:] if v.startswith("=") else variants[v] for k, v in assignments.items()}
    code, stdout, err = train(
        capsys, stage, f"--config={config}", "--out", out, *(f"--config.{k}={v}" for k, v in values.items())
    )
    said = [line for line in err.splitlines() if line.startswith("nla: ")]
    assert code == 2 and stdout == "", err
    assert len(said) == 1 and said[0].startswith("nla: error: "), err
    assert re.search(message, said[0]), said[0]
    assert "Traceback" not in err
    assert not (out / stage / "export").exists() and not list(out.rglob("*.tmp*"))
    assert not (out / stage / "metrics.jsonl").exists() or (out / stage / "metrics.jsonl").stat().st_size == 0
    assert not (out / stage / "checkpoints").exists() or not any((out / stage / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("def get_config(:\n", "SyntaxError"),
        ("def get_config():\n    return 3\n", "ConfigDict"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError"),
        ("x = 1\n", "a function get_config"),
    ],
)
def test_configs_that_cannot_be_read(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "config.py").write_text(text)
    code, out, err = train(capsys, "rl", "--config", tmp_path / "config.py", "--out", tmp_path / "run")
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_stage_that_the_one_before_has_not_reached(world, tmp_path, capsys):
    """`rl` of a run without warm starts names the directory it looked for."""
    config = world.config_file(tmp_path / "config.py", rl={"av": None, "ar": None})
    code, _, err = train(capsys, "rl", f"--config={config}", "--out", tmp_path / "run")
    assert code == 2 and str(tmp_path / "run" / "av" / "export" / "av") in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_a_store_taught_anew_is_not_trained_on_as_it_was_built(world, tmp_path, capsys):
    store = Path(shutil.copytree(world.store, tmp_path / "store"))
    notes = training.short_notes(store, world.path / "world")
    fewer = tmp_path / "notes.jsonl"
    fewer.write_text("".join(notes.read_text().splitlines(keepends=True)[:-40]))
    training.nla("teach", store, f"file:{fewer}", "--replace")
    config = world.config_file(tmp_path / "config.py", store=str(store))
    code, _, err = train(capsys, "ar", f"--config={config}", "--out", tmp_path / "run")
    assert code == 2 and "its explanations changed" in err and "nla build --overwrite" in err
    assert not (tmp_path / "run").exists()


def test_a_whole_stage_in_a_process_of_its_own(world, tmp_path):
    """What is written and printed; the same command again does nothing more."""
    config, out = world.config_file(tmp_path / "config.py", av={"eval_rows": 8}), tmp_path / "a run"
    done = training.process("train", "av", f"--config={config}", "--out", out)
    assert done.returncode == 0, done.stderr
    wrote = [line.removeprefix("wrote ") for line in done.stdout.splitlines()]
    assert wrote == [str(out / "av" / "export" / "av"), str(out / "av" / "report.html")]
    names = {p.name for p in (out / "av").iterdir() if not p.name.startswith(".")}
    assert {"metrics.jsonl", "tb", "checkpoints", "export", "report.html", "done.json"} <= names
    first = json.loads((out / "av" / "metrics.jsonl").read_text().splitlines()[0])
    assert "Traceback" not in done.stderr and first
    before = {p: p.read_bytes() for p in (out / "av" / "export").rglob("*") if p.is_file()}
    metrics = (out / "av" / "metrics.jsonl").read_bytes()
    again = training.process("train", "av", f"--config={config}", "--out", out)
    assert again.returncode == 0, again.stderr
    assert (out / "av" / "metrics.jsonl").read_bytes() == metrics
    assert {p: p.read_bytes() for p in before} == before
