"""`nla demo`: makes a small pair with random weights and explains a text with it, as `nla explain` does."""

from __future__ import annotations

from pathlib import Path

import click

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
TEXT = "The lighthouse keeper counted the ships twice. One of them had no lights, and it was coming closer."
LAYER = 2


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="demo",
    show_default=True,
    help="Where models and results go; earlier ones are replaced.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of weights and sampling."
)
@click.option("--family", type=click.Choice(FAMILIES), default="qwen2", show_default=True, help="Architecture.")
@click.pass_context
def demo(ctx: click.Context, out: Path, seed: int, family: str) -> None:
    """Make a small target, AV and AR in --out and explain a text with them; a minute on a laptop.

    The weights are random, so the explanations are noise: what this shows is that everything is installed and runs,
    and what the table, the JSON and the page look like.

    \b
    Example:
      nla demo --out demo
    """
    from nla_jax.metrics import variance_nrm
    from nla_jax.pair import NLA
    from nla_jax.sidecar import read_sidecar
    from nla_jax.tools.explain import explain
    from nla_jax.tools.mini import make_mini

    pair = make_mini(out / "models", family=family, n_layers=4, layer=LAYER, seed=seed)
    click.echo(f"made {pair.target}, {pair.av} and {pair.ar} (random weights)", err=True)
    # fve_nrm needs the variance of a training set, and there was none: this text's own vectors take its place.
    vectors = NLA.from_pretrained(target=str(pair.target), layer=LAYER).activations(TEXT).vectors
    variance = variance_nrm(vectors, read_sidecar(pair.ar).need_mse_scale())
    page = out / "explanations.html"
    ctx.invoke(
        explain,
        text=TEXT,
        target=str(pair.target),
        av=str(pair.av),
        ar=str(pair.ar),
        max_new_tokens=24,
        seed=seed,
        variance=variance,
        json_path=out / "explanations.json",
        html_path=page,
    )
    click.echo(
        f"\nThe page is at {page}: open it in a browser.\n"
        "The weights are random, so these explanations are noise and their scores mean nothing; the models, the AV, "
        "the AR and the files are the same code that a real pair runs through. Check the set with:\n"
        f"  nla doctor {pair.target} {pair.av} {pair.ar}"
    )
