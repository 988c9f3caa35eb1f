"""`nla extract`: residual-stream vectors of a corpus, into an activation store."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError, NLAError
from nla_jax.tools.options import note, progress
from nla_jax.tools.processes import PROCESSES, sharing

if TYPE_CHECKING:
    from tqdm import tqdm

    from nla_jax.corpus import Corpus

_COUNT = click.IntRange(min=1)


def parse_layers(text: str) -> tuple[int, ...]:
    """Layers from "20" or "10,20,30", ascending: rows do not depend on how they were listed."""
    try:
        return tuple(sorted(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError("--layer", expected="block numbers such as 20 or 10,20", got=repr(text)) from None


def parse_rows(text: str | None) -> slice | None:
    """A slice forward from the beginning, from "1000:2000" or ":500"."""
    if text is None:
        return None
    parts = text.split(":")
    try:
        numbers = [int(p) if p.strip() else None for p in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3):
        raise InputError("--rows", expected="a slice such as 0:1000", got=repr(text))
    return slice(*numbers)


@click.command(
    epilog="\b\nExamples:\n"
    "  nla extract docs.jsonl --target Qwen/Qwen2.5-7B-Instruct --layer 20 --out acts\n"
    "  nla extract chats.parquet --target T --layer 10,20 --out gs://bucket/acts --process 3 --processes 16"
)
@click.argument("corpus")
@click.option("--target", required=True, metavar="DIR_OR_ID", help="The model whose activations are read.")
@click.option("--layer", required=True, metavar="K[,K...]", help="Blocks whose output is kept, counted from 0.")
@click.option(
    "--out", required=True, metavar="STORE", help="A new directory or gs:// or s3:// URL, or one to go on with."
)
@click.option("--per-document", type=_COUNT, default=10, show_default=True, help="Positions drawn of each, at most.")
@click.option("--min-position", default=50, show_default=True, help="Positions before this one are not kept.")
@click.option("--max-tokens", type=_COUNT, default=1024, show_default=True, help="Longer documents are cut.")
@click.option("--seed", default=0, show_default=True, help="Of the draw of positions.")
@click.option("--store-dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of the model. Default: as stored; float32 on CPU.",
)
@click.option("--text-field", help="Column of the texts. Default: found by name.")
@click.option("--messages-field", help="Column of the chats. Default: found by name.")
@click.option("--id-field", help="Column of the document ids; `none` names documents by file and row.")
@click.option("--split", help="Of a dataset directory: train, test, ...")
@click.option("--rows", metavar="A:B", help="Only these rows of the corpus.")
@click.option(
    "--text-split", default="file", show_default=True, help="Cut text files: file, paragraph, lines or words:N."
)
@click.option(
    "--batch-tokens",
    type=_COUNT,
    default=2048,
    show_default=True,
    help="Padded tokens that a device gets at a time; fewer need less memory.",
)
@click.option(
    "--shard-rows",
    type=_COUNT,
    default=1024,
    show_default=True,
    help="Rows computed, written and recorded together: what a kill loses. Best N times as many with N devices.",
)
@click.option("--fsdp", type=_COUNT, default=1, show_default=True, help="Devices that the target is split over.")
@click.option("--tensor", type=_COUNT, default=1, show_default=True, help="Devices that heads and MLP are split over.")
@click.option("--process", type=click.IntRange(min=0), help="Of processes that only share the store: which this is.")
@click.option("--processes", type=_COUNT, help="How many they are; process 0 makes the index.")
@PROCESSES
def extract(
    corpus: str,
    target: str,
    layer: str,
    out: str,
    per_document: int,
    min_position: int,
    max_tokens: int,
    seed: int,
    store_dtype: str,
    dtype: str | None,
    text_field: str | None,
    messages_field: str | None,
    id_field: str | None,
    split: str | None,
    rows: str | None,
    text_split: str,
    batch_tokens: int,
    shard_rows: int,
    fsdp: int,
    tensor: int,
    process: int | None,
    processes: int | None,
    **joining: Any,
) -> None:
    """Read CORPUS with a model and store the residual-stream vectors of some of its tokens.

    CORPUS is a text file, JSONL, parquet, a Hugging Face dataset directory, a directory of such files, or
    hub:ORG/NAME; documents or chats. The same command again goes on where a killed one stopped.

    Several hosts run the same command: on TPU pods, in Slurm and in Kubernetes they find each other and each does its
    shards, or all do every one where --fsdp x --tensor is more devices than one of them has.
    """
    from nla_jax import hub
    from nla_jax.corpus import open_corpus
    from nla_jax.extract import Settings
    from nla_jax.extract_run import extract as run
    from nla_jax.models.sharding import MeshSettings
    from nla_jax.tools.report import layer_aliases

    layers = parse_layers(layer)
    settings = Settings(layers, seed, min_position, per_document, max_tokens)
    opened = open_corpus(
        corpus,
        text_field=text_field,
        messages_field=messages_field,
        id_field=id_field,
        split=split,
        rows=parse_rows(rows),
        text_split=text_split,
    )
    directory = hub.resolve(target, role="target")
    for k in layers:
        note(f"layer_index {k} = output of " + " = ".join(layer_aliases(k).values()))
    bars = _Bars()
    try:
        with sharing(process, processes, **joining) as (number, count):
            result = run(
                directory,
                opened,
                out,
                settings,
                name=None if Path(target).expanduser().is_dir() else target,
                compute_dtype=dtype,
                store_dtype=store_dtype,
                shard_rows=shard_rows,
                batch_tokens=batch_tokens,
                process=number,
                processes=count,
                split=MeshSettings(fsdp=fsdp, tensor=tensor),
                note=bars.note,
                indexed=bars.indexed,
                progress=bars.extracted,
            )
    except NLAError:
        bars.close()
        _report_skipped(opened.counts, opened)
        raise
    except KeyboardInterrupt:
        bars.close()
        note(_kept(out))
        raise
    bars.close()
    _report_skipped(result.counts, opened)
    place = shlex.quote(out)
    what = f"{out}: {result.n_rows} rows of {result.n_docs} documents"
    if not result.complete:
        click.echo(f"wrote {result.shards} shards of {what}; other processes have not finished theirs")
        return
    if result.shards:
        rate = f"{result.tokens} tokens in {result.seconds:.1f} s, {result.tokens / result.seconds:.0f} tokens/s"
        click.echo(f"wrote {what} ({rate})")
    else:
        click.echo(f"{what}: complete already, nothing to do")
    click.echo(f"next: nla data split {place}, then nla teach {place} lexical (or another teacher)")


def _report_skipped(counts: Mapping[str, int], corpus: Corpus) -> None:
    """How many documents gave no rows, by reason, and the first that were no documents at all."""
    names = {"too_short": "without a position to keep", "cut": "cut at the longest length read"}
    parts = [f"{n} {names.get(k, k.replace('_', ' '))}" for k, n in counts.items() if n and k != "documents"]
    if parts:
        note(f"corpus: {counts['documents']} documents read, " + ", ".join(parts))
    for problem in corpus.problems:
        note(f"  {problem}")


def _kept(out: str) -> str:
    """What an interrupted run leaves, in words."""
    from nla_jax.manifest import done_shards, shard_count
    from nla_jax.store import Store

    try:
        store = Store.open(out, complete=False)
    except NLAError:
        return "nothing was written yet"
    done = f"{len(done_shards(store.root))} of {shard_count(store.manifest)} shards"
    return f"{done} are kept in {out}; the same command again goes on from there"


class _Bars:
    """Progress on a terminal: documents while the corpus is read, then rows with tokens a second and time left."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def _open(self, **options: Any) -> tqdm:
        from tqdm import tqdm

        self.close()
        self._bar = tqdm(disable=not progress(), mininterval=0.5, **options)
        return self._bar

    def note(self, line: str) -> None:
        self.close()
        note(line)

    def indexed(self, documents: int) -> None:
        bar = self._bar if self._bar is not None else self._open(desc="reading", unit=" documents")
        bar.update(documents - bar.n)

    def extracted(self, done: int, total: int, tokens: int) -> None:
        bar = self._bar
        if bar is None or done == 0:
            bar = self._open(total=total, desc="extracting", unit=" rows")
        elapsed = bar.format_dict["elapsed"]
        if tokens and elapsed:
            bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
        bar.update(done - bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
