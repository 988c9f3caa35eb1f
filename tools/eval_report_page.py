"""The page of an evaluation: one HTML file that asks for nothing, no script, no font, no image from elsewhere.

Each suite has a table (value, 95% interval, n, controls beside the number) and charts of its series. Every text is
escaped.
"""

from __future__ import annotations

import html
from pathlib import Path

from nla_jax import __version__
from nla_jax.tools import eval_report as tables
from nla_jax.tools.eval_report import Json, Line
from nla_jax.tools.eval_report_plots import draw, legend, plots
from nla_jax.train import report_plots
from nla_jax.train.report import settings_table

_HEADLINE = ("fve_nrm", "fve_calibrated", "cosine", "mse_nrm")
_LONG = 24  # rows of a table
_ROLES = {"target": "Target", "av": "AV", "ar": "AR"}


def page(results: Json, beside: Json | None = None) -> str:
    """The page as text; the same for the same results."""
    name = _short(results.get("models", {}).get("av", {}).get("given", "a pair"))
    title = f"Evaluation: {name}, layer {results.get('layer_index')}"
    style = "\n".join(
        path.read_text(encoding="utf-8").strip()
        for path in (Path(report_plots.__file__).with_name("report.css"), Path(__file__).with_name("eval_report.css"))
    )
    drawn = _Drawer()
    sections = [_suite(suite, other, beside is not None, drawn) for suite, other in tables.suites_of(results, beside)]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{_text(title)}</title>\n<style>\n{style}\n</style>\n</head>\n<body>",
            f'<header><p class="kicker">Natural language autoencoder, nla eval {__version__}</p>',
            f"<h1>{_text(title)}</h1></header>",
            _stats(results, beside),
            _facts(results, beside),
            _contents(results),
            *sections,
            _skipped(results),
            _provenance(results),
            "</body>\n</html>\n",
        ]
    )


class _Drawer:
    """Charts as figures, each with ids of its own."""

    def __init__(self) -> None:
        self._drawn = 0

    def __call__(self, suite: Json, other: Json | None) -> str:
        figures = []
        for plot in plots(suite.get("series", {}), (other or {}).get("series")):
            self._drawn += 1
            names = "".join(f"<span>{mark}{_text(label)}</span>" for mark, label in legend(plot))
            caption = f"<figcaption><b>{_text(plot.title)}</b>{names}</figcaption>"
            figures.append(f"<figure>{caption}{draw(plot, f'e{self._drawn}')}</figure>")
        return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def _stats(results: Json, beside: Json | None) -> str:
    """The numbers that a reader looks for first."""
    others = {(r["metric"], r["group"], r["control"]): r for s in (beside or {}).get("suites", ()) for r in s["rows"]}
    shown = []
    for name in _HEADLINE:
        rows = (row for suite in results["suites"] for row in suite["rows"])
        row = next((r for r in rows if (r["metric"], r["group"], r["control"]) == (name, "", "")), None)
        if row is None or row["value"] is None:
            continue
        note = " ".join(part for part in (tables.interval(row), f"n {row['n']}") if part)
        if (before := others.get((name, "", ""))) is not None:
            note += f", beside {tables.number(before['value'])}"
        shown.append(f"<div><dt>{_text(name)}</dt><dd>{_number(row['value'])}<small>{_minus(note)}</small></dd></div>")
    return f'<dl class="stats">{"".join(shown)}</dl>' if shown else ""


def _facts(results: Json, beside: Json | None) -> str:
    rows = [(_ROLES[name], model["given"]) for name, model in results.get("models", {}).items() if name in _ROLES]
    rows += tables.facts(results)
    rows.append(("Computed on", f"{results.get('device')}, {results.get('dtype')}"))
    if beside is not None:
        rows.append(("Beside", tables.models_line(beside)))
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in rows)
    return f'<dl class="facts">{items}</dl>'


def _contents(results: Json) -> str:
    links = (
        f'<a href="#{_id(suite["suite"])}">{_text(tables.heading(suite["suite"])[0])}</a>'
        for suite in results["suites"]
    )
    return f"<nav>{''.join(links)}</nav>"


def _suite(suite: Json, other: Json | None, with_beside: bool, drawn: _Drawer) -> str:
    title, what = tables.heading(suite["suite"])
    names = ["metric", "of", "value", *(["beside"] if with_beside else []), "n", "controls"]
    right = ' class="n"'
    head = "".join(f"<th{right if name in ('value', 'beside', 'n') else ''}>{name}</th>" for name in names)
    rows = tables.lines(suite, other)
    several = tables.several_denominators(suite)
    body = "".join(_row(line, line.row["metric"] in several, with_beside) for line in rows)
    charts = drawn(suite, other)
    long = len(rows) > _LONG  # then the charts say first what it comes to
    under = "".join(f"<li>{_text(text)}</li>" for text in tables.under(suite))
    return "\n".join(
        part
        for part in (
            f'<section id="{_id(suite["suite"])}"><h2>{_text(title)}</h2>',
            f'<p class="note">{_text(what[:1].upper() + what[1:])}.</p>' if what else "",
            charts if long else "",
            f'<div class="scroll"><table class="suite"><thead><tr>{head}</tr></thead>',
            f"<tbody>{body}</tbody></table></div>",
            f'<ul class="under">{under}</ul>' if under else "",
            "" if long else charts,
            "</section>",
        )
        if part
    )


def _row(line: Line, own_denominator: bool, with_beside: bool) -> str:
    row = line.row
    kind = "main" if (row["metric"], row["group"], row["control"]) == ("fve_nrm", "", "") else ""
    kind = "control" if row["control"] else kind
    controls = "".join(_control(control) for control in line.controls)
    if own_denominator and row["denominator"]:
        controls += f"<div>denominator: {_text(row['denominator'])}</div>"
    cells = [
        f'<th scope="row">{_text(tables.name_of(row))}</th><td class="of">{_text(row["group"])}</td>',
        f'<td class="n">{_estimate(row)}</td>',
        f'<td class="n">{_estimate(line.beside)}</td>' if with_beside else "",
        f'<td class="n">{row["n"]}{_documents(row)}</td>',
        f'<td class="controls">{controls}</td>',
    ]
    mark = f' class="{kind}"' if kind else ""
    return f"<tr{mark}>{''.join(cells)}</tr>"


def _control(row: Json) -> str:
    bounds = f" <small>{_minus(tables.interval(row))}</small>"
    return f"<div>{_text(row['control'])} <b>{_number(row['value'])}</b>{bounds}</div>"


def _documents(row: Json) -> str:
    return f" <small>{tables.documents(row)}</small>" if row["documents"] else ""


def _estimate(row: Json | None) -> str:
    if row is None:
        return ""
    return f"{_number(row['value'])} <small>{_minus(tables.interval(row))}</small>"


def _skipped(results: Json) -> str:
    left = results.get("skipped", ())
    if not left:
        return ""
    items = "".join(f"<li>{_text(tables.heading(s['suite'])[0])}: {_text(s['reason'])}</li>" for s in left)
    return f'<section><h2>Not done</h2><ul class="under">{items}</ul></section>'


def _provenance(results: Json) -> str:
    kept = {key: value for key, value in results.items() if key not in ("suites", "skipped")}
    return settings_table("Settings, versions and hashes", kept)


def _short(name: str) -> str:
    """What a path or hub id is told apart by: its last part, or more where that is but a role's name."""
    parts = [part for part in name.rstrip("/").split("/") if part not in ("export", "")]
    if not parts:
        return name
    return "/".join(parts[-3:]) if parts[-1] in ("av", "ar", "target") else parts[-1]


def _id(name: str) -> str:
    return "s-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def _number(value: float | None) -> str:
    return "–" if value is None else _minus(tables.number(value))


def _minus(text: str) -> str:
    return _text(text.replace("-", "−"))


def _text(value: object) -> str:
    """Text for HTML: escaped, without the control characters that it cannot hold."""
    return html.escape("".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in str(value)))
