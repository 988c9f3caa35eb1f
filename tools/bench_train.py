"""Time and memory of training steps on this machine, against an equivalent PyTorch program and the hardware.

    tools/bench.py train [--only av,whole,ar,rl] [--rounds 3] [--json out.json]

Three programs on random weights of the released Qwen2.5-7B pair's shape at reduced width (12 of 28 blocks, K at 3/4,
the vocabulary reduced as the width), float32, AdamW, the released prompt (125 tokens, marker at 111):

* av: one supervised step of the AV, responses of 120 to 146 tokens;
* whole: the same with the whole prompt in every row, to see what is gained without sharing it;
* ar: one supervised step of the AR, prompts of 101 to 126 tokens;
* rl: one joint step: a rollout of `--samples` explanations of `--cap` tokens for each of `--activations` vectors,
  rewards, reference log-probabilities, an update of the AV and one of the AR. Text is passed on as token ids on both
  sides, and no sample stops early, so that both do the same work.

Each side runs in a process of its own on the same cores and the two take turns, after two steps from the same weights
whose losses and gradient norms must agree (for rl: on the same samples). Ratios are torch's time over ours. Tokens
per second count prompt and response of every sample on both sides, whether or not a program shares the prompt. Memory
is the peak while stepping, compilation left out, above what was resident once the weights were loaded: gradients,
optimizer moments and activations. Processor seconds (of all threads, "CPU s") are what to look at where others use the
machine; the parts of a step are given in them. Both sides inherit the environment: with
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 neither spends its time on page faults.
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
from nla_jax.tools.bench_worker import Worker, take_turns
from nla_jax.tools.options import some_of

OURS, TORCH = "nla_jax.tools.bench_train_ours", "nla_jax.tools.bench_train_torch"
# Tokens of the AR's template before and after the explanation, in the released Qwen pair.
AR_START, AR_END = 15, 6
RESPONSES, AR_TEXTS = (120, 146), (101, 126)
LR = 1e-5
NAMES = {"av": "AV SFT", "whole": "AV SFT, unshared", "ar": "AR SFT", "rl": "joint RL"}


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of one run. `av_width`, `ar_width`, `rl_ar_width`: what our batches are padded to, as the loader does."""

    ar_layers: int
    batch: int = 8
    activations: int = 4
    samples: int = 8
    cap: int = 96
    threads: int = 2
    av_width: int = 160
    ar_width: int = 128
    logit_chunk: int = 4096  # all of a step at once, as torch has them
    accumulate: int = 1  # our micro-batches
    lr: float = LR
    injection_scale: float = INJECTION_SCALE

    @property
    def rollouts(self) -> int:
        return self.activations * self.samples

    @property
    def rl_ar_width(self) -> int:
        return -(-(AR_START + self.cap + AR_END) // 16) * 16


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step has to do: `samples`; `tokens` of prompts and responses; tokens that go through blocks, forward,
    ours and without the shared prefix; FLOPs, useful ones only: ours, unshared, and torch's; seconds' worth of bytes
    that the optimizer and decoding cannot avoid to move."""

    samples: int
    tokens: int
    forward_tokens: int
    unshared_tokens: int
    flops: float
    unshared_flops: float
    torch_flops: float
    optimizer_bytes: float
    decode_bytes: float = 0.0
    decode_flops: float = 0.0

    @property
    def tokens_saved(self) -> float:
        return 1 - self.forward_tokens / self.unshared_tokens

    @property
    def flops_saved(self) -> float:
        return 1 - self.flops / self.unshared_flops

    def limit_s(self, limits: dict[str, float]) -> float:
        """Least seconds at the machine's best rates: products, then what must be moved; decoding by the slower."""
        peak, rate = limits["peak_flops"], limits["bandwidth"]
        decode = max(self.decode_flops / peak, self.decode_bytes / rate)
        return (self.flops - self.decode_flops) / peak + decode + self.optimizer_bytes / rate


def make_data(shapes: Shapes, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """Random token ids and vectors for all three programs."""
    rng = np.random.default_rng(0)

    def ids(*shape: int) -> np.ndarray:
        return rng.integers(2, cfg.vocab_size, shape).astype(np.int32)

    def lengths(bounds: tuple[int, int]) -> np.ndarray:
        drawn = rng.integers(bounds[0], bounds[1] + 1, shapes.batch)
        drawn[0] = bounds[1]
        return drawn.astype(np.int32)

    def vectors(n: int) -> np.ndarray:
        return (rng.standard_normal((n, cfg.d_model)) * 5).astype(np.float32)

    return {
        "prompt": ids(PROMPT),
        "marker": np.asarray(MARKER, np.int32),
        "responses": ids(shapes.batch, RESPONSES[1]),
        "response_lengths": lengths(RESPONSES),
        "vectors": vectors(shapes.batch),
        "ar_tokens": ids(shapes.batch, AR_TEXTS[1]),
        "ar_lengths": lengths(AR_TEXTS),
        "ar_vectors": vectors(shapes.batch),
        "ar_start": ids(AR_START),
        "ar_end": ids(AR_END),
        "rl_vectors": vectors(shapes.activations),
    }


def work(name: str, shapes: Shapes, cfg: ModelConfig, data: dict[str, np.ndarray]) -> Work:
    """The accounting of program `name`; a backward pass counts twice its forward pass."""
    trunk = cfg.truncated(shapes.ar_layers)
    av_size, ar_size = n_params(cfg), n_params(trunk, head=False) + cfg.d_model**2
    moved = 4 * 7.0  # bytes per parameter: parameter, gradient and two moments read, three of them written
    if name == "ar":
        lengths = data["ar_lengths"]
        total = int(lengths.sum())
        flops = 3 * sum(forward_flops(trunk, int(n), n / 2) for n in lengths)
        return Work(len(lengths), total, total, total, flops, flops, flops, moved * ar_size)
    own = PROMPT - MARKER
    prefix = forward_flops(cfg, MARKER, MARKER / 2)
    if name in ("av", "whole"):
        B, responses = shapes.batch, int(data["response_lengths"].sum())
        mean = responses / B
        rest = forward_flops(cfg, B * own + responses, (PROMPT + mean + MARKER) / 2, head_tokens=responses)
        unshared = rest + B * prefix
        all_logits = forward_flops(cfg, 0, 0, head_tokens=B * PROMPT)
        shared = name == "av"
        return Work(
            samples=B,
            tokens=B * PROMPT + responses,
            forward_tokens=MARKER * (1 if shared else B) + B * own + responses,
            unshared_tokens=B * PROMPT + responses,
            flops=3 * (prefix + rest) if shared else 3 * unshared,
            unshared_flops=3 * unshared,
            torch_flops=3 * (unshared + all_logits),
            optimizer_bytes=moved * av_size,
        )
    N, S, R = shapes.activations, shapes.rollouts, shapes.cap
    after = (PROMPT + R + MARKER) / 2  # keys that a token after the marker sees, on average
    rest = forward_flops(cfg, S * (own + R), after, head_tokens=S * R)
    text = AR_START + R + AR_END
    reading = forward_flops(trunk, S * text, text / 2)
    decode = forward_flops(cfg, S * (R - 1), PROMPT + R / 2, head_tokens=S * (R - 1))
    tail = forward_flops(cfg, own, (PROMPT + MARKER) / 2, head_tokens=1)
    # The policy's prefix is computed for the rollout, and again with gradients; the frozen reference's once per run.
    flops = prefix + N * tail + decode + rest + 3 * (prefix + rest) + 3 * reading  # the reward is of the update's pass
    unshared = S * (prefix + tail) + decode + 4 * (S * prefix + rest) + 4 * reading
    cache = 8.0 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * (MARKER + S * (own + R / 2))
    return Work(
        samples=S,
        tokens=S * (PROMPT + R),
        forward_tokens=2 * MARKER + N * own + S * (R - 1) + 2 * S * (own + R),
        unshared_tokens=S * (PROMPT + R - 1) + 2 * S * (PROMPT + R),
        flops=flops,
        unshared_flops=unshared,
        torch_flops=unshared,
        optimizer_bytes=moved * (av_size + ar_size),
        decode_flops=decode,
        decode_bytes=(R - 1) * (4.0 * (av_size - cfg.vocab_size * cfg.d_model) + cache),
    )


@click.command()
@click.option("--only", default="av,ar,rl", callback=some_of(*NAMES), help="Which programs to run.")
@click.option("--rounds", default=3, help="Measured steps per program; the median counts.")
@click.option(
    "--scale", default="8", type=click.Choice(["1", "2", "4", "8"]), help="Divide the released widths by this."
)
@click.option("--blocks", default=12, help="Blocks of the AV; the AR has three quarters of them.")
@click.option("--batch", default=8, help="Samples of a supervised step.")
@click.option("--activations", default=4, help="Vectors of an RL step.")
@click.option("--samples", default=8, help="Explanations of each of them.")
@click.option("--cap", default=96, help="Tokens of each explanation in RL.")
@click.option("--accumulate", default=1, help="Our micro-batches.")
@click.option("--threads", default=2, help="Cores that each side may use.")
@click.option("--parts/--no-parts", default=True, help="Also time the parts of each step.")
@click.option("--torch/--no-torch", "use_torch", default=None, help="Compare with torch (default: if installed).")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def main(
    only: list[str],
    rounds: int,
    scale: str,
    blocks: int,
    parts: bool,
    use_torch: bool | None,
    json_path: Path | None,
    **sizes: int,
) -> None:
    """Times supervised and joint-RL training steps; prints ratios against torch and the hardware."""
    found = all(importlib.util.find_spec(m) for m in ("torch", "transformers"))
    if use_torch and not found:
        raise click.ClickException("torch and transformers are not installed. Try: pip install '.[parity]'")
    compare = found if use_torch is None else use_torch
    config = {**hf_config(int(scale)), "num_hidden_layers": blocks}
    cfg = ModelConfig.from_hf(config)
    shapes = Shapes(ar_layers=blocks * 3 // 4, **sizes)
    data = make_data(shapes, cfg)
    report: dict[str, Any] = {"command": "tools/bench.py train", "machine": _machine(), "config": config}
    report |= {"shapes": dataclasses.asdict(shapes), "load_before": os.getloadavg(), "rows": []}
    report["limits"] = {"peak_flops": peak_flops(), "bandwidth": bandwidth()}
    with tempfile.TemporaryDirectory(prefix="nla_bench_") as place:
        folder = Path(place)
        _write(folder, shapes, cfg, config, data)
        for name in only:
            accounted = work(name, shapes, cfg, data)
            row = measure(name, folder, shapes.threads, rounds, compare, parts)
            report["rows"].append({**row, **_rates(row, accounted, report["limits"])})
    report["limits"]["peak_flops_after"] = peak_flops()
    report["load_after"] = os.getloadavg()
    console = Console(width=None if Console().is_terminal else 120)
    console.print(_table(report, cfg))
    for row in report["rows"]:
        console.print(_limit_line(row), soft_wrap=True, highlight=False)
    if not compare:
        console.print("torch and transformers are not installed or not wanted: only our side was run")
    if json_path:
        json_path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        console.print(f"wrote {json_path}")


def _write(folder: Path, shapes: Shapes, cfg: ModelConfig, config: dict[str, Any], data: dict[str, np.ndarray]) -> None:
    """The inputs of both sides: weights, a reference that differs from the policy, shapes and arrays."""
    params = init_params(cfg, jax.random.key(0))
    hf.save_model(params, cfg, config, folder / "model")
    other = jax.tree.map(lambda a, b: 0.95 * a + 0.05 * b, params, init_params(cfg, jax.random.key(1)))
    hf.save_model(other, cfg, config, folder / "reference")
    fields = {**dataclasses.asdict(shapes), "rl_ar_width": shapes.rl_ar_width}
    (folder / "shapes.json").write_text(json.dumps(fields))
    np.savez(folder / "data.npz", **data)  # type: ignore[arg-type]


def measure(name: str, folder: Path, threads: int, rounds: int, compare: bool, parts: bool) -> dict[str, Any]:
    """Runs both sides of one program: equality, `rounds` steps in turn, peak memory, parts."""
    with contextlib.ExitStack() as stack:
        sides = {"ours": stack.enter_context(Worker(OURS, name, folder, threads))}
        if compare:
            sides["torch"] = stack.enter_context(Worker(TORCH, name, folder, threads))
        row: dict[str, Any] = {"name": name, "versions": {k: w.ask("versions") for k, w in sides.items()}}
        if name == "rl":
            sides["ours"].ask("save_samples")
        row["check"] = {side: worker.ask("check") for side, worker in sides.items()}
        if compare:
            row["differences"] = _same(name, row["check"]["ours"], row["check"]["torch"])
        row |= take_turns(sides, rounds)
        if parts:
            row |= {f"{side}_parts": worker.ask("parts") for side, worker in sides.items()}
    return row


def _same(name: str, ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    """The largest relative difference of each number over both steps; stops the benchmark where the two programs do
    not compute the same: losses to 1e-4, gradient norms (sums over millions of squares) to 1e-3. The policy loss is
    what is left of advantages of size 1 that cancel, so it is held to 1e-5 where it is less than 0.1."""
    floors = {"loss": 0.1 if name == "rl" else 1e-2}
    worst = {
        k: max(abs(a[k] - b[k]) / max(abs(b[k]), floors.get(k, 1e-2)) for a, b in zip(ours, theirs, strict=True))
        for k in ours[0]
    }
    bad = {k: v for k, v in worst.items() if not v < (1e-3 if k.endswith("grad_norm") else 1e-4)}
    if bad:
        raise click.ClickException(f"{name}: the two programs disagree by {bad} ({ours}, {theirs}); nothing was timed")
    return worst


def _rates(row: dict[str, Any], accounted: Work, limits: dict[str, float]) -> dict[str, Any]:
    out: dict[str, Any] = {"work": dataclasses.asdict(accounted), "limit_s": accounted.limit_s(limits)}
    out |= {"tokens_saved": accounted.tokens_saved, "flops_saved": accounted.flops_saved}
    out["of_limit"] = out["limit_s"] / row["ours_s"]
    for side, flops in (("ours", accounted.flops), ("torch", accounted.torch_flops)):
        if f"{side}_s" in row:
            seconds = row[f"{side}_s"]
            out[f"{side}_flops_per_s"] = flops / seconds
            out[f"{side}_tokens_per_s"] = accounted.tokens / seconds
            out[f"{side}_samples_per_s"] = accounted.samples / seconds
    return out


def _table(report: dict[str, Any], cfg: ModelConfig) -> Table:
    s, limits = report["shapes"], report["limits"]
    versions = ", ".join(report["rows"][0]["versions"].values()) if report["rows"] else ""
    load = " to ".join(f"{report[k][0]:.1f}" for k in ("load_before", "load_after"))
    table = Table(
        title=f"{versions}; {report['machine']}, {s['threads']} used, load {load}\n"
        f"D={cfg.d_model} F={cfg.d_ff} V={cfg.vocab_size} L={cfg.n_layers}, AR of {s['ar_layers']} blocks, float32; "
        f"SFT {s['batch']} samples, RL {s['activations']} x {s['samples']} of {s['cap']} tokens",
        caption=f"hardware: {limits['peak_flops'] / 1e9:.0f} GFLOP/s at the start, "
        f"{limits['peak_flops_after'] / 1e9:.0f} at the end, {limits['bandwidth'] / 1e9:.0f} GB/s measured",
    )
    for column in ("step", "side"):
        table.add_column(column)
    for column in ("s", "CPU s", "samples/s", "tokens/s", "MiB", "GFLOP/s", "ratio", "CPU ratio", "of limit"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        for side, label in (("ours", "nla_jax"), ("torch", "torch")):
            if f"{side}_s" not in row:
                continue
            first = side == "ours"
            table.add_row(
                NAMES[row["name"]] if first else "",
                label,
                f"{row[f'{side}_s']:.2f}",
                f"{row[f'{side}_cpu_s']:.2f}",
                f"{row[f'{side}_samples_per_s']:.2f}",
                f"{row[f'{side}_tokens_per_s']:.0f}",
                f"{row[f'{side}_memory'] / 2**20:.0f}",
                f"{row[f'{side}_flops_per_s'] / 1e9:.0f}",
                *(f"{row[r]:.2f}x" if first and r in row else "" for r in ("ratio", "cpu_ratio")),
                f"{row['of_limit']:.0%}" if first else "",
                end_section=not first,
            )
    return table


def _limit_line(row: dict[str, Any]) -> str:
    """One line: what sharing the prefix saves, and where the time goes."""
    saved = f"sharing the prefix saves {row['tokens_saved']:.0%} of the tokens, {row['flops_saved']:.0%} of the FLOPs"
    line = f"{NAMES[row['name']]}: {saved if row['tokens_saved'] else 'no prefix to share'}"
    for side, label in (("ours", "nla_jax"), ("torch", "torch")):
        parts = row.get(f"{side}_parts", {})
        total = sum(parts.values())
        if parts:
            line += f"; {label} " + ", ".join(f"{k} {v:.2f} CPU s ({v / total:.0%})" for k, v in parts.items())
    return line


if __name__ == "__main__":
    main()
