"""Block matrices in 8 bits: a frozen base for adapters at half of bfloat16's memory.

Each output column has its own scale, so that x @ w is (x @ q) times the scales: nothing is dequantized as a whole. The
rounding is qwix's. Only what is never trained may be kept so; embeddings, heads, norms and biases stay as they are.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from nla_jax.models.errors import ConfigError


@struct.dataclass
class Int8:
    """In a matrix's place: `q` int8 [..., I, O] and `scale` [..., 1, O] in the dtype that products are computed in."""

    q: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def wide(self) -> jax.Array:
        """The matrix that it stands for, in float32."""
        return self.q.astype(jnp.float32) * self.scale.astype(jnp.float32)


def need_library() -> None:
    """ConfigError where qwix is not installed."""
    if importlib.util.find_spec("qwix") is None:
        raise ConfigError("lora.int8", expected="qwix", got="not installed", fix="pip install 'nla_jax[int8]'")


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a parameter of this (stacked) shape is kept in 8 bits: a block's matrix, not a vector."""
    return len(shape) == 3


@functools.partial(jax.jit, static_argnames=("out",))
def _quantize(row: jax.Array, out: tuple[Any, Any] | None) -> Int8:
    import qwix  # type: ignore[import-untyped, unused-ignore]

    found = qwix.quantize(row, jnp.int8, channelwise_axes=(1,), scale_dtype=row.dtype)
    made = Int8(q=found.qvalue, scale=found.scale)
    return made if out is None else jax.lax.with_sharding_constraint(made, Int8(*out))


def quantize_row(row: jax.Array, of_stack: NamedSharding | None) -> Int8:
    """A block's matrix [I, O] in 8 bits, where a stack of the sharding `of_stack` has it."""
    if of_stack is None:
        return _quantize(row, None)
    to = stack_shardings(of_stack)
    return _quantize(row, tuple(NamedSharding(of_stack.mesh, PartitionSpec(*s.spec[1:])) for s in (to.q, to.scale)))


def stack_shardings(of_stack: NamedSharding) -> Int8:
    """The shardings of a stack [L, I, O] and of its scales, which are whole along I."""
    spec = (*of_stack.spec, *(None,) * (3 - len(of_stack.spec)))
    return Int8(q=of_stack, scale=NamedSharding(of_stack.mesh, PartitionSpec(spec[0], None, spec[2])))


def empty_stack(shape: tuple[int, ...], dtype: Any, of_stack: NamedSharding | None) -> Int8:
    """Zeros for a stack of this shape."""
    to = Int8(None, None) if of_stack is None else stack_shardings(of_stack)
    q = jnp.zeros(shape, jnp.int8, device=to.q)
    return Int8(q=q, scale=jnp.zeros((shape[0], 1, shape[2]), dtype, device=to.scale))


def abstract(stack: Any) -> Int8:
    """The shapes of a stack in 8 bits, from those of the matrices that it is made of, with their sharding."""
    at = stack.sharding
    to = stack_shardings(at) if isinstance(at, NamedSharding) else Int8(at, at)
    q = jax.ShapeDtypeStruct(stack.shape, np.dtype("int8"), sharding=to.q)
    return Int8(q=q, scale=jax.ShapeDtypeStruct((stack.shape[0], 1, stack.shape[2]), stack.dtype, sharding=to.scale))
