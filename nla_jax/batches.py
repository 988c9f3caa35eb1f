"""Anthropic's message batches: half the price, answers within a day.

A batch is written down twice: before it is submitted (which prompts, and the newest batch the provider knew) and when
it has an id. A run that finds the first without the second was killed between the two; it looks among the provider's
newer batches for its own before it submits anything again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any
from urllib.parse import quote

from nla_jax.answers import Answers, Batch
from nla_jax.endpoint import Endpoint, MalformedError, RefusedError, UnansweredError, parsed
from nla_jax.providers import Provider
from nla_jax.teacher_prompt import Answer

PATH = "v1/messages/batches"
MOST_REQUESTS = 100_000  # in one batch, the provider's limit
_MOST_BYTES = 200_000_000  # the provider's limit is 256 MB
_SUBMIT_TRIES = 8

Job = tuple[bytes, str]  # the answer's key and the prompt


async def submit_all(
    endpoint: Endpoint, provider: Provider, answers: Answers, jobs: AsyncIterator[Job], size: int
) -> int:
    """Submits what is neither answered nor in a batch already, `size` prompts at a time; how many that were."""
    count, waiting, nbytes = 0, list[Job](), 0
    with answers.submitting():
        await _settle_intents(endpoint, answers)
        async for job in jobs:
            waiting.append(job)
            nbytes += len(job[1].encode()) * 2  # escaped as JSON
            if len(waiting) >= min(size, MOST_REQUESTS) or nbytes >= _MOST_BYTES:
                count += await _submit(endpoint, provider, answers, waiting)
                waiting, nbytes = [], 0
            if endpoint.stop.is_set():
                return count
        return count + await _submit(endpoint, provider, answers, waiting)


async def _submit(endpoint: Endpoint, provider: Provider, answers: Answers, jobs: Sequence[Job]) -> int:
    # Another run may have submitted or answered some since they were looked up.
    taken = {**answers.in_batches(k for k, _ in jobs), **answers.get_many(k for k, _ in jobs)}
    jobs = [job for job in jobs if job[0] not in taken]
    if not jobs:
        return 0
    newest = next(iter(await _listed(endpoint, None, 1)), {}).get("id")
    # The same prompts at the same place in the provider's list: a run that was killed here arrives at the same name.
    nonce = hashlib.sha256(b"".join(k for k, _ in jobs) + str(newest).encode()).hexdigest()
    batch = Batch(nonce, endpoint.url, newest, None, len(jobs))
    body = {"requests": [{"custom_id": key.hex(), "params": provider.body(prompt)} for key, prompt in jobs]}
    answers.intend(batch, [key for key, _ in jobs])
    for attempt in range(_SUBMIT_TRIES):
        try:
            # No blind repetition: a broken connection says nothing about whether the batch was taken.
            batch_id = await endpoint.send("POST", PATH, _id, body=body, idempotency=nonce, retries=0, timeout=600)
        except UnansweredError:
            found = await _find(endpoint, answers, batch)
            if found is None:
                if attempt + 1 == _SUBMIT_TRIES or endpoint.stop.is_set():
                    answers.finish_batch(nonce, [], provider.name, provider.model)
                    raise
                await endpoint.back_off(attempt + 1)
                continue
            batch_id = found
        except RefusedError:
            answers.finish_batch(nonce, [], provider.name, provider.model)
            raise
        answers.submitted(nonce, batch_id)
        break
    return len(jobs)


async def _settle_intents(endpoint: Endpoint, answers: Answers) -> None:
    """Gives each batch that has no id its id, or forgets it where the provider has not got it."""
    for batch in answers.batches(endpoint.url):
        if batch.id is None:
            found = await _find(endpoint, answers, batch)
            if found is None:
                answers.finish_batch(batch.nonce, [], "", "")
            else:
                answers.submitted(batch.nonce, found)


async def _find(endpoint: Endpoint, answers: Answers, batch: Batch) -> str | None:
    """The provider's id of a batch whose submission was cut off: newer than all before it, as large, not ours yet.

    Should it be somebody else's after all, its results will hold none of our prompts, and those are asked again."""
    known = {other.id for other in answers.batches(endpoint.url)}
    for entry in reversed(await _listed(endpoint, batch.newest)):
        if entry["id"] not in known and sum(entry["request_counts"].values()) == batch.size:
            return str(entry["id"])
    return None


async def _listed(endpoint: Endpoint, until: str | None, most: int | None = None) -> list[dict[str, Any]]:
    """The provider's batches, newest first, down to (without) the one with the id `until`."""
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = await endpoint.send("GET", f"{PATH}?limit={most or 100}{after}", _page)
        for entry in page["data"]:
            if entry["id"] == until:
                return found
            found.append(entry)
        if most or not page.get("has_more") or not page["data"]:
            return found
        after = f"&after_id={quote(page['data'][-1]['id'])}"


async def collect(
    endpoint: Endpoint,
    provider: Provider,
    answers: Answers,
    wanted: Collection[bytes],
    poll: float,
    note: Callable[[str], None],
    advance: Callable[[int], object],
) -> None:
    """Waits until every batch with a wanted prompt has ended, and keeps their results as each does."""
    told: set[str] = set()
    while True:
        nonces = set(answers.in_batches(wanted).values())
        pending = [b for b in answers.batches(endpoint.url) if b.nonce in nonces and b.id is not None]
        for batch in list(pending):
            if endpoint.stop.is_set():
                return
            name = quote(batch.id or "", safe="")
            if batch.nonce not in told:
                told.add(batch.nonce)
                note(
                    f"batch {batch.id}: {batch.size:,} prompts, asked for every {poll:g} s; safe to stop and run again"
                )
            try:
                state = await endpoint.send("GET", f"{PATH}/{name}", _state)
                if state != "ended":
                    continue
                results = await endpoint.send(
                    "GET", f"{PATH}/{name}/results", lambda body: _results(body, provider), timeout=1800
                )
            except RefusedError as error:
                if error.status != 404:
                    raise
                note(f"batch {batch.id} is no longer kept by the provider; its prompts are asked again")
                results = ([], [])
            got, failures = results
            answers.finish_batch(batch.nonce, got, provider.name, provider.model)
            pending.remove(batch)
            advance(sum(key in wanted for key, _ in got))
            if failures:
                note(
                    f"batch {batch.id}: {len(failures):,} of {batch.size:,} without an answer, the first: {failures[0]}"
                )
        if not pending:
            return
        await endpoint.sleep(poll)


def _id(content: bytes) -> str:
    value = parsed(content)
    if not isinstance(value, dict) or not isinstance(value.get("id"), str):
        raise MalformedError("a batch without an id")
    return value["id"]


def _page(content: bytes) -> dict[str, Any]:
    value = parsed(content)
    try:
        for entry in value["data"]:
            if not isinstance(entry["id"], str) or not sum(entry["request_counts"].values()) >= 0:
                raise TypeError
    except (KeyError, TypeError, AttributeError):
        raise MalformedError("a list of batches of another form") from None
    return value


def _state(content: bytes) -> str:
    value = parsed(content)
    if not isinstance(value, dict) or not isinstance(value.get("processing_status"), str):
        raise MalformedError("a batch without processing_status")
    return value["processing_status"]


def _results(content: bytes, provider: Provider) -> tuple[list[tuple[bytes, Answer]], list[str]]:
    """The answers in a batch's results, a JSON object a line, and what became of the other prompts."""
    got: list[tuple[bytes, Answer]] = []
    failures = []
    for line in content.split(b"\n"):
        if not line.strip():
            continue
        value = parsed(line)
        try:
            name, result = value["custom_id"], value["result"]
            if result["type"] == "succeeded":
                got.append((bytes.fromhex(name), provider.read_message(result["message"])))
            else:
                failures.append(f"{result['type']} {json.dumps(result.get('error', ''))[:200]}".strip())
        except (KeyError, TypeError, ValueError):
            raise MalformedError("a line of batch results of another form") from None
        except MalformedError as error:
            failures.append(str(error))
    return got, failures
