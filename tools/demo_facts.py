"""The table of facts by kind: how often they are said, how often that is true, and what could have been read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nla_jax.tools.demo_examples import number, percent, text

_WIDTH, _HEIGHT, _EDGE = 190, 20, 7  # of a kind's picture, and its margin left and right


def facts_section(results: Mapping[str, Any]) -> list[str]:
    """The section of the page."""
    before, after, probes = results["before"], results["after"], results["probes"]
    rows = [_row(kind, before["facts"][kind], found, probes.get(kind)) for kind, found in after["facts"].items()]
    rows.append(_row("all kinds", before["overall"], after["overall"], None))
    low, high = (after["true"][name] for name in ("low", "high"))
    note = (
        f"FVE alone can hide that nothing is understood, so this counts what is true. Of {after['overall']['stated']} "
        f"facts stated after training, {percent(after['true']['value'])} are true of their story (95%: {percent(low)} "
        f"to {percent(high)}); beside other stories the same explanations would be right in "
        f"{percent(after['overall']['chance'])}. A linear probe says how often the fact can be read from the vector "
        "at all, where the text read so far has told it; what the target does not keep in mind no explanation can know."
    )
    head = "".join(
        f"<th{kind}>{name}</th>"
        for name, kind in (
            ("fact", ""),
            (f"true when said, 0 to 100%{_legend()}", ' class="key"'),
            ("said", ' class="n"'),
            ("true when said", ' class="n"'),
            ("by chance", ' class="n"'),
            ("said and true", ' class="n"'),
            ("linear probe", ' class="n"'),
        )
    )
    table = f'<table class="kinds"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return [
        '<h2 id="facts">Is it true?</h2>',
        f'<p class="note">{text(note)}</p>',
        f'<div class="scroll">{table}</div>',
    ]


def _row(kind: str, before: Mapping[str, Any], after: Mapping[str, Any], probe: Mapping[str, Any] | None) -> str:
    cells = [
        _arrow(before["said"], after["said"]),
        f"{_arrow(before['true'], after['true'])} <small>of {after['stated']}</small>",
        percent(after["chance"]),
        _arrow(before["coverage"], after["coverage"]),
        "" if probe is None else f"{percent(probe['accuracy'])} <small>guess {percent(probe['majority'])}</small>",
    ]
    main = ' class="main"' if probe is None else ""
    numbers = "".join(f'<td class="n">{cell}</td>' for cell in cells)
    picture = _picture(before["true"], after["true"], after["chance"], None if probe is None else probe["accuracy"])
    return f'<tr{main}><th scope="row">{text(kind)}</th><td class="key">{picture}</td>{numbers}</tr>'


def _arrow(before: float | None, after: float | None) -> str:
    return f'<span class="was">{percent(before)} →</span> {percent(after)}'


def _picture(before: float | None, after: float | None, chance: float | None, probe: float | None) -> str:
    """The same numbers as the row's on a line from 0 to 1. Shapes differ, not only colours."""
    y = _HEIGHT / 2
    ends = f'<path class="track" d="M{_EDGE} {y}H{_WIDTH - _EDGE}"/>'
    between = ""
    if before is not None and after is not None:
        between = f'<path class="span" d="M{_x(before)} {y}H{_x(after)}"/>'
    marks = [
        _tick(chance),
        _diamond(probe),
        "" if before is None else f'<circle class="first" cx="{_x(before)}" cy="{y}" r="4"/>',
        "" if after is None else f'<circle class="last" cx="{_x(after)}" cy="{y}" r="4.5"/>',
    ]
    return _svg(_WIDTH, ends + between + "".join(marks))


def _x(value: float) -> str:
    return number(_EDGE + (_WIDTH - 2 * _EDGE) * value, 1)


def _tick(value: float | None) -> str:
    return "" if value is None else f'<path class="chance" d="M{_x(value)} 3V{_HEIGHT - 3}"/>'


def _diamond(value: float | None) -> str:
    if value is None:
        return ""
    return f'<path class="probe" d="M{_x(value)} {_HEIGHT / 2}m0-6l5 6l-5 6l-5-6z"/>'


def _svg(width: int, inner: str) -> str:
    size = f'viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}"'
    return f'<svg class="dots" {size} aria-hidden="true">{inner}</svg>'


def _legend() -> str:
    y = _HEIGHT / 2
    shapes = {
        "chance": f'<path class="chance" d="M7 3V{_HEIGHT - 3}"/>',
        "before": f'<circle class="first" cx="7" cy="{y}" r="4"/>',
        "after": f'<circle class="last" cx="7" cy="{y}" r="4.5"/>',
        "probe": f'<path class="probe" d="M7 {y}m0-6l5 6l-5 6l-5-6z"/>',
    }
    return (
        '<span class="keys">' + "".join(f"<span>{_svg(14, s)}{name}</span>" for name, s in shapes.items()) + "</span>"
    )
