"""What `nla plan` prints: a table per stage, what follows from it, and everything as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from nla_jax.tools.plan_run import Result
    from nla_jax.train.plan import Report, Row
    from nla_jax.train.plan_slices import Slice
    from nla_jax.train.plan_stage import Model

_GIB, _GB = 2.0**30, 1e9


def stage_table(one: Slice, report: Report) -> Table:
    """One row per program: memory of a chip, work, bytes, seconds and what bounds them."""
    table = _table(f"{report.stage} on {one.name}: {one.chips} chips, {_mesh(report.mesh)}")
    table.add_column("program", no_wrap=True)
    for column in ("GiB", "+ beside", "= total", "PFLOP", "useful", "GB moved", "GB sent", "s", "bound by"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report.rows:
        over = row.refused or row.total > report.hbm
        table.add_row(
            row.name + (" (once)" if row.once else ""),
            f"{row.needs / _GIB:.2f}",
            f"{row.beside / _GIB:.2f}",
            f"{row.total / _GIB:.2f}{' !' if over else ''}",
            f"{row.work.computed / 1e15:.3g}",
            f"{row.work.useful / 1e15:.3g}",
            f"{row.work.moved / _GB:.3g}",
            _sent(row),
            f"{row.seconds:.3g}",
            row.bound,
        )
    return table


def _sent(row: Row) -> str:
    return "-" if row.sent is None or row.refused else f"{sum(row.sent.values()) / _GB:.3g}"


def _by_kind(report: Report) -> str:
    """What programs that send more than a hundredth of the step's bytes do it with."""
    rows = [(row.name, row.sent) for row in report.rows if row.sent and not row.refused]
    least = sum(sum(sent.values()) for _, sent in rows) / 100
    words = []
    for name, sent in rows:
        kinds = sorted(((size, kind) for kind, size in sent.items() if size > least), reverse=True)
        if kinds:
            words.append(f"{name}: " + ", ".join(f"{kind} {size / _GB:.3g}" for size, kind in kinds))
    return "; ".join(words)


def stage_lines(result: Result, hours: tuple[float, str]) -> Iterator[str]:
    """Whether it fits, the step's bound, and on what terms."""
    report, chip = result.report, result.slice.chip
    if result.why is not None:
        yield result.why
    room = f"{chip.hbm / _GIB:.2f} GiB that a chip has"
    held = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in report.residents.items())
    worst = report.worst
    if report.fits:
        least = " at least" if report.estimated else ""
        yield f"fits: {worst.name} needs the most,{least} {worst.total / _GIB:.2f} of the {room}"
    else:
        over = (worst.total - chip.hbm) / _GIB
        if over > 0:
            yield f"DOES NOT FIT: {worst.name} needs {worst.total / _GIB:.2f} GiB, {over:.2f} more than the {room}"
        else:
            yield "DOES NOT FIT: " + ", ".join(row.name for row in report.rows if row.refused)
    yield f"of it kept all the time, in GiB: {held}"
    if kinds := _by_kind(report):
        yield f"GB that a chip sends: {kinds}"
    if not report.fits:
        if result.advice:
            yield f"what to change: {result.advice}"
        return
    if result.flags:
        yield f"type: {' '.join(result.flags)}"
    seconds = report.step_seconds
    rate = report.samples / seconds
    unit = "tokens" if report.stage == "extract" else "samples"
    yield (
        f"a step of {report.samples:,} {unit} takes {seconds:.3g} s or more: at most {rate:.4g} {unit}/s, "
        f"{rate / result.slice.chips:.3g} a chip; {hours[1]} take {hours[0]:.3g} h or more"
    )
    yield (
        "A bound on the speed, no forecast: products at the chip's peak, memory and links at their full rates, each as "
        "if it waited for nothing, and neither the host's work nor evaluations counted"
        + (". What chips send each other is not counted either." if report.estimated else ".")
    )


def as_json(result: Result, hours: tuple[float, str]) -> dict[str, Any]:
    report = result.report
    rows = [
        {**dataclasses.asdict(row), "total": row.total, "seconds": row.seconds, "bound": row.bound}
        for row in report.rows
    ]
    return {
        "stage": report.stage,
        "slice": result.slice.name,
        "chips": result.slice.chips,
        "mesh": report.mesh,
        "hbm": report.hbm,
        "fits": report.fits,
        "compiled": not report.estimated,
        "why_not_compiled": result.why,
        "flags": result.flags,
        "advice": result.advice,
        "residents": report.residents,
        "programs": rows,
        "step_samples": report.samples,
        "step_seconds": report.step_seconds,
        "hours": hours[0],
        "hours_of": hours[1],
    }


def flops_rich(table: dict[str, dict[str, float]]) -> Table:
    """TFLOP per sample of each version, and how many times ours that is."""
    out = _table("TFLOP per sample (extract: GFLOP per token)")
    out.add_column("version", no_wrap=True)
    for stage in table:
        out.add_column(stage, justify="right", no_wrap=True)
    for version in next(iter(table.values())):
        cells = []
        for stage, of in table.items():
            unit = 1e9 if stage == "extract" else 1e12
            ratio = of[version] / of["nla_jax"]
            cells.append(f"{of[version] / unit:.3g}" + (f" ({ratio:.2f}x)" if version != "nla_jax" else ""))
        out.add_row(version, *cells)
    return out


def flops_lines(model: Model, target: str | None) -> list[str]:
    n = model.lengths
    return [
        f"{target}, layer {model.layer} of {model.cfg.n_layers}: prompts of {n.prompt} tokens, marker at {n.marker}; "
        f"responses of {n.response} tokens, AR texts of {n.ar_text}; 8 samples per activation. Matrix products of "
        "useful work only: no padding, nothing recomputed."
    ]


def write_json(found: dict[str, Any], path: str) -> None:
    text = json.dumps(found, indent=1)
    if path == "-":
        click.echo(text)
        return
    Path(path).write_text(text + "\n", encoding="utf-8")
    click.echo(f"wrote {path}", err=True)


def _mesh(shape: dict[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in shape.items())


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
