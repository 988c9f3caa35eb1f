"""`nla train`: pre-trains a small model (lm), warm-starts the AR and the AV, or trains both jointly (rl)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nla_jax import host_memory
from nla_jax.errors import InputError
from nla_jax.tools.cli import _debug_option
from nla_jax.tools.processes import PROCESSES, together

_KEY = "--config."
_EPILOG = (
    "\b\nExamples:\n"
    "  nla train {0} --config=qwen2_5_7b_l20\n"
    "  nla train {0} --config=mine.py --out runs/mine --config.{0}.lr=1e-5 --config.{0}.steps=500\n"
    "  nla train {0} --config=tiny --print-config"
)


class StageCommand(click.Command):
    """A command that also takes --config.KEY=VALUE (or --config.KEY VALUE) for every key of a config.

    They are in `ctx.meta["overrides"]` as (key, text) in the order typed; the text is None for a key without one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        overrides, rest = take_overrides(args)
        ctx.meta["overrides"] = overrides
        return super().parse_args(ctx, rest)


def take_overrides(args: list[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """The --config.KEY=VALUE among the arguments, and the others."""
    overrides: list[tuple[str, str | None]] = []
    rest: list[str] = []
    waiting = list(args)
    while waiting:
        arg = waiting.pop(0)
        if not arg.startswith(_KEY):
            rest.append(arg)
            continue
        key, equals, text = arg[len(_KEY) :].partition("=")
        if not key:
            raise InputError(repr(arg), expected="--config.KEY=VALUE", fix="--config.rl.lr=1e-5")
        value: str | None = text if equals else None
        if not equals and waiting and not waiting[0].startswith("--"):
            value = waiting.pop(0)
        overrides.append((key, value))
    return overrides, rest


class TrainGroup(click.Group):
    """The group; each of its commands takes --debug, as every command does."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is not None and not any("--debug" in param.opts for param in command.params):
            command.params.append(_debug_option())
        return command


@click.group(name="train", cls=TrainGroup, context_settings={"help_option_names": ["-h", "--help"]})
def train() -> None:
    """Train a model of an NLA, as a run config says.

    A config is the name of one that comes with the package (tiny, qwen2_5_7b_l20, gemma3_12b_l32, gemma3_27b_l41,
    llama3_3_70b_l53) or a Python file with a function get_config(). Every key can be set on the command line:
    --config.rl.lr=1e-5. `rl` starts from what `ar` and `av` of the same run have written.

    All devices take part, as config.mesh says: --config.mesh.fsdp=0 splits parameters over all of them. On several
    hosts run the same command on each; where --out is on a file system that they share. On TPU pods, in Slurm and in
    Kubernetes they find each other, elsewhere --coordinator, --num-processes and --process-id say it.

    The same command again goes on from the last checkpoint. Exit codes: 0 finished, 75 stopped by a signal with a
    checkpoint saved (run it again), 2 bad input, 1 an error of ours. Where one of several processes is lost the others
    end as well, with 75 or by SIGABRT (134): run it again on all.

    \b
    Examples:
      nla train ar --config=qwen2_5_7b_l20
      nla train av --config=qwen2_5_7b_l20
      nla train rl --config=qwen2_5_7b_l20 --config.rl.lr=5e-6 --config.rl.transforms=shuffle:0.5
    """
    host_memory.keep_freed_memory()


def _stage(name: str, text: str) -> None:
    """Adds the command of one stage."""

    def command(ctx: click.Context, /, **options: Any) -> int:
        return _run(name, ctx.meta["overrides"], **options)

    decorate: list[Callable[[Any], Any]] = [
        click.option("--config", required=True, metavar="NAME_OR_PATH", help="The run config."),
        click.option("--config.KEY", "key", metavar="VALUE", expose_value=False, help="Sets a key of the config."),
        click.option("--out", metavar="DIR", help="Of the run, instead of the config's; this stage writes below it."),
        click.option("--wandb", metavar="PROJECT", help="Report to this Weights & Biases project too."),
        click.option("--no-tensorboard", is_flag=True, help="Write no TensorBoard files."),
        click.option("--print-config", is_flag=True, help="Print the stage's settings as JSON and exit."),
        PROCESSES,
    ]
    function: Any = click.pass_context(command)
    for option in reversed(decorate):
        function = option(function)
    epilog = _EPILOG.format(name)
    train.add_command(click.command(name=name, cls=StageCommand, help=text, epilog=epilog)(function))


_stage("lm", "Train a language model on texts; its export is a target.")
_stage("ar", "Warm-start the AR: the teacher's explanations in, vectors out.")
_stage("av", "Warm-start the AV: vectors in, the teacher's explanations out.")
_stage("rl", "Train the AV and the AR jointly, from their warm starts.")


def _run(
    stage: str,
    overrides: list[tuple[str, str | None]],
    *,
    config: str,
    out: str | None,
    wandb: str | None,
    no_tensorboard: bool,
    print_config: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat: int,
) -> int:
    """Trains one stage; returns the exit code."""
    import json

    from nla_jax.tools import run_config
    from nla_jax.train.settings import from_config

    loaded = run_config.load(config)
    run_config.override(loaded, overrides, stage)
    if out is not None:
        loaded.out = out
    settings = from_config(loaded, stage)
    if print_config:
        click.echo(json.dumps(settings.to_dict(), indent=2, ensure_ascii=False))
        return 0
    if not settings.out:
        raise InputError("config.out is not set", expected="a directory for the run", fix="--out DIR")
    with together(coordinator, num_processes, process_id, heartbeat):
        return _train(settings, wandb, not no_tensorboard)


def _train(settings: Any, wandb: str | None, tensorboard: bool) -> int:
    import jax

    from nla_jax.train.loop import run
    from nla_jax.train.tasks import make_task

    result = run(make_task(settings), Path(settings.out).expanduser(), wandb=wandb, tensorboard=tensorboard)
    if jax.process_index() != 0:  # process 0 wrote for all
        return result.exit_code
    for path in result.exports:
        click.echo(f"wrote {path}")
    report = result.directory / "report.html"
    if result.exit_code == 0 and report.exists():
        click.echo(f"wrote {report}")
    return result.exit_code
