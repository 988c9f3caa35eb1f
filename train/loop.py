"""The one training loop: what `nla train lm|ar|av|rl` drives, resumable at any moment by the same command.

    OUT/<stage>/metrics.jsonl  samples.jsonl  tb/  checkpoints/  export/  report.html  done.json

Steps are dispatched without waiting for the one before: metrics are fetched a step late, explicitly. All that decides
a step is the state, the loader's position and the step's number, which is what a checkpoint holds.

Exit codes (`Result.exit_code`): 0, finished; 75 (EX_TEMPFAIL), stopped by SIGTERM or SIGINT after saving, run again to
go on; errors are 2, as everywhere. A scheduler may requeue on 75, and on death by a signal.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nla_jax.errors import NLAError
from nla_jax.processes import of_all, of_first
from nla_jax.train.checkpoint import Checkpoints, abstract
from nla_jax.train.progress import Progress, summary
from nla_jax.train.protocol import Task
from nla_jax.train.stopping import Asked, Interrupt, only_run
from nla_jax.train.tally import Tally
from nla_jax.train.writers import Log, jsonable

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
DIVERGED = 20  # steps skipped in a row


@dataclasses.dataclass(frozen=True)
class Result:
    """`reason`: "finished", "stopped" (by `stop`), or the signal's name. `evaluation`: the last one's metrics."""

    step: int
    reason: str
    directory: Path
    exports: tuple[Path, ...] = ()
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        return 0 if self.reason == "finished" else EXIT_STOPPED


def run(
    task: Task,
    out: str | Path,
    *,
    stop: Callable[[int], bool] = lambda step: False,
    tensorboard: bool = True,
    wandb: str | None = None,
    report: bool = True,
    progress: bool = True,
) -> Result:
    """Trains `task` in OUT/<task.name>/ up to `task.settings.steps`, from the newest whole checkpoint there.

    `stop(step)` is asked after every step; where true, the run saves and ends as on SIGTERM. `wandb` is a project's
    name, None for not using it. A loader that ends, ends the run. NLAError where another process trains in the
    directory, where the settings are not those of the run that is resumed (how often things are written may change),
    where no checkpoint is whole, and where training has diverged.
    """
    directory = Path(out) / task.name
    directory.mkdir(parents=True, exist_ok=True)
    with only_run(directory), Interrupt() as interrupt:
        loop = _Loop(task, directory, interrupt, stop, progress)
        try:
            loop.open(tensorboard, wandb)
            reason = loop.train()
        finally:
            loop.close()
        exports: tuple[Path, ...] = ()
        if reason == "finished":
            exports = loop.export()
            if report:
                loop.report()
        else:
            loop.bar.note(f"{task.name}: {reason} at step {loop.step}, saved; the same command goes on from there")
    return Result(loop.step, reason, directory, exports, loop.evaluation)


class _Loop:
    """One run of `run`. `step` counts steps done; `pending` are the metrics of the last one, not fetched yet."""

    def __init__(
        self, task: Task, directory: Path, interrupt: Interrupt, stop: Callable[[int], bool], progress: bool
    ) -> None:
        self.task, self.directory, self.interrupt, self.stop = task, directory, interrupt, stop
        self.settings, self.first = task.settings, jax.process_index() == 0
        self.shown = progress and self.first
        self.bar = Progress(task.name, 0, 0, shown=False)
        self.log: Log | None = None
        self.checkpoints: Checkpoints | None = None
        self.step, self.saved, self.save_due = 0, -1, False
        self.tally = Tally()
        self.pending: Mapping[str, Any] | None = None
        self.last: dict[str, float] = {}  # metrics of the last step that was fetched
        self.evaluation: dict[str, Any] = {}
        self.evaluated = -1  # the step of `evaluation`
        self.clock, self.clocked = time.monotonic(), 0  # when and at which step the rate was last taken
        self.rate: float | None = None

    def open(self, tensorboard: bool, wandb: str | None) -> None:
        """Restores what there is, and opens what is written to."""
        self.about = jsonable(self.task.describe())
        keep = max(1, self.settings.keep_last)
        checkpoints = self.checkpoints = Checkpoints(
            self.directory / "checkpoints", keep_last=keep, best=self.task.best
        )
        self.bar = Progress(self.task.name, self.settings.steps, 0, shown=self.shown)
        self.state, self.loader = self.task.init(), self.task.loader()
        like = abstract(self.state)
        if checkpoints.steps():
            self.state = None  # freed before another is read
        restored = checkpoints.restore(like, settings=self.about.get("settings", {}), note=self.bar.note)
        if restored is not None:
            self.state, self.step = restored.state, restored.step
            self.saved = restored.step
            self.loader.restore(restored.meta["loader"])
            self.tally = Tally.restore(restored.meta["tally"])
            self.evaluation = restored.meta["evaluation"]
            self.bar.close()
            self.bar = Progress(self.task.name, self.settings.steps, self.step, shown=self.shown)
            self.bar.note(f"{self.task.name}: going on from step {self.step} of {self.settings.steps}")
        self.log = Log(
            self.directory,
            self.step,
            self.about,
            name=self.task.name,
            tensorboard=tensorboard,
            wandb=wandb,
            writes=self.first,
        )
        recorded = of_first(self.log.evaluation(self.step))
        if recorded is not None:
            self.evaluation, self.evaluated = recorded, self.step
            self.judge()
        self.clock, self.clocked = time.monotonic(), self.step

    def train(self) -> str:
        """Up to the last step or until asked to stop; the reason it ended."""
        if self.step == 0 or self.evaluation_due():  # also one that a signal broke off
            self.evaluate()
        reason = ""
        while self.step < self.settings.steps:
            reason = self.stopping()
            if reason:
                break
            try:
                batch = next(self.loader)
            except StopIteration:
                break
            self.state, metrics = self.task.step(self.state, batch, self.step)
            self.fetch()
            self.step, self.pending = self.step + 1, metrics
            self.save_due |= self.settings.save_every > 0 and self.step % self.settings.save_every == 0
            if self.evaluation_due():
                self.evaluate()
            if self.save_due:
                self.save_if_sound()
            assert self.checkpoints is not None
            self.checkpoints.poll()
        self.fetch()
        if not reason:
            self.evaluate()
            if self.evaluated != self.step:  # a signal came meanwhile, and it is still to be made
                reason = self.interrupt.signal or "signal"
        if self.step != self.saved and self.step > 0:
            self.save()
        assert self.checkpoints is not None
        self.checkpoints.wait()
        return reason or "finished"

    def evaluation_due(self) -> bool:
        every = self.settings.eval_every
        return self.step == self.settings.steps or (every > 0 and self.step % every == 0)

    def stopping(self) -> str:
        if self.interrupt.asked(self.step):
            return self.interrupt.signal or "signal"
        return "stopped" if self.step > 0 and self.stop(self.step) else ""

    def fetch(self) -> None:
        """Waits for the last step's metrics, if they were not fetched yet."""
        if self.pending is None:
            return
        values = {k: float(np.asarray(v)) for k, v in jax.device_get(dict(self.pending)).items()}
        self.pending, self.last = None, values
        self.tally.add(values)
        text = summary(values, self.evaluation, self.tally.totals, self.judged)
        self.bar.update(self.step, text)
        if self.step % self.settings.log_every == 0 or self.step == self.settings.steps:
            now = time.monotonic()
            self.rate = (self.step - self.clocked) / max(now - self.clock, 1e-9)
            self.clock, self.clocked = now, self.step
            assert self.log is not None
            self.log.write(self.step, {**self.tally.line(), "steps_per_s": self.rate})
        if self.tally.streak >= DIVERGED:
            what = f"{self.task.name}: training has diverged: {self.tally.streak} steps in a row were skipped"
            fix = "a lower lr or a longer warmup, in another directory"
            got = f"gradients that are not finite or over skip_above, up to step {self.step}"
            raise NLAError(what, got=got, fix=fix)

    @property
    def judged(self) -> str | None:
        return self.task.best[0] if self.task.best is not None else None

    def evaluate(self) -> None:
        """Unless it was done at this step, or a signal comes meanwhile."""
        self.fetch()
        if self.evaluated == self.step:
            return
        start = time.monotonic()
        try:
            with self.interrupt.breakable():
                metrics, samples = self.task.evaluate(self.state, self.step)
        except Asked:
            return
        seconds = time.monotonic() - start
        self.clock += seconds  # the rate is that of training
        # Process 0's, in all of them: what is saved, and when, hangs on these numbers.
        self.evaluation = {k: float(v[0]) for k, v in of_all(metrics).items()}
        self.evaluated = self.step
        assert self.log is not None
        self.log.samples(self.step, samples)
        self.log.write(self.step, {**self.evaluation, "eval_seconds": round(seconds, 3)})
        self.judge()
        text = summary(self.last, self.evaluation, self.tally.totals, self.judged)
        self.bar.evaluated(self.step, text, self.rate)

    def judge(self) -> None:
        """An evaluation that is better than all before asks for a checkpoint, that of step 0 excepted."""
        if self.task.best is None or self.step == 0 or self.tally.streak:
            return
        name, mode = self.task.best
        if self.tally.is_best(self.step, self.evaluation.get(name), mode):
            self.save_due = self.saved != self.step
            if not self.save_due and self.checkpoints is not None:
                self.checkpoints.label(self.step, jsonable(self.evaluation))

    def save_if_sound(self) -> None:
        """Saves; while steps are being skipped, later: checkpoints from before the trouble are not to be pushed out."""
        self.fetch()
        if self.tally.streak == 0:
            self.save()

    def save(self) -> None:
        assert self.checkpoints is not None
        meta = {
            "settings": self.about.get("settings", {}),
            "loader": dict(self.loader.state()),
            "tally": self.tally.state(),
            "evaluation": self.evaluation,
        }
        metrics = self.evaluation if self.evaluated == self.step else {}
        start = time.monotonic()
        self.checkpoints.save(self.step, self.state, jsonable(meta), jsonable(metrics))
        self.clock += time.monotonic() - start
        self.saved, self.save_due = self.step, False

    def export(self) -> tuple[Path, ...]:
        """Writes what was trained, unless it was written from this very step before."""
        done = self.directory / "done.json"
        paths: tuple[Path, ...] = ()
        try:
            before = json.loads(done.read_text(encoding="utf-8"))
            paths = tuple(self.directory / name for name in before["exports"])
            if before["step"] != self.step or not all(path.exists() for path in paths):
                paths = ()
        except (OSError, ValueError, TypeError, KeyError):
            pass
        if of_first(bool(paths)):
            return paths
        paths = tuple(Path(path) for path in self.task.export(self.state, self.directory / "export"))
        if self.first:
            names = [os.path.relpath(path, self.directory) for path in paths]
            part = done.with_name(".done.json.tmp")
            part.write_text(json.dumps({"step": self.step, "exports": names}) + "\n", encoding="utf-8")
            part.replace(done)
        return paths

    def report(self) -> None:
        """The run's page; the run is not lost where it cannot be made."""
        if not self.first:
            return
        try:
            from nla_jax.train.report import write_report

            write_report(self.directory, self.directory / "report.html")
        except Exception as error:
            self.bar.note(f"{self.task.name}: no report.html ({type(error).__name__}: {error})")

    def close(self) -> None:
        try:
            if self.checkpoints is not None:
                self.checkpoints.close()
        finally:
            if self.log is not None:
                self.log.close()
            self.bar.close()
