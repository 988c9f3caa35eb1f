"""The evaluation benchmark's accounting against counts made by hand, its check, and one run of our side."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from nla_jax.models.config import ModelConfig
from nla_jax.tools import bench, bench_eval
from nla_jax.tools.bench import hf_config

TINY = {
    **hf_config(8),
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
BLOCK = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16 + (16 + 8 + 8)  # matrices, norms, biases


@pytest.fixture
def cfg():
    return ModelConfig.from_hf(TINY)


def test_the_work_of_a_step_by_hand(cfg):
    shapes = bench_eval.Shapes(ar_layers=3, activations=6, batch=4, cap=10)
    work = bench_eval.work(shapes, cfg)

    def flops(blocks, tokens, context, heads=0):
        return blocks * tokens * (2 * BLOCK + 4 * 16 * context) + 2 * heads * 16 * 64

    prefix = flops(4, 111, 111 / 2)
    tail = 6 * flops(4, 14, (125 + 111) / 2, heads=1)
    decode = flops(4, 6 * 9, 125 + 5, heads=6 * 9)
    text = 15 + 10 + 6
    reading = 6 * (flops(3, text, text / 2) + 2 * 16 * 16)
    assert work.decode_flops == pytest.approx(decode)
    assert work.flops == pytest.approx(prefix + tail + decode + reading)
    assert work.unshared_flops - work.flops == pytest.approx(5 * prefix)
    weights = 4 * (4 * BLOCK + 16 + 16 * 64)  # what decoding reads each token: all but the embedding
    cache = 8 * 4 * 8 * (2 * 111 + 6 * (14 + 5))  # two batches share a prefix each
    assert work.decode_bytes == pytest.approx(9 * (2 * weights + cache))
    assert work.limit_s({"peak_flops": 1e9, "bandwidth": 1.0}) > work.decode_bytes


def test_inputs(cfg):
    data = bench_eval.make_data(bench_eval.Shapes(ar_layers=3, activations=5), cfg)
    assert data["prompt"].shape == (125,) and data["marker"] == 111 and data["vectors"].shape == (5, 16)
    assert len(data["ar_start"]) == 15 and len(data["ar_end"]) == 6


def test_sides_that_differ_are_not_timed():
    ours = {"greedy": [[1, 2], [3, 4]], "fve_nrm": -0.5}
    vectors = np.random.default_rng(0).normal(size=(2, 8))
    apart = bench_eval.same(ours, {**ours, "fve_nrm": -0.50001}, vectors, vectors * (1 + 1e-5))
    assert apart["fve_nrm"] == pytest.approx(1e-5) and 0 < apart["vectors"] < 2e-5
    with pytest.raises(bench_eval.click.ClickException, match="greedy tokens differ in 1 of 2"):
        bench_eval.same(ours, {**ours, "greedy": [[1, 2], [3, 5]]}, vectors, vectors)
    with pytest.raises(bench_eval.click.ClickException, match=r"disagree.*vectors"):
        bench_eval.same(ours, ours, vectors, vectors * 1.001)
    with pytest.raises(bench_eval.click.ClickException, match=r"disagree.*fve_nrm"):
        bench_eval.same(ours, {**ours, "fve_nrm": -0.501}, vectors, vectors)
    with pytest.raises(bench_eval.click.ClickException, match="disagree"):
        bench_eval.same(ours, ours, vectors * np.nan, vectors)


def test_our_side(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_eval, "hf_config", lambda scale: TINY)
    monkeypatch.setattr(bench_eval, "peak_flops", lambda: 1e11)
    monkeypatch.setattr(bench_eval, "bandwidth", lambda: 1e10)
    target = tmp_path / "report.json"
    sizes = "--blocks 4 --activations 3 --batch 2 --cap 6 --rounds 2".split()
    result = CliRunner().invoke(bench.main, ["eval", *sizes, "--no-torch", "--json", str(target)])
    assert result.exit_code == 0, result.output
    report = json.loads(target.read_text())
    row = report["row"]
    assert len(row["ours_all"]) == 2 and row["ours_s"] > 0 and "ratio" not in row and "torch_s" not in row
    assert row["ours_per_s"] == pytest.approx(3 / row["ours_s"]) and set(row["ours_parts"]) == {"AV", "AR", "fve"}
    assert -3.5 < row["fve_nrm"]["ours"] < 1 and 0 < row["flops_saved"] < 1
    assert "torch and transformers are not" in result.output and "activations/s" in result.output


@pytest.mark.parity
def test_both_sides_agree_before_they_are_timed(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(bench_eval, "hf_config", lambda scale: TINY)
    monkeypatch.setattr(bench_eval, "peak_flops", lambda: 1e11)
    monkeypatch.setattr(bench_eval, "bandwidth", lambda: 1e10)
    target = tmp_path / "report.json"
    sizes = "--blocks 4 --activations 3 --batch 2 --cap 6 --rounds 2".split()
    result = CliRunner().invoke(bench_eval.main, [*sizes, "--torch", "--json", str(target)])
    assert result.exit_code == 0, result.output
    row = json.loads(target.read_text())["row"]
    assert row["ratio"] > 0 and row["cpu_ratio"] > 0 and max(row["differences"].values()) < 1e-4
    assert "checked before: 6 greedy tokens equal" in result.output
