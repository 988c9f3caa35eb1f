"""What a suite gives: rows of one table, the data every row can be computed from again, and series to plot."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `metric` is the full name ("fve_nrm", "kl_recovered"), `value` None where it is not defined. `low` and `high` bound
    the 95% interval, bootstrapped by document; None: there is none, and `note` says why. `n` rows (or other units) of
    `documents` documents. `group` is "" for all of them, else which part ("position 50-99"). `control` is "" for what
    is measured, else the control's name ("shuffled pairs"). `denominator` of an FVE: name, value and source.
    """

    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    documents: int = 0
    group: str = ""
    control: str = ""
    denominator: str = ""
    note: str = ""

    def json(self) -> dict[str, Any]:
        return plain(dataclasses.asdict(self))


@dataclass(frozen=True)
class SuiteResult:
    """What one suite found.

    `notes`: what a reader must know, and what was skipped and why. `columns`: per-unit data ([m] or [m, D] arrays, or
    lists), all of one length, enough to compute every row again; written to OUT/<suite>.parquet. `series`: what to
    plot, by name: {"x", "y", "low", "high", "xlabel", "ylabel", "title"}, all JSON.
    """

    suite: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    columns: Mapping[str, np.ndarray | list] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    series: Mapping[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """All but the columns."""
        return {
            "suite": self.suite,
            "settings": plain(dict(self.settings)),
            "notes": list(self.notes),
            "rows": [row.json() for row in self.rows],
            "series": plain(dict(self.series)),
        }


def from_json(found: Mapping[str, Any]) -> SuiteResult:
    """A suite's result as it was written, without its columns."""
    rows = tuple(Row(**row) for row in found["rows"])
    return SuiteResult(
        found["suite"], rows, tuple(found["notes"]), settings=found["settings"], series=found.get("series", {})
    )


def plain(value: Any) -> Any:
    """JSON values: arrays as lists, numpy numbers as Python's, null for NaN and infinity."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
