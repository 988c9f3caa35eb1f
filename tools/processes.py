"""Options of the commands that several processes run together, and what they do when one of them is lost."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import click

from nla_jax.errors import InputError, NLAError
from nla_jax.tools import cli
from nla_jax.tools.options import options

PROCESSES = options(
    click.option("--coordinator", metavar="HOST:PORT", help="Of process 0. Found out on TPU pods, Slurm, Kubernetes."),
    click.option("--num-processes", type=click.IntRange(min=1), metavar="N", help="How many run this command."),
    click.option("--process-id", type=click.IntRange(min=0), metavar="I", help="Which of them this is, from 0."),
    click.option(
        "--heartbeat",
        type=click.IntRange(min=5),
        default=60,
        show_default=True,
        metavar="SECONDS",
        help="A process not heard of for so long is lost, and ends the others.",
    ),
)
_LAST_WORDS = 2.0  # seconds in which the others may say their own error before process 0 takes them along


@contextlib.contextmanager
def together(
    coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat: int
) -> Iterator[bool]:
    """Joins the other processes for what is done in the block; gives whether there are any.

    A process that fails leaves at once: the others are told by its silence, and it must not wait for them, who wait
    for it. One that is left alone by another ends with code 75."""
    import jax

    from nla_jax import processes

    if not processes.start(coordinator, num_processes, process_id, heartbeat=heartbeat):
        yield False
        return
    try:
        yield True
    except SystemExit:
        raise
    except BaseException as error:
        gone = processes.lost(error)
        line, code = (str(gone), processes.EXIT_LOST) if gone is not None else _shown(error)
        session = click.get_current_context().find_root().obj
        if isinstance(session, cli.Session) and session.debug:
            traceback.print_exc()
        click.echo(f"nla: error: {' '.join(line.split())}", err=True)
        sys.stdout.flush()
        sys.stderr.flush()
        if gone is None and jax.process_index() == 0:
            time.sleep(_LAST_WORDS)
        os._exit(code)


@contextlib.contextmanager
def sharing(process: int | None, processes: int | None, **joining: Any) -> Iterator[tuple[int, int]]:
    """For a command whose processes may also share nothing but its output (`--process`, `--processes`), where they do
    not join: gives this one's number and how many they are."""
    if process is not None or processes is not None:
        if joining["coordinator"] is not None:
            got = "--process or --processes as well"
            raise InputError("--coordinator", expected="processes that join, or that share the store alone", got=got)
        yield process or 0, processes or 1
        return
    with together(**joining) as joined:
        if not joined:
            yield 0, 1
            return
        import jax

        yield jax.process_index(), jax.process_count()


def _shown(error: BaseException) -> tuple[str, int]:
    """The line and the exit code of the command line for an error."""
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return "interrupted", 130
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    if isinstance(error, NLAError):
        return str(error), 2
    if isinstance(error, OSError):
        return cli._os_line(error), 2
    return cli._unexpected_line(error if isinstance(error, Exception) else Exception(repr(error))), 1
