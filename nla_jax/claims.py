"""What an explanation says, claim by claim: which claims there are, texts without one, and what leaving it out costs.

A text is claims and the gaps around them (spaces, line ends, list marks): `gaps[0] + claims[0] + gaps[1] + ...`.
Claims end where lines and sentences do; where that gives but one, at semicolons. Nothing here knows a language except
for a few titles that end in a full stop.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nla_jax.errors import InputError
from nla_jax.metrics import mse_nrm

_SINGLE = r"(?:[^'\u2019\n]|(?<=\w)['\u2019](?=\w))*?"
# Within one line. Single marks count only around words: an apostrophe has a letter or a digit before it.
QUOTED = re.compile(
    r"\"[^\"\n]*\"|\u201c[^\u201d\n]*\u201d|\u201e[^\u201c\u201d\n]*[\u201c\u201d]|\u00ab[^\u00bb\n]*\u00bb"
    r"|\u300c[^\u300d\n]*\u300d|\u300e[^\u300f\n]*\u300f"
    rf"|(?<!\w)'(?=[^\s']){_SINGLE}(?<=[^\s'])'(?!\w)|(?<!\w)\u2018(?=\S){_SINGLE}(?<=\S)\u2019(?!\w)"
)
_BRACKETED = re.compile(r"\([^()\n]*\)|\[[^\[\]\n]*\]")
LINE = re.compile(r"[^\r\n\x0b\x0c\x85\u2028\u2029]+")
# List marks and quote marks of markdown belong to the place in the list, not to the claim.
MARK = re.compile(r"(?:\s|[-*+\u2022\u2013>](?=\s)|\(?\d{1,2}[.)](?=\s)|#{1,6}(?=\s))*")
_END = re.compile(
    r"[.!?\u2026\u3002\uff01\uff1f]+[\"'\u2019\u201d\u00bb\u300d\u300f)\]]*(?=\s)"
    r"|[\u3002\uff01\uff1f]+(?![\u300d\u300f\u201d\u2019)\]])"  # scripts without spaces
)
_TITLES = frozenset("mr mrs ms dr st prof vs cf no fig al".split())
_SEMICOLON = re.compile(r"\s*[;\uff1b]\s*")
_FINAL = re.compile(r"[\s.!?\u2026\u3002\uff01\uff1f]*\Z")


@dataclass(frozen=True)
class Parts:
    """A text taken apart: n claims and n + 1 gaps (none of either for a text without claims)."""

    claims: tuple[str, ...]
    gaps: tuple[str, ...]

    @property
    def text(self) -> str:
        between = zip(self.claims, self.gaps[1:], strict=True)
        return (self.gaps[0] if self.gaps else "") + "".join(claim + gap for claim, gap in between)

    def without(self, index: int) -> Parts:
        """The claim left out, with one of the gaps beside it: the greater break of the two stays."""
        gaps, n = list(self.gaps), len(self.claims)
        if n == 1:
            return Parts((), ())
        if index == 0:
            del gaps[1]
        elif index == n - 1:
            del gaps[index]
        else:
            del gaps[index if gaps[index + 1].count("\n") > gaps[index].count("\n") else index + 1]
        return Parts(self.claims[:index] + self.claims[index + 1 :], tuple(gaps))


def parts(text: str) -> Parts:
    """Takes a text apart; `parts(text).text == text` for every text with a claim in it."""
    spans = [span for line in LINE.finditer(text) for span in _sentences(text, line.start(), line.end())]
    if len(spans) == 1:
        spans = _clauses(text, *spans[0])
    if not spans:
        return Parts((), ())
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    gaps = tuple(text[edges[i] : edges[i + 1]] for i in range(0, len(edges), 2))
    return Parts(tuple(text[start:end] for start, end in spans), gaps)


def _sentences(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Spans of the sentences in one line, without white space and list marks around them."""
    line = text[start:end]
    if not line.isascii() or any(mark in line for mark in "\"'(["):
        closed = [m.span() for pattern in (QUOTED, _BRACKETED) for m in pattern.finditer(line)]
    else:
        closed = []
    spans, at = [], _after_marks(line, 0, len(line))
    for match in _END.finditer(line):
        if match.start() < at or any(a < match.end() < b for a, b in closed) or _goes_on(line, match):
            continue
        spans.append((at, match.end()))
        at = _after_marks(line, match.end(), len(line))
    spans.append((at, len(line.rstrip())))
    return [(start + a, start + b) for a, b in spans if b > a]


def _after_marks(text: str, start: int, end: int) -> int:
    match = MARK.match(text, start, end)
    return match.end() if match else start


def _goes_on(line: str, end: re.Match[str]) -> bool:
    """Whether the sentence goes on after this mark: an abbreviation, or a pause or a quotation within it."""
    mark, following = end[0], line[end.end() : end.end() + 8].lstrip()
    if len(mark) > 1 or mark == "\u2026":
        return following[:1].islower()
    before = line[max(0, end.start() - 16) : end.start()].rpartition(" ")[2].lstrip("(['\"\u201c\u2018")
    if mark != "." or not before:
        return False
    return (len(before) == 1 and before.isupper() and before != "I") or "." in before or before.lower() in _TITLES


def _clauses(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The clauses of the only sentence; its final full stop belongs to none of them."""
    body = text[start:end]
    closed = [m.span() for pattern in (QUOTED, _BRACKETED) for m in pattern.finditer(body)]
    cuts = [m.span() for m in _SEMICOLON.finditer(body) if not any(a < m.end() <= b for a, b in closed)]
    if not cuts:
        return [(start, end)]
    final = _FINAL.search(body, cuts[-1][1])
    last = final.start() if final else len(body)
    edges = [0, *(edge for cut in cuts for edge in cut), last]
    spans = [(start + edges[i], start + edges[i + 1]) for i in range(0, len(edges), 2)]
    spans = [(a, b) for a, b in spans if b > a]
    return spans if len(spans) > 1 else [(start, end)]


def split_claims(text: str) -> list[str]:
    """The claims of a text in order, without list marks: its sentences and lines, or the clauses of its only one."""
    return list(parts(text).claims)


def join_claims(claims: Sequence[str], like: str) -> str:
    """Claims with the gaps of the text `like`. One line for each where they would run into each other otherwise."""
    if not claims:
        return ""
    gaps = parts(like).gaps or ("", "")
    inner = list(gaps[1:-1])[: len(claims) - 1]
    inner += [inner[-1] if inner else " "] * (len(claims) - 1 - len(inner))
    text = Parts(tuple(claims), (gaps[0], *inner, gaps[-1])).text
    if sorted(split_claims(text)) == sorted(claims):
        return text
    return Parts(tuple(claims), (gaps[0], *(gap if "\n" in gap else "\n" for gap in inner), gaps[-1])).text


# -- what claims are worth --------------------------------------------------------------------------------------------


def variants(text: str) -> list[str]:
    """The text with each claim left out, in the order of `split_claims`; [""] where it has but one, [] without any."""
    whole = parts(text)
    return [whole.without(i).text for i in range(len(whole.claims))]


_WORD = re.compile(r"\S+")


def without_span(text: str, claim: str, rng: np.random.Generator) -> str:
    """The text without a random span as long as one of its claims: what `variants` is compared with, so that a claim is
    not credited with the mere length it takes.

    The span is as many words in a row (what white space separates), uniformly chosen; characters where the text has no
    more words than that, as in scripts without spaces; "" where it has no more characters either."""
    spans, words = [match.span() for match in _WORD.finditer(text)], len(claim.split())
    if len(spans) <= words:
        if len(text) <= len(claim):
            return ""
        first = int(rng.integers(len(text) - len(claim) + 1))
        return text[:first] + text[first + len(claim) :]
    first = int(rng.integers(len(spans) - words + 1))
    if first + words == len(spans):
        return text[: spans[first - 1][1]]
    return text[: spans[first][0]] + text[spans[first + words][0] :]


def all_variants(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The variants of many texts in one list [m], and which text each is of: int64 [m]."""
    listed = [variants(text) for text in texts]
    owner = np.repeat(np.arange(len(texts), dtype=np.int64), [len(some) for some in listed])
    return [variant for some in listed for variant in some], owner


def idle(mse_full: float | np.ndarray, mse_without: Sequence[float] | np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """Which claims add nothing, bool [k]: without them mse_nrm rises by no more than `threshold`.

    An error that is not finite says nothing about a claim, so the claim is not held against the text."""
    without = np.asarray(mse_without, np.float64)
    with np.errstate(invalid="ignore"):
        return np.isfinite(without) & np.isfinite(mse_full) & (without - mse_full <= threshold)


def penalty(mse_full: float, mse_without: Sequence[float] | np.ndarray, threshold: float = 0.0) -> float:
    """Share in [0, 1] of the claims that add nothing (see `idle`); 0 for a text without claims."""
    unused = idle(mse_full, mse_without, threshold)
    return float(unused.mean()) if unused.size else 0.0


def penalties(mse_full: np.ndarray, mse_variants: np.ndarray, owner: np.ndarray, threshold: float = 0.0) -> np.ndarray:
    """`penalty` of each of n texts, float32 [n], from the errors of `all_variants`: [n], [m] and `owner` [m]."""
    full = np.asarray(mse_full, np.float64)
    owner = np.asarray(owner, np.int64)
    if len(owner) != len(mse_variants):
        raise InputError("claim penalties", expected=f"{len(owner)} errors of variants", got=len(mse_variants))
    unused = idle(full[owner], mse_variants, threshold)
    count = np.bincount(owner, minlength=len(full))
    return (np.bincount(owner, weights=unused, minlength=len(full)) / np.maximum(count, 1)).astype(np.float32)


def idle_shares(
    texts: Sequence[str],
    failed: np.ndarray,
    vectors: np.ndarray,
    read: Callable[[list[str]], np.ndarray],
    mse_scale: float,
    threshold: float = 0.0,
) -> np.ndarray:
    """`penalty` of each text, float32 [n], as an AR reads it: `read` gives its vectors [m, D] for m texts; `vectors`
    [n, D] are what the texts are about. 0 where `failed` [n]: such a text has been punished already."""
    ok = np.flatnonzero(~np.asarray(failed, bool))
    out = np.zeros(len(texts), np.float32)
    kept = [texts[i] for i in ok.tolist()]
    listed, owner = all_variants(kept)
    if not listed:
        return out
    predicted = read([*kept, *listed])
    about = np.asarray(vectors)[ok]
    errors = mse_nrm(predicted, np.concatenate([about, about[owner]]), mse_scale)
    out[ok] = penalties(errors[: len(ok)], errors[len(ok) :], owner, threshold)
    return out


def without_idle(text: str, unused: Sequence[bool] | np.ndarray) -> str:
    """The text without its claims marked in `unused` [k]; as it is where that would leave nothing."""
    whole = parts(text)
    if len(unused) != len(whole.claims):
        raise InputError("claims to leave out", expected=f"{len(whole.claims)} marks, one a claim", got=len(unused))
    if all(unused):
        return text
    for i in reversed(range(len(whole.claims))):
        if unused[i]:
            whole = whole.without(i)
    return whole.text
