"""Speed on this machine, against an equivalent PyTorch program and against the hardware.

    tools/bench.py [infer] [--rounds 3] [--av-batch 1,8,32] [--json out.json]
    tools/bench.py data [--quick]         extraction, loader, memory (bench_data.py)
    tools/bench.py train [--rounds 3]     AV and AR supervised steps, joint RL step (bench_train.py)
    tools/bench.py eval [--rounds 3]      activations evaluated: AV sample, AR read, fve (bench_eval.py)
    tools/bench.py device [--stage av,ar,rl,extract]   training's programs on an accelerator (bench_device.py)

`infer` runs three programs on random weights of the released Qwen2.5-7B pair's shape at reduced width (28 blocks,
layer 20, prompt of 125 tokens with the marker at 111, 150 response tokens, 126-token AR prompts):

* extract: residual vectors of block 20 for a batch of documents;
* explain: AV explanations of a batch of vectors;
* reconstruct: AR vectors of a batch of texts.

Where torch and transformers are installed, the same weights run through the program a transformers user would write
(forward hook, `generate(inputs_embeds=...)`, truncated model with identity norm), alternating with ours in one run;
their outputs are compared first, so that both are known to compute the same thing. Without torch only our half runs.
Ratios are torch's time over ours.
"""

from __future__ import annotations

import os

# Idle OpenMP threads that spin would slow whichever program runs next; both sides measure better without.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from nla_jax.models import hf
from nla_jax.models.config import ModelConfig
from nla_jax.models.params import Params, init_params, n_params, truncate
from nla_jax.models.sampler import row_keys
from nla_jax.models.transformer import residual
from nla_jax.prompt import AVPrompt
from nla_jax.reconstructor import ARParams, init_head, reconstruct_jit
from nla_jax.tools.options import some_of
from nla_jax.verbalizer import av_prefix_jit, sample_explanations

LAYER, PROMPT, MARKER, RESPONSE, AR_LENGTH = 20, 125, 111, 150, 126
INJECTION_SCALE = 150.0
PROGRAMS = ("extract", "explain", "reconstruct")


def hf_config(scale: int) -> dict[str, Any]:
    """Qwen2.5-7B's config.json with every width divided by `scale` (a power of two up to 8)."""
    heads = {1: (28, 4, 128), 2: (14, 2, 128), 4: (7, 1, 128), 8: (7, 1, 64)}[scale]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584 // scale,
        "intermediate_size": 18944 // scale,
        "vocab_size": 152064 // scale,
        "num_hidden_layers": 28,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call; `run` must block until its result is there."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def alternate(
    ours: Callable[[], Any], theirs: Callable[[], Any] | None, rounds: int
) -> tuple[list[float], list[float]]:
    """Times both programs in turn, after one unmeasured call each (compilation, allocation)."""
    ours()
    if theirs:
        theirs()
    a, b = [], []
    for _ in range(rounds):
        a.append(seconds(ours))
        if theirs:
            b.append(seconds(theirs))
    return a, b


def peak_flops(dtype: Any = jnp.float32) -> float:
    """The best matrix product this machine does through the same compiler, in FLOP/s."""
    n = 2048
    a = jnp.ones((n, n), dtype)
    f = jax.jit(lambda a: jnp.matmul(a, a, precision=jax.lax.Precision.HIGHEST))
    f(a).block_until_ready()
    return 2 * n**3 / min(seconds(lambda: f(a).block_until_ready()) for _ in range(5))


def bandwidth() -> float:
    """Bytes read per second by a sum over 512 MiB."""
    x = jnp.ones((128 << 20,), jnp.float32)
    f = jax.jit(lambda x: jnp.sum(x))
    f(x).block_until_ready()
    return x.nbytes / min(seconds(lambda: f(x).block_until_ready()) for _ in range(5))


def forward_flops(cfg: ModelConfig, tokens: int, context: float, *, head_tokens: int = 0) -> float:
    """FLOPs of `tokens` tokens through all blocks seeing `context` keys on average, plus the vocabulary projection."""
    per_block = (n_params(cfg, head=False) - cfg.vocab_size * cfg.d_model) / cfg.n_layers
    attention = 4 * cfg.n_heads * cfg.head_dim * context
    return cfg.n_layers * tokens * (2 * per_block + attention) + 2 * head_tokens * cfg.d_model * cfg.vocab_size


class _Benchmarks(click.Group):
    """`infer` where no benchmark is named; the others' modules are imported when they are asked for."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["infer", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["infer", "data", "train", "eval", "device"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "data":
            from nla_jax.tools import bench_data

            return bench_data.main
        if cmd_name == "train":
            from nla_jax.tools import bench_train

            return bench_train.main
        if cmd_name == "eval":
            from nla_jax.tools import bench_eval

            return bench_eval.main
        if cmd_name == "device":
            from nla_jax.tools import bench_device

            return bench_device.main
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Benchmarks)
def main() -> None:
    """Speed on this machine: ratios against torch in one run, and against the hardware limit."""


@main.command()
@click.option("--scale", default=8, type=click.Choice(["1", "2", "4", "8"]), help="Divide the released widths by this.")
@click.option("--rounds", default=3, help="Measured calls per program; the median counts.")
@click.option("--documents", default="8x256", help="Extraction batch: documents x tokens.")
@click.option("--av-batch", default="1,8,32", help="Vectors explained together, one row of the table each.")
@click.option("--ar-batch", default=32, help="Texts reconstructed together.")
@click.option("--only", default=",".join(PROGRAMS), callback=some_of(*PROGRAMS), help="Which programs to run.")
@click.option("--torch/--no-torch", "use_torch", default=None, help="Compare with torch (default: if installed).")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def infer(
    scale: str,
    rounds: int,
    documents: str,
    av_batch: str,
    ar_batch: int,
    only: list[str],
    use_torch: bool | None,
    json_path: Path | None,
) -> None:
    """Times extraction, explanation and reconstruction; prints ratios against torch and the hardware."""
    peer = _peer(use_torch)
    config = hf_config(int(scale))
    cfg = ModelConfig.from_hf(config)
    params = init_params(cfg, jax.random.key(0))
    console = Console(width=None if Console().is_terminal else 120)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        other = None
        if peer is not None:
            hf.save_model(params, cfg, config, Path(folder) / "model")
            other = peer.Programs(Path(folder) / "model", LAYER)
        limits = {"peak_flops": peak_flops(), "bandwidth": bandwidth()}
        if "extract" in only:
            B, T = (int(n) for n in documents.split("x"))
            rows.append(_extract(params, cfg, other, rounds, B, T))
        if "explain" in only:
            rows += [_explain(params, cfg, other, rounds, int(b)) for b in av_batch.split(",")]
        if "reconstruct" in only:
            rows.append(_reconstruct(params, cfg, other, rounds, ar_batch))
    for row in rows:
        row["limit_s"] = max(row["flops"] / limits["peak_flops"], row["bytes"] / limits["bandwidth"])
        row["of_limit"] = row["limit_s"] / row["ours_s"]
    console.print(_table(rows, cfg, limits, peer))
    if json_path:
        report = {"rows": rows, "limits": limits, "config": config, "machine": _machine(), "command": "tools/bench.py"}
        json_path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        console.print(f"wrote {json_path}")


def _peer(use_torch: bool | None) -> Any:
    if use_torch is False:
        return None
    try:
        from nla_jax.tools import bench_torch
    except ImportError as error:
        if use_torch:
            raise click.ClickException(
                f"torch and transformers are not installed ({error}). Try: pip install '.[parity]'"
            ) from None
        return None
    return bench_torch


def _row(
    name: str, unit: str, count: int, ours: list[float], theirs: list[float], flops: float, moved: float
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "unit": unit, "count": count, "flops": flops, "bytes": moved}
    row["ours_s"], row["ours_all"] = statistics.median(ours), ours
    if theirs:
        row["torch_s"], row["torch_all"] = statistics.median(theirs), theirs
        row["ratio"] = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return row


def _weights(cfg: ModelConfig, *, head: bool) -> float:
    return 4.0 * (n_params(cfg, head=head) - cfg.vocab_size * cfg.d_model)


def _extract(params: Params, cfg: ModelConfig, other: Any, rounds: int, B: int, T: int) -> dict[str, Any]:
    tokens = np.random.default_rng(0).integers(2, cfg.vocab_size, (B, T)).astype(np.int32)
    run = jax.jit(residual, static_argnames=("cfg", "layer"))

    def ours() -> np.ndarray:
        return np.asarray(run(params, tokens, cfg=cfg, layer=LAYER))

    theirs = None if other is None else (lambda: other.extract(tokens))
    if theirs is not None:
        _same("extract", ours(), theirs())
    times = alternate(ours, theirs, rounds)
    trunk = cfg.truncated(LAYER + 1)
    return _row(
        f"extract {B} x {T} tokens",
        "tokens",
        B * T,
        *times,
        forward_flops(trunk, B * T, T / 2),
        _weights(trunk, head=False),
    )


def _explain(params: Params, cfg: ModelConfig, other: Any, rounds: int, B: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    ids = tuple(int(t) for t in rng.integers(2, cfg.vocab_size, PROMPT))
    prompt = AVPrompt(ids=ids, marker=MARKER)
    vectors = rng.standard_normal((B, cfg.d_model)).astype(np.float32)
    prefix = av_prefix_jit(params, prompt=prompt, cfg=cfg)
    keys = row_keys(0, jnp.arange(B, dtype=jnp.uint32), 1)

    def ours(temperature: float = 1.0, length: int = RESPONSE) -> np.ndarray:
        samples = sample_explanations(
            params,
            prefix,
            jnp.asarray(vectors),
            keys,
            prompt=prompt,
            cfg=cfg,
            injection_scale=INJECTION_SCALE,
            temperature=temperature,
            max_new_tokens=length,
        )
        return np.asarray(samples.tokens)

    theirs = None
    if other is not None:
        scaled = vectors * (INJECTION_SCALE / np.linalg.norm(vectors, axis=-1, keepdims=True))

        def theirs(temperature: float = 1.0, length: int = RESPONSE) -> np.ndarray:
            return other.explain(ids, MARKER, scaled, temperature, length)

        _same("explain (first greedy tokens)", ours(0.0, 4), theirs(0.0, 4))
    times = alternate(ours, theirs, rounds)
    new = RESPONSE - 1  # the first token comes from the prompt's logits
    flops = forward_flops(cfg, B * (PROMPT - MARKER), PROMPT, head_tokens=B)
    flops += forward_flops(cfg, B * new, PROMPT + RESPONSE / 2, head_tokens=B * new)
    cache = 2 * 4.0 * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim * (PROMPT + B * (PROMPT - MARKER + RESPONSE / 2))
    return _row(f"explain {B} vectors", "explanations", B, *times, flops, new * (_weights(cfg, head=True) + cache))


def _reconstruct(params: Params, cfg: ModelConfig, other: Any, rounds: int, B: int) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    trunk_cfg = cfg.truncated(LAYER + 1)
    ar = ARParams(trunk=truncate(params, LAYER + 1), head=init_head(cfg.d_model))
    lengths = rng.integers(AR_LENGTH - 25, AR_LENGTH + 1, B).astype(np.int32)
    tokens = rng.integers(2, cfg.vocab_size, (B, 128)).astype(np.int32)
    tokens[np.arange(128)[None] >= lengths[:, None]] = 0

    def ours() -> np.ndarray:
        return np.asarray(reconstruct_jit(ar, tokens, lengths, cfg=trunk_cfg))

    theirs = None if other is None else (lambda: other.reconstruct(tokens, lengths))
    if theirs is not None:
        _same("reconstruct", ours(), theirs())
    times = alternate(ours, theirs, rounds)
    real = int(lengths.sum())
    return _row(
        f"reconstruct {B} texts",
        "texts",
        B,
        *times,
        forward_flops(trunk_cfg, real, real / B / 2),
        _weights(trunk_cfg, head=False),
    )


def _same(what: str, a: np.ndarray, b: np.ndarray) -> None:
    """Stops the benchmark if the two programs do not compute the same thing."""
    error = float(np.abs(a - b).max() / np.abs(b).max())
    if not error < 1e-3:
        raise click.ClickException(f"{what}: the two programs disagree, relative error {error:.1e}; nothing was timed")


def _table(rows: list[dict[str, Any]], cfg: ModelConfig, limits: dict[str, float], peer: Any) -> Table:
    versions = f"jax {jax.__version__} on {jax.default_backend()}" + (
        f", torch {peer.VERSIONS}" if peer else ", torch not installed"
    )
    title = f"{versions}\nD={cfg.d_model} F={cfg.d_ff} V={cfg.vocab_size} L={cfg.n_layers} float32; {_machine()}"
    table = Table(
        title=title,
        caption=f"hardware: {limits['peak_flops'] / 1e9:.0f} GFLOP/s, {limits['bandwidth'] / 1e9:.0f} GB/s measured",
    )
    for column in ("program", "nla_jax", "torch", "torch / nla_jax", "of the hardware limit"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for r in rows:
        theirs = f"{r['count'] / r['torch_s']:.3g} {r['unit']}/s" if "torch_s" in r else "-"
        ratio = f"{r['ratio']:.2f}x" if "ratio" in r else "-"
        table.add_row(r["name"], f"{r['count'] / r['ours_s']:.3g} {r['unit']}/s", theirs, ratio, f"{r['of_limit']:.0%}")
    return table


def _machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}"


if __name__ == "__main__":
    main()
