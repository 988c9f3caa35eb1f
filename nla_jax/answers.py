"""Teachers' answers on disk: paid for once, kept for every later run, store and model.

One SQLite file (`answers.sqlite`) in write-ahead mode with full synchronisation: an answer is on the disk when `put`
returns, a kill at any byte leaves the file sound, and several runs may use one directory. Every answer carries a
checksum. No prompt and no key of a provider is in the file. SQLite's locks need a local file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_jax.errors import TeacherError
from nla_jax.teacher_prompt import Answer

_APPLICATION_ID = 0x6E6C6161  # "nlaa": tells our file from any other SQLite file
_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
  key BLOB PRIMARY KEY, provider TEXT, model TEXT, endpoint TEXT, text TEXT NOT NULL, finish TEXT NOT NULL,
  input_tokens INTEGER, output_tokens INTEGER, checksum BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batches (
  nonce TEXT PRIMARY KEY, endpoint TEXT NOT NULL, newest TEXT, id TEXT, size INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS asked (key BLOB PRIMARY KEY, nonce TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS asked_by_batch ON asked (nonce);
"""
_AT_ONCE = 500  # variables in one statement


def answer_key(
    provider: str, model: str, settings: Mapping[str, Any], instruction: str, prompt: str, attempt: int = 0
) -> bytes:
    """sha256 over everything that shapes an answer. A second `attempt` at a dropped answer has a key of its own."""
    parts = [provider, model, dict(settings), instruction, prompt]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).digest()
    return retry_key(key) if attempt else key


def retry_key(key: bytes) -> bytes:
    """The key of the second attempt at the prompt whose first attempt is kept under `key`."""
    return hashlib.sha256(b"second attempt " + key).digest()


@dataclass(frozen=True)
class Batch:
    """A batch of prompts that a provider was given, or (`id` is None) was about to be given when the run ended.

    `newest` is the newest batch the provider knew before; `nonce` names the attempt to submit."""

    nonce: str
    endpoint: str
    newest: str | None
    id: str | None
    size: int


class Answers:
    """The answers of a directory, by key. Used from one thread; other processes may use the directory meanwhile."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser()
        self.path = self.directory / "answers.sqlite"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TeacherError(f"{self.directory}: {error.strerror}", fix="another --answers directory") from None
        with self._reported():
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=60)
            with contextlib.closing(self._db.cursor()) as cursor, self._lock("open.lock"):
                # Under a lock: two first runs at once would find the file half set up.
                version = cursor.execute("PRAGMA user_version").fetchone()[0]
                owner = cursor.execute("PRAGMA application_id").fetchone()[0]
                fresh = not cursor.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                if not fresh and (owner, version) != (_APPLICATION_ID, _VERSION):
                    raise TeacherError(
                        f"{self.path}", expected="answers of this version of nla", got="another SQLite file"
                    )
                cursor.execute("PRAGMA journal_mode = WAL")
                cursor.execute("PRAGMA synchronous = FULL")
                if fresh:
                    script = f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {_VERSION};"
                    cursor.executescript(f"BEGIN IMMEDIATE; {script} {_SCHEMA} COMMIT;")
            # Whether answers can be kept must be known before the first is paid for.
            with self._transaction():
                self._db.execute(f"PRAGMA user_version = {_VERSION}")

    @classmethod
    def existing(cls, directory: str | Path) -> Answers | None:
        """The answers of a directory that has some; nothing is created."""
        return cls(directory) if (Path(directory).expanduser() / "answers.sqlite").is_file() else None

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- answers ------------------------------------------------------------------------------------------------------

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, Answer]:
        """The answers there are to these keys. TeacherError where one does not match its checksum."""
        found = {}
        columns = "key, text, finish, input_tokens, output_tokens, endpoint, checksum"
        for part in _parts(keys):
            marks = ",".join("?" * len(part))
            with self._reported():
                rows = self._db.execute(f"SELECT {columns} FROM answers WHERE key IN ({marks})", part).fetchall()
            for key, text, finish, tokens_in, tokens_out, endpoint, checksum in rows:
                if checksum != _checksum(key, text, finish):
                    raise TeacherError(f"{self.path}: answer {key.hex()[:12]} is damaged", fix="a copy of the file")
                found[key] = Answer(text, finish, tokens_in, tokens_out, endpoint)
        return found

    def get(self, key: bytes) -> Answer | None:
        return self.get_many([key]).get(key)

    def put_many(self, items: Iterable[tuple[bytes, Answer]], provider: str, model: str) -> None:
        """Keeps answers; they are on the disk when this returns. The first answer to a key stays."""
        rows = [
            (k, provider, model, a.endpoint, t, a.finish, a.input_tokens, a.output_tokens, _checksum(k, t, a.finish))
            # A lone surrogate, which JSON can name and UTF-8 cannot hold, must not lose an answer.
            for k, a, t in ((k, a, a.text.encode("utf-8", "replace").decode()) for k, a in items)
        ]
        with self._reported(), self._transaction():
            self._db.executemany(f"INSERT OR IGNORE INTO answers VALUES ({','.join('?' * 9)})", rows)

    def __len__(self) -> int:
        with self._reported():
            return int(self._db.execute("SELECT count(*) FROM answers").fetchone()[0])

    # -- batches ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def submitting(self) -> Iterator[None]:
        """Held by the one run that submits batches, so that an intent found without an id is one that a kill left."""
        with self._lock("batches.lock"):
            yield

    def intend(self, batch: Batch, keys: Sequence[bytes]) -> None:
        """Records that these keys are about to be submitted, before they are."""
        with self._reported(), self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?, ?)",
                (batch.nonce, batch.endpoint, batch.newest, batch.id, batch.size),
            )
            self._db.executemany("INSERT OR REPLACE INTO asked VALUES (?, ?)", [(key, batch.nonce) for key in keys])

    def submitted(self, nonce: str, batch_id: str) -> None:
        with self._reported(), self._transaction():
            self._db.execute("UPDATE batches SET id = ? WHERE nonce = ?", (batch_id, nonce))

    def finish_batch(self, nonce: str, items: Iterable[tuple[bytes, Answer]], provider: str, model: str) -> None:
        """Keeps what a batch brought and forgets the batch; keys it left without an answer may be asked again."""
        self.put_many(items, provider, model)
        with self._reported(), self._transaction():
            self._db.execute("DELETE FROM asked WHERE nonce = ?", (nonce,))
            self._db.execute("DELETE FROM batches WHERE nonce = ?", (nonce,))

    def batches(self, endpoint: str) -> list[Batch]:
        """Batches of an endpoint that are not finished."""
        with self._reported():
            columns = "nonce, endpoint, newest, id, size"
            rows = self._db.execute(f"SELECT {columns} FROM batches WHERE endpoint = ? ORDER BY rowid", (endpoint,))
            return [Batch(*row) for row in rows.fetchall()]

    def in_batches(self, keys: Iterable[bytes]) -> dict[bytes, str]:
        """The nonce of the unfinished batch that holds a key, for those in one."""
        found: dict[bytes, str] = {}
        for part in _parts(keys):
            marks = ",".join("?" * len(part))
            with self._reported():
                found.update(self._db.execute(f"SELECT key, nonce FROM asked WHERE key IN ({marks})", part).fetchall())
        return found

    # -- the file -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """The operating system drops the lock of a process that is killed."""
        with (self.directory / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            fix = "free space and permissions" if isinstance(error, sqlite3.OperationalError) else "a copy of the file"
            raise TeacherError(f"{self.path}: {error}", fix=f"{fix}, or another --answers directory") from None
        except OSError as error:
            raise TeacherError(f"{self.path}: {error.strerror}", fix="another --answers directory") from None


def _checksum(key: bytes, text: str, finish: str) -> bytes:
    return hashlib.sha256(b"\0".join([key, finish.encode(), text.encode()])).digest()[:16]


def _parts(keys: Iterable[bytes]) -> Iterator[list[bytes]]:
    listed = list(keys)
    for first in range(0, len(listed), _AT_ONCE):
        yield listed[first : first + _AT_ONCE]
