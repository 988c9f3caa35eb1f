"""What the loop asks of a stage: a task has a state, batches, a step, an evaluation and an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Batches(Protocol):
    def __next__(self) -> Any: ...

    def state(self) -> Mapping[str, Any]:
        """Where the next batch is; JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Task(Protocol):
    """What is trained. `settings` has steps, log_every, eval_every, save_every and keep_last."""

    name: str
    settings: Any
    best: tuple[str, str] | None  # the metric that keep-best follows, and "max" or "min"

    def init(self) -> Any:
        """The state at step 0, a pytree of jax arrays; also the structure and shardings that are restored into."""
        ...

    def loader(self) -> Batches: ...

    def step(self, state: Any, batch: Any, number: int) -> tuple[Any, Mapping[str, Any]]:
        """Step `number`, from 0; donates the state. Metrics may be device scalars that are not computed yet."""
        ...

    def evaluate(self, state: Any, number: int) -> tuple[Mapping[str, float], list[dict[str, Any]]]:
        """Metrics named eval/... after `number` steps, and rows for samples.jsonl."""
        ...

    def export(self, state: Any, directory: Path) -> list[Path]:
        """Writes directory/<role>, replacing its own earlier ones."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Where the run comes from: "settings", hashes of data and initial weights."""
        ...
