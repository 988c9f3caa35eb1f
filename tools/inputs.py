"""What commands read: a text, a chat, texts one per row, and lists of positions. Vectors are in vectors.py.

Files are read strictly: text that is not UTF-8, or JSON of another shape, is an InputError that names the place.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nla_jax.errors import InputError

Messages = list[dict[str, Any]]
_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_CHAT_SHAPE = 'a list such as [{"role": "user", "content": "..."}], or {"messages": [...]}'
_ITEM = re.compile(r"([+-]?[0-9]{1,18})|([+-]?[0-9]{0,18}):([+-]?[0-9]{0,18})(?::([+-]?[0-9]{0,18}))?")


def read_source(text: str | None, file: Path | None, chat: Path | None) -> str | Messages:
    """The text or chat that exactly one of the three names; a text of "-" is read from standard input."""
    given = [name for name, value in (("TEXT", text), ("--file", file), ("--chat", chat)) if value is not None]
    if len(given) != 1:
        fix = 'nla explain "some text" ..., or --file PATH, or --chat PATH.json'
        raise InputError("what to explain", expected="one of TEXT, --file, --chat", got=given or "none", fix=fix)
    if chat is not None:
        return read_chat(chat)
    if file is not None:
        return read_text(file)
    assert text is not None
    if text != "-":
        return text
    return _without_last_line_end(_decoded(sys.stdin.buffer.read(), "standard input"))


def read_text(path: Path) -> str:
    """A file's text: UTF-8, kept as it is except for a byte order mark and the line end at its very end."""
    return _without_last_line_end(_decoded(path.read_bytes(), str(path)))


def read_chat(path: Path) -> Messages:
    """Chat messages of a JSON file, each with a known role and a content of text."""
    value = _parsed(_decoded(path.read_bytes(), str(path)), str(path))
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if messages == [] else _kind(value)
        raise InputError(f"{path}: chat", expected=_CHAT_SHAPE, got=got)
    for i, message in enumerate(messages):
        _check_message(message, f"{path}: message {i}")
    return messages


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise InputError(where, expected='{"role": ..., "content": ...}', got=_kind(message))
    if "role" not in message and {"from", "value"} <= set(message):
        raise InputError(
            f'{where} has the keys "from" and "value"',
            expected='"role" and "content"',
            fix="renaming them, and human to user, gpt to assistant",
        )
    if message.get("role") not in _ROLES:
        raise InputError(f"{where}: role", expected=" or ".join(_ROLES), got=repr(message.get("role")))
    content = message.get("content")
    parts = content if isinstance(content, list) and content else [{"type": "text", "text": content}]
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            got = "no content" if content is None else _kind(content)
            raise InputError(f"{where}: content", expected='text, or [{"type": "text", "text": "..."}]', got=got)


def check_marker(source: str | Messages, marker: str) -> None:
    """Raises where the text to explain holds the character that the AV's prompt reserves for the vector."""
    for where, text in _texts_of(source):
        at = text.find(marker)
        if at >= 0:
            line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
            raise InputError(
                f"{where} holds {marker!r} at character {at} (line {line}, column {column}),"
                " which is reserved as the marker of the AV's prompt",
                fix="removing it, or --allow-marker (the text itself is only read by the target)",
            )


def _texts_of(source: str | Messages) -> Iterator[tuple[str, str]]:
    if isinstance(source, str):
        yield "the text", source
        return
    for i, message in enumerate(source):
        content = message["content"]
        for part in [content] if isinstance(content, str) else [p["text"] for p in content]:
            yield f"chat message {i}", part


def parse_indices(spec: str, length: int, what: str = "position") -> list[int]:
    """Indices under `length` from a comma list of numbers and Python slices ("10,-1,30:40,:20:5").

    Order is kept and repeats are dropped. A number out of range, or a slice that selects nothing, is an InputError.
    """
    chosen: dict[int, None] = {}
    for item in (part.strip() for part in spec.split(",")):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise InputError(f"{what}s {spec!r}", expected='numbers and slices such as "10,-1,30:40"', got=repr(item))
        if match[1] is not None:
            at = int(match[1])
            if not -length <= at < length:
                raise InputError(f"{what} {at} is out of range", expected=f"{-length}..{length - 1} ({length} {what}s)")
            chosen[at % length] = None
            continue
        start, stop, step = (int(part) if part else None for part in match.group(2, 3, 4))
        if step == 0:
            raise InputError(f"{what}s {item!r}", expected="a step other than 0")
        found = range(length)[start:stop:step]
        if not found:
            raise InputError(f"{what}s {item!r} select nothing", expected=f"within 0..{length - 1} ({length} {what}s)")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def read_texts(path: Path) -> list[str]:
    """One text per row: lines of a .txt, `text` of a .jsonl, .parquet, or the .json of `nla explain`."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_texts(path)
    if suffix not in (".txt", ".jsonl", ".json"):
        raise InputError(
            f"{path}: texts", expected=".txt (one per line), .jsonl, .json or .parquet", got=suffix or "none"
        )
    content = _decoded(path.read_bytes(), str(path))
    if suffix == ".json":
        value = _parsed(content, str(path))
        rows = value.get("explanations") if isinstance(value, dict) else value
        if not isinstance(rows, list):
            raise InputError(
                f"{path}", expected='a list, or the output of nla explain ("explanations")', got=_kind(value)
            )
        texts = [_text_field(row, f"{path}: row {i}") for i, row in enumerate(rows)]
    else:
        # Only "\n" ends a line: str.splitlines would also cut at U+2028 and form feeds inside a text.
        lines = _without_last_line_end(content).split("\n") if content else []
        lines = [line.removesuffix("\r") for line in lines]
        if suffix == ".jsonl":
            numbered = [(f"{path}: line {i + 1}", line) for i, line in enumerate(lines) if line.strip()]
            texts = [_text_field(_parsed(line, where), where) for where, line in numbered]
        else:
            texts = lines
    if not texts:
        raise InputError(f"{path}: texts", expected="at least one", got="none")
    return texts


def _parquet_texts(path: Path) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
        if "text" not in schema.names:
            raise InputError(f"{path}", expected='a column "text"', got=", ".join(schema.names))
        column = pq.read_table(path, columns=["text"])["text"]
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise InputError(f"{path}: not readable as parquet", got=error) from None
    texts = column.to_pylist()
    if not texts:
        raise InputError(f"{path}: texts", expected="at least one", got="none")
    return [_text_field(text, f"{path}: row {i}") for i, text in enumerate(texts)]


def _text_field(row: Any, where: str) -> str:
    text = row.get("text") if isinstance(row, dict) else row
    if not isinstance(text, str):
        raise InputError(where, expected='a text, or an object with "text"', got=_kind(row))
    return text


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise InputError(f"{where}: text", expected="UTF-8", got=got, fix="iconv -t UTF-8") from None


def _parsed(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as JSON", got=error) from None


def _without_last_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    if isinstance(value, dict) and value:
        return f"an object with the keys {', '.join(map(str, list(value)[:6]))}"
    return names.get(type(value), type(value).__name__)
