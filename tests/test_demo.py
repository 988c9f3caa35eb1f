"""`nla demo`, whole: from nothing to an NLA and its page, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nla_jax.errors import InputError
from nla_jax.tools import demo


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nla_jax.tools.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_a_directory_with_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    done = run("demo", "--out", str(tmp_path))
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "holds no demo" in done.stderr and [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_another_seed_needs_another_directory(tmp_path: Path):
    out = tmp_path / "demo"
    demo._claim(out, {"seed": 0})
    demo._claim(out, {"seed": 0})
    with pytest.raises(InputError, match="other settings"):
        demo._claim(out, {"seed": 1})


@pytest.mark.slow
@pytest.mark.usefixtures("usual_compilation")
def test_quick_demo(tmp_path: Path):
    """Short training already lifts FVE far above the controls, and the same command again changes nothing."""
    out = tmp_path / "demo"
    done = run("demo", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((out / "results.json").read_text())
    before, after = results["before"]["fve_nrm"]["value"], results["after"]["fve_nrm"]["value"]
    assert after > before + 0.1 and after > 0.3
    assert abs(results["after"]["shuffled_calibrated"]) < 0.02
    pages = (out / "index.html").read_bytes()
    again = run("demo", "--quick", "--out", str(out))
    assert again.returncode == 0 and (out / "index.html").read_bytes() == pages
    explained = run(
        *("explain", "Anna lived in forests. Rain poured. Anna felt sad.", "--positions=-1"),
        *("--target", str(out / "lm/export/target"), "--av", str(out / "rl/export/av")),
        *("--ar", str(out / "rl/export/ar"), "--max-new-tokens", "32", "--html", str(tmp_path / "page.html")),
    )
    assert explained.returncode == 0, explained.stderr
