"""A run that was stopped and resumed is the run that was not: every stage, bit for bit. Damage is seen and said."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import training
from safetensors.numpy import load_file, save_file
from training import World, bits, lines, restored

from nla_jax.errors import CheckpointError, InputError
from nla_jax.train.roles import from_checkpoint

STEPS = 20
EVERY = {"steps": STEPS, "log_every": 4, "eval_every": 8, "save_every": 6}
STAGES: dict[str, dict[str, Any]] = {
    "lm": {},
    "ar": {"transforms": [["shuffle", 0.5], ["noise", 0.5]]},
    "av": {},
    "rl": {},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return training.make_world(tmp_path_factory)


class Recorder:
    """A loader that remembers what it gave."""

    def __init__(self, loader: Any):
        self.loader, self.seen = loader, []

    def __next__(self) -> Any:
        batch = next(self.loader)
        self.seen.append(hashlib.sha256(b"".join(np.ascontiguousarray(x) for x in jax.tree.leaves(batch))).hexdigest())
        return batch

    def state(self) -> Any:
        return self.loader.state()

    def restore(self, state: Any) -> None:
        self.loader.restore(state)


def record(task: Any) -> Recorder:
    loader = Recorder(task.loader())
    task.loader = lambda: loader
    return loader


def weights(run_dir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in sorted(run_dir.glob("export/**/*.safetensors"))}


@pytest.mark.parametrize("stage", STAGES)
def test_ten_steps_and_ten_more_are_twenty(world, stage, tmp_path):
    def task() -> Any:
        return world.task(stage, **EVERY, **STAGES[stage])

    a, b = tmp_path / "whole", tmp_path / "halves"
    whole, first, second = task(), task(), task()
    drawn = [record(t) for t in (whole, first, second)]
    result = training.quietly(whole, a)
    assert (result.step, result.reason) == (STEPS, "finished")
    stopped = training.quietly(first, b, stop_at=10)
    assert (stopped.step, stopped.reason, stopped.exit_code) == (10, "stopped", 75)
    assert not (b / stage / "export").exists()
    assert training.quietly(second, b).step == STEPS

    # A stopped run may have drawn a batch that it did not use; what counts is what each step was given.
    assert drawn[0].seen[:STEPS] == drawn[1].seen[:10] + drawn[2].seen[: STEPS - 10]
    assert len(set(drawn[0].seen)) == STEPS
    step_a, state_a, meta_a = restored(task(), a / stage)
    step_b, state_b, meta_b = restored(task(), b / stage)
    assert step_a == step_b == STEPS
    assert bits(state_a) == bits(state_b) and meta_a == meta_b
    assert bits(state_a) != bits(task().init())
    assert lines(a / stage) == lines(b / stage)
    assert weights(a / stage) == weights(b / stage) and weights(a / stage)
    if stage in ("ar", "rl"):
        texts = [(run / stage / "samples.jsonl").read_bytes() for run in (a, b)]
        assert texts[0] == texts[1] and texts[0].count(b"\n") >= 20


def test_the_kl_reference_stays_the_warm_started_av(world, tmp_path):
    world.train("rl", tmp_path, stop_at=3, **{**EVERY, "eval_rows": 0})
    task = world.task("rl", **{**EVERY, "eval_rows": 0})
    given = from_checkpoint("av", str(world.av), world.build()).load("float32")
    training.quietly(task, tmp_path, stop_at=6)
    _, state, _ = restored(world.task("rl", **EVERY), tmp_path / "rl")
    assert bits(task._reference[0]) == bits(given)
    assert bits(state.av.params) != bits(given)
    kl = [row["kl"] for row in lines(tmp_path / "rl") if "kl" in row]
    assert kl and all(value > 0 for value in kl)


def test_another_warm_start_at_the_same_place_is_refused(world, tmp_path):
    """The reference would silently be another model."""
    av = tmp_path / "av"
    shutil.copytree(world.av, av)
    options = {**EVERY, "eval_rows": 0, "av": str(av)}
    world.train("rl", tmp_path / "run", stop_at=2, **options)
    file = next(av.glob("*.safetensors"))
    tensors = {name: 1.01 * value for name, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="another av_weights"):
        world.train("rl", tmp_path / "run", stop_at=4, **options)


def flip(directory: Path) -> Path:
    """One bit in the largest file of a checkpoint."""
    file = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    return file


def test_a_damaged_checkpoint_is_passed_over_and_said(world, tmp_path, capsys):
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    world.train("av", whole, **EVERY)
    world.train("av", damaged, stop_at=14, **EVERY)
    checkpoints = damaged / "av" / "checkpoints"
    assert max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()) == 14
    flip(checkpoints / "14")
    result = training.quietly(world.task("av", **EVERY), damaged, progress=True)
    said = capsys.readouterr().err
    assert "checkpoint of step 14 is not used" in said and "going on from step 12" in said
    assert result.step == STEPS
    assert lines(whole / "av") == lines(damaged / "av")
    assert weights(whole / "av") == weights(damaged / "av")


def test_where_no_checkpoint_is_whole_nothing_is_trained(world, tmp_path):
    world.train("av", tmp_path, stop_at=3, **EVERY)
    for directory in (tmp_path / "av" / "checkpoints").iterdir():
        if directory.name.isdigit():
            flip(directory)
    before = (tmp_path / "av" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        world.train("av", tmp_path, **EVERY)
    assert (tmp_path / "av" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("stage", "changes", "what"),
    [
        ("rl", {"kl_coef": 0.02}, "kl_coef"),
        ("rl", {"replay_ar": 0.0}, "replay_ar"),
        ("av", {"batch_size": 8}, "batch_size"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(world, stage, changes, what, tmp_path):
    options = {**EVERY, "eval_rows": 0}
    world.train(stage, tmp_path, stop_at=2, **options)
    with pytest.raises(CheckpointError, match=f"another {what}"):
        world.train(stage, tmp_path, **{**options, **changes})
    assert world.train(stage, tmp_path, stop_at=3, **options).step == 3


def test_a_loader_s_state_is_of_its_data(world):
    task = world.task("rl")
    state = task.loader().state()
    assert set(state) == {"rl", "ar", "av"} and json.loads(json.dumps(state)) == state
    with pytest.raises(InputError, match="state of the loaders"):
        world.task("rl", replay_av=0.0).loader().restore(state)
    with pytest.raises(InputError, match="state of another loader"):
        world.task("rl", seed=1).loader().restore(state)
    lm = world.task("lm").loader().state()
    with pytest.raises(InputError, match="state of the loader"):
        world.task("lm", seed=1).loader().restore(lm)
