"""The HTML page: self-contained, safe for any text, and true to the tokens; and how tokens are displayed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nla_jax.pair import Explanation
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools.mini_tokenizer import write_mini_tokenizer
from nla_jax.tools.page import page, page_data, script_json
from nla_jax.tools.report import Report, Setup, constant_floor, tallies
from nla_jax.tools.tokens import message_spans, printable, token_views, visible

HOSTILE = "</script><img src=x onerror=alert(1)> & <!-- {{style}} {{data}} \u2028\u2029 \x1b[31m 日本 'q' \"d\"\nnew"
VARIANCE = 0.7


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    out = tmp_path_factory.mktemp("tokenizer")
    write_mini_tokenizer(out, "chatml")
    return Tokenizer.from_dir(out)


def _setup(**changes) -> Setup:
    setup = Setup(
        command="explain",
        arguments=("explain", HOSTILE),
        models={role: {"given": f"models/{role} <b>", "path": f"/models/{role}"} for role in ("target", "av", "ar")},
        device="cpu",
        dtype="float32",
        d_model=16,
        layer_index=20,
        mse_scale=4.0,
        variance_nrm=VARIANCE,
        variance_source="given",
        settings={"samples": 2, "seed": 0, "positions": None},
    )
    return dataclasses.replace(setup, **changes)


def _explanation(position: int | None, sample: int, text: str, mse: float | None = 0.2, **changes) -> Explanation:
    scores = {} if mse is None else {"cosine": 1 - mse / 2, "mse_nrm": mse, "fve_nrm": 1 - mse / VARIANCE}
    fields = dict(
        text=text,
        raw=text,
        token_ids=(1, 2, 3),
        logprobs=(-1.0, -0.5, 0.0),
        failed=False,
        finish_reason="stop",
        sample=sample,
        position=position,
        token="x",
        token_id=5,
        norm=12.5,
        row=position,
    )
    return Explanation(**{**fields, **scores, **changes})


def _report(tokenizer: Tokenizer, text: str = HOSTILE, **changes) -> Report:
    ids = tokenizer.encode(text)
    explanations = [_explanation(p, s, f"{p}.{s} {HOSTILE}", 0.1 * (p % 9)) for p in range(len(ids)) for s in (0, 1)]
    explanations[3] = dataclasses.replace(explanations[3], failed=True, finish_reason="length", cosine=float("nan"))
    index = [e.position for e in explanations]
    report = Report(_setup(), explanations, np.ones((len(ids), 16)), index, text, token_views(tokenizer, ids))
    return dataclasses.replace(report, **changes)


class _Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = [("", {})]
        self.data: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attrs = self.found[-1]
        key = attrs.get("id", tag)
        self.data[key] = self.data.get(key, "") + data


def test_the_page_holds_its_data_and_nothing_of_it_is_markup(tokenizer):
    report = _report(tokenizer)
    text = page(report)
    parsed = _Elements(text)
    tags = [tag for tag, _ in parsed.found]
    assert tags.count("script") == 2 and tags.count("style") == 1 and "img" not in tags and "b" not in tags
    data = json.loads(parsed.data["data"])
    assert data == json.loads(script_json(page_data(report)))
    assert data["items"][0]["samples"][0]["text"] == f"0.0 {HOSTILE}"
    assert "".join(t[0] for t in data["tokens"]) == HOSTILE
    assert data["items"][1]["samples"][1]["cosine"] is None  # NaN
    assert parsed.data["title"].strip() == "target <b>, layer 20: explanations"


def test_the_page_asks_for_nothing(tokenizer):
    text = page(_report(tokenizer))
    markup = text[: text.index('<script type="application/json"')]
    assert "default-src 'none'" in markup
    assert not re.search(r"\b(src|href|action|srcset)\s*=|@import|url\(", markup)
    script = text[text.rindex("<script>") :]
    assert set(re.findall(r"https?://[^\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|import\(", script)


def test_script_json_cannot_end_a_script():
    value = {"a": "</script><!--\u2028\u2029&", "n": float("nan"), "i": float("inf"), "f": 1.5}
    text = script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"a": value["a"], "n": None, "i": None, "f": 1.5}


def test_colour_is_fve_nrm_then_cosine_then_none(tokenizer):
    report = _report(tokenizer)
    assert page_data(report)["metric"] == "fve_nrm"
    assert page_data(dataclasses.replace(report, setup=_setup(variance_nrm=None)))["metric"] == "cosine"
    bare = [dataclasses.replace(e, cosine=None, mse_nrm=None, fve_nrm=None) for e in report.explanations]
    assert page_data(dataclasses.replace(report, explanations=bare))["metric"] is None


def test_rows_without_a_text(tokenizer):
    rows = [_explanation(None, s, "x", token=None, token_id=None, row=r) for r in (7, 3) for s in (0, 1)]
    report = Report(_setup(command="verbalize"), rows, np.ones((2, 16)), [0, 0, 1, 1])
    data = page_data(report)
    assert (data["mode"], data["tokens"], [item["at"] for item in data["items"]]) == ("rows", [], [3, 7])
    assert all(len(item["samples"]) == 2 for item in data["items"])


def test_totals_keep_early_and_special_tokens_apart(tokenizer):
    views = token_views(tokenizer, tokenizer.encode("word " * 80))
    views[60] = dataclasses.replace(views[60], special=True)
    errors = {10: 0.1, 49: 0.3, 50: 0.5, 60: 1.9, 70: 0.7}
    rows = [_explanation(p, 0, "x", mse, failed=p == 70) for p, mse in errors.items()]
    late, early, special = tallies(Report(_setup(), rows, np.ones((5, 16)), range(5), "text", views))
    assert (late.name, late.n, late.failed) == ("positions >= 50", 2, 1)
    assert late.mse_nrm == pytest.approx(0.6) and late.fve_nrm == pytest.approx(1 - 1.2 / (2 * VARIANCE))
    assert (early.n, early.cosine) == (2, pytest.approx(0.9))
    assert (special.n, special.mse_nrm) == (1, pytest.approx(1.9))


@pytest.mark.parametrize("scale", [64**0.5, 3.0])
def test_the_floor_is_what_a_constant_guess_gets(scale):
    rng = np.random.default_rng(0)
    v = rng.normal(size=(200, 64)) + rng.normal(size=64)
    v *= scale / np.linalg.norm(v, axis=1, keepdims=True)
    mu = v.mean(0)
    variance = np.mean((v - mu) ** 2)
    guess = mu * scale / np.linalg.norm(mu)
    expected = 1 - np.mean((v - guess) ** 2) / variance
    assert constant_floor(variance, scale, 64) == pytest.approx(expected, rel=1e-9)
    # The value that DESIGN's formula gives for the released Qwen pair.
    assert constant_floor(0.7335, 3584**0.5, 3584) == pytest.approx(1 - 2 * (1 - (1 - 0.7335) ** 0.5) / 0.7335)
    assert constant_floor(None, 1.0, 64) is None and constant_floor(1.0, None, 64) is None


# -- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["plain words", "日本語 and 🧛🏽‍♂️!", "end �", "مرحبا\u200f x", "a\n\n\tb"])
def test_views_joined_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    views = token_views(tokenizer, ids)
    assert "".join(view.text for view in views) == text
    assert [view.id for view in views] == ids and [view.position for view in views] == list(range(len(ids)))


def test_parts_of_a_character_are_counted(tokenizer):
    views = token_views(tokenizer, tokenizer.encode("x🧛y"))
    parts = [(view.part, view.parts) for view in views if view.parts > 1]
    assert len(parts) >= 2 and parts == [(k + 1, len(parts)) for k in range(len(parts))]
    assert [view.text for view in views if view.parts > 1] == ["🧛"] + [""] * (len(parts) - 1)


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    ids = tokenizer.encode("🧛")
    views = token_views(tokenizer, ids[:1])
    assert (views[0].text, views[0].parts) == ("\ufffd", 1)


def test_message_spans_cover_the_chat(tokenizer):
    chat = [{"role": r, "content": f"{r} says"} for r in ("system", "user", "assistant", "user")]
    ids = tokenizer.encode_chat(chat)
    spans = message_spans(tokenizer, chat, ids)
    assert [s.role for s in spans] == ["system", "user", "assistant", "user"]
    assert spans[0].start == 0 and spans[-1].end == len(ids)
    assert all(a.end == b.start for a, b in zip(spans, spans[1:], strict=False))
    for span, message in zip(spans, chat, strict=True):
        assert message["content"] in tokenizer.decode(ids[span.start : span.end])


def test_visible_and_printable_leave_nothing_to_the_terminal():
    assert visible(" a\n\t\x1b\u202e\u00a0") == "␣a⏎⇥␛<U+202E>⍽"
    assert visible("\u200d") == "<U+200D>" and visible("👩\u200d🚀") == "👩\u200d🚀"
    assert printable("a\r\nb\tc \x07\x9b d") == "a\nb c ␇<U+009B> d"


# -- in a browser ---------------------------------------------------------------------------------------------------


def test_the_page_in_a_browser(tokenizer, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium")
    report = _report(tokenizer)
    file = tmp_path / "page.html"
    file.write_bytes(page(report).encode())
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        + ["--virtual-time-budget=3000", "--dump-dom", f"{file.as_uri()}#3"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    if done.returncode or b"<html" not in done.stdout:
        pytest.skip(f"{Path(browser).name} does not run here")
    dom = re.sub(r"<script.*?</script>", "", done.stdout.decode(), flags=re.DOTALL)
    tokens = re.findall(r'<span class="t on[^"]*"[^>]*>', dom)
    assert len(tokens) == len(report.tokens)
    assert sum('aria-pressed="true"' in token for token in tokens) == 1
    assert "position 3, token id" in dom and "<img src=x" not in dom
    assert "failed: cut by the length cap" not in dom and dom.count('class="sample"') == 2
