"""What the programs of a step have to do: FLOPs and bytes, counted from shapes.

Only matrix products count, a multiplication and an addition as two. A backward pass does twice the products of its
forward pass; with LoRA not those for the gradients of frozen weights. (The adapters' own products are left out: at
rank 16, under a hundredth.) `Work.useful` counts what the method needs: no padding, nothing recomputed, and of
attention the keys that a query may see. `Work.computed` is what the programs do: padded rows, samples decoded to the
length cap, blocks recomputed in the backward pass as `remat` says, and logits always (train/logprobs.py).
`Work.moved` are the bytes that one chip cannot but read or write for it: weights once per pass, optimizer states,
caches, and the inputs and outputs of the products of each block.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.models.config import ModelConfig

# Of a parameter's update: parameter, gradient and two moments are read, all but the gradient written; float32.
_UPDATE_BYTES = 28.0


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of a sample. `prompt` and `marker`: of the AV prompt, and before its marker; `ar_prompt`: of the AR's
    prompt around an explanation; `response`: of a response on average, tags and end-of-turn counted; `tags`: those."""

    prompt: int = 125
    marker: int = 111
    ar_prompt: int = 21
    response: int = 125
    tags: int = 20

    @property
    def tail(self) -> int:
        """Prompt tokens from the marker on."""
        return self.prompt - self.marker

    @property
    def ar_text(self) -> int:
        """Tokens that the AR reads of an average response."""
        return self.ar_prompt + max(self.response - self.tags, 1)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs on all chips together, and bytes moved on one."""

    useful: float = 0.0
    computed: float = 0.0
    moved: float = 0.0


@dataclasses.dataclass(frozen=True)
class Split:
    """How a program is spread: `rows` shards of the batch, `tensor` shards of the products, `chips` in all."""

    rows: int = 1
    tensor: int = 1
    chips: int = 1


def block_size(cfg: ModelConfig) -> int:
    """Scalars in the matrices of one block."""
    D, H = cfg.d_model, cfg.head_dim
    return D * H * (2 * cfg.n_heads + 2 * cfg.n_kv_heads) + 3 * D * cfg.d_ff


def head_size(cfg: ModelConfig) -> int:
    """Scalars in the vocabulary projection."""
    return cfg.d_model * cfg.vocab_size


def forward(cfg: ModelConfig, tokens: float, keys: float, logits: float = 0.0) -> float:
    """FLOPs of `tokens` tokens through all blocks, each seeing `keys` keys on average, and of `logits` tokens' logits.

    A sliding window narrower than `keys` bounds what its block sees."""
    seen = sum(min(window or keys, keys) for window in cfg.windows)
    attention = 4.0 * cfg.n_heads * cfg.head_dim * seen
    return tokens * (2.0 * cfg.n_layers * block_size(cfg) + attention) + 2.0 * logits * head_size(cfg)


def _blocks_bytes(cfg: ModelConfig, tokens: float, split: Split, width: int) -> float:
    """One forward pass on one chip: weights, and the products' inputs and outputs; `width` bytes a number."""
    heads = (4 * cfg.n_heads + 4 * cfg.n_kv_heads) * cfg.head_dim
    per_token = 4 * cfg.d_model + (heads + 4 * cfg.d_ff) / split.tensor
    return width * cfg.n_layers * (block_size(cfg) / split.tensor + tokens / split.rows * per_token)


def _logits_bytes(cfg: ModelConfig, tokens: float, split: Split, width: int) -> float:
    """One pass of the vocabulary projection: its weights, and float32 logits written and read."""
    return width * head_size(cfg) / split.tensor + 8.0 * tokens / split.rows * cfg.vocab_size / split.tensor


def reading(
    cfg: ModelConfig, rows: int, useful: float, padded: float, split: Split, width: int, *, before: float = 0.0,
    useful_logits: float = 0.0, padded_logits: float = 0.0, shared: int = 0, parts: int = 1,
) -> Work:  # fmt: skip
    """A forward pass of `rows` rows of `useful` tokens on average, padded to `padded`, after `before` tokens that
    they see and do not compute; logits per row likewise. `shared` tokens are computed once for all of them. In `parts`
    micro-batches, each of which reads the weights."""
    once, weights = forward(cfg, shared, shared / 2), _blocks_bytes(cfg, 0, split, width)
    moved = _blocks_bytes(cfg, rows * padded, split, width) + (parts - 1 + bool(shared)) * weights
    if padded_logits:
        moved += _logits_bytes(cfg, rows * padded_logits, split, width)
    return Work(
        once + forward(cfg, rows * useful, before + useful / 2, rows * useful_logits),
        once + forward(cfg, rows * padded, before + padded / 2, rows * padded_logits),
        moved,
    )


def training(
    read: Work, of_weights: Work, cfg: ModelConfig, size: int, split: Split, *, remat: str, logits: float,
    chunks: int = 1, frozen: bool = False,
) -> Work:  # fmt: skip
    """One update from the forward pass `read`, of `size` parameters. `of_weights`: what of it are products with weights
    (`products`), whose own gradients are not computed where they are `frozen`. `logits`: tokens whose logits are
    computed, which is done once more in the backward pass where they come in several `chunks`."""
    of_logits = 2.0 * logits * head_size(cfg)
    blocks = read.computed - of_logits
    again = {"none": 0.0, "dots": read.computed - of_weights.computed, "blocks": blocks}[remat]
    spared = of_weights if frozen else Work()
    passes = 3 + (remat == "blocks") - frozen
    moved = passes * read.moved + _UPDATE_BYTES * size / split.chips
    computed = 3 * blocks + again + (3 + (chunks > 1)) * of_logits - spared.computed
    return Work(3 * read.useful - spared.useful, computed, moved)


def products(
    cfg: ModelConfig, rows: int, useful: float, padded: float, *, useful_logits: float = 0.0,
    padded_logits: float = 0.0, shared: int = 0,
) -> Work:  # fmt: skip
    """The part of `reading` that weights take part in: all but attention's own products."""
    return Work(
        forward(cfg, shared + rows * useful, 0, rows * useful_logits),
        forward(cfg, shared + rows * padded, 0, rows * padded_logits),
    )


def decoding(
    cfg: ModelConfig, rows: int, lengths: Lengths, cap: int, split: Split, kv_split: int, width: int, parts: int = 1
) -> Work:
    """`rows` samples of `lengths.response` tokens on average, decoded to `cap`; the first token of each is the
    prefill's. Every step reads all weights and what the cache holds, the prefix's part once for all rows. In `parts`
    of the rows one after another."""
    steps, own = (cap - 1) * parts, rows / split.rows / parts

    def flops(length: float) -> float:
        return forward(cfg, rows * (length - 1), lengths.prompt + length / 2, rows * (length - 1))

    per_token = 2.0 * width * cfg.n_layers * cfg.n_kv_heads * cfg.head_dim / kv_split
    cache = per_token * (lengths.marker + own * (lengths.tail + cap / 2))
    weights = _blocks_bytes(cfg, rows / parts, split, width) + _logits_bytes(cfg, rows / parts, split, width)
    # Each row is drawn from on one chip, which needs its logits whole: written and read once more.
    draw = 8.0 * own * cfg.vocab_size
    return Work(flops(lengths.response), flops(cap), steps * (weights + cache + draw))


def cache_bytes(cfg: ModelConfig, rows: int, slots: int, split: Split, kv_split: int, width: int) -> float:
    """Of one chip: keys and values of `slots` tokens for each row."""
    return 2.0 * width * cfg.n_layers * rows / split.rows * (cfg.n_kv_heads / kv_split) * slots * cfg.head_dim


def kept_bytes(cfg: ModelConfig, size: int, tokens: float, split: Split, width: int, *, remat: str) -> float:
    """What an update cannot do without on one chip: the gradient, and of `tokens` tokens of a micro-batch what the
    blocks keep for the backward pass: the stream before each ("blocks"), the results of its products with weights too
    ("dots"), or the inputs of all its products."""
    D, heads = cfg.d_model, (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim
    inside = heads + 2 * cfg.d_ff + (cfg.n_heads * cfg.head_dim if remat == "none" else 0)
    per_token = D if remat == "blocks" else 3 * D + inside / split.tensor
    return 4.0 * size / split.chips + width * cfg.n_layers * tokens / split.rows * per_token


# Whole steps, for the comparison with simpler versions of the same method ------------------------------------------


@dataclasses.dataclass(frozen=True)
class Method:
    """Which of the savings a version has."""

    shared_prefix: bool = True
    truncated_trunk: bool = True
    response_logits: bool = True
    reward_from_update: bool = True


def step_flops(stage: str, cfg: ModelConfig, layer: int, lengths: Lengths, samples: int, method: Method) -> float:
    """Useful FLOPs per sample of a step: "rl" (of so many `samples` per activation), "av", "ar" and, per token of
    a document of 1024, "extract".

    Without the shared prefix every sample reads its whole prompt, in sampling and in training; without the truncated
    trunk the AR and extraction run all blocks; without response-only logits the log-probabilities of a sample are read
    off the logits of its whole sequence, as a model's forward function gives them; without rewards from the update the
    AR reads every sample once more for them."""
    trunk = cfg.truncated(layer + 1) if method.truncated_trunk else cfg
    R, tail, before, prompt = lengths.response, lengths.tail, lengths.marker, lengths.prompt
    head = cfg.d_model**2 * 2.0
    reading_ar = forward(trunk, lengths.ar_text, lengths.ar_text / 2) + head
    if stage == "ar":
        return 3 * reading_ar
    if stage == "extract":
        return forward(trunk, 1024, 512) / 1024
    # In a batch of many the shared prefix costs nothing worth counting per sample; RL's 1024 and SFT's 256 share one.
    many = 1024 if stage == "rl" else 256
    prefix = forward(cfg, before, before / 2)
    own = forward(cfg, tail + R - 1, before + (tail + R) / 2)
    sequence = own + (prefix / many if method.shared_prefix else prefix)
    logits = 2.0 * head_size(cfg) * (R if method.response_logits else prompt + R - 1)
    if stage == "av":
        return 3 * (sequence + logits)
    prefill = forward(cfg, tail, before + tail / 2, 1)
    prefill = prefill / samples + prefix / many if method.shared_prefix else prefill + prefix
    decode = forward(cfg, R - 1, prompt + R / 2, R - 1)
    # The frozen reference's prefix is computed once per run.
    reference = (own if method.shared_prefix else own + prefix) + logits
    readings = 3 if method.reward_from_update else 4
    return prefill + decode + reference + 3 * (sequence + logits) + readings * reading_ar


VERSIONS = {
    "nla_jax": Method(),
    "without shared prefix": Method(shared_prefix=False),
    "without truncated trunk": Method(truncated_trunk=False),
    "without response-only logits": Method(response_logits=False),
    "without rewards from the update": Method(reward_from_update=False),
    "without any": Method(False, False, False, False),
}


def flops_table(cfg: ModelConfig, layer: int, lengths: Lengths, samples: int = 8) -> dict[str, dict[str, float]]:
    """stage -> version -> FLOPs per sample (per token for "extract")."""
    return {
        stage: {name: step_flops(stage, cfg, layer, lengths, samples, method) for name, method in VERSIONS.items()}
        for stage in ("rl", "av", "ar", "extract")
    }


def tree_bytes(tree: object) -> float:
    """Bytes that one chip holds of a tree of shapes with shardings."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        itemsize = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.dtype(leaf.dtype).itemsize
        total += float(np.prod(shape, dtype=np.float64)) * itemsize
    return total
