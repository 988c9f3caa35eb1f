"""Speed and size of activation data on this machine, against PyTorch and pyarrow.

    python -m nla_jax.tools.bench_data [--quick] [--only extract,read,memory,size] [--json out.json]

* extract: documents to a finished store (`nla extract`: reading, tokenizing, loading the model, K + 1 blocks, writing)
  against a transformers program with a forward hook that does the same; random weights of the released Qwen2.5-7B
  shape at reduced width, 28 blocks, layer 20. Both on the same documents and positions, alternating, after one
  unmeasured run each; their vectors are compared first. Without torch only our half runs.
* read: rows per second of shuffled batches of 256 from the loader, against pyarrow on exports of the same rows in the
  same batches, each through the same prefetching threads. Every file is in the page cache.
* memory: peak of a process that reads one epoch of a small and of a large store.
* size: bytes per row on the disk, texts and tables included.
"""

from __future__ import annotations

import os

# Idle OpenMP threads that spin would slow whichever program runs next; both sides measure better without.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
import pyarrow.parquet as pq
import tokenizers
from rich.console import Console
from rich.table import Table

from nla_jax.corpus import open_corpus
from nla_jax.extract import Settings
from nla_jax.extract_run import extract
from nla_jax.loader import make_loader
from nla_jax.models import hf
from nla_jax.models.config import ModelConfig
from nla_jax.models.params import init_params
from nla_jax.store import Store
from nla_jax.tools.bench import LAYER, alternate, hf_config
from nla_jax.tools.bench_data_reads import export, pipeline, random_store, readers
from nla_jax.tools.options import some_of

BATCH, THREADS, PREFETCH = 256, 2, 4
MEASURED = ("extract", "read", "memory", "size")
C4 = Path(__file__).resolve().parents[2] / "shared" / "data" / "corpus" / "c4-train-00000-of-01637.parquet"
# The peak of this process alone: what getrusage gives begins with that of the process which started it.
_MEMORY = """
import re, sys
from nla_jax.loader import make_loader
from nla_jax.store import Store
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024
store = Store.open(sys.argv[1])
start = peak()
loader = make_loader(store, range(store.n_rows), kind="rl", batch_size=256, epochs=1)
rows = sum(int(batch["valid"].sum()) for batch in loader)
print(rows, start, peak())
"""


@click.command()
@click.option("--only", default=",".join(MEASURED), callback=some_of(*MEASURED), help="Which measurements to make.")
@click.option("--rows", default=100_000, help="Rows of the large store.")
@click.option("--small-rows", default=10_000, help="Rows of the small store.")
@click.option("--d-model", default=3584, help="Width of the stores' vectors.")
@click.option("--documents", default=60, help="Documents to extract from.")
@click.option("--max-tokens", default=512, help="Longer documents are cut.")
@click.option("--scale", default=8, type=click.Choice(["1", "2", "4", "8"]), help="Divide the model's widths by this.")
@click.option("--batch-tokens", default=2048, help="Padded tokens of an extraction batch, ours.")
@click.option("--torch-batch-tokens", default=2048, help="The same of the torch program.")
@click.option("--rounds", default=3, help="Measured runs per program; the median counts.")
@click.option("--torch/--no-torch", "use_torch", default=None, help="Compare with torch (default: if installed).")
@click.option("--quick", is_flag=True, help="Small sizes, one round: to see that it runs.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to put temporary files.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def main(
    only: list[str], quick: bool, folder: Path | None, json_path: Path | None, use_torch: bool | None, **sizes: Any
) -> None:
    """Measures extraction, reading, memory and size of activation data."""
    if quick:
        sizes.update(rows=2000, small_rows=1000, d_model=256, documents=4, max_tokens=96, rounds=1, batch_tokens=256)
    console = Console(width=None if Console().is_terminal else 120)
    report: dict[str, Any] = {"settings": {**sizes, "batch": BATCH, "threads": THREADS, "prefetch": PREFETCH}}
    report["load_average"] = os.getloadavg()
    with tempfile.TemporaryDirectory(dir=folder, prefix="nla_bench_") as name:
        place = Path(name)
        if "extract" in only:
            report["extract"] = measure_extract(place, use_torch, sizes)
        if {"read", "memory", "size"} & set(only):
            stores = {
                n: random_store(place / f"{n}", n, sizes["d_model"]) for n in (sizes["small_rows"], sizes["rows"])
            }
            large = stores[sizes["rows"]]
            if "memory" in only:
                report["memory"] = [measure_memory(store) for store in stores.values()]
            if {"read", "size"} & set(only):
                paths = export(large, place)
                if "read" in only:
                    report["read"] = measure_reads(large, paths, sizes["rounds"], 4 if quick else 200)
                if "size" in only:
                    report["size"] = measure_size(large, paths)
    for table in tables(report):
        console.print(table)
    if json_path:
        json_path.write_text(json.dumps(report, indent=1), encoding="utf-8")
        console.print(f"wrote {json_path}")


def corpus_texts(n: int) -> list[str]:
    """Web documents of some length where they are at hand, else made-up ones."""
    if C4.is_file():
        found = [t for t in pq.read_table(C4, columns=["text"]).column(0).to_pylist() if len(t) > 600]
        return list(itertools.islice(itertools.cycle(found), n)) if n > len(found) else found[:n]
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(2, 9)))) for _ in range(3000)]
    return [
        " ".join(words[i] for i in (3000 * rng.random(int(rng.integers(150, 700))) ** 2).astype(int)) for _ in range(n)
    ]


def small_model(path: Path, scale: int, texts: list[str]) -> dict[str, Any]:
    """A checkpoint of random weights with a BPE tokenizer made from the texts; returns its config.json."""
    config = hf_config(scale)
    cfg = ModelConfig.from_hf(config)
    hf.save_model(init_params(cfg, jax.random.key(0)), cfg, config, path)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=8192, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return config


def measure_extract(place: Path, use_torch: bool | None, sizes: dict[str, Any]) -> dict[str, Any]:
    """Seconds and tokens per second of both programs, from files to files."""
    peer = _peer(use_torch)
    texts = {f"d{i}": text for i, text in enumerate(corpus_texts(sizes["documents"]))}
    model, corpus = place / "model", place / "corpus.jsonl"
    small_model(model, int(sizes["scale"]), list(texts.values()))
    corpus.write_text("".join(json.dumps({"id": k, "text": v}) + "\n" for k, v in texts.items()), encoding="utf-8")
    settings = Settings(layers=(LAYER,), max_tokens=sizes["max_tokens"])
    numbers = itertools.count()

    def ours() -> Store:
        out = place / f"store{next(numbers)}"
        found = open_corpus(corpus)
        extract(model, found, out, settings, compute_dtype="float32", batch_tokens=sizes["batch_tokens"])
        return Store.open(out)

    start = time.perf_counter()
    store = ours()
    first = time.perf_counter() - start
    table = store.table()
    names = store.doc_ids(np.arange(store.n_docs))
    positions = {name: table["position"][table["doc"] == i] for i, name in enumerate(names)}
    tokens = sum(map(len, store.tokens(np.arange(store.n_docs))))
    theirs = None
    if peer is not None:

        def theirs() -> np.ndarray:
            options = {"layer": LAYER, "max_tokens": settings.max_tokens, "batch_tokens": sizes["torch_batch_tokens"]}
            return peer.extract(model, texts, positions, place / "vectors.npy", **options)

        a, b = store.vectors(slice(None)), theirs()
        error = float(np.abs(a - b).max() / np.abs(b).max())
        if not error < 1e-3:
            raise click.ClickException(f"the two programs disagree, relative error {error:.1e}; nothing was timed")
    mine, others = alternate(ours, theirs, sizes["rounds"])
    result = {"documents": store.n_docs, "tokens": tokens, "rows": store.n_rows, "first_s": first, "ours_s": mine}
    result["tokens_per_s"] = tokens / statistics.median(mine)
    if peer is not None:
        ratio = statistics.median(b / a for a, b in zip(mine, others, strict=True))
        result.update(torch_s=others, torch_tokens_per_s=tokens / statistics.median(others), ratio=ratio)
        result.update(torch=peer.VERSIONS, relative_error=error)
    return result


def _peer(use_torch: bool | None) -> Any:
    if use_torch is False:
        return None
    try:
        from nla_jax.tools import bench_data_torch
    except ImportError as error:
        if use_torch:
            raise click.ClickException(f"torch and transformers are not installed ({error})") from None
        return None
    return bench_data_torch


def measure_reads(store: Store, paths: dict[str, Path], rounds: int, n: int) -> list[dict[str, Any]]:
    """Rows per second of every way to read the loader's batches, `n` batches a round, the ways taking turns."""
    for path in [*paths.values(), *(p for p in Path(store.path).rglob("*") if p.is_file())]:
        with path.open("rb") as file:  # into the page cache
            while file.read(1 << 24):
                pass
    chosen = np.sort(np.random.default_rng(0).permutation(store.n_rows)[: n * BATCH])

    def loader() -> Iterator[Any]:
        settings = {"kind": "rl", "batch_size": BATCH, "epochs": 1, "threads": THREADS, "prefetch": PREFETCH}
        return make_loader(store, chosen, drop_remainder=True, **settings)  # type: ignore[arg-type]

    batches = [b["row"] for b in loader()]
    reads = {"store.vectors": store.vectors, **readers(paths, store.d_model)}
    counts = {"loader": len(batches)}
    for name, read in reads.items():
        np.testing.assert_array_equal(read(batches[0]), store.vectors(batches[0]), err_msg=name)
        start = time.perf_counter()
        read(batches[1])
        each = time.perf_counter() - start
        counts[name] = min(max(int(5 / each), 5), len(batches))  # a slow way need not read them all
    seconds: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(rounds):
        for name, count in counts.items():
            stream = loader() if name == "loader" else pipeline(reads[name], batches[:count], THREADS, PREFETCH)
            start = time.perf_counter()
            assert sum(1 for _ in stream) == count
            seconds[name].append((time.perf_counter() - start) / count)
    ours = seconds["loader"]
    out = []
    for name, times in seconds.items():
        ratio = statistics.median(b / a for a, b in zip(ours, times, strict=True))
        rate = BATCH / statistics.median(times)
        out.append({"name": name, "rows_per_s": rate, "ratio": ratio, "batches": counts[name], "seconds": times})
    return out


def measure_memory(store: Store) -> dict[str, Any]:
    """Peak resident memory of a process that reads every row once, before and after."""
    command = [sys.executable, "-c", _MEMORY, store.path]
    rows, start, peak = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    return {
        "rows": store.n_rows,
        "read": rows,
        "vectors": 4 * store.n_rows * store.d_model,
        "start": start,
        "peak": peak,
    }


def measure_size(store: Store, paths: dict[str, Path]) -> list[dict[str, Any]]:
    """Bytes per row of the store, its parts, and the exports."""

    def below(folder: Path) -> int:
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    root = Path(store.path)
    vectors = below(root / "vectors")
    sizes = {
        "vectors alone, raw float32": 4 * store.d_model * store.n_rows,
        "store, vectors": vectors,
        "store, everything": below(root),
        "parquet with the same columns (exchange format)": paths["parquet"].stat().st_size,
        "Arrow IPC, vectors alone": paths["arrow"].stat().st_size,
    }
    return [{"name": name, "bytes_per_row": size / store.n_rows} for name, size in sizes.items()]


def tables(report: dict[str, Any]) -> Iterator[Table]:
    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left")
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left")
        return made

    sizes = report["settings"]
    if "extract" in report:
        e = report["extract"]
        title = f"Extraction, {e['documents']} documents, {e['tokens']} tokens, {e['rows']} rows, block {LAYER} of 28"
        made = table(title, "program", "seconds", "tokens/s", "torch / nla_jax")
        ratio = f"{e['ratio']:.2f}x" if "ratio" in e else "-"
        made.add_row("nla_jax extract", f"{statistics.median(e['ours_s']):.1f}", f"{e['tokens_per_s']:.0f}", ratio)
        if "torch_s" in e:
            theirs = statistics.median(e["torch_s"])
            made.add_row(f"torch {e['torch']}, hook", f"{theirs:.1f}", f"{e['torch_tokens_per_s']:.0f}", "")
        yield made
    if "read" in report:
        title = (
            f"Shuffled reads, batches of {BATCH} of {sizes['rows']} rows, D = {sizes['d_model']}, float32, "
            f"{THREADS} threads, page cache warm"
        )
        made = table(title, "way", "rows/s", "GB/s", "loader / this")
        for r in report["read"]:
            rate = r["rows_per_s"]
            made.add_row(r["name"], f"{rate:.0f}", f"{4e-9 * sizes['d_model'] * rate:.2f}", f"{r['ratio']:.1f}x")
        yield made
    if "memory" in report:
        made = table("Peak memory of one epoch, MiB", "rows", "vectors", "before", "peak", "added")
        for r in report["memory"]:
            cells = (r["vectors"], r["start"], r["peak"], r["peak"] - r["start"])
            made.add_row(str(r["rows"]), *(f"{c / 2**20:.0f}" for c in cells))
        yield made
    if "size" in report:
        made = table("On the disk", "what", "bytes per row")
        for r in report["size"]:
            made.add_row(r["name"], f"{r['bytes_per_row']:.0f}")
        yield made


if __name__ == "__main__":
    main()
