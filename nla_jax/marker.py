"""The marker of a tokenizer, and the tokens that end every AR prompt.

A marker is the character whose embedding is replaced by the vector. It is one token alone and inside the rendered
prompt, has the same neighbours wherever the words around it stand, and is as good as absent from the corpus. As in
the released pairs it is an enclosed or squared CJK sign where the vocabulary has one.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from nla_jax.errors import PromptError, TokenizerError
from nla_jax.prompt import EXPLANATION_FIELD, MARKER_FIELD, av_prompt_ids, template_parts
from nla_jax.sidecar import Sidecar
from nla_jax.store import Store
from nla_jax.tokenizer import Tokenizer

# Unicode blocks in the order in which they are tried: enclosed CJK letters and squared CJK signs, enclosed letters
# and digits, symbols and dingbats, arrows to technical signs, boxes and shapes.
BLOCKS = ((0x3200, 0x33FF), (0x2460, 0x24FF), (0x2600, 0x27BF), (0x2190, 0x23FF), (0x2500, 0x25FF))
_DOCS = 256  # documents counted at a time

# Explanations whose last characters could merge with what follows them in the AR prompt.
PROBES = (
    "word",
    "Word",
    "A sentence.",
    "Why?",
    "No!",
    "(in brackets)",
    "[so]",
    '"quoted"',
    "“quoted”",
    "'quoted'",
    "a quotation.'",
    "a list:\n- item\n",
    "two line ends\n\n",
    "a digit 7",
    "year 1999",
    "space ",
    "spaces   ",
    "tab\t",
    "comma,",
    "semicolon;",
    "colon:",
    "dash -",
    "dash —",
    "dots...",
    "dots…",
    "<b>tag</b>",
    "less <",
    "an end />",
    "slash /",
    "{brace}",
    "`code`",
    "name_",
    "*bold*",
    "50%",
    "x = 1;\n}\n",
    "café",
    "日本語",
    "文。",
    "🙂",
    "",
)


@dataclass(frozen=True)
class Marker:
    """A marker, its token, the tokens beside it in the AV prompt, and how often its token is in the corpus."""

    char: str
    id: int
    left_id: int
    right_id: int
    count: int


def token_counts(store: Store, vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: how often each token is in the store's documents (-1, an unknown token, is left out)."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, store.n_docs, _DOCS):
        ids = np.concatenate(store.tokens(slice(start, start + _DOCS)))
        ids = ids[(ids >= 0) & (ids < vocab_size)]
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def choose_marker(tokenizer: Tokenizer, av_template: str, counts: np.ndarray) -> Marker:
    """The first candidate that never occurs in the corpus, else the rarest; the same for the same arguments.

    `counts` int64 [V] are those of `token_counts`. TokenizerError if no character of the vocabulary will do.
    """
    best: Marker | None = None
    for char in _candidates(tokenizer):
        found = _examine(tokenizer, av_template, char)
        if isinstance(found, str):
            continue
        marker = Marker(char, *found, count=int(counts[found[0]]))
        if best is None or marker.count < best.count:
            best = marker
        if best.count == 0:
            return best
    if best is None:
        fix = "--marker with a character that is one token of it, and tags around it in the template"
        raise TokenizerError(f"{tokenizer.source}: no character can be the marker", fix=fix)
    return best


def check_marker(tokenizer: Tokenizer, av_template: str, char: str, counts: np.ndarray) -> Marker:
    """The marker `char`; TokenizerError that says why it cannot be one."""
    found = _examine(tokenizer, av_template, char)
    if isinstance(found, str):
        fix = "another character, or none: one is chosen then"
        raise TokenizerError(f"{tokenizer.source}: the marker {char!r} {found}", fix=fix)
    return Marker(char, *found, count=int(counts[found[0]]))


def _candidates(tokenizer: Tokenizer) -> Iterator[str]:
    seen = set()
    for low, high in BLOCKS:
        for code in range(low, high + 1):
            seen.add(chr(code))
            yield chr(code)
    rest = {tokenizer.token_str(i) for i in range(tokenizer.vocab_size)} - seen
    # Small vocabularies have nothing better than a sign of ASCII; a letter or digit would be in every text.
    yield from sorted(c for c in rest if len(c) == 1 and not c.isalnum() and ord(c) > 0x7F)
    yield from sorted(c for c in rest if len(c) == 1 and c.isalnum() and ord(c) > 0x2FF)
    yield from sorted(c for c in rest if len(c) == 1 and not c.isalnum() and ord(c) <= 0x7F)


def _examine(tokenizer: Tokenizer, av_template: str, char: str) -> tuple[int, int, int] | str:
    """(id, left neighbour, right neighbour) of a character that can be the marker, or why it cannot."""
    if len(char) != 1 or not char.isprintable() or char.isspace() or unicodedata.category(char)[0] in "CMZ":
        return "is not one printable character"
    ids = _alone(tokenizer, char)
    if len(ids) != 1:
        return f"is {len(ids)} tokens"
    (token,) = ids
    if token == tokenizer.unk_id:
        return "is not in the vocabulary"
    if token in tokenizer.special_ids:
        return "is a special token"
    if tokenizer.decode([token]).strip() != char:
        return f"is a token that reads {tokenizer.decode([token])!r}"
    try:
        beside = {_neighbours(ids, token) for ids in _contexts(tokenizer, av_template, char)}
    except PromptError as error:
        if error.what.startswith(tokenizer.source):  # there is no chat template, or it refuses the prompt
            raise
        return f"does not fit the prompt ({error})"
    if None in beside:
        return "is not exactly one token between two others in the prompt"
    if len(beside) != 1:
        return "has other tokens beside it in other places"
    (pair,) = beside
    assert pair is not None
    return token, *pair


def _alone(tokenizer: Tokenizer, char: str) -> list[int]:
    ids = tokenizer.encode(char, parse_special=True)
    # SentencePiece tokenizers put a space before a text.
    return ids[1:] if len(ids) == 2 and tokenizer.token_str(ids[0]) == " " else ids


def _contexts(tokenizer: Tokenizer, av_template: str, char: str) -> Iterator[list[int]]:
    """Token ids of texts in which the marker stands as it does in the prompt."""
    sidecar = Sidecar(
        kind="nla_dataset",
        role=None,
        d_model=1,
        layer_index=None,
        injection_scale=None,
        mse_scale=None,
        injection_mode="replace",
        marker=char,
        marker_id=0,
        left_id=0,
        right_id=0,
        ar_suffix_ids=None,
        av_template=av_template,
        ar_template=None,
    )
    yield av_prompt_ids(tokenizer, sidecar)
    before, *after = template_parts(av_template, MARKER_FIELD)
    if len(after) != 1:
        raise PromptError("the AV template", expected=f"{MARKER_FIELD} once", got=f"{len(after)} times")
    answered = [
        {"role": "user", "content": before + char + after[0]},
        {"role": "assistant", "content": "<explanation>\nA feature.\n</explanation>"},
    ]
    yield tokenizer.encode_chat(answered)
    # The words that touch it, elsewhere.
    left, right = re.search(r"\S+$", before), re.match(r"\S+", after[0])
    if left and right:
        for start, end in (("Hello ", " world"), ("1\n", "\n\nAnd then"), ("x = ", ";")):
            yield tokenizer.encode(f"{start}{left[0]}{char}{right[0]}{end}")


def _neighbours(ids: list[int], token: int) -> tuple[int, int] | None:
    places = [i for i, found in enumerate(ids) if found == token]
    if len(places) != 1 or not 0 < places[0] < len(ids) - 1:
        return None
    return ids[places[0] - 1], ids[places[0] + 1]


def suffix_ids(tokenizer: Tokenizer, ar_template: str, explanations: Iterable[str] = ()) -> tuple[int, ...]:
    """The longest run of ids that ends the AR prompt whatever the explanation: of PROBES and of `explanations`.

    What follows the explanation begins with characters that may merge with its last ones, hence the probes. PromptError
    if nothing is common to all, for the vector is predicted at the last of these tokens.
    """
    before, *after = template_parts(ar_template, EXPLANATION_FIELD)
    if len(after) != 1:
        raise PromptError("the AR template", expected=f"{EXPLANATION_FIELD} once", got=f"{len(after)} times")
    tail: list[int] | None = None
    for text in itertools.chain(PROBES, explanations):
        ids = tokenizer.encode_parts([(before, True), (text, False), (after[0], True)], add_special=True)
        if tail is None:
            tail = ids
        if ids[-len(tail) :] != tail:
            n = 0
            while n < min(len(tail), len(ids)) and ids[-1 - n] == tail[-1 - n]:
                n += 1
            if n == 0:
                fix = "a template that ends in a tag of several tokens, such as {explanation}</notes> <vector>"
                got = f"another last token after {text[-20:]!r}"
                raise PromptError("the AR template's end", expected="the same last token always", got=got, fix=fix)
            tail = tail[-n:]
    assert tail
    return tuple(tail)
