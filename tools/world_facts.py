"""Whether explanations of story activations are true: facts by kind against chance, and what h holds of them.

truth(texts, stories)                       what explanations state, against the facts of their rows' documents
probe(train_x, train_y, test_x, test_y)     what a linear read-out finds of one fact in the vectors
probes(train_x, train_stories, test_x, test_stories)        the same for every kind
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nla_jax.errors import InputError
from nla_jax.tools.world import FACT_KINDS, Story, last_word, stated

_QUOTE = re.compile(r"\"([^\"]*)\"|“([^”]*)”")
_SHUFFLES = 8  # pairings with other documents that chance is averaged over


@dataclass(frozen=True)
class KindTruth:
    """Facts of one kind, or of all kinds together, in `rows` explanations. Shares are NaN where they are of none.

    stated: values stated (an explanation with two values of a kind states two). said: share of explanations that
    state the kind. true: share of stated values that are the document's. chance: the same when the explanations are
    put beside other documents. coverage: share of rows where the true value is stated. known: share of rows whose
    prefix has told the fact (NaN without prefixes); true_known: of values stated there, the share that is true.
    """

    rows: int
    stated: int
    said: float
    true: float
    chance: float
    coverage: float
    known: float
    true_known: float


@dataclass(frozen=True)
class Truth:
    """`kinds` by name and `overall`; `quoted`: share of explanations with a quotation; `quote_last`: of those, the
    share whose (last) quotation is the prefix's last word (NaN without prefixes or quotations)."""

    kinds: dict[str, KindTruth]
    overall: KindTruth
    quoted: float
    quote_last: float


def truth(texts: Sequence[str], stories: Sequence[Story], ends: Sequence[int] | None = None, seed: int = 0) -> Truth:
    """Facts in explanations: `texts[i]` is of a row of `stories[i]` whose prefix has `ends[i]` characters.

    Rows of one document are shuffled together with others', but never paired with their own for the chance rate.
    """
    n = len(texts)
    if len(stories) != n or (ends is not None and len(ends) != n) or not n:
        got = f"{n} texts, {len(stories)} stories" + ("" if ends is None else f", {len(ends)} ends")
        raise InputError("truth of explanations", expected="one story (and end) for each of some texts", got=got)
    claims = [stated(text) for text in texts]
    others = _others(stories, seed)
    # of each kind, by row: values stated, whether one is true, the share true of other documents, whether it is known
    cells: dict[str, list[np.ndarray]] = {}
    known = {} if ends is None else known_facts(stories, ends)
    for kind in FACT_KINDS:
        found = [claim.get(kind, set()) for claim in claims]
        values = [story.facts[kind] for story in stories]
        count = np.array([len(f) for f in found])
        hit = np.array([value in f for value, f in zip(values, found, strict=True)])
        luck = [np.array([values[j] in f for j, f in zip(order, found, strict=True)]) for order in others]
        cells[kind] = [count, hit, np.mean(luck, 0), known.get(kind, np.full(n, np.nan))]
    together = [np.stack(columns) for columns in zip(*cells.values(), strict=True)]
    quotes = [["".join(q) for q in _QUOTE.findall(text)] for text in texts]
    right = np.nan
    if ends is not None and any(quotes):
        pairs = [(q[-1].strip(), last_word(s.text[:e])) for q, s, e in zip(quotes, stories, ends, strict=True) if q]
        right = float(np.mean([q == word for q, word in pairs]))
    return Truth(
        {kind: _cell(*cell) for kind, cell in cells.items()},
        _cell(*together),
        float(np.mean([bool(q) for q in quotes])),
        right,
    )


def _cell(count: np.ndarray, hit: np.ndarray, luck: np.ndarray, known: np.ndarray) -> KindTruth:
    """`count`, `hit`, `luck`, `known` (NaN: not asked): [rows], or [kinds, rows]."""

    def share(part: np.ndarray, of: np.ndarray) -> float:
        return float(part.sum() / of.sum()) if of.sum() else float("nan")  # NaN where `known` is

    return KindTruth(
        rows=count.shape[-1],
        stated=int(count.sum()),
        said=float((count > 0).mean()),
        true=share(hit, count),
        chance=share(luck, count),
        coverage=float(hit.mean()),
        known=float(known.mean()),
        true_known=share(hit * known, count * known),
    )


def _others(stories: Sequence[Story], seed: int) -> list[np.ndarray]:
    """For each row a row of another story, some times over; a row of its own where there is only one story."""
    rng = np.random.default_rng(seed)
    numbers: dict[tuple[object, ...], int] = {}
    docs = np.array([numbers.setdefault((tuple(s.facts.items()), s.plan), len(numbers)) for s in stories])
    out = []
    for _ in range(_SHUFFLES):
        order = rng.permutation(len(docs))
        for _ in range(50):
            same = np.flatnonzero(docs[order] == docs)
            if not len(same):
                break
            order[same] = rng.integers(0, len(docs), len(same))
        out.append(order)
    return out


# -- what the vectors hold ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """`accuracy` of a linear read-out on held-out vectors, and of always naming the commonest value (`majority`)."""

    accuracy: float
    majority: float
    n: int


def probe(
    train_x: np.ndarray, train_y: Sequence[str], test_x: np.ndarray, test_y: Sequence[str], ridge: float = 1e-3
) -> Probe:
    """Linear discriminant analysis: the class whose mean is nearest in the covariance that the classes share, and that
    is common. x float32 [n, D], y the labels; `ridge` is added to the covariance, relative to its mean variance."""
    train_x, test_x = np.asarray(train_x, np.float32), np.asarray(test_x, np.float32)
    if len(train_x) != len(train_y) or len(test_x) != len(test_y) or not len(train_y) or not len(test_y):
        got = f"{len(train_x)} and {len(test_x)} vectors, {len(train_y)} and {len(test_y)} labels"
        raise InputError("a probe", expected="vectors and as many labels, to train and to test", got=got)
    names, y = np.unique(np.asarray(train_y), return_inverse=True)
    mean = train_x.mean(0)
    x, counts = train_x - mean, np.bincount(y).astype(np.float32)
    means = np.stack([x[y == k].mean(0) for k in range(len(names))])
    covariance = (x.T @ x - (means * counts[:, None]).T @ means) / len(x)
    covariance[np.diag_indices_from(covariance)] += ridge * np.trace(covariance) / len(covariance) + 1e-20
    weights = np.linalg.lstsq(covariance, means.T, rcond=None)[0]
    offsets = np.log(counts / len(x)) - 0.5 * (means.T * weights).sum(0)
    guess = names[np.argmax((test_x - mean) @ weights + offsets, axis=1)]
    common = Counter(train_y).most_common(1)[0][0]
    truth_ = np.asarray(test_y)
    return Probe(float((guess == truth_).mean()), float((truth_ == common).mean()), len(truth_))


def probes(
    train_x: np.ndarray,
    train_stories: Sequence[Story],
    test_x: np.ndarray,
    test_stories: Sequence[Story],
    *,
    train_known: Mapping[str, np.ndarray] | None = None,
    test_known: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Probe]:
    """A probe of each kind. With `train_known` and `test_known` (kind -> bool [n], see `known_facts`) only rows whose
    prefix has told the fact count: what is not told yet cannot be read."""
    out = {}
    for kind in FACT_KINDS:
        a = np.ones(len(train_x), bool) if train_known is None else train_known[kind]
        b = np.ones(len(test_x), bool) if test_known is None else test_known[kind]
        if a.any() and b.any():
            train_y = [s.facts[kind] for s, keep in zip(train_stories, a, strict=True) if keep]
            test_y = [s.facts[kind] for s, keep in zip(test_stories, b, strict=True) if keep]
            out[kind] = probe(train_x[a], train_y, test_x[b], test_y)
    return out


def known_facts(stories: Sequence[Story], ends: Sequence[int]) -> dict[str, np.ndarray]:
    """Kind -> bool [n]: whether the first `ends[i]` characters of story i tell the fact."""
    return {
        k: np.array([s.known.get(k, e + 1) <= e for s, e in zip(stories, ends, strict=True)], bool) for k in FACT_KINDS
    }
