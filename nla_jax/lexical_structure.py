"""What is unfinished at the end of a text: quotations, brackets, tags, blocks, lists, and the sentence itself."""

from __future__ import annotations

import re

from nla_jax.lexical_words import SUBORDINATORS

_PAIRS = {")": "(", "]": "[", "}": "{", "\u201d": "\u201c", "\u300d": "\u300c", "\u00bb": "\u00ab"}
_NAMES = {
    "(": "a bracket",
    "[": "a square bracket",
    "{": "a brace",
    "\u201c": "a quotation",
    "\u300c": "a quotation",
    "\u00ab": "a quotation",
    '"': "a quotation",
    "```": "a block of code between backticks",
    "$$": "a formula",
}
_OPENERS = re.compile(
    r"```|\$\$|<!--|-->|<(/?)([a-zA-Z][\w-]*)((?:\s[^<>]*)?)>|[()\[\]{}\u201c\u201d\u300c\u300d\u00ab\u00bb\"]|\n\s*\n"
)
_VOID = frozenset("area base br col embed hr img input link meta source track wbr p li td tr th option".split())
_ITEM = re.compile(r"^\s*(?:(\d{1,3})[.)]|([a-zA-Z])[.)]|([-*\u2022+]))\s")
# A line end closes a sentence after a line too long for verse, after a colon, and before a list item.
_SENTENCE_END = re.compile(
    r"[.!?\u2026\u3002\uff01\uff1f][\"'\u201d\u2019)\]]*(?:\s+|$)|\n\s*\n|(?<=[^\n]{65})\n|(?<=:)\n|\n(?=\s*(?:[-*\u2022]|\d+[.)]|\#+)\s)"
)
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Prof|vs|etc|e\.g|i\.e|No|Inc|Jr|Sr|U\.S)\.$")
_CLAUSE = re.compile(r"[,;:\u2014\u2013]\s")
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def open_structure(text: str) -> str:
    """A sentence on what is open at the end of a text, outermost first, and on the line it stands in."""
    parts = [_describe(name, text[at:]) for name, at in _open(text)[-2:]]
    parts += _line_state(text)
    if not parts:
        return "No quotation, bracket or list is open."
    return f"Still open: {'; '.join(parts)}."


def _open(text: str) -> list[tuple[str, int]]:
    """(name, place after it) of everything opened and not closed, outermost first."""
    stack: list[tuple[str, str, int]] = []  # what closes it, its name, where its contents begin

    def close(kind: str) -> None:
        for i in range(len(stack) - 1, -1, -1):
            if stack[i][0] == kind:
                del stack[i:]
                return

    for match in _OPENERS.finditer(text):
        mark, at = match[0], match.end()
        fenced = any(kind == "```" for kind, _, _ in stack)
        if mark == "```" or mark == "$$":
            if any(kind == mark for kind, _, _ in stack):
                close(mark)
            elif not fenced:
                stack.append((mark, _NAMES[mark], at))
        elif mark == "<!--":
            stack.append(("-->", "a comment", at))
        elif mark == "-->":
            close(mark)
        elif match[2]:
            tag = match[2].lower()
            if match[1]:
                close(f"<{tag}")
            elif tag not in _VOID and not match[3].endswith("/"):
                stack.append((f"<{tag}", f"the tag {match[2][:20]}", at))
        elif mark == '"':
            # An apostrophe-like mark before a digit's end is inches; everything else opens or closes by turns.
            if any(kind == mark for kind, _, _ in stack):
                close(mark)
            elif not text[match.start() - 1 : match.start()].isdigit():
                stack.append((mark, _NAMES[mark], at))
        elif mark in _PAIRS:
            close(_PAIRS[mark])
        elif mark in _NAMES:
            stack.append((mark, _NAMES[mark], at))
        elif not fenced:
            # A quotation or an aside in prose does not outlive its paragraph: its end was forgotten or is a smiley.
            stack = [entry for entry in stack if entry[0] not in ('"', "(", "\u201c", "[")]
    return [(name, at) for _, name, at in stack]


def _describe(name: str, inside: str) -> str:
    begins = " ".join(inside.split()[:3]).replace('"', "'")[:40]
    if not begins:
        return f"{name} that has just begun"
    return f'{name} that begins "{begins}"'


def _line_state(text: str) -> list[str]:
    """The list item, heading, table row, tag or indented block that the last line is."""
    line = text[text.rfind("\n") + 1 :]
    parts = []
    if match := _ITEM.match(line):
        if match[1]:
            parts.append(f"item {match[1]} of a numbered list")
        elif match[2]:
            parts.append(f"item {match[2]} of a lettered list")
        else:
            parts.append(f"item {_items(text)} of a bulleted list")
    elif re.match(r"#{1,6}\s", line):
        parts.append("a heading")
    elif line.count("|") >= 2:
        parts.append(f"column {line.count('|')} of a table row")
    elif match := re.match(r"( {2,}|\t+)\S", line):
        depth = len(match[1].replace("\t", "    "))
        parts.append(f"a line indented by {depth}")
    if re.search(r"<[a-zA-Z/][^<>\n]{0,80}$", line[-90:]):
        parts.append("a tag")
    if re.search(r"(?:https?://|www\.)\S*$", line[-200:]):
        parts.append("a web address")
    return parts


def _items(text: str) -> int:
    """How many bulleted lines stand in a row at the end."""
    count = 0
    for line in reversed(text[-1500:].split("\n")):
        match = _ITEM.match(line)
        if match and match[3]:
            count += 1
        elif line.strip():
            break
    return count


def sentence_state(text: str) -> str:
    """A sentence on how far the current sentence has come, and on the clause that is open in it."""
    recent = text[-800:]
    begin = 0
    for match in _SENTENCE_END.finditer(recent):
        if not _ABBREVIATION.search(recent, max(0, match.start() - 8), match.start() + 1):
            begin = match.end()
    sentence = recent[begin:]
    found = sentence.split()
    if not found:
        return "The last sentence is complete."
    n = len(found)
    clause = _CLAUSE.split(sentence)
    opened = next((w for w in reversed(found[:-1]) if w.lower().strip("\"'(,") in SUBORDINATORS), None)
    text = f'The sentence is {_counted(n)} in and began "{_first(found)}"'
    if len(clause) > 1 and clause[-1].split():
        text += f", {_counted(len(clause[-1].split()))} into its clause {_counted_number(len(clause))}"
    elif opened is not None:
        text += f", inside a clause opened by {opened.lower().strip(chr(34) + chr(39) + '(,')}"
    return text + "."


def _first(found: list[str]) -> str:
    return " ".join(word[:20] for word in found[:3]).replace('"', "'")


def _counted(n: int) -> str:
    if n < len(_COUNTS):
        return f"{_COUNTS[n]} word{'s' if n != 1 else ''}"
    return f"{n} words" if n <= 20 else f"about {n // 10 * 10} words"


def _counted_number(n: int) -> str:
    return _COUNTS[n] if n < len(_COUNTS) else str(n)
