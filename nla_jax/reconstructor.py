"""The AR as functions over parameters: tokenized explanations in, activation vectors out.

The AR is the target's first layer_index + 1 blocks, read at the last real token from the raw output of the last
block (no final norm), through a D x D map without bias that starts as the identity.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import embed, precision_of
from nla_jax.models.params import Params, ParamSpec, param_specs
from nla_jax.models.transformer import run_blocks

# Texts are padded to a multiple of this many tokens, so that a handful of shapes serves every batch.
LENGTH_STEP = 32


@struct.dataclass
class ARParams:
    """`trunk`: a `Params` without final norm and lm_head; `head`: [D, D], input-first."""

    trunk: Params
    head: Any


def ar_specs(cfg: ModelConfig) -> ARParams:
    """The declared parameters of an AR whose trunk is of `cfg`, as a tree of `ParamSpec`."""
    return ARParams(trunk=param_specs(cfg, head=False), head=ParamSpec((cfg.d_model,) * 2, ("embed", "reads")))


def init_head(d_model: int, dtype: Any = jnp.float32) -> jax.Array:
    """The identity: an untrained AR predicts the stream it reads, which is what makes its training stable."""
    return jnp.eye(d_model, dtype=dtype)


def reconstruct(
    ar: ARParams, tokens_BxT: jax.Array, lengths_B: jax.Array, cfg: ModelConfig, *, remat: str = "none"
) -> jax.Array:
    """Predicted vectors float32 [B, D] of right-padded prompts: the head applied at token lengths - 1."""
    x = run_blocks(ar.trunk, embed(ar.trunk, tokens_BxT, cfg), cfg, remat=remat)[0]
    last = jnp.take_along_axis(x, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return jnp.matmul(last, ar.head, precision=precision_of(last.dtype)).astype(jnp.float32)


reconstruct_jit = functools.partial(jax.jit, static_argnames=("cfg",))(reconstruct)


def pad_prompts(prompts: list[list[int]], pad_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads token lists to a common multiple of `LENGTH_STEP`: ids int32 [B, T] and lengths int32 [B]."""
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    width = -(-int(lengths.max()) // LENGTH_STEP) * LENGTH_STEP
    ids = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths
