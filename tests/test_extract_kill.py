"""`nla extract` in processes of its own: kills, interrupts and full disks, and what is finished in the end."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from extract_cases import command, letters, process, small_target, write
from store_cases import tree

from nla_jax.store import Store

DOCUMENTS, LONGEST, SHARD = 120, 120, 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    """The command's arguments without --out."""
    place = tmp_path_factory.mktemp("inputs")
    corpus = write(place / "letters.jsonl", [*letters(DOCUMENTS, LONGEST), {"text": ""}])
    options = {"target": small_target(place / "model"), "layer": "2", "shard-rows": SHARD, "batch-tokens": 256}
    return [str(corpus), *(str(part) for k, v in options.items() for part in (f"--{k}", v))]


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    done = process(*inputs, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def start(inputs: list[str], out: Path, *more: object) -> subprocess.Popen:
    return subprocess.Popen(command(*inputs, "--out", out, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def records(out: Path) -> int:
    return len(list((out / "done").glob("*.json")))


def wait_until(condition, running: subprocess.Popen) -> None:
    while not condition() and running.poll() is None:
        time.sleep(0.002)


def kill_at(running: subprocess.Popen, moment: str, out: Path, rng: random.Random) -> bool:
    """SIGKILL while the index is made, or while shards are written, or at any time; False if it had ended."""
    if moment == "index":
        wait_until(lambda: any(out.parent.glob(f".{out.name}.*.tmp")), running)
        time.sleep(rng.uniform(0, 0.08))
    elif moment == "shards":
        more = records(out) + rng.randint(1, 8)
        wait_until(lambda: records(out) >= more, running)
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 4))
    ended = running.poll() is not None
    running.kill()
    running.communicate()
    return not ended


def disturb(inputs: list[str], out: Path, moments: list[str], rng: random.Random) -> int:
    kills = 0
    for moment in moments:
        kills += kill_at(start(inputs, out), moment, out, rng)
    return kills


def test_a_killed_extraction_goes_on_and_ends_the_same(inputs, undisturbed, tmp_path):
    out = tmp_path / "store"
    rng = random.Random(5)
    assert disturb(inputs, out, ["index"], rng) == 1
    assert disturb(inputs, out, ["shards"], rng) == 1
    kept = records(out)
    assert 0 < kept < records(undisturbed)
    assert disturb(inputs, out, ["shards"], rng) == 1 and records(out) > kept
    done = process(*inputs, "--out", out)
    assert done.returncode == 0, done.stderr
    assert tree(out) == tree(undisturbed)
    assert [p.name for p in tmp_path.iterdir()] == ["store"], "a killed run's temporary directory was left"
    again = process(*inputs, "--out", out)
    assert again.returncode == 0 and "complete already, nothing to do" in again.stdout
    assert tree(out) == tree(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_kills(inputs, undisturbed, tmp_path, seed):
    out = tmp_path / "store"
    rng = random.Random(seed)
    moments = ["index"] * 4 + [rng.choice(["shards", "any"]) for _ in range(16)]
    kills = disturb(inputs, out, moments, rng)
    while kills < 20:  # the store was finished early: from the beginning, with more of the kills before it is
        done = process(*inputs, "--out", out)
        assert done.returncode == 0 and tree(out) == tree(undisturbed)
        subprocess.run(["rm", "-r", out], check=True)
        kills += disturb(inputs, out, ["index", "any", "shards", "any"], rng)
    assert process(*inputs, "--out", out).returncode == 0
    assert tree(out) == tree(undisturbed)
    assert Store.open(out).check() == []


@pytest.mark.slow
def test_three_processes_with_kills(inputs, undisturbed, tmp_path):
    out = tmp_path / "store"
    rng = random.Random(2)
    kills = 0
    for _ in range(8):
        running = [start(inputs, out, "--process", p, "--processes", 3) for p in range(3)]
        kills += kill_at(rng.choice(running), rng.choice(["shards", "any"]), out, rng)
        time.sleep(rng.uniform(0, 1))
        for other in running:
            other.kill()
            other.communicate()
    assert kills >= 4
    running = [start(inputs, out, "--process", p, "--processes", 3) for p in range(3)]
    outputs = [r.communicate() for r in running]
    assert [r.returncode for r in running] == [0, 0, 0], outputs
    assert tree(out) == tree(undisturbed)


def test_three_processes_share_the_work(inputs, undisturbed, tmp_path):
    out = tmp_path / "store"
    running = [start(inputs, out, "--process", p, "--processes", 3) for p in (2, 1, 0)]
    outputs = [r.communicate() for r in running]
    assert [r.returncode for r in running] == [0, 0, 0], outputs
    assert tree(out) == tree(undisturbed)
    said = b"".join(stdout for stdout, _ in outputs).decode()
    assert f"{Store.open(undisturbed).n_rows} rows" in said and "nla data split" in said


def test_ctrl_c_keeps_what_is_finished(inputs, undisturbed, tmp_path):
    out = tmp_path / "store"
    running = start(inputs, out)
    wait_until(lambda: records(out) >= 2, running)
    running.send_signal(signal.SIGINT)
    _, stderr = running.communicate()
    lines = [line for line in stderr.decode().splitlines() if line]
    assert running.returncode == 130, stderr
    assert lines[-1] == "nla: interrupted" and "shards are kept" in lines[-2]
    assert 2 <= records(out) < records(undisturbed)
    assert process(*inputs, "--out", out).returncode == 0
    assert tree(out) == tree(undisturbed)


def test_a_full_disk_loses_nothing(inputs, undisturbed, tmp_path):
    """A process that, once two shards are there, may not write files larger than 1,500 bytes: a shard has 2,304."""
    out = tmp_path / "store"
    arguments = [*inputs, "--out", str(out)]
    code = (
        "import resource, sys; from nla_jax.tools.cli import main; from nla_jax import arrays\n"
        "write = arrays.Root.write_json\n"
        "def limited(self, key, value):\n"
        "    write(self, key, value)\n"
        "    if key == 'done/00000001.json': resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))\n"
        "arrays.Root.write_json = limited\n"
        "main(sys.argv[1:])\n"
    )
    full = subprocess.run([sys.executable, "-c", code, "extract", *arguments], capture_output=True, text=True)
    last = full.stderr.splitlines()[-1]
    assert full.returncode == 2 and last.startswith("nla: error: "), full.stderr
    assert "writing shard 2" in last and "File too large" in last and "the same command again" in last
    assert records(out) == 2
    assert process(*arguments).returncode == 0
    assert tree(out) == tree(undisturbed)


def test_what_the_command_prints(inputs, tmp_path):
    done = process(*inputs, "--out", tmp_path / "a b")
    lines = done.stderr.splitlines()
    assert lines[0] == ("nla: layer_index 2 = output of model.layers[2] = blocks.2.hook_resid_post = hidden_states[3]")
    store = Store.open(tmp_path / "a b")
    assert any(f"{store.n_rows} rows of {store.n_docs} documents" in line for line in lines)
    short = DOCUMENTS - store.n_docs
    assert f"nla: corpus: {DOCUMENTS} documents read, 1 empty, {short} without a position to keep" in lines
    assert any(f"letters.jsonl:{DOCUMENTS + 1}: no text" in line for line in lines)
    wrote, then = done.stdout.splitlines()
    assert wrote.startswith(f"wrote {tmp_path}/a b: {store.n_rows} rows of {store.n_docs} documents (")
    assert wrote.endswith("tokens/s)")
    assert then.startswith(f"next: nla data split '{tmp_path}/a b'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--layer": "4"}, "layer: expected 0 to 3"),
        ({"--layer": "two"}, "--layer: expected block numbers"),
        ({"--target": "no/such"}, "no/such"),
        ({"--rows": "5"}, "--rows: expected a slice"),
        ({"--rows": "1000:"}, "no documents"),
        ({"--per-document": "0"}, "--per-document"),
        ({"--out": "/proc/x/y"}, "/proc/x"),
        ({"--dtype": "int8"}, "--dtype"),
        ({"--text-field": "body"}, "no documents"),
        ({"--process": "3"}, "process: expected 0 to 0"),
    ],
)
def test_bad_input_is_one_line(inputs, tmp_path, monkeypatch, changes, message):
    from click.testing import CliRunner

    from nla_jax.tools.cli import main

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = dict(zip(inputs[1::2], inputs[2::2], strict=True)) | {"--out": str(tmp_path / "store")} | changes
    done = CliRunner().invoke(main, ["extract", inputs[0], *(part for pair in arguments.items() for part in pair)])
    assert done.exit_code == 2, (done.stderr, done.exception)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("nla: error: ") and message in last and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
