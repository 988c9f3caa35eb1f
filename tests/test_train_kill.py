"""`nla train` in processes that are killed: what is finished in the end is what an undisturbed run writes."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import training
from training import World, bits, command, lines, restored

pytestmark = pytest.mark.slow
STEPS = 40
EVERY = {"steps": STEPS, "log_every": 5, "eval_every": 15, "save_every": 4, "eval_rows": 16}
SECTIONS: dict[str, Any] = {
    "lm": {k: v for k, v in EVERY.items() if k != "eval_rows"},
    "ar": {**EVERY, "transforms": [["shuffle", 0.5], ["noise", 0.5]]},
    "av": EVERY,
    "rl": EVERY,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return training.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def config(world, tmp_path_factory) -> Path:
    return world.config_file(tmp_path_factory.mktemp("config") / "config.py", **SECTIONS)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Any:
    """stage -> the directory of its run; each is run once."""
    done: dict[str, Path] = {}

    def get(stage: str) -> Path:
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp("undisturbed")
            finish(stage, config, done[stage])
        return done[stage] / stage

    return get


def arguments(stage: str, config: Path, out: Path) -> list[str]:
    return command("train", stage, f"--config={config}", "--out", out)


def start(stage: str, config: Path, out: Path) -> subprocess.Popen:
    return subprocess.Popen(arguments(stage, config, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(stage: str, config: Path, out: Path) -> str:
    done = subprocess.run(arguments(stage, config, out), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def steps_of(run_dir: Path) -> list[int]:
    """Steps that have a directory, finished or not."""
    found = run_dir / "checkpoints"
    return sorted(int(p.name) for p in found.iterdir() if p.name.isdigit()) if found.is_dir() else []


def kill_past(running: subprocess.Popen, run_dir: Path, step: int) -> bool:
    """SIGKILL once a checkpoint of that step or a later one is there; False if the run had ended."""
    while running.poll() is None and max(steps_of(run_dir), default=-1) < step:
        time.sleep(0.002)
    return kill(running)


def kill(running: subprocess.Popen) -> bool:
    ended = running.poll() is not None
    running.kill()
    running.communicate()
    return not ended


def assert_same(world: World, stage: str, a: Path, b: Path) -> None:
    """State, loader, tallies, metrics, samples and exports."""
    task = world.task(stage, **SECTIONS[stage])
    (step_a, state_a, meta_a), (step_b, state_b, meta_b) = restored(task, a), restored(task, b)
    assert step_a == step_b == STEPS
    assert bits(state_a) == bits(state_b)
    for key in ("loader", "tally", "evaluation"):
        assert meta_a[key] == meta_b[key], key
    assert lines(a) == lines(b)
    for name in ["samples.jsonl", *(str(p.relative_to(a)) for p in a.glob("export/**/*.safetensors"))]:
        if (a / name).exists():
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("stage", ["lm", "ar", "av", "rl"])
def test_killed_half_way(world, config, undisturbed, stage, tmp_path):
    running = start(stage, config, tmp_path)
    assert kill_past(running, tmp_path / stage, 20), "the run ended before it was killed"
    assert not (tmp_path / stage / "done.json").exists()
    said = finish(stage, config, tmp_path)
    assert "going on from step" in said
    assert_same(world, stage, undisturbed(stage), tmp_path / stage)


@pytest.mark.parametrize("seed", [0])
def test_ten_kills_at_random_moments(world, config, undisturbed, seed, tmp_path):
    """Of the stage that has the most to lose. Some kills come while imports, compilation or evaluation go on, some
    just after a checkpoint's directory has appeared, so that it is not finished."""
    expected, out = undisturbed("rl"), tmp_path / "0"
    rng = random.Random(seed)
    begun = time.monotonic()
    finish("rl", config, tmp_path / "timed")
    seconds = time.monotonic() - begun
    kills, after = 0, []
    while kills < 10:
        running = start("rl", config, out)
        if kills % 2:
            killed = kill_past(running, out / "rl", max(steps_of(out / "rl"), default=0) + 1)
        else:
            time.sleep(rng.uniform(0, 0.9 * seconds))
            killed = kill(running)
        kills += killed
        after.append(max(steps_of(out / "rl"), default=0))
        if not killed:  # it was finished before the tenth: once more from the beginning
            finish("rl", config, out)
            assert_same(world, "rl", expected, out / "rl")
            out = tmp_path / str(kills)
    finish("rl", config, out)
    assert_same(world, "rl", expected, out / "rl")
    assert len(set(after)) > 2, f"the kills came at too few moments: {after}"
    assert not [p for p in (out / "rl").rglob("*") if ".tmp" in p.name or "orbax-checkpoint-tmp" in p.name]


def test_a_signal_is_answered_with_a_checkpoint(world, config, undisturbed, tmp_path):
    running = start("rl", config, tmp_path)
    while running.poll() is None and not steps_of(tmp_path / "rl"):
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 75, said
    assert "the same command goes on from there" in said
    finish("rl", config, tmp_path)
    assert_same(world, "rl", undisturbed("rl"), tmp_path / "rl")


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_newest_checkpoint(world, config, undisturbed, how, tmp_path):
    running = start("rl", config, tmp_path)
    assert kill_past(running, tmp_path / "rl", 17)
    sealed = [s for s in steps_of(tmp_path / "rl") if (checkpoint(tmp_path, s) / "nla_jax.json").exists()]
    newest, before = sealed[-1], sealed[-2]
    files = [p for p in checkpoint(tmp_path, newest).rglob("*") if p.is_file() and p.name != "nla_jax.json"]
    file = max(files, key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    if how == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    elif how == "cut":
        file.write_bytes(content[:-7])
    else:
        file.unlink()
    said = finish("rl", config, tmp_path)
    assert f"checkpoint of step {newest} is not used" in said and f"going on from step {before}" in said
    assert_same(world, "rl", undisturbed("rl"), tmp_path / "rl")


def checkpoint(out: Path, step: int) -> Path:
    return out / "rl" / "checkpoints" / str(step)
