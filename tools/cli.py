"""The `nla` command: finds the subcommands, and turns every failure into one line.

A subcommand's module is imported only when it is invoked, so that `nla --help` waits for neither jax nor numpy.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import sys
import traceback
from typing import Any, NoReturn

import click

from nla_jax import __version__, xla_cache
from nla_jax.errors import NLAError

# name -> (module, what the list of commands says). The click command in the module bears the command's name.
COMMANDS = {
    "explain": ("nla_jax.tools.explain", "Explain the tokens of a text or a chat."),
    "verbalize": ("nla_jax.tools.verbalize", "Explain activation vectors from a file."),
    "reconstruct": ("nla_jax.tools.reconstruct", "Turn explanations back into vectors."),
    "score": ("nla_jax.tools.score", "Measure how well texts reconstruct vectors."),
    "extract": ("nla_jax.tools.extract", "Read a corpus with a model into an activation store."),
    "convert": ("nla_jax.tools.convert", "Convert checkpoints to and from Hugging Face form."),
    "doctor": ("nla_jax.tools.doctor", "Check model directories against each other."),
    "teach": ("nla_jax.tools.teach", "Write warm-start explanations for the rows of a store."),
    "build": ("nla_jax.tools.build", "Make the training sets of a store."),
    "plan": ("nla_jax.tools.plan", "Say whether a run fits on a slice, and how fast it can be."),
    "train": ("nla_jax.tools.train", "Train the AR, the AV, or both jointly, as a config says."),
    "eval": ("nla_jax.tools.eval", "Measure a pair: every number with interval and controls."),
    "card": ("nla_jax.tools.card", "Write a pair's model card from its evaluation."),
    "patch": ("nla_jax.tools.patch", "Put the AR's vector back into the target's forward pass."),
    "steer": ("nla_jax.tools.steer", "Edit an explanation and see what the target then writes."),
    "data": ("nla_jax.tools.data", "Look at, check, merge and split activation stores."),
    "demo": ("nla_jax.tools.demo", "Train a miniature NLA from nothing, and show what it learned."),
}


@dataclasses.dataclass
class Session:
    """What the group hands to its subcommands: the arguments as typed, and whether to show tracebacks."""

    arguments: tuple[str, ...] = ()
    debug: bool = False


def _debug_option() -> click.Option:
    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        session = ctx.find_root().obj
        if value and isinstance(session, Session):
            session.debug = True

    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=remember,
        help="Show the traceback of an error.",
    )


class LazyGroup(click.Group):
    """A group whose commands are modules that are imported when they are invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name, (module, _) in COMMANDS.items() if importlib.util.find_spec(module) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        xla_cache.enable()
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        if not any("--debug" in param.opts for param in command.params):
            command.params.append(_debug_option())
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name, known = str(args[0]), self.list_commands(ctx)
        if name not in known and not name.startswith("-"):
            close = difflib.get_close_matches(name, known, n=1)
            raise NLAError(f"no command {name!r}", fix=f"nla {close[0]}" if close else "nla --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def main(  # type: ignore[override]
        self, args: Any = None, prog_name: str | None = None, **extra: Any
    ) -> Any:
        """Runs the command line and exits: 0 done, 2 bad input, 1 an error of ours, 130 interrupted."""
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        arguments = [str(a) for a in (sys.argv[1:] if args is None else args)]
        session = Session(tuple(arguments))
        _tolerate_narrow_encodings()
        try:
            result = super().main(arguments, prog_name or "nla", standalone_mode=False, obj=session, **extra)
        except click.Abort:
            click.echo("nla: interrupted", err=True)
            sys.exit(130)
        except click.ClickException as error:
            _fail(_usage_line(error), 2, session)
        except NLAError as error:
            _fail(str(error), 2, session)
        except OSError as error:
            _fail(_os_line(error), 2, session)
        except Exception as error:  # anything else is ours to repair
            _fail(_unexpected_line(error), 1, session)
        sys.exit(result if isinstance(result, int) else 0)


def _fail(message: str, code: int, session: Session) -> NoReturn:
    if session.debug:
        click.echo(traceback.format_exc(), err=True)
    # One line whatever the message quotes, and no control characters for the terminal to obey.
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    click.echo(f"nla: error: {line}", err=True)
    sys.exit(code)


def _usage_line(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    command = ctx.command_path if ctx is not None else "nla"
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        return f"{message}. Try: {command} --help, or -- before a text that starts with a dash"
    return f"{message}. Try: {command} --help"


def _os_line(error: OSError) -> str:
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names}: {error.strerror}" if names and error.strerror else str(error) or type(error).__name__


def _unexpected_line(error: Exception) -> str:
    message = " ".join(f"{type(error).__name__}: {error}".split())
    if len(message) > 300:
        message = message[:300] + " ..."
    if "RESOURCE_EXHAUSTED" in message or isinstance(error, MemoryError):
        message += " (out of memory: --low-memory, a smaller --batch-size or --dtype bfloat16 need less)"
    return f"unexpected {message} (run again with --debug for the traceback)"


def _tolerate_narrow_encodings() -> None:
    """Characters that the terminal's encoding lacks are replaced instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure") and (stream.encoding or "").lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="replace")


@click.group(
    name="nla",
    cls=LazyGroup,
    invoke_without_command=True,
    params=[_debug_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="nla")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Natural language autoencoders: explain what a language model computes.

    An AV puts an activation vector of a target model into words; an AR reads the words back into a vector,
    which shows how much the words say. Models are directories or Hugging Face hub ids.

    \b
    Example:
      nla explain "The capital of France is" --target Qwen/Qwen2.5-7B-Instruct \\
        --av kitft/nla-qwen2.5-7b-L20-av --ar kitft/nla-qwen2.5-7b-L20-ar
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


if __name__ == "__main__":
    main()
