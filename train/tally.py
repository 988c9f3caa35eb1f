"""What the loop remembers of its steps: means since the last line, counts of what went wrong, the best evaluation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

COUNTS = ("bad_vectors", "skipped", "parse_failures")  # summed, not averaged; shown when over 0
LATEST = ("lr",)  # the last value says more than a mean


@dataclasses.dataclass
class Tally:
    """Saved in checkpoints as JSON, so that a resumed run writes the lines that an uninterrupted one writes.

    `sums`: metric -> [sum of finite values, how many] since the last line; `latest`: of the last step;
    `totals`: counts since step 0; `streak`: steps skipped in a row up to the last; `best`: [step, value]."""

    sums: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    latest: dict[str, float] = dataclasses.field(default_factory=dict)
    totals: dict[str, float] = dataclasses.field(default_factory=dict)
    streak: int = 0
    best: list[float] | None = None

    def add(self, values: Mapping[str, float]) -> None:
        """The metrics of one step."""
        self.latest = dict(values)
        for name, value in values.items():
            total = self.sums.setdefault(name, [0.0, 0])
            if math.isfinite(value):
                total[0] += value
                total[1] += 1
            if is_count(name) and math.isfinite(value):
                self.totals[name] = self.totals.get(name, 0.0) + value
        self.streak = self.streak + 1 if values.get("skipped", 0.0) > 0 else 0

    def line(self) -> dict[str, float]:
        """Means (sums of counts) since the last call; NaN where no value was finite. Begins anew."""
        out = {}
        for name, (total, n) in self.sums.items():
            if name.rpartition("/")[2] in LATEST and name in self.latest:
                out[name] = self.latest[name]
            elif is_count(name):
                out[name] = total
            else:
                out[name] = total / n if n else math.nan
        self.sums = {}
        return out

    def is_best(self, step: int, value: Any, mode: str) -> bool:
        """Whether an evaluation is better than all before; remembers it if so."""
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        if self.best is not None and (value <= self.best[1] if mode == "max" else value >= self.best[1]):
            return False
        self.best = [step, float(value)]
        return True

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Tally:
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in state.items() if name in names})


def is_count(name: str) -> bool:
    return name.rpartition("/")[2] in COUNTS
