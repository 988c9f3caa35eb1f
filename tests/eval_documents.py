"""Rows whose vectors are a mini target's own: for the evaluations that put vectors back into it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from eval_cases import LAYER, D, rows

from nla_jax.evals.evalset import EvalSet
from nla_jax.evals.patching import load_target
from nla_jax.models.layers import embed, unembed
from nla_jax.models.transformer import residual, run_blocks
from nla_jax.pair import NLA

LENGTHS = (40, 25, 60, 33, 48, 52)
LONGEST = 72  # with what is written after a document


def read_documents(nla: NLA, per_document: int = 3, last: bool = True) -> EvalSet:
    """Six documents of random tokens, `per_document` rows each; `last`: the first document's last row ends it."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 2000, n).astype(np.int32) for n in LENGTHS]
    positions = [np.sort(rng.choice(np.arange(2, n - 1), per_document, replace=False)) for n in LENGTHS]
    if last:
        positions[0][-1] = LENGTHS[0] - 1
    padded = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for i, tokens in enumerate(documents):
        padded[i, : len(tokens)] = tokens
    stream = np.asarray(residual(nla.target.params(), padded, nla.target.cfg, LAYER))
    doc = np.repeat(np.arange(len(LENGTHS)), per_document)
    at = np.concatenate(positions)
    assert stream.shape[-1] == D
    return rows(
        len(doc),
        masked=0,
        vectors=stream[doc, at].astype(np.float32),
        docs=doc.astype(np.int32),
        doc_ids=[f"doc {d}" for d in doc.tolist()],
        positions=at.astype(np.int32),
        tokens=[documents[d] for d in doc.tolist()],
    )


def whole_passes(nla: NLA):
    """run(tokens, position, vector): log-probabilities [T, V], float64, of a whole pass over a document with the stream
    at a position overwritten."""
    cfg, params = load_target(nla.target)

    @jax.jit
    def run(tokens, position, vector):
        def edit(layer, x):
            here = (layer == LAYER) & (jnp.arange(x.shape[1]) == position)[None, :, None]
            return jnp.where(here, vector[None, None], x)

        x = run_blocks(params, embed(params, tokens[None], cfg), cfg, edit=edit)[0]
        return jax.nn.log_softmax(unembed(params, x, cfg))[0]

    def padded(tokens, position, vector):
        long = np.zeros(LONGEST, np.int32)
        long[: len(tokens)] = tokens
        return np.asarray(run(long, position, jnp.asarray(vector, jnp.float32)), np.float64)

    return padded
