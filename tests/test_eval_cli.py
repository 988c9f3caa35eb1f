"""`nla eval` end to end on a mini pair: what it prints and writes, and one line for every bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_pair import VARIANCE, mini_pair, roles, run
from extract_cases import letters, write
from fake_llm import FakeLLM

from nla_jax.evals import run as suites
from nla_jax.pair import NLA
from nla_jax.tools.mini import MiniPair

NEW = 6
FLAGS = ("--n", 12, "--per-document", 3, "--max-new-tokens", NEW, "--resamples", 100)
TEXT = "The keeper counted the ships."
CHAT = [{"role": "user", "content": "Who counts the ships?"}, {"role": "assistant", "content": "The keeper."}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> MiniPair:
    return mini_pair(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def store(pair, tmp_path_factory) -> Path:
    """Letters read by the pair's target; 40% of the documents are held out, and rows have explanations."""
    folder = tmp_path_factory.mktemp("store")
    corpus = write(folder / "letters.jsonl", letters())
    run("extract", corpus, "--target", pair.target, "--layer", 2, "--out", folder / "store", "--per-document", 6)
    run("teach", folder / "store", "lexical", "--rows", "all")
    run("data", "split", folder / "store", "--fractions", "0.2,0.2,0.2")
    return folder / "store"


@pytest.fixture(scope="module")
def evaluated(pair, store, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    return run("eval", *roles(pair), "--data", store, "--suite", "fve", "--out", out, *FLAGS), out


def test_it_prints_a_table_with_controls(evaluated):
    done, _ = evaluated
    lines = done.stdout.splitlines()
    assert "Variance explained" in lines[0]
    assert re.search(r"^ fve_nrm +-?\d\.\d{3} \[-?\d\.\d+, -?\d\.\d+\] +12 \(\d docs\)$", done.stdout, re.MULTILINE)
    assert "control: constant floor" in done.stdout and "control: shuffled pairs" in done.stdout
    assert f"denominator of fve_nrm, fve_nrm_median: variance of v_n {VARIANCE} (AR sidecar)" in done.stdout
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("denominator"))]
    assert max(map(len, table)) <= 120 and "\x1b" not in done.stdout


def test_it_says_what_the_numbers_rest_on_and_what_it_wrote(evaluated):
    done, out = evaluated
    assert "hidden_states[3]" in done.stderr and f"fve_nrm denominator {VARIANCE} (AR sidecar)" in done.stderr
    for name in ("results.json", "results.md", "report.html"):
        assert f"wrote {out / name}" in done.stderr and (out / name).is_file()


def test_results_have_the_numbers_and_their_provenance(evaluated, store):
    done, out = evaluated
    value = json.loads((out / "results.json").read_text())
    assert value["format"] == "nla_jax.eval" and value["command"][:2] == ["nla", "eval"]
    assert set(value["models"]) == {"av", "ar", "target"} and len(value["models"]["av"]["weights"]) == 64
    assert value["data"]["hash"] == json.loads((store / "manifest.json").read_text())["hash"]
    assert value["settings"]["seed"] == 42 and value["settings"]["resamples"] == 100
    assert value["layer_aliases"]["hidden_states"] == "hidden_states[3]"
    assert value["fve_nrm_denominator"]["source"] == "AR sidecar"
    (fve,) = value["suites"]
    dump = pq.read_table(out / "fve.parquet").to_pydict()
    used = ~np.array(dump["masked"])
    row = next(r for r in fve["rows"] if (r["metric"], r["group"], r["control"]) == ("fve_nrm", "", ""))
    assert row["value"] == pytest.approx(1 - np.array(dump["mse_nrm"])[used].mean() / VARIANCE)
    assert row["n"] == used.sum() == 12
    written = f"{row['value']:.3f}"
    assert written in (out / "results.md").read_text() and written in done.stdout
    assert written.replace("-", "−") in (out / "report.html").read_text()


def test_the_same_command_does_nothing_twice(evaluated, pair, store):
    _, out = evaluated
    before = (out / "report.html").read_text()
    drawn = (out / "explanations.jsonl").stat().st_mtime_ns
    again = run("eval", *roles(pair), "--data", store, "--suite", "fve", "--out", out, *FLAGS)
    assert "fve: done already" in again.stderr
    assert (out / "explanations.jsonl").stat().st_mtime_ns == drawn
    strip = re.compile(r"<tr><th scope=\"row\">run\..*?</tr>")
    assert strip.sub("", (out / "report.html").read_text()) == strip.sub("", before)


def test_an_earlier_evaluation_stands_beside(evaluated, pair, store, tmp_path):
    done, out = evaluated
    more = ["--seed", 7, "--beside", out, "--out", tmp_path / "after"]
    shown = run("eval", *roles(pair), "--data", store, "--suite", "fve", *more, *FLAGS)
    value = json.loads((out / "results.json").read_text())["suites"][0]["rows"][0]["value"]
    (line,) = [line for line in shown.stdout.splitlines() if re.match(r" fve_nrm +-?\d", line)]
    assert len(re.findall(r"\[", line)) == 2 and f"{value:.3f}" in line.split("]")[1]
    assert "beside" in (tmp_path / "after" / "report.html").read_text()
    assert "| beside |" in (tmp_path / "after" / "results.md").read_text()


def test_without_a_target_its_suites_are_listed_as_not_done(pair, store, tmp_path, monkeypatch):
    real = suites.suite
    other = SimpleNamespace(NAME="other", VERSION=1, needs=frozenset({"target"}))
    monkeypatch.setattr(suites, "suite", lambda name: real(name) if name == "fve" else other)
    flags = ["eval", *roles(pair, "av", "ar"), "--data", store, "--out", tmp_path / "eval", *FLAGS]
    done = run(*flags)
    assert "downstream: not done, it needs the target model (--target)" in done.stdout
    assert "Not done" in (tmp_path / "eval" / "report.html").read_text()
    line = run(*flags, "--suite", "fve,downstream", code=2).stderr.splitlines()[-1]
    assert line.startswith("nla: error: suite downstream cannot run: ") and "--target" in line


def test_a_teacher_paraphrases_and_translates(pair, store, tmp_path):
    with FakeLLM(reply=lambda prompt: "The same in other words.") as fake:
        flags = ["--teacher", "openai:tiny", "--base-url", f"{fake.url}/v1", "--languages", "French, German"]
        flags += ["--data", store, "--suite", "robustness", "--out", tmp_path / "eval"]
        done = run("eval", *roles(pair), *flags, *FLAGS)
        asked = len(fake.seen)
        assert asked and (tmp_path / "eval" / "answers").is_dir()
        run("eval", *roles(pair), *flags, *FLAGS)
        assert len(fake.seen) == asked
    for change in ("paraphrase", "translation to French", "translation to German"):
        assert re.search(rf" fve_nrm +{change} ", done.stdout), change


def test_an_interrupted_run_says_how_it_goes_on(pair, store, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(suites, "evaluate", stopped)
    done = run("eval", *roles(pair), "--data", store, "--out", tmp_path / "eval", *FLAGS, code=130)
    assert f"what is done is kept in {tmp_path / 'eval'}; the same command goes on" in done.stderr
    assert "nla: interrupted" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--suite", "fve,nope"], r"--suite: expected some of fve, downstream, .*, got 'nope'"),
        (["--suite", ","], "--suite: expected some of .*, got none"),
        (["--data", None], "--data: expected a store, or a .parquet set, got none"),
        (["--data", "/no/such"], "/no/such: expected an activation store"),
        (["--data", "/no/such.parquet"], r"/no/such\.parquet"),
        (["--n", "0"], "'--n'"),
        (["--resamples", "5"], "--resamples: expected at least 100"),
        (["--temperature", "nan"], "--temperature"),
        (["--variance", "-1"], "--variance: expected a positive number"),
        (["--min-position", "5000"], "nothing to evaluate"),
        (["--split", "nope"], "nope"),
        (["--beside", "/no/such"], r"--beside /no/such: expected a results\.json of nla eval"),
        (["--text", "x"], "--text: expected --like-reference with it"),
        (["--base-url", "http://127.0.0.1:1"], "expected --teacher with them"),
        (["--teacher", "nobody"], "teacher 'nobody': expected openai:MODEL"),
        (["--teacher", "openai:x", "--key-env", "NO_SUCH_KEY_AT_ALL"], "NO_SUCH_KEY_AT_ALL is not set"),
        (["--teacher", "openai:x", "--base-url", "http://127.0.0.1:1", "--languages", ","], "--languages: expected"),
        (["--like-reference"], "--like-reference: expected one text, got --data"),
        (["--like-reference", "--data", None], "expected one of --text, --file, --chat, got none"),
        (["--like-reference", "--data", None, "--text", "a", "--file", "b"], "got --text and --file"),
        (["--like-reference", "--data", None, "--text", "a", "--suite", "fve"], "one text, got --suite"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(pair, store, tmp_path, flags, message):
    given = {"--data": str(store), "--out": str(tmp_path / "eval")}
    rest = []
    for i, flag in enumerate(flags):
        if flag == "--data":
            given[flag] = flags[i + 1]
        elif i == 0 or flags[i - 1] != "--data":
            rest.append(flag)
    named = [part for name, value in given.items() if value is not None for part in (name, value)]
    done = run("eval", *roles(pair), *named, *rest, code=2)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("nla: error: ") and re.search(message, line), line
    assert not done.stdout and not (tmp_path / "eval" / "results.json").exists()


# -- one text, as the reference's transcripts --------------------------------------------------------------------------


def test_like_reference_has_its_columns(pair, tmp_path):
    out = tmp_path / "ref"
    flags = ["--like-reference", "--text", TEXT, "--max-new-tokens", NEW, "--out", out]
    done = run("eval", *roles(pair), *flags)
    header = next(line for line in done.stdout.splitlines() if "mse_nrm" in line)
    assert header.split() == ["pos", "part", "token", "||v||", "mse_nrm", "cos", "fve_nrm", "explanation"]
    nla = NLA.from_pretrained(str(pair.av), str(pair.ar), str(pair.target))
    ids = nla.tokenize(TEXT)
    expected = nla.explain(TEXT, range(len(ids)), temperature=0.0, max_new_tokens=NEW)
    shape = r"^\[ *(\d+)\]  (\w+) +token=('.*?'|\".*?\")  \|\|v\|\|=([\d.]+)  mse_nrm=(\S+)  cos=(\S+)  fve_nrm=(\S+)$"
    found = re.findall(shape, (out / "transcript.txt").read_text(), re.MULTILINE)
    assert len(found) == len(ids) == len(expected)
    for (at, part, token, size, mse, cos, fve), e in zip(found, expected, strict=True):
        assert int(at) == e.position and part == "TEXT" and token == repr(e.token)
        numbers = [float(v) for v in (size, mse, cos, fve)]
        np.testing.assert_allclose(numbers, [e.norm, e.mse_nrm, e.cosine, e.fve_nrm], atol=0.051, rtol=1e-3)
        assert float(mse) == pytest.approx(2 * (1 - float(cos)), abs=2e-3)
        assert float(fve) == pytest.approx(1 - float(mse) / VARIANCE, abs=2e-3)
    mean = np.mean([e.mse_nrm for e in expected])
    line = next(line for line in done.stdout.splitlines() if line.startswith("mean over all tokens"))
    assert f"mse_nrm {mean:.3f}, cos {1 - mean / 2:.3f}, fve_nrm {1 - mean / VARIANCE:.3f}" in line
    value = json.loads((out / "transcript.json").read_text())
    assert [t["text"] for t in value["tokens"]] == [e.text for e in expected]


def test_like_reference_tells_prompt_from_reply(pair, tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps(CHAT))
    flags = ["--like-reference", "--chat", tmp_path / "chat.json", "--max-new-tokens", NEW, "--out", tmp_path]
    run("eval", *roles(pair), *flags)
    tokens = json.loads((tmp_path / "transcript.json").read_text())["tokens"]
    parts = "".join(t["part"][0] for t in tokens)
    assert re.fullmatch("P+R+", parts)
    assert "keeper" in "".join(t["token"] for t in tokens if t["part"] == "REPLY")
    assert any(t["special"] for t in tokens)


def test_like_reference_needs_the_target(pair):
    (line,) = run("eval", *roles(pair, "av", "ar"), "--like-reference", "--text", "a", code=2).stderr.splitlines()
    assert "expected the model that reads the text, got none. Try: --target" in line
