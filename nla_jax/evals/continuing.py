"""Texts that a target writes while its stream is pushed in a direction, and how likely they are without the push.

At the output of block K, at a position, h becomes h + |h| push; `everywhere`, the same happens at all later positions,
each with its own |h|. A push of zero changes no bit. The text before the position is read once and shared by all rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.evals.patching import Patcher
from nla_jax.extract import bucket
from nla_jax.models import hf
from nla_jax.models.cache import Prefix, empty_cache
from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import embed, unembed
from nla_jax.models.params import Params
from nla_jax.models.placing import on_host
from nla_jax.models.sampler import Samples, draw
from nla_jax.models.sharding import on_its_mesh
from nla_jax.models.transformer import prefix_of, run_blocks
from nla_jax.roles import Target

_TOKENS = 4096  # of the texts from the position on that a batch reads at most


@dataclass(frozen=True)
class Continuations:
    """`tokens`: ids written by each row, the stop token included; `stopped` bool [B]. `logprob` float64 [B]: the sum of
    their log-probabilities (temperature 1, nats) under the target without any push."""

    tokens: list[np.ndarray]
    stopped: np.ndarray
    logprob: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(t) for t in self.tokens], np.int64)

    @property
    def coherence(self) -> np.ndarray:
        """Mean log-probability per token, float64 [B]."""
        return self.logprob / self.lengths


def stop_ids(target: Target) -> tuple[int, ...]:
    """Every id that ends a text of the target; none for a model that names none."""
    eos = target.tokenizer.eos_id
    return tuple(sorted({*hf.stop_ids(target.path), *(() if eos is None else (eos,))}))


def read_text(patcher: Patcher, tokens: np.ndarray) -> Prefix:
    """Keys and values of a text, of all blocks."""
    padded = np.zeros(bucket(len(tokens)), np.int32)
    padded[: len(tokens)] = tokens
    return _read(patcher.params, padded, cfg=patcher.cfg)


def continuations(
    patcher: Patcher,
    read: Prefix,
    prompts_BxN: np.ndarray,
    positions_B: np.ndarray,
    push_BxD: np.ndarray,
    keys_B: jax.Array,
    *,
    temperature: float,
    max_new_tokens: int,
    stops: Sequence[int] = (),
    everywhere: bool = False,
) -> Continuations:
    """Up to `max_new_tokens` after each prompt: the text from its position on, N tokens of it, the first one pushed.

    What stands before the position is seen of `read`. Row b draws with `keys_B[b]` alone; temperature 0 is greedy."""
    B, N = prompts_BxN.shape
    keys_BxW = np.asarray(jax.random.key_data(keys_B))
    size = -(-max(1, min(64, _TOKENS // (N + max_new_tokens))) // patcher.step) * patcher.step
    tokens: list[np.ndarray] = []
    stopped: list[np.ndarray] = []
    logprob: list[np.ndarray] = []
    for first in range(0, B, size):
        rows = np.arange(first, min(first + size, B))
        at = np.concatenate([rows, np.repeat(rows[:1], -len(rows) % patcher.step)])
        prompts = patcher.rows(prompts_BxN[at].astype(np.int32))
        positions = patcher.rows(positions_B[at].astype(np.int32))
        written = _write(
            patcher.params,
            read,
            prompts,
            positions,
            patcher.rows(push_BxD[at].astype(np.float32)),
            patcher.rows(keys_BxW[at]),
            np.float32(temperature),
            cfg=patcher.cfg,
            layer=patcher.layer,
            everywhere=everywhere,
            stop_ids=tuple(stops),
            max_new_tokens=max_new_tokens,
        )
        likely = _likelihood(patcher.params, read, prompts, positions, written.tokens, cfg=patcher.cfg)
        found, lengths = on_host(written.tokens), on_host(written.lengths)
        each = on_host(likely).astype(np.float64) * (np.arange(max_new_tokens) < lengths[:, None])
        tokens += [found[i, : lengths[i]] for i in range(len(rows))]
        stopped.append(on_host(written.stopped)[: len(rows)])
        logprob.append(each.sum(axis=1)[: len(rows)])
    return Continuations(tokens, np.concatenate(stopped), np.concatenate(logprob))


_read = on_its_mesh(functools.partial(jax.jit, static_argnames=("cfg",))(prefix_of))


def _pushed(push_BxD: jax.Array, layer: int, here_T: np.ndarray) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A `run_blocks` edit: after block `layer`, x + |x| push at the positions `here`."""

    def edit(at: jax.Array, x: jax.Array) -> jax.Array:
        size = jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)
        moved = x + (size * push_BxD[:, None]).astype(x.dtype)
        return jnp.where((at == layer) & here_T[None, :, None], moved, x)

    return edit


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg", "layer", "everywhere", "stop_ids", "max_new_tokens"))
def _write(
    params: Params,
    read: Prefix,
    prompts_BxN: jax.Array,
    positions_B: jax.Array,
    push_BxD: jax.Array,
    keys_BxW: jax.Array,
    temperature: jax.Array,
    *,
    cfg: ModelConfig,
    layer: int,
    everywhere: bool,
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
) -> Samples:
    """`Samples` of the pushed target; its log-probabilities are those under the push."""
    B, N = prompts_BxN.shape
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)
    keys_B = jax.random.wrap_key_data(keys_BxW)
    after = _pushed(push_BxD, layer, np.ones(1, bool)) if everywhere else None

    def step(tokens_BxT, cache, start, edit):
        x = embed(params, tokens_BxT, cfg)
        options = {"prefix": read, "prefix_lengths": positions_B, "cache": cache, "start": start, "edit": edit}
        x, cache, _ = run_blocks(params, x, cfg, **options)
        return unembed(params, x[:, -1:], cfg)[:, 0], cache

    def body(state):
        i, logits, done, cache, tokens, logprobs, lengths = state
        token, logprob = draw(logits, keys_B, i, temperature)
        live = ~done
        token, logprob = jnp.where(live, token, 0), jnp.where(live, logprob, 0.0)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, i))
        logprobs = jax.lax.dynamic_update_slice(logprobs, logprob[:, None], (0, i))
        done |= jnp.any(token[:, None] == stops[None], axis=-1) & live
        logits, cache = step(token[:, None], cache, N + i, after)
        return i + 1, logits, done, cache, tokens, logprobs, lengths + live

    def more(state):
        return (state[0] < max_new_tokens) & ~jnp.all(state[2])

    cache = empty_cache(cfg, B, N + max_new_tokens, read.k.dtype)
    here = np.ones(N, bool) if everywhere else np.arange(N) == 0
    logits, cache = step(prompts_BxN, cache, 0, _pushed(push_BxD, layer, here))
    shape = (B, max_new_tokens)
    start = (jnp.int32(0), logits, jnp.zeros(B, bool), cache)
    empty = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(B, jnp.int32))
    _, _, done, _, tokens, logprobs, lengths = jax.lax.while_loop(more, body, (*start, *empty))
    return Samples(tokens=tokens, logprobs=logprobs, lengths=lengths, stopped=done)


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg",))
def _likelihood(params, read, prompts_BxN, positions_B, tokens_BxR, *, cfg):
    """Log-probabilities float32 [B, R] of written tokens after their prompts, nothing pushed."""
    N = prompts_BxN.shape[1]
    x = embed(params, jnp.concatenate([prompts_BxN, tokens_BxR], axis=1)[:, :-1], cfg)
    x = run_blocks(params, x, cfg, prefix=read, prefix_lengths=positions_B)[0][:, N - 1 :]

    def one(stream_and_token):
        stream, token_B = stream_and_token
        logs = jax.nn.log_softmax(unembed(params, stream[:, None], cfg)[:, 0])
        return jnp.take_along_axis(logs, token_B[:, None], axis=-1)[:, 0]

    return jax.lax.map(one, (jnp.moveaxis(x, 1, 0), tokens_BxR.T)).T
