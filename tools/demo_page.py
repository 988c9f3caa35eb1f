"""The demo's page: what a miniature NLA learnt, for a reader who has never seen one.

One HTML file that asks for nothing: no script, no font, no image from elsewhere; its links lead to the stages' reports
beside it. Numbers and examples are those of `demo_measure.measure`, the curves those of OUT/rl. Every text is escaped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nla_jax import __version__
from nla_jax.tools.demo_examples import examples, number, percent, share, text
from nla_jax.tools.demo_facts import facts_section
from nla_jax.tools.demo_making import making
from nla_jax.train import report_plots
from nla_jax.train.report_plots import Chart, Line, draw, line, swatch
from nla_jax.train.report_read import Stage, read_stage

_UNIT = "FVE (fve_nrm)"
_CURVES = {  # metric: (label, line style)
    "eval/fve_nrm": ("sampled", "-"),
    "eval/fve_nrm_greedy": ("greedy", "-"),
    "eval/fve_nrm_teacher": ("teacher's notes", "-"),
    "eval/fve_calibrated": ("sampled, calibrated", "--"),
    "eval/fve_shuffled_calibrated": ("wrong pairs, calibrated", ":"),
}
_CHANGES = {
    "shuffle": ("clauses in another order", "a code in the order would not survive it"),
    "drop_quotes": ("quoted words left out", "how much hangs on the quoted word"),
    "noise": (
        "other capitals and stops",
        "hard for it: to the demo's tokenizer words so spelt are strings of bytes",
    ),
}
_LABELS = {"shuffle": "clauses shuffled", "drop_quotes": "quotes dropped", "noise": "case and punctuation"}


def write_page(out: Path, results: Mapping[str, Any]) -> Path:
    """Writes OUT/index.html, whole or not at all, and returns its path. `results`: of `measure`."""
    path = Path(out) / "index.html"
    part = path.with_name(f".{path.name}.tmp")
    part.write_bytes(page(Path(out), results).encode("utf-8", "replace"))
    part.replace(path)
    return path


def page(out: Path, results: Mapping[str, Any]) -> str:
    """The page as text; the same for the same files and results."""
    rl, frozen = read_stage(out / "rl"), read_stage(out / "frozen" / "rl")
    title = f"A miniature NLA, seed {text(results['seed'])}"
    style = "\n".join(
        path.read_text(encoding="utf-8").strip()
        for path in (Path(report_plots.__file__).with_name("report.css"), Path(__file__).with_name("demo_page.css"))
    )
    parts = [
        _opening(results),
        _headline(results),
        '<h2 id="fve">How much of the vectors the texts carry</h2>',
        f'<p class="note">{_fve_note(results)}</p>',
        _figures(_fve_charts(rl, frozen), "a"),
        *examples(results),
        *facts_section(results),
        *_controls(results),
        *_changes(results, rl),
        *making(out, results),
        _footer(results),
    ]
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{title}</title>\n<style>\n{style}\n</style>\n</head>\n<body>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def _opening(results: Mapping[str, Any]) -> str:
    return (
        f'<header><p class="kicker">nla demo, seed {text(results["seed"])}, nla_jax {text(__version__)}</p>'
        "<h1>A miniature natural language autoencoder</h1></header>\n"
        '<div class="lead"><p>A <b>natural language autoencoder</b> (NLA) puts what a language model computes into '
        "words: one model, the <b>AV</b>, turns a vector from inside it into a text, and another, the <b>AR</b>, turns "
        "the text back into a vector. The nearer the second vector comes to the first, the more of it the text said; "
        "the share is the <b>fraction of variance explained</b>, FVE.</p>"
        "<p>This one was made from nothing. The model it explains is a small one that learnt to read stories of an "
        "invented world, where every fact is known, so what the NLA says can be checked. AV and AR first learnt from a "
        "teacher's notes (<b>before</b>); then reinforcement learning trained both together, and all that was "
        "rewarded was how well vectors came back (<b>after</b>). Everything here is of "
        f"{text(results['documents'])} stories that no training saw.</p></div>"
    )


def _headline(results: Mapping[str, Any]) -> str:
    before, after, alone = results["before"], results["after"], results["ar_only"]
    chance = share(after["overall"]["chance"])
    stats = [
        (
            "variance explained (FVE)",
            number(before["fve_nrm"]["value"]),
            number(after["fve_nrm"]["value"]),
            f"95%: {_between(before['fve_nrm'])} → {_between(after['fve_nrm'])}",
        ),
        (
            "stated facts that are true",
            share(before["true"]["value"]),
            share(after["true"]["value"]),
            f"{chance} by chance",
        ),
        ("facts said and true, of all", *_pair(results, "coverage"), "seven facts in each story"),
        ("control: vectors of other stories", "", number(after["shuffled_calibrated"]), "calibrated FVE; should be 0"),
    ]
    if alone is not None:
        gain = alone["gain"]["value"]
        note = f"{number(alone['before']['value'])} → {number(alone['after']['value'])}, the AV kept as it was"
        stats.append(("control: only the AR trained", "", ("+" if gain >= 0 else "") + number(gain), note))
    return f'<dl class="stats">{"".join(_stat(*s) for s in stats)}</dl>'


def _pair(results: Mapping[str, Any], name: str) -> tuple[str, str]:
    return share(results["before"]["overall"][name]), share(results["after"]["overall"][name])


def _stat(label: str, before: str, after: str, note: str) -> str:
    first = f'<span class="was">{text(before)} →</span> ' if before else ""
    return f"<div><dt>{text(label)}</dt><dd>{first}{text(after)}<small>{text(note)}</small></dd></div>"


def _between(found: Mapping[str, float | None]) -> str:
    return f"{number(found['low'])} to {number(found['high'])}"


# -- curves ------------------------------------------------------------------------------------------------------------


def _fve_note(results: Mapping[str, Any]) -> str:
    """What the curves show, and what of the gain is only that samples became surer."""
    before, after = results["before"], results["after"]
    said = (
        f"{results['n']} vectors, {results['documents']} stories, one sampled explanation of each. 1 is every vector "
        f"found again; the variance is {number(results['variance_nrm'])}, of the training vectors at unit scale."
    )
    if before["greedy"] is not None and after["greedy"] is not None:
        greedy, sampled = after["greedy"] - before["greedy"], results["gain"]["value"]
        if sampled > 0 and greedy < 0.5 * sampled:
            said += (
                f" Greedy explanations, the likeliest word at each place, rose by {number(greedy)} only: most of the "
                f"{number(sampled)} that samples gained is that they became surer and more complete, as the greedy "
                "ones were before."
            )
    return text(said)


def _fve_charts(rl: Stage, frozen: Stage) -> list[Chart]:
    lines = _lines(rl, _CURVES)
    if "eval/fve_nrm" in frozen.series:
        lines.append(line("only the AR trained", list(frozen.series["eval/fve_nrm"].items()), "-."))
    charts = [Chart("FVE against training steps", _UNIT, tuple(lines), wide=True)]
    return [*charts, dataclasses.replace(charts[0], title="The same, steps on a logarithmic scale", log_x=True)]


def _lines(stage: Stage, names: Mapping[str, tuple[str, str]]) -> list[Line]:
    drawn = [line(lab, list(stage.series[n].items()), style) for n, (lab, style) in names.items() if n in stage.series]
    return [of for of in drawn if not of.empty]


def _figures(charts: list[Chart], prefix: str) -> str:
    figures = []
    for i, chart in enumerate(charts):
        legend = "".join(f"<span>{swatch(of, k)}{text(of.label)}</span>" for k, of in enumerate(chart.lines))
        caption = f"<figcaption><b>{text(chart.title)}</b>{legend}</figcaption>"
        figures.append(f"<figure>{caption}{draw(chart, f'{prefix}{i}')}</figure>")
    return f'<div class="charts wide">{"".join(figures)}</div>'


# -- tables ------------------------------------------------------------------------------------------------------------


def _controls(results: Mapping[str, Any]) -> list[str]:
    before, after, alone = results["before"], results["after"], results["ar_only"]
    both = [
        ("greedy", "greedy explanations", "the likeliest word at each place instead of a sample"),
        ("calibrated", "sampled, calibrated", "what the best scaling and shift of the AR's vectors would explain"),
        ("teacher", "the teacher's notes through the AR", "whether the AR still reads the language it was taught"),
        (
            "shuffled_calibrated",
            "wrong pairs, calibrated",
            "explanations of other stories' vectors: 0 if nothing leaks",
        ),
        ("shuffled", "wrong pairs, plain", "below 0, since a confident wrong direction is worse than none"),
        ("constant_floor", "always the mean direction", "what explaining nothing gets"),
    ]
    rows = [
        _row(
            *("sampled explanations", _with_interval(before["fve_nrm"]), _with_interval(after["fve_nrm"])),
            "the measure: one sample of each vector, and its 95% interval",
            main=True,
        ),
        *(_row(label, number(before[name]), number(after[name]), what) for name, label, what in both),
    ]
    token = "the mean training vector of the token that is read: what naming that word, and nothing else, would get"
    last_token = number(results["last_token"])
    rows.append(_row("the last token alone", last_token, last_token, token))
    if alone is not None:
        what = f"{alone['steps']} steps with the AV frozen: how much of the gain needs no better explanations"
        rows.append(_row("only the AR trained", _with_interval(alone["before"]), _with_interval(alone["after"]), what))
    rows += [
        _row("samples that do not parse", _tenths(before), _tenths(after), "they count as an orthogonal guess"),
        _row(
            "length, tokens",
            number(before["length"], 1),
            number(after["length"], 1),
            "of an explanation",
        ),
    ]
    head = _head("FVE of held-out vectors", "before", "after")
    return ['<h2 id="controls">Controls</h2>', f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>']


def _changes(results: Mapping[str, Any], rl: Stage) -> list[str]:
    before, after = results["before"], results["after"]
    rows = []
    for name, (label, what) in _CHANGES.items():
        if after["changed"][name] is not None:
            rows.append(_row(label, _changed(before, name), _changed(after, name), what))
    if not rows:
        return []
    note = (
        "The AR reads the explanations after a change that leaves most of their meaning, and FVE shows what the change "
        "takes away, in percent. "
        f"The quoted word is really the last word of the text in {share(before['quote_last'])} of quotations before "
        f"and {share(after['quote_last'])} after; a wrong quotation that FVE nevertheless hangs on may act as a code."
    )
    names = {"eval/fve_nrm": ("untouched", "-")} | {f"eval/fve_nrm_{n}": (of, "-") for n, of in _LABELS.items()}
    chart = Chart("FVE when the texts are changed", _UNIT, tuple(_lines(rl, names)), wide=True)
    head = _head("change", "before", "after")
    table = f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
    return [
        '<h2 id="order">Does it hang on order and quotes?</h2>',
        f'<p class="note">{text(note)}</p>',
        f'<div class="beside">{table}{_figures([chart], "b")}</div>',
    ]


def _head(first: str, *names: str) -> str:
    return (
        f"<thead><tr><th>{text(first)}</th>" + "".join(f'<th class="n">{text(n)}</th>' for n in names) + "</tr></thead>"
    )


def _row(label: str, before: str, after: str, what: str, main: bool = False) -> str:
    """`before` and `after` are HTML."""
    kind = ' class="main"' if main else ""
    first = f'<th scope="row" class="words">{text(label)}<small>{text(what)}</small></th>'
    cells = "".join(f'<td class="n">{cell}</td>' for cell in (before, after))
    return f"<tr{kind}>{first}{cells}</tr>"


def _with_interval(found: Mapping[str, float | None]) -> str:
    return f"{number(found['value'])} <small>{_between(found)}</small>"


def _changed(side: Mapping[str, Any], name: str) -> str:
    return f"{number(side['changed'][name])} <small>{_loss(side['costs'][name])}</small>"


def _loss(cost: float | None) -> str:
    if cost is None:
        return ""
    return f"costs {percent(cost / 100)}" if cost >= 0.5 else "costs nothing" if cost > -0.5 else "gains"


def _tenths(side: Mapping[str, Any]) -> str:
    return percent(side["failed_share"], 1)


def _footer(results: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    said = (
        f"Intervals are of 95%: {results['resamples']} resamples of whole stories. n {results['n']} vectors of "
        f"{results['documents']} stories; seed {results['seed']}; {versions}."
    )
    return f"<footer>{text(said)}</footer>"
