"""Attention whose scores are never written to memory: splash attention on TPU, cuDNN's kernel on NVIDIA GPUs.

For rows that attend to themselves and to nothing else. A kernel makes the scores of one tile after another where its
products are computed, and skips the tiles that a mask empties.

Why from 1024 tokens on: what XLA's TPU compiler says of a block of Qwen2.5-7B, and of 21 blocks' temporary arrays
(bfloat16, forward, 4096 tokens on one v5e), "blocked" attention -> splash:

    tokens of a row   bytes moved    temporary arrays   share of the block's cycles that "blocked" adds to the rest
                512   2.7 -> 2.4 GB  153 -> 181 MiB      2%
               1024   3.1 -> 2.4     151 -> 179          6
               2048   4.1 -> 2.4     207 -> 178         15
               4096   5.9 -> 2.3     282 -> 150         35

The last column is the compiler's estimate. It has none for splash: that kernel's products alone, at the chip's peak,
would take 1% of the block's cycles for rows of 512, which are a single tile, and 2% for 1024; how long it takes was not
measured on a TPU. At 512 there is nothing to gain. On GPUs nothing was measured: they have the same threshold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from nla_jax.models.sharding import RULES, row_sharding

# Sides of a splash tile, multiples of 128: the least, the one aimed at, and the most that the backward pass of heads of
# 256 compiles with on v4, v5e, v5p and v6e. Larger ones do not fit into a core's own memory on all of them.
_LEAST, _IDEAL, _MOST = 256, 512, 768
_LANES = 128

# q [B, T, N, H], k and v [B, K, T, H], segments [B, T] or None, window scalar -> [B, T, N, H]
Kernel = Callable[..., jax.Array]


def splash(
    q_BxTxNxH: jax.Array,
    k_BxKxTxH: jax.Array,
    v_BxKxTxH: jax.Array,
    segments_BxT: jax.Array | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    window: int = 0,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention [B, T, N, H] by `jax.experimental.pallas.ops.tpu.splash_attention`.

    Positions are places in the row, `window` and `segments` as in `attention.attend`. Any T: rows are padded to whole
    tiles. `interpret` runs the kernel's steps as ordinary JAX, on any device and slowly. The precision of products is
    JAX's default, whatever the dtype."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds

    T, N = q_BxTxNxH.shape[1:3]
    side = tile(T)
    filled = -(-T // side) * side

    def fill(x: jax.Array, axis: int) -> jax.Array:
        # Padding stands after every token, so that causality hides it.
        return jnp.pad(x, [(0, filled - T if a == axis else 0) for a in range(x.ndim)])

    q = (q_BxTxNxH.astype(jnp.float32) * scale).astype(q_BxTxNxH.dtype)  # the kernel does not scale
    q, k, v = fill(jnp.swapaxes(q, 1, 2), 2), fill(k_BxKxTxH, 2), fill(v_BxKxTxH, 2)
    ids = None
    if segments_BxT is not None:
        segments_BxT = fill(segments_BxT, 1)
        ids = SegmentIds(q=segments_BxT, kv=segments_BxT)
    out = jax.vmap(_splash_kernel(filled, side, N, window, softcap, interpret))(q, k, v, ids)
    return jnp.swapaxes(out, 1, 2)[:, :T]


def tile(T: int) -> int:
    """The side of the tiles for T tokens: of those that pad least, the nearest to 512."""
    sides = range(_LEAST, _MOST + 1, _LANES)
    return min(sides, key=lambda side: (-(-T // side) * side, abs(side - _IDEAL)))


@functools.cache
def _splash_kernel(T: int, side: int, N: int, window: int, softcap: float | None, interpret: bool) -> Any:
    """What the library's `make_splash_mha` makes, but of NumPy arrays: it would put the tables of tiles on a device,
    and the devices that a program is traced for need not be here."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as tables

    # The kernel's window counts the tokens before a token, without itself.
    mask = masks.LocalMask((T, T), (window - 1, 0), offset=0) if window else masks.CausalMask((T, T))
    every = masks.MultiHeadMask([mask] * N)
    forward, mask_function = tables.process_mask(every, (side, side), head_shards=1, q_seq_shards=1)
    backward, _ = tables.process_mask_dkv(every, (side, side), head_shards=1, q_seq_shards=1)
    sides = kernels.BlockSizes(
        block_q=side, block_kv=side, block_q_dkv=side, block_kv_dkv=side, block_q_dq=side, block_kv_dq=side
    )
    return kernels.SplashAttentionKernel(
        forward,
        forward,  # of the queries' gradient
        backward,
        block_sizes=sides,
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        interpret=interpret,
    )


def cudnn(
    q_BxTxNxH: jax.Array,
    k_BxKxTxH: jax.Array,
    v_BxKxTxH: jax.Array,
    segments_BxT: None = None,
    *,
    scale: float,
    window: int = 0,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Causal attention [B, T, N, H] by `jax.nn.dot_product_attention`, whose kernel knows neither soft-caps nor, in
    this interface, segments. `implementation` "xla" computes the same anywhere, with all scores in memory."""
    assert segments_BxT is None, "packed rows"
    return jax.nn.dot_product_attention(
        q_BxTxNxH,
        jnp.swapaxes(k_BxKxTxH, 1, 2),
        jnp.swapaxes(v_BxKxTxH, 1, 2),
        scale=scale,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,  # tokens before a token, without itself
        implementation=implementation,
    )


def cudnn_takes(dtype: Any, head_dim: int, softcap: float | None, packed: bool) -> bool:
    """Whether this process has a GPU, and its kernel such inputs. Its limits: cuDNN's support matrix, as JAX checks it.

    This process's, since JAX asks the GPU itself while a program is traced."""
    if softcap is not None or packed or jax.default_backend() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")
    generation = int(str(capability).split(".")[0]) if str(capability)[:1].isdigit() else 0  # ROCm's are names
    return head_dim % 8 == 0 and ((generation >= 8 and head_dim <= 128) or (generation >= 9 and head_dim <= 256))


def with_window(kernel: Kernel, windows: tuple[int, ...], T: int) -> Kernel:
    """`kernel` with its static `window` chosen while the program runs, from the few that there are.

    The result takes (q, k, v, segments, window). Windows that reach over all T tokens are none, and share a branch."""
    different = tuple(sorted({w if 0 < w < T else 0 for w in windows}))

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, window: jax.Array) -> jax.Array:
        branches = [functools.partial(kernel, window=w) for w in different]
        if len(branches) == 1:
            return branches[0](q, k, v, segments)
        reach = jnp.where((window > 0) & (window < T), window, 0)
        which = jnp.argmax(jnp.asarray(different) == reach)
        return jax.lax.switch(which, branches, q, k, v, segments)

    return run


def on_mesh(kernel: Kernel) -> Kernel:
    """`kernel` on every device's share of the rows and heads, since the compiler cannot split it itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel

    def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, window: jax.Array) -> jax.Array:
        (rows,) = row_sharding(mesh, len(q)).spec  # type: ignore[arg-type]
        (heads,) = RULES["heads"] if all(a in mesh.shape for a in RULES["heads"]) else (None,)
        of_q, of_kv, each = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads), PartitionSpec(rows)
        split = jax.shard_map(
            kernel, mesh=mesh, in_specs=(of_q, of_kv, of_kv, each, PartitionSpec()), out_specs=of_q, check_vma=False
        )
        return split(q, k, v, segments, window)

    return run


def splits(N: int, K: int) -> bool:
    """Whether the mesh, if there is one, gives every device whole groups of heads: queries with their keys."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape.get("tensor", 1)
    return N % parts == 0 and K % parts == 0 and not mesh.manual_axes
