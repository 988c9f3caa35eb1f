"""Changes to an explanation that keep what it says: what the AR reads under them can carry less of a private code.

    apply(text, (("shuffle", 0.5), ("drop_quotes", 0.5), ("noise", 0.5)), rng)

"shuffle" puts the claims into another order, "drop_quotes" takes quoted words out, "noise" changes case and
punctuation. Each happens with its probability, in this order whatever the order given, since noise would hide where
sentences end. The same text and generator state give the same result; no text becomes empty.

Three more changes are for evaluation alone (nla_jax.evals.robustness) and no part of `apply`: `reorder_bullets`,
`quoted_only` and `truncate`. They take more away than training should get used to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from nla_jax.claims import LINE, MARK, QUOTED, join_claims, split_claims
from nla_jax.errors import InputError

Transforms = tuple[tuple[str, float], ...]

_MARKS = '"\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d\u300e\u300f'  # quotation marks that are nothing else
# An opening mark that is never closed, up to the end of its clause: leaving it out would be a way around the rule.
_UNCLOSED = re.compile(r"(?<!\w)[\"\u201c\u201e\u00ab\u300c\u300e](?=\S)[^\n.!?;\u2026\u3002]*")
_SEAM = "\x00"
_BLANK = r"[ \t]*"


def apply(text: str, transforms: Transforms, rng: np.random.Generator) -> str:
    """The text after each of `transforms`, (name, probability) pairs. InputError for a name that is none."""
    chances = dict(transforms)
    if unknown := sorted(set(chances) - set(TRANSFORMS)):
        raise InputError(f"transform {unknown[0]!r}", expected=" or ".join(TRANSFORMS))
    for name, change in TRANSFORMS.items():
        # A number is drawn for every transform there is, so that switching one on leaves the others' choices alone.
        if rng.random() < chances.get(name, 0.0):
            text = change(text, np.random.default_rng(rng.integers(2**63)))
        else:
            rng.integers(2**63)
    return text


def shuffle(text: str, rng: np.random.Generator) -> str:
    """The same claims in another order, uniformly chosen; list marks and paragraphs stay where they were."""
    claims = split_claims(text)
    if len(set(claims)) < 2:
        return text
    order = [claims[i] for i in rng.permutation(len(claims))]
    if order == claims:
        order = order[1:] + order[:1]
    moved = join_claims(order, text)
    # Marks that pair up across claims can change what counts as a claim; such a text is better left alone.
    return moved if sorted(split_claims(moved)) == sorted(claims) else text


def drop_quotes(text: str, rng: np.random.Generator | None = None) -> str:
    """Without its quoted spans, and without the punctuation that held them; as it is where nothing else is in it."""
    before = left = text.replace(_SEAM, "")
    while (cut := _cut_quotes(left)) != left:
        left = cut
    return left if left != before and any(c.isalnum() for c in left) else text


def _cut_quotes(text: str) -> str:
    marked = _UNCLOSED.sub(_SEAM, QUOTED.sub(_seam, text))
    marked = marked.translate({ord(mark): None for mark in _MARKS})
    return text if marked == text else "\n".join(_tidied(marked))


def _seam(quoted: re.Match[str]) -> str:
    """What stands for a quotation: a seam, and the stop inside it where that ends the sentence around it too."""
    stop, after = quoted[0][-2:-1], quoted.string[quoted.end() : quoted.end() + 8]
    ends = stop in (".", "!", "?", "\u2026") and (not after.strip() or after[0].isspace())
    return _SEAM + (stop if ends and not after.lstrip()[:1].islower() else "")


def _tidied(marked: str) -> list[str]:
    """Lines without the seams where something was cut out, mended around them."""
    lines = [(_mended(line) if _SEAM in line else line, _SEAM in line) for line in marked.split("\n")]
    return [re.sub(r"(?<=\S)[ \t]{2,}", " ", line).rstrip() for line, cut in lines if not cut or re.search(r"\w", line)]


# In this order; S is a seam, ~ are blanks.
_MENDS = [
    (re.compile(pattern.replace("S", _SEAM).replace("~", _BLANK)), new)
    for pattern, new in [
        (r"S(?:~[,;/&+]?~\w{1,3}~|~[,;/&+]*~)(?=S)", ""),  # a list of quotations, "or" between them
        (r"\(~S~\)|\[~S~\]|\{~S~\}", _SEAM),
        (r"(?:^|(?<=[(\[]))~S~[,;:.!?\u2026]*~", ""),  # at the beginning of a line or a bracket
        (r"((?:[-*+\u2022>]|\d+[.)]|[.!?\u2026;])[ \t]+)S~[,;:.!?\u2026]*~", r"\1"),  # or of a sentence
        (r"[,;:/ \t]*S~(?=[,;:.!?\u2026)\]}\u3002\uff0c]|$)", ""),
        (r"(?<=\s)S~|~S(?=\s)", " "),
        (r"(?<=[A-Za-z0-9])S(?=[A-Za-z0-9])", " "),
        (r"S", ""),
        (r"[ \t]+(?=[)\]}]|[,;.!?](?:\s|$))", ""),
        (r"[,;: \t]+(?=[.!?](?:\s|$))|[,;: \t]+$", ""),
    ]
]


def _mended(line: str) -> str:
    for pattern, new in _MENDS:
        line = pattern.sub(new, line)
    return line


_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
_STOP = re.compile(r"[,;:.!?\u2026](?=\s|\Z)")
_LIGHT, _HEAVY = ",;:", ".!?"
_CHANGED = 0.3  # of the stops


def noise(text: str, rng: np.random.Generator) -> str:
    """Other capitals and other stops, the same words. The case of all words is kept, lowered, or drawn anew for half
    of the initials; of the stops at the ends of words 3 in 10 are left out or exchanged for another of their kind."""
    case = int(rng.integers(3))
    if case == 1:
        text = "".join(_recased(c, str.lower) for c in text)
    elif case == 2:
        text = _WORD.sub(lambda m: _recased(m[0][0], str.swapcase) + m[0][1:] if rng.random() < 0.5 else m[0], text)

    def stop(match: re.Match[str]) -> str:
        if rng.random() >= _CHANGED:
            return match[0]
        return str(rng.choice(["", *(_LIGHT if match[0] in _LIGHT else _HEAVY)]))

    changed = _STOP.sub(stop, text)
    return changed if changed.strip() else text


def _recased(c: str, change: Callable[[str], str]) -> str:
    """One character in another case, where that is one character that can be told to be the same letter."""
    new = change(c)
    return new if len(new) == 1 and new.casefold() == c.casefold() else c


TRANSFORMS: dict[str, Callable[[str, np.random.Generator], str]] = {
    "shuffle": shuffle,
    "drop_quotes": drop_quotes,
    "noise": noise,
}


# -- for evaluation alone ---------------------------------------------------------------------------------------------


def reorder_bullets(text: str, rng: np.random.Generator) -> str:
    """The same lines (bullets, features, paragraphs) in another order, uniformly chosen of the others there are; the
    sentences of a line stay together and in order, list marks and empty lines stay where they were."""
    spans = []
    for line in LINE.finditer(text):
        mark = MARK.match(text, line.start(), line.end())
        start = mark.end() if mark else line.start()
        end = start + len(text[start : line.end()].rstrip())
        if end > start:
            spans.append((start, end))
    lines = [text[start:end] for start, end in spans]
    if len(set(lines)) < 2:
        return text
    order = [lines[i] for i in rng.permutation(len(lines))]
    if order == lines:
        order = order[1:] + order[:1]
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    gaps = [text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2)]
    return gaps[0] + "".join(line + gap for line, gap in zip(order, gaps[1:], strict=True))


def quoted_only(text: str, rng: np.random.Generator | None = None) -> str:
    """Nothing but the quoted spans, marks and all, with a space between; as it is where it has none with a word."""
    spans = [match[0] for match in QUOTED.finditer(text)]
    return " ".join(spans) if any(c.isalnum() for span in spans for c in span) else text


class Offsets(Protocol):
    """The part of a tokenizer that `truncate` needs."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], Sequence[tuple[int, int]]]: ...


def truncate(text: str, tokens: int, tokenizer: Offsets) -> str:
    """The first `tokens` tokens of the text as it stands alone, without white space at the end; as it is where it has
    no more of them, or where nothing but white space would be left. InputError under one token."""
    if tokens < 1:
        raise InputError("tokens to keep", expected="at least 1", got=tokens)
    _, spans = tokenizer.encode_with_offsets(text)
    if len(spans) <= tokens:
        return text
    return text[: spans[tokens - 1][1]].rstrip() or text
