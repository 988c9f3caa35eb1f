"""What a change of one residual vector does to the tokens that follow: exact, at the price of the later blocks alone.

Another vector as the output of block K at position p leaves the blocks up to K, and everything before p, as they were.
So a document is read once (`Patcher.read`: the stream after block K, and the keys and values of the later blocks), and
every variant runs only blocks K+1.. on positions p .. p+m-1, beside what was read before p. All variants of a document
share its keys and values: nothing is copied for each. Logits of the whole vocabulary exist for one offset at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from nla_jax.errors import InputError
from nla_jax.evals.batched import divided, everywhere, in_parts
from nla_jax.evals.evalset import EvalSet
from nla_jax.extract import bucket
from nla_jax.models import hf
from nla_jax.models.cache import Prefix
from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import embed, unembed
from nla_jax.models.params import Params
from nla_jax.models.placing import on_host
from nla_jax.models.sharding import on_its_mesh
from nla_jax.models.transformer import run_blocks
from nla_jax.roles import Target, default_dtype, writer_shardings

AFTER = 32  # tokens that are followed
_ROWS, _STEP = 64, 8  # rows of a batch at most, and the step in which it grows: few shapes are compiled


@struct.dataclass
class Reading:
    """A document as the target reads it, padded to T tokens.

    `stream` [T, D] after block K; `final` [T, D] after the last block, before the final norm; `keys`: keys and values
    of blocks K+1.., None where K is the last block."""

    stream: jax.Array
    final: jax.Array
    keys: Prefix | None


@dataclass(frozen=True)
class Effects:
    """Of each changed vector on the next m tokens, [B, m] each: offset t is the distribution over token p + 1 + t.

    `kl` float64, KL(reference || patched) in nats; `logprob` float64 of the document's true next token after the change
    and `logprob_reference` before it; `top` and `top_reference`: the most likely tokens."""

    kl: np.ndarray
    logprob: np.ndarray
    logprob_reference: np.ndarray
    top: np.ndarray
    top_reference: np.ndarray


def load_target(target: Target, mesh: Mesh | None = None) -> tuple[ModelConfig, Params]:
    """All blocks of the target and its head, as `Patcher` takes them: on a mesh that models are split over, in parts.
    `Target` itself holds the first K + 1, which are let go."""
    target.release()
    to = None
    if mesh is not None and in_parts(mesh):
        to = writer_shardings(ModelConfig.from_dir(target.path), mesh)
    return hf.load_model(target.path, target.dtype or default_dtype(target.path), shardings=to)


class Patcher:
    """A target, all blocks of it, whose stream can be changed at the output of block `layer` (0-based).

    `mesh`: devices that the rows of a batch are split over; of several processes all have to ask alike."""

    def __init__(self, cfg: ModelConfig, params: Params, layer: int, *, mesh: Mesh | None = None):
        if not 0 <= layer < cfg.n_layers:
            raise InputError("layer", expected=f"0..{cfg.n_layers - 1}", got=layer, fix="layers count from 0: block K")
        self.cfg, self.layer, self.mesh = cfg, layer, mesh
        self.params = everywhere(params, mesh)
        self.step = math.lcm(_STEP, 1 if mesh is None else mesh.size)

    def read(self, tokens: np.ndarray) -> Reading:
        """One clean pass over a document's token ids."""
        padded = np.zeros(bucket(len(tokens)), np.int32)
        padded[: len(tokens)] = tokens
        return _read(self.params, padded, cfg=self.cfg, layer=self.layer)

    def effects(
        self,
        reading: Reading,
        positions_B: np.ndarray,
        vectors_BxD: np.ndarray,
        following_BxM: np.ndarray,
        reference_BxD: np.ndarray | None = None,
    ) -> Effects:
        """What becomes of the next M tokens if the output of block `layer` at each position is each vector.

        `following` are the ids of the document's next tokens; where it ends before, anything: the offsets after its end
        mean nothing. The reference is the clean pass; or, at M = 1, final streams [B, D] from elsewhere."""
        B, M = following_BxM.shape
        assert reference_BxD is None or M == 1, "a reference from elsewhere is of one distribution"
        out: list[list[np.ndarray]] = []
        for first in range(0, B, max(_ROWS, self.step)):
            rows = np.arange(first, min(first + max(_ROWS, self.step), B))
            at = np.concatenate([rows, np.repeat(rows[:1], -len(rows) % self.step)])
            reference = None if reference_BxD is None else self.rows(reference_BxD[at].astype(np.float32))
            found = _effects(
                self.params,
                reading,
                self.rows(positions_B[at].astype(np.int32)),
                self.rows(vectors_BxD[at].astype(np.float32)),
                self.rows(following_BxM[at].astype(np.int32)),
                reference,
                cfg=self.cfg,
                layer=self.layer,
            )
            out.append([on_host(part)[: len(rows)] for part in found])
        kl, logprob, before, top, top_before = (np.concatenate(parts) for parts in zip(*out, strict=True))
        return Effects(kl.astype(np.float64), logprob.astype(np.float64), before.astype(np.float64), top, top_before)

    def logits(self, reading: Reading, position: int, vectors_BxD: np.ndarray, m: int) -> np.ndarray:
        """Logits float32 [B, m, V] of the next m tokens under each vector at a position."""
        at = np.full(len(vectors_BxD), position, np.int32)
        vectors = np.asarray(vectors_BxD, np.float32)
        return on_host(_logits(self.params, reading, at, vectors, cfg=self.cfg, layer=self.layer, m=m))

    def final(self, reading: Reading, positions: np.ndarray) -> np.ndarray:
        """The last block's output at some positions of a document, float32 [m, D]."""
        return on_host(reading.final)[positions].astype(np.float32)

    def rows(self, array: np.ndarray) -> jax.Array:
        """A batch on the devices; of a multiple of `step` rows."""
        return divided(array, self.mesh)


def documents(data: EvalSet, rows: np.ndarray, after: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token ids, rows) of each document of the rows; it is cut where nothing is needed for `after` tokens."""
    assert data.tokens is not None
    docs = data.docs[rows]
    for doc in dict.fromkeys(docs.tolist()):
        members = rows[docs == doc]
        tokens = np.asarray(data.tokens[int(members[0])])
        yield tokens[: int(data.positions[members].max()) + max(after, 1)], members


def following(data: EvalSet, rows: np.ndarray, after: int) -> tuple[np.ndarray, np.ndarray]:
    """The true next tokens int32 [m, after] of each row, 0 beyond the document's end, and bool of what there is."""
    assert data.tokens is not None
    ids = np.zeros((len(rows), after), np.int32)
    there = np.zeros((len(rows), after), bool)
    for i, row in enumerate(rows.tolist()):
        rest = np.asarray(data.tokens[row])[int(data.positions[row]) + 1 :][:after]
        ids[i, : len(rest)], there[i, : len(rest)] = rest, True
    return ids, there


# -- on the device ------------------------------------------------------------------------------------------------


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg", "layer"))
def _read(params: Params, tokens_T: jax.Array, *, cfg: ModelConfig, layer: int) -> Reading:
    stream = run_blocks(params, embed(params, tokens_T[None], cfg), cfg, n_layers=layer + 1)[0]
    if layer + 1 == cfg.n_layers:
        return Reading(stream[0], stream[0], None)
    final, kept, _ = run_blocks(params, stream, cfg, first_layer=layer + 1, keep_kv=True)
    assert kept is not None
    return Reading(stream[0], final[0], Prefix(k=kept.k[:, 0], v=kept.v[:, 0]))


def _branches(params, reading, positions_B, vectors_BxD, *, cfg, layer, m):
    """Final streams [B, m, D] at positions p .. p+m-1 under each vector at p, and the clean ones."""
    at = positions_B[:, None] + jnp.arange(m)[None]
    x = jnp.take(reading.stream, at, axis=0, mode="clip")
    x = jnp.concatenate([vectors_BxD[:, None].astype(x.dtype), x[:, 1:]], axis=1)
    if reading.keys is not None:
        x = run_blocks(params, x, cfg, first_layer=layer + 1, prefix=reading.keys, prefix_lengths=positions_B)[0]
    return x, jnp.take(reading.final, at, axis=0, mode="clip")


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg", "layer"))
def _effects(params, reading, positions_B, vectors_BxD, following_BxM, reference_BxD, *, cfg, layer):
    m = following_BxM.shape[1]
    patched, clean = _branches(params, reading, positions_B, vectors_BxD, cfg=cfg, layer=layer, m=m)
    if reference_BxD is not None:
        clean = reference_BxD[:, None].astype(patched.dtype)

    def offset(streams_and_token):
        p, q, token_B = streams_and_token
        log_p, log_q = (jax.nn.log_softmax(unembed(params, x[:, None], cfg)[:, 0]) for x in (p, q))
        # Both sum to 1. Term by term q - p + p log(p/q) >= 0: near equal distributions no digits are lost.
        kl = jnp.sum(jnp.exp(log_q) - jnp.exp(log_p) + jnp.exp(log_p) * (log_p - log_q), axis=-1)
        of_token = (jnp.take_along_axis(x, token_B[:, None], axis=-1)[:, 0] for x in (log_q, log_p))
        top = (jnp.argmax(x, axis=-1).astype(jnp.int32) for x in (log_q, log_p))
        return (jnp.maximum(kl, 0.0), *of_token, *top)

    by_offset = (jnp.moveaxis(clean, 1, 0), jnp.moveaxis(patched, 1, 0), following_BxM.T)
    return tuple(part.T for part in jax.lax.map(offset, by_offset))


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg", "layer", "m"))
def _logits(params, reading, positions_B, vectors_BxD, *, cfg, layer, m):
    return unembed(params, _branches(params, reading, positions_B, vectors_BxD, cfg=cfg, layer=layer, m=m)[0], cfg)
