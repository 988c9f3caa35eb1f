"""`nla verbalize`: activation vectors from a file in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from nla_jax.tools import options as o


@click.command()
@click.option("--vectors", type=o.FILE, metavar="PATH", required=True, help=".parquet, .npy or .npz; [N, D].")
@click.option("--column", metavar="NAME", help="Parquet column or npz entry. Default: activation_vector.")
@click.option("--rows", metavar="LIST", help='Such as "0:10" or "3,7,-1". Default: all.')
@o.AV
@o.AR
@o.SAMPLING
@o.COMPUTE
@o.OUTPUTS
def verbalize(
    vectors: Path,
    column: str | None,
    rows: str | None,
    av: str,
    ar: str | None,
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
    """Explain activation vectors: raw ones, as the target's block K gives them; the AV scales them itself.

    \b
    Examples:
      nla verbalize --vectors vectors.npy --rows 0:10 --av AV --ar AR
      nla verbalize --vectors explained.parquet --av AV --samples 4 --json out.json
    """
    from nla_jax.tools import outputs
    from nla_jax.tools.explain import write_report
    from nla_jax.tools.report import Report
    from nla_jax.tools.vectors import read_vectors

    o.check_sampling(samples, best_of, temperature, ar)
    o.check_variance(variance)
    o.check_files(vectors)
    outputs.check_outputs([json_path, parquet_path, html_path], [vectors, av, ar])
    nla = o.open_pair(av=av, ar=ar, dtype=dtype, variance=variance, low_memory=low_memory)
    assert nla.av is not None
    values, numbers = read_vectors(vectors, column=column, rows=rows, d_model=nla.av.cfg.d_model)
    settings = {
        "vectors": str(vectors),
        "column": column,
        "rows": rows,
        "samples": samples,
        "temperature": temperature,
        "best_of": best_of,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
        "low_memory": low_memory,
    }
    setup = o.setup_of("verbalize", nla, {"av": av, "ar": ar}, dtype, settings)
    found = nla.verbalize(
        values,
        samples=samples,
        temperature=temperature,
        best_of=best_of,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
        progress=o.progress(),
    )
    index = [e.row for e in found if e.row is not None]
    # What is shown and written counts the rows of the file.
    named = [dataclasses.replace(e, row=int(numbers[i])) for e, i in zip(found, index, strict=True)]
    write_report(Report(setup, named, values, index), json_path, parquet_path, html_path)
