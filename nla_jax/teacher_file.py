"""Explanations from the user's own file, for `nla teach STORE file:PATH`: no model is asked.

The file is JSONL or parquet with `doc_id` (as in the store), `position` (token of the document, counted from 0) and
`explanation`. A row of the store that the file does not name stays without one; a document or position that the store
does not hold is an error, since it mostly means that the file was made for another store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from nla_jax.errors import InputError
from nla_jax.teacher import Lesson
from nla_jax.teacher_prompt import REASONS

PREFIX = "file:"
COLUMNS = ("doc_id", "position", "explanation")
_ROWS = 1 << 15  # looked at or read at a time


def file_of(teacher: str) -> Path | None:
    """The path of a teacher "file:PATH"; None for another one, InputError where there is no such file."""
    if not teacher.startswith(PREFIX):
        return None
    path = Path(teacher.removeprefix(PREFIX)).expanduser()
    if not path.is_file():
        raise InputError(f"teacher {teacher!r}", expected="a JSONL or parquet file", got="no such file")
    return path


def file_meta(path: Path, max_words: int) -> dict[str, Any]:
    """What names this teacher in a store: the file's name and what is in it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"provider": "file", "model": path.name, "sha256": digest, "max_words": max_words}


def teach_file(store: Any, rows: np.ndarray, path: Path, *, max_words: int, progress: bool = False) -> Lesson:
    """The file's explanations of `rows`; the lesson holds only rows that the file names.

    Empty texts, texts of more than `max_words` words and texts with explanation tags are dropped and counted, as an
    asked teacher's are. InputError for lines that do not fit and for documents or positions that are not in the store.
    """
    found = _read(path)
    wanted = np.zeros(store.n_rows, bool)
    wanted[rows] = True
    unseen, taught = set(found), []
    texts: list[str | None] = []
    reasons: list[str] = []
    with tqdm(total=store.n_rows, desc="teaching", unit="row", disable=not progress) as bar:
        for start in range(0, store.n_rows, _ROWS):
            table = store.table(slice(start, start + _ROWS))
            ids = store.doc_ids(table["doc"])
            for i, key in enumerate(zip(ids, table["position"].tolist(), strict=True)):
                if key not in found:
                    continue
                unseen.discard(key)
                if wanted[start + i]:
                    text, reason = _checked(found[key], max_words)
                    taught.append(start + i)
                    texts.append(text)
                    reasons.append(reason)
            bar.update(len(ids))
    if unseen:
        known = set(store.doc_ids(slice(None)))
        name, position = min(unseen, key=lambda key: (key[0] in known, key))
        what = f"position {position} of document {name!r}" if name in known else f"document {name!r}"
        more = f", and {len(unseen) - 1:,} other lines" if len(unseen) > 1 else ""
        fix = "a file made for this store (nla data shows its ids and positions)"
        raise InputError(f"{path}: {what} is not in the store{more}", fix=fix)
    return Lesson(np.asarray(taught, np.int64), texts, reasons, unique=len(set(texts)))


def _checked(text: str, max_words: int) -> tuple[str | None, str]:
    text = text.strip()
    reason = "ok"
    if not text:
        reason = "empty"
    elif "explanation>" in text.lower():
        reason = "tags"
    elif len(text.split()) > max_words:
        reason = "too_long"
    assert reason == "ok" or reason in REASONS
    return (text if reason == "ok" else None), reason


def _read(path: Path) -> dict[tuple[str, int], str]:
    """(doc_id, position) -> explanation; the same line twice is one, two different ones are an error."""
    out: dict[tuple[str, int], str] = {}
    for place, value in _parquet(path) if path.suffix.lower() == ".parquet" else _lines(path):
        name, position, text = (value.get(column) for column in COLUMNS)
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise InputError(f"{path}, {place}: doc_id", expected="a string", got=repr(name))
        if isinstance(position, bool) or not isinstance(position, int) or position < 0:
            raise InputError(f"{path}, {place}: position", expected="a token position, 0 or more", got=repr(position))
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(f"{path}, {place}: explanation", expected="a string", got=type(text).__name__)
        if out.setdefault((str(name), position), text) != text:
            raise InputError(f"{path}, {place}: a second explanation of position {position} of document {name!r}")
    if not out:
        raise InputError(f"{path}: explanations", expected="lines with " + ", ".join(COLUMNS), got="none")
    return out


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise InputError(f"{path}, line {number}", expected="a JSON object", got=repr(line[:40]))
            yield f"line {number}", value


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
            if missing:
                got = ", ".join(file.schema_arrow.names)[:80]
                raise InputError(f"{path}: columns", expected=", ".join(COLUMNS), got=got)
            number = 0
            for batch in file.iter_batches(_ROWS, columns=list(COLUMNS)):
                for value in batch.to_pylist():
                    yield f"row {number}", value
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as parquet", got=error) from None
