"""The tables of an evaluation: every number with its interval, n and its controls, on the terminal and as Markdown.

Everything here reads results as `nla eval` writes them to results.json, so that a table can be made from the file alone
(`--beside`, `nla card`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nla_jax.errors import InputError
from nla_jax.tools.tokens import printable

Json = Mapping[str, Any]
RESULTS = "results.json"
FORMAT = "nla_jax.eval"
NONE = "-"
_NAMED = 4  # rows that a note names; of more it says how many
# suite: (heading, what it asks)
SUITES = {
    "fve": ("Variance explained", "how much of the vectors the explanations carry, as the AR reads them"),
    "downstream": ("Downstream", "the AR's vector put back into the target: what its next tokens lose and recover"),
    "retrieval": ("Retrieval", "whether the AR's reading picks the right activation among others"),
    "robustness": ("Robustness of the text", "what is left when the same explanation is put another way"),
    "claims": ("Value of claims", "what leaving out a sentence costs, against a random span of the same length"),
    "agreement": ("Agreement", "which claims recur across samples and neighbouring positions, and what that tells"),
    "best-of-k": ("Best of k", "the sample that the AR ranks first, against the mean of k"),
    "steering": ("Steering", "an edited explanation's change added to the activation, against a random direction"),
}


@dataclass(frozen=True)
class Line:
    """A measured row of a suite (JSON of `evals.result.Row`), its controls, and the same row of another evaluation."""

    row: Json
    controls: tuple[Json, ...] = ()
    beside: Json | None = None


def lines(suite: Json, beside: Json | None = None) -> list[Line]:
    """The rows of a suite in their order, each control beside the measured row of its metric and group.

    A control of a whole metric (no group) whose metric was measured in groups alone stands beside none; it gets a
    line of its own, as does one of another metric. `beside`: the same suite of another evaluation."""
    measured: dict[tuple[str, str], int] = {}
    for i, row in enumerate(suite["rows"]):
        if not row["control"]:
            measured.setdefault((row["metric"], row["group"]), i)
    controls: dict[int, list[Json]] = {}
    placed: set[int] = set()
    for i, row in enumerate(suite["rows"]):
        at = measured.get((row["metric"], row["group"]))
        if row["control"] and at is not None:
            controls.setdefault(at, []).append(row)
            placed.add(i)
    before = {(r["metric"], r["group"], r["control"]): r for r in (beside or {}).get("rows", ())}
    return [
        Line(row, tuple(controls.get(i, ())), before.get((row["metric"], row["group"], row["control"])))
        for i, row in enumerate(suite["rows"])
        if i not in placed
    ]


def suites_of(results: Json, beside: Json | None = None) -> Iterator[tuple[Json, Json | None]]:
    """Each suite and the one of its name in another evaluation."""
    others = {suite["suite"]: suite for suite in (beside or {}).get("suites", ())}
    for suite in results["suites"]:
        yield suite, others.get(suite["suite"])


def heading(name: str) -> tuple[str, str]:
    """A suite's heading and what it asks."""
    return SUITES.get(name, (name, ""))


def denominators(suite: Json) -> list[str]:
    """What each FVE was measured against, once each: "fve_nrm, fve_nrm_greedy: variance_nrm 0.69 (AR sidecar)".

    A metric whose denominators differ from group to group is left out: `part` says them."""
    by_text: dict[str, list[str]] = {}
    several = several_denominators(suite)
    for row in suite["rows"]:
        if row["denominator"] and row["metric"] not in several:
            names = by_text.setdefault(row["denominator"], [])
            if row["metric"] not in names:
                names.append(row["metric"])
    return [f"{', '.join(names)}: {text}" for text, names in by_text.items()]


def parts(suite: Json) -> Callable[[Json], str]:
    """A function of a row: which part of the rows it is of, with its denominator where the metric has several."""
    several = several_denominators(suite)

    def part(row: Json) -> str:
        if row["metric"] not in several or not row["denominator"]:
            return row["group"]
        return f"{row['group']} (denominator: {row['denominator']})".strip()

    return part


def several_denominators(suite: Json) -> set[str]:
    """Metrics whose denominator depends on the group."""
    texts: dict[str, set[str]] = {}
    for row in suite["rows"]:
        if row["denominator"]:
            texts.setdefault(row["metric"], set()).add(row["denominator"])
    return {metric for metric, found in texts.items() if len(found) > 2}


# -- numbers ----------------------------------------------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three decimals; four where those would say nothing, and an exponent where those would not either."""
    if value is None or not math.isfinite(value):
        return NONE
    if 0.0005 <= abs(value) < 1000 or value == 0:
        return f"{value:.3f}"
    return f"{value:.4f}" if 0.00005 <= abs(value) < 1 else f"{value:.2e}"


def interval(row: Json) -> str:
    return "" if row["low"] is None or row["high"] is None else f"[{number(row['low'])}, {number(row['high'])}]"


def estimate(row: Json | None) -> str:
    """ "0.512 [0.480, 0.545]"; the value alone where there is no interval."""
    return NONE if row is None else " ".join(part for part in (number(row["value"]), interval(row)) if part)


def control_text(row: Json) -> str:
    return f"{row['control']} {estimate(row)}"


def name_of(row: Json) -> str:
    """The metric; of a control without a measured row, both."""
    return f"{row['metric']} ({row['control']})" if row["control"] else row["metric"]


def size(row: Json) -> str:
    """ "1000 (200 docs)"."""
    return f"{row['n']}" + (f" ({documents(row)})" if row["documents"] else "")


def documents(row: Json) -> str:
    return f"{row['documents']} doc{'s' if row['documents'] != 1 else ''}"


# -- reading ----------------------------------------------------------------------------------------------------------


def read_results(path: Path, option: str = "--eval") -> dict[str, Any]:
    """results.json, given by its path or by its directory; InputError in one line for anything else."""
    file = path / RESULTS if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "the --out of an nla eval that has ended"
        raise InputError(f"{option} {path}", expected=f"a {RESULTS} of nla eval", got="none", fix=fix) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON", got=error) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        got = found.get("format", "an object of another kind") if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{file}", expected=f"a {RESULTS} of nla eval (format {FORMAT})", got=got)
    if found.get("format_version") != 1:
        raise InputError(f"{file}: format_version", expected=1, got=found.get("format_version"))
    return found


# -- terminal ---------------------------------------------------------------------------------------------------------


def tables(results: Json, beside: Json | None = None) -> Iterator[tuple[Table, list[str]]]:
    """A table for each suite, controls under what they control, with the lines to stand under it."""
    for suite, other in suites_of(results, beside):
        title, _ = heading(suite["suite"])
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title=title, title_justify="left")
        table.add_column("metric", overflow="fold", min_width=14)
        table.add_column("of", overflow="fold", min_width=10)
        table.add_column("value [95% interval]", justify="right", no_wrap=True)
        if beside is not None:
            table.add_column("beside", justify="right", no_wrap=True)
        table.add_column("n (documents)", justify="right", no_wrap=True)
        part = parts(suite)
        for line in lines(suite, other):
            rows = [(line.row, name_of(line.row), part(line.row), line.beside)]
            rows += [(control, "", f"control: {control['control']}", None) for control in line.controls]
            for i, (row, name, of, before) in enumerate(rows):
                cells = [name, of, estimate(row)]
                cells += [estimate(before) if before is not None else ""] if beside is not None else []
                table.add_row(*(Text(printable(text)) for text in (*cells, size(row))), style="dim" if i else "")
        yield table, [printable(text) for text in under(suite)]


def under(suite: Json) -> list[str]:
    """What stands under a suite's table: denominators, notes of rows, notes of the suite."""
    out = [f"denominator of {text}" for text in denominators(suite)]
    by_note: dict[str, dict[str, list[str]]] = {}
    for row in suite["rows"]:
        if row["note"]:
            by_note.setdefault(row["note"], {}).setdefault(name_of(row), []).append(row["group"])
    for note, groups_of in by_note.items():
        names = [
            f"{name} ({len(groups)} rows)" if len(groups) > 1 else ", ".join(part for part in (name, *groups) if part)
            for name, groups in groups_of.items()
        ]
        more = sum(len(groups) for groups in list(groups_of.values())[_NAMED:])
        if len(names) > _NAMED + 1:
            names[_NAMED:] = [f"and {more} more rows"]
        out.append(f"{'; '.join(names)}: {note}")
    return out + list(suite["notes"])


# -- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(results: Json, beside: Json | None = None) -> str:
    """All suites as Markdown: a heading, a table and what stands under it for each, then where the numbers are from."""
    parts = [f"# Evaluation of {cell(models_line(results))}", ""]
    parts += [f"- {name}: {cell(text)}" for name, text in facts(results)]
    parts += [f"- Beside: {cell(models_line(beside))}"] if beside is not None else []
    parts.append("")
    parts += markdown_suites(results, beside)
    return "\n".join(parts).rstrip() + "\n"


def markdown_suites(results: Json, beside: Json | None = None, level: int = 2) -> list[str]:
    """Lines of the suites' headings and tables; also those that were left out."""
    out: list[str] = []
    for suite, other in suites_of(results, beside):
        title, what = heading(suite["suite"])
        out += [f"{'#' * level} {title}", ""] + ([f"{what[:1].upper()}{what[1:]}.", ""] if what else [])
        out += markdown_table(lines(suite, other), parts(suite), beside is not None)
        out += ["", *(f"- {cell(text)}" for text in under(suite)), ""]
    for left in results.get("skipped", ()):
        out += [f"{heading(left['suite'])[0]}: not done, {cell(left['reason'])}.", ""]
    return out


def markdown_table(rows: Sequence[Line], part: Callable[[Json], str], with_beside: bool = False) -> list[str]:
    names = ["metric", "of", "value [95% interval]", *(["beside"] if with_beside else []), "n (documents)", "controls"]
    marks = ["---" if name in ("metric", "of", "controls") else "---:" for name in names]
    out = [f"| {' | '.join(names)} |", f"|{'|'.join(marks)}|"]
    for line in rows:
        cells = [name_of(line.row), part(line.row), estimate(line.row)]
        cells += [estimate(line.beside)] if with_beside else []
        cells += [size(line.row), "; ".join(control_text(c) for c in line.controls)]
        out.append(f"| {' | '.join(cell(text) for text in cells)} |")
    return out


def models_line(results: Json) -> str:
    """ "AV out/av, AR out/ar, target out/target"."""
    names = {"av": "AV", "ar": "AR", "target": "target"}
    given = results.get("models", {})
    return ", ".join(f"{names[k]} {given[k]['given']}" for k in names if k in given)


def facts(results: Json) -> list[tuple[str, str]]:
    """What a reader of any number must know, as (name, text)."""
    data, settings = results.get("data", {}), results.get("settings", {})
    denominator = results.get("fve_nrm_denominator", {})
    aliases = " = ".join(results.get("layer_aliases", {}).values())
    variance, floor = denominator.get("variance_nrm"), denominator.get("constant_predictor_floor")
    out = [("Layer", f"layer_index {results.get('layer_index')}" + (f", output of {aliases}" if aliases else ""))]
    if variance is not None:
        text = f"{variance:.4g} ({denominator.get('source')})"
        text += "" if floor is None else f"; always guessing the mean direction gives {number(floor)}"
        out.append(("Denominator of fve_nrm", text))
    if data:
        path, rows, docs = (data.get(key) for key in ("path", "n", "documents"))
        text = f"{path}, {rows} activations of {docs} documents"
        text += f", split {data['split']}" if data.get("split") else ""
        out.append(("Data", text + (f", sha256 {str(data['hash'])[:16]}" if data.get("hash") else "")))
    seed, resamples = settings.get("seed"), settings.get("resamples")
    out.append(("Intervals", f"95%, bootstrapped by document, {resamples} resamples, seed {seed}"))
    return out


def cell(text: str) -> str:
    """A text for Markdown: one line in which nothing ends a cell or becomes markup."""
    out = " ".join(printable(str(text)).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in ("\\", "`", "*", "|"):
        out = out.replace(mark, f"\\{mark}")
    return out.replace("](", "]\\(")  # no link; brackets alone are intervals
