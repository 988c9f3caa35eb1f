"""Batches against a provider that loses receipts, forgets batches and leaves prompts without an answer."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from pathlib import Path

import pytest
from fake_llm import FakeLLM
from teaching import TEXTS, expected, job_of, provider_of, run, start, wait_for

from nla_jax import endpoint as endpoint_module
from nla_jax.answers import Answers, Batch, answer_key
from nla_jax.teacher_prompt import (
    build_prompt,
    load_instruction,
)


def batch(fake, directory, texts=TEXTS, **asking):
    notes: list[str] = []
    asking = {"batch_size": 10, "poll": 0.03, **asking}
    return run(fake, directory, texts, "anthropic", batch=True, notes=notes, **asking), notes


def test_batches_bring_the_same_answers_as_single_requests(tmp_path):
    with FakeLLM() as fake:
        lesson, notes = batch(fake, tmp_path, [*TEXTS, TEXTS[0]])
        assert lesson.texts == expected([*TEXTS, TEXTS[0]]) and lesson.asked == len(TEXTS)
        assert [len(b.requests) for b in fake.batches.values()] == [10, 10, 4] and not fake.asked
        assert any("msgbatch_0002" in note for note in notes)
        again = run(fake, tmp_path, TEXTS, "anthropic")
        assert again.asked == 0 and not fake.asked  # the two ways share their answers
        assert batch(fake, tmp_path)[0].asked == 0 and len(fake.batches) == 3
    ids = [r["custom_id"] for b in fake.batches.values() for r in b.requests]
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)


@pytest.mark.parametrize("honours", [True, False])
def test_a_batch_whose_receipt_was_lost_is_found_and_not_submitted_again(tmp_path, honours):
    lost = lambda seen: "lost" if seen.method == "POST" and len(fake.batches) == 1 else None  # noqa: E731
    with FakeLLM(lost, honours_idempotency=honours) as fake:
        lesson, _ = batch(fake, tmp_path)
    assert lesson.texts == expected(TEXTS) and set(fake.batched().values()) == {1}


def test_a_run_killed_between_intent_and_receipt_takes_up_its_batch(tmp_path):
    class Killed(BaseException):
        pass

    def die(self, nonce, batch_id):
        raise Killed

    with FakeLLM(honours_idempotency=False) as fake:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Answers, "submitted", die)
            with pytest.raises(Killed):
                batch(fake, tmp_path)
        assert len(fake.batches) == 1
        with Answers(tmp_path) as answers:
            (intent,) = answers.batches(fake.url)
            assert intent.id is None and intent.size == 10
        lesson, _ = batch(fake, tmp_path)
    assert lesson.texts == expected(TEXTS) and set(fake.batched().values()) == {1}


def test_a_run_killed_before_the_provider_heard_of_it_submits(tmp_path):
    class Killed(BaseException):
        pass

    with FakeLLM() as fake:
        with pytest.MonkeyPatch.context() as patch:

            async def die(self, method, *args, **kwargs):
                if method == "POST":
                    raise Killed
                return await send(self, method, *args, **kwargs)

            send = endpoint_module.Endpoint.send
            patch.setattr(endpoint_module.Endpoint, "send", die)
            with pytest.raises(Killed):
                batch(fake, tmp_path)
        assert not fake.batches
        lesson, _ = batch(fake, tmp_path)
    assert lesson.texts == expected(TEXTS) and set(fake.batched().values()) == {1}


def test_a_stranger_s_batch_of_the_same_size_is_not_taken_for_ours_in_the_end(tmp_path):
    """An intent may be matched with a batch of somebody else; its prompts are asked again when that shows."""
    with FakeLLM() as fake:
        batch(fake, tmp_path / "theirs", [f"theirs {i}" for i in range(10)])
        with Answers(tmp_path) as answers:
            p = provider_of(fake, "anthropic")
            prompts = [build_prompt(load_instruction(), text) for text in TEXTS[:10]]
            keys = [answer_key(p.name, p.model, p.settings, load_instruction().sha256, prompt) for prompt in prompts]
            answers.intend(Batch("n", fake.url, None, None, 10), keys)
        lesson, _ = batch(fake, tmp_path)
    assert lesson.texts == expected(TEXTS)


def test_what_a_batch_leaves_without_an_answer_is_submitted_again(tmp_path):
    tries: dict[str, int] = {}

    def fault(prompt):
        tries[prompt] = tries.get(prompt, 0) + 1
        if "counted 3 ships" in prompt:
            return "errored"
        return "expired" if "counted 4 ships" in prompt and tries[prompt] == 1 else None

    with FakeLLM(batch_fault=fault) as fake:
        lesson, notes = batch(fake, tmp_path)
    assert lesson.dropped == {"no_answer": 1} and lesson.texts[3] is None and lesson.texts[4] is not None
    assert any("2 of 10 without an answer" in note for note in notes)


def test_batch_results_that_are_cut_are_fetched_again_and_a_lost_batch_is_asked_again(tmp_path):
    def fault(seen):
        results = [s for s in fake.seen if s.path.endswith("/results")]
        return "truncated" if seen.path.endswith("/results") and len(results) == 1 else None

    with FakeLLM(fault) as fake:
        assert batch(fake, tmp_path)[0].texts == expected(TEXTS)
    with FakeLLM(batch_seconds=0.3) as fake:
        threading.Timer(0.25, lambda: fake.batches.pop("msgbatch_0000")).start()
        lesson, notes = batch(fake, tmp_path / "lost")
    assert lesson.texts == expected(TEXTS) and any("no longer kept" in note for note in notes)


def test_dropped_answers_of_a_batch_are_retried_once(tmp_path):
    with FakeLLM(batch_fault=lambda prompt: "one" if "counted 3 ships" in prompt else None) as fake:
        lesson, _ = batch(fake, tmp_path, retry_dropped=True)
        assert lesson.dropped == {"too_few": 1} and lesson.asked == len(TEXTS) + 1
        assert batch(fake, tmp_path, retry_dropped=True)[0].asked == 0


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_kills_never_submit_a_prompt_twice(tmp_path, kills):
    texts = [f"The keeper counted {n} ships" for n in range(60)]
    job = job_of(tmp_path, texts, teacher="anthropic:m", batch=True, batch_size=7, poll=0.05)
    rng = random.Random(kills)
    with FakeLLM(latency=0.03, batch_seconds=1.0 + 0.5 * kills, honours_idempotency=False) as fake:
        for _ in range(kills):
            before = len(fake.seen)
            process = start(job, fake)
            wait_for(lambda before=before: len(fake.seen) > before)
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
            process.wait()
        assert start(job, fake).wait(60) == 0
    assert json.loads(Path(job["out"]).read_text())["texts"] == expected(texts)
    assert set(fake.batched().values()) == {1} and len(fake.batched()) == 60
