"""Tables on the terminal. What models and users wrote is put in as plain text: never markup, never control codes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nla_jax.tools.report import Report, Setup, Tally, tallies
from nla_jax.tools.tokens import printable, visible

if TYPE_CHECKING:
    from nla_jax.pair import Explanation, Scores

PIPED_WIDTH = 120
NONE = "-"


def explanation_table(report: Report) -> Table:
    """One row per explanation: pos (or row), token, |h|, the scores where there is an AR, and the explanation."""
    by_position = report.source is not None
    samples = len({e.sample for e in report.explanations}) > 1
    table = _table()
    table.add_column("pos" if by_position else "row", justify="right", no_wrap=True)
    if by_position:
        table.add_column("token", max_width=18, overflow="fold")
    table.add_column("|h|", justify="right", no_wrap=True)
    if samples:
        table.add_column("#", justify="right", no_wrap=True)
    if report.scored:
        table.add_column("cosine", justify="right", no_wrap=True)
        table.add_column("fve_nrm", justify="right", no_wrap=True)
    table.add_column("explanation", ratio=1, min_width=24, overflow="fold")
    texts = {view.position: view for view in report.tokens}
    for e in report.explanations:
        cells = [Text(str(e.position if by_position else e.row))]
        if by_position:
            view = texts[e.position] if e.position is not None else None
            part = f"({view.part}/{view.parts})" if view and view.parts > 1 else ""
            first = texts[view.position - view.part + 1] if view else None
            cells.append(Text(visible(first.text) + part if first else ""))
        cells.append(Text(norm(e.norm)))
        if samples:
            cells.append(Text(str(e.sample)))
        if report.scored:
            cells += [Text(number(e.cosine)), Text(number(e.fve_nrm))]
        table.add_row(*cells, _explanation(e))
    return table


def score_table(rows: Sequence[int], texts: Sequence[str], scores: Scores) -> Table:
    """One row per text and vector: mse_nrm, cosine, fve_nrm and the beginning of the text."""
    table = _table()
    for name in ("row", "mse_nrm", "cosine", "fve_nrm"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("text", ratio=1, min_width=24, overflow="ellipsis", no_wrap=True)
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        fve = None if scores.fve_nrm is None else float(scores.fve_nrm[i])
        values = [number(float(scores.mse_nrm[i]), 4), number(float(scores.cosine[i])), number(fve)]
        table.add_row(Text(str(row)), *map(Text, values), Text(" ".join(printable(text).split())))
    return table


def summary_lines(report: Report) -> list[str]:
    """Totals per group of positions, and what fve_nrm is measured against."""
    lines = [_tally_line(t) for t in tallies(report)]
    if report.scored:
        lines.append(denominator_line(report.setup))
    return lines


def denominator_line(setup: Setup) -> str:
    """How fve_nrm was computed, with its denominator and the floor of a constant guess."""
    if setup.variance_nrm is None:
        return "fve_nrm: not computed, the variance of the training set is not known (--variance)"
    line = f"fve_nrm = 1 - sum(mse_nrm) / sum(variance), variance {setup.variance_nrm:.4g} ({setup.variance_source})"
    if setup.floor is not None:
        line += f"; always guessing the mean direction gives {setup.floor:.3f}"
    return line


def _tally_line(t: Tally) -> str:
    count = f"n {t.places}" if t.n == t.places else f"n {t.places} ({t.n} samples)"
    scores = [f"cosine {number(t.cosine)}", f"fve_nrm {number(t.fve_nrm)}"] if t.cosine is not None else []
    return ", ".join([f"{t.name}: {count}", *scores, f"failed {t.failed}"])


def show(table: Table, lines: Sequence[str]) -> None:
    """Writes a table and lines to stdout: as wide as the terminal, or 120 columns where it is not one."""
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((PIPED_WIDTH, 40)).columns if terminal else PIPED_WIDTH
    console = Console(width=width, markup=False, emoji=False, highlight=False, force_terminal=terminal)
    with console.capture() as captured:
        console.print(table)
    body = captured.get()
    if not terminal:  # padding at line ends is noise in a file
        body = "\n".join(line.rstrip() for line in body.splitlines()) + "\n"
    click.echo(body + "".join(f"{line}\n" for line in lines), nl=False)


def number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def norm(value: float | None) -> str:
    """An L2 norm with four or so digits, without an exponent from 0.01 to a million."""
    if value is None:
        return NONE
    if not 0.01 <= value < 1e6:
        return f"{value:.3g}"
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2}f}"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", expand=True)


def _explanation(e: Explanation) -> Text:
    # Explanations are paragraphs with empty lines between them, which would tear the table apart.
    body = "\n".join(line.strip() for line in printable(e.text).split("\n") if line.strip())
    if not e.failed:
        return Text(body)
    why = "cut by the length cap" if e.finish_reason == "length" else "no closing tag"
    return Text.assemble((f"[failed: {why}] ", "bold red"), (body, "dim"))
