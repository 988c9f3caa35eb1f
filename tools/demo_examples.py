"""Explanations before and after training beside the story that they are about, and how the page writes numbers.

What a reader sees of a stated fact: its colour, and a sign for those who do not see the colour.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

_OPEN = 4  # the others are folded away
_SIGNS = {  # verdict: (sign, class, what a screen reader says)
    "true": ("✓", "yes", "true"),
    "false": ("✗", "no", "false"),
    "quote": ("✓", "yes quoted", "is the last word"),
    "misquote": ("✗", "no quoted", "is not the last word"),
}


def examples(results: Mapping[str, Any]) -> list[str]:
    """The section of the page."""
    found = results["examples"]
    if not found:
        return []
    steps = [results[side]["step"] for side in ("before", "after")]
    cards = [_card(example, steps) for example in found]
    legend = (
        f'<p class="legend"><span>{_mark("fact", "true")} stated and true of the story</span>'
        f"<span>{_mark('fact', 'false')} stated and false</span>"
        f"<span>{_mark('“word”', 'quote')} {_mark('“word”', 'misquote')} quoted: is it the last word read?</span></p>"
    )
    note = (
        f"The first {len(found)} held-out stories, not selected. The model has read what is in bold; the vector is the "
        "one at the marked word. The AV sees that vector alone, nothing of the story."
    )
    parts = [
        '<h2 id="examples">What the explanations say</h2>',
        f'<p class="note">{note}</p>',
        legend,
        f'<div class="samples">{"".join(cards[:_OPEN])}</div>',
    ]
    if more := cards[_OPEN:]:
        rest = f'<div class="samples">{"".join(more)}</div>'
        parts.append(f"<details><summary>{len(more)} more</summary>{rest}</details>")
    return parts


def _card(example: Mapping[str, Any], steps: list[int]) -> str:
    sides = "".join(
        f'<div class="{side}">{_meta(side, step, example[side])}<p class="text">{_said(example[side])}</p></div>'
        for side, step in zip(("before", "after"), steps, strict=True)
    )
    return (
        f'<article class="sample"><p class="story">{_story(example["prefix"], example["rest"])}</p>'
        f'{_facts(example["facts"])}<div class="pair">{sides}</div></article>'
    )


def _story(prefix: str, rest: str) -> str:
    """The text read so far in bold with its end marked, then the rest."""
    # A full stop is marked together with its word, or nobody would see it.
    at = len(prefix) - len(prefix.split()[-1]) if prefix.split() else len(prefix)
    return f"<b>{text(prefix[:at])}<mark>{text(prefix[at:])}</mark></b>{text(rest)}"


def _facts(facts: Mapping[str, Mapping[str, Any]]) -> str:
    items = "".join(
        f"<span{'' if fact['told'] else ' class=untold'}><i>{text(kind)}</i> {text(fact['value'])}"
        f"{'' if fact['told'] else ' <i>(not told yet)</i>'}</span>"
        for kind, fact in facts.items()
    )
    return f'<p class="facts">{items}</p>'


def _meta(side: str, step: int, said: Mapping[str, Any]) -> str:
    failed = '<span class="badge">does not parse</span>' if said["failed"] else ""
    return f'<p class="meta"><b>{side}, step {step}</b><span>cosine {number(said["cosine"], 2)}</span>{failed}</p>'


def _said(said: Mapping[str, Any]) -> str:
    return "".join(_mark(piece, verdict) for piece, verdict in said["marked"]).strip() or "(empty)"


def _mark(piece: str, verdict: str) -> str:
    if verdict not in _SIGNS:
        return text(piece)
    sign, kind, words = _SIGNS[verdict]
    return f'<span class="{kind}">{text(piece)}<span role="img" aria-label="({words})">{sign}</span></span>'


# -- text and numbers --------------------------------------------------------------------------------------------------


def text(value: object) -> str:
    """Text for HTML: escaped, without the control characters that it cannot hold."""
    return html.escape("".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in str(value)))


def number(value: float | None, digits: int = 3) -> str:
    """A dash where there is no number; no minus before a zero."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{0.0 if abs(value) < 0.5 * 10**-digits else value:.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{number(100 * value, digits)}%"


def share(value: float | None) -> str:
    """A share of facts in whole percent."""
    return percent(value)
