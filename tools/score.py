"""`nla score`: how well texts reconstruct vectors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from nla_jax.errors import InputError
from nla_jax.tools import options as o
from nla_jax.tools.inputs import read_texts


@click.command()
@o.NEEDED_AR
@click.option("--texts", type=o.FILE, metavar="PATH", required=True, help=".txt (lines), .jsonl, .json, .parquet.")
@click.option("--vectors", type=o.FILE, metavar="PATH", required=True, help=".parquet, .npy or .npz; [N, D].")
@click.option("--column", metavar="NAME", help="Parquet column or npz entry. Default: activation_vector.")
@o.COMPUTE
@click.option("--json", "json_path", type=o.FILE, metavar="PATH", help="Scores per row and in all.")
@click.option("--parquet", "parquet_path", type=o.FILE, metavar="PATH", help="One row per text.")
def score(
    ar: str,
    texts: Path,
    vectors: Path,
    column: str | None,
    batch_size: int | None,
    dtype: str | None,
    variance: float | None,
    low_memory: bool,
    json_path: Path | None,
    parquet_path: Path | None,
) -> None:
    """Score explanations against the vectors of the same rows: mse_nrm, cosine, fve_nrm.

    \b
    Examples:
      nla score --ar AR --texts explained.parquet --vectors explained.parquet
      nla score --ar AR --texts explanations.txt --vectors vectors.npy --variance 0.7335
    """
    from nla_jax.tools import outputs, tables
    from nla_jax.tools.vectors import read_vectors

    o.check_variance(variance)
    o.check_files(texts, vectors)
    outputs.check_outputs([json_path, parquet_path], [texts, vectors, ar])
    rows = read_texts(texts)
    nla = o.open_pair(ar=ar, dtype=dtype, variance=variance, low_memory=low_memory)
    assert nla.ar is not None
    values, numbers = read_vectors(vectors, column=column, d_model=nla.ar.cfg.d_model)
    if len(rows) != len(values):
        raise InputError(
            "texts and vectors", expected="as many texts as vectors", got=f"{len(rows)} texts, {len(values)} vectors"
        )
    settings = {"texts": str(texts), "vectors": str(vectors), "column": column, "dtype": dtype}
    setup = o.setup_of("score", nla, {"ar": ar}, dtype, settings)
    scores = nla.score(rows, values, batch_size=batch_size)

    n = len(rows)
    mse, cosine = math.fsum(scores.mse_nrm) / n, math.fsum(scores.cosine) / n
    fve = None if setup.variance_nrm is None else 1 - mse / setup.variance_nrm
    total = {"n": n, "mse_nrm": mse, "cosine": cosine, "fve_nrm": fve}
    columns: dict[str, Any] = {"row": numbers, "text": rows, "mse_nrm": scores.mse_nrm, "cosine": scores.cosine}
    if scores.fve_nrm is not None:
        columns["fve_nrm"] = scores.fve_nrm
    listed = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    as_json = {**outputs.setup_json(setup), "summary": total, "scores": listed}
    outputs.write(json_path, lambda p: outputs.write_json(p, as_json), f"{n} rows")
    outputs.write(parquet_path, lambda p: outputs.write_rows_parquet(p, setup, columns), f"{n} rows")
    totals = f"n {n}, mse_nrm {mse:.4f}, cosine {cosine:.3f}, fve_nrm {tables.number(fve)}"
    tables.show(tables.score_table(list(numbers), rows, scores), [totals, tables.denominator_line(setup)])
