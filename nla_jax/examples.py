"""SFT examples as token ids: built by pure functions, and tokenized once per run into a file.

What the AV is trained on is its prompt from the marker on (what stands before it is the same for every row, and its
keys and values are computed once per step), then the explanation in its tags as the chat template renders an answer,
up to and including the end-of-turn token. The AR is trained on its prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nla_jax.errors import InputError, PromptError
from nla_jax.prompt import AVPrompt, ar_prompt_ids, av_messages, build_av_prompt, wrap_explanation
from nla_jax.sidecar import Sidecar
from nla_jax.store import Store
from nla_jax.tokenizer import Tokenizer

KINDS = ("av_sft", "ar_sft", "rl")
_BLOCK = 512  # rows tokenized at a time
_NO_TEXT, _MARKER = -1, -2  # in the place of a length: why a row has no example
_FORMAT = 1  # of the cache's files; raise it when the same inputs give other tokens

Progress = Callable[[int, int], None]  # (rows done, rows in all)


def av_response_ids(tokenizer: Tokenizer, sidecar: Sidecar, explanation: str, prompt: AVPrompt) -> list[int]:
    """What the AV is to write after its prompt: the tagged explanation and the end-of-turn token.

    Rendered and tokenized together with the prompt, as the model reads it. Whatever the template writes after the end
    of the turn (Qwen: a line end) is left out, since nothing is sampled there. PromptError if the template does not
    continue the prompt, or ends an answer with no special token.
    """
    answer = {"role": "assistant", "content": wrap_explanation(explanation)}
    ids = tokenizer.encode_chat([*av_messages(sidecar), answer], keep_special=(sidecar.marker,))
    n = len(prompt.ids)
    if tuple(ids[:n]) != prompt.ids:
        fix = "a chat template whose generation prompt is how it begins an answer"
        raise PromptError(f"{tokenizer.source}: an answered AV prompt begins unlike the AV prompt", fix=fix)
    end = next((i for i, token in enumerate(ids[n:]) if token in tokenizer.special_ids), None)
    if end is None:
        fix = "the instruct model's chat template"
        raise PromptError(f"{tokenizer.source}: the chat template ends an answer with no special token", fix=fix)
    return ids[n : n + end + 1]


def av_example(tokenizer: Tokenizer, sidecar: Sidecar, explanation: str, prompt: AVPrompt) -> list[int]:
    """The AV prompt from its marker on, then the response; `len(prompt.ids) - prompt.marker` tokens bear no loss."""
    return [*prompt.ids[prompt.marker :], *av_response_ids(tokenizer, sidecar, explanation, prompt)]


def ar_example(tokenizer: Tokenizer, sidecar: Sidecar, explanation: str) -> list[int]:
    """The AR prompt of an explanation; the vector is predicted at its last token."""
    return ar_prompt_ids(tokenizer, sidecar, explanation)


@dataclass(frozen=True)
class Examples:
    """The examples of some rows, in the order the rows were given; those that have none are left out.

    `rows` int64 [n] and `docs` int32 [n] of the store, `lengths` int32 [n] in tokens. `prompt` is the AV's,
    None for the others. `dropped` counts rows left out by reason. Token ids are in a file, not in memory.
    """

    kind: str
    rows: np.ndarray
    docs: np.ndarray
    lengths: np.ndarray
    prompt: AVPrompt | None
    dropped: dict[str, int]
    sha256: str
    _starts: np.ndarray
    _file: IO[bytes] | None

    def tokens(self, i: int) -> np.ndarray:
        """Token ids int32 of example `i`. Safe from several threads."""
        assert self._file is not None, "RL rows have no tokens"
        data = os.pread(self._file.fileno(), 4 * int(self.lengths[i]), 4 * int(self._starts[i]))
        return np.frombuffer(data, np.int32)


def make_examples(
    store: Store,
    rows: np.ndarray,
    kind: str,
    *,
    tokenizer: Tokenizer | None = None,
    sidecar: Sidecar | None = None,
    longest: int = 1 << 30,
    cache: str | Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Examples:
    """Tokenizes the explanations of `rows`; for RL only looks up their documents.

    Rows without an explanation, with more than `longest` tokens, or whose explanation holds the marker (a second one
    in the AV's context) are dropped and counted. `cache`: a directory in which the tokens are kept for later runs and
    other processes with the same rows, explanations, tokenizer and templates; by default they live as long as the run.
    """
    rows = np.asarray(rows, np.int64)
    docs = _documents(store, rows)
    if kind == "rl":
        none = np.zeros(len(rows), np.int64)
        return Examples(kind, rows, docs, none.astype(np.int32), None, {}, "", none, None)
    if tokenizer is None or sidecar is None:
        raise InputError(f"examples of kind {kind}", expected="a tokenizer and a sidecar", got="none")
    prompt = build_av_prompt(tokenizer, sidecar) if kind == "av_sft" else None

    def build(explanation: str | None) -> list[int] | int:
        if explanation is None:
            return _NO_TEXT
        if prompt is None:
            return ar_example(tokenizer, sidecar, explanation)
        if sidecar.marker in explanation:
            return _MARKER
        return av_example(tokenizer, sidecar, explanation, prompt)

    if cache is None:
        file: IO[bytes] = tempfile.TemporaryFile(prefix="nla_tokens_")
        lengths, digest = _write(store, rows, build, file, progress)
    else:
        name = _key(store, rows, kind, tokenizer, sidecar, prompt)
        file, lengths, digest = _cached(Path(cache) / name, lambda f: _write(store, rows, build, f, progress))
    starts = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0), dtype=np.int64)])[:-1]
    keep = (lengths >= 0) & (lengths <= longest)
    reasons = {
        "no_explanation": lengths == _NO_TEXT,
        "holds_marker": lengths == _MARKER,
        "too_long": lengths > longest,
    }
    dropped = {name: int(found.sum()) for name, found in reasons.items() if found.any()}
    return Examples(kind, rows[keep], docs[keep], lengths[keep], prompt, dropped, digest, starts[keep], file)


def _documents(store: Store, rows: np.ndarray) -> np.ndarray:
    out = np.empty(len(rows), np.int32)
    for a in range(0, len(rows), 1 << 16):
        out[a : a + (1 << 16)] = store.table(rows[a : a + (1 << 16)])["doc"]
    return out


def _write(
    store: Store, rows: np.ndarray, build: Callable[[str | None], Any], file: IO[bytes], progress: Progress
) -> tuple[np.ndarray, str]:
    """Writes the rows' tokens one after another; their lengths (or why there are none) and the file's sha256."""
    lengths, digest = np.empty(len(rows), np.int32), hashlib.sha256()
    for a in range(0, len(rows), _BLOCK):
        progress(a, len(rows))
        for i, explanation in enumerate(store.explanations(rows[a : a + _BLOCK]), a):
            ids = build(explanation)
            lengths[i] = ids if isinstance(ids, int) else len(ids)
            if not isinstance(ids, int):
                data = np.asarray(ids, np.int32).tobytes()
                digest.update(data)
                file.write(data)
    file.flush()
    progress(len(rows), len(rows))
    return lengths, digest.hexdigest()


def _key(
    store: Store, rows: np.ndarray, kind: str, tokenizer: Tokenizer, sidecar: Sidecar, prompt: AVPrompt | None
) -> str:
    """A name for everything that decides the tokens."""
    decides = [
        _FORMAT,
        kind,
        store.manifest["hash"],
        store.root.read_json("explanations.json"),
        hashlib.sha256(rows.tobytes()).hexdigest(),
        tokenizer.fingerprint,
        tokenizer.chat_template,
        tokenizer.bos_id,
        sorted(tokenizer.special_ids),
        sidecar.marker,
        sidecar.av_template,
        sidecar.ar_template,
        None if prompt is None else prompt.ids,
        ar_example(tokenizer, sidecar, "x") if kind == "ar_sft" else None,
    ]
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


def _cached(path: Path, write: Callable[[IO[bytes]], tuple[np.ndarray, str]]) -> tuple[IO[bytes], np.ndarray, str]:
    """Opens the file pair `path`.tokens and .npz, writing it first if it is not whole. The second is moved last."""
    tokens, index = path.with_suffix(".tokens"), path.with_suffix(".npz")
    with contextlib.suppress(OSError, ValueError, KeyError):
        with np.load(index) as found:
            lengths, digest = found["lengths"], str(found["sha256"])
        kept = tokens.open("rb")
        if hashlib.file_digest(kept, "sha256").hexdigest() == digest:
            return kept, lengths, digest
        kept.close()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(tokens) as file:
            lengths, digest = write(file)
        with _replacing(index) as file:
            np.savez(file, lengths=lengths, sha256=np.asarray(digest))
        return tokens.open("rb"), lengths, digest
    except OSError as error:
        raise InputError(f"cannot write {path.parent}", got=error, fix="another directory for the tokens") from None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
