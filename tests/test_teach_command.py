"""`nla teach` on a store: what it prints and writes, dry runs, kills, and one line for every bad input."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from fake_llm import FakeLLM, reply_text

from nla_jax.lexical import describe
from nla_jax.manifest import StoreSpec
from nla_jax.store import Store
from nla_jax.store_splits import write_splits
from nla_jax.store_write import IndexedDocument, ShardWriter, create_index
from nla_jax.teacher_prompt import build_prompt, load_instruction
from nla_jax.tools.cli import main

KEY = "sk-secret-0123456789abcdef"
D = 8


def make_store(path: Path, n_docs: int, split: bool = True) -> Path:
    """A store of documents with 3 rows each; a token is a word, and vectors are noise."""
    rng = np.random.default_rng(0)

    def documents():
        for i in range(n_docs):
            words = [f"In document {i} the keeper counted {i * 7 % 90} ships before he went home to".split()][0]
            ends = np.cumsum([len(w) + 1 for w in words]) - 1
            n = len(words)
            yield IndexedDocument(
                doc_id=f"d{i}",
                text=" ".join(words),
                ids=np.arange(n, dtype=np.int32),
                roles=np.zeros(n, np.int8),
                text_end=ends.astype(np.int32),
                positions=np.array([5, 9, n - 1]),
            )

    spec = StoreSpec(D, (1,), {"name": "m", "n_layers": 2}, {"fingerprint": "f"}, shard_rows=4096)
    create_index(path, spec, documents())
    writer = ShardWriter(path)
    for shard in writer.pending():
        a, b = writer.rows(shard)
        writer.write_shard(shard, rng.normal(size=(b - a, D)).astype(np.float32))
    writer.finish()
    if split:
        write_splits(path, seed=0)
    return path


@pytest.fixture
def store(tmp_path) -> Path:
    return make_store(tmp_path / "store", 24)


def run(*args: object, code: int = 0, **environ: str | None):
    environ = {"OPENAI_API_KEY": None, "ANTHROPIC_API_KEY": None, **environ}
    done = CliRunner().invoke(main, ["teach", *map(str, args)], env=environ)
    assert done.exit_code == code, f"{done.exit_code}\n{done.stdout}\n{done.stderr}\n{done.exception!r}"
    return done


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_lexical_explains_the_rows_of_the_warm_start_splits(store):
    before = files(store)
    out = run(store, "lexical").stdout
    opened = Store.open(store)
    rows = np.union1d(opened.rows_of("av_sft"), opened.rows_of("ar_sft"))
    found = opened.explanations(slice(None))
    assert [i for i, text in enumerate(found) if text is not None] == rows.tolist()
    assert [found[i] for i in rows] == [describe(prefix) for prefix in opened.prefixes(rows)]
    assert f"wrote {len(rows)} explanations of {len(rows)} rows" in out
    changed = {name for name, data in files(store).items() if before.get(name) != data}
    assert all(name.startswith("explanations") for name in changed)
    assert not opened.check()
    first = files(store)
    run(store, "lexical")
    assert files(store) == first


def test_a_model_explains_and_another_store_reuses(store, tmp_path):
    with FakeLLM() as fake:
        url = f"{fake.url}/v1"
        out = run(store, "openai:m", "--base-url", url, "--limit", 9, "--price-in", 1, "--price-out", 2).stdout
        opened = Store.open(store)
        rows = np.union1d(opened.rows_of("av_sft"), opened.rows_of("ar_sft"))
        texts = opened.explanations(rows)
        prompts = [build_prompt(load_instruction(), prefix) for prefix in opened.prefixes(rows)]
        assert texts == [reply_text(p) if i < 9 else None for i, p in enumerate(prompts)]
        assert opened.explanation_status(rows).tolist() == [1] * 9 + [0] * (len(rows) - 9)
        assert "9 different, 0 answered before, 9 answers now" in out and "tokens of this run" in out and "cost" in out

        # The rest joins what is there; another teacher must be told to replace it.
        assert f"{len(rows)} different, 9 answered before" in run(store, "openai:m", "--base-url", url).stdout
        run(store, "openai:m", "--base-url", url, "--rows", "rl")
        assert all(Store.open(store).explanations(slice(None)))
        line = run(store, "openai:m2", "--base-url", url, code=2).stderr
        assert "has explanations of another teacher (openai:m)" in line and "--replace" in line
        assert len(fake.asked) == opened.n_rows
        run(store, "lexical", "--replace", "--limit", 2)
        assert sum(t is not None for t in Store.open(store).explanations(slice(None))) == 2

        other = make_store(tmp_path / "other", 24, split=False)
        assert ", 0 answers now" in run(other, "openai:m", "--base-url", url).stdout
        assert len(fake.asked) == opened.n_rows


def test_a_dry_run_asks_nothing_needs_no_key_and_writes_nothing(store):
    before = files(store.parent)
    out = run(store, "openai:gpt-4.1-mini", "--dry-run", "--price-in", "0.4", "--price-out", "1.6").stdout
    assert "unique prompts" in out and "input tokens" in out and "per million" in out
    assert files(store.parent) == before
    assert "unknown" in run(store, "anthropic:m", "--dry-run").stdout
    assert "costs nothing" in run(store, "lexical", "--dry-run").stdout
    with FakeLLM() as fake:
        run(store, "openai:m", "--base-url", fake.url, "--limit", 4)
        before, asked = files(store), len(fake.seen)
        out = run(store, "openai:m", "--base-url", fake.url, "--dry-run").stdout
        assert len(fake.seen) == asked == 4 and files(store) == before
    assert [line.split()[2] for line in out.splitlines() if line.startswith("answered before")] == ["4"]


def test_dropped_answers_are_told_and_marked(store):
    with FakeLLM(lambda seen: "one" if seen is fake.asked[0] else None) as fake:
        done = run(store, "openai:m", "--base-url", fake.url, "--limit", 5, "--concurrency", 1)
    assert "wrote 4 explanations of 5 rows" in done.stdout and "1 too_few (fewer than two features)" in done.stdout
    assert sorted(Store.open(store).explanation_status(slice(None)).tolist())[-5:] == [1, 1, 1, 1, 2]


def test_nothing_is_written_when_no_answer_is_usable(store):
    before = files(store)
    with FakeLLM(lambda seen: "one") as fake:
        line = run(store, "openai:m", "--base-url", fake.url, code=2).stderr
    assert "got an explanation" in line and "too_few" in line and files(store) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lexical", "--rows", "nope"], "split 'nope'"),
        (["openai:m"], "OPENAI_API_KEY is not set"),
        (["gpt-4"], "expected openai:MODEL, anthropic:MODEL or lexical"),
        (["openai:m", "--batch", "--base-url", "http://localhost:1"], "--batch: expected anthropic:MODEL"),
        (["lexical", "--batch"], "expected a teacher that is asked"),
        (["openai:m", "--base-url", "localhost"], "--base-url"),
        (["openai:m", "--timeout", "0"], "--timeout: expected a number above 0"),
        (["openai:m", "--rpm", "nan"], "--rpm"),
        (["openai:m", "--instruction", "/no/such"], "/no/such: No such file"),
        (["openai:m", "--base-url", "http://127.0.0.1:9", "--retries", "0", "--answers", "/dev/null/x"], "--answers"),
        (["openai:m", "--base-url", "http://127.0.0.1:9/v1", "--retries", "1", "--backoff", "0.01"], "no answer"),
    ],
)
def test_bad_input_is_one_line(store, args, message):
    before = files(store)
    line = run(store, *args, code=2).stderr
    assert line.startswith("nla: error: ") and len(line.splitlines()) == 1 and message in line, line
    assert files(store) == before


def test_a_missing_store_is_one_line(tmp_path):
    assert "no such directory" in run(tmp_path / "none", "lexical", code=2).stderr


@pytest.mark.parametrize(("kills", "n_docs"), [(2, 60), pytest.param(20, 500, marks=pytest.mark.slow)])
def test_a_killed_run_ends_in_the_same_store(tmp_path, kills, n_docs):
    """SIGKILL at random moments, from the first request on: the files end as an uninterrupted run leaves them."""
    rng = random.Random(kills)

    def fault(seen):
        draw = random.Random(seen.prompt).random()
        first = len(fake.asked_at[seen.prompt]) == 1
        return next(
            (
                f
                for p, f in ((0.03, ("status", 500)), (0.06, "reset"), (0.08, "one"))
                if draw < p and (first or f == "one")
            ),
            None,
        )

    stores = [make_store(tmp_path / name / "store", n_docs, split=False) for name in "ab"]
    with FakeLLM(fault, latency=0.03) as fake:
        flags = ["--base-url", fake.url, "--concurrency", "4", "--backoff", "0.02"]
        command = [sys.executable, "-m", "nla_jax.tools.cli", "teach", str(stores[0]), "openai:m", *flags]
        environ = {**os.environ, "OPENAI_API_KEY": KEY}
        for _ in range(kills):
            before = len(fake.seen)
            process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(fake.seen) == before and process.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
            assert process.wait() != 0, "the run was over before it was killed often enough"
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(fake.sent) < 3 * n_docs - 2 and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))  # one more while the store is written, or just before or after
        process.kill()
        process.wait()
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        billed = {prompt: set(names) for prompt, names in fake.billed.items()}
        fake.asked_at.clear()
        done = CliRunner().invoke(main, ["teach", str(stores[1]), "openai:m", *flags])
        assert done.exit_code == 0, done.stderr
    assert len(billed) == 3 * n_docs and all(len(names) == 1 for names in billed.values())
    assert files(stores[0]) == files(stores[1])
    meta = json.loads((stores[0] / "explanations.json").read_text())
    assert meta["taught"]["dropped"]["too_few"] > 0 and meta["counts"]["ok"] > 2 * n_docs
    everything = files(tmp_path)
    assert not [name for name, data in everything.items() if KEY.encode() in data]
