"""Corpora: documents and chats from files, as a stream, and their tokens.

Sources are text files, JSON lines (also gzip or zstd), JSON lists, parquet, directories of these, directories that
Hugging Face `datasets` saved, and datasets on the hub (`hub:org/name`). What holds no document (empty, binary, not
UTF-8, malformed) is skipped and counted by reason, and the first cases are kept with file and line; nothing in a file
ends the reading of the others.

Documents are called by their id field where they have one, else `{file}:{row}` with the row's number in its file, so
that a document has the same name in whatever part of the corpus it is read.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_jax.corpus_files import (
    Bad,
    CorpusFile,
    check_text_split,
    column_names,
    download,
    find_files,
    read_rows,
)
from nla_jax.errors import InputError

if TYPE_CHECKING:
    from nla_jax.tokenizer import Tokenizer

MAX_CHARS = 2_000_000  # a longer text is cut there; a longer chat cannot be cut, and is skipped
TEXT_FIELDS = ("text", "content", "document")
MESSAGE_FIELDS = ("messages", "conversations", "conversation")
ID_FIELDS = ("doc_id", "id")
REASONS = ("empty", "too_long", "binary", "not_utf8", "malformed", "unreadable", "refused")  # counted, no document
KEPT_PROBLEMS = 20
_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bing", "bard", "claude"),
    "tool": ("tool", "function", "ipython", "observation", "function_response"),
}
_ROLE_OF = {alias: role for role, aliases in _ROLES.items() for alias in aliases}
_ROLE_CODES = {"system": 1, "user": 2, "assistant": 3, "tool": 4}
_TEMPLATE = 5
_KEPT_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")
_CONTROL = re.compile("[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f\ufffd]")
_MOST_CONTROL = 0.02  # share of control and replacement characters from which a text counts as binary
# What chat templates that write the date are told, so that a corpus has the same tokens on every day.
_TODAY = datetime.date(2024, 7, 26)


@dataclass(frozen=True)
class Document:
    """A document (`text`) or a chat (`messages`: dicts with `role` system, user, assistant or tool, and `content`)."""

    doc_id: str
    text: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None


class Corpus:
    """An iterable of Documents; make it with `open_corpus`. Every iteration starts anew.

    `counts`: documents, cut (texts cut at MAX_CHARS) and one number per reason of REASONS, as far as the iteration
    has come; `problems`: the first skipped rows, as "file:row: reason"; `name`: what the source is called, without
    its directory; `identity`: a dict that tells two corpora apart (files, sizes, fields, rows).
    """

    def __init__(self, name: str, files: list[CorpusFile], options: Mapping[str, Any]):
        self.name, self.files, self.options = name, files, options
        self.counts: dict[str, int] = {}
        self.problems: list[str] = []
        self._reset()

    def _reset(self) -> None:
        self.counts.clear()  # cleared, not replaced: whoever writes the manifest holds on to it
        self.counts.update(dict.fromkeys(("documents", "cut", *REASONS), 0))
        self.problems.clear()

    @property
    def identity(self) -> dict[str, Any]:
        sizes = [[f.stem, f.path.stat().st_size] for f in self.files]
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
        given = {k: [v.start, v.stop, v.step] if isinstance(v, slice) else v for k, v in self.options.items()}
        return {"name": self.name, "files": len(self.files), "sizes_sha256": digest, "options": given}

    def skip(self, where: str, reason: str, why: str) -> None:
        """Counts something that gave no document. For callers too: a chat that the template refuses is `refused`."""
        self.counts[reason] += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(f"{where}: {why}")

    def __iter__(self) -> Iterator[Document]:
        self._reset()
        seen = _Seen()
        rows = self.options["rows"] or slice(None)
        start, stop, step = rows.start or 0, rows.stop, rows.step or 1
        number = -1  # of the row in the whole corpus
        for file in self.files:
            columns = self._columns(file)
            first = number + 1
            if stop is not None and first >= stop:
                break
            last = -1
            for row, value in read_rows(
                file, text_split=self.options["text_split"], columns=columns, skip=start - first
            ):
                if row < 0:  # about the whole file
                    self.skip(file.path.name, value.reason, value.why)
                    continue
                last = max(row, last)
                number = first + last
                if stop is not None and number >= stop:
                    break
                if number < start or (number - start) % step:
                    continue
                where = f"{file.path.name}:{row + 1}"
                found = value if isinstance(value, Bad) else self._document(value, f"{file.stem}:{row}")
                if isinstance(found, Bad):
                    self.skip(where, found.reason, found.why)
                    continue
                document, cut = found
                if document.doc_id != f"{file.stem}:{row}":
                    self._require_new(seen, document.doc_id, where)
                self.counts["documents"] += 1
                self.counts["cut"] += cut
                yield document
        if self.counts["documents"] == 0:
            got = self.problems[0] if self.problems else "no rows" if rows == slice(None) else f"no rows in {rows}"
            raise InputError(f"{self.name}: no documents", got=got, fix="--text-field or --messages-field, other files")

    def _columns(self, file: CorpusFile) -> list[str] | None:
        names = column_names(file)
        if names is None:
            return None
        o = self.options
        wanted = [o["text_field"] or TEXT_FIELDS, o["messages_field"] or MESSAGE_FIELDS, o["id_field"] or ID_FIELDS]
        fields = {f for w in wanted for f in ((w,) if isinstance(w, str) else w)}
        chosen = [name for name in names if name in fields]
        return chosen or names  # without any of them, rows say what they have instead

    def _require_new(self, seen: _Seen, doc_id: str, where: str) -> None:
        if not seen.add(doc_id):
            what = f"{where}: the document id {doc_id!r} comes a second time"
            raise InputError(
                what, expected="one document per id", fix="--id-field none, which names them by file and row"
            )

    def _document(self, value: Any, default_id: str) -> tuple[Document, bool] | Bad:
        """A row as (document, was it cut), or why it is none."""
        if isinstance(value, str):
            return _text_document(value, default_id)
        if not isinstance(value, dict):
            return Bad("malformed", f"expected an object, got {type(value).__name__}")
        o = self.options
        doc_id = _doc_id(value, o["id_field"], default_id)
        if isinstance(doc_id, Bad):
            return doc_id
        text_field, messages_field = o["text_field"], o["messages_field"]
        if text_field is None:
            chats = (messages_field,) if messages_field else MESSAGE_FIELDS
            for name in chats:
                if isinstance(value.get(name), (list, str)) and (messages_field or not isinstance(value[name], str)):
                    return _chat_document(value[name], doc_id)
            if messages_field:
                return Bad("malformed", f"no list of messages in field {messages_field!r}")
        for name in (text_field,) if text_field else TEXT_FIELDS:
            if isinstance(value.get(name), str):
                return _text_document(value[name], doc_id)
            if name in value and value[name] is None:
                return Bad("empty", f"field {name!r} is null")
        wanted = repr(text_field) if text_field else "a text (text, content, document) or messages"
        return Bad("malformed", f"expected {wanted}, got the fields {', '.join(map(str, value))[:120] or 'none'}")


class _Seen:
    """A set of strings that only grows, by 8-byte hashes: 8 bytes for each."""

    def __init__(self) -> None:
        self._new: set[int] = set()
        self._old = np.empty(0, np.uint64)

    def add(self, value: str) -> bool:
        """Whether it is new."""
        key = int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "little")
        at = int(np.searchsorted(self._old, np.uint64(key)))
        if key in self._new or (at < len(self._old) and int(self._old[at]) == key):
            return False
        self._new.add(key)
        if len(self._new) >= 1 << 16:
            self._old = np.union1d(self._old, np.fromiter(self._new, np.uint64, len(self._new)))
            self._new.clear()
        return True


def open_corpus(
    source: str | Path,
    *,
    text_field: str | None = None,
    messages_field: str | None = None,
    id_field: str | None = None,
    split: str | None = None,
    rows: slice | None = None,
    text_split: str = "file",
) -> Corpus:
    """Opens a corpus: a file, a directory, or `hub:org/name`. Nothing is read yet.

    Fields are found by name unless given (`messages`, `conversations`, `conversation`; then `text`, `content`,
    `document`; ids `doc_id`, `id`, and with `id_field="none"` none). `split` chooses among a dataset's. `rows` is a
    slice over the rows of the whole corpus, skipped ones included. `text_split` cuts text files: "file" (one
    document), "paragraph", "lines" or "words:N". InputError or HubError in one line.
    """
    check_text_split(text_split)
    if text_field and messages_field:
        raise InputError("text_field and messages_field", expected="one of the two", got="both")
    if rows is not None and ((rows.start or 0) < 0 or (rows.stop or 0) < 0 or (rows.step or 1) < 1):
        raise InputError("rows", expected="a slice forward from the beginning", got=rows)
    given = str(source)
    if given.startswith("hub:"):
        name = given.removeprefix("hub:")
        files = find_files(download(name, split), split)
    else:
        path = Path(source).expanduser()
        name, files = path.absolute().name, find_files(path, split)
    options = {
        "text_field": text_field,
        "messages_field": messages_field,
        "id_field": id_field,
        "split": split,
        "rows": rows,
        "text_split": text_split,
    }
    tables = [names for names in map(column_names, files) if names is not None]
    for field in (text_field, messages_field, None if id_field == "none" else id_field):
        if field and tables and len(tables) == len(files) and not any(field in names for names in tables):
            raise InputError(f"{name}: no column {field!r}", expected=" or ".join(tables[0]))
    return Corpus(name, files, options)


def _doc_id(value: dict[str, Any], field: str | None, default: str) -> str | Bad:
    if field == "none":
        return default
    for name in (field,) if field else ID_FIELDS:
        found = value.get(name)
        if isinstance(found, str) and found.strip() and _encodable(found):
            return found
        if isinstance(found, int) and not isinstance(found, bool):
            return str(found)
    return Bad("malformed", f"no id in field {field!r}") if field else default


def _text_document(text: str, doc_id: str) -> tuple[Document, bool] | Bad:
    bad = _unusable(text)
    return bad or (Document(doc_id, text=text[:MAX_CHARS]), len(text) > MAX_CHARS)


def _unusable(text: str) -> Bad | None:
    if not text or text.isspace():
        return Bad("empty", "no text")
    head = text[:MAX_CHARS]
    if not _encodable(head):
        return Bad("not_utf8", "a lone surrogate, which is no character")
    if "\0" in head:
        return Bad("binary", "NUL characters")
    sample = head[:100_000]
    strange = sum(1 for _ in _CONTROL.finditer(sample))
    if strange > max(2, _MOST_CONTROL * len(sample)):
        return Bad("binary", f"{strange} control or replacement characters in {len(sample)}")
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _chat_document(value: Any, doc_id: str) -> tuple[Document, bool] | Bad:
    if isinstance(value, str):  # tables that keep the list as JSON
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return Bad("malformed", "messages are text that is not JSON")
    if not isinstance(value, list):
        return Bad("malformed", f"expected a list of messages, got {type(value).__name__}")
    messages = []
    for i, item in enumerate(value):
        message = _message(item)
        if isinstance(message, Bad):
            return Bad(message.reason, f"message {i}: {message.why}")
        messages.append(message)
    together = "\n".join(m["content"] for m in messages)
    bad = _unusable(together)
    if bad is not None:
        return bad
    if len(together) > MAX_CHARS:
        return Bad("too_long", f"a chat of {len(together)} characters")
    return Document(doc_id, messages=tuple(messages)), False


def _message(item: Any) -> dict[str, Any] | Bad:
    if not isinstance(item, dict):
        return Bad("malformed", f"expected an object, got {type(item).__name__}")
    shared = "from" in item and "role" not in item
    role, content = item.get("from" if shared else "role"), item.get("value" if shared else "content")
    known = _ROLE_OF.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        return Bad("malformed", f"expected a role such as user or assistant, got {role!r}")
    if isinstance(content, list):
        parts = [p if isinstance(p, str) else p.get("text") if isinstance(p, dict) else None for p in content]
        if not all(isinstance(p, str) for p in parts):
            return Bad("malformed", "content with parts that are not text")
        content = "".join(parts)  # type: ignore[arg-type]
    if content is None and item.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        return Bad("malformed", f"expected a text as content, got {type(content).__name__}")
    kept = {k: item[k] for k in _KEPT_KEYS if item.get(k) is not None}
    return {"role": known, "content": content, **kept}


@dataclass(frozen=True)
class Tokenized:
    """The tokens of a document, at most max_tokens of them.

    `text` is what they stand for: a document's own text, or a chat as the template renders it; where there would be
    more tokens, up to the end of the last one. ids int32 [T]; roles int8 [T] (indices into manifest.ROLES: whose
    words a token belongs to, by its last character); text_end int32 [T], bytes of `text` up to and including
    the token, always at the end of a character; special bool [T]: BOS and the tokens a template wrote by name.
    """

    text: str
    ids: np.ndarray
    roles: np.ndarray
    text_end: np.ndarray
    special: np.ndarray


def tokenize_document(document: Document, tokenizer: Tokenizer, max_tokens: int) -> Tokenized:
    """At most max_tokens (1 or more) tokens of a document: plain text with what the tokenizer puts before texts
    (BOS), chats by their template.

    Strings that spell a special token are plain text in both. PromptError if the template refuses the chat.
    """
    if document.messages is not None:
        chat = tokenizer.encode_chat_with_spans(document.messages, today=_TODAY)
        text, ids, offsets = chat.text, chat.ids, chat.offsets
        by_character = np.full(len(text), _TEMPLATE, np.int8)
        for start, end, i in chat.spans:
            by_character[start:end] = _ROLE_CODES[document.messages[i]["role"]]
    else:
        assert document.text is not None
        text = document.text
        ids, offsets = _encode_head(text, tokenizer, max_tokens)
        by_character = np.zeros(len(text), np.int8)
    whole = len(ids) <= max_tokens
    ids, offsets = ids[:max_tokens], offsets[:max_tokens]
    id_array = np.array(ids, np.int32)
    special = np.isin(id_array, np.array(sorted(tokenizer.special_ids), np.int32))
    # A token that is part of a character stands for all of it, and the end never goes back.
    ends = np.maximum.accumulate(np.array([b for _, b in offsets], np.int64)) if ids else np.zeros(0, np.int64)
    roles = by_character[np.maximum(ends - 1, 0)] if len(text) else np.zeros(len(ids), np.int8)
    roles = np.where(special, _TEMPLATE, roles).astype(np.int8)
    kept = text if whole else text[: int(ends[-1])]
    text_end = _byte_lengths(kept)[ends].astype(np.int32)
    return Tokenized(kept, id_array, roles, text_end, special)


def _encode_head(text: str, tokenizer: Tokenizer, max_tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The beginning of `encode_with_offsets(text, add_special=True)`, without encoding all of a book: either all
    of it, or more than max_tokens tokens.

    A tokenizer decides about a token by the text around it; so only tokens that end well before the cut count.
    """
    size, margin = 16 * max_tokens + 4096, 2048
    while size + margin < len(text):
        ids, offsets = tokenizer.encode_with_offsets(text[: size + margin], add_special=True)
        if len(ids) > max_tokens and offsets[max_tokens][1] <= size:
            return ids, offsets
        size *= 4
    return tokenizer.encode_with_offsets(text, add_special=True)


def _byte_lengths(text: str) -> np.ndarray:
    """int64 [characters + 1]: UTF-8 bytes of the text up to each character."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])
