"""`nla plan`: does a run fit on a slice, and how long does it take there at least. Needs neither chips nor weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError
from nla_jax.tools.train import StageCommand

if TYPE_CHECKING:
    from nla_jax.tools.plan_run import Result, Run
    from nla_jax.train.plan_slices import Slice
    from nla_jax.train.plan_stage import Model

STAGES = ("rl", "av", "ar", "extract")
DOES_NOT_FIT = 3  # exit code


@click.command(name="plan", cls=StageCommand)
@click.option("--config", required=True, metavar="NAME_OR_PATH", help="The run config, as nla train takes it.")
@click.option("--config.KEY", "key", metavar="VALUE", expose_value=False, help="Sets a key of the config.")
@click.option("--slice", "slice_name", metavar="SLICE", help="Chips and how many: v5e:4x8, v5p:2x2x4, h100:1x1x8.")
@click.option("--stage", "stages", default="rl", show_default=True, metavar="S,..", help="Of rl, av, ar, extract.")
@click.option("--search", is_flag=True, help="Try remat, micro-batches, rollout parts, meshes and LoRA until it fits.")
@click.option("--quick", is_flag=True, help="Compile with the least effort: in a quarter of the time.")
@click.option("--flops", is_flag=True, help="Print what the method saves in FLOPs, and compile nothing.")
@click.option("--layer", type=click.IntRange(min=0), metavar="K", help="Of a target that is none of the released.")
@click.option("--response-tokens", type=click.IntRange(min=2), default=125, show_default=True, help="On average.")
@click.option("--pairs", type=click.IntRange(min=1), default=250_000, show_default=True, help="Of the warm starts.")
@click.option("--document-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Of extraction.")
@click.option("--documents", type=click.IntRange(min=1), default=100_000, show_default=True, help="Of extraction.")
@click.option("--json", "json_path", is_flag=False, flag_value="-", metavar="[PATH]", help="All numbers, as JSON.")
@click.option("--cache/--no-cache", default=True, help="Keep what compilations found, in ~/.cache/nla_jax/plan.")
@click.pass_context
def plan(
    ctx: click.Context,
    config: str,
    slice_name: str | None,
    stages: str,
    search: bool,
    quick: bool,
    flops: bool,
    layer: int | None,
    response_tokens: int,
    pairs: int,
    document_tokens: int,
    documents: int,
    json_path: str | None,
    cache: bool,
) -> int:
    """Say whether a run fits on a slice, and how fast it can be there at most.

    Builds the programs that `nla train` and `nla extract` run, from shapes alone, and compiles them for chips that
    this machine does not have (pip install 'jax[tpu]'). Prints for each: memory of a chip, FLOPs, bytes moved and
    sent, and the least time that these take. Times are rooflines, a bound on the speed and no forecast of it.

    Compilations take minutes. With --quick the compiler tries less to make programs fast: memory comes out within a
    few percent, bytes sent up to a fifth more. A search looks that way, and compiles what it found as training does.

    Targets: those of the released configs, or a directory with a config.json. With --search a chip alone, as in
    --slice v5e, asks for its smallest slice that fits. Exit codes: 0 fits, 3 does not.

    \b
    Examples:
      nla plan --config=qwen2_5_7b_l20 --slice v5e:4x8 --config.mesh.fsdp=8 --config.mesh.tensor=4
      nla plan --config=gemma3_27b_l41 --slice v5p --search --stage rl,av,ar
      nla plan --config=qwen2_5_7b_l20 --flops
    """
    from nla_jax.train.plan_slices import parse_slice, prepare

    wanted = [s.strip() for s in stages.split(",") if s.strip()]
    if not wanted or set(wanted) - set(STAGES):
        raise InputError("--stage", expected=f"some of {','.join(STAGES)}", got=repr(stages))
    if slice_name is None and not flops:
        raise InputError("--slice", expected="a chip and its number, as v5e:4x8", got="none")
    slices = _slices(slice_name, search) if slice_name is not None else [parse_slice("v5e:1x1")]
    prepare(max((s.chips for s in slices if not s.chip.tpu), default=1))
    from nla_jax.tools import run_config

    loaded = run_config.load(config)
    run_config.override(loaded, ctx.meta["overrides"], wanted[0] if wanted[0] != "extract" else "rl")
    from nla_jax.tools.plan_run import Run, plan_stage

    run = Run(loaded, target_model(loaded, layer, response_tokens), cache, document_tokens, quick)
    if flops:
        return _flops(run.model, loaded.get("target"), json_path)
    sizes = {"pairs": pairs, "documents": documents, "document_tokens": document_tokens}
    results = [plan_stage(run, stage, slices, search) for stage in wanted]
    _print(run, results, sizes, json_path)
    return 0 if all(r.report.fits for r in results) else DOES_NOT_FIT


def _slices(name: str, search: bool) -> list[Slice]:
    from nla_jax.configs.chips import CHIPS
    from nla_jax.train.plan_slices import larger, parse_slice

    if name in CHIPS and search:
        first = parse_slice(f"{name}:{CHIPS[name]['names'][0]}")  # type: ignore[index]
        return [first, *larger(first)]
    return [parse_slice(name)]


def target_model(config: Any, layer: int | None, response_tokens: int) -> Model:
    """The target's sizes: of a released pair, or of a directory."""
    from nla_jax.configs.architectures import ARCHITECTURES
    from nla_jax.configs.released import RELEASED
    from nla_jax.models.config import ModelConfig
    from nla_jax.train.plan_stage import Model
    from nla_jax.train.plan_work import Lengths

    target = config.get("target")
    known: dict[str, Any] = ARCHITECTURES.get(target) or {}
    released = next((pair for pair in RELEASED if pair["target"] == target), None)
    if known:
        cfg = ModelConfig.from_hf(known["config"], source=target)
    elif target and Path(target).expanduser().is_dir():
        cfg = ModelConfig.from_dir(Path(target).expanduser())
    else:
        expected = f"a directory with a config.json, or one of {', '.join(ARCHITECTURES)}"
        raise InputError("config.target", expected=expected, got=repr(target), fix="--config.target=DIR")
    if layer is None and released is None:
        raise InputError("--layer", expected=f"0 to {cfg.n_layers - 1}, the block that is explained", got="none")
    layer = int(released["layer_index"]) if layer is None and released is not None else int(layer or 0)  # type: ignore[call-overload]
    if layer >= cfg.n_layers:
        raise InputError("--layer", expected=f"0 to {cfg.n_layers - 1}, the target's blocks", got=layer)
    sizes = {name: known[name] for name in ("prompt", "marker", "ar_prompt") if name in known}
    return Model(cfg, layer, Lengths(**sizes, response=response_tokens))


def _flops(model: Model, target: str | None, json_path: str | None) -> int:
    from nla_jax.tools.plan_tables import flops_lines, flops_rich, write_json
    from nla_jax.train.plan_work import flops_table

    table = flops_table(model.cfg, model.layer, model.lengths)
    if json_path is not None:
        write_json({"target": target, "flops": table}, json_path)
    if json_path != "-":
        from nla_jax.tools.tables import show

        show(flops_rich(table), flops_lines(model, target))
    return 0


def _print(run: Run, results: list[Result], sizes: dict[str, int], json_path: str | None) -> None:
    from nla_jax.tools.plan_run import versions
    from nla_jax.tools.plan_tables import as_json, stage_lines, stage_table, write_json

    if json_path is not None:
        found = [as_json(r, _hours(r, sizes)) for r in results]
        write_json({"target": run.config.get("target"), "versions": versions(), "stages": found}, json_path)
    if json_path == "-":
        return
    from nla_jax.tools.tables import show

    for result in results:
        show(stage_table(result.slice, result.report), list(stage_lines(result, _hours(result, sizes))))


def _hours(result: Result, sizes: dict[str, int]) -> tuple[float, str]:
    """Least hours of a whole run, and what that run is."""
    report = result.report
    if result.report.stage == "extract":
        tokens = sizes["documents"] * sizes["document_tokens"]
        steps, what = tokens / report.samples, f"{sizes['documents']:,} documents of {sizes['document_tokens']} tokens"
    elif result.steps:
        steps, what = float(result.steps), f"{result.steps:,} steps"
    else:
        pairs = result.epochs * sizes["pairs"]
        steps, what = pairs / report.samples, f"{pairs:,} pairs"
    return steps * report.step_seconds / 3600, what
