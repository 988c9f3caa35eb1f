"""Options that several commands share, and the pair opened from them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError
from nla_jax.tools.report import Setup, describe, notes

if TYPE_CHECKING:
    from nla_jax.pair import NLA

FILE = click.Path(path_type=Path)
MODEL = "DIR_OR_ID"

AV = click.option("--av", metavar=MODEL, required=True, help="The activation verbalizer.")
AR = click.option("--ar", metavar=MODEL, help="The activation reconstructor; with it explanations are scored.")
NEEDED_AR = click.option("--ar", metavar=MODEL, required=True, help="The activation reconstructor.")
TARGET = click.option("--target", metavar=MODEL, required=True, help="The model that is explained.")


def options(*items: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator, in the order they are to be listed."""

    def decorate(command: Any) -> Any:
        for item in reversed(items):
            command = item(command)
        return command

    return decorate


def some_of(*known: str) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """A callback for an option that lists some of these names with commas."""

    def names(ctx: click.Context, param: click.Parameter, value: str) -> list[str]:
        given = [name.strip() for name in value.split(",")]
        if not set(given) <= set(known):
            raise click.BadParameter(f"{value}: expected some of {','.join(known)}", ctx, param)
        return given

    return names


def temperature(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not 0 <= value < math.inf:
        raise InputError("--temperature", expected="0 (greedy) or more", got=value)
    return value


SAMPLING = options(
    click.option(
        "--samples", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Explanations each."
    ),
    click.option("--temperature", type=float, default=1.0, show_default=True, callback=temperature, help="0: greedy."),
    click.option("--best-of", type=click.IntRange(min=1), metavar="K", help="Draw K, keep the one the AR ranks first."),
    click.option(
        "--max-new-tokens", metavar="N", type=click.IntRange(min=1), default=150, show_default=True, help="Length cap."
    ),
    click.option(
        "--seed", metavar="N", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the draws."
    ),
)

COMPUTE = options(
    click.option(
        "--batch-size", metavar="N", type=click.IntRange(min=1), help="Rows decoded at a time; less needs less memory."
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Of the parameters. Default: as stored; float32 on CPU.",
    ),
    click.option("--variance", type=float, metavar="V", help="Denominator of fve_nrm, where the files do not name it."),
    click.option(
        "--low-memory/--keep-all",
        default=True,
        help="Hold one model's weights at a time, or all of them. Default: one.",
    ),
)

OUTPUTS = options(
    click.option("--json", "json_path", type=FILE, metavar="PATH", help="Everything but the vectors."),
    click.option("--parquet", "parquet_path", type=FILE, metavar="PATH", help="One row per explanation, with vectors."),
    click.option("--html", "html_path", type=FILE, metavar="PATH", help="A page to read, in one file."),
)


def check_sampling(samples: int, best_of: int | None, temperature: float, ar: str | None) -> None:
    """Combinations that cannot mean anything are errors before any model is opened."""
    if best_of is None:
        return
    if ar is None:
        raise InputError("--best-of", expected="an AR to rank with", got="none", fix="--ar DIR_OR_ID")
    if samples != 1:
        raise InputError("--best-of and --samples", expected="one of the two", fix="--best-of alone")
    if temperature == 0 and best_of > 1:
        raise InputError("--best-of at temperature 0", expected="samples that differ", fix="--temperature 1")


def check_files(*paths: Path | None) -> None:
    """Raises the error of the operating system for an input that cannot be read, before any model is opened."""
    for path in paths:
        if path is not None:
            path.open("rb").close()


def check_variance(variance: float | None) -> None:
    if variance is not None and not 0 < variance < math.inf:
        raise InputError("--variance", expected="a positive number", got=variance)


def open_pair(
    *,
    av: str | None = None,
    ar: str | None = None,
    target: str | None = None,
    dtype: str | None = None,
    layer: int | None = None,
    variance: float | None = None,
    low_memory: bool = True,
) -> NLA:
    """The pair, its files checked against each other; weights are read later, on first use."""
    from nla_jax.pair import NLA

    nla = NLA.from_pretrained(av, ar, target, dtype=dtype, layer=layer, variance_nrm=variance, low_memory=low_memory)
    _check_weights(nla)
    return nla


def _check_weights(nla: NLA) -> None:
    """Reads the headers of all weight files: a truncated AR must not show only after the AV's hours of work."""
    from nla_jax.models.safetensors_io import Checkpoint, read_header

    for role in (nla.target, nla.av, nla.ar):
        if role is not None:
            checkpoint = Checkpoint(role.path)
            for key in checkpoint.keys:
                checkpoint.info(key)
    if nla.ar is not None:
        read_header(nla.ar.path / "value_head.safetensors")


def setup_of(command: str, nla: NLA, given: dict[str, str | None], dtype: str | None, settings: dict) -> Setup:
    """Describes what runs, and says on stderr what a reader of the numbers must know."""
    session = click.get_current_context().find_root().obj
    arguments = getattr(session, "arguments", ())
    setup = describe(nla, given, dtype, command=command, arguments=arguments, settings=settings)
    note("; ".join(notes(setup)))
    return setup


def note(message: str) -> None:
    """One line on stderr."""
    click.echo(f"nla: {message}", err=True)


def progress() -> bool:
    """Whether to draw progress bars: only for somebody who watches."""
    return sys.stderr.isatty()
