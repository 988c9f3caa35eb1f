"""The page that shows explanations over their text: one HTML file that needs nothing else and asks for nothing.

page.html, page.css and page.js beside this file are put together with the data as JSON. The page builds itself from
the data by text nodes only, so that no text, however hostile, becomes markup.
"""

from __future__ import annotations

import html
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from nla_jax import __version__
from nla_jax.tools.outputs import finite
from nla_jax.tools.report import EARLY, Report, Tally, layer_aliases, tallies

_HERE = Path(__file__).parent
_SETTINGS = ("vectors", "positions", "rows", "samples", "best_of", "temperature", "max_new_tokens", "seed")
_SLOT = re.compile(r"\{\{(title|style|script|data)\}\}")


def write_page(path: Path, report: Report) -> None:
    """Writes the page of a report, UTF-8."""
    path.write_bytes(page(report).encode("utf-8", "replace"))


def page(report: Report) -> str:
    """The page of a report as text."""
    data = page_data(report)
    slots = {
        "title": html.escape(f"{data['title']}: explanations"),
        "style": (_HERE / "page.css").read_text(encoding="utf-8").strip(),
        "script": (_HERE / "page.js").read_text(encoding="utf-8").strip(),
        "data": script_json(data),
    }
    # One pass: a slot's name inside what fills another slot stays what it is.
    return _SLOT.sub(lambda match: slots[match[1]], (_HERE / "page.html").read_text(encoding="utf-8"))


def script_json(value: Any) -> str:
    """JSON that can stand inside a script element: no character in it can end the element or the line."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return text


def page_data(report: Report) -> dict[str, Any]:
    """What page.js reads."""
    setup = report.setup
    by_text = report.source is not None
    place = (lambda e: e.position) if by_text else (lambda e: e.row)
    items = []
    for at, group in groupby(sorted(report.explanations, key=lambda e: (place(e), e.sample)), key=place):
        samples = list(group)
        items.append({"at": at, "norm": samples[0].norm, "samples": [_sample(e) for e in samples]})
    subject = "target" if "target" in setup.models else "av"
    chat = isinstance(report.source, list)
    return {
        "kicker": f"Natural language autoencoder, nla {setup.command}",
        "title": f"{_short(setup.models[subject]['given'])}, layer {_none(setup.layer_index)}",
        "subtitle": _subtitle(report, len(items)),
        "stats": _stats(report),
        "facts": _facts(report),
        "mode": "text" if by_text else "rows",
        "metric": None if not report.scored else "fve_nrm" if setup.variance_nrm is not None else "cosine",
        "early": EARLY,
        "tokens": [[v.text, v.id, int(v.special), v.part, v.parts] for v in report.tokens],
        "messages": [[m.role, m.start, m.end] for m in report.messages] if chat else [],
        "items": items,
    }


def _sample(e: Any) -> dict[str, Any]:
    return {
        "sample": e.sample,
        "text": e.text,
        "failed": e.failed,
        "finish": e.finish_reason,
        "tokens": len(e.token_ids),
        "cosine": e.cosine,
        "mse_nrm": e.mse_nrm,
        "fve_nrm": e.fve_nrm,
    }


def _subtitle(report: Report, places: int) -> str:
    unit = "vector" if report.source is None else "token"
    what = f"{places} {unit}{'s' if places != 1 else ''} explained"
    if report.source is not None:
        what += f" of {len(report.tokens)} in a {'text' if isinstance(report.source, str) else 'chat'}"
    samples = len(report.explanations) // max(places, 1)
    return what + (f", {samples} samples each" if samples > 1 else "")


def _stats(report: Report) -> list[dict[str, Any]]:
    groups = tallies(report)
    failed = sum(t.failed for t in groups)
    total = sum(t.n for t in groups)
    last = {"label": "failed to parse", "value": str(failed), "note": f"of {total}", "poor": failed > 0}
    return [*(stat for t in groups for stat in _scores(t)), last]


def _scores(t: Tally) -> list[dict[str, Any]]:
    if t.cosine is None:
        return []
    count = f"n {t.places}"
    name, value, note = "cosine", t.cosine, count
    if t.fve_nrm is not None:
        name, value, note = "fve_nrm", t.fve_nrm, f"cosine {t.cosine:.3f}, {count}"
    value_text = f"{value:.3f}".replace("-", "−")
    return [{"label": f"{name}, {t.name.replace('>=', '≥')}", "value": value_text, "note": note}]


def _facts(report: Report) -> list[list[str]]:
    setup = report.setup
    rows = [[{"target": "Target", "av": "AV", "ar": "AR"}[k], v["given"]] for k, v in setup.models.items()]
    if setup.layer_index is not None:
        names = " = ".join(layer_aliases(setup.layer_index).values())
        rows.append(["Layer", f"layer_index {setup.layer_index}: output of {names}"])
    if report.scored and setup.variance_nrm is not None:
        floor = "" if setup.floor is None else f"; always guessing the mean direction gives {setup.floor:.3f}"
        rows.append(["fve_nrm denominator", f"{setup.variance_nrm:.4g}, {setup.variance_source}{floor}"])
    elif report.scored:
        rows.append(["fve_nrm denominator", "not known (--variance)"])
    shown = [(name, value) for name, value in setup.settings.items() if name in _SETTINGS and value is not None]
    rows.append(["Settings", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown)])
    rows.append(["Computed on", f"{setup.device}, {setup.dtype}, nla_jax {__version__}"])
    return rows


def _short(name: str) -> str:
    """The last part of a path or hub id."""
    return name.rstrip("/").rsplit("/", 1)[-1] or name


def _none(value: Any) -> str:
    return "unknown" if value is None else str(value)
