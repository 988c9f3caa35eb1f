"""The planning results that README quotes: what is run for them, and that the tables are those of the data."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nla_jax.tools import plan_survey as survey
from nla_jax.train.plan_slices import parse_slice

README = Path(__file__).resolve().parent.parent / "README.md"
RESULTS = survey.read()


def test_every_pair_is_asked_for_on_every_chip_with_and_without_lora():
    named = [name for name in survey.commands() if "scaling" not in name]
    assert len(named) == 4 * 2 * 3
    chips = [parse_slice(f"v5p:{shape}").chips for shape in survey.SCALING]
    assert chips == [8, 16, 32, 64, 128, 256]
    # Every chip has as many activations, whatever the slice.
    rows = [int(c[-2].rpartition("=")[2]) for n, c in survey.commands().items() if "scaling" in n]
    assert [n / size for n, size in zip(rows, chips, strict=True)] == [4.0] * 6


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_that_of_its_command(name):
    found = RESULTS[name]
    assert found["command"] == shlex.join(["nla", "plan", *survey.commands()[name]])
    assert math.prod(found["mesh"].values()) <= found["chips"]
    assert found["fits"] == (found["needs"] <= found["hbm"])
    assert any(line.startswith("libtpu ") for line in found["versions"])


def test_the_readme_has_the_tables_of_the_data():
    text = README.read_text(encoding="utf-8")
    for line in [*survey.pairs_table(RESULTS), *survey.scaling_table(RESULTS)]:
        assert line in text, line


def test_what_a_chip_sends_does_not_grow_with_the_copies():
    """From two copies on: one has no other to add its gradients to."""
    sent = {}
    for shape in survey.SCALING:
        found = RESULTS[f"weak scaling v5p:{shape}"]
        sent[found["chips"]] = {name: sum(kinds.values()) for name, kinds in found["sent"].items()}
    for name in sent[16]:
        assert sent[256][name] <= 1.1 * sent[16][name], name


def test_results_are_made_small():
    program = {
        "name": "AV update",
        "once": False,
        "total": 3.0,
        "bound": "compute",
        "sent": {"all-gather": 2.0, "x": 0.0},
    }
    once = {**program, "name": "KL reference", "once": True, "total": 4.0}
    stage = {name: 1 for name in ("slice", "chips", "mesh", "fits", "flags", "hbm", "residents")}
    stage |= {"programs": [program, once], "step_samples": 8, "step_seconds": 0.5}
    found = survey.compact({"versions": ["libtpu 1"], "stages": [stage]}, ["--slice", "v5e"])
    assert (found["worst"], found["needs"]) == ("KL reference", 4.0)
    assert found["sent"] == {"AV update": {"all-gather": 2.0}} and found["bounds"] == {"AV update": "compute"}
    assert found["command"] == "nla plan --slice v5e"


@pytest.mark.slow
def test_a_result_is_found_again(tmp_path):
    """Compiled anew: memory and bytes to a hundredth."""
    pytest.importorskip("libtpu", reason="needs jax[tpu]")
    name = "qwen2_5_7b_l20 LoRA v5p"
    kept, out = RESULTS[name], tmp_path / "plan.json"
    call = [sys.executable, "-m", "nla_jax.tools.cli", "plan", *survey.commands()[name], "--no-cache", "--json", out]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = survey.compact(json.loads(out.read_text()), survey.commands()[name])
    assert (found["slice"], found["mesh"], found["flags"]) == (kept["slice"], kept["mesh"], kept["flags"])
    assert found["needs"] == pytest.approx(kept["needs"], rel=0.01)
    assert found["step_seconds"] == pytest.approx(kept["step_seconds"], rel=0.01)
