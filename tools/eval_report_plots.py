"""Charts of an evaluation's page, from the series of its suites: lines with bands over numbers, bars over names.

They are drawn as the charts of a training report are: SVG text in the page's own colours, the same bytes for the same
numbers.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from nla_jax.train.report_plots import COLOURS, INK, RC, SOFT, STANDS_FOR, embedded, line, swatch

_STYLES = ("-", "--", "-.", ":")
_FEW_TICKS = 9  # a curve of so few points has a tick at each
_LOG_FROM = 50  # times from the least to the greatest x, from which on they are spaced by their ratio
_LOG_Y_FROM = 3000  # the same of y, where every curve is above 0
_GREY = 4  # of the colours c0, c1, ...
_CONTROLS = ("control", "chance", "random", "shuffled", "floor", "baseline", "mean of", "untouched")


BESIDE = ", beside"  # ends the name of what another evaluation found


@dataclass(frozen=True)
class Curve:
    """`x` numbers, or names for bars; `y`, `low`, `high` float64 with NaN where there is nothing."""

    label: str
    x: tuple[float | str, ...]
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def named(self) -> bool:
        return any(isinstance(x, str) for x in self.x)

    @property
    def control(self) -> bool:
        return any(word in self.label.lower() for word in _CONTROLS)

    @property
    def style(self) -> str:
        return ":" if self.label.endswith(BESIDE) else "--" if self.control else "-"


@dataclass(frozen=True)
class Plot:
    """Curves with the same title and axes. `diagonal`: also where y would equal x. `span`: least and greatest value of
    all charts that this one is compared with."""

    title: str
    xlabel: str
    ylabel: str
    curves: tuple[Curve, ...]
    diagonal: bool = False
    span: tuple[float, float] = (0.0, 0.0)

    @property
    def bars(self) -> bool:
        return any(curve.named for curve in self.curves)


def plots(series: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> list[Plot]:
    """The charts of a suite's series: those of one title and the same axes are drawn together, in their order.

    `beside`: the series of another evaluation, whose curves (not its controls) join the charts of their name. What
    cannot be drawn (no finite number, lengths that differ) is left out."""
    joined = dict(series)
    for name, value in (beside or {}).items():
        if name in series and isinstance(value, Mapping):
            label = str(value.get("label") or name)
            if (curve := _curve(label, value)) is not None and not curve.control:
                joined[name + BESIDE] = {**value, "label": label + BESIDE}
    return _plots(joined)


def _plots(series: Mapping[str, Any]) -> list[Plot]:
    groups: dict[tuple[str, str, str, bool], list[tuple[Curve, bool]]] = {}
    for name, value in series.items():
        if isinstance(value, Mapping) and (curve := _curve(name, value)) is not None:
            title, xlabel, ylabel = (str(value.get(key) or "") for key in ("title", "xlabel", "ylabel"))
            diagonal = bool(value.get("diagonal")) or "calibration" in name.lower()
            groups.setdefault((title or name, xlabel, ylabel, curve.named), []).append((curve, diagonal))
    out = []
    for (title, xlabel, ylabel, _), members in groups.items():
        values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve, _ in members])
        span = float(values.min()), float(values.max())
        for first in range(0, len(members), COLOURS):
            part = members[first : first + COLOURS]
            diagonal = any(d for _, d in part) and not part[0][0].named
            out.append(Plot(title, xlabel, ylabel, tuple(curve for curve, _ in part), diagonal, span))
    return out


def _curve(name: str, value: Mapping[str, Any]) -> Curve | None:
    x, y = value.get("x"), value.get("y")
    if not isinstance(x, list) or not isinstance(y, list) or len(x) != len(y):
        return None
    values = [_numbers(value.get(key), len(x)) for key in ("y", "low", "high")]
    if any(isinstance(item, str) for item in x):
        places: list[float | str] = [str(item) for item in x]
    else:
        kept = [i for i, item in enumerate(x) if isinstance(item, int | float) and math.isfinite(item)]
        order = sorted(kept, key=lambda i: x[i])
        places = [float(x[i]) for i in order]
        values = [v[order] for v in values]
    if not np.isfinite(values[0]).any():
        return None
    return Curve(str(value.get("label") or name), tuple(places), *values)


def _numbers(values: Any, n: int) -> np.ndarray:
    if not isinstance(values, list) or len(values) != n:
        return np.full(n, np.nan)
    return np.asarray([v if isinstance(v, int | float) else np.nan for v in values], np.float64)


def legend(plot: Plot) -> list[tuple[str, str]]:
    """(swatch, label) of each curve; none for a single one, which the title names."""
    if len(plot.curves) == 1 and not plot.diagonal:
        return []
    marks = [(swatch(line("", [], "-" if plot.bars else c.style), i), c.label) for i, c in enumerate(plot.curves)]
    return marks + ([(swatch(line("", [], ":"), _GREY), "where both are equal")] if plot.diagonal else [])


def draw(plot: Plot, name: str) -> str:
    """An <svg> element. `name` makes its ids different from those of the page's other charts."""
    with mpl.rc_context():
        mpl.rcdefaults()  # a matplotlibrc of the user's is for other plots
        mpl.rcParams.update(RC)
        count = len({x for curve in plot.curves for x in curve.x})
        height = 0.7 + 0.24 * count * max(1.0, 0.6 * len(plot.curves)) if plot.bars else 2.7
        figure = Figure(figsize=(4.8, min(max(height, 1.3), 9.0)), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.set_axisbelow(True)
        (_bars if plot.bars else _lines)(axes, plot)
        buffer = io.StringIO()
        # Without the date and the program there is nothing in the file but the chart.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return embedded(buffer.getvalue(), name)


def _colour(index: int) -> str:
    return list(STANDS_FOR)[index % COLOURS]


def _lines(axes: Axes, plot: Plot) -> None:
    places = sorted({float(x) for curve in plot.curves for x in curve.x})
    if places[0] > 0 and places[-1] >= _LOG_FROM * places[0]:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(False, axis="x", which="minor")
    if plot.diagonal:
        finite = np.concatenate([places, *(c.y[np.isfinite(c.y)] for c in plot.curves)])
        ends = [float(finite.min()), float(finite.max())]
        axes.plot(ends, ends, ":", color=SOFT, linewidth=1.0)
    for i, curve in enumerate(plot.curves):
        x = np.asarray(curve.x, np.float64)
        if np.isfinite(curve.low).any() and np.isfinite(curve.high).any():
            axes.fill_between(x, curve.low, curve.high, color=_colour(i), alpha=0.18, linewidth=0)
            # A band over one point has no width.
            axes.vlines(x, curve.low, curve.high, color=_colour(i), linewidth=1.0, alpha=0.5)
        axes.plot(x, curve.y, curve.style, color=_colour(i), linewidth=1.6, marker="o", markersize=3.2)
    if len(places) <= _FEW_TICKS:
        axes.set_xticks(places)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    low, high = plot.span
    if low > 0 and high >= _LOG_Y_FROM * low:
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(low / 2, high * 2)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.update_datalim([(places[0], low), (places[0], high)])
        axes.autoscale_view()
        axes.yaxis.set_major_locator(MaxNLocator(6, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlabel(plot.xlabel)
    axes.set_ylabel(plot.ylabel)
    axes.margins(x=0.04)


def _bars(axes: Axes, plot: Plot) -> None:
    names = list(dict.fromkeys(str(x) for curve in plot.curves for x in curve.x))
    at = {name: i for i, name in enumerate(names)}
    width = 0.72 / len(plot.curves)
    for i, curve in enumerate(plot.curves):
        shift = (i - (len(plot.curves) - 1) / 2) * width
        y = np.asarray([at[str(x)] + shift for x in curve.x])
        alpha = 0.45 if curve.control else 0.85
        axes.barh(y, np.nan_to_num(curve.y), height=0.9 * width, color=_colour(i), alpha=alpha, linewidth=0)
        known = np.isfinite(curve.low) & np.isfinite(curve.high)
        axes.hlines(y[known], curve.low[known], curve.high[known], color=INK, linewidth=1.1)
    axes.axvline(0, color=SOFT, linewidth=0.7)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(6, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.set_xlabel(plot.ylabel)
    if plot.xlabel:
        axes.set_ylabel(plot.xlabel)
