"""`nla convert`: checkpoint directories between dtypes, formats and roles."""

from __future__ import annotations

import re

import click

from nla_jax.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> float:
    """Bytes of "5GB", "500MB", "1GiB" or a plain number; InputError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)?\s*", text, re.IGNORECASE)
    unit = (match[2] or "").upper() if match else "?"
    size = float(match[1]) * _UNITS[unit] if match and unit in _UNITS else 0.0
    if size < 1:
        raise InputError("--max-shard-size", expected="a size such as 5GB or 500MB", got=repr(text))
    return size


@click.command(
    epilog="\b\nExamples:\n"
    "  nla convert Qwen/Qwen2.5-7B-Instruct out/ar0 --role ar --layer 20 --sidecar out/av\n"
    "  nla convert kitft/nla-qwen2.5-7b-L20-av out/av-f32 --dtype float32\n"
    "  nla convert out/av out/av-orbax --to orbax\n"
    "  nla convert Qwen/Qwen2.5-7B-Instruct out/av --adapter run/av/export/av/adapter --sidecar run/av/export/av"
)
@click.argument("src")
@click.argument("dst", type=click.Path())
@click.option("--to", type=click.Choice(["hf", "orbax"]), default="hf", show_default=True, help="Format of DST.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Default: as stored.")
@click.option(
    "--role",
    type=click.Choice(["auto", "av", "ar", "model"]),
    default="auto",
    show_default=True,
    help="What DST is to be. `ar` of a model that is none makes an initial AR: K + 1 blocks and an identity head.",
)
@click.option("--layer", type=int, metavar="K", help="Where to cut an initial AR: after block K, counted from 0.")
@click.option("--sidecar", type=click.Path(exists=True), help="Take nla_meta.yaml from this directory or file.")
@click.option("--adapter", type=click.Path(exists=True), help="A PEFT directory: its LoRA is added to the weights.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="Weight files of DST are at most this large.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is not empty.")
def convert(
    src: str,
    dst: str,
    to: str,
    dtype: str | None,
    role: str,
    layer: int | None,
    sidecar: str | None,
    adapter: str | None,
    max_shard_size: str,
    overwrite: bool,
) -> None:
    """Convert the checkpoint SRC (a directory or a hub id) into the directory DST.

    Reads Hugging Face directories and Orbax directories that this command made; writes either. Tokenizer, chat
    template, generation config and sidecar go along. DST appears when it is complete, or not at all.
    """
    size = parse_size(max_shard_size)
    # Imported here: jax takes a second, and --help needs none of it.
    from nla_jax import hub
    from nla_jax.convert import convert_dir

    done = convert_dir(
        hub.resolve(src),
        dst,
        to=to,
        dtype=dtype,
        role=role,
        layer=layer,
        sidecar=sidecar,
        adapter=adapter,
        max_shard_bytes=size,
        overwrite=overwrite,
        bar=hub.progress_bar,
    )
    saved = done.saved
    files = f"{len(saved.files)} file{'s' if len(saved.files) != 1 else ''}" if to == "hf" else "Orbax"
    kind = {"av": "AV", "ar": "AR", "model": "model"}[done.role]
    click.echo(f"wrote {done.path}: {kind}, {done.cfg.family}, {done.cfg.n_layers} blocks, D = {done.cfg.d_model}")
    click.echo(f"  {saved.tensors} tensors, {saved.params:,} parameters, {done.dtype}, {saved.nbytes:,} bytes, {files}")
    if done.role == "ar":
        k = done.cfg.n_layers - 1
        names = f"model.layers[{k}], blocks.{k}.hook_resid_post, hidden_states[{k + 1}]"
        click.echo(f"  layer_index {k}: output of block {k}, {names}")
    if done.role != "model" and not done.sidecar:
        click.echo("  without nla_meta.yaml: none beside the source; explain and score will ask for it")
