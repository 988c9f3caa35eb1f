"""Tiny models and batches for the tests of the training steps, and gradients read off a step's result."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from families import CONFIGS, hf_weights, to_params
from reference import decoder

from nla_jax.models.config import ModelConfig
from nla_jax.models.params import truncate
from nla_jax.models.transformer import forward
from nla_jax.prompt import AVPrompt
from nla_jax.reconstructor import ARParams
from nla_jax.train.rl import RLConfig
from nla_jax.train.settings import OptimizerSettings
from nla_jax.train.state import create
from nla_jax.train.steps import ARConfig, AVConfig, StepConfig

D, V, SCALE = 32, 101, 12.0
ROWS, NEW = 16, 10  # rows of a batch, and tokens of a response at most
PROMPT = AVPrompt(ids=(5, 90, 17, 3, 44, 71, 8, 100, 33, 12, 64), marker=7)
TAIL = len(PROMPT.ids) - PROMPT.marker
STOPS = tuple(range(2, 14))  # so many that explanations of 10 tokens differ in length
_SMALL = {"hidden_size": D, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8, "vocab_size": V}
CASES = {
    # One block without a window and two with one, shorter than the prompt.
    "qwen2": {**CONFIGS["qwen2"], **_SMALL, "num_hidden_layers": 3, "max_window_layers": 1},
    # Two local blocks, then a global one; tied, normed twice, embeddings multiplied.
    "gemma3_text": {**CONFIGS["gemma3_text"], **_SMALL, "num_hidden_layers": 3, "tie_word_embeddings": True},
}
# With b1 = 0 and no clipping, the first moment after a step is that step's gradient. `skip_above` is out of the way.
PLAIN = OptimizerSettings(lr=1e-3, schedule="constant", warmup=0.0, b1=0.0, clip=0.0, skip_above=1e9, steps=10)
NORMS = (1e-2, 1e4)  # of vectors


def config(case: str = "qwen2", **changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**CASES[case], **changes})


@functools.cache
def params(case: str = "qwen2") -> Any:
    return to_params(hf_weights(CASES[case]))


@functools.cache
def ar_params(case: str = "qwen2") -> ARParams:
    """The first two blocks, and a head that is not the identity."""
    head = np.eye(D) + 0.2 * np.random.default_rng(5).normal(size=(D, D))
    return ARParams(trunk=truncate(params(case), 2), head=jnp.asarray(head, jnp.float32))


def state(tree: Any, optim: OptimizerSettings = PLAIN, dtype: Any = jnp.float32) -> Any:
    """A new training state of its own buffers: steps donate them."""
    return create(jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), tree), optim)


def lm_config(case: str = "qwen2", **changes: Any) -> StepConfig:
    return StepConfig(**{"model": config(case), "optim": PLAIN, "chunk": 16, **changes})


def ar_config(case: str = "qwen2", **changes: Any) -> ARConfig:
    given = {"model": config(case).truncated(2), "optim": PLAIN, "mse_scale": D**0.5, "norms": NORMS}
    return ARConfig(**{**given, **changes})


def av_config(case: str = "qwen2", **changes: Any) -> AVConfig:
    given = {"model": config(case), "optim": PLAIN, "chunk": 16, "prompt": PROMPT, "injection_scale": SCALE}
    return AVConfig(**{**given, "norms": NORMS, **changes})


def rl_config(case: str = "qwen2", accumulate: int = 1, av: Any = None, ar: Any = None, **changes: Any) -> RLConfig:
    av = av_config(case, accumulate=accumulate, **(av or {}))
    ar = ar_config(case, accumulate=accumulate, **(ar or {}))
    return RLConfig(**{"av": av, "ar": ar, "stop_ids": STOPS, "samples": 4, "max_new_tokens": NEW, **changes})


def vectors(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 1]).normal(size=(rows, D)).astype(np.float32) * 7


def tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 2]).integers(14, V, shape, dtype=np.int32)


def lm_batch(rows: int = 8, length: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows: one to three texts in a row, and padding."""
    batch = {"tokens": tokens((rows, length), seed), "segments": None, "positions": None}
    segments, positions = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int32)
    for b in range(rows):
        at = 0
        for number, size in enumerate([(length,), (7, 9), (4, 1, 11), (13,)][b % 4]):
            segments[b, at : at + size], positions[b, at : at + size] = number + 1, np.arange(size)
            at += size
    return {**batch, "segments": segments, "positions": positions}


def ar_batch(rows: int = ROWS, length: int = 18, seed: int = 0) -> dict[str, np.ndarray]:
    """Texts of 3 to `length` tokens; the last row is not valid, and of the others every fifth has failed."""
    lengths = np.random.default_rng([seed, 3]).integers(3, length + 1, rows, dtype=np.int32)
    batch = {"tokens": tokens((rows, length), seed), "lengths": lengths, "vectors": vectors(rows, seed)}
    weight = (np.arange(rows) % 5 != 3).astype(np.float32)
    return {**batch, "valid": np.arange(rows) < rows - 1, "weight": weight}


def av_batch(rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Prompts from their marker on and responses of 1 to 10 tokens; the last row is not valid."""
    length = TAIL + NEW
    ids = tokens((rows, length), seed)
    ids[:, :TAIL] = PROMPT.ids[PROMPT.marker :]
    lengths = TAIL + np.random.default_rng([seed, 4]).integers(1, NEW + 1, rows, dtype=np.int32)
    valid, at = np.arange(rows) < rows - 1, np.arange(length)[None]
    mask = (at >= TAIL) & (at < lengths[:, None]) & valid[:, None]
    return {"tokens": ids, "lengths": lengths, "loss_mask": mask, "vectors": vectors(rows, seed), "valid": valid}


def policy_rows(rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Samples as `policy_step` takes them, off-policy: the ratio is on both sides of the clip range. Two do not
    count."""
    rng = np.random.default_rng([seed, 5])
    lengths = rng.integers(1, NEW + 1, rows, dtype=np.int32)
    live = np.arange(NEW)[None] < lengths[:, None]
    batch = {
        "tokens": np.where(live, tokens((rows, NEW), seed), 0).astype(np.int32),
        "lengths": lengths,
        "advantages": rng.normal(size=rows).astype(np.float32),
        "weight": (np.arange(rows) % 8 != 5).astype(np.float32),
        "vectors": vectors(rows, seed),
    }
    own = np.asarray(whole_logprobs(params(), batch["tokens"], batch["vectors"], config()))
    for name in ("sampled", "reference"):
        batch[name] = np.where(live, own + 0.3 * rng.normal(size=own.shape), 0).astype(np.float32)
    return batch


def _whole(p: Any, responses: Any, v: Any, cfg: ModelConfig) -> Any:
    start = jnp.broadcast_to(jnp.asarray(PROMPT.ids, jnp.int32), (responses.shape[0], len(PROMPT.ids)))
    ids = jnp.concatenate([start, responses], axis=1).at[:, PROMPT.marker].set(cfg.vocab_size + jnp.arange(len(v)))
    wanted = SCALE * v / jnp.linalg.norm(v, axis=1, keepdims=True)
    table = jnp.concatenate([p.embed, wanted / cfg.d_model**0.5 if cfg.scale_embeddings else wanted])
    head = p.embed.T if p.lm_head is None else p.lm_head
    logp = jax.nn.log_softmax(forward(p.replace(embed=table, lm_head=head), ids, cfg)[:, len(PROMPT.ids) - 1 : -1])
    return jnp.take_along_axis(logp, responses[:, :, None], axis=-1)[:, :, 0]


@functools.partial(jax.jit, static_argnames=("cfg",))
def whole_logprobs(p: Any, responses: Any, v: Any, cfg: ModelConfig) -> Any:
    """Log-probabilities [B, R] of responses by one pass over each whole sequence: no shared prefix, no chunks.

    The vectors come in through the embedding table, one more row for each, so that nothing but `forward` is used."""
    return _whole(p, responses, v, cfg)


@functools.partial(jax.jit, static_argnames=("cfg",))
def whole_gradient(p: Any, responses: Any, v: Any, slope_BxR: Any, cfg: ModelConfig) -> Any:
    """The gradient of sum(slope * log-probability), the same way."""
    return jax.grad(lambda p: jnp.sum(_whole(p, responses, v, cfg) * slope_BxR))(p)


def exact_logprobs(case: str, responses: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The same in float64 and numpy alone."""
    weights, out = hf_weights(CASES[case]), np.zeros(responses.shape)
    for b, row in enumerate(responses):

        def inject(x: np.ndarray, b: int = b) -> np.ndarray:
            x = x.copy()
            x[PROMPT.marker] = SCALE * v[b].astype(np.float64) / np.linalg.norm(v[b].astype(np.float64))
            return x

        logits = decoder(weights, CASES[case], np.asarray([*PROMPT.ids, *row[:-1]]), embeddings=inject)[1]
        logits = logits[len(PROMPT.ids) - 1 :]
        top = logits.max(axis=-1, keepdims=True)
        logp = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        out[b] = np.take_along_axis(logp, row[:, None], axis=-1)[:, 0]
    return out


def policy_loss(
    logp: np.ndarray,
    batch: dict[str, np.ndarray],
    *,
    old: np.ndarray | None = None,
    clip: float = 0.2,
    beta: float = 0.01,
    kl: str = "k2",
    aggregate: str = "sample",
) -> tuple[float, np.ndarray]:
    """DESIGN section 6's loss of float64 log-probabilities, and its slope [B, R], sample by sample."""
    old = batch["sampled"].astype(np.float64) if old is None else old
    total, slope = 0.0, np.zeros(logp.shape)
    rows = [b for b in range(len(logp)) if batch["weight"][b]]
    tokens = sum(int(batch["lengths"][b]) for b in rows)
    for b in rows:
        a, n = float(batch["advantages"][b]), int(batch["lengths"][b])
        weight = 1 / tokens if aggregate == "token" else 1 / n / len(rows)
        for t in range(n):
            rho = np.exp(logp[b, t] - old[b, t])
            clipped = rho > 1 + clip if a > 0 else rho < 1 - clip
            total -= weight * a * ((1 + clip if a > 0 else 1 - clip) if clipped else rho)
            slope[b, t] -= 0 if clipped else weight * a * rho
            d = float(batch["reference"][b, t]) - logp[b, t]
            total += weight * beta * (d * d / 2 if kl == "k2" else np.exp(d) - d - 1)
            slope[b, t] += weight * beta * (-d if kl == "k2" else 1 - np.exp(d))
    return total, slope


def sft_loss(logp: np.ndarray, batch: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """Mean cross-entropy of an AV batch's scored tokens, and its slope."""
    mask = batch["loss_mask"][:, TAIL:].astype(np.float64)
    return float(-(logp * mask).sum() / mask.sum()), -mask / mask.sum()


def gradient(after: Any) -> Any:
    """The gradient of the step that led to a state under `PLAIN`."""
    return optax.tree_utils.tree_get(after.opt, "mu")


def far(got: Any, expected: Any) -> float:
    """The largest deviation of a leaf over that leaf's largest entry; the worst of all leaves.

    A leaf that is nothing but rounding (a key's bias before any rotation) counts against a millionth of the tree."""
    a, b = (jax.tree.leaves(jax.tree.map(lambda x: np.asarray(x, np.float64), t)) for t in (got, expected))
    assert [x.shape for x in a] == [x.shape for x in b] and all(np.isfinite(x).all() for x in a)
    most = max(np.abs(x).max() for x in b)
    return float(max(np.abs(x - y).max() / max(np.abs(y).max(), 1e-6 * most) for x, y in zip(a, b, strict=True)))


def same(got: Any, expected: Any) -> bool:
    """Bit for bit."""
    a, b = jax.tree.leaves(got), jax.tree.leaves(expected)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )
