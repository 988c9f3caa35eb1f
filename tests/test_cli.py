"""The `nla` command end to end on a mini pair: what it prints and writes, and one line for every bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_pair import SHORT, VARIANCE, D, mini_pair, roles, run, saved_vectors

from nla_jax.pair import NLA, Explanation
from nla_jax.tools.cli import COMMANDS
from nla_jax.tools.mini import MiniPair


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> MiniPair:
    return mini_pair(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> Path:
    return saved_vectors(tmp_path_factory.mktemp("vectors") / "v.npy")


TEXT = "The keeper [b]counted[/b] the ships\n<i>twice</i>, 日本."
CHAT = [{"role": "user", "content": "Who counts the ships?"}, {"role": "assistant", "content": "The keeper."}]
# -- the command itself -----------------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from nla_jax.tools.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "heavy = {'jax', 'numpy', 'pyarrow', 'rich', 'yaml', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "explain" in done.stdout and "verbalize" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name):
    if name not in run("--help").stdout:
        pytest.skip(f"{name} is not there yet")
    shown = run(name, "--help").stdout
    assert re.search(rf"Examples?:\s+nla {name} ", shown) and "--debug" in shown


def test_version_and_bare_command():
    assert re.search(r"\d+\.\d+\.\d+", run("--version").stdout)
    assert "Commands:" in run().stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["explian"], r"no command 'explian'\. Try: nla explain"),
        (["--nope"], "No such option '--nope'"),
        (["explain", "x"], r"Missing option '--(target|av)'.*nla explain --help"),
        (["explain", "x", "--nope"], "No such option '--nope'"),
        (["explain", "x", "--av", "a", "--target", "t", "--samples", "0"], "--samples"),
        (["explain", "x", "--av", "a", "--target", "t", "--samples", "x"], "--samples"),
        (["explain", "x", "--av", "a", "--target", "t", "--dtype", "int8"], "--dtype"),
        (["explain", "x", "--av", "a", "--target", "t", "--temperature", "nan"], "--temperature"),
        (["explain", "x", "--av", "a", "--target", "t", "--temperature", "-1"], "--temperature"),
        (["explain", "x", "--av", "a", "--target", "t", "--variance", "0"], "--variance: expected a positive"),
        (["explain", "x", "--av", "a", "--target", "t", "--best-of", "2"], "--best-of: expected an AR"),
        (["explain", "x", "y", "--av", "a", "--target", "t"], "unexpected extra argument"),
        (["explain", "--av", "a", "--target", "t"], "expected one of TEXT, --file, --chat"),
        (["explain", "x", "--file", "f", "--av", "a", "--target", "t"], "expected one of TEXT, --file, --chat"),
        (["verbalize", "--av", "a"], "--vectors"),
        (["verbalize", "--av", "a", "--vectors", "/no/such.npy"], r"/no/such\.npy: No such file or directory"),
        (["reconstruct", "--ar", "a", "--out", "o.npy"], "either TEXT or --file"),
        (["reconstruct", "x", "--ar", "a", "--out", "o.txt"], r"--out: expected \.npy or \.parquet"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(args, message):
    done = run(*args, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith("nla: error: ") and re.search(message, line), line
    assert not done.stdout


@pytest.mark.parametrize("args", [["--debug", "explain", "x"], ["explain", "--debug", "x", "--file", "y"]])
def test_debug_shows_the_traceback(args):
    done = run(*args, "--av", "a", "--target", "t", code=2)
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("nla: error: ")


def test_an_error_of_ours_is_one_line_and_exit_1(tmp_path, monkeypatch):
    (tmp_path / "faulty_command.py").write_text(
        "import click\n@click.command()\ndef faulty():\n    raise ValueError('first line\\nsecond \\x1b[31mline')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(COMMANDS, "faulty", ("faulty_command", "Fails."))
    (line,) = run("faulty", code=1).stderr.splitlines()
    assert line.startswith("nla: error: unexpected ValueError: first line second ") and "--debug" in line
    assert "\x1b" not in line
    assert "Traceback" in run("faulty", "--debug", code=1).stderr


# -- explain ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explained(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("explained")
    files = {kind: out / f"out.{kind}" for kind in ("json", "parquet", "html")}
    flags = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    done = run("explain", TEXT, *roles(pair), "--positions", "2:5,-1", "--samples", 2, "--seed", 3, *SHORT, *flags)
    return done, files


def _expected(pair: MiniPair, positions: list[int]) -> list[Explanation]:
    nla = NLA.from_pretrained(str(pair.av), str(pair.ar), str(pair.target))
    return nla.explain(TEXT, positions, samples=2, max_new_tokens=6, seed=3)


def test_explain_prints_a_table(explained, pair):
    done, files = explained
    lines = done.stdout.splitlines()
    header = next(line for line in lines if "explanation" in line)
    assert header.split() == ["pos", "token", "|h|", "#", "cosine", "fve_nrm", "explanation"]
    assert max(map(len, lines)) <= 160 and not any(line != line.rstrip() for line in lines)
    assert "\x1b" not in done.stdout
    assert len([line for line in lines if re.match(r" +\d+ ", line)]) == 8
    assert "positions < 50: n 4 (8 samples), cosine " in done.stdout and "failed " in done.stdout
    assert re.search(r"variance 0\.7 \(AR sidecar\); always guessing the mean direction gives -0\.\d{3}", done.stdout)


def test_explain_says_what_the_numbers_rest_on(explained):
    done, files = explained
    note = done.stderr.splitlines()[0]
    aliases = "layer_index 2 = output of model.layers[2] = blocks.2.hook_resid_post = hidden_states[3]"
    assert "device cpu, float32" in note and aliases in note and "fve_nrm denominator 0.7 (AR sidecar)" in note
    for path in files.values():
        assert f"wrote {path} (8 explanations)" in done.stderr


def test_explain_json(explained, pair):
    _, files = explained
    value = json.loads(files["json"].read_text())
    nla = NLA.from_pretrained(target=str(pair.target), layer=2)
    ids = nla.tokenize(TEXT)
    assert value["format"] == "nla_jax.explain" and value["command"][:3] == ["nla", "explain", TEXT]
    assert value["text"] == TEXT and [t["id"] for t in value["tokens"]] == ids
    assert "".join(t["text"] for t in value["tokens"]) == TEXT
    assert value["layer_aliases"]["hidden_states"] == "hidden_states[3]" and value["settings"]["seed"] == 3
    assert value["fve_nrm_denominator"]["variance_nrm"] == VARIANCE
    assert value["models"]["av"] == {"given": str(pair.av), "path": str(pair.av)}
    expected = _expected(pair, [2, 3, 4, len(ids) - 1])
    assert len(value["explanations"]) == len(expected) == 8
    for got, e in zip(value["explanations"], expected, strict=True):
        assert (got["text"], got["position"], got["sample"]) == (e.text, e.position, e.sample)
        assert tuple(got["token_ids"]) == e.token_ids and got["fve_nrm"] == pytest.approx(e.fve_nrm, abs=1e-5)
        assert set(got) == set(Explanation.__dataclass_fields__)


def test_explain_parquet_has_the_vectors(explained, pair):
    _, files = explained
    table = pq.read_table(files["parquet"])
    assert set(Explanation.__dataclass_fields__) < set(table.column_names)
    assert str(table.schema.field("activation_vector").type) == f"fixed_size_list<element: float>[{D}]"
    rows = table.to_pylist()
    assert [r["n_raw_tokens"] for r in rows] == [r["position"] + 1 for r in rows]
    assert {r["activation_layer"] for r in rows} == {2}
    nla = NLA.from_pretrained(target=str(pair.target), layer=2)
    found = nla.activations(TEXT, [r["position"] for r in rows])
    stored = np.stack([np.asarray(r["activation_vector"], np.float32) for r in rows])
    np.testing.assert_allclose(stored, found.vectors, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([r["norm"] for r in rows], np.linalg.norm(found.vectors, axis=1), rtol=1e-5)
    assert json.loads(table.schema.metadata[b"nla_jax"])["settings"]["seed"] == 3


def test_explain_page_is_the_report(explained):
    _, files = explained
    page = files["html"].read_text()
    data = json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])
    stored = json.loads(files["json"].read_text())
    assert [s["text"] for item in data["items"] for s in item["samples"]] == [e["text"] for e in stored["explanations"]]


def test_verbalize_reads_what_explain_wrote(explained, pair, tmp_path):
    _, files = explained
    out = tmp_path / "again.json"
    flags = ["--rows", "6,0", *SHORT, "--temperature", 0, "--json", out, "--parquet", tmp_path / "again.parquet"]
    done = run("verbalize", "--vectors", files["parquet"], *roles(pair, "av", "ar"), *flags)
    value = json.loads(out.read_text())
    assert [e["row"] for e in value["explanations"]] == [6, 0]
    assert "all vectors: n 2" in done.stdout
    nla = NLA.from_pretrained(str(pair.av))
    vectors = np.stack(pq.read_table(files["parquet"])["activation_vector"].to_numpy(zero_copy_only=False))[[6, 0]]
    expected = nla.verbalize(vectors, temperature=0, max_new_tokens=6)
    assert [e["text"] for e in value["explanations"]] == [e.text for e in expected]
    stored = np.stack(pq.read_table(tmp_path / "again.parquet")["activation_vector"].to_numpy(zero_copy_only=False))
    np.testing.assert_array_equal(stored, vectors)


def test_score_and_reconstruct_agree_with_explain(explained, pair, tmp_path):
    _, files = explained
    out, recon = tmp_path / "scores.json", tmp_path / "r.npy"
    parquet = files["parquet"]
    done = run("score", *roles(pair, "ar"), "--texts", parquet, "--vectors", parquet, "--json", out)
    scores = json.loads(out.read_text())
    stored = json.loads(files["json"].read_text())["explanations"]
    for row, e in zip(scores["scores"], stored, strict=True):
        assert row["cosine"] == pytest.approx(e["cosine"], abs=1e-5)
        assert row["fve_nrm"] == pytest.approx(1 - row["mse_nrm"] / VARIANCE)
    assert scores["summary"]["fve_nrm"] == pytest.approx(np.mean([row["fve_nrm"] for row in scores["scores"]]))
    assert "n 8, mse_nrm" in done.stdout and "variance 0.7 (AR sidecar)" in done.stdout

    run("reconstruct", *roles(pair, "ar"), "--file", files["json"], "--out", recon)
    predicted = np.load(recon)
    vectors = np.stack(pq.read_table(parquet)["activation_vector"].to_numpy(zero_copy_only=False))
    cosine = (predicted * vectors).sum(1) / np.linalg.norm(predicted, axis=1) / np.linalg.norm(vectors, axis=1)
    np.testing.assert_allclose(cosine, [e["cosine"] for e in stored], atol=1e-5)
    run("reconstruct", *[e["text"] for e in stored], *roles(pair, "ar"), "--out", tmp_path / "r.parquet")
    column = pq.read_table(tmp_path / "r.parquet")["reconstruction"].to_numpy(zero_copy_only=False)
    np.testing.assert_allclose(np.stack(column), predicted, rtol=1e-4, atol=1e-5)


def test_file_stdin_and_text_are_the_same(pair, tmp_path):
    (tmp_path / "t.txt").write_text(TEXT + "\n")
    flags = [*roles(pair, "target", "av"), "--positions", -1, *SHORT]
    shown = [
        run("explain", TEXT, *flags).stdout,
        run("explain", "--file", tmp_path / "t.txt", *flags).stdout,
        run("explain", "-", *flags, stdin=(TEXT + "\n").encode()).stdout,
    ]
    assert shown[0] == shown[1] == shown[2]
    assert "cosine" not in shown[0]  # no AR


def test_a_chat_and_best_of(pair, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"messages": CHAT}))
    out = tmp_path / "c.html"
    flags = ["--positions", "5:7", "--best-of", 2, "--keep-all", *SHORT, "--html", out, "--json", tmp_path / "o.json"]
    run("explain", "--chat", tmp_path / "c.json", *roles(pair), *flags)
    value = json.loads((tmp_path / "o.json").read_text())
    assert value["messages"] == CHAT and len(value["explanations"]) == 2
    data = json.loads(out.read_text().split('id="data">')[1].split("</script>")[0])
    assert [role for role, _, _ in data["messages"]] == ["user", "assistant"]


def test_special_tokens_are_left_out_unless_named(pair, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(CHAT[:1]))
    shown = run("explain", "--chat", tmp_path / "c.json", *roles(pair, "target", "av"), "--positions", "0,3", *SHORT)
    assert "special tokens: n 1" in shown.stdout and "<|im_start|>" in shown.stdout


# -- as a process -----------------------------------------------------------------------------------------------------


def _start(*args: object, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-m", "nla_jax.tools.cli", *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/", **kwargs)


def test_ctrl_c_is_one_line_and_exit_130():
    process = _start("explain", "-", "--av", "a", "--target", "t", stdout=subprocess.PIPE)
    # More than a pipe holds: the write returns once the command is reading, and then it waits for the end.
    os.write(process.stdin.fileno(), b"x" * 200_000)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.decode().split("\n") == ["", "nla: interrupted", ""]


def test_a_closed_pipe_is_quiet_and_costs_no_file(pair, vectors, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    out = tmp_path / "o.json"
    flags = ["--vectors", vectors, "--rows", "0:2", *SHORT, "--json", out]
    process = _start("verbalize", *roles(pair, "av"), *flags, stdout=writer)
    os.close(writer)
    _, stderr = process.communicate(timeout=120)
    lines = stderr.decode().splitlines()
    assert "Traceback" not in stderr.decode() and "BrokenPipe" not in stderr.decode()
    assert not any(line.startswith("nla: error") for line in lines)
    assert len(json.loads(out.read_text())["explanations"]) == 2


def test_an_ascii_terminal_gets_question_marks_instead_of_a_crash():
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    process = _start("explain", "x", "--positions", "日本", "--file", "日本", stdout=subprocess.PIPE, env=env)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2 and stderr.startswith(b"nla: error: ")
