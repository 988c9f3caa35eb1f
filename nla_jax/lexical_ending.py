"""How a text ends, in which words, and what class of word may follow."""

from __future__ import annotations

import re

from nla_jax import lexical_words as words

_TOKEN = re.compile(r"\S+")
_LAST_TWO = re.compile(r"(\w+)(\W{1,3})(\w+)(\s?)$")
_LAST_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*$")
_YEAR = re.compile(r"(?<!\d)(1[5-9]|20)\d\d$")


def ending(tail: str) -> str:
    tokens = _TOKEN.findall(tail)[-8:]
    if not tokens:
        return "It has no words yet, and anything may follow."
    quoted = " ".join(shortened(token, 24) for token in tokens)
    quoted = quoted.replace('"', "'")
    after, expected = _next_class(tail)
    text = f'The last words are "{quoted}", ending {after}; {expected} may follow.'
    if before := _seen_before(tail):
        text += f" Earlier {before}."
    return text


def _next_class(tail: str) -> tuple[str, str]:
    """How the text ends, and the class of what may follow."""
    body = tail.rstrip()
    gap = tail[len(body) :]
    end = body[-1]
    if gap.count("\n") >= 2:
        return "with a paragraph break", "a new paragraph, heading or item"
    if "\n" in gap:
        return "with a line break", "a new line, item or statement"
    if end in ".!?\u2026\u3002\uff01\uff1f":
        if body.endswith("..."):
            return "with dots", "a continuation or a new sentence"
        return f"with {_MARKS.get(end, 'a mark')}", "a new sentence" + (" or an answer" if end in "?\uff1f" else "")
    if end in _EXPECTED:
        return _EXPECTED[end]
    if end in '"\u201d':
        closes = body.count('"', -400 if len(body) > 400 else 0) % 2 == 0 or end == "\u201d"
        return (
            ("with a closing quotation mark", "a speaker or the next sentence")
            if closes
            else (
                "with an opening quotation mark",
                "the first quoted words",
            )
        )
    if end.isdigit():
        year = _YEAR.search(body[-8:])
        return (
            ("with a year", "a comma, a full stop or a verb")
            if year
            else ("with a number", "a digit, a unit or a noun")
        )
    near = body[-80:]
    match = _LAST_WORD.search(near)
    if match is None:
        return "with a symbol", "a word, a number or another symbol"
    return _after_word(match[0], spaced=bool(gap), before=near[: match.start()])


_MARKS = {".": "a full stop", "!": "an exclamation mark", "?": "a question mark", "\u2026": "dots"}
_EXPECTED = {
    ",": ("with a comma", "another item or clause"),
    "\u3001": ("with a comma", "another item or clause"),
    "\uff0c": ("with a comma", "another clause"),
    ";": ("with a semicolon", "another clause or statement"),
    ":": ("with a colon", "a list, a quotation or an explanation"),
    "(": ("with an opening bracket", "an aside, an argument or a closing bracket"),
    "[": ("with an opening square bracket", "an item, an index or a note"),
    "{": ("with an opening brace", "a block or a field"),
    ")": ("with a closing bracket", "punctuation or the rest of the sentence"),
    "]": ("with a closing square bracket", "punctuation or the rest of the sentence"),
    "}": ("with a closing brace", "the next statement or another closing brace"),
    "\u201c": ("with an opening quotation mark", "the first quoted words"),
    "=": ("with an equals sign", "a value or an expression"),
    "<": ("with an opening angle bracket", "the name of a tag or a value"),
    ">": ("with a closing angle bracket", "text or another tag"),
    "-": ("with a hyphen", "the rest of a compound or an item"),
    "\u2013": ("with a dash", "an aside or the end of a range"),
    "\u2014": ("with a dash", "an aside or an afterthought"),
    "/": ("with a slash", "another part of a path or an alternative"),
    "$": ("with a dollar sign", "an amount or a name"),
    "#": ("with a hash sign", "a number, a tag or a heading"),
    "*": ("with an asterisk", "marked text or an item"),
    "@": ("with an at sign", "a name"),
    "&": ("with an ampersand", "another name"),
    "%": ("with a percent sign", "of, a noun or punctuation"),
    "_": ("with an underscore", "the rest of a name"),
    "|": ("with a bar", "the next cell or operand"),
    "+": ("with a plus sign", "an operand"),
}


def _after_word(word: str, spaced: bool, before: str) -> tuple[str, str]:
    lower = word.lower().replace("\u2019", "'")
    for group, name, follows in words.FOLLOWERS:
        if lower in group:
            return f"with {name}", follows
    opens = not before.rstrip() or before.rstrip()[-1] in '.!?\n:"\u201c'
    if word[0].isupper() and not opens:
        if len(word) > 3 and word.isupper():
            return "with a word in capitals", "another one or a colon"
        return "with a name", "a surname, a verb or a comma"
    kinds = (
        ("ly", "with an adverb", "a verb, an adjective or a comma"),
        ("ing", "with a word in -ing", "an object, a preposition or a noun"),
        ("ed", "with a past form", "a preposition, an object or a noun"),
        (
            ("tion", "ment", "ness", "ity", "ism", "ance", "ence"),
            "with an abstract noun",
            "a preposition such as of, a verb or a comma",
        ),
        (("ful", "ous", "ive", "able", "ible", "ical", "al", "ic", "less"), "with an adjective", "a noun"),
        ("s", "with a word in -s", "a preposition, a verb or a comma"),
    )
    for suffix, name, follows in kinds:
        if lower.endswith(suffix) and len(lower) > 4:
            return name, follows
    if not spaced and len(lower) <= 2:
        return "with a very short word", "the rest of that word or a noun"
    return "with a content word", "the rest of that word, a preposition, a verb or punctuation"


def _seen_before(tail: str) -> str | None:
    """What came after the last two words (or the last one) where they stood earlier in the text."""
    match = _LAST_TWO.search(tail[-80:])  # a search for an end walks through everything before it
    if match is None:
        return None
    for key in (match[0].rstrip(), match[3]):
        if key == match[3] and (len(key) < 4 or key.lower() in words.STOP):
            return None
        at = tail.rfind(key, 0, len(tail) - len(match[0]))
        while at > 0 and tail[at - 1].isalnum():  # only from the beginning of a word
            at = tail.rfind(key, 0, at)
        if at >= 0:
            after = tail[at + len(key) : at + len(key) + 40]
            if follow := re.match(r"\s?[\w'\u2019-]+|\s*[^\w\s]", after):
                shown = shortened(follow[0].strip(), 24).replace('"', "'")
                return f'"{" ".join(key.split())}" was followed by "{shown}"'
    return None


def shortened(word: str, most: int) -> str:
    return word if len(word) <= most else word[: most - 3] + "..."
