"""Warm-start explanations: for each row of a store, 2 or 3 features written from the text prefix alone.

The teacher never sees a vector. Every answer is on disk before it counts (answers.py), so a run that was killed goes
on where it stopped; the store gets its explanations in one piece at the end, the same ones however often that was.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from nla_jax.answers import Answers, retry_key
from nla_jax.endpoint import Endpoint
from nla_jax.errors import InputError, StoreError
from nla_jax.lexical import VERSION as LEXICAL_VERSION
from nla_jax.lexical import describe
from nla_jax.providers import LEXICAL, Provider
from nla_jax.store import EXPLANATIONS
from nla_jax.store_write import DROPPED, write_explanations
from nla_jax.teacher_asking import OUTPUT_TOKENS, Asker, Asking, Rows, Run
from nla_jax.teacher_prompt import Instruction, read_explanation

WARM_START_SPLITS = ("av_sft", "ar_sft")
_ROWS_AT_ONCE = 512


@dataclass
class Estimate:
    """What a run would ask: `unique` prompts, `cached` of them on disk; the tokens are of the others."""

    rows: int = 0
    unique: int = 0
    cached: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def cost(self, price_in: float, price_out: float) -> float:
        """In the currency of the prices, which are per million tokens."""
        return (self.input_tokens * price_in + self.output_tokens * price_out) / 1e6


@dataclass
class Lesson:
    """The explanations of `rows` (None: dropped) and where they came from."""

    rows: np.ndarray
    texts: list[str | None]
    reasons: list[str]  # of each row: "ok", or a key of teacher_prompt.REASONS
    unique: int = 0  # different prompts
    reused: int = 0  # of them, those whose answer was on disk before
    asked: int = 0  # answers that this run got
    input_tokens: int = 0  # of those, as the provider counts them
    output_tokens: int = 0
    other_endpoints: tuple[str, ...] = ()  # that reused answers came from

    @property
    def ok(self) -> int:
        return self.reasons.count("ok")

    @property
    def dropped(self) -> dict[str, int]:
        return dict(sorted(Counter(reason for reason in self.reasons if reason != "ok").items()))


def choose_rows(store: Any, spec: str | None = None, limit: int | None = None) -> np.ndarray:
    """Row numbers int64 [n], ascending: those of the splits in `spec` ("av_sft,ar_sft"; "all"), the first `limit`.

    Without a spec: the splits of the two warm starts where the store is split, all rows otherwise."""
    splits = getattr(store, "splits", None)
    if spec is None:
        names = list(WARM_START_SPLITS) if splits else ["all"]
    else:
        names = [name.strip() for name in spec.split(",") if name.strip()]
    if not names:
        raise InputError("--rows", expected="split names such as av_sft,ar_sft, or all", got=repr(spec))
    if names == ["all"]:
        rows = np.arange(store.n_rows, dtype=np.int64)
    elif not splits:
        got = f"{', '.join(names)} of a store without splits"
        raise InputError("--rows", expected="all", got=got, fix="nla data split, or --rows all")
    else:
        rows = np.unique(np.concatenate([np.asarray(store.rows_of(name), np.int64) for name in names]))
    rows = rows[:limit]
    if not len(rows):
        raise InputError("rows to explain", expected="at least one", got="none", fix="--rows all")
    return rows


def estimate(
    store: Rows,
    rows: np.ndarray,
    provider: Provider,
    instruction: Instruction,
    asking: Asking,
    answers: Answers | None,
    count_tokens: Callable[[str], int] | None = None,
    progress: bool = False,
) -> Estimate:
    """What asking for these rows would take. Nothing is sent and nothing is written.

    Input tokens are counted by `count_tokens`, or taken as characters / 4; output as about 100 words each."""
    asker = Asker(store, rows, provider, instruction, asking)
    result, seen = Estimate(rows=len(rows)), set[bytes]()
    count = count_tokens or (lambda text: -(-len(text) // 4))
    with tqdm(total=len(rows), desc="estimating", unit="row", disable=not progress) as bar:
        for chunk in asker.chunks():
            new = {key: prompt for key, prompt in asker.jobs(chunk) if key not in seen}
            seen.update(new)
            known = answers.get_many(new) if answers is not None else {}
            result.unique += len(new)
            result.cached += len(known)
            result.input_tokens += sum(count(prompt) for key, prompt in new.items() if key not in known)
            bar.update(len(chunk))
    result.output_tokens = (result.unique - result.cached) * min(OUTPUT_TOKENS, provider.max_tokens)
    return result


def teach(
    store: Rows,
    rows: np.ndarray,
    provider: Provider,
    instruction: Instruction,
    asking: Asking,
    answers: Answers,
    *,
    note: Callable[[str], None] = lambda message: None,
    progress: bool = False,
) -> Lesson:
    """Explanations by a model behind an API, all answers kept in `answers`. The store is not written.

    SIGINT and SIGTERM let what is in flight come home, then raise KeyboardInterrupt; a second one does not wait.
    """
    asker = Asker(store, rows, provider, instruction, asking)
    with tqdm(total=len(rows), desc="teaching", unit="row", disable=not progress) as bar:

        def say(message: str) -> None:
            bar.clear()
            note(message)

        run = asyncio.run(_ask(asker, answers, say, bar))
    return _gather(asker, answers, run, progress)


async def _ask(asker: Asker, answers: Answers, note: Callable[[str], None], bar: tqdm) -> Run:
    provider, asking = asker.provider, asker.asking
    endpoint = Endpoint(
        provider.url,
        provider.headers,
        limits=asking.limits,
        secret=provider.key,
        key_env=provider.key_env,
        note=note,
        connections=asking.concurrency,
    )
    run = Run(asker, answers, endpoint, note, bar)
    interrupted = False
    task = asyncio.current_task()
    assert task is not None

    def interrupt() -> None:
        nonlocal interrupted
        if interrupted:
            task.cancel()
        elif not asking.batch:
            note("stopping when the replies in flight are on disk; once more to stop at once")
        interrupted = True
        endpoint.stop.set()

    async with endpoint:
        with _signals(interrupt):
            try:
                await (run.ask_batches() if asking.batch else run.ask_each())
            except asyncio.CancelledError:
                if not interrupted:
                    raise
    if interrupted:
        raise KeyboardInterrupt
    return run


@contextlib.contextmanager
def _signals(handler: Callable[[], None]) -> Any:
    """Handles SIGINT and SIGTERM while the block runs, where this thread may."""
    loop, handled = asyncio.get_running_loop(), []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, handler)
            handled.append(number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


def _gather(asker: Asker, answers: Answers, run: Run, progress: bool) -> Lesson:
    """Reads the run's answers back from disk, which makes a resumed run's result that of an uninterrupted one."""
    asking = asker.asking
    texts: list[str | None] = []
    reasons: list[str] = []
    with tqdm(total=len(run.keys), desc="reading answers", unit="row", disable=not progress) as bar:
        for first in range(0, len(run.keys), _ROWS_AT_ONCE):
            keys = run.keys[first : first + _ROWS_AT_ONCE]
            found = answers.get_many(set(keys))
            second = answers.get_many(retry_key(key) for key in set(keys)) if asking.retry_dropped else {}
            for key in keys:
                text, reason = read_explanation(found.get(key), asking.max_words)
                if text is None and retry_key(key) in second:
                    text, reason = read_explanation(second[retry_key(key)], asking.max_words)
                texts.append(text)
                reasons.append(reason)
            bar.update(len(keys))
    return Lesson(
        asker.rows,
        texts,
        reasons,
        unique=run.unique,
        reused=run.reused,
        asked=run.asked,
        input_tokens=run.tokens_in,
        output_tokens=run.tokens_out,
        other_endpoints=tuple(sorted(run.endpoints - {asker.provider.url, ""})),
    )


def teach_lexical(store: Rows, rows: np.ndarray, *, progress: bool = False) -> Lesson:
    """Explanations by the writer that needs no model (lexical.py): quick, deterministic, kept nowhere else."""
    texts: list[str | None] = []
    with tqdm(total=len(rows), desc="teaching", unit="row", disable=not progress) as bar:
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            chunk = rows[first : first + _ROWS_AT_ONCE]
            texts.extend(describe(prefix) for prefix in store.prefixes(chunk))
            bar.update(len(chunk))
    return Lesson(rows, texts, ["ok"] * len(texts), unique=len(set(texts)))


# -- into the store ---------------------------------------------------------------------------------------------------


def teacher_meta(provider: Provider | None, instruction: Instruction | None, asking: Asking) -> dict[str, Any]:
    """What names a teacher in a store: two stores with the same one here can be read as one. None: lexical."""
    if provider is None or instruction is None:
        return {"provider": LEXICAL, "model": f"lexical-{LEXICAL_VERSION}"}
    return {
        "provider": provider.name,
        "model": provider.model,
        "settings": provider.settings,
        "instruction_sha256": instruction.sha256,
        "context_chars": asking.context_chars,
        "max_words": asking.max_words,
        "retry_dropped": asking.retry_dropped,
    }


def check_teacher(store: Any, meta: dict[str, Any], replace: bool) -> None:
    """StoreError where the store has another teacher's explanations, before anything is asked."""
    if replace or not store.has_explanations:
        return
    have = store.root.read_json(EXPLANATIONS) or {}
    differs = sorted(name for name in meta if have.get(name) != meta[name])
    if differs:
        names = [f"{m.get('provider')}:{m.get('model')}" for m in (have, meta)]
        raise StoreError(
            f"{store.path} has explanations of another teacher ({names[0]})",
            expected=f"those of {names[1]} with the same settings",
            got=f"another {', '.join(differs)}",
            fix="--replace, which discards them",
        )


def write_lesson(store: Any, lesson: Lesson, meta: dict[str, Any], replace: bool) -> dict[str, Any]:
    """Puts a lesson into its store in one piece; returns explanations.json. Rows outside the lesson keep what the
    same teacher wrote before. Nothing that differs between a resumed and an uninterrupted run is written."""
    texts: list[str | None] = [None] * store.n_rows
    dropped = np.zeros(store.n_rows, bool)
    if store.has_explanations and not replace:
        texts = store.explanations(slice(None))
        dropped = store.explanation_status(slice(None)) == DROPPED
    for row, text in zip(lesson.rows.tolist(), lesson.texts, strict=True):
        texts[row] = text
    dropped[lesson.rows] = [text is None for text in lesson.texts]
    taught = {"rows": len(lesson.rows), "ok": lesson.ok, "dropped": lesson.dropped}
    return write_explanations(store.path, texts, {**meta, "taught": taught}, dropped=dropped)
