"""Text between the AV and the AR on the host: sampled tokens to explanations, explanations to AR prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.models.config import ModelConfig
from nla_jax.models.sampler import Samples
from nla_jax.prompt import ar_prompt_ids, parse_explanation
from nla_jax.reconstructor import ARParams, reconstruct_jit
from nla_jax.sidecar import Sidecar
from nla_jax.tokenizer import Tokenizer
from nla_jax.train.state import cast

_STEP = 8  # AR prompts are padded to a multiple of this many tokens


@dataclasses.dataclass(frozen=True)
class Texts:
    """Explanations of a rollout: `texts` (the raw text where `failed`), `failed` bool [B], `lengths` in tokens."""

    texts: list[str]
    failed: np.ndarray
    lengths: np.ndarray


def decode_texts(samples: Samples, tokenizer: Tokenizer) -> Texts:
    """Fetches sampled tokens and parses them. Cut, untagged and empty explanations have failed."""
    tokens, lengths, stopped = jax.device_get((samples.tokens, samples.lengths, samples.stopped))
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
    width = -(-max(width, int(lengths.max())) // _STEP) * _STEP
    ids = np.full((len(prompts), width), tokenizer.pad_id or 0, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


def ar_width(tokenizer: Tokenizer, sidecar: Sidecar, max_new_tokens: int) -> int:
    """Tokens that nearly every AR prompt of a sampled explanation fits into, so that one shape serves a whole run."""
    return len(ar_prompt_ids(tokenizer, sidecar, "")) + max_new_tokens


def make_reader(
    ar: ARParams,
    cfg: ModelConfig,
    tokenizer: Tokenizer,
    sidecar: Sidecar,
    *,
    batch_size: int,
    width: int,
    compute_dtype: str = "float32",
) -> Callable[[list[str]], np.ndarray]:
    """texts -> float32 [n, D], the AR's vectors, in batches of one shape."""
    ar = jax.jit(cast, static_argnums=1)(ar, compute_dtype)

    def read(texts: list[str]) -> np.ndarray:
        out = []
        for first in range(0, len(texts), batch_size):
            some = texts[first : first + batch_size]
            filled = [*some, *([""] * (batch_size - len(some)))]
            ids, lengths = ar_prompts(filled, tokenizer, sidecar, width)
            predicted = reconstruct_jit(ar, jnp.asarray(ids), jnp.asarray(lengths), cfg)
            out.append(np.asarray(jax.device_get(predicted))[: len(some)])
        return np.concatenate(out)

    return read
