"""Teachers against a provider on the loopback interface: both APIs, their faults, kills, and what is kept."""

from __future__ import annotations

import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_llm import FakeLLM
from teaching import APIS, KEY, TEXTS, billed_once, expected, job_of, provider_of, run, start, wait_for

from nla_jax.answers import Answers, answer_key, retry_key
from nla_jax.endpoint import Limits
from nla_jax.errors import TeacherError
from nla_jax.providers import open_provider
from nla_jax.teacher_prompt import (
    Answer,
    build_prompt,
    load_instruction,
)

# -- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("api", APIS)
def test_each_row_gets_the_answer_to_its_own_text(tmp_path, api):
    texts = [*TEXTS, TEXTS[3], TEXTS[3], "x"]
    with FakeLLM(latency=0.01) as fake:
        lesson = run(fake, tmp_path, texts, api, concurrency=5)
    assert lesson.texts == expected(texts) and set(lesson.reasons) == {"ok"}
    # Identical prompts are one question.
    assert len(fake.asked) == len(set(texts)) == lesson.unique == lesson.asked and lesson.reused == 0
    assert lesson.input_tokens > 0 and lesson.output_tokens > 0
    assert 2 <= fake.most_in_flight <= 5


@pytest.mark.parametrize("api", APIS)
def test_requests_have_the_form_of_the_api(tmp_path, api):
    environ = {f"{api.upper()}_API_KEY": KEY}
    with FakeLLM(key=KEY) as fake:
        url = fake.url + "/v1"  # either spelling of an Anthropic URL works
        provider = open_provider(f"{api}:m", base_url=url, environ=environ, temperature=0.5, max_tokens=77)
        lesson = run(fake, tmp_path, TEXTS[:1], provider=provider)
    (seen,) = fake.seen
    assert lesson.ok == 1
    assert seen.path == ("/v1/chat/completions" if api == "openai" else "/v1/messages")
    if api == "openai":
        assert seen.headers["Authorization"] == f"Bearer {KEY}" and "x-api-key" not in seen.headers
    else:
        assert seen.headers["x-api-key"] == KEY and seen.headers["anthropic-version"] == "2023-06-01"
    body = provider.body("p")
    assert body == {"model": "m", "messages": [{"role": "user", "content": "p"}], "max_tokens": 77, "temperature": 0.5}
    assert "max_completion_tokens" in open_provider("openai:m", environ={"OPENAI_API_KEY": KEY}).body("p")
    assert KEY not in repr(provider)


FAULTS = [
    ("status", 500),
    ("status", 502),
    ("status", 503),
    ("status", 529),
    ("status", 429),
    ("wait", 0.2),
    ("slow", 0.2),
    "hang",
    "truncated",
    "short",
    "reset",
    "empty",
    "other",
]


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_passing_fault_costs_nothing_but_time(tmp_path, fault, api):
    """Every first request fails; the result is as if none had, and no prompt is billed twice."""
    with FakeLLM(lambda seen: fault if len(fake.asked_at[seen.prompt]) == 1 else None) as fake:
        lesson = run(fake, tmp_path, TEXTS[:6], api)
        again = run(fake, tmp_path, TEXTS[:6], api)
    assert lesson.texts == expected(TEXTS[:6]) == again.texts
    assert all(len(times) == (1 if fault == ("slow", 0.2) else 2) for times in fake.asked_at.values())
    # An empty reply is paid for, and asking again is the point of asking again.
    assert billed_once(fake) or fault == "empty"
    assert again.asked == 0 and again.reused == 6


def test_a_trickling_reply_meets_the_time_limit(tmp_path):
    """Time-outs between two bytes would never end it: it sends one every tenth of a second."""
    with FakeLLM(lambda seen: "trickle" if len(fake.asked_at[seen.prompt]) == 1 else None) as fake:
        started = time.monotonic()
        assert run(fake, tmp_path, TEXTS[:2]).ok == 2
    assert time.monotonic() - started < 4 and billed_once(fake) and len(fake.asked) == 4


@pytest.mark.parametrize("kind", ["wait", "date"])
def test_retry_after_is_honoured_by_every_request(tmp_path, kind):
    # A date has whole seconds only: two of them are at least one.
    seconds, least = (1, 1.0) if kind == "wait" else (2, 1.0)
    # The next one's reply takes long enough for the refusal to be read before anything is sent after it.
    replies = {4: (kind, seconds), 5: ("slow", 0.3)}
    with FakeLLM(lambda seen: replies.get(fake.asked.index(seen))) as fake:
        lesson = run(fake, tmp_path, TEXTS[:12], concurrency=2)
    told = fake.asked[4].at
    # What was in flight beside it may have arrived just after; everything else waited.
    early = [seen for seen in fake.asked[5:] if seen.at < told + least - 0.05]
    assert lesson.ok == 12 and len(early) <= 1 and all(seen.at <= told + 0.3 for seen in early)
    assert len(fake.asked) == 13


def test_absurd_retry_after_ends_the_run(tmp_path):
    with FakeLLM(lambda seen: ("wait", 100_000)) as fake, pytest.raises(TeacherError, match="asks to wait 100000 s"):
        run(fake, tmp_path, TEXTS[:2])


@pytest.mark.parametrize(
    ("limits", "least"),
    [({"requests_per_minute": 1200}, 0.05), ({"tokens_per_minute": 400_000}, 0.05)],
)
def test_rates_are_kept(tmp_path, limits, least):
    with FakeLLM() as fake:
        run(fake, tmp_path, TEXTS[:12], limits=Limits(**limits))
    times = sorted(seen.at for seen in fake.asked)
    assert times[-1] - times[0] >= 11 * least * 0.9


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, None, "OPENAI_API_KEY"),
        (403, None, "OPENAI_API_KEY"),
        (404, None, "the model's name"),
        (400, {"error": {"message": f"bad thing with {KEY} in it"}}, "bad thing"),
        (413, None, "--context-chars"),
        (302, None, "--base-url"),
        (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, "balance"),
    ],
)
def test_what_cannot_pass_ends_the_run_at_once(tmp_path, status, body, says):
    fault = ("status", status, body) if body else ("status", status)
    with FakeLLM(lambda seen: fault if len(fake.asked) > 6 else None) as fake:
        provider = open_provider("openai:m", base_url=fake.url, environ={"OPENAI_API_KEY": KEY})
        with pytest.raises(TeacherError) as caught:
            run(fake, tmp_path, provider=provider, concurrency=4)
    line = str(caught.value)
    assert f"HTTP {status}" in line and says in line and "\n" not in line and KEY not in line
    assert len(fake.asked) <= 6 + 4  # no retries, and no more than were in flight
    with FakeLLM() as fake:  # what was paid for is kept
        assert run(fake, tmp_path).reused == 6


def test_a_wrong_key_shows_nowhere(tmp_path):
    with FakeLLM(key="another") as fake:
        provider = open_provider("openai:m", base_url=fake.url, environ={"OPENAI_API_KEY": KEY})
        with pytest.raises(TeacherError) as caught:
            run(fake, tmp_path, provider=provider)
    assert "Incorrect API key provided: [OPENAI_API_KEY]" in str(caught.value) and KEY not in str(caught.value)


def test_keys_are_in_no_file(tmp_path):
    with FakeLLM(key=KEY) as fake:
        provider = open_provider("anthropic:m", base_url=fake.url, environ={"ANTHROPIC_API_KEY": KEY})
        run(fake, tmp_path, TEXTS[:3], provider=provider)
        run(fake, tmp_path, TEXTS[3:6], provider=provider, batch=True, poll=0.05)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_an_endpoint_that_is_down_ends_the_run_and_the_next_one_goes_on(tmp_path):
    with FakeLLM(lambda seen: ("status", 500) if len(fake.sent) >= 7 else None) as fake:
        with pytest.raises(TeacherError, match="prompts in a row got no answer.*status 500.*Try: the same command"):
            run(fake, tmp_path, limits=Limits(retries=1, backoff=0.01), concurrency=2)
        assert len(fake.sent) == 7
        fake.fault = lambda seen: None
        lesson = run(fake, tmp_path)
    assert (lesson.reused, lesson.asked) == (7, 17) and lesson.texts == expected(TEXTS) and billed_once(fake)


def test_one_prompt_that_never_works_is_counted_and_asked_again_next_time(tmp_path):
    with FakeLLM(lambda seen: "truncated" if "counted 5 ships" in seen.prompt else None) as fake:
        lesson = run(fake, tmp_path, limits=Limits(retries=2, backoff=0.01))
        assert lesson.dropped == {"no_answer": 1} and lesson.texts[5] is None
        assert len(fake.asked_at[build_prompt(load_instruction(), TEXTS[5])]) == 3
        fake.fault = lambda seen: None
        assert run(fake, tmp_path).texts == expected(TEXTS)
    assert billed_once(fake)


def test_interrupt_lets_replies_in_flight_come_home(tmp_path):
    job = job_of(tmp_path, TEXTS, concurrency=4)
    with FakeLLM(latency=0.6) as fake:
        process = start(job, fake)
        wait_for(lambda: len(fake.asked) >= 4)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0 and not Path(job["out"]).exists()
        assert len(fake.asked) == 4
    with Answers(job["answers"]) as answers:
        assert len(answers) == 4


# -- what is kept -----------------------------------------------------------------------------------------------------


def test_answers_serve_other_rows_and_stores_and_nothing_else(tmp_path):
    with FakeLLM() as fake:
        run(fake, tmp_path, TEXTS[:4])
        other = run(fake, tmp_path, ["new", TEXTS[2], "z" * 9000 + TEXTS[0]])
        assert (other.reused, other.asked) == (1, 2)
        for change in ({"model": "m2"}, {"max_tokens": 9}, {"temperature": 0.0}, {"api": "anthropic"}):
            assert run(fake, tmp_path, TEXTS[:2], provider=provider_of(fake, **change)).asked == 2, change
        assert run(fake, tmp_path, TEXTS[:2], context_chars=35).asked == 2
    with FakeLLM() as elsewhere:
        lesson = run(elsewhere, tmp_path, TEXTS[:4])
    assert lesson.asked == 0 and lesson.other_endpoints == (fake.url + "/v1",)


def test_the_instruction_is_part_of_the_key():
    assert answer_key("p", "m", {}, "a", "x") != answer_key("p", "m", {}, "b", "x")
    assert answer_key("p", "m", {}, "a", "x", attempt=1) == retry_key(answer_key("p", "m", {}, "a", "x"))
    assert answer_key("p", "m", {"a": 1, "b": 2}, "a", "x") == answer_key("p", "m", {"b": 2, "a": 1}, "a", "x")


def test_dropped_answers_are_counted_kept_and_retried_once(tmp_path):
    faults = {1: "one", 2: "refusal", 3: "length"}

    def fault(seen):
        number = int(re.search(r"counted (\d+) ships", seen.prompt)[1])
        return faults.get(number) if len(fake.asked_at[seen.prompt]) == 1 else ("one" if number == 1 else None)

    with FakeLLM(fault) as fake:
        lesson = run(fake, tmp_path, TEXTS[:6])
        assert lesson.dropped == {"length": 1, "refused": 1, "too_few": 1} and lesson.ok == 3
        assert [t is None for t in lesson.texts] == [False, True, True, True, False, False]
        assert run(fake, tmp_path, TEXTS[:6]).asked == 0  # a dropped answer was paid for, too
        retried = run(fake, tmp_path, TEXTS[:6], retry_dropped=True)
        assert retried.asked == 3 and retried.dropped == {"too_few": 1}
        assert run(fake, tmp_path, TEXTS[:6], retry_dropped=True).asked == 0
        assert run(fake, tmp_path, TEXTS[:6]).dropped == lesson.dropped
    with FakeLLM(lambda seen: faults.get(int(re.search(r"counted (\d+)", seen.prompt)[1]))) as fake:
        at_once = run(fake, tmp_path / "new", TEXTS[:6], retry_dropped=True)
    assert at_once.asked == 9 and at_once.dropped == lesson.dropped


def test_replies_that_stay_empty_are_dropped_after_three(tmp_path):
    with FakeLLM(lambda seen: "empty") as fake:
        lesson = run(fake, tmp_path, TEXTS[:2])
    assert lesson.dropped == {"empty": 2} and len(fake.asked) == 6


def test_two_runs_at_once_share_a_directory(tmp_path):
    jobs = [job_of(tmp_path, TEXTS[: 16 + 8 * i], name=str(i), concurrency=4) for i in range(2)]
    with FakeLLM(latency=0.02) as fake:
        processes = [start(job, fake) for job in jobs]
        assert [process.wait(40) for process in processes] == [0, 0]
    for job in jobs:
        assert json.loads(Path(job["out"]).read_text())["texts"] == expected(job["texts"])
    assert billed_once(fake)


def test_answers_survive_a_kill_while_they_are_written(tmp_path):
    code = (
        "import sys; from nla_jax.answers import Answers; from nla_jax.teacher_prompt import Answer\n"
        "a = Answers(sys.argv[1])\n"
        "for i in range(10**6):\n"
        "    a.put_many([(b'%032d' % i, Answer('text %d ' % i * 50))], 'p', 'm'); print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line == "40\n":
            break
    process.kill()
    told = [int(line) for line in process.stdout]
    last = max(told, default=40)
    with Answers(tmp_path) as answers:
        keys = [b"%032d" % i for i in range(last + 1)]
        found = answers.get_many(keys)
        assert [found[key].text for key in keys] == [f"text {i} " * 50 for i in range(last + 1)]


def test_the_first_answer_to_a_key_stays(tmp_path):
    key = bytes(32)
    with Answers(tmp_path) as one, Answers(tmp_path) as two:
        one.put_many([(key, Answer("first\ud800", "stop", 3, 4, "u"))], "p", "m")
        two.put_many([(key, Answer("second"))], "p", "m")
        assert two.get(key) == Answer("first?", "stop", 3, 4, "u") and len(one) == 1


def test_a_damaged_answer_a_foreign_file_and_a_full_disk_are_errors(tmp_path):
    key = bytes(32)
    with Answers(tmp_path) as answers:
        answers.put_many([(key, Answer("text"))], "p", "m")
        answers._db.execute("UPDATE answers SET text = 'tezt'")
        with pytest.raises(TeacherError, match="damaged"):
            answers.get(key)
        answers._db.execute("PRAGMA max_page_count = 1")
        with pytest.raises(TeacherError, match="full"):
            answers.put_many([(bytes([i] * 32), Answer("t" * 9000)) for i in range(9)], "p", "m")
        answers._db.execute("PRAGMA max_page_count = 100000")
        answers.put_many([(bytes([7] * 32), Answer("t"))], "p", "m")  # the failed transaction left nothing behind
        assert len(answers) == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b/answers.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(TeacherError, match="not a database"):
        Answers(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with sqlite3.connect(tmp_path / "c/answers.sqlite") as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(TeacherError, match="another SQLite file"):
        Answers(tmp_path / "c")
    (tmp_path / "file").write_text("")
    with pytest.raises(TeacherError, match="--answers"):
        Answers(tmp_path / "file")
    assert Answers.existing(tmp_path / "nothing") is None and not (tmp_path / "nothing").exists()


# -- kills ------------------------------------------------------------------------------------------------------------


SETTLED = 0.5  # seconds after which an answer that was sent must have reached the disk


def _kill_and_finish(tmp_path, kills: int, texts, seed: int, **asking):
    """Kills a run at random moments after it began to ask, then lets it finish. Returns the fake and the kill times."""
    rng = random.Random(seed)

    def fault(seen):
        # Of each prompt the first request may go wrong, by chance but always in the same way.
        if seen.prompt is None or len(fake.asked_at[seen.prompt]) > 1:
            return None
        draw = random.Random(seen.prompt).random()
        table = [(0.03, "hang"), (0.08, ("wait", 0.05)), (0.14, ("status", 500)), (0.18, "truncated"), (0.22, "reset")]
        return next((name for limit, name in table if draw < limit), None)

    job = job_of(tmp_path, texts, **asking)
    done, killed = 0, []
    with FakeLLM(fault, latency=0.02) as fake:
        while len(killed) < kills:
            process = start(job, fake)
            before = len(fake.seen)
            wait_for(lambda before=before: len(fake.seen) > before)
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
            done += process.wait() == 0
            killed.append(time.monotonic())
            assert not done, "the run was over before it was killed often enough"
        process = start(job, fake)
        assert process.wait(60) == 0
    return fake, killed, json.loads(Path(job["out"]).read_text())


def _check_kills(fake: FakeLLM, killed: list[float], result: dict, texts, concurrency: int) -> None:
    assert result["texts"] == expected(texts) and set(result["reasons"]) == {"ok"}
    assert len(fake.billed) == len(set(texts)) and billed_once(fake)
    repeated = 0
    for prompt, times in fake.sent.items():
        for sent in times:
            later = [at for at in fake.asked_at[prompt] if at > sent]
            if later:
                # Only an answer that a kill caught on its way to the disk may be asked for again.
                repeated += 1
                assert any(sent <= kill <= sent + SETTLED for kill in killed), "an answer on disk was asked again"
    assert repeated <= len(killed) * concurrency


def test_three_kills_change_nothing_and_cost_nothing(tmp_path):
    texts = [f"The keeper counted {n} ships" for n in range(300)] + [f"The keeper counted {n} ships" for n in range(50)]
    fake, killed, result = _kill_and_finish(tmp_path, 3, texts, seed=1, concurrency=4)
    _check_kills(fake, killed, result, texts, 4)


@pytest.mark.slow
def test_twenty_kills_change_nothing_and_cost_nothing(tmp_path):
    texts = [f"The keeper counted {n} ships" for n in range(2400)]
    fake, killed, result = _kill_and_finish(tmp_path, 20, texts, seed=2, concurrency=8)
    _check_kills(fake, killed, result, texts, 8)
