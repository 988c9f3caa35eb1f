"""`nla data import` and `nla data export`: training sets in the reference's parquet format."""

from __future__ import annotations

from pathlib import Path

import click

from nla_jax.tools.build import bar
from nla_jax.tools.options import FILE, note


@click.command(
    name="import",
    epilog="\b\nExamples:\n"
    "  nla data import av_sft.parquet ar_sft.parquet rl.parquet --out out/store\n"
    "  nla data import rl.parquet --out out/store --av-tokenizer Qwen2.5-7B-Instruct",
)
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE.parquet...")
@click.option("--out", required=True, metavar="STORE", help="The store to write; nothing may be there yet.")
@click.option("--drop-overlap", is_flag=True, help="Leave documents of two sets in the first, instead of an error.")
@click.option("--av-tokenizer", type=FILE, metavar="DIR", help="Check the sidecars against this tokenizer.")
def import_(files: tuple[Path, ...], out: str, drop_overlap: bool, av_tokenizer: Path | None) -> None:
    """Read training sets (parquet, each with its .nla_meta.yaml) into a store, ready for training.

    The sets must share no document. Of rows that come without token ids, the ids are recorded as -1.
    """
    from nla_jax.exchange_import import import_sets
    from nla_jax.tokenizer import Tokenizer

    tokenizer = None if av_tokenizer is None else Tokenizer.from_dir(av_tokenizer.expanduser())
    with bar() as progress:
        built = import_sets(
            files,
            out,
            drop_overlap=drop_overlap,
            tokenizer=tokenizer,
            note=note,
            progress=progress or (lambda what, done, total: None),
        )
    for name in built.sets:
        click.echo(f"{name:<8} {built.info['sets'][name]['rows']:,} rows")
    shared = "no document id and no text is in two sets"
    click.echo(f"wrote {out}: {built.store.n_rows:,} rows of {built.store.n_docs:,} documents; {shared}")


@click.command(
    name="export",
    epilog="\b\nExamples:\n"
    "  nla data export out/store --set all --out sets\n"
    "  nla data export out/store --set av_sft --out av_sft.parquet",
)
@click.argument("store", metavar="STORE")
@click.option("--set", "name", type=click.Choice(["av_sft", "ar_sft", "rl", "all"]), default="all", show_default=True)
@click.option(
    "--out", required=True, type=FILE, metavar="DIR_OR_FILE", help="A directory, or NAME.parquet for one set."
)
@click.option("--no-text", is_flag=True, help="Leave out detokenized_text_truncated, the bulk of what is not vectors.")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
def export(store: str, name: str, out: Path, no_text: bool, overwrite: bool) -> None:
    """Write the training sets of STORE as parquet files with sidecars, as the PyTorch reference reads them."""
    from nla_jax.exchange import export_sets

    with bar() as progress:
        written = export_sets(
            store,
            name,
            out,
            overwrite=overwrite,
            with_text=not no_text,
            progress=None if progress is None else lambda done, total: progress("exporting", done, total),
        )
    for item in written:
        click.echo(f"wrote {item.path}: {item.rows:,} rows of {item.name}")
