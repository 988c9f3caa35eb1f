"""`nla build`: the training sets of a store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from nla_jax.errors import InputError
from nla_jax.tools.options import FILE


def parse_fractions(text: str | None) -> dict[str, float] | None:
    """Shares of av_sft, ar_sft and rl from "25/25/50" (percent) or "0.25,0.25,0.5"."""
    from nla_jax.store import SPLITS

    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.replace("/", ",").split(",")]
        shares = dict(zip(SPLITS, numbers, strict=True))
    except ValueError:
        expected = "three numbers such as 25/25/50 (av_sft, ar_sft, rl)"
        raise InputError("--fractions", expected=expected, got=repr(text)) from None
    return {name: share / 100 for name, share in shares.items()} if sum(numbers) > 1.5 else shares


@click.command(
    epilog="\b\nExamples:\n"
    "  nla build out/store --target Qwen/Qwen2.5-7B-Instruct\n"
    "  nla build out/store --target T --marker ㈜ --injection-scale 150 --fractions 25/25/50 --seed 1\n"
    "  nla build out/store --target T --template-from kitft/nla-qwen2.5-7b-L20-av/nla_meta.yaml"
)
@click.argument("store_path", metavar="STORE")
@click.option(
    "--target",
    "--av-tokenizer",
    "target",
    required=True,
    metavar="DIR_OR_ID",
    help="Where the target's tokenizer is, which is the AV's and the AR's.",
)
@click.option("--layer", type=int, metavar="K", help="Of a store with several layers, the one to train on.")
@click.option("--marker", metavar="CHAR", help="What the vector replaces. Default: chosen for the tokenizer.")
@click.option("--injection-scale", type=float, metavar="X", help="Default: a round number above the mean norm.")
@click.option("--template-from", type=FILE, metavar="SIDECAR", help="Prompts, marker and scale of a released pair.")
@click.option("--fractions", metavar="A/B/C", help="Of the documents. Default: as split, or 25/25/50.")
@click.option("--seed", type=int, metavar="N", help="Of the split. Default: as split, or 0.")
@click.option("--base-model", metavar="NAME", help="What the sidecars call the target. Default: its directory's name.")
@click.option("--overwrite", is_flag=True, help="Replace training sets that are there, and split anew if asked to.")
def build(
    store_path: str,
    target: str,
    layer: int | None,
    marker: str | None,
    injection_scale: float | None,
    template_from: Path | None,
    fractions: str | None,
    seed: int | None,
    base_model: str | None,
    overwrite: bool,
) -> None:
    """Make the AV-SFT, AR-SFT and RL sets of STORE, in the store.

    Documents are divided over the sets; rows of the SFT sets need an explanation (nla teach), others are left out and
    counted. Writes build.json, the mean of the training vectors and a sidecar for each set. The same command again
    changes nothing.
    """
    shares = parse_fractions(fractions)
    from nla_jax import hub
    from nla_jax.build import Plan
    from nla_jax.build import build as make
    from nla_jax.sidecar import read_sidecar
    from nla_jax.tokenizer import Tokenizer

    place = Path(target).expanduser()
    tokenizer = Tokenizer.from_dir(place if place.is_dir() else hub.resolve(target, role="target"))
    av_template = ar_template = None
    if template_from is not None:
        given = read_sidecar(template_from)
        av_template, ar_template = given.av_template, given.ar_template
        marker = marker or given.marker
        injection_scale = given.injection_scale if injection_scale is None else injection_scale
    plan = Plan(
        av_template=av_template,
        ar_template=ar_template,
        marker=marker,
        injection_scale=injection_scale,
        layer=layer,
        fractions=shares,
        seed=seed,
        base_model=base_model,
    )
    with bar() as progress:
        built = make(
            store_path,
            tokenizer,
            plan,
            overwrite=overwrite,
            progress=None if progress is None else lambda done, total: progress("measuring", done, total),
        )
    info = built.info
    found = info["marker"]
    click.echo(f"marker          {found['char']} (token {found['id']}, {found['count']:,} times in the corpus)")
    click.echo(f"neighbours      {found['left_id']} and {found['right_id']}; the AR prompt ends with", nl=False)
    click.echo(f" {' '.join(map(str, info['ar_suffix_ids']))}")
    norms = info["norms"]
    quantiles = ", ".join(f"{float(q):.0%} {norms[q]:.4g}" for q in norms if q != "mean")
    click.echo(f"norms           mean {norms['mean']:.4g}; {quantiles}")
    click.echo(f"injection_scale {built.injection_scale:g}")
    click.echo(f"variance_nrm    {built.variance_nrm:.6f} over {info['training_rows']:,} training rows", nl=False)
    click.echo(f" (meannorm baseline {built.baseline_meannorm:.6f})")
    for name in built.sets:
        counts = info["sets"][name]
        left_out = ", ".join(f"{n:,} {_LEFT_OUT[why]}" for why, n in counts["dropped"].items() if n)
        click.echo(f"{name:<15} {counts['rows']:,} rows" + (f" ({left_out})" if left_out else ""))
    click.echo(f"wrote the training sets of {store_path}")


_LEFT_OUT = {"none": "without an explanation", "dropped": "whose explanation was dropped"}


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress callback (what, done, in all) with a bar on stderr where that is a terminal, else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(unit=" rows", unit_scale=True) as shown:

        def update(what: str, done: int, total: int) -> None:
            if shown.desc.removesuffix(": ") != what or shown.total != total:
                shown.reset(total)
                shown.set_description(what)
            shown.update(done - shown.n)

        yield update
