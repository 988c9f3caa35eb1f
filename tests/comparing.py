"""Two runs that should be the same but for rounding: their metrics and what they export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from training import lines


def close(got: Path, expected: Path) -> None:
    """metrics.jsonl of two runs: the same numbers to 1e-4, counts the same."""
    a, b = lines(got), lines(expected)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for x, y in zip(a[1:], b[1:], strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-5), (name, x["step"])


def same_files(got: Path, expected: Path) -> None:
    """Exports: the same files, weights to 1e-4 of their norm. (Not each: where a gradient is rounding alone, so is the
    sign of Adam's step.)"""
    names = sorted(p.relative_to(expected) for p in expected.rglob("*") if p.is_file())
    assert sorted(p.relative_to(got) for p in got.rglob("*") if p.is_file()) == names
    for name in names:
        if name.suffix == ".safetensors":
            a, b = load_file(got / name), load_file(expected / name)
            assert a.keys() == b.keys() and a
            for key in a:
                assert np.linalg.norm(a[key] - b[key]) < 1e-4 * np.linalg.norm(b[key]), key
        elif name.name != "nla_meta.yaml":
            assert (got / name).read_bytes() == (expected / name).read_bytes(), name
