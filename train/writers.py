"""Where a run's numbers go: metrics.jsonl and samples.jsonl, TensorBoard files, and wandb when asked.

metrics.jsonl is the record; the rest follows it. What was written after the step that a run goes on from is dropped,
and TensorBoard's files are made anew from what stays, so nothing is there twice.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nla_jax.errors import InputError


def jsonable(value: Any) -> Any:
    """The same as JSON values: tuples become lists, numbers that are not finite null, what is unknown its text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, bool | str | int) or value is None:
        return value
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        return jsonable(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return jsonable(value.tolist()) if hasattr(value, "tolist") else str(value)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; [] where there is none. Lines that are not whole are left out: a process that was
    killed may have left half a line."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class JsonLines:
    """Appends objects that have a "step" to a file. Opened with `upto`, what is of later steps is dropped."""

    def __init__(self, path: Path, upto: int):
        self.rows = [row for row in read_lines(path) if isinstance(row.get("step"), int) and row["step"] <= upto]
        whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
        if not path.is_file() or path.read_bytes() != whole.encode():
            part = path.with_name(f".{path.name}.tmp")
            part.write_text(whole, encoding="utf-8")
            part.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(jsonable(row), ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Event files in `directory`, made anew with `rows`."""

    def __init__(self, directory: Path, rows: list[dict[str, Any]]):
        from tensorboardX import SummaryWriter  # imports protobuf, which takes a while

        shutil.rmtree(directory, ignore_errors=True)
        self._writer = SummaryWriter(str(directory))
        for row in rows:
            self.write(row)
        self._writer.flush()

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in _numbers(row).items():
            # It has no null: what is not a number shows as NaN, in its place.
            value = math.nan if value is None else value
            self._writer.add_scalar(name, value, row["step"], walltime=row.get("time"))
        if any(name.startswith("eval/") for name in row):
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the wandb project `project`; resuming a run goes on with the same one. InputError without wandb."""

    def __init__(self, directory: Path, project: str, name: str, about: Mapping[str, Any]):
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            fix = "pip install wandb, or training without it: metrics.jsonl and TensorBoard hold the same numbers"
            raise InputError("wandb was asked for and is not installed", fix=fix) from None
        remembered = directory / "wandb_id"
        if not remembered.is_file():
            remembered.write_text(f"{name}-{time.time_ns():x}\n", encoding="utf-8")
        run_id = remembered.read_text(encoding="utf-8").strip()
        self._run = wandb.init(
            project=project, name=name, id=run_id, resume="allow", dir=str(directory), config=dict(about)
        )

    def write(self, row: Mapping[str, Any]) -> None:
        values = {name: math.nan if value is None else value for name, value in _numbers(row).items()}
        self._run.log(values, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float | None]:
    kinds = (int, float, type(None))
    return {n: v for n, v in row.items() if n not in ("step", "time") and isinstance(v, kinds)}


class Log:
    """All that is written in `directory` while a run goes on from `step`. With `writes` False (all processes of a run
    but the first) nothing is touched. `about` opens metrics.jsonl, as {"step": 0, "run": about}: a run that has not
    got beyond step 0 and was described otherwise is begun anew.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        about: Mapping[str, Any],
        *,
        name: str,
        tensorboard: bool = True,
        wandb: str | None = None,
        writes: bool = True,
    ):
        self.rows: list[dict[str, Any]] = []
        self._metrics: list[Any] = []
        self._samples: JsonLines | None = None
        if not writes:
            return
        run, metrics = {"step": 0, "run": jsonable(about)}, directory / "metrics.jsonl"
        stays = step > 0 or read_lines(metrics)[:1] == [run]
        lines = JsonLines(metrics, step if stays else -1)
        self.rows = lines.rows
        if not self.rows:
            lines.write(run)
        self._metrics = [lines]
        self._samples = JsonLines(directory / "samples.jsonl", step if stays else -1)
        if tensorboard:
            self._metrics.append(TensorBoard(directory / "tb", self.rows))
        if wandb is not None:
            self._metrics.append(Wandb(directory, wandb, name, about))

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """What was recorded of an evaluation at `step` before this run was resumed."""
        for row in reversed(self.rows):
            if row["step"] == step and any(name.startswith("eval/") for name in row):
                return {name: value for name, value in row.items() if name.startswith("eval/")}
        return None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line, with the time in seconds since 1970."""
        row = jsonable({"step": step, **values, "time": round(time.time(), 3)})
        for writer in self._metrics:
            writer.write(row)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows if self._samples is not None else []:
            assert self._samples is not None
            self._samples.write({"step": step, **row})

    def close(self) -> None:
        for writer in [*self._metrics, *([self._samples] if self._samples is not None else [])]:
            writer.close()
