"""One run of a teacher over an HTTP API: what is on disk is looked up, the rest is asked, one by one or in batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from nla_jax import batches
from nla_jax.answers import Answers, answer_key, retry_key
from nla_jax.endpoint import Endpoint, Limits, UnansweredError
from nla_jax.errors import TeacherError
from nla_jax.providers import Provider
from nla_jax.teacher_prompt import CONTEXT_CHARS, MAX_WORDS, Answer, Instruction, build_prompt, read_explanation

OUTPUT_TOKENS = 130  # of 80 to 100 words, for estimates
_ROWS_AT_ONCE = 512
_EMPTY_TRIES = 3  # an empty reply is asked again until there were this many
_GIVE_UP_AFTER = 5  # prompts in a row that got no answer through all their retries: the endpoint is down
_BATCH_ROUNDS = 3


class Rows(Protocol):
    """The part of a Store that a teacher reads."""

    @property
    def n_rows(self) -> int: ...

    def prefixes(self, rows: Any) -> list[str]: ...


@dataclass(frozen=True)
class Asking:
    """How prompts are made, and how answers are gathered and judged."""

    context_chars: int = CONTEXT_CHARS
    max_words: int = MAX_WORDS
    concurrency: int = 16
    retry_dropped: bool = False  # ask once more where the first answer was dropped
    batch: bool = False
    batch_size: int = 10_000
    poll: float = 30.0  # seconds between two looks at a batch
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Asker:
    """What one run asks: everything that is the same for all of its rows."""

    store: Rows
    rows: np.ndarray
    provider: Provider
    instruction: Instruction
    asking: Asking

    def jobs(self, chunk: np.ndarray) -> list[batches.Job]:
        """(key, prompt) of each row."""
        prefixes = self.store.prefixes(chunk)
        prompts = [build_prompt(self.instruction, prefix, self.asking.context_chars) for prefix in prefixes]
        p, digest = self.provider, self.instruction.sha256
        return [(answer_key(p.name, p.model, p.settings, digest, prompt), prompt) for prompt in prompts]

    def chunks(self) -> Iterator[np.ndarray]:
        for first in range(0, len(self.rows), _ROWS_AT_ONCE):
            yield self.rows[first : first + _ROWS_AT_ONCE]


class Run:
    """One pass over the rows: what is on disk is looked up, the rest is asked."""

    def __init__(self, asker: Asker, answers: Answers, endpoint: Endpoint, note: Callable[[str], None], bar: tqdm):
        self.asker, self.answers, self.endpoint, self.note, self.bar = asker, answers, endpoint, note, bar
        self.keys: list[bytes] = []  # of every row
        self.unique = 0
        self.reused = self.asked = self.tokens_in = self.tokens_out = 0
        self.endpoints: set[str] = set()
        self.error: BaseException | None = None
        self._in_a_row = 0

    async def missing(self, first_pass: bool = True) -> AsyncIterator[tuple[bytes, bytes, str]]:
        """(key, the key to ask under, prompt) of what is not on disk, or was dropped and may be asked again."""
        seen: set[bytes] = set()
        for chunk in self.asker.chunks():
            jobs = await asyncio.to_thread(self.asker.jobs, chunk)
            if first_pass:
                self.keys.extend(key for key, _ in jobs)
            new = {key: prompt for key, prompt in jobs if key not in seen}
            seen.update(new)
            known = self.answers.get_many(new)
            ask = {key: self._next(key, known.get(key)) for key in new}
            done = self.answers.get_many(under for under in ask.values() if under is not None)
            if first_pass:
                self.reused += len(known)
                self.endpoints.update(answer.endpoint for answer in known.values())
            todo = [(key, u, new[key]) for key, u in ask.items() if u is not None and u not in done]
            if first_pass:
                self.bar.update(len(chunk) - len(todo))
            for item in todo:
                yield item
        self.unique = len(seen)

    def _next(self, key: bytes, answer: Answer | None) -> bytes | None:
        """The key to ask under: the prompt's own, that of a second attempt, or None when the answer will do."""
        if answer is None:
            return key
        if self.asker.asking.retry_dropped and read_explanation(answer, self.asker.asking.max_words)[0] is None:
            return retry_key(key)
        return None

    # -- one by one ---------------------------------------------------------------------------------------------------

    async def ask_each(self) -> None:
        """Asks what is missing, at most `concurrency` prompts at a time."""
        waiting: asyncio.Queue[batches.Job | None] = asyncio.Queue(maxsize=2 * self.asker.asking.concurrency)

        async def produce() -> None:
            try:
                async for key, _, prompt in self.missing():
                    if self.endpoint.stop.is_set():
                        break
                    await waiting.put((key, prompt))
            except Exception as error:
                self._fail(error)
            for _ in range(self.asker.asking.concurrency):
                await waiting.put(None)

        async def work() -> None:
            while (job := await waiting.get()) is not None:
                if self.endpoint.stop.is_set():
                    continue  # the queue is emptied, or the producer would wait for ever
                try:
                    await self._ask(*job)
                except Exception as error:
                    self._fail(error)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(produce())
            for _ in range(self.asker.asking.concurrency):
                tasks.create_task(work())
        if self.error is not None:
            raise self.error

    def _fail(self, error: Exception) -> None:
        """Ends the run; what is in flight may come home first, for it is paid for."""
        if self.error is None:
            self.error = error
        self.endpoint.stop.set()

    async def _ask(self, key: bytes, prompt: str) -> None:
        """Sees to it that a prompt has its answer on disk, and its second one where the first is dropped."""
        under: bytes | None = key
        while under is not None:
            answer = self.answers.get(under)  # another run may have asked it since
            if answer is None:
                try:
                    answer = await self._reply(under, prompt)
                except UnansweredError as error:
                    self._count_unanswered(error)
                    return
                self._in_a_row = 0
            under = self._next(key, answer) if under == key else None
        self.bar.update(1)

    def _count_unanswered(self, error: UnansweredError) -> None:
        if self.endpoint.stop.is_set():
            return
        self._in_a_row += 1
        if self._in_a_row >= _GIVE_UP_AFTER:
            raise TeacherError(
                f"{self._in_a_row} prompts in a row got no answer; {error}",
                fix="the same command when the provider is back: answers so far are kept",
            )

    async def _reply(self, key: bytes, prompt: str) -> Answer:
        """One prompt's answer, on disk when this returns."""
        provider = self.asker.provider
        body, tokens = provider.body(prompt), len(prompt) / 4 + OUTPUT_TOKENS
        for attempt in range(_EMPTY_TRIES):
            # A provider that honours the name would repeat an empty reply for ever.
            name = f"nla-{key.hex()}" + (f"-{attempt}" if attempt else "")
            answer = await self.endpoint.send(
                "POST", provider.path, provider.read, body=body, idempotency=name, tokens=tokens
            )
            self.tokens_in += answer.input_tokens or 0
            self.tokens_out += answer.output_tokens or 0
            if answer.text.strip() or answer.finish != "stop" or self.endpoint.stop.is_set():
                break
        # In the same step of the loop in which the reply was read: nothing else runs before it is on disk.
        self.answers.put_many([(key, answer)], provider.name, provider.model)
        self.asked += 1
        return answer

    # -- by batches ---------------------------------------------------------------------------------------------------

    async def ask_batches(self) -> None:
        """Submits what is missing, waits, and submits again what came back without an answer or was dropped."""
        asking, provider = self.asker.asking, self.asker.provider
        rounds = _BATCH_ROUNDS + asking.retry_dropped
        for number in range(rounds):
            wanted: set[bytes] = set()

            async def jobs(first: bool = number == 0, wanted: set[bytes] = wanted) -> AsyncIterator[batches.Job]:
                async for _, under, prompt in self.missing(first):
                    wanted.add(under)
                    yield under, prompt

            await batches.submit_all(self.endpoint, provider, self.answers, jobs(), asking.batch_size)
            if not wanted:
                break
            before = len(self.answers.get_many(wanted))
            await batches.collect(
                self.endpoint, provider, self.answers, wanted, asking.poll, self.note, self.bar.update
            )
            got = self.answers.get_many(wanted)
            self.asked += len(got) - before
            self.tokens_in += sum(answer.input_tokens or 0 for answer in got.values())
            self.tokens_out += sum(answer.output_tokens or 0 for answer in got.values())
            if self.endpoint.stop.is_set():
                return
