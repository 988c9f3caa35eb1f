"""A run's page: how FVE, losses and all that may go wrong went over training, and explanations before and after.

One HTML file that asks for nothing: no script, no font, no image from elsewhere. Every text is escaped.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nla_jax import __version__
from nla_jax.train.report_charts import brief_charts, fve_charts, other_charts, stage_charts
from nla_jax.train.report_plots import Chart, draw, swatch
from nla_jax.train.report_read import Row, Stage, evaluation_rows, read_run

_SAMPLES = 16
_OPEN = 6  # of them; the others are folded away
_CONTEXT = 320  # characters of the text before the position
_NAMES = {
    "lm": "Target language model",
    "ar": "AR warm start (text to vector)",
    "av": "AV warm start (vector to text)",
    "rl": "Joint reinforcement learning of AV and AR",
}
_COUNTS = {
    "parse_failures": "samples that do not parse",
    "skipped": "updates skipped",
    "bad_vectors": "unusable vectors",
}
_MEANING = {
    "eval/fve_nrm": "share of the variance of directions explained by sampled explanations of held-out vectors",
    "eval/fve_nrm_greedy": "the same, with the likeliest token at each place",
    "eval/fve_nrm_teacher": "the AR on the teacher's texts",
    "eval/fve_nrm_shuffle": "with the claims of each explanation in another order",
    "eval/fve_nrm_drop_quotes": "without quoted words",
    "eval/fve_nrm_noise": "with other capitals and stops",
    "eval/fve_nrm_transformed": "with the training transforms",
    "eval/fve_calibrated_teacher": "what the best affine read-out of that prediction explains",
    "eval/fve_shuffled_teacher": "control: teacher's texts of other documents",
    "eval/fve_shuffled_calibrated_teacher": "control: the same, calibrated; 0 where nothing leaks",
    "eval/cosine_teacher": "cosine of that prediction and the vector",
    "eval/fve_calibrated": "what the best affine read-out of the prediction explains",
    "eval/fve_shuffled": "control: texts of other documents",
    "eval/fve_shuffled_calibrated": "control: the same, calibrated; 0 where nothing leaks",
    "eval/constant_floor": "what always guessing the mean direction gets",
    "eval/cosine": "cosine of prediction and vector",
    "eval/failed_share": "share of samples that do not parse",
    "eval/length": "tokens of an explanation",
    "eval/loss": "held-out loss",
    "eval/loss_shuffled": "control: the loss with vectors of other documents",
    "eval/loss_gain": "what the right vector takes off the loss",
}


def write_report(run_dir: str | Path, out: str | Path) -> None:
    """Writes the page of a stage's directory (or of the directory that holds the stages) to `out`, whole or not at
    all. A run without numbers gets a page that says so."""
    out = Path(out)
    part = out.with_name(f".{out.name}.tmp")
    part.write_bytes(report_page(Path(run_dir)).encode("utf-8", "replace"))
    part.replace(out)


def report_page(run_dir: Path) -> str:
    """The page as text; the same for the same files."""
    run_dir = run_dir.resolve()
    stage, others = read_run(run_dir)
    name = run_dir.name if stage is None else stage.name
    where = (run_dir if stage is None else stage.path).parent.name
    title = f"{_NAMES.get(name, name)}: {where}" if where else _NAMES.get(name, name)
    draw_all = _Drawer()
    if stage is None:
        body = [f'<p class="empty">No numbers yet: {_text(run_dir)} has no metrics.jsonl with a logged step in it.</p>']
    else:
        body = _main(stage, draw_all)
    for other in others:
        body += _beside(other, draw_all)
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8").strip()
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{_text(title)}</title>\n<style>\n{style}\n</style>\n</head>\n<body>",
            f'<header><p class="kicker">Natural language autoencoder, training report, nla_jax {__version__}</p>',
            f"<h1>{_text(title)}</h1></header>",
            *body,
            "</body>\n</html>\n",
        ]
    )


class _Drawer:
    """Charts as figures, each with ids of its own."""

    def __init__(self) -> None:
        self._drawn = 0

    def __call__(self, charts: Iterable[Chart], wide: bool = False) -> str:
        figures = "\n".join(self._figure(chart) for chart in charts)
        return f'<div class="charts{" wide" if wide else ""}">\n{figures}\n</div>' if figures else ""

    def _figure(self, chart: Chart) -> str:
        self._drawn += 1
        legend = "".join(f"<span>{swatch(line, i)}{_text(line.label)}</span>" for i, line in enumerate(chart.lines))
        svg = draw(chart, f"f{self._drawn}")
        return f"<figure><figcaption><b>{_text(chart.title)}</b>{legend}</figcaption>{svg}</figure>"


def _main(stage: Stage, drawn: _Drawer) -> list[str]:
    parts = [_stats(stage)]
    if fve := fve_charts(stage):
        parts += ["<h2>Variance explained on held-out vectors</h2>", drawn(fve, wide=True)]
    parts += _table(stage)
    if charts := stage_charts(stage):
        parts += ["<h2>Training</h2>", drawn(charts)]
    if rest := other_charts(stage):
        parts.append(f"<details><summary>Other metrics ({len(rest)})</summary>{drawn(rest)}</details>")
    return [*parts, *_samples(stage), _run(stage)]


def _beside(stage: Stage, drawn: _Drawer) -> list[str]:
    name = _NAMES.get(stage.name, stage.name)
    table = "".join(_table(stage, heading=False))
    inner = f"<details><summary>Evaluations and settings</summary><div>{table}{_run(stage)}</div></details>"
    return [f"<h2>{_text(name)}, {stage.steps} steps</h2>", drawn(brief_charts(stage)), inner]


def _stats(stage: Stage) -> str:
    stats: list[tuple[str, str, str, bool]] = []
    rows = {row.name: row for row in evaluation_rows(stage)}
    shown = ["eval/fve_nrm", "eval/fve_nrm_greedy", "eval/fve_nrm_teacher", "eval/fve_shuffled_calibrated"]
    for name in shown if "eval/fve_nrm" in rows or "eval/fve_nrm_teacher" in rows else ["eval/loss", "eval/loss_gain"]:
        if (row := rows.get(name)) is not None and row.last is not None and row.first is not None:
            several = row.first[0] != row.last[0]
            stats.append((name, _number(row.last[1]), f"{_number(row.first[1])} at first" if several else "", False))
    stats.append(("steps", str(stage.steps), "", False))
    for name, what in _COUNTS.items():
        if any(metric.rpartition("/")[2] == name for metric in stage.series):
            total = stage.total(name)
            stats.append((what, f"{total:.0f}", "in training", total > 0))
    items = "".join(_stat(*stat) for stat in stats)
    return f'<dl class="stats">{items}</dl>'


def _stat(label: str, value: str, note: str, poor: bool) -> str:
    small = f"<small>{_text(note)}</small>" if note else ""
    kind = ' class="poor"' if poor else ""
    return f"<div{kind}><dt>{_text(label)}</dt><dd>{_text(value)}{small}</dd></div>"


# -- tables -----------------------------------------------------------------------------------------------------------


def _table(stage: Stage, heading: bool = True) -> list[str]:
    rows = evaluation_rows(stage)
    if not rows:
        return ["<h2>Evaluations</h2>", '<p class="empty">None in this run.</p>'] if heading else []
    body = "".join(_table_row(row) for row in rows)
    head = "".join(f'<th class="n">{name}</th>' for name in ("first", "last", "best"))
    table = f'<div class="scroll"><table><thead><tr><th>metric</th>{head}<th></th></tr></thead><tbody>{body}</tbody>'
    return [*(["<h2>Evaluations</h2>"] if heading else []), f"{table}</table></div>"]


def _table_row(row: Row) -> str:
    cells = "".join(f'<td class="n">{_at(point)}</td>' for point in (row.first, row.last, row.best))
    main = ' class="main"' if row.name == "eval/fve_nrm" else ""
    what = _text(_MEANING.get(row.name, ""))
    return f'<tr{main}><th scope="row">{_text(row.name)}</th>{cells}<td class="what">{what}</td></tr>'


def _at(point: tuple[int, float] | None) -> str:
    return "" if point is None else f"{_number(point[1])} <small>step {point[0]}</small>"


def _run(stage: Stage) -> str:
    return settings_table("Settings and data of this run", stage.run) if stage.run else ""


def settings_table(title: str, settings: Mapping[str, Any]) -> str:
    """Nested settings as a folded table of dotted names and values."""
    pairs = _flat("", settings)
    rows = "".join(f'<tr><th scope="row">{_text(name)}</th><td>{_text(value)}</td></tr>' for name, value in pairs)
    table = f'<div class="scroll"><table class="run"><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>{_text(title)}</summary>{table}</details>"


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    else:
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        yield prefix, shown if len(shown) <= 600 else shown[:600] + " …"


# -- samples ----------------------------------------------------------------------------------------------------------


def _samples(stage: Stage) -> list[str]:
    """Explanations of the same held-out rows at the first and the last evaluation, the first rows in their order."""
    if not stage.samples:
        return []
    (first, before), (last, after) = stage.samples[0], stage.samples[-1]
    of_before = {_key(row): row for row in before}
    both = [row for row in after if _key(row) in of_before][:_SAMPLES]
    if first == last or not both:
        shown = [_sample([(last, row)]) for row in after[:_SAMPLES]]
        note = f"The first {len(shown)} of {len(after)} held-out rows at step {last}, not selected."
    else:
        shown = [_sample([(first, of_before[_key(row)]), (last, row)]) for row in both]
        note = f"Sampled at step {first} and at step {last}: the first {len(shown)} held-out rows, not selected."
    parts = ["<h2>Explanations</h2>", f'<p class="note">{note}</p>', _listed(shown[:_OPEN])]
    if more := shown[_OPEN:]:
        parts.append(f"<details><summary>{len(more)} more</summary>{_listed(more)}</details>")
    return parts


def _listed(samples: list[str]) -> str:
    return f'<div class="samples">{"".join(samples)}</div>'


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row.get("row"), row.get("doc")], default=str)


def _sample(versions: list[tuple[int, Mapping[str, Any]]]) -> str:
    row = versions[-1][1]
    context = row.get("context")
    context = context if isinstance(context, str) else ""
    cut = "… " if len(context) > _CONTEXT else ""
    places = [f"{name} {row[name]}" for name in ("row", "doc") if isinstance(row.get(name), int)]
    if len({str(version.get("explanation")) for _, version in versions}) == 1:  # as an AR's, which are the teacher's
        numbers = "".join(_meta(step, version) for step, version in versions)
        sides = f'<div class="after">{numbers}<p class="text">{_said(row)}</p></div>'
    else:
        sides = "".join(
            f'<div class="{kind}">{_meta(step, version)}<p class="text">{_said(version)}</p></div>'
            for kind, (step, version) in zip(("before", "after"), versions, strict=True)
        )
    return (
        f'<article class="sample"><p class="meta">{_text(", ".join(places))}</p>'
        f'<p class="context">{_text(cut + context[-_CONTEXT:])}</p><div class="pair">{sides}</div></article>'
    )


def _meta(step: int, row: Mapping[str, Any]) -> str:
    numbers = [
        f"<span>{name} {_number(value)}</span>"
        for name in ("cosine", "mse_nrm")
        if isinstance(value := row.get(name), int | float) and not isinstance(value, bool)
    ]
    failed = '<span class="badge">does not parse</span>' if row.get("failed") is True else ""
    return f'<p class="meta"><b>step {step}</b>{"".join(numbers)}{failed}</p>'


def _said(row: Mapping[str, Any]) -> str:
    text = row.get("explanation")
    return _text(text.strip() if isinstance(text, str) else "") or "(empty)"


# -- text -------------------------------------------------------------------------------------------------------------


def _number(value: float) -> str:
    """Four digits at most, in a form that lines up; a dash where there is no number."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.3f}" if 0.0005 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
    return text.replace("-", "−")


def _text(value: object) -> str:
    """Text for HTML: escaped, without the control characters that it cannot hold."""
    return html.escape("".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in str(value)))
