"""The data benchmark runs, measures what it says it measures, and reports it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from nla_jax.tools import bench_data, bench_data_reads
from nla_jax.tools.bench import hf_config


def run(tmp_path, *arguments):
    target = tmp_path / "report.json"
    result = CliRunner().invoke(bench_data.main, ["--quick", "--no-torch", "--json", str(target), *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(target.read_text()), result.output


def test_reads_memory_and_sizes(tmp_path):
    report, output = run(tmp_path, "--only", "read,memory,size", "--folder", str(tmp_path))
    names = {r["name"] for r in report["read"]}
    assert {"loader", "store.vectors", "parquet, dataset.take"} <= names and len(names) == 6
    assert all(r["rows_per_s"] > 0 and len(r["seconds"]) == 1 for r in report["read"])
    assert [(m["rows"], m["read"]) for m in report["memory"]] == [(1000, 1000), (2000, 2000)]
    assert all(0 < m["start"] <= m["peak"] for m in report["memory"])
    sizes = {s["name"]: s["bytes_per_row"] for s in report["size"]}
    assert sizes["vectors alone, raw float32"] == 1024
    assert 1024 < sizes["store, vectors"] < sizes["store, everything"] < 1400
    assert "rows/s" in output and "bytes per row" in output
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]  # nothing is left behind


def test_extraction_without_torch(tmp_path, monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = {**hf_config(8), **small, "head_dim": 16, "vocab_size": 8192}
    monkeypatch.setattr(bench_data, "hf_config", lambda scale: config)
    report, output = run(tmp_path, "--only", "extract")
    e = report["extract"]
    assert e["documents"] == 4 and e["rows"] == 40 and 4 * 50 < e["tokens"] <= 4 * 96
    assert e["tokens_per_s"] == pytest.approx(e["tokens"] / e["ours_s"][0]) and "ratio" not in e
    assert "nla_jax extract" in output


def test_every_way_reads_the_same_rows(tmp_path):
    """Against the vectors that the store was made of."""
    store = bench_data_reads.random_store(tmp_path / "store", 2500, 24)
    made = [np.random.default_rng(i).standard_normal((n, 24), np.float32) for i, n in enumerate((1024, 1024, 452))]
    rows = np.sort(np.random.default_rng(1).choice(2500, 300, replace=False))
    paths = bench_data_reads.export(store, Path(tmp_path))
    for name, read in {"store": store.vectors, **bench_data_reads.readers(paths, 24)}.items():
        np.testing.assert_array_equal(read(rows), np.concatenate(made)[rows], err_msg=name)
