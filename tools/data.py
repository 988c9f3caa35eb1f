"""`nla data`: looks after activation stores."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError
from nla_jax.tools.cli import _debug_option

if TYPE_CHECKING:
    from nla_jax.store import Store

STORE = click.argument("store", metavar="STORE")
_EXCHANGE = "nla_jax.tools.exchange"  # holds the commands `import` and `export`


class DataGroup(click.Group):
    """The group; two of its commands live in a module of their own, imported when one of them is invoked."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        there = importlib.util.find_spec(_EXCHANGE) is not None
        return [*self.commands, *(("import", "export") if there else ())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name in self.list_commands(ctx):
            module = importlib.import_module(_EXCHANGE)
            command = next(c for c in vars(module).values() if isinstance(c, click.Command) and c.name == cmd_name)
        if command is not None and not any("--debug" in param.opts for param in command.params):
            command.params.append(_debug_option())
        return command


@click.group(name="data", cls=DataGroup, context_settings={"help_option_names": ["-h", "--help"]})
def data() -> None:
    """Look at, check, merge and split activation stores.

    A store is a directory that `nla extract` wrote, or its gs:// or s3:// URL.

    \b
    Examples:
      nla data info out/store
      nla data check out/store
      nla data split out/store --fractions 0.25,0.25,0.5
    """


@data.command()
@STORE
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def info(store: str, as_json: bool) -> None:
    """Print what a store holds and where it comes from.

    \b
    Example:
      nla data info out/store
    """
    from nla_jax.store import EXPLANATIONS, Store

    opened = Store.open(store, complete=False)
    explanations = opened.root.read_json(EXPLANATIONS)
    if as_json:
        content = {**opened.manifest, "done": _done(opened), "explanations": explanations, "splits": opened.splits}
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    for name, value in _facts(opened, explanations):
        click.echo(f"{name:14}{value}")


def _facts(store: Store, explanations: Any) -> Iterator[tuple[str, str]]:
    m = store.manifest
    size = store.root.local
    model = m["model"]
    done, shards = _done(store)
    yield "store", f"{store.path} ({m['status']}, {done} of {shards} shards)"
    yield "rows", f"{store.n_rows:,} of {store.n_docs:,} documents, D = {store.d_model}, {m['dtype']}"
    for k in store.layers:
        names = f"model.layers[{k}], blocks.{k}.hook_resid_post, hidden_states[{k + 1}]"
        yield "layer", f"{k}: output of block {k}, {names}"
    depth = f", {model['n_layers']} blocks" if model.get("n_layers") else ""
    yield "model", f"{model.get('name')}{depth}"
    counts = {k: v for k, v in m["corpus"].get("counts", {}).items() if v}
    yield "corpus", f"{m['corpus'].get('name')}: " + ", ".join(f"{v:,} {k}" for k, v in counts.items())
    yield "settings", ", ".join(f"{k} {json.dumps(v)}" for k, v in sorted(m["settings"].items()))
    if size is not None:
        total = sum(p.stat().st_size for p in size.rglob("*") if p.is_file())
        yield "size", f"{total:,} bytes, {total / store.n_rows:,.0f} a row"
    if explanations is not None:
        who = " ".join(str(explanations[k]) for k in ("provider", "model") if explanations.get(k))
        counts = explanations["counts"]
        yield (
            "explanations",
            f"{counts['ok']:,} ({counts['dropped']:,} dropped, {counts['none']:,} none) {who}".rstrip(),
        )
    if store.splits is not None:
        yield "splits", _split_line(store.splits)
    yield "hash", m["hash"]


def _done(store: Store) -> tuple[int, int]:
    from nla_jax.manifest import done_shards, shard_count

    return len(done_shards(store.root)), shard_count(store.manifest)


def _split_line(splits: dict[str, Any]) -> str:
    from nla_jax.store import SPLITS

    parts = [f"{name} {splits[name]['docs']:,} documents ({splits[name]['rows']:,} rows)" for name in SPLITS]
    return ", ".join(parts)


@data.command()
@STORE
@click.pass_context
def check(ctx: click.Context, store: str) -> None:
    """Read all of a store and verify it: shapes, hashes, offsets, finite vectors, splits.

    Exits with 0 when it is sound, 1 when something is wrong (one line each), 2 when it cannot be opened.

    \b
    Example:
      nla data check out/store
    """
    from nla_jax.store import Store

    opened = Store.open(store, complete=False)
    with _bar("checking", "shard") as progress:
        problems = opened.check(progress)
    for problem in problems:
        click.echo(f"problem: {problem}")
    done, shards = _done(opened)
    state = "" if opened.complete else f" so far ({done} of {shards} shards; nla extract goes on with it)"
    size = f"{opened.n_rows:,} rows of {opened.n_docs:,} documents"
    n = len(problems)
    click.echo(f"{store}: {size}, " + (f"{n} problem{'s' if n > 1 else ''}" if n else f"sound{state}"))
    ctx.exit(1 if problems else 0)


@data.command()
@STORE
@click.option("-n", "count", type=click.IntRange(min=1), default=10, show_default=True, help="Rows to show.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, with whole texts.")
def head(store: str, count: int, as_json: bool) -> None:
    """Show the first rows: document, position, token, norm, the text before, the explanation.

    \b
    Example:
      nla data head out/store -n 3
    """
    from nla_jax.manifest import ROLES
    from nla_jax.store import Store

    rows = Store.open(store, complete=False).head(count)
    if as_json:
        for row in rows:
            click.echo(json.dumps({**row, "role": ROLES[row["role"]]}, ensure_ascii=False))
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from nla_jax.tools.tables import NONE, norm, show
    from nla_jax.tools.tokens import printable

    explained = any(row["explanation"] is not None for row in rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("row", "pos", "K", "|h|"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("document", max_width=24, overflow="ellipsis", no_wrap=True)
    table.add_column("role", no_wrap=True)
    table.add_column("text up to the token", ratio=1, min_width=24, overflow="fold")
    if explained:
        table.add_column("explanation", ratio=1, min_width=24, overflow="fold")
    for row in rows:
        numbers = [str(row["row"]), str(row["position"]), str(row["layer"]), norm(row["norm"])]
        tail = " ".join(printable(row["prefix"][-80:]).split())
        cells = [*numbers, printable(row["doc_id"]), ROLES[row["role"]], tail]
        if explained:
            cells.append(printable(row["explanation"] or NONE))
        table.add_row(*map(Text, cells))
    show(table, [])


@data.command()
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("--out", required=True, metavar="STORE", help="The store to write; nothing may be there yet.")
def merge(stores: tuple[str, ...], out: str) -> None:
    """Write the concatenation of stores of one model and the same layers.

    \b
    Example:
      nla data merge out/part1 out/part2 --out out/all
    """
    from nla_jax.store_merge import merge as merge_stores

    with _bar("merging", "row") as progress:
        manifest = merge_stores(stores, out, progress)
    click.echo(f"wrote {out}: {manifest['n_rows']:,} rows of {manifest['n_docs']:,} documents")


def _fractions(text: str) -> dict[str, float]:
    from nla_jax.store import SPLITS

    parts = text.split(",")
    try:
        return dict(zip(SPLITS, map(float, parts), strict=True))
    except ValueError:
        expected = "three numbers such as 0.25,0.25,0.5 (av_sft, ar_sft, rl)"
        raise InputError("--fractions", expected=expected, got=repr(text)) from None


@data.command()
@STORE
@click.option("--fractions", default="0.25,0.25,0.5", show_default=True, help="Of the documents: AV SFT, AR SFT, RL.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same split of a document everywhere.")
@click.option("--out", metavar="DIR", help="Write each split as a store of its own too: DIR/av_sft and so on.")
def split(store: str, fractions: str, seed: int, out: str | None) -> None:
    """Divide a store by document into the AV SFT, AR SFT and RL sets, and prove that they share none.

    A document's set depends on its id and the seed alone, so it is the same in every store that holds the document;
    documents with equal texts go together.

    \b
    Example:
      nla data split out/store --seed 0
    """
    shares = _fractions(fractions)
    from nla_jax.store_merge import split_store
    from nla_jax.store_splits import write_splits

    written = write_splits(store, shares, seed)
    click.echo(f"{store}: {_split_line(written)}")
    click.echo(f"disjoint: no document id and no text is in two splits ({written['equal_texts']:,} repeated texts)")
    if out is not None:
        with _bar("writing", "row") as progress:
            places = split_store(store, out, progress)
        for place in places.values():
            click.echo(f"wrote {place}")


@contextmanager
def _bar(label: str, unit: str) -> Iterator[Any]:
    """A progress callback (done, in all) with a bar on stderr where that is a terminal, else None."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=label, unit=f" {unit}s", unit_scale=True) as bar:

        def update(done: int, total: int) -> None:
            if bar.total != total:
                bar.reset(total)
            bar.update(done - bar.n)

        yield update
