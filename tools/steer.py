"""`nla steer`: an explanation edited by hand, and what the target writes when it is pushed where the edit says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError
from nla_jax.tools import one_position as one
from nla_jax.tools import options as o

if TYPE_CHECKING:
    import numpy as np

    from nla_jax.pair import NLA


@dataclasses.dataclass(frozen=True)
class Written:
    """One continuation: `control` is that of the random direction. `coherence`: mean log-probability per token under
    the target that is not pushed."""

    alpha: float
    control: bool
    sample: int
    text: str
    token_ids: tuple[int, ...]
    stopped: bool
    coherence: float


@click.command()
@click.argument("text")
@one.POSITION
@o.TARGET
@one.AV
@o.NEEDED_AR
@one.EXPLANATION
@click.option("--edit", "edits", multiple=True, metavar='"OLD=>NEW"', help="Of the explanation; may be repeated.")
@click.option("--edited", metavar="TEXT", help="The whole edited explanation, in place of --edit.")
@click.option("--alphas", default="0,0.5,1,2,4", show_default=True, metavar="LIST", help="Strengths of the push.")
@click.option("--everywhere", is_flag=True, help="Push every token from P on, not P alone.")
@click.option(
    "--max-new-tokens", metavar="N", type=click.IntRange(min=1), default=40, show_default=True, help="Written tokens."
)
@click.option("--samples", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="Per strength.")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    callback=o.temperature,
    help="Of the continuations; 0: greedy.",
)
@click.option(
    "--explanation-tokens",
    metavar="N",
    type=click.IntRange(min=1),
    default=150,
    show_default=True,
    help="Length cap of an explanation that is drawn.",
)
@one.SEED
@one.DTYPE
@one.LOW_MEMORY
@one.JSON
def steer(
    text: str,
    position: str,
    target: str,
    av: str | None,
    ar: str,
    explanation: str | None,
    edits: tuple[str, ...],
    edited: str | None,
    alphas: str,
    everywhere: bool,
    max_new_tokens: int,
    samples: int,
    temperature: float,
    explanation_tokens: int,
    seed: int,
    dtype: str | None,
    low_memory: bool,
    json_path: Path | None,
) -> None:
    """Edit the explanation of a token of TEXT ("-": standard input), and let the target write on from there.

    With delta = AR(edited) - AR(original), the output of block K at --position becomes h + alpha |h| delta / |delta|;
    the target then continues TEXT. Beside each continuation stands one with a random direction of the same length.
    Coherence is the mean log-probability per written token under the target that is not pushed. An explanation that
    is not given is the one that `nla explain` draws with the same --seed (at its temperature 1).

    \b
    Examples:
      nla steer "The capital of France is" --position -1 --target T --av AV --ar AR \\
        --edit "France=>Japan"
      nla steer "..." --position -1 --target T --ar AR --explanation "On cats" --edited "On dogs" \\
        --alphas 0,1,3 --everywhere --json out.json
    """
    import numpy as np

    from nla_jax.tools import outputs, tables
    from nla_jax.tools.tokens import printable

    one.need_av(av, explanation)
    strengths = parse_alphas(alphas)
    if bool(edits) == (edited is not None):
        got = "both" if edits else "neither"
        raise InputError("the edit", expected='one of --edit "OLD=>NEW" and --edited TEXT', got=got)
    pairs = [parse_edit(edit) for edit in edits]
    if explanation is not None:  # known to be wrong before any model is opened
        new_text(explanation, pairs, edited)
    if temperature == 0 and samples > 1:
        raise InputError("--samples at temperature 0", expected="samples that differ", fix="--temperature 1")
    settings = {
        "position": position,
        "alphas": strengths,
        "everywhere": everywhere,
        "max_new_tokens": max_new_tokens,
        "samples": samples,
        "temperature": temperature,
        "explanation_tokens": explanation_tokens,
        "seed": seed,
    }
    models = {"target": target, "av": av, "ar": ar}
    nla, source, setup = one.opened(
        "steer", text, models, json_path, dtype=dtype, low_memory=low_memory, settings=settings
    )
    place = one.place_of(
        nla, source, position, explanation, temperature=1.0, max_new_tokens=explanation_tokens, seed=seed
    )
    new = new_text(place.text, pairs, edited)
    before, after = nla.reconstruct([place.text, new]).astype(np.float64)
    delta = after - before
    size = float(np.linalg.norm(delta))
    if not math.isfinite(size) or size == 0:
        got = "no difference" if size == 0 else "no numbers"
        raise InputError("the AR's readings of the two explanations", expected="a direction between them", got=got)
    written = _write(
        nla,
        place,
        delta / size,
        strengths,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        everywhere=everywhere,
        seed=seed,
    )
    cosine = float(after @ before / (np.linalg.norm(after) * np.linalg.norm(before)))
    as_json = {
        **outputs.setup_json(setup),
        "text": source,
        "position": place.position,
        "token": place.token,
        "norm": float(np.linalg.norm(place.vector.astype(np.float64))),
        "explanation": {"text": place.text, "drawn": place.drawn, "failed": place.failed},
        "edited": new,
        "delta_norm": size,
        "cosine_of_readings": cosine,
        "continuations": [dataclasses.asdict(w) for w in written],
    }
    outputs.write(json_path, lambda p: outputs.write_json(p, as_json), f"{len(written)} continuations")
    lines = [
        f"original: {' '.join(printable(place.text).split())}",
        f"edited:   {' '.join(printable(new).split())}",
        f"delta = AR(edited) - AR(original), |delta| {size:.4g}, cosine of the two readings {cosine:.3f}",
        "coherence: mean log-probability per token under the target without the push",
    ]
    tables.show(_table(written, samples), lines)


def parse_alphas(spec: str) -> list[float]:
    """Finite numbers of a comma list, in its order, each once."""
    out: dict[float, None] = {}
    for item in spec.split(","):
        try:
            value = float(item)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise InputError("--alphas", expected='numbers such as "0,0.5,1,2,4"', got=repr(item.strip()))
        out[value + 0.0] = None
    return list(out)


def parse_edit(spec: str) -> tuple[str, str]:
    """(old, new) of "old=>new"."""
    old, arrow, new = spec.partition("=>")
    if not arrow or not old:
        raise InputError("--edit", expected='"OLD=>NEW", such as "France=>Japan"', got=repr(spec))
    return old, new


def new_text(original: str, edits: Sequence[tuple[str, str]], edited: str | None) -> str:
    """The edited explanation; InputError where an edit does not occur in it or nothing changes."""
    new = original if edited is None else edited
    for old, put in edits:
        if old not in new:
            shown = " ".join(new.split())
            got = shown if len(shown) <= 200 else shown[:200] + " ..."
            fix = "words that stand in it; --explanation gives the text to edit"
            raise InputError(f"--edit: {old!r} does not occur in the explanation", got=repr(got), fix=fix)
        new = new.replace(old, put)
    if new == original:
        raise InputError("the edited explanation", expected="another text than the original", got="the same")
    if not new.strip():
        raise InputError("the edited explanation", expected="a text", got="an empty one")
    return new


def _write(
    nla: NLA,
    place: one.Place,
    unit: np.ndarray,
    alphas: list[float],
    *,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    everywhere: bool,
    seed: int,
) -> list[Written]:
    """Continuations of every strength, pushed along `unit` and along a random direction.

    A sample draws with the same random numbers at every strength: what differs comes from the push. At strength 0 both
    directions are no push at all, and one continuation stands for both."""
    import jax.numpy as jnp
    import numpy as np

    from nla_jax.evals.continuing import continuations, read_text, stop_ids
    from nla_jax.evals.downstream import direction
    from nla_jax.evals.patching import Patcher, load_target
    from nla_jax.models.sampler import row_keys

    assert nla.target is not None
    patcher = Patcher(*load_target(nla.target), nla.target.layer_index)
    jobs = [(a, control, g) for a in alphas for control in (False, True) if a or not control for g in range(samples)]
    random = direction(seed, place.position, len(unit), use=1)
    ids = np.asarray(place.found.token_ids, np.int32)
    keys = row_keys(seed, jnp.zeros(1, jnp.uint32), samples)[np.array([g for *_, g in jobs])]
    found = continuations(
        patcher,
        read_text(patcher, ids),
        np.repeat(ids[None, place.position :], len(jobs), axis=0),
        np.full(len(jobs), place.position, np.int32),
        np.stack([a * (random if control else unit) for a, control, _ in jobs]),
        keys,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        stops=stop_ids(nla.target),
        everywhere=everywhere,
    )
    out = {}
    for i, job in enumerate(jobs):
        tokens = tuple(found.tokens[i].tolist())
        text = nla.target.tokenizer.decode(list(tokens[:-1] if found.stopped[i] else tokens))
        out[job] = Written(*job, text, tokens, bool(found.stopped[i]), float(found.coherence[i]))
    for g in range(samples if 0.0 in alphas else 0):
        out[0.0, True, g] = dataclasses.replace(out[0.0, False, g], control=True)
    return [out[a, control, g] for a in alphas for g in range(samples) for control in (False, True)]


def _table(written: list[Written], samples: int) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from nla_jax.tools.tables import number
    from nla_jax.tools.tokens import printable

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", expand=True)
    table.add_column("alpha", justify="right", no_wrap=True)
    if samples > 1:
        table.add_column("#", justify="right", no_wrap=True)
    for name in ("continuation", "random direction"):
        table.add_column("coherence", justify="right", no_wrap=True)
        table.add_column(name, ratio=1, min_width=20, overflow="fold")
    for steered, random in zip(written[::2], written[1::2], strict=True):
        cells = [f"{steered.alpha:g}"] + ([str(steered.sample)] if samples > 1 else [])
        for w in (steered, random):
            cells += [number(w.coherence, 2), printable(w.text)]
        table.add_row(*map(Text, cells))
    return table
