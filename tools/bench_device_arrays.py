"""Arrays for programs that are known by their shapes: made on the devices, in the shardings that the shapes name.

Values change no dense program's time by more than a chip's power does, so they only have to be usable: parameters and
vectors are noise (zeros would draw less power than a real run), moments zero, token ids inside the vocabulary, lengths
those of full rows. What an argument is says its name in the program's own signature, in a batch's dictionary or in the
tree that it is a leaf of.
"""

from __future__ import annotations

import functools
import inspect
import re
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nla_jax.train.plan_stage import Call

Path = tuple[str, ...]
_SUFFIX = re.compile(r"_[A-Z](x[A-Z])*$")  # vectors_NxD
_FALSE = ("failed", "stopped")
_PARAMETER_STD = 0.02


def named(call: Call) -> dict[Path, Any]:
    """Every shape and array among a call's arguments by its path, the argument's name first: ("state", "params")."""
    found = {}

    def note(path: Path, leaf: Any) -> Any:
        found[path] = leaf
        return leaf

    filled(call, note)
    return found


def filled(call: Call, of: Callable[[Path, Any], Any]) -> tuple[list[Any], dict[str, Any]]:
    """A call's arguments and options with `of(path, leaf)` in place of each leaf. Static options, which hold neither
    shapes nor arrays, are left out: they are compiled in."""
    names = [_SUFFIX.sub("", name) for name in inspect.signature(call.fn).parameters]
    args = [_mapped(name, tree, of) for name, tree in zip(names, call.args, strict=False)]
    dynamic = {name: tree for name, tree in call.options.items() if _dynamic(tree)}
    return args, {name: _mapped(_SUFFIX.sub("", name), tree, of) for name, tree in dynamic.items()}


def _mapped(name: str, tree: Any, of: Callable[[Path, Any], Any]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: of((name, *map(_text, keys)), leaf), tree)


def _dynamic(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(hasattr(leaf, "dtype") for leaf in leaves)


def _text(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("name", "key", "idx") if hasattr(key, name)))


def make(path: Path, beside: dict[Path, Any], vocabulary: int) -> jax.Array:
    """An array for the shape at `path` of `beside`, a call's named arguments."""
    leaf = beside[path]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.jit(lambda: jax.random.split(jax.random.key(0), leaf.shape), out_shardings=leaf.sharding)()
    name = path[-1]
    if name in ("lengths", "positions"):
        width = next((x.shape[-1] for p, x in beside.items() if p == (*path[:-1], "tokens")), 1)
        kind, value = ("constant", width) if name == "lengths" else ("below", width)
    elif name == "tokens":
        kind, value = "below", vocabulary
    else:
        kind, value = _kind(path, leaf.dtype, vocabulary)
    # Salted by the path: two matrices of one shape are not the same one. An argument and no constant, or the compiler
    # would compute the array itself.
    salt = jnp.uint32(zlib.crc32("/".join(path).encode()))
    return _made(leaf.shape, jnp.dtype(leaf.dtype).name, kind, leaf.sharding)(salt, jnp.float32(value))


def _kind(path: Path, dtype: Any, vocabulary: int) -> tuple[str, float]:
    """How values are made, and the number that goes with it."""
    name = path[-1]
    if jnp.issubdtype(dtype, jnp.bool_):
        return "constant", name not in _FALSE
    if jnp.issubdtype(dtype, jnp.integer):
        return "constant", 0  # counts of steps
    if "opt" in path or name == "penalty":
        return "constant", 0.0
    if name in ("weight", "temperature") or "norm" in name:
        return "constant", 1.0
    if name in ("sampled", "reference", "logprobs"):
        return "constant", -float(jnp.log(vocabulary))
    return "noise", 1.0 if name in ("vectors", "advantages") else _PARAMETER_STD


@functools.cache
def _made(shape: tuple[int, ...], dtype: str, kind: str, sharding: Any) -> Any:
    def fill(salt: jax.Array, value: jax.Array) -> jax.Array:
        if kind == "constant":
            return jnp.full(shape, value).astype(dtype)
        bits = _bits(shape, salt)
        if kind == "below":
            return (bits % value.astype(jnp.uint32)).astype(dtype)
        # Four bytes summed are near enough to a normal distribution, of variance 4 (256^2 - 1) / 12.
        total = sum((bits >> shift & 255).astype(jnp.float32) for shift in (0, 8, 16, 24))
        return ((total - 510.0) * (value / 147.8)).astype(dtype)

    return jax.jit(fill, out_shardings=sharding)


def _bits(shape: tuple[int, ...], salt: jax.Array) -> jax.Array:
    """uint32 noise, each element from its own indices alone: nothing but the result takes memory, as a generator's
    state and halves would beside a matrix of gigabytes."""
    bits = jnp.full(shape, salt)
    for axis in range(len(shape)):
        bits = bits ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
