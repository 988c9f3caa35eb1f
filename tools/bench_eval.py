"""Activations evaluated per second on this machine, against an equivalent PyTorch program and the hardware.

    tools/bench.py eval [--rounds 3] [--activations 32] [--batch 32] [--cap 96] [--json out.json]

One program on random weights of the released Qwen2.5-7B pair's shape at reduced width (12 of 28 blocks, K at 3/4, the
vocabulary reduced as the width), float32, the released prompt (125 tokens, marker at 111). A step evaluates
`--activations` vectors, `--batch` at a time: the AV samples one explanation of `--cap` tokens for each, the AR reads
it, and fve_nrm is computed on the host. The other side is what a transformers user would write: `generate` from
`inputs_embeds` with its key/value cache, then the truncated model on the whole batch.

Each side runs in a process of its own on the same cores and the two take turns. Before anything is timed the greedy
tokens of both AVs must be equal, and both ARs' vectors and fve_nrm of the same sampled tokens must agree to 1e-4. No
sample stops early and text is passed on as token ids, so that both do the same work. Ratios are torch's time over
ours; "CPU s" are processor seconds of all threads, to look at where others use the machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from nla_jax.models import hf
from nla_jax.models.config import ModelConfig
from nla_jax.models.params import init_params, n_params
from nla_jax.tools.bench import (
    INJECTION_SCALE,
    MARKER,
    PROMPT,
    _machine,
    bandwidth,
    forward_flops,
    hf_config,
    peak_flops,
)
from nla_jax.tools.bench_train import AR_END, AR_START
from nla_jax.tools.bench_worker import Worker, take_turns

OURS, TORCH = "nla_jax.tools.bench_eval_ours", "nla_jax.tools.bench_eval_torch"
PROGRAM = "eval"
VARIANCE = 0.9  # of random directions it is 1; any denominator serves, the same on both sides
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of one step. `check_tokens` of a greedy explanation are compared: of random weights, two logits may lie
    closer together than float32 resolves, after which the two go on differently, rightly so."""

    ar_layers: int
    activations: int = 32
    batch: int = 32
    cap: int = 96
    check_tokens: int = 12
    threads: int = 2
    injection_scale: float = INJECTION_SCALE
    variance: float = VARIANCE

    @property
    def text(self) -> int:
        """Tokens that the AR reads of each explanation."""
        return AR_START + self.cap + AR_END


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step has to do, ours (the prompt's constant part once per batch) and unshared: useful FLOPs, and the
    bytes of weights and cache that decoding cannot avoid to read."""

    activations: int
    flops: float
    unshared_flops: float
    decode_flops: float
    decode_bytes: float

    def limit_s(self, limits: dict[str, float]) -> float:
        """Least seconds at the machine's best rates; decoding by the slower of its two."""
        decode = max(self.decode_flops / limits["peak_flops"], self.decode_bytes / limits["bandwidth"])
        return (self.flops - self.decode_flops) / limits["peak_flops"] + decode


def work(shapes: Shapes, cfg: ModelConfig) -> Work:
    """The accounting of a step."""
    N, R, text = shapes.activations, shapes.cap, shapes.text
    prefix = forward_flops(cfg, MARKER, MARKER / 2)
    tail = N * forward_flops(cfg, PROMPT - MARKER, (PROMPT + MARKER) / 2, head_tokens=1)
    # The first token comes from the prompt's logits.
    decode = forward_flops(cfg, N * (R - 1), PROMPT + R / 2, head_tokens=N * (R - 1))
    reading = N * (forward_flops(cfg.truncated(shapes.ar_layers), text, text / 2) + 2 * cfg.d_model**2)
    batches = -(-N // shapes.batch)
    cache = 8.0 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim
    held = cache * (batches * MARKER + N * (PROMPT - MARKER + R / 2))
    weights = 4.0 * (n_params(cfg) - cfg.vocab_size * cfg.d_model)
    return Work(
        activations=N,
        flops=prefix + tail + decode + reading,
        unshared_flops=N * prefix + tail + decode + reading,
        decode_flops=decode,
        decode_bytes=(R - 1) * (batches * weights + held),
    )


def make_data(shapes: Shapes, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Random prompts and vectors for both sides."""
    rng = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return rng.integers(2, cfg.vocab_size, n).astype(np.int32)

    return {
        "prompt": ids(PROMPT),
        "marker": np.asarray(MARKER, np.int32),
        "ar_start": ids(AR_START),
        "ar_end": ids(AR_END),
        "vectors": (rng.standard_normal((shapes.activations, cfg.d_model)) * 5).astype(np.float32),
    }


@click.command()
@click.option("--rounds", default=3, help="Measured steps per side; the median counts.")
@click.option(
    "--scale", default="8", type=click.Choice(["1", "2", "4", "8"]), help="Divide the released widths by this."
)
@click.option("--blocks", default=12, help="Blocks of the AV; the AR has three quarters of them.")
@click.option("--activations", default=32, help="Vectors of a step.")
@click.option("--batch", default=32, help="Of them together.")
@click.option("--cap", default=96, help="Tokens of each explanation.")
@click.option("--threads", default=2, help="Cores that each side may use.")
@click.option("--torch/--no-torch", "use_torch", default=None, help="Compare with torch (default: if installed).")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def main(
    rounds: int, scale: str, blocks: int, use_torch: bool | None, json_path: Path | None, cap: int, **sizes: int
) -> None:
    """Times evaluation (AV sample, AR read, fve_nrm); prints ratios against torch and the hardware."""
    found = all(importlib.util.find_spec(m) for m in ("torch", "transformers"))
    if use_torch and not found:
        raise click.ClickException("torch and transformers are not installed. Try: pip install '.[parity]'")
    compare = found if use_torch is None else use_torch
    config = {**hf_config(int(scale)), "num_hidden_layers": blocks}
    cfg = ModelConfig.from_hf(config)
    shapes = Shapes(ar_layers=blocks * 3 // 4, cap=cap, check_tokens=min(cap, Shapes.check_tokens), **sizes)
    report: dict[str, Any] = {"command": "tools/bench.py eval", "machine": _machine(), "config": config}
    report |= {"shapes": dataclasses.asdict(shapes), "load_before": os.getloadavg()}
    report["limits"] = {"peak_flops": peak_flops(), "bandwidth": bandwidth()}
    with tempfile.TemporaryDirectory(prefix="nla_bench_") as place:
        folder = Path(place)
        hf.save_model(init_params(cfg, jax.random.key(0)), cfg, config, folder / "model")
        (folder / "shapes.json").write_text(json.dumps(dataclasses.asdict(shapes)))
        np.savez(folder / "data.npz", **make_data(shapes, cfg))  # type: ignore[arg-type]
        row = measure(folder, shapes.threads, rounds, compare)
    report["row"] = {**row, **_rates(row, work(shapes, cfg), report["limits"])}
    report["load_after"] = os.getloadavg()
    console = Console(width=None if Console().is_terminal else 120)
    console.print(_table(report, cfg))
    console.print(_line(report), soft_wrap=True, highlight=False)
    if not compare:
        console.print("torch and transformers are not installed or not wanted: only our side was run")
    if json_path:
        json_path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        console.print(f"wrote {json_path}")


def measure(folder: Path, threads: int, rounds: int, compare: bool) -> dict[str, Any]:
    """Runs both sides: equality, `rounds` steps in turn, peak memory, parts."""
    with contextlib.ExitStack() as stack:
        sides = {"ours": stack.enter_context(Worker(OURS, PROGRAM, folder, threads))}
        if compare:
            sides["torch"] = stack.enter_context(Worker(TORCH, PROGRAM, folder, threads))
        row: dict[str, Any] = {"versions": {k: w.ask("versions") for k, w in sides.items()}}
        sides["ours"].ask("save_samples")
        checks = {side: worker.ask("check") for side, worker in sides.items()}
        row["fve_nrm"] = {side: check["fve_nrm"] for side, check in checks.items()}
        if compare:
            vectors = {side: np.load(check["vectors"]) for side, check in checks.items()}
            row["differences"] = same(checks["ours"], checks["torch"], vectors["ours"], vectors["torch"])
        row |= take_turns(sides, rounds)
        row |= {f"{side}_parts": worker.ask("parts") for side, worker in sides.items()}
    return row


def same(
    ours: dict[str, Any], theirs: dict[str, Any], our_vectors: np.ndarray, their_vectors: np.ndarray
) -> dict[str, float]:
    """How far the two sides are apart; stops the benchmark where they do not compute the same."""
    unlike = int((np.asarray(ours["greedy"]) != np.asarray(theirs["greedy"])).any(axis=1).sum())
    if unlike:
        of = len(ours["greedy"])
        raise click.ClickException(f"greedy tokens differ in {unlike} of {of} explanations; nothing was timed")
    apart = {
        "vectors": float(np.abs(our_vectors - their_vectors).max() / np.abs(their_vectors).max()),
        "fve_nrm": abs(ours["fve_nrm"] - theirs["fve_nrm"]),
    }
    if bad := {name: value for name, value in apart.items() if not value < TOLERANCE}:
        raise click.ClickException(f"the two programs disagree by {bad}; nothing was timed")
    return apart


def _rates(row: dict[str, Any], accounted: Work, limits: dict[str, float]) -> dict[str, Any]:
    out: dict[str, Any] = {"work": dataclasses.asdict(accounted), "limit_s": accounted.limit_s(limits)}
    out["of_limit"] = out["limit_s"] / row["ours_s"]
    out["flops_saved"] = 1 - accounted.flops / accounted.unshared_flops
    for side in ("ours", "torch"):
        if f"{side}_s" in row:
            out[f"{side}_per_s"] = accounted.activations / row[f"{side}_s"]
    return out


def _table(report: dict[str, Any], cfg: ModelConfig) -> Table:
    s, row, limits = report["shapes"], report["row"], report["limits"]
    load = " to ".join(f"{report[k][0]:.1f}" for k in ("load_before", "load_after"))
    table = Table(
        title=f"{', '.join(row['versions'].values())}; {report['machine']}, {s['threads']} used, load {load}\n"
        f"D={cfg.d_model} F={cfg.d_ff} V={cfg.vocab_size} L={cfg.n_layers}, AR of {s['ar_layers']} blocks, float32; "
        f"{s['activations']} activations, {s['batch']} together, explanations of {s['cap']} tokens",
        caption=f"hardware: {limits['peak_flops'] / 1e9:.0f} GFLOP/s, {limits['bandwidth'] / 1e9:.0f} GB/s measured",
    )
    table.add_column("side")
    for column in ("activations/s", "s", "CPU s", "MiB", "ratio", "CPU ratio", "of limit"):
        table.add_column(column, justify="right")
    for side, label in (("ours", "nla_jax"), ("torch", "torch")):
        if f"{side}_s" not in row:
            continue
        first = side == "ours"
        table.add_row(
            label,
            f"{row[f'{side}_per_s']:.2f}",
            f"{row[f'{side}_s']:.2f}",
            f"{row[f'{side}_cpu_s']:.2f}",
            f"{row[f'{side}_memory'] / 2**20:.0f}",
            *(f"{row[r]:.2f}x" if first and r in row else "" for r in ("ratio", "cpu_ratio")),
            f"{row['of_limit']:.0%}" if first else "",
        )
    return table


def _line(report: dict[str, Any]) -> str:
    """What was compared before, what sharing saves, and where the time goes."""
    row = report["row"]
    line = f"sharing the prompt's constant part saves {row['flops_saved']:.0%} of the FLOPs"
    if "differences" in row:
        apart = ", ".join(f"{k} {v:.0e}" for k, v in row["differences"].items())
        line = f"checked before: {report['shapes']['check_tokens']} greedy tokens equal, {apart} apart; {line}"
    for side, label in (("ours", "nla_jax"), ("torch", "torch")):
        parts = row.get(f"{side}_parts", {})
        total = sum(parts.values())
        if total:
            line += f"; {label} " + ", ".join(f"{k} {v:.2f} CPU s ({v / total:.0%})" for k, v in parts.items())
    return line


if __name__ == "__main__":
    main()
