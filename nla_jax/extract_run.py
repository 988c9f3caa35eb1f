"""`extract`: a corpus and a target model to a finished activation store, by one process or several.

First the index: the corpus is read and tokenized and positions are chosen, which settles all rows. Then the vectors,
a shard of rows at a time. Any process may be killed at any moment; the same call again goes on with the shards that
are not recorded yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from nla_jax.corpus import Corpus, tokenize_document
from nla_jax.errors import CheckpointError, InputError, NLAError, PromptError, StoreError
from nla_jax.extract import Settings, choose_positions, eligible_positions, shard_vectors
from nla_jax.hub import progress_bar
from nla_jax.manifest import StoreSpec, index_exists
from nla_jax.models import hf
from nla_jax.models.config import ModelConfig, text_part
from nla_jax.models.params import Params, param_specs
from nla_jax.models.safetensors_io import DTYPES, Checkpoint
from nla_jax.models.sharding import MeshSettings, make_mesh, shardings
from nla_jax.processes import of_first
from nla_jax.roles import default_dtype
from nla_jax.store import Store
from nla_jax.store_write import IndexedDocument, ShardWriter, create_index
from nla_jax.tokenizer import Tokenizer

_SAMPLE_BYTES = 4096  # of each tensor, for the fingerprint of the weights
WHOLE = MeshSettings()  # a copy of the target on every device


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What one process did. `n_rows`, `n_docs` and `counts` (documents read and skipped, by reason) are of the whole
    store; `shards` were computed here, from `tokens` tokens (padding not counted) in `seconds`."""

    n_rows: int
    n_docs: int
    counts: Mapping[str, int]
    shards: int
    tokens: int
    seconds: float
    complete: bool


def extract(
    target: Path,
    corpus: Corpus,
    out: str | Path,
    settings: Settings,
    *,
    name: str | None = None,
    compute_dtype: str | None = None,
    store_dtype: str = "float32",
    shard_rows: int = 1024,
    batch_tokens: int = 2048,
    process: int = 0,
    processes: int = 1,
    split: MeshSettings = WHOLE,
    wait_seconds: float = 3600.0,
    note: Callable[[str], None] = lambda line: None,
    indexed: Callable[[int], None] = lambda documents: None,
    progress: Callable[[int, int, int], None] = lambda rows_done, rows, tokens: None,
) -> Extraction:
    """Writes, or goes on writing, the store `out`.

    `target` is a model directory, called `name` in the store (its own name by default); its first max(layers) + 1
    blocks are read. Process 0 makes the index, the others wait for it; process p of P computes shards p, p + P, ...
    With several local devices each batch is split over them, and the target as `split` says; `batch_tokens` are the
    padded tokens that one of them gets at a time. Where one process's devices are too few for `split`, all processes
    (of `jax.distributed`) compute every shard together, and p writes shards p, p + P, ... `indexed(documents)` is
    called while the corpus is read, `progress` while vectors are computed.
    Raises an NLAError naming the first setting in which an existing store differs.
    """
    _check(settings, shard_rows, batch_tokens, process, processes)
    full = _model(target, settings)
    tokenizer = Tokenizer.from_dir(target)
    dtype = str(hf.as_dtype(compute_dtype or default_dtype(target)))
    rows = {k: v for k, v in dataclasses.asdict(settings).items() if k != "layers"}
    spec = StoreSpec(
        d_model=full.d_model,
        layers=settings.layers,
        model={
            "name": name or target.absolute().name,
            "config_sha256": hashlib.sha256((target / "config.json").read_bytes()).hexdigest(),
            "weights": weights_fingerprint(target),
            "n_layers": full.n_layers,
        },
        tokenizer={"fingerprint": tokenizer.fingerprint},
        settings={**rows, "compute_dtype": dtype, "batch_tokens": batch_tokens},
        corpus=corpus.identity,
        dtype=store_dtype,
        shard_rows=shard_rows,
    )
    if not index_exists(out):
        if process == 0:
            note("reading and tokenizing the corpus")
            documents = _documents(corpus, tokenizer, settings, full.vocab_size, indexed)
            create_index(out, spec, documents, counts=corpus.counts)
        else:
            _wait_for_index(out, wait_seconds, note)
    writer = ShardWriter(out, spec)
    store = Store.open(out, complete=False)
    mesh = _mesh(split)
    jointly = mesh is not None and len(mesh.local_devices) < mesh.size
    pending = of_first(writer.pending(0, 1)) if jointly else writer.pending(process, processes)
    mine = [shard for shard in pending if not jointly or shard % processes == process]
    seconds, tokens = 0.0, 0
    if pending:
        shards = f"{len(pending)} of {writer.n_shards} shards to do"
        alone = processes > 1 and not jointly
        note(f"{store.n_rows} rows of {store.n_docs} documents, {shards}" + (" here" if alone else ""))
        cfg, params = _load(target, dtype, max(settings.layers) + 1, mesh)
        start = time.monotonic()
        tokens = _compute(writer, store, pending, mine, params, cfg, settings, batch_tokens, mesh, progress)
        seconds = time.monotonic() - start
    counts = store.manifest["corpus"]["counts"]
    return Extraction(store.n_rows, store.n_docs, counts, len(mine), tokens, seconds, writer.finish())


def weights_fingerprint(path: Path) -> str:
    """sha256 over the name, dtype, shape and a few thousand bytes from the middle of every tensor of a checkpoint.

    Not over all bytes: reading 100 GB to name them would take longer than many an extraction."""
    checkpoint = Checkpoint(path)
    digest = hashlib.sha256()
    for key in sorted(checkpoint.keys):
        info = checkpoint.info(key)
        if info is None or info.dtype not in DTYPES:
            continue
        digest.update(f"{key}\0{info.dtype}\0{info.shape}\0".encode())
        with info.file.open("rb") as file:
            file.seek(info.offset + max(info.nbytes - _SAMPLE_BYTES, 0) // 2)
            digest.update(file.read(min(info.nbytes, _SAMPLE_BYTES)))
    return digest.hexdigest()


def _model(target: Path, settings: Settings) -> ModelConfig:
    """The target's config, once its blocks and its longest sequence are known to be enough."""
    cfg = ModelConfig.from_dir(target)
    for layer in settings.layers:
        if not 0 <= layer < cfg.n_layers:
            raise InputError("layer", expected=f"0 to {cfg.n_layers - 1} (the target's blocks)", got=layer)
    longest = text_part(json.loads((target / "config.json").read_text(encoding="utf-8"))).get("max_position_embeddings")
    if isinstance(longest, int) and settings.max_tokens > longest:
        expected = f"at most {longest}, the max_position_embeddings of the target"
        raise InputError("max_tokens", expected=expected, got=settings.max_tokens)
    return cfg


def _mesh(split: MeshSettings = WHOLE) -> Mesh | None:
    """This process's devices, or those of all processes where these are too few for `split`; None if there is one."""
    devices = jax.local_devices()
    enough = (split.fsdp or 1) * split.tensor <= len(devices)
    return make_mesh(split, devices if enough else jax.devices())


def _load(target: Path, dtype: str, n_layers: int, mesh: Mesh | None) -> tuple[ModelConfig, Params]:
    to = None
    if mesh is not None:
        trunk = ModelConfig.from_dir(target).truncated(n_layers)
        to = shardings(param_specs(trunk, head=False), trunk, mesh)
    with progress_bar("reading target") as bar:
        return hf.load_model(target, dtype, n_layers=n_layers, head=False, shardings=to, progress=bar)


def _documents(
    corpus: Corpus, tokenizer: Tokenizer, settings: Settings, vocab_size: int, indexed: Callable[[int], None]
) -> Iterator[IndexedDocument]:
    for number, document in enumerate(corpus, 1):
        indexed(number)
        try:
            tokens = tokenize_document(document, tokenizer, settings.max_tokens)
        except PromptError as error:
            corpus.skip(document.doc_id, "refused", str(error))
            continue
        if tokens.ids.size and tokens.ids.max() >= vocab_size:
            what = f"document {document.doc_id!r}: token {tokens.ids.max()}"
            expected = f"under {vocab_size} (vocab_size in the target's config.json)"
            raise CheckpointError(what, expected=expected, fix="the tokenizer files that belong to this model")
        eligible = eligible_positions(tokens.roles, tokens.special, settings.min_position)
        positions = choose_positions(document.doc_id, eligible, settings.per_document, settings.seed)
        yield IndexedDocument(document.doc_id, tokens.text, tokens.ids, tokens.roles, tokens.text_end, positions)


def _compute(
    writer: ShardWriter,
    store: Store,
    pending: list[int],
    mine: list[int],
    params: Params,
    cfg: ModelConfig,
    settings: Settings,
    batch_tokens: int,
    mesh: Mesh | None,
    progress: Callable[[int, int, int], None],
) -> int:
    """Computes the pending shards and writes those that are `mine`; returns how many tokens ran. One shard is written
    while the next is computed."""
    total = sum(b - a for a, b in map(writer.rows, pending))
    rows = tokens = 0

    def count(more_rows: int, more_tokens: int) -> None:
        nonlocal rows, tokens
        rows, tokens = rows + more_rows, tokens + more_tokens
        progress(rows, total, tokens)

    progress(0, total, 0)
    # Leaving the block waits for the shard that is being written, also when the user interrupts.
    with ThreadPoolExecutor(1) as pool:
        writing: Future[None] | None = None
        for shard in pending:
            a, b = writer.rows(shard)
            positions, documents = _work(store, settings.layers, a, b)
            try:
                vectors = shard_vectors(
                    params,
                    cfg,
                    positions,
                    documents.__getitem__,
                    first_row=a,
                    n_rows=b - a,
                    layers=settings.layers,
                    per_document=settings.per_document,
                    batch_tokens=batch_tokens,
                    mesh=mesh,
                    done=count,
                )
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                fix = f"a new store with --batch-tokens {max(batch_tokens // 4, 1)} or a smaller --max-tokens"
                raise InputError("out of memory", got=f"batches of {batch_tokens} tokens", fix=fix) from None
            if shard not in mine:
                continue
            if writing is not None:
                writing.result()
            writing = pool.submit(writer.write_shard, shard, vectors)
        if writing is not None:
            writing.result()
    return tokens


def _work(
    store: Store, layers: tuple[int, ...], a: int, b: int
) -> tuple[list[tuple[int, int, int]], dict[int, np.ndarray]]:
    """The (row, document, position) behind rows a to b, row being that of the first layer, and documents' tokens.

    A shard may begin or end between two layers of one position; such a position is computed for both shards."""
    table = store.table(slice(a, b))
    numbers = {layer: i for i, layer in enumerate(layers)}
    first = np.arange(a, b) - np.array([numbers[k] for k in table["layer"].tolist()])
    rows, at = np.unique(first, return_index=True)
    positions = list(zip(rows.tolist(), table["doc"][at].tolist(), table["position"][at].tolist(), strict=True))
    docs = np.unique(table["doc"])
    return positions, dict(zip(docs.tolist(), store.tokens(docs), strict=True))


def _wait_for_index(out: str | Path, wait_seconds: float, note: Callable[[str], None]) -> None:
    note("waiting for process 0 to make the index")
    give_up = time.monotonic() + wait_seconds
    while True:
        try:
            if index_exists(out):
                return
        except NLAError:  # seen while it was being written to an object store
            if time.monotonic() > give_up:
                raise
        if time.monotonic() > give_up:
            fix = "process 0 first, on the same --out"
            raise StoreError(f"{out} has no index after {wait_seconds:.0f} s", expected="process 0's", fix=fix)
        time.sleep(0.5)


def _check(settings: Settings, shard_rows: int, batch_tokens: int, process: int, processes: int) -> None:
    least = (("min_position", 0), ("per_document", 1), ("max_tokens", 1))
    for name, value, low in (
        *((n, getattr(settings, n), low) for n, low in least),
        ("shard_rows", shard_rows, 1),
        ("batch_tokens", batch_tokens, 1),
        ("processes", processes, 1),
    ):
        if value < low:
            raise InputError(name, expected=f"at least {low}", got=value)
    if not settings.layers or len(set(settings.layers)) != len(settings.layers):
        raise InputError("layers", expected="one or more different blocks", got=list(settings.layers))
    if not 0 <= process < processes:
        raise InputError("process", expected=f"0 to {processes - 1}", got=process)
    if settings.max_tokens <= settings.min_position:
        got = f"max_tokens {settings.max_tokens}, min_position {settings.min_position}"
        raise InputError("no position can be kept", expected="max_tokens above min_position", got=got)
