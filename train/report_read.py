"""What a training report is made of: the lines of metrics.jsonl and samples.jsonl, put in order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nla_jax.train.writers import read_lines

STAGES = ("lm", "ar", "av", "rl")
_NOT_METRICS = ("step", "time")
_LESS_IS_BETTER = ("loss", "mse_nrm", "failed_share")
_MORE_IS_BETTER = ("cosine", "loss_gain")


@dataclass
class Stage:
    """One stage's numbers. `series`: metric -> {step: value}, NaN for null; `steps`: the last one seen; `run`: how the
    run describes itself; `samples`: rows of the first and of the last evaluation."""

    name: str
    path: Path
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    steps: int = 0
    run: dict[str, Any] = field(default_factory=dict)
    samples: list[tuple[int, list[dict[str, Any]]]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.series

    def evaluations(self) -> dict[str, dict[int, float]]:
        return {name: values for name, values in self.series.items() if name.startswith("eval/")}

    def total(self, name: str) -> float:
        """Sum over the run of a count, under its own name or a model's ("av/skipped")."""
        values = [v for metric, s in self.series.items() if _last(metric) == name for v in s.values()]
        return sum(v for v in values if math.isfinite(v))


@dataclass(frozen=True)
class Row:
    """One metric over a run's evaluations: (step, value) of the first, the last and the best; None where unknown."""

    name: str
    first: tuple[int, float] | None
    last: tuple[int, float] | None
    best: tuple[int, float] | None


def read_stage(path: Path) -> Stage:
    """A stage from its directory; empty where there is nothing to read. Later lines of one step replace earlier."""
    stage = Stage(path.name, path)
    for row in _lines(path / "metrics.jsonl"):
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            continue
        if isinstance(row.get("run"), Mapping):
            stage.run = dict(row["run"])
        for name, value in row.items():
            if name not in _NOT_METRICS and (number := _number(value)) is not None:
                stage.series.setdefault(name, {})[step] = number
                stage.steps = max(stage.steps, step)
    stage.samples = _first_and_last(_lines(path / "samples.jsonl"))
    return stage


def read_run(run_dir: Path) -> tuple[Stage | None, list[Stage]]:
    """The stage that a report is about, and the others beside it in the order they are trained.

    `run_dir` is a stage's directory, or the one that holds them: then the last stage that has numbers is meant."""
    if not (run_dir / "metrics.jsonl").is_file():
        inside = [stage for name in STAGES if not (stage := read_stage(run_dir / name)).empty]
        if inside:
            return inside[-1], inside[:-1]
    stage = read_stage(run_dir)
    beside = [read_stage(run_dir.parent / name) for name in STAGES if name != run_dir.name]
    return (None if stage.empty and not stage.samples else stage), [other for other in beside if not other.empty]


def evaluation_rows(stage: Stage) -> list[Row]:
    """A row for each metric of the evaluations, by name."""
    rows = []
    for name, series in sorted(stage.evaluations().items()):
        points = sorted(series.items())
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        best = None
        if finite and (better := _better(name)) is not None:
            # The earliest of equals.
            best = min(finite, key=lambda p: (-p[1] if better == "max" else p[1], p[0]))
        rows.append(Row(name, points[0], points[-1], best))
    return rows


def _better(name: str) -> str | None:
    last = _last(name)
    if last in _LESS_IS_BETTER or last.startswith("mse_nrm"):
        return "min"
    if last in _MORE_IS_BETTER or (last.startswith(("fve", "cosine")) and "shuffled" not in last):
        return "max"
    return None


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _number(value: Any) -> float | None:
    """A metric's value; NaN for null and for what is not finite, None for what is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:  # JSON's integers have no end
        return math.nan


def _first_and_last(rows: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    by_step: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        step = row.get("step")
        if isinstance(step, int) and not isinstance(step, bool) and isinstance(row.get("explanation"), str):
            by_step.setdefault(step, []).append(row)
    return [(step, by_step[step]) for step in sorted({min(by_step), max(by_step)})] if by_step else []


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_lines(path)
    except (OSError, RecursionError):
        return []
