"""`nla data` as it is typed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from store_cases import SPEC, build, documents, fill

from nla_jax.store import Store
from nla_jax.store_write import create_index, write_explanations
from nla_jax.tools.cli import main


def nla(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in ("data", *arguments)], catch_exceptions=False)


def refused(*arguments: object) -> str:
    """The one line of an error, with exit code 2."""
    done = CliRunner().invoke(main, [str(a) for a in ("data", *arguments)])
    assert done.exit_code == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "store"
    n = build(path).n_rows
    write_explanations(path, [f"about {i} \x1b[31m[bold]" if i % 2 else None for i in range(n)], {"provider": "test"})
    return path


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize("command", [[], ["info"], ["check"], ["head"], ["merge"], ["split"]])
def test_help_has_an_example(command: list[str]):
    done = nla(*command, "--help")
    assert done.exit_code == 0 and re.search(r"Examples?:\n\s+nla data ", done.stdout)


def test_info(store: Path):
    nla("split", store)
    done = nla("info", store)
    assert done.exit_code == 0
    opened = Store.open(store)
    size = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    for part in (
        f"{opened.n_rows} of 24 documents, D = 16, float32",
        "3: output of block 3, model.layers[3], blocks.3.hook_resid_post, hidden_states[4]",
        f"{size:,} bytes",
        "24 documents",
        "av_sft",
        opened.manifest["hash"],
    ):
        assert part in done.stdout
    content = json.loads(nla("info", store, "--json").stdout)
    assert content["n_rows"] == opened.n_rows and content["splits"]["seed"] == 0
    assert content["explanations"]["provider"] == "test"


def test_check(store: Path):
    done = nla("check", store)
    assert done.exit_code == 0 and "sound" in done.stdout
    (store / "vectors" / "c" / "1" / "0").unlink()
    done = nla("check", store)
    assert done.exit_code == 1
    assert re.search(r"problem: shard 1 \(rows 16 to 32\) is missing\n.*1 problem\n", done.stdout)


def test_half_written(tmp_path: Path):
    create_index(tmp_path / "half", SPEC, documents())
    fill(tmp_path / "half", [0])
    assert "(extracting, 1 of " in nla("info", tmp_path / "half").stdout
    assert "sound so far (1 of " in nla("check", tmp_path / "half").stdout
    assert nla("head", tmp_path / "half", "-n", 40).exit_code == 0
    assert "half-written" in refused("split", tmp_path / "half")


def test_head(store: Path):
    rows = [json.loads(line) for line in nla("head", store, "-n", 3, "--json").stdout.splitlines()]
    opened = Store.open(store)
    assert [r["prefix"] for r in rows] == opened.prefixes(slice(0, 3))
    assert [r["explanation"] for r in rows] == opened.explanations(slice(0, 3))
    assert rows[0]["norm"] == pytest.approx(float((opened.vectors(slice(0, 1)) ** 2).sum() ** 0.5), rel=1e-6)
    table = nla("head", store, "-n", 4).stdout
    assert "about 1" in table and "[bold]" in table, "what is stored is no markup"
    assert "\x1b" not in table, "control characters of a text reached the terminal"
    assert len(nla("head", store, "-n", 10_000, "--json").stdout.splitlines()) == opened.n_rows


def test_merge(store: Path, tmp_path: Path):
    other = build(tmp_path / "other", n=5, first=70)
    done = nla("merge", store, other.path, "--out", tmp_path / "all")
    merged = Store.open(tmp_path / "all")
    assert merged.n_docs == 29 and f"wrote {tmp_path / 'all'}: {merged.n_rows} rows of 29 documents" in done.stdout
    assert "holds a store already" in refused("merge", store, other.path, "--out", tmp_path / "all")
    assert "at least two" in refused("merge", store, "--out", tmp_path / "x")


def test_split(store: Path, tmp_path: Path):
    done = nla("split", store, "--fractions", "0.5,0,0.5", "--seed", 3, "--out", tmp_path / "parts")
    assert done.exit_code == 0 and "disjoint" in done.stdout
    splits = Store.open(store).splits
    assert splits is not None and splits["seed"] == 3 and splits["ar_sft"]["docs"] == 0
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["av_sft", "rl"]
    assert Store.open(tmp_path / "parts" / "rl").n_docs == splits["rl"]["docs"]
    assert nla("check", store).exit_code == 0


def test_bad_arguments(store: Path, tmp_path: Path):
    assert "no such directory" in refused("info", tmp_path / "nothing")
    assert "not an activation store" in refused("check", tmp_path)
    for wrong in ("0.5,0.5", "a,b,c", "0.5,0.5,0.5", "nan,0,1"):
        assert "fractions" in refused("split", store, "--fractions", wrong)
    assert "nla data --help" in refused("inf", store)
    assert Store.open(store).splits is None
