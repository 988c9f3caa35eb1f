"""Drawn explanations on disk: a header that says what they depend on, then a line of JSON for each sample.

Lines are appended a batch at a time and flushed, so a run that is killed loses a batch at most; a last line that was
torn is dropped when the file is opened again. Of several processes the first reads and writes the file; all of them
have the samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from nla_jax.arrays import canonical
from nla_jax.errors import InputError
from nla_jax.evals import hosts
from nla_jax.evals.batched import Drawn

FILE, FORMAT = "explanations.jsonl", "nla_jax.eval.explanations"


class Explanations:
    """Samples by (row, sample): text, failed, length. `path` None keeps them in memory alone.

    `key`: what the texts depend on. A file with another key is begun anew, and `note` is told which entry differs;
    `names`: (doc_id, position) of each row, for people who read the file."""

    def __init__(
        self,
        path: Path | None,
        key: Mapping[str, Any],
        names: list[tuple[str, int]],
        note: Callable[[str], None] = lambda message: None,
    ):
        self.path, self.names = path, names
        self.samples: dict[tuple[int, int], tuple[str, bool, int]] = {}
        self._header = {"format": FORMAT, "version": 1, "key": dict(key)}
        if path is None:
            return
        for line in hosts.by_first(lambda: self._open(path, note)):
            self.samples[line["row"], line["sample"]] = line["text"], line["failed"], line["length"]

    def add(self, drawn: Iterable[Drawn]) -> None:
        text = ""
        for row, sample, words, failed, length in drawn:
            self.samples[row, sample] = words, failed, length
            doc_id, position = self.names[row]
            line = {"row": row, "sample": sample, "doc_id": doc_id, "position": position}
            text += json.dumps({**line, "text": words, "failed": failed, "length": length}) + "\n"
        if self.path is not None and text:
            hosts.by_first(lambda: self._append(text))

    def _append(self, text: str) -> None:
        assert self.path is not None
        try:
            with self.path.open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            fix = "space, then the same command again: what is drawn is kept"
            raise InputError(f"{self.path}: explanations cannot be kept", got=error.strerror, fix=fix) from None

    def _open(self, path: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
        """The samples of the file, which then ends with them; begun where there is none of this key."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            old = path.read_bytes() if path.exists() else b""
            whole, lines = self._read(old, note)
            if whole != len(old) or not whole:
                self._begin(old[:whole] if whole else (canonical(self._header) + "\n").encode())
        except OSError as error:
            raise InputError(f"{path}: explanations cannot be kept", got=error.strerror) from None
        return lines

    def _read(self, data: bytes, note: Callable[[str], None]) -> tuple[int, list[dict[str, Any]]]:
        """How many bytes are whole lines of this key, and the samples in them."""
        lines, whole = [], 0
        for i, raw in enumerate(data.splitlines(keepends=True)):
            try:
                if not raw.endswith(b"\n"):
                    break
                line = json.loads(raw)
                if i == 0:
                    other = self._differs(line)
                    if other:
                        note(f"{self.path}: {other}; explanations are drawn anew")
                        return 0, []
                else:
                    lines.append({k: line[k] for k in ("row", "sample", "text", "failed", "length")})
            except (ValueError, KeyError, TypeError):
                break  # torn, and with it all that follows
            whole += len(raw)
        return whole, lines

    def _differs(self, header: Any) -> str:
        """What is wrong with a header, "" if nothing is."""
        if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != 1:
            return "not a file of explanations of this version"
        was, now = header.get("key", {}), json.loads(canonical(self._header["key"]))
        name = next((k for k in sorted({*was, *now}) if was.get(k) != now.get(k)), None)
        return "" if name is None else f"drawn with {name} {_short(was.get(name))}, now {_short(now.get(name))}"

    def _begin(self, data: bytes) -> None:
        assert self.path is not None
        part = self.path.with_name(f".{self.path.name}.part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else f"{text[:12]}..."
