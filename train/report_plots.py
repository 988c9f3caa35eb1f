"""Line charts of a training report: SVG text to stand inside a page, the same bytes for the same numbers.

Colours are the page's own CSS variables, so a chart follows its light and dark modes. matplotlib knows no variables:
it draws in colours that stand for them, which are replaced afterwards.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

COLOURS = 6
STANDS_FOR = {f"#c0de0{i}": f"var(--c{i})" for i in range(COLOURS)} | {
    "#c0deaa": "var(--ink)",
    "#c0debb": "var(--soft)",
    "#c0decc": "var(--line)",
}
INK, SOFT, _LINE = list(STANDS_FOR)[COLOURS:]
_POINTS = 300  # of a line; more are put together, with a band from the least to the greatest
_MARKED = 40  # a line of so few points shows them
RC: dict[Any, Any] = {
    "svg.hashsalt": "nla",
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.size": 9.0,
    "path.simplify": True,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
}


@dataclass(frozen=True)
class Line:
    """A named series: `steps` int and `values` float, NaN where there is no value. `style` is matplotlib's."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    style: str = "-"

    @property
    def empty(self) -> bool:
        return not np.isfinite(self.values).any()


@dataclass(frozen=True)
class Chart:
    """What is drawn: at most `COLOURS` lines, in the colours c0, c1, ... of their order."""

    title: str
    unit: str  # of the y axis
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    whole: bool = False  # counts
    wide: bool = False


def draw(chart: Chart, name: str) -> str:
    """An <svg> element. `name` makes its ids different from those of the page's other charts."""
    with mpl.rc_context():
        mpl.rcdefaults()  # a matplotlibrc of the user's is for other plots
        mpl.rcParams.update(RC)
        figure = Figure(figsize=(6.2, 3.3) if chart.wide else (4.6, 2.5), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.set_axisbelow(True)
        _scales(axes, chart)
        for i, line in enumerate(chart.lines):
            _draw_line(axes, line, i, _place(chart) if chart.log_x else None)
        axes.set_xlabel("training step (log scale)" if chart.log_x else "training step")
        axes.set_ylabel(chart.unit)
        axes.margins(x=0.02)
        buffer = io.StringIO()
        # Without the date and the program there is nothing in the file but the chart.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return embedded(buffer.getvalue(), name)


def _place(chart: Chart) -> float:
    """Where step 0 stands on a logarithmic axis: somewhat to the left of the first step after it."""
    after = [s for line in chart.lines for s in line.steps[line.steps > 0].tolist()]
    return min(after) / 3 if after else 1.0


def _scales(axes: Axes, chart: Chart) -> None:
    values = np.concatenate([line.values for line in chart.lines] or [np.zeros(0)])
    if chart.log_y and (values[np.isfinite(values)] > 0).any():
        axes.set_yscale("log", nonpositive="mask")
        few = values[values > 0].max() < 300 * values[values > 0].min()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(7, integer=chart.whole, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if chart.whole:
            axes.set_ylim(bottom=0, top=max(1.0, 1.05 * float(np.nanmax(values, initial=0.0))))
    if chart.log_x:
        place = _place(chart)
        axes.set_xscale("log")
        top = max((int(line.steps.max()) for line in chart.lines if len(line.steps)), default=1)
        digits = (1, 3) if top > 60 * place else (1, 2, 5)
        ticks = [float(m * 10**e) for e in range(10) for m in digits if 2 * place < m * 10**e <= top]
        zero = [place] if any((line.steps == 0).any() for line in chart.lines) else []
        axes.set_xticks([*zero, *ticks], minor=False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x <= place * 1.01 else f"{x:.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(False, axis="x", which="minor")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))


def _draw_line(axes: Axes, line: Line, index: int, zero_at: float | None) -> None:
    colour = list(STANDS_FOR)[index % COLOURS]
    steps, values = line.steps.astype(np.float64), line.values
    if len(steps) > _POINTS:
        steps, values, low, high = _binned(steps, values)
        axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if zero_at is not None:
        steps = np.where(steps > 0, steps, zero_at)
    few = np.isfinite(values).sum() <= _MARKED
    marker = "o" if few else "None"
    axes.plot(steps, values, line.style, color=colour, linewidth=1.6, marker=marker, markersize=3.2)


def _binned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean step, mean, least and greatest value of runs of neighbouring points; NaN for runs without a value."""
    edges = np.linspace(0, len(steps), _POINTS + 1).astype(int)[:-1]
    finite = np.isfinite(values)
    n = np.add.reduceat(finite.astype(np.float64), edges)
    some = np.where(n > 0, n, np.nan)
    mean = np.add.reduceat(np.where(finite, values, 0.0), edges) / some
    low = np.minimum.reduceat(np.where(finite, values, np.inf), edges)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), edges)
    width = np.diff([*edges, len(steps)])
    empty = n == 0
    return np.add.reduceat(steps, edges) / width, mean, np.where(empty, np.nan, low), np.where(empty, np.nan, high)


def swatch(line: Line, index: int) -> str:
    """A small sample of a line for a legend."""
    dashes = {"--": "4 2.5", ":": "1.5 2.5", "-.": "5 2 1.5 2"}.get(line.style)
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        f'<svg width="22" height="8" aria-hidden="true"><path d="M1 4H21" stroke="var(--c{index % COLOURS})" '
        f'stroke-width="2"{dash}/></svg>'
    )


_PROLOGUE = re.compile(r"\A.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_STYLE = re.compile(r"<style type=\"text/css\">.*?</style>", re.DOTALL)
_SIZE = re.compile(r"width=\"[\d.]+pt\" height=\"[\d.]+pt\"", re.ASCII)
_USED = re.compile(r"(xlink:href=\"#|url\(#)([^\")]+)")
_ID = re.compile(r" id=\"([^\"]+)\"")
_PLACE = re.compile(r" (?:d|x|y|width|height|transform)=\"[^\"]*\"")
_NUMBER = re.compile(r"-?\d+\.\d+")


def embedded(svg: str, name: str) -> str:
    """matplotlib's file as an element of a page: without its prologue, its style sheet (which would hold for the whole
    page) and names that nothing refers to, in a quarter of the bytes."""
    svg = _STYLE.sub("", _METADATA.sub("", _PROLOGUE.sub("", svg)))
    style = "stroke-linejoin: round; font: 9px var(--sans)"
    svg = _SIZE.sub(f'style="{style}" role="presentation"', svg, count=1)
    svg = svg.replace(style, "\0").replace("font-size: 9px; ", "")
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg).replace("\0", style)
    used = {match[2] for match in _USED.finditer(svg)}
    svg = _ID.sub(lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = _USED.sub(rf"\1{name}-\2", svg)
    svg = _PLACE.sub(lambda place: _NUMBER.sub(lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), place[0]), svg)
    svg = re.sub(r" transform=\"rotate\(-?0 [^\"]*\"", "", svg)
    for colour, variable in STANDS_FOR.items():
        svg = svg.replace(colour, variable)
    # Inside HTML an element needs no namespaces, and `href` no prefix.
    svg = re.sub(r" xmlns(?::xlink)?=\"[^\"]*\"|<!--.*?-->", "", svg, flags=re.DOTALL).replace("xlink:href", "href")
    svg = re.sub(r">\s+<", "><", re.sub(r"[ \n]+(?=[LMz\"])", "", re.sub(r"\s+", " ", svg)))
    return svg.replace("<defs></defs>", "").replace("<defs/>", "").strip()


def line(label: str, points: Sequence[tuple[int, float]], style: str = "-") -> Line:
    """A line from (step, value) pairs, in the order of steps."""
    pairs = sorted(points)
    return Line(label, np.array([s for s, _ in pairs], np.int64), np.array([v for _, v in pairs], np.float64), style)
