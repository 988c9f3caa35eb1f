"""The training benchmark's accounting against counts made by hand, its inputs, and one run of our side of each step."""

from __future__ import annotations

import json
import mmap

import numpy as np
import pytest
from click.testing import CliRunner

from nla_jax.models.config import ModelConfig
from nla_jax.tools import bench, bench_train, bench_worker
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
LIMITS = {"peak_flops": 1e9, "bandwidth": 1e9}


@pytest.fixture
def cfg():
    return ModelConfig.from_hf(TINY)


def test_tokens_and_savings_of_the_av(cfg):
    shapes = bench_train.Shapes(ar_layers=3, batch=8)
    data = bench_train.make_data(shapes, cfg)
    work = bench_train.work("av", shapes, cfg, data)
    responses = int(data["response_lengths"].sum())
    assert work.samples == 8 and work.tokens == work.unshared_tokens == 8 * 125 + responses
    assert work.forward_tokens == 111 + 8 * 14 + responses  # the 111 tokens before the marker once, not 8 times
    assert work.tokens_saved == pytest.approx(7 * 111 / work.tokens)
    assert 0 < work.flops < work.unshared_flops < work.torch_flops
    assert work.torch_flops - work.unshared_flops == pytest.approx(3 * 2 * 8 * 125 * 16 * 64)  # logits of the prompts


def test_flops_of_the_ar_by_hand(cfg):
    shapes = bench_train.Shapes(ar_layers=3, batch=2)
    data = {**bench_train.make_data(shapes, cfg), "ar_lengths": np.asarray([10, 20])}
    work = bench_train.work("ar", shapes, cfg, data)
    q = o = 16 * 16
    block = q + o + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16 + (16 + 8 + 8)  # matrices, norms, biases
    by_hand = sum(3 * 3 * (2 * block * n + 4 * 16 * n * n / 2) for n in (10, 20))
    assert work.flops == work.torch_flops == pytest.approx(by_hand)
    assert work.tokens == 30 and work.tokens_saved == 0
    parameters = 3 * block + 64 * 16 + 16 * 16
    assert work.limit_s(LIMITS) == pytest.approx((by_hand + 28 * parameters) / 1e9)


def test_tokens_of_the_rl_step(cfg):
    shapes = bench_train.Shapes(ar_layers=3, activations=4, samples=8, cap=96)
    work = bench_train.work("rl", shapes, cfg, bench_train.make_data(shapes, cfg))
    assert work.samples == 32 and work.tokens == 32 * (125 + 96)
    # Rollout: prefix, one tail per vector, each sample's own; then reference and policy without the prefix but once.
    assert work.forward_tokens == (111 + 4 * 14 + 32 * 95) + 32 * (14 + 96) + (111 + 32 * (14 + 96))
    assert work.unshared_tokens == 32 * (125 + 95) + 2 * 32 * (125 + 96)
    assert work.unshared_flops > work.flops > work.decode_flops > 0
    slow_memory = {**LIMITS, "bandwidth": 1.0}
    assert work.limit_s(slow_memory) > work.decode_bytes + work.optimizer_bytes


def test_inputs(cfg):
    shapes = bench_train.Shapes(ar_layers=3, batch=5, activations=3)
    data = bench_train.make_data(shapes, cfg)
    assert data["prompt"].shape == (125,) and data["marker"] == 111
    assert data["responses"].shape == (5, 146) and data["response_lengths"].max() == 146
    assert 14 + 146 <= shapes.av_width and data["ar_lengths"].max() == 126 <= shapes.ar_width
    assert data["response_lengths"].min() >= 120 and data["rl_vectors"].shape == (3, 16)
    assert shapes.rl_ar_width == 128  # 15 + 96 + 6, to a multiple of 16


def test_programs_that_differ_are_not_timed():
    ours, theirs = [{"loss": 2.0, "grad_norm": 1.0}], [{"loss": 2.0001, "grad_norm": 1.0005}]
    assert bench_train._same("av", ours, theirs)["loss"] == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(bench_train.click.ClickException, match=r"disagree.*loss"):
        bench_train._same("av", ours, [{"loss": 2.001, "grad_norm": 1.0}])
    with pytest.raises(bench_train.click.ClickException, match="grad_norm"):
        bench_train._same("av", ours, [{"loss": 2.0, "grad_norm": 1.01}])


def test_peak_memory_of_this_process():
    if not bench_worker.reset_peak():
        pytest.skip("this system has no resettable peak")
    before = bench_worker.memory()
    # Pages of its own: an array may get what this process once held and kept.
    held = np.frombuffer(mmap.mmap(-1, 64 << 20), np.uint8)
    held[:] = 1
    assert bench_worker.memory()["peak"] - before["now"] > 0.9 * held.nbytes


def test_our_side_of_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_train, "hf_config", lambda scale: TINY)
    monkeypatch.setattr(bench_train, "peak_flops", lambda: 1e11)
    monkeypatch.setattr(bench_train, "bandwidth", lambda: 1e10)
    target = tmp_path / "report.json"
    sizes = "--blocks 4 --batch 2 --activations 2 --samples 2 --cap 6 --rounds 2".split()
    result = CliRunner().invoke(bench_train.main, [*sizes, "--no-torch", "--no-parts", "--json", str(target)])
    assert result.exit_code == 0, result.output
    report = json.loads(target.read_text())
    assert [row["name"] for row in report["rows"]] == ["av", "ar", "rl"]
    for row in report["rows"]:
        assert len(row["ours_all"]) == 2 and row["ours_s"] > 0 and row["ours_memory"] > 0 and "ratio" not in row
        assert row["ours_samples_per_s"] == pytest.approx(row["work"]["samples"] / row["ours_s"])
        first, second = row["check"]["ours"]
        assert np.isfinite(list(first.values())).all() and second["loss"] != first["loss"]
    av = report["rows"][0]["check"]["ours"]
    assert abs(av[0]["loss"] - np.log(64)) < 1.5  # random weights know nothing
    assert "AV SFT: sharing the prefix saves" in result.output and "torch and transformers are not" in result.output


@pytest.mark.parametrize("program", ["train", "infer", "data"])
def test_an_unknown_program_is_refused(program):
    result = CliRunner().invoke(bench.main, [program, "--only", "av,xyz"])
    assert result.exit_code == 2 and "av,xyz: expected some of " in result.output
