"""Text between the AV and the AR on the host: sampled tokens to explanations, explanations to AR prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nla_jax.models.config import ModelConfig
from nla_jax.models.sampler import Samples
from nla_jax.models.sharding import constrain_rows, on_its_mesh
from nla_jax.processes import of_all
from nla_jax.prompt import ar_prompt_ids, parse_explanation
from nla_jax.reconstructor import ARParams, reconstruct
from nla_jax.sidecar import Sidecar
from nla_jax.tokenizer import Tokenizer
from nla_jax.train.layout import ONE_DEVICE, Layout
from nla_jax.train.state import cast

_STEP = 8  # AR prompts are padded to a multiple of this many tokens


@dataclasses.dataclass(frozen=True)
class Texts:
    """Explanations of a rollout: `texts` (the raw text where `failed`), `failed` bool [B], `lengths` in tokens."""

    texts: list[str]
    failed: np.ndarray
    lengths: np.ndarray


def decode_texts(samples: Samples, tokenizer: Tokenizer, fetch: Callable[[Any], Any] = jax.device_get) -> Texts:
    """Fetches sampled tokens and parses them. Cut, untagged and empty explanations have failed.

    `fetch` says which rows of a batch on several processes: `Layout.local` or `Layout.whole`."""
    tokens, lengths, stopped = fetch((samples.tokens, samples.lengths, samples.stopped))
    texts, failed = [], np.zeros(len(tokens), bool)
    for i, (row, length, stop) in enumerate(zip(tokens, lengths, stopped, strict=True)):
        text, bad = parse_explanation(tokenizer.decode(row[: length - 1 if stop else length].tolist()), bool(stop))
        texts.append(text)
        failed[i] = bad or not text
    return Texts(texts, failed, np.asarray(lengths))


def ar_prompts(
    texts: list[str], tokenizer: Tokenizer, sidecar: Sidecar, width: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """AR prompts right-padded to at least `width` tokens and a multiple of 8: ids int32 [B, T], lengths int32 [B]."""
    prompts = [ar_prompt_ids(tokenizer, sidecar, text) for text in texts]
    lengths = np.asarray([len(p) for p in prompts], np.int32)
    width = -(-max(width, int(lengths.max(initial=0))) // _STEP) * _STEP
    ids = np.full((len(prompts), width), tokenizer.pad_id or 0, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


def ar_width(tokenizer: Tokenizer, sidecar: Sidecar, max_new_tokens: int) -> int:
    """Tokens that nearly every AR prompt of a sampled explanation fits into, so that one shape serves a whole run."""
    return len(ar_prompt_ids(tokenizer, sidecar, "")) + max_new_tokens


def widened(tokens: np.ndarray, pad_id: int, width: float) -> np.ndarray:
    """AR prompts padded further, to the width of another process's."""
    return np.pad(tokens, ((0, 0), (0, int(width) - tokens.shape[1])), constant_values=pad_id)


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg",))
def _predict(ar: ARParams, tokens: jax.Array, lengths: jax.Array, *, cfg: ModelConfig) -> jax.Array:
    return constrain_rows(reconstruct(ar, tokens, lengths, cfg))


_narrow = functools.partial(jax.jit, static_argnums=1)(cast)  # keeps an array's sharding


def make_reader(
    ar: ARParams,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    sidecar: Sidecar,
    *,
    batch_size: int,
    width: int,
    compute_dtype: str = "float32",
    layout: Layout = ONE_DEVICE,
    own: bool = False,
) -> Callable[[list[str]], np.ndarray]:
    """texts -> float32 [n, D], the AR's vectors, in batches of one shape over all devices.

    Every process calls it together with the others: with the same texts, or, with `own`, each with its own, which may
    be none."""
    ar = jax.tree.map(lambda x: x if x.dtype == compute_dtype else _narrow(x, compute_dtype), ar)
    batch_size = -(-batch_size // layout.shards) * layout.shards
    rows = layout.rows(batch_size)
    size = len(rows) if own else batch_size

    def read(texts: list[str]) -> np.ndarray:
        batches, widest = -(-len(texts) // size), width
        if own:
            ids, _ = ar_prompts(texts, tokenizer, sidecar, width)
            told = of_all({"batches": batches, "width": ids.shape[1]})
            batches, widest = int(told["batches"].max()), int(told["width"].max())
        out = [np.zeros((0, cfg.d_model), np.float32)]
        for first in range(0, batches * size, size):
            some = texts[first : first + size]
            filled = [*some, *([""] * (size - len(some)))]
            ids, lengths = ar_prompts(filled, tokenizer, sidecar, widest)
            if not own:
                ids, lengths = ids[rows], lengths[rows]
            predicted = _predict(ar, *layout.put((ids, lengths), batch_size), cfg=cfg)
            out.append((layout.local if own else layout.whole)(predicted)[: len(some)])
        return np.concatenate(out)

    return read
