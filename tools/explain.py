"""`nla explain`: tokens of a text or a chat in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nla_jax.errors import InputError
from nla_jax.tools import options as o
from nla_jax.tools.inputs import check_marker, parse_indices, read_source

if TYPE_CHECKING:
    from nla_jax.pair import NLA
    from nla_jax.tools.report import Report


@click.command()
@click.argument("text", required=False)
@o.TARGET
@o.AV
@o.AR
@click.option("--file", type=o.FILE, metavar="PATH", help="Explain the text of a UTF-8 file.")
@click.option("--chat", type=o.FILE, metavar="PATH", help='Explain a chat: JSON, [{"role": ..., "content": ...}, ...].')
@click.option("--positions", metavar="LIST", help='Such as "10,-1,30:40". Default: all tokens but special ones.')
@click.option(
    "--layer", type=click.IntRange(min=0), metavar="K", help="The output of block K, where no sidecar names K."
)
@click.option("--allow-marker", is_flag=True, help="Explain a text although it holds the AV's marker character.")
@o.SAMPLING
@o.COMPUTE
@o.OUTPUTS
def explain(
    text: str | None,
    target: str,
    av: str,
    ar: str | None,
    file: Path | None,
    chat: Path | None,
    positions: str | None,
    layer: int | None,
    allow_marker: bool,
    samples: int,
    temperature: float,
    best_of: int | None,
    max_new_tokens: int,
    seed: int,
    batch_size: int | None,
    dtype: str | None,
    variance: float | None,
    low_memory: bool,
    json_path: Path | None,
    parquet_path: Path | None,
    html_path: Path | None,
) -> None:
    """Explain the tokens of TEXT, of a file, or of a chat ("-" reads TEXT from standard input).

    The target reads the text; for each position the AV puts the activation after block K into words, and the AR,
    where there is one, reads the words back: cosine and fve_nrm say how much of the activation they hold.

    \b
    Examples:
      nla explain "The capital of France is" --positions -1 --samples 4 \\
        --target Qwen/Qwen2.5-7B-Instruct --av kitft/nla-qwen2.5-7b-L20-av \\
        --ar kitft/nla-qwen2.5-7b-L20-ar
      nla explain --chat chat.json --target T --av AV --ar AR --html page.html --json out.json
    """
    from nla_jax.tools import outputs

    o.check_sampling(samples, best_of, temperature, ar)
    o.check_variance(variance)
    outputs.check_outputs([json_path, parquet_path, html_path], [file, chat, target, av, ar])
    source = read_source(text, file, chat)

    nla = o.open_pair(av=av, ar=ar, target=target, dtype=dtype, layer=layer, variance=variance, low_memory=low_memory)
    assert nla.av is not None and nla.target is not None
    if not allow_marker:
        check_marker(source, nla.av.sidecar.marker)
    ids = nla.tokenize(source)
    chosen = None if positions is None else parse_indices(positions, len(ids))
    settings: dict[str, Any] = {
        "positions": positions,
        "samples": samples,
        "temperature": temperature,
        "best_of": best_of,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
        "low_memory": low_memory,
    }
    setup = o.setup_of("explain", nla, {"target": target, "av": av, "ar": ar}, dtype, settings)
    _note_layer(nla, layer)

    found = nla.activations(source, chosen)
    explanations = nla.explain(
        source,
        activations=found,
        samples=samples,
        temperature=temperature,
        best_of=best_of,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        progress=o.progress(),
    )

    from nla_jax.tools.report import Report
    from nla_jax.tools.tokens import message_spans, token_views

    report = Report(
        setup=setup,
        explanations=explanations,
        vectors=found.vectors,
        index=[e.row for e in explanations if e.row is not None],
        source=source,
        tokens=token_views(nla.target.tokenizer, found.token_ids),
        messages=() if isinstance(source, str) else message_spans(nla.target.tokenizer, source, found.token_ids),
    )
    write_report(report, json_path, parquet_path, html_path)


def write_report(report: Report, json_path: Path | None, parquet_path: Path | None, html_path: Path | None) -> None:
    """Writes the files first, then the table: a reader who closes the pipe early loses nothing."""
    from nla_jax.tools import outputs, tables
    from nla_jax.tools.page import write_page

    count = f"{len(report.explanations)} explanation" + ("s" if len(report.explanations) != 1 else "")
    outputs.write(json_path, lambda p: outputs.write_json(p, outputs.report_json(report)), count)
    outputs.write(parquet_path, lambda p: outputs.write_report_parquet(p, report), count)
    outputs.write(html_path, lambda p: write_page(p, report), count)
    tables.show(tables.explanation_table(report), tables.summary_lines(report))


def _note_layer(nla: NLA, layer: int | None) -> None:
    assert nla.av is not None
    trained = nla.av.sidecar.layer_index
    if layer is not None and trained is not None and layer != trained:
        if nla.ar is not None:
            raise InputError("--layer", expected=f"{trained} (this pair's)", got=layer, fix="leaving --layer out")
        o.note(f"the AV was trained on layer_index {trained}; explanations of {layer} may mean little")
