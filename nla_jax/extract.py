"""Text in, activations out: which tokens of a corpus are kept, and their residual-stream vectors.

Positions are chosen by an RNG keyed on (seed, doc_id), so that the same rows come out whatever the slicing, order or
number of processes. Vectors are computed a shard at a time: a shard's documents are batched among themselves, so that
batches never depend on what ran before, and only the target's first max(layers) + 1 blocks run, on the tokens up to
the last position that is kept of each document.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nla_jax.manifest import ROLES
from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import embed
from nla_jax.models.params import Params
from nla_jax.models.placing import on_host, put
from nla_jax.models.sharding import row_sharding, row_shards, under
from nla_jax.models.transformer import run_blocks

TEMPLATE_ROLE = ROLES.index("template")  # tokens that a chat template wrote, not a participant
# Padded lengths: each costs a compilation, and steps of a quarter to a half cost 10% of padding.
_LENGTHS = (64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 3072, 4096, 6144, 8192)
_LONG = 4096  # beyond the table, multiples of this


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the rows: part of the store's manifest, and refused if it changes on resume.

    `layers`: 0-based, the output of block K each. `min_position`: tokens before it are not kept (early positions
    carry little). `per_document`: positions drawn per document at most. `max_tokens`: longer documents are cut."""

    layers: tuple[int, ...]
    seed: int = 0
    min_position: int = 50
    per_document: int = 10
    max_tokens: int = 1024


def choose_positions(doc_id: str, eligible: np.ndarray, per_document: int, seed: int) -> np.ndarray:
    """Up to `per_document` of the eligible positions, without replacement, ascending; depends on (seed, doc_id) only.

    The smallest of one raw 64-bit draw per position: NumPy promises the raw stream of a bit generator to stay the
    same between versions, which it does not for `choice`."""
    digest = hashlib.sha256(f"{seed}\0{doc_id}".encode("utf-8", "surrogatepass")).digest()
    draws = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(len(eligible))
    return np.sort(np.asarray(eligible)[np.argsort(draws, kind="stable")[:per_document]])


def eligible_positions(roles_T: np.ndarray, special_T: np.ndarray, min_position: int) -> np.ndarray:
    """Positions from `min_position` on whose token is neither special nor written by a chat template."""
    keep = ~np.asarray(special_T, bool) & (np.asarray(roles_T) != TEMPLATE_ROLE)
    keep[:min_position] = False
    return np.flatnonzero(keep)


def bucket(length: int) -> int:
    """The padded length of a sequence: a short list of lengths keeps the number of compiled programs small."""
    for size in _LENGTHS:
        if length <= size:
            return size
    return -(-length // _LONG) * _LONG


def plan(lengths: Sequence[int], batch_tokens: int, devices: int = 1) -> list[tuple[int, int, list[int]]]:
    """Batches as (padded length T, rows B, indices into `lengths`), with as few padded tokens as possible.

    B is the same for every batch of one T: `batch_tokens` for each device, one row at least. Sequences are taken in
    order of length, the longest first, so that too large a batch shows at once. One may be padded further than it
    needs if that fills a batch: of 100 web documents, 85% of the padded tokens are then real, against 73% with each
    padded to the next T."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])  # stable: equal lengths keep the store's order
    n = len(order)
    # For the first i sequences: the fewest padded tokens, and the batch that they end with.
    cost: list[float] = [0, *[float("inf")] * n]
    last: list[tuple[int, int, int]] = [(0, 0, 0)] * (n + 1)
    for start, i in enumerate(order):
        T = bucket(lengths[i])
        B = max(batch_tokens // T, 1) * devices
        end = min(start + B, n)
        if cost[start] + B * T < cost[end]:
            cost[end], last[end] = cost[start] + B * T, (start, T, B)
    batches = []
    while n:
        start, T, B = last[n]
        batches.append((T, B, order[start:n]))
        n = start
    return batches[::-1]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Right-padded tokens [B, T], the positions [B, P] to keep of each row, and where they go.

    `row[b, p]` is the store row of position p of document b, or -1 for padding; with several layers, that of the
    first layer, the others following it. `n_tokens` counts tokens without padding."""

    tokens: np.ndarray
    positions: np.ndarray
    row: np.ndarray
    n_tokens: int


def batches(
    rows: Sequence[tuple[int, int, int]],
    tokens_of: Callable[[int], np.ndarray],
    *,
    per_document: int,
    batch_tokens: int,
    devices: int = 1,
) -> Iterator[Batch]:
    """The batches of one shard. `rows` are (store row, document, position), one entry per position, in store order.

    Their P is `per_document` (T at most) whatever the shard holds, so that every shard runs the same programs."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    for row, doc, position in rows:
        wanted.setdefault(doc, []).append((position, row))
    docs = list(wanted)
    lengths = [max(p for p, _ in wanted[doc]) + 1 for doc in docs]
    for T, B, chosen in plan(lengths, batch_tokens, devices):
        P = min(per_document, T)
        batch = Batch(
            np.zeros((B, T), np.int32),
            np.zeros((B, P), np.int32),
            np.full((B, P), -1, np.int64),
            sum(lengths[i] for i in chosen),
        )
        for b, i in enumerate(chosen):
            kept = wanted[docs[i]]
            batch.tokens[b, : lengths[i]] = tokens_of(docs[i])[: lengths[i]]
            batch.positions[b, : len(kept)] = [p for p, _ in kept]
            batch.row[b, : len(kept)] = [r for _, r in kept]
        yield batch


@functools.partial(jax.jit, static_argnames=("cfg", "layers"))
def gather(
    params: Params, tokens_BxT: jax.Array, positions_BxP: jax.Array, *, cfg: ModelConfig, layers: tuple[int, ...]
) -> jax.Array:
    """Residual vectors [B, P, len(layers), D] in float32; only the kept positions ever leave the forward pass."""
    B, P = positions_BxP.shape
    wanted = jnp.asarray(layers)

    def keep(layer: jax.Array, x: jax.Array, kept: jax.Array) -> jax.Array:
        picked = jnp.take_along_axis(x, positions_BxP[:, :, None], axis=1).astype(jnp.float32)
        return jnp.where((wanted == layer)[None, None, :, None], picked[:, :, None], kept)

    blank = jnp.zeros((B, P, len(layers), cfg.d_model), jnp.float32)
    return run_blocks(params, embed(params, tokens_BxT, cfg), cfg, n_layers=max(layers) + 1, tap=(keep, blank))[2]


def shard_vectors(
    params: Params,
    cfg: ModelConfig,
    rows: Sequence[tuple[int, int, int]],
    tokens_of: Callable[[int], np.ndarray],
    *,
    first_row: int,
    n_rows: int,
    layers: tuple[int, ...],
    per_document: int,
    batch_tokens: int,
    mesh: Mesh | None = None,
    done: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The vectors float32 [n_rows, D] of store rows first_row .. first_row + n_rows - 1.

    `rows` lists every position any of whose layers falls into that range. Under a `mesh` each batch is split over it;
    if it spans processes, all of them call this alike. `done(rows, tokens)` is called as batches finish. One batch is
    computed while the host prepares the next."""
    out = np.zeros((n_rows, cfg.d_model), np.float32)
    filled = np.zeros(n_rows, bool)
    devices = row_shards(mesh)

    def collect(batch: Batch, vectors: jax.Array) -> None:
        found = on_host(vectors)
        b, p = np.nonzero(batch.row >= 0)
        count = 0
        for i in range(len(layers)):
            at = batch.row[b, p] + i - first_row
            inside = (at >= 0) & (at < n_rows)
            out[at[inside]] = found[b[inside], p[inside], i]
            filled[at[inside]] = True
            count += int(inside.sum())
        if done is not None:
            done(count, batch.n_tokens)

    running: tuple[Batch, jax.Array] | None = None
    for batch in batches(rows, tokens_of, per_document=per_document, batch_tokens=batch_tokens, devices=devices):
        split = None if mesh is None else row_sharding(mesh, len(batch.tokens))
        tokens, positions = put(batch.tokens, split), put(batch.positions, split)
        with under(mesh):
            started = batch, gather(params, tokens, positions, cfg=cfg, layers=layers)
        if running is not None:
            collect(*running)
        running = started
    if running is not None:
        collect(*running)
    assert filled.all(), f"{(~filled).sum()} of {n_rows} rows were not computed"
    return out
