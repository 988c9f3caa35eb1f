"""Speed of training's own programs on the accelerator that is there, against what its chips can do.

    tools/bench.py device [--config qwen2_5_7b_l20] [--stage av,ar,rl,extract] [--json out.json] [--profile DIR]

Builds the programs of `nla plan` on all devices, as the config's mesh says, with random weights, and runs them: the
supervised steps, the joint step program by program, a batch of extraction. Needs no weights, no texts, no network.
Every time is that of a call that was waited for; medians count. See bench_device_report.py for what is counted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError, NLAError
from nla_jax.tools.options import note
from nla_jax.tools.train import StageCommand

if TYPE_CHECKING:
    from nla_jax.tools.bench_device_report import Limits, Summary
    from nla_jax.tools.bench_device_run import Measured
    from nla_jax.train.plan_stage import Model

STAGES = ("av", "ar", "rl", "extract")
DOES_NOT_FIT = 3  # exit code, as of `nla plan`
# What JAX takes of a GPU's memory where the user does not say: a benchmark has it for itself.
_GPU_SHARE = "0.95"


class _BadInput(click.ClickException):  # noqa: N818  (click prints the message, on one line)
    exit_code = 2


@click.command(name="device", cls=StageCommand)
@click.option("--config", default="qwen2_5_7b_l20", show_default=True, metavar="NAME_OR_PATH", help="The run config.")
@click.option("--config.KEY", "key", metavar="VALUE", expose_value=False, help="Sets a key of the config.")
@click.option("--stage", "stages", default=",".join(STAGES), show_default=True, metavar="S,..", help="Which to run.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="Measured calls; the median.")
@click.option("--scale", type=click.IntRange(min=1), default=1, show_default=True, help="Divide widths by this.")
@click.option("--blocks", type=click.IntRange(min=1), help="Fewer blocks than the target has, at its full width.")
@click.option("--layer", type=click.IntRange(min=0), metavar="K", help="Of a target that is none of the released.")
@click.option("--response-tokens", type=click.IntRange(min=2), default=125, show_default=True, help="On average.")
@click.option("--document-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Of extraction.")
@click.option("--peak-tflops", type=click.FloatRange(min=0, min_open=True), help="Of a chip, instead of the published.")
@click.option("--bandwidth-gbs", type=click.FloatRange(min=0, min_open=True), help="Of a chip's memory, likewise.")
@click.option("--profile", type=click.Path(path_type=Path), metavar="DIR", help="Trace one more round of each stage.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="PATH", help="Also write all numbers.")
@click.pass_context
def main(ctx: click.Context, **options: Any) -> None:
    """Times training's programs on the devices that are there: MFU, tokens/s, samples/s, beside the hardware's limits.

    \b
    One H100 (adapters, since 7.6 billion parameters and their moments are more than it holds):
      tools/bench.py device --config.lora.rank=64 --profile trace
    A node of 8:
      tools/bench.py device --config.mesh.fsdp=0
    A CPU, to see that it runs:
      tools/bench.py device --scale 8 --config.av.batch_size=4 --config.ar.batch_size=4 --config.rl.batch_size=2
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _GPU_SHARE)
    try:
        fits = _run(ctx.meta["overrides"], **options)
    except NLAError as error:
        raise _BadInput(str(error)) from None
    if not fits:
        ctx.exit(DOES_NOT_FIT)


def _run(
    overrides: list[tuple[str, str | None]],
    *,
    config: str,
    stages: str,
    rounds: int,
    scale: int,
    blocks: int | None,
    layer: int | None,
    response_tokens: int,
    document_tokens: int,
    peak_tflops: float | None,
    bandwidth_gbs: float | None,
    profile: Path | None,
    json_path: Path | None,
) -> bool:
    """All stages, each printed as it is done; whether all of them fitted."""
    import jax

    from nla_jax.tools import run_config
    from nla_jax.tools.bench_device_report import as_json, limits_of
    from nla_jax.tools.plan import target_model
    from nla_jax.tools.plan_run import Run, versions

    wanted = [s.strip() for s in stages.split(",") if s.strip()]
    if not wanted or set(wanted) - set(STAGES):
        raise InputError("--stage", expected=f"some of {','.join(STAGES)}", got=repr(stages))
    loaded = run_config.load(config)
    run_config.override(loaded, overrides, wanted[0] if wanted[0] != "extract" else "rl")
    whole = target_model(loaded, layer, response_tokens)
    run = Run(loaded, sized(whole, scale, blocks), False, document_tokens)
    device = jax.devices()[0]
    _say_where(device, len(jax.devices()))
    published = loaded.get("target") if run.model == whole else None
    found = []
    for stage in wanted:
        measured, mesh, chips = _measure(run, stage, rounds, profile and profile / stage)
        limits = limits_of(device.device_kind, measured.stage.compute_dtype, peak_tflops, bandwidth_gbs)
        result = _print(measured, limits, mesh, chips, run.model, published)
        found.append(as_json(measured, result, limits, mesh))
    if json_path is not None:
        from nla_jax.tools.plan_tables import write_json

        target = {"target": loaded.get("target"), "scale": scale, "blocks": run.model.cfg.n_layers}
        here = {"device": device.device_kind, "devices": len(jax.devices()), "versions": versions()}
        write_json({**target, **here, "stages": found}, str(json_path))
    return all(stage["refused"] is None for stage in found)


def sized(model: Model, scale: int, blocks: int | None) -> Model:
    """The model with its widths divided by `scale`, and its first `blocks` blocks, explained at the same height.

    Heads are halved while there is an even number of them, then made narrower. InputError where a width cannot be
    divided."""
    cfg, layer = model.cfg, model.layer
    if blocks is not None:
        if blocks > cfg.n_layers:
            raise InputError("--blocks", expected=f"1 to {cfg.n_layers}, the target's", got=blocks)
        layer = max(round(blocks * (layer + 1) / cfg.n_layers), 1) - 1
        cfg = cfg.truncated(blocks)
    if scale > 1:
        heads, kv, width = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        left = scale
        while left > 1 and left % 2 == 0 and (width > 8 or (heads % 2 == 0 and kv % 2 == 0)):
            if heads % 2 == 0 and kv % 2 == 0:
                heads, kv = heads // 2, kv // 2
            else:
                width //= 2
            left //= 2
        if left > 1 or cfg.d_model % scale or cfg.d_ff % scale:
            raise InputError("--scale", expected="a power of two that leaves widths whole", got=scale, fix="--scale 8")
        sizes: dict[str, Any] = {
            "d_model": cfg.d_model // scale,
            "d_ff": cfg.d_ff // scale,
            "vocab_size": cfg.vocab_size // scale,
        }
        cfg = dataclasses.replace(cfg, **sizes, n_heads=heads, n_kv_heads=kv, head_dim=width)
    if cfg.vocab_size <= model.lengths.prompt:  # the prompt's ids are the first ones
        raise InputError("vocabulary", expected=f"more than {model.lengths.prompt} tokens", got=cfg.vocab_size)
    return dataclasses.replace(model, cfg=cfg, layer=layer)


def _measure(run: Any, stage: str, rounds: int, profile: Path | None) -> tuple[Measured, dict[str, int], int]:
    import jax

    from nla_jax.tools.bench_device_run import measure
    from nla_jax.tools.plan_run import change_of, stage_of

    programs, place = stage_of(run, stage, change_of(run, stage), jax.devices())
    measured = measure(
        programs,
        run.model.cfg.vocab_size,
        rounds=rounds,
        profile=profile,
        memory=memory_of(jax.devices()),
        note=lambda text: note(f"{stage}: {text}"),
    )
    mesh = {"data": 1, "fsdp": 1, "tensor": 1} if place.mesh is None else dict(place.mesh.shape)
    return measured, mesh, place.split.chips


def memory_of(devices: list[Any]) -> float | None:
    """Bytes that programs can have of a device, where it is known: its own word, the chip's published size, or of a CPU
    most of what the machine has free, shared by all of its simulated devices."""
    from nla_jax.tools.bench_device_report import chip_of

    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    chip = chip_of(devices[0].device_kind)
    if chip is not None:
        return chip.hbm
    free = Path("/proc/meminfo")
    if devices[0].platform != "cpu" or not free.is_file():
        return None
    available = [line.split() for line in free.read_text().splitlines() if line.startswith("MemAvailable:")]
    return 0.8 * 1024 * int(available[0][1]) / len(devices) if available else None


def _say_where(device: Any, count: int) -> None:
    note(f"{count} x {device.device_kind}")
    if device.platform != "cpu":
        return
    extra = "" if importlib.util.find_spec("jax_cuda12_plugin") else " (NVIDIA: pip install -U 'jax[cuda12]')"
    note(f"no accelerator found: these times are of the CPU and say nothing about one{extra}")


def _print(
    measured: Measured, limits: Limits, mesh: dict[str, int], chips: int, model: Model, published: str | None
) -> Summary:
    from nla_jax.tools.bench_device_report import REFERENCE, REFERENCE_TARGET, lines, summary, table
    from nla_jax.tools.tables import show

    stage, cfg = measured.stage, model.cfg
    reference = REFERENCE.get(stage.name) if published == REFERENCE_TARGET else None
    found = summary(measured, limits, chips, reference)
    words = [
        f"{stage.name}: D {cfg.d_model}, {cfg.n_layers} blocks, layer {model.layer}, {stage.compute_dtype}",
        " x ".join(f"{name} {size}" for name, size in mesh.items()),
        f"{chips} {limits.chip or 'chip'}{'s' * (chips > 1)}",
    ]
    text = list(lines(measured, found, limits))
    if measured.refused is not None:
        text.append(f"DOES NOT FIT: {measured.refused}. What to change: {advice(stage.name)}")
    show(table(", ".join(words), found), text)
    return found


def advice(stage: str) -> str:
    """What makes a stage smaller."""
    if stage == "extract":
        return "shorter documents (--document-tokens), or fewer blocks of the same width (--blocks)"
    parts = "the rollout in parts (--config.rl.rollout_parts=4), " if stage == "rl" else ""
    return (
        f"more micro-batches (--config.{stage}.accumulate=8), recomputed blocks (--config.{stage}.remat=blocks), "
        f"{parts}parameters split over more devices (--config.mesh.fsdp=0), adapters alone trained "
        "(--config.lora.rank=64), or fewer blocks of the same width (--blocks 8)"
    )
