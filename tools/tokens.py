"""How the tokens of a text are shown: characters that span tokens, invisible characters, messages of a chat."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from nla_jax.errors import NLAError

_REPLACEMENT = "\ufffd"
_LONGEST_GROUP = 12  # tokens; a character is at most 4 bytes, hence 4 tokens, but neighbours may share tokens
_JOINING = "\u200d\ufe0e\ufe0f"  # parts of emoji: not shown, but not to be cut out either
_NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "␣", "\u00a0": "⍽"}


@dataclasses.dataclass(frozen=True)
class TokenView:
    """One token for display.

    A character that spans several tokens is the `text` of the first one, and empty for the others; `part` counts
    from 1 to `parts`. Texts of all tokens joined are the text that was read, special tokens included.
    """

    position: int
    id: int
    text: str
    special: bool = False
    part: int = 1
    parts: int = 1


def token_views(tokenizer: Any, ids: Sequence[int]) -> list[TokenView]:
    """Views of a text's tokens, with parts of characters put together."""
    views: list[TokenView] = []
    at = 0
    while at < len(ids):
        size, text = _group(tokenizer, ids, at)
        for k in range(size):
            i = int(ids[at + k])
            views.append(TokenView(at + k, i, text if k == 0 else "", i in tokenizer.special_ids, k + 1, size))
        at += size
    return views


def _group(tokenizer: Any, ids: Sequence[int], at: int) -> tuple[int, str]:
    text = tokenizer.token_str(ids[at])
    if _REPLACEMENT not in text:
        return 1, text
    windows = [list(ids[at : at + size]) for size in range(1, min(_LONGEST_GROUP, len(ids) - at) + 1)]
    joined = [tokenizer.decode(window) for window in windows]
    for size, whole in enumerate(joined, 1):
        if _REPLACEMENT not in whole:
            return size, whole
    for size, whole in enumerate(joined, 1):
        if tokenizer.encode(whole) == windows[size - 1]:  # U+FFFD stands in the text itself
            return size, whole
    return 1, text  # half a character


@dataclasses.dataclass(frozen=True)
class MessageSpan:
    """Tokens [start, end) that one message of a chat was rendered to, the template's own around it included."""

    role: str
    start: int
    end: int


def message_spans(tokenizer: Any, messages: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> list[MessageSpan]:
    """Where each message stands among `ids`, by rendering ever longer beginnings of the chat.

    Messages that a template moves into another one (Gemma: the system message) share a span.
    """
    spans: list[MessageSpan] = []
    start, roles = 0, []
    for count, message in enumerate(messages, 1):
        roles.append(str(message["role"]))
        try:
            prefix = tokenizer.encode_chat(list(messages[:count])) if count < len(messages) else list(ids)
        except NLAError:  # this template does not take such a beginning
            continue
        if len(prefix) > start and list(ids[: len(prefix)]) == list(prefix):
            spans.append(MessageSpan(" + ".join(roles), start, len(prefix)))
            start, roles = len(prefix), []
    return spans


def visible(text: str) -> str:
    """A token's text with its whitespace and control characters shown by signs: " a\\n" is "␣a⏎"."""
    if text and all(c in _JOINING for c in text):  # alone they would be seen as nothing
        return "".join(f"<U+{ord(c):04X}>" for c in text)
    return "".join(_NAMED[c] if c in _NAMED else _safe(c) for c in text)


def printable(text: str) -> str:
    """A text that a terminal can be given: line ends stay, other control characters become signs."""
    return "".join(c if c in "\n " else " " if c == "\t" else _safe(c) for c in text.replace("\r\n", "\n"))


def _safe(c: str) -> str:
    """Control, direction and invisible characters as signs, so that no text can act on the terminal."""
    if ord(c) < 32:
        return chr(0x2400 + ord(c))
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in _JOINING:
        return f"<U+{ord(c):04X}>"
    return c
