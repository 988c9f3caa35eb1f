"""`nla patch`: the AR's reading of an explanation put back into the target, and what the next tokens make of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError
from nla_jax.tools import one_position as one
from nla_jax.tools import options as o

if TYPE_CHECKING:
    import numpy as np

    from nla_jax.evals.patching import Effects
    from nla_jax.pair import NLA

VARIANTS = ("reconstruction", "mean", "zero", "gold", "noise")


@click.command()
@click.argument("text")
@one.POSITION
@o.TARGET
@one.AV
@o.NEEDED_AR
@one.EXPLANATION
@click.option(
    "--tokens", metavar="N", type=click.IntRange(min=1), default=16, show_default=True, help="Of the text after P."
)
@click.option(
    "--temperature", type=float, default=1.0, show_default=True, callback=o.temperature, help="Of the explanation."
)
@click.option(
    "--max-new-tokens", metavar="N", type=click.IntRange(min=1), default=150, show_default=True, help="Its length cap."
)
@one.SEED
@one.DTYPE
@one.LOW_MEMORY
@one.JSON
def patch(
    text: str,
    position: str,
    target: str,
    av: str | None,
    ar: str,
    explanation: str | None,
    tokens: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    dtype: str | None,
    low_memory: bool,
    json_path: Path | None,
) -> None:
    """Put the AR's vector back into the target as it reads TEXT ("-": standard input), and see what is lost.

    At --position the AV writes an explanation; the AR's reading of it, at the length of the activation, replaces the
    output of block K there, and the target reads on. For each next token of TEXT: its log-probability and the KL
    divergence from the untouched distribution, beside those with the mean of the text's other activations in place.

    \b
    Examples:
      nla patch "The capital of France is Paris, on the Seine." --position 5 \\
        --target T --av AV --ar AR
      nla patch "..." --position 5 --target T --ar AR --explanation "A text on capitals" --json out.json
    """
    import numpy as np

    from nla_jax.tools import outputs, tables
    from nla_jax.tools.tokens import printable, visible

    one.need_av(av, explanation)
    settings = {
        "position": position,
        "tokens": tokens,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    models = {"target": target, "av": av, "ar": ar}
    nla, source, setup = one.opened(
        "patch", text, models, json_path, dtype=dtype, low_memory=low_memory, settings=settings
    )
    _check_follows(nla, source, position)
    place = one.place_of(
        nla, source, position, explanation, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed
    )
    vectors, mean_of = _variants(nla, place, seed)
    effects = _effects(nla, place, vectors, tokens)
    n = effects.kl.shape[1]
    following = place.found.token_ids[place.position + 1 : place.position + 1 + n]
    measured = {
        name: {"logprob": effects.logprob[i].tolist(), "kl": effects.kl[i].tolist()} for i, name in enumerate(VARIANTS)
    }
    clean = effects.logprob_reference[0]
    recovered = {name: _recovered(measured, clean, name) for name in ("mean", "zero")}
    h, read = (vectors[i].astype(np.float64) for i in (VARIANTS.index("gold"), 0))
    cosine = float(h @ read / (np.linalg.norm(h) * np.linalg.norm(read)))
    as_json = {
        **outputs.setup_json(setup),
        "text": source,
        "position": place.position,
        "token": place.token,
        "norm": float(np.linalg.norm(h)),
        "explanation": {"text": place.text, "drawn": place.drawn, "failed": place.failed, "cosine": cosine},
        "mean_ablation": mean_of,
        "tokens": [
            {"position": place.position + 1 + j, "token_id": t, "token": place.found.tokens[place.position + 1 + j]}
            for j, t in enumerate(following)
        ],
        "clean": {"logprob": clean.tolist()},
        "variants": measured,
        "recovered": recovered,
    }
    outputs.write(json_path, lambda p: outputs.write_json(p, as_json), f"{n} tokens")
    lines = [
        f"explanation of position {place.position} ({visible(place.token)}), cosine {cosine:.3f}: "
        + " ".join(printable(place.text).split()),
        *(_line(name, recovered[name], n) for name in recovered),
        f"controls, KL per token: the activation itself {np.mean(effects.kl[3]):.2g},"
        f" noise as large as the error {np.mean(effects.kl[4]):.4g}",
        f"mean ablation: {mean_of}",
    ]
    tables.show(_table(as_json), lines)


def _check_follows(nla: NLA, source: str, position: str) -> None:
    """What can be known before any weights are read: tokens must follow."""
    from nla_jax.tools.inputs import parse_indices

    length = len(nla.tokenize(source))
    if parse_indices(position, length) == [length - 1]:
        fix = f"a position before {length - 1}, or a longer text"
        raise InputError("--position", expected="a token that others follow", got=f"{position}, the last one", fix=fix)


def _variants(nla: NLA, place: one.Place, seed: int) -> tuple[np.ndarray, str]:
    """Vectors float32 [5, D] in the order of VARIANTS, and what the mean is of."""
    import numpy as np

    from nla_jax.evals.downstream import direction
    from nla_jax.metrics import normalize

    h = place.vector.astype(np.float64)
    size = float(np.linalg.norm(h))
    read = nla.reconstruct([place.text])[0].astype(np.float64)
    if not np.isfinite(read).all() or not read.any():
        raise InputError("the AR's reading of the explanation has no direction", got="zero, or no numbers")
    read = normalize(read[None], size)[0]
    # The first token is where attention sinks: its activation is many times as long as any other.
    others = [i for i, p in enumerate(place.found.positions) if p not in (0, place.position)]
    mean = place.found.vectors[others].astype(np.float64).mean(axis=0) if others else np.zeros_like(h)
    mean_of = f"the mean activation of the text's other {len(others)} tokens (the first and special ones left out)"
    noise = h + direction(seed, place.position, len(h)) * np.linalg.norm(read - h)
    rows = {"reconstruction": read, "mean": mean, "zero": np.zeros_like(h), "gold": h, "noise": noise}
    return np.stack([rows[name] for name in VARIANTS]).astype(np.float32), mean_of if others else "zero: no others"


def _effects(nla: NLA, place: one.Place, vectors: np.ndarray, tokens: int) -> Effects:
    import numpy as np

    from nla_jax.evals.patching import Patcher, load_target

    assert nla.target is not None
    patcher = Patcher(*load_target(nla.target), nla.target.layer_index)
    ids = np.asarray(place.found.token_ids, np.int32)[: place.position + 1 + tokens]
    following = np.repeat(ids[None, place.position + 1 :], len(vectors), axis=0)
    at = np.full(len(vectors), place.position, np.int32)
    return patcher.effects(patcher.read(ids), at, vectors, following)


def _recovered(measured: dict[str, Any], clean: np.ndarray, ablation: str) -> dict[str, float | None]:
    """kl_recovered and ce_recovered against an ablation; None where it takes nothing away."""
    kl, kl_ablated = (sum(measured[name]["kl"]) for name in ("reconstruction", ablation))
    ce, ce_ablated = (-sum(measured[name]["logprob"]) for name in ("reconstruction", ablation))
    lost = ce_ablated + float(clean.sum())
    return {
        "kl_recovered": 1 - kl / kl_ablated if kl_ablated > 0 else None,
        "ce_recovered": (ce_ablated - ce) / lost if lost > 0 else None,
    }


def _line(ablation: str, found: dict[str, float | None], n: int) -> str:
    from nla_jax.tools.tables import number

    ce = number(found["ce_recovered"]) + ("" if found["ce_recovered"] is not None else " (the ablation costs nothing)")
    return f"against {ablation}, next {n} tokens: KL recovered {number(found['kl_recovered'])}, CE recovered {ce}"


def _table(found: dict[str, Any]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from nla_jax.tools.tables import number
    from nla_jax.tools.tokens import visible

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("pos", "token", "clean", "patched", "KL", "mean-ablated", "KL"):
        table.add_column(name, justify="left" if name == "token" else "right", no_wrap=True)
    read, mean = (found["variants"][name] for name in ("reconstruction", "mean"))
    for j, token in enumerate(found["tokens"]):
        values = [found["clean"]["logprob"][j], read["logprob"][j], read["kl"][j], mean["logprob"][j], mean["kl"][j]]
        cells = [number(v, 4 if i in (2, 4) else 3) for i, v in enumerate(values)]
        table.add_row(*map(Text, (str(token["position"]), visible(token["token"]), *cells)))
    return table
