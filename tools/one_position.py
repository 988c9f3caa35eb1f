"""One position of a text and its explanation, given or drawn: what `nla patch` and `nla steer` begin with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError
from nla_jax.tools import options as o
from nla_jax.tools.inputs import parse_indices, read_source

if TYPE_CHECKING:
    import numpy as np

    from nla_jax.pair import NLA, Activations
    from nla_jax.tools.report import Setup

AV = click.option("--av", metavar=o.MODEL, help="The activation verbalizer; not needed with --explanation.")
POSITION = click.option("--position", metavar="P", required=True, help="A token, from 0; -1 is the last one.")
EXPLANATION = click.option("--explanation", metavar="TEXT", help="In place of one that the AV writes.")
SEED = click.option(
    "--seed", metavar="N", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of the draws."
)
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the parameters. Default: as stored; float32 on CPU.",
)
LOW_MEMORY = click.option(
    "--low-memory/--keep-all", default=True, help="Hold one model's weights at a time, or all of them. Default: one."
)
JSON = click.option("--json", "json_path", type=o.FILE, metavar="PATH", help="Everything that was measured.")


@dataclasses.dataclass(frozen=True)
class Place:
    """A position of a text: `vector` float32 [D] there, and its explanation. `drawn`: the AV wrote it; `failed`: it has
    no closing tag or was cut, and `text` is all of it. `found`: the activations of the text's other tokens as well."""

    found: Activations
    position: int
    vector: np.ndarray
    text: str
    drawn: bool
    failed: bool

    @property
    def token(self) -> str:
        return self.found.tokens[self.position]


def need_av(av: str | None, explanation: str | None) -> None:
    """InputError unless there is an explanation or something that writes one."""
    if av is None and explanation is None:
        raise InputError("the explanation", expected="--av, which writes one, or --explanation TEXT", got="neither")
    if explanation is not None and not explanation.strip():
        raise InputError("--explanation", expected="a text", got="an empty one")


def opened(
    command: str,
    text: str,
    models: dict[str, str | None],
    json_path: Path | None,
    *,
    dtype: str | None,
    low_memory: bool,
    settings: dict[str, Any],
) -> tuple[NLA, str, Setup]:
    """The pair and target of a command, the text itself ("-" is standard input), and what its outputs begin with."""
    from nla_jax.tools import outputs

    outputs.check_outputs([json_path], models.values())
    source = read_source(text, None, None)
    assert isinstance(source, str)
    nla = o.open_pair(**models, dtype=dtype, low_memory=low_memory)  # type: ignore[arg-type]
    return nla, source, o.setup_of(command, nla, models, dtype, {**settings, "dtype": dtype})


def place_of(
    nla: NLA,
    text: str,
    position: str,
    explanation: str | None,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> Place:
    """The place that --position names. Its explanation, where none is given, is the one `nla explain` draws with the
    same seed, temperature and length cap."""
    from nla_jax.pair import Activations

    ids = nla.tokenize(text)
    chosen = parse_indices(position, len(ids))
    if len(chosen) != 1:
        raise InputError("--position", expected="one position", got=f"{position} ({len(chosen)} positions)")
    (at,) = chosen
    assert nla.target is not None
    special = nla.target.tokenizer.special_ids
    found = nla.activations(text, sorted({at, *(i for i, t in enumerate(ids) if t not in special)}))
    vector = found.vectors[found.positions.index(at)]
    if explanation is not None:
        return Place(found, at, vector, explanation, False, False)
    alone = Activations(vector[None], (at,), found.token_ids, found.tokens)
    (drawn,) = nla.explain(text, activations=alone, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    if drawn.failed:
        o.note("the explanation failed (no closing tag, or cut by the length cap): its raw text is read")
    return Place(found, at, vector, drawn.text, True, drawn.failed)
