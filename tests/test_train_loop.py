"""The training loop on a toy: resumed runs equal uninterrupted ones, signals, locks, what is written and shown."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from toy_task import ToyTask

from nla_jax.errors import InputError, NLAError
from nla_jax.train.checkpoint import Checkpoints, abstract
from nla_jax.train.loop import EXIT_STOPPED, Result, run
from nla_jax.train.progress import Progress, summary
from nla_jax.train.stopping import only_run
from nla_jax.train.tally import Tally
from nla_jax.train.writers import JsonLines, jsonable, read_lines

TOY = Path(__file__).with_name("toy_task.py")


def train(out: Path, steps: int = 20, **options: Any) -> tuple[Result, ToyTask]:
    keywords = {key: options.pop(key) for key in ("stop", "wandb") if key in options}
    task = ToyTask(steps, **options)
    return run(task, out, report=False, **keywords), task


def last_state(out: Path) -> tuple[int, list[bytes], dict[str, Any]]:
    with Checkpoints(out / "toy" / "checkpoints") as checkpoints:
        found = checkpoints.restore(abstract(ToyTask().init()), step=10**9)
    assert found is not None
    return found.step, [np.asarray(x).tobytes() for x in jax.tree.leaves(found.state)], found.meta


def lines(out: Path) -> list[dict[str, Any]]:
    """What is compared between runs: all but times."""
    timed = ("time", "steps_per_s", "eval_seconds")
    return [{k: v for k, v in r.items() if k not in timed} for r in read_lines(out / "toy" / "metrics.jsonl")]


def assert_same_run(a: Path, b: Path) -> None:
    assert last_state(a) == last_state(b)
    assert lines(a) == lines(b)
    for name in ("samples.jsonl", "export/toy/w.npy"):
        assert (a / "toy" / name).read_bytes() == (b / "toy" / name).read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps in one go."""
    out = tmp_path_factory.mktemp("whole")
    result, task = train(out)
    assert (result.step, result.reason, result.exit_code) == (20, "finished", 0)
    assert task.seen == list(range(20)) and task.evaluations == [0, 5, 10, 15, 20]
    return out


def events(out: Path) -> list[tuple[str, int]]:
    """(tag, step) of every scalar in the TensorBoard files."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((out / "toy" / "tb").iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            found += [(value.tag, event.step) for value in event.summary.value]
            at += 16 + size
    return found


@pytest.mark.parametrize("at", [1, 7, 10, 19])
def test_stopped_and_resumed_equals_uninterrupted(whole: Path, tmp_path: Path, at: int) -> None:
    first, before = train(tmp_path, stop=lambda step: step == at)
    assert (first.step, first.reason, first.exit_code) == (at, "stopped", EXIT_STOPPED) and not first.exports
    second, after = train(tmp_path)
    assert second.reason == "finished" and second.exports == (tmp_path / "toy" / "export" / "toy",)
    assert before.seen + after.seen == list(range(20))
    assert before.evaluations + after.evaluations == [0, 5, 10, 15, 20]  # none twice
    assert_same_run(tmp_path, whole)
    assert sorted(events(tmp_path)) == sorted(events(whole)) and ("loss", 20) in events(whole)
    assert len(set(events(whole))) == len(events(whole))


def test_what_was_written_after_the_checkpoint_is_dropped(whole: Path, tmp_path: Path) -> None:
    def crash(step: int) -> bool:
        if step == 13:
            raise RuntimeError("as if killed")
        return False

    with pytest.raises(RuntimeError, match="as if killed"):
        train(tmp_path, stop=crash)
    metrics = tmp_path / "toy" / "metrics.jsonl"
    assert lines(tmp_path)[-1]["step"] == 12
    with metrics.open("a") as file:
        file.write('{"step": 13, "lo')  # a line torn by the kill
    _, task = train(tmp_path)
    assert task.seen == list(range(10, 20))
    assert_same_run(tmp_path, whole)
    assert sorted(events(tmp_path)) == sorted(events(whole))


def test_killed_before_the_first_checkpoint(whole: Path, tmp_path: Path) -> None:
    def crash(step: int) -> bool:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(tmp_path, stop=crash)
    _, task = train(tmp_path)
    assert task.seen == list(range(20)) and task.evaluations == [5, 10, 15, 20]  # step 0 stands in metrics.jsonl
    assert_same_run(tmp_path, whole)
    # A run that got no further than that and had other settings leaves nothing behind.
    other = tmp_path / "other"
    with pytest.raises(RuntimeError):
        train(other, stop=crash, seed=9)
    train(other)
    assert_same_run(other, whole)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    train(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "toy" / "export").rglob("*")}
    recorded = lines(tmp_path)
    result, task = train(tmp_path)
    assert result.exit_code == 0 and len(result.exports) == 1 and result.evaluation["eval/loss"] > 0
    assert not task.seen and not task.evaluations and lines(tmp_path) == recorded
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "toy" / "export").rglob("*")}


def test_a_damaged_checkpoint_is_passed_over_aloud(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, stop=lambda step: step == 17)
    state = tmp_path / "toy" / "checkpoints" / "17" / "state"
    array = max(state.rglob("*"), key=lambda f: f.stat().st_size * f.is_file())
    content = bytearray(array.read_bytes())
    content[len(content) // 2] ^= 1
    array.write_bytes(content)
    capsys.readouterr()
    _, task = train(tmp_path)
    error = capsys.readouterr().err
    assert re.search(r"step 17 is not used \(state/.*sha256.*\): going on from step 15\n", error)
    assert task.seen == list(range(15, 20))
    assert_same_run(tmp_path, whole)


def test_settings_that_matter_may_not_change(tmp_path: Path) -> None:
    train(tmp_path, stop=lambda step: step == 3)
    for name, options in (("steps", {"steps": 30}), ("optim.lr", {"optim": {"lr": 0.2}}), ("seed", {"seed": 4})):
        with pytest.raises(NLAError, match=rf"another {name}: expected .* as at step 3, got .*Try: "):
            train(tmp_path, **options)
    result, _ = train(tmp_path, log_every=1, eval_every=10, save_every=0, keep_last=1)
    assert result.reason == "finished"


def test_the_last_and_the_best_checkpoints_stay(tmp_path: Path) -> None:
    evals = {0: -1.0, 3: 0.5, 6: 0.2, 9: math.nan, 12: 0.3, 15: 0.4, 18: 0.6, 20: 0.7}
    _, _ = train(tmp_path, evals=evals, eval_every=3, save_every=0, keep_last=1)
    kept = sorted(int(p.name) for p in (tmp_path / "toy" / "checkpoints").iterdir())
    assert kept == [6, 20]  # step 0 is not trained; 6 was saved for being best though save_every is 0
    row = next(r for r in lines(tmp_path) if r["step"] == 9 and "eval/loss" in r)
    assert row["eval/loss"] is None  # NaN has no JSON


def test_best_evaluated_only_after_saving(tmp_path: Path) -> None:
    # The loader ends at step 10, where a checkpoint has been saved and no evaluation was due.
    result, _ = train(tmp_path, batches=10, eval_every=0, save_every=5, keep_last=1)
    assert (result.step, result.reason) == (10, "finished")
    seal = json.loads((tmp_path / "toy" / "checkpoints" / "10" / "nla_jax.json").read_text())
    assert seal["metrics"]["eval/loss"] == result.evaluation["eval/loss"]


def test_nan_metrics_are_null_and_means_leave_them_out(tmp_path: Path) -> None:
    train(tmp_path, nan_at=(2, 4, 5))
    rows = {r["step"]: r for r in lines(tmp_path) if "loss" in r}
    assert rows[6]["loss"] is None  # both of its steps
    assert rows[4]["loss"] > 0
    for line in (tmp_path / "toy" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_diverged_training_stops_and_keeps_what_was_good(tmp_path: Path) -> None:
    with pytest.raises(NLAError, match=r"diverged: 20 steps in a row were skipped.*step 28.*Try: "):
        train(tmp_path, 60, skip_from=8, eval_every=3, evals={12: 0.0}, keep_last=1)
    # The evaluation at 6 was better than at 3; one at 12 would be best, of a state that is not trusted.
    assert sorted(p.name for p in (tmp_path / "toy" / "checkpoints").iterdir()) == ["6"]
    assert sum(r.get("skipped", 0) for r in lines(tmp_path)) == 20


def test_one_run_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    with only_run(tmp_path / "toy"):
        with pytest.raises(InputError, match=rf"is being trained in by process {os.getpid()} on .*Try: "):
            train(tmp_path)
    assert train(tmp_path, 2)[0].reason == "finished"


def test_wandb_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb was asked for and is not installed. Try: pip install wandb"):
        train(tmp_path, wandb="project")


def test_the_loop_transfers_nothing_by_chance(tmp_path: Path) -> None:
    class Guarded(ToyTask):
        def step(self, state: Any, batch: Any, number: int) -> Any:
            with jax.transfer_guard("allow"):  # its batch; what the loop does with the result is guarded
                return super().step(state, batch, number)

        def evaluate(self, state: Any, number: int) -> Any:
            with jax.transfer_guard("allow"):
                return super().evaluate(state, number)

        def init(self) -> Any:
            with jax.transfer_guard("allow"):
                return super().init()

    with jax.transfer_guard("disallow"):
        assert run(Guarded(6), tmp_path, report=False).step == 6


def test_metrics_are_fetched_one_step_late(tmp_path: Path) -> None:
    order: list[str] = []

    class Value:
        shape, dtype, size = (), np.dtype(np.float32), 1

        def __init__(self, number: int):
            self.number = number

        def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
            order.append(f"fetch {self.number}")
            return np.float32(self.number) * np.ones(())

    class Watched(ToyTask):
        def step(self, state: Any, batch: Any, number: int) -> Any:
            order.append(f"step {number}")
            state, _ = super().step(state, batch, number)
            return state, {"loss": Value(number)}

    run(Watched(4, eval_every=0, save_every=0), tmp_path, report=False)
    assert order == ["step 0", "step 1", "fetch 0", "step 2", "fetch 1", "step 3", "fetch 2", "fetch 3"]


def start(out: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(TOY), str(out), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(out: Path, step: int) -> None:
    give_up = time.monotonic() + 60
    while not any(r["step"] >= step for r in read_lines(out / "toy" / "metrics.jsonl")):
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_75(whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, steps=20, delay=0.1)
    wait_for(tmp_path, 6)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED and json.loads(out)["reason"] == number.name
    step = json.loads(out)["step"]
    assert 6 <= step < 20 and last_state(tmp_path)[0] == step
    assert f"toy: {number.name} at step {step}, saved; the same command goes on from there" in error
    _, task = train(tmp_path)
    assert task.seen == list(range(step, 20))
    assert_same_run(tmp_path, whole)


def test_a_signal_breaks_off_an_evaluation_which_is_made_later(whole: Path, tmp_path: Path) -> None:
    class Slow(ToyTask):
        def evaluate(self, state: Any, number: int) -> Any:
            if number == 10:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            return super().evaluate(state, number)

    began = time.monotonic()
    result = run(Slow(20), tmp_path, report=False)
    assert time.monotonic() - began < 20 and (result.step, result.reason) == (10, "SIGTERM")
    _, task = train(tmp_path)
    assert task.evaluations == [10, 15, 20]
    assert lines(tmp_path) == lines(whole) and last_state(tmp_path)[:2] == last_state(whole)[:2]


def test_kill_9_and_resume(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path, steps=20, delay=0.05)
    wait_for(tmp_path, 14)
    process.kill()
    process.communicate()
    _, task = train(tmp_path)
    assert task.seen[0] in (5, 10) and task.seen == list(range(task.seen[0], 20))
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 400, "save_every": 3, "eval_every": 20, "keep_last": 1, "size": 20_000}
    rng = random.Random(0)
    kills = 0
    while kills < 10:
        process = start(tmp_path / "killed", delay=0.01, **options)
        before = last_step(tmp_path / "killed")
        give_up = time.monotonic() + 60
        while last_step(tmp_path / "killed") <= before + 2 and process.poll() is None:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        kills += 1
    result, task = train(tmp_path / "killed", **options)
    assert result.step == 400 and 0 < task.seen[0] < 400
    train(tmp_path / "whole", **options)
    a, b = (np.load(tmp_path / name / "toy" / "export" / "toy" / "w.npy") for name in ("killed", "whole"))
    assert a.tobytes() == b.tobytes()
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def last_step(out: Path) -> int:
    return max((r["step"] for r in read_lines(out / "toy" / "metrics.jsonl")), default=0)


def test_lines_survive_what_kills_leave(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1, "a": 1}\n{"step": 2}\nnot json\n[1]\n{"step": 3, "a": \xff')
    lines = JsonLines(path, 1)
    lines.write({"step": 2, "a": float("inf"), "b": np.float32(0.5), "c": (1, np.int64(2))})
    lines.close()
    assert path.read_text() == '{"step": 1, "a": 1}\n{"step": 2, "a": null, "b": 0.5, "c": [1, 2]}\n'
    assert jsonable({"p": Path("x"), "n": -math.inf, "t": True, 3: None}) == {"p": "x", "n": None, "t": True, "3": None}


def test_tally() -> None:
    tally = Tally()
    for loss, skipped in ((1.0, 0), (3.0, 1), (math.nan, 1)):
        tally.add({"loss": loss, "skipped": skipped, "lr": loss, "av/parse_failures": 2.0})
    tally = Tally.restore(json.loads(json.dumps(jsonable(tally.state()))))
    assert tally.streak == 2 and tally.totals == {"skipped": 2.0, "av/parse_failures": 6.0}
    line = tally.line()
    assert line["loss"] == 2.0 and line["skipped"] == 2 and line["av/parse_failures"] == 6.0
    assert not tally.line()
    assert tally.is_best(5, 0.1, "max") and not tally.is_best(10, 0.1, "max") and not tally.is_best(10, math.nan, "max")
    assert tally.is_best(15, 0.2, "max") and tally.best == [15, 0.2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_shows_what_went_wrong_and_nothing_where_there_is_no_terminal() -> None:
    text = summary({"reward": -0.5, "loss": 1}, {"eval/fve_nrm": 0.41237}, {"skipped": 3, "bad_vectors": 0}, "eval/x")
    assert text == "reward -0.5, eval fve_nrm 0.4124, skipped 3"
    for stream in (Terminal(), io.StringIO()):
        bar = Progress("rl", 100, 10, stream=stream)
        bar.update(20, text)
        bar.evaluated(20, text, 2.0)
        bar.note("aside")
        bar.close()
        shown = stream.getvalue()
        assert "aside\n" in shown
        if stream.isatty():
            assert "20/100" in shown and "step" in shown
        else:
            assert shown == f"rl step 20/100: {text}, 2 steps/s, 00:40 left\naside\n"
