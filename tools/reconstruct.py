"""`nla reconstruct`: explanations back to vectors."""

from __future__ import annotations

from pathlib import Path

import click

from nla_jax.errors import InputError
from nla_jax.tools import options as o
from nla_jax.tools.inputs import read_texts


@click.command()
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@o.NEEDED_AR
@click.option(
    "--file", type=o.FILE, metavar="PATH", help="Texts: .txt (lines), .jsonl, .json of nla explain, .parquet."
)
@click.option("--out", type=o.FILE, metavar="PATH", required=True, help=".npy, or .parquet (text, reconstruction).")
@o.COMPUTE
def reconstruct(
    texts: tuple[str, ...],
    ar: str,
    file: Path | None,
    out: Path,
    batch_size: int | None,
    dtype: str | None,
    variance: float | None,
    low_memory: bool,
) -> None:
    """Turn explanations (each TEXT, or a file of them) into vectors: the raw output of the AR's head, [N, D].

    Only the direction of a reconstruction means something: the AR is trained on normalised vectors.

    \b
    Examples:
      nla reconstruct "The text names a capital city." --ar AR --out vectors.npy
      nla reconstruct --file explained.json --ar AR --out vectors.parquet
    """
    from nla_jax.tools import outputs

    if bool(texts) == (file is not None):
        got = "both" if texts else "neither"
        raise InputError("what to reconstruct", expected="either TEXT or --file", got=got)
    if out.suffix.lower() not in (".npy", ".parquet"):
        raise InputError(f"{out}: --out", expected=".npy or .parquet", got=out.suffix or "no suffix")
    o.check_variance(variance)
    outputs.check_outputs([out], [file, ar])
    rows = list(texts) if file is None else read_texts(file)
    nla = o.open_pair(ar=ar, dtype=dtype, variance=variance, low_memory=low_memory)
    setup = o.setup_of("reconstruct", nla, {"ar": ar}, dtype, {"file": None if file is None else str(file)})
    vectors = nla.reconstruct(rows, batch_size=batch_size, progress=o.progress())
    if out.suffix.lower() == ".npy":
        write = lambda p: outputs.write_npy(p, vectors)  # noqa: E731
    else:
        write = lambda p: outputs.write_rows_parquet(p, setup, {"text": rows, "reconstruction": vectors})  # noqa: E731
    outputs.write(out, write, f"{vectors.shape[0]} x {vectors.shape[1]}, float32")
