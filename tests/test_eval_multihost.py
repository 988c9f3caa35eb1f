"""`nla eval` on meshes and on two processes with four simulated devices each: what one device finds, and what happens
when one of the two is killed."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cli_pair import mini_pair, roles, run
from eval_cases import columns, mini_nla, rows
from extract_cases import letters, write
from several import finish, kill_one, log, refused, start
from training import process

from nla_jax.errors import InputError, PromptError
from nla_jax.evals import hosts
from nla_jax.evals.context import Context
from nla_jax.models.sharding import MeshSettings

SLOW = pytest.mark.slow
FLAGS = ("--n", 12, "--per-document", 3, "--max-new-tokens", 6, "--resamples", 100, "--k", 2)
QUICK = ("--suite", "fve", "--n", 4, "--per-document", 2, "--max-new-tokens", 3, "--resamples", 100)
# Enough batches to be killed among, and more after that.
LONG = (*FLAGS[4:], "--suite", "fve,best-of-k", "--n", 96, "--per-document", 6, "--batch-size", 8, "--split", "all")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    """The options that name a mini pair and a store of its target."""
    folder = tmp_path_factory.mktemp("pair")
    pair = mini_pair(folder / "mini")
    corpus, store = write(folder / "letters.jsonl", letters()), folder / "store"
    run("extract", corpus, "--target", pair.target, "--layer", 2, "--out", store, "--per-document", 6)
    run("teach", store, "lexical", "--rows", "all")
    run("data", "split", store, "--fractions", "0.2,0.2,0.2")
    return [*roles(pair), "--data", str(store)]


def texts(out: Path) -> list[dict[str, Any]]:
    lines = (out / "explanations.jsonl").read_text().splitlines()[1:]
    return sorted(map(json.loads, lines), key=lambda line: (line["row"], line["sample"]))


def same(got: Path, expected: Path) -> None:
    """Texts and files the same, numbers to rounding. (An interval's end is that of one resample or of the next.)"""
    assert texts(got) == texts(expected)
    names = {p.relative_to(expected) for p in expected.rglob("*") if p.is_file()}
    assert {p.relative_to(got) for p in got.rglob("*") if p.is_file()} == names
    a, b = (json.loads((out / "results.json").read_text()) for out in (got, expected))
    assert a["models"] == b["models"] and a["skipped"] == b["skipped"]
    for one, other in zip(a["suites"], b["suites"], strict=True):
        assert one["suite"] == other["suite"] and one["notes"] == other["notes"]
        for x, y in zip(one["rows"], other["rows"], strict=True):
            x["value"], y["value"] = (np.nan if r["value"] is None else r["value"] for r in (x, y))
            assert x["value"] == pytest.approx(y["value"], rel=1e-4, abs=1e-5, nan_ok=True), x
            assert [x[k] for k in ("metric", "group", "control", "n")] == [
                y[k] for k in ("metric", "group", "control", "n")
            ]
    for table in expected.glob("*.parquet"):
        x, y = columns(got / table.name), columns(table)
        assert x.keys() == y.keys()
        for name in x:
            if np.asarray(y[name]).dtype.kind == "f":
                np.testing.assert_allclose(x[name], y[name], rtol=1e-4, atol=1e-4, err_msg=name)
            else:
                assert np.array_equal(x[name], y[name]), name


# What the processes tell each other


def among(count: int, do: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `do` returns or raises in each of `count` processes: threads of this one, that exchange arrays."""
    here, meeting, said = threading.local(), threading.Barrier(count, timeout=10), {}
    out: list[Any] = [None] * count

    def exchange(mine: np.ndarray) -> np.ndarray:
        said[here.i] = mine
        meeting.wait()
        rows = np.stack([said[i] for i in range(count)])
        meeting.wait()
        return rows

    def one(i: int) -> None:
        here.i = i
        try:
            out[i] = do()
        except Exception as error:
            out[i] = error

    monkeypatch.setattr(hosts, "jax", SimpleNamespace(process_count=lambda: count, process_index=lambda: here.i))
    monkeypatch.setattr(hosts, "_all", exchange)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return out


def test_one_process_calls(monkeypatch):
    assert hosts.first() and hosts.by_first(lambda: {1, 2}) == {1, 2} and hosts.spread(str, [3, 4]) == ["3", "4"]
    hosts.agree(lambda: {"seed": 1})
    with pytest.raises(PromptError, match="no"):
        hosts.by_first(lambda: (_ for _ in ()).throw(PromptError("no")))


def test_work_is_spread_and_all_have_it(monkeypatch):
    did: list[int] = []
    long = "é" * 9000
    found = among(3, lambda: hosts.spread(lambda i: did.append(i) or [i, long], range(7)), monkeypatch)
    assert found == [[[i, long] for i in range(7)]] * 3 and sorted(did) == list(range(7))
    assert among(3, lambda: hosts.spread(str, []), monkeypatch) == [[]] * 3
    assert among(2, lambda: hosts.by_first(lambda: did.append(9) or "told"), monkeypatch) == ["told"] * 2
    assert did.count(9) == 1


def test_what_one_cannot_do_all_of_them_cannot(monkeypatch):
    def bad(i: int) -> int:
        if i == 4:
            raise PromptError("text 4", expected="one marker")
        return i

    for error in among(3, lambda: hosts.spread(bad, range(6)), monkeypatch):
        assert type(error) is PromptError and str(error) == "text 4: expected one marker"
    disk = among(2, lambda: hosts.by_first(lambda: (_ for _ in ()).throw(InputError("full disk"))), monkeypatch)
    assert [str(error) for error in disk] == ["full disk"] * 2


def test_processes_with_other_data_are_told(monkeypatch):
    numbers = iter([7, 8])
    for error in among(2, lambda: hosts.agree(lambda: {"data": 0, "seed": next(numbers)}), monkeypatch):
        assert isinstance(error, InputError) and "the processes differ in seed" in str(error)
    assert among(2, lambda: hosts.agree(lambda: {"seed": 1}), monkeypatch) == [None, None]


# What a mesh finds


@pytest.mark.parametrize("split", [(2, 2), pytest.param((8, 1), marks=SLOW), pytest.param((1, 4), marks=SLOW)])
def test_a_split_pair_is_the_whole_one(split, tmp_path):
    """Texts and readings; every matrix is in parts from the start, and no device has a whole one."""
    nla = mini_nla(tmp_path / "pair", d_model=64)
    data = rows(7, 2, 0, vectors=np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32))
    given = {"data": data, "max_new_tokens": 5, "batch_size": 8}
    one = Context(nla, **given)
    one.mesh = None
    many = Context(nla, **given, split=MeshSettings(fsdp=split[0], tensor=split[1]))
    assert many.texts(2).text == one.texts(2).text
    said = [row[0] for row in one.texts(2).text] + ["longer " * 40]
    np.testing.assert_allclose(many.read(said), one.read(said), atol=1e-5)
    (av, _), ar = many._placed["av"], many._placed["ar"]
    for whole in (av.layers.wq, av.layers.down, ar.trunk.layers.gate, ar.head):
        assert {s.data.size for s in whole.addressable_shards} == {whole.size // (split[0] * split[1])}


def test_a_mesh_that_does_not_fit_is_refused_at_once(tmp_path):
    nla, data = mini_nla(tmp_path / "pair"), rows(7, 2, 0)
    with pytest.raises(InputError, match="tensor 4 does not divide the attention heads, 2"):
        Context(nla, data, split=MeshSettings(tensor=4))
    with pytest.raises(InputError, match="mesh: expected axes that make up the 8 devices"):
        Context(nla, data, split=MeshSettings(fsdp=3))


def test_one_text_takes_one_process(models):
    line = run("eval", *models[:6], "--like-reference", "--text", "a", "--tensor", 2, code=2).stderr.splitlines()[-1]
    assert "--like-reference: expected one process" in line


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory) -> Path:
    """All suites on one device."""
    out = tmp_path_factory.mktemp("alone") / "eval"
    done = process("eval", *models, *FLAGS, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@SLOW
@pytest.mark.parametrize("split", [(), ("--fsdp", 2, "--tensor", 2)], ids=["8x1x1", "2x2x2"])
def test_all_suites_on_eight_devices(split, models, alone, tmp_path):
    run("eval", *models, *FLAGS, *split, "--out", tmp_path / "eval")
    same(tmp_path / "eval", alone)


# What two processes find


def test_two_processes_are_one(models, tmp_path):
    """The same numbers and files; process 1 wrote and printed none."""
    run("eval", *models, *QUICK, "--out", tmp_path / "one")
    finish(["eval", *models, *QUICK, "--out", tmp_path / "two"], tmp_path)
    same(tmp_path / "two", tmp_path / "one")
    assert "Variance explained" in log(tmp_path, 0) and "report.html" in log(tmp_path, 0)
    assert not log(tmp_path, 1)


@SLOW
@pytest.mark.parametrize("split", [(), ("--fsdp", 2, "--tensor", 2)], ids=["8x1x1", "2x2x2"])
def test_all_suites_on_two_processes(split, models, alone, tmp_path):
    arguments = ["eval", *models, *FLAGS, *split, "--out", tmp_path / "eval"]
    finish(arguments, tmp_path)
    same(tmp_path / "eval", alone)
    finish(arguments, tmp_path)
    assert len(re.findall("done already", log(tmp_path, 0))) == 6 and not log(tmp_path, 1)


@SLOW
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_the_same_command_goes_on(victim, models, tmp_path):
    done = process("eval", *models, *LONG, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    arguments = ["eval", *models, *LONG, "--out", tmp_path / "two"]
    kept, whole = tmp_path / "two" / "explanations.jsonl", len(texts(tmp_path / "one"))
    running = start(arguments, tmp_path, heartbeat=10)
    took = kill_one(running, victim, tmp_path, lambda: kept.is_file() and kept.read_bytes().count(b"\n") >= 30)
    assert took < 30 and 29 <= len(texts(tmp_path / "two")) < whole
    assert not (tmp_path / "two" / "results.json").exists()
    finish(arguments, tmp_path)
    same(tmp_path / "two", tmp_path / "one")


@SLOW
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--fsdp", 3), "mesh: expected axes that make up the 8 devices"),
        (("--tensor", 8), "tensor 8 does not divide the attention heads, 4"),
        (("--beside", "/no/such"), "--beside /no/such: expected"),
    ],
)
def test_bad_input_ends_all(flags, message, models, tmp_path):
    refused(["eval", *models, *QUICK, *flags, "--out", tmp_path / "eval"], message, tmp_path)
