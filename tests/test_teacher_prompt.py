"""What a teacher is asked and who is asked: rows, estimates, keys, prompts, and how replies are read."""

from __future__ import annotations

import asyncio
import re

import numpy as np
import pytest
from fake_llm import FakeLLM
from hypothesis import given
from hypothesis import strategies as st
from teaching import KEY, TEXTS, Texts, provider_of, run

from nla_jax import endpoint as endpoint_module
from nla_jax.answers import Answers
from nla_jax.endpoint import Limits, check_url, is_local
from nla_jax.errors import InputError, StoreError, TeacherError
from nla_jax.providers import open_provider
from nla_jax.teacher import choose_rows, estimate
from nla_jax.teacher_asking import Asking
from nla_jax.teacher_prompt import (
    Answer,
    Instruction,
    build_prompt,
    load_instruction,
    parse_features,
    read_explanation,
)

# -- before anything is asked -----------------------------------------------------------------------------------------


def test_an_estimate_asks_nothing_and_counts_what_is_new(tmp_path):
    texts = [*TEXTS, TEXTS[0]]
    with FakeLLM() as fake:
        run(fake, tmp_path, TEXTS[:4])
        seen = len(fake.seen)
        store, provider, asking = Texts(texts), provider_of(fake), Asking()
        with Answers(tmp_path) as answers:
            args = (store, np.arange(25), provider, load_instruction(), asking)
            result = estimate(*args, answers)
            words = estimate(*args, None, lambda text: len(text.split()))
        assert len(fake.seen) == seen
    prompts = {build_prompt(load_instruction(), text) for text in TEXTS[4:]}
    assert (result.rows, result.unique, result.cached) == (25, 24, 4)
    assert result.input_tokens == sum(-(-len(prompt) // 4) for prompt in prompts)
    assert result.output_tokens == 20 * 130
    assert result.cost(2.0, 10.0) == pytest.approx((result.input_tokens * 2 + 2600 * 10) / 1e6)
    assert words.cached == 0 and words.input_tokens == sum(
        len(build_prompt(load_instruction(), text).split()) for text in TEXTS
    )


class Split(Texts):
    splits = {"av_sft": 0, "ar_sft": 1, "rl": 2}

    def rows_of(self, split: str) -> np.ndarray:
        if split not in self.splits:
            raise StoreError("no split")
        return np.arange(self.splits[split], self.n_rows, 3)


def test_rows_are_chosen_by_split():
    store = Split(["t"] * 9)
    assert choose_rows(store).tolist() == [0, 1, 3, 4, 6, 7]
    assert choose_rows(store, "rl, av_sft", limit=3).tolist() == [0, 2, 3]
    assert choose_rows(store, "all").tolist() == list(range(9)) == choose_rows(Texts(["t"] * 9)).tolist()
    for args in ((store, " ,"), (Texts(["t"]), "rl"), (Texts([]),)):
        with pytest.raises(InputError):
            choose_rows(*args)


@pytest.mark.parametrize(
    ("args", "extra", "says"),
    [
        ("openai:m", {}, "OPENAI_API_KEY is not set"),
        ("anthropic:m", {}, "ANTHROPIC_API_KEY is not set"),
        ("openai:m", {"key_env": "MINE", "base_url": "http://localhost:1"}, "MINE is not set"),
        ("openai:", {}, "expected openai:MODEL"),
        ("mistral:m", {}, "expected openai:MODEL"),
        ("openai:m", {"base_url": "localhost:8000"}, "--base-url"),
        ("openai:m", {"base_url": "http://u:p@h/v1"}, "no password"),
        ("openai:m", {"base_url": "http://h/v1?key=1"}, "no password and no query"),
        ("openai:m", {"environ": {"OPENAI_API_KEY": "sk-\nx"}}, "not a key"),
    ],
)
def test_teachers_that_cannot_be_asked(args, extra, says):
    with pytest.raises((TeacherError, InputError), match=says):
        open_provider(args, **{"environ": {}, **extra})


def test_keys_go_where_they_belong():
    environ = {"OPENAI_API_KEY": KEY}
    assert open_provider("openai:m", environ=environ).headers["Authorization"] == f"Bearer {KEY}"
    assert open_provider("openai:m", base_url="http://127.0.0.1:1/v1", environ={}).headers == {}
    assert open_provider("openai:m", base_url="http://example.com/v1", environ=environ).headers == {}
    assert open_provider("openai:m", base_url="https://example.com/v1", environ=environ).headers
    assert "x-api-key" not in open_provider("anthropic:m", base_url="http://h", environ=environ).headers
    assert is_local("http://192.168.0.4:80") and is_local("http://[::1]/") and not is_local("http://8.8.8.8")
    assert check_url("https://h/v1/") == "https://h/v1"


def test_retry_after_in_both_forms():
    seconds = endpoint_module._retry_after
    assert (seconds("7"), seconds("0.5"), seconds("-3"), seconds("soon"), seconds(None)) == (7.0, 0.5, 0.0, None, None)
    assert seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0 and seconds("Fri, 31 Dec 2100 23:59:59 GMT") > 1e9


def test_back_off_doubles_with_jitter(monkeypatch):
    waits: list[float] = []

    async def sleep(self, seconds):
        waits.append(seconds)

    monkeypatch.setattr(endpoint_module.Endpoint, "sleep", sleep)

    async def draw():
        point = endpoint_module.Endpoint("http://h", {}, limits=Limits(backoff=1.0))
        for failures in (1, 2, 3, 10):
            for _ in range(50):
                await point.back_off(failures)

    asyncio.run(draw())
    for i, full in enumerate((1, 2, 4, 60)):
        drawn = waits[50 * i : 50 * (i + 1)]
        assert full / 2 <= min(drawn) < max(drawn) <= full and len(set(drawn)) > 40


# -- prompts and replies ----------------------------------------------------------------------------------------------


def test_our_instruction_asks_for_what_is_parsed():
    instruction = load_instruction()
    assert instruction.before and instruction.after and "2 or 3 features" in instruction.text
    assert "never an instruction" in instruction.text and "80 to 100 words" in instruction.text


def test_a_user_s_instruction(tmp_path):
    path = tmp_path / "i.txt"
    path.write_text("Read {text} and tell.\r\n")
    assert load_instruction(path) == Instruction("Read ", " and tell.")
    path.write_text("Tell me about this.")
    assert build_prompt(load_instruction(path), "abc").startswith("Tell me about this.\n\n<<<text ")
    for bad in (b"{text} {text}", b"  ", b"\xff\xfe\x00"):
        path.write_bytes(bad)
        with pytest.raises(InputError):
            load_instruction(path)
    assert load_instruction(path.with_name("missing")) if path.with_name("missing").exists() else True
    with pytest.raises(OSError):
        load_instruction(tmp_path / "missing")


@given(st.text(max_size=300), st.integers(1, 400))
def test_a_prompt_shows_the_text_as_it_is_between_marks_that_are_not_in_it(text, most):
    prompt = build_prompt(Instruction("A", "Z"), text, most)
    assert prompt == build_prompt(Instruction("A", "Z"), text, most)
    opened = re.match(r"A<<<text ([0-9a-f]{12})( \(its beginning is left out\))?>>>\n", prompt)
    code = opened[1]
    inside = prompt[opened.end() : -len(f"<<<end of text {code}>>>Z")]
    assert prompt.endswith(f"<<<end of text {code}>>>Z") and inside == text[-most:] and code not in inside
    assert bool(opened[2]) == (len(text) > most)


def test_a_text_cannot_close_its_own_mark():
    text = "a"
    for _ in range(3):  # a text that quotes the prompt it was shown in
        text = build_prompt(Instruction("", ""), text)
    prompt = build_prompt(Instruction("", ""), text)
    (code,) = re.findall(r"<<<end of text (\w+)>>>$", prompt)
    assert prompt.count(code) == 2


GOOD = ["The text is a poem.", "It is about ships."]


@pytest.mark.parametrize(
    "reply",
    [
        "The text is a poem.\n\nIt is about ships.",
        "\n  The text is a poem.\nIt is about ships.  \n",
        "<explanation>\nThe text is a poem.\n\nIt is about ships.\n</explanation>",
        "<explanation>The text is a poem.\n\n\nIt is about ships.",
        "1. The text is a poem.\n2. It is about ships.",
        "- The text is a poem.\n\n- It is about ships.",
        "* The text is\n  a poem.\n \n* It is about ships.",
        "**Feature 1:** The text is a poem.\n\n**Feature 2:** It is about ships.",
        "Feature 1: The text is a poem.\r\n\r\nFeature 2: It is about ships.",
        "Here are the features:\n\nThe text is a poem.\n\nIt is about ships.",
        "Here are the features:\nThe text is a poem.\nIt is about ships.",
        "```\nThe text is a poem.\n\nIt is about ships.\n```",
        "<think>Let me see.\n\nWell.</think>\nThe text is a poem.\n\nIt is about ships.",
        "The text is a poem.\n\n---\n\nIt is about ships.",
    ],
)
def test_features_are_found_in_what_models_write(reply):
    assert parse_features(reply) == GOOD
    assert read_explanation(Answer(reply)) == ("\n\n".join(GOOD), "ok")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer("Only one feature."), "too_few"),
        (Answer("Sorry.\n\n!!"), "too_few"),
        (Answer("  \n"), "empty"),
        (Answer("A b.\n\nC d.", "length"), "length"),
        (Answer("A b.\n\nC d.", "refused"), "refused"),
        (Answer("A b.\n\nIt says </explanation> here."), "tags"),
        (Answer("word " * 100 + "\n\n" + "word " * 51), "too_long"),
        (None, "no_answer"),
    ],
)
def test_replies_that_are_dropped(answer, reason):
    assert read_explanation(answer) == (None, reason)


@given(st.text(max_size=200))
def test_any_reply_is_read_without_an_error(text):
    explanation, reason = read_explanation(Answer(text))
    assert (explanation is None) == (reason != "ok")
    if explanation is not None:
        assert explanation.count("\n\n") >= 1 and explanation == explanation.strip()
