"""Kernels that keep no scores against a float64 softmax and its gradients, and which programs have them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import load, tokens
from reference import relative_error

from nla_jax.extract import _LENGTHS
from nla_jax.models import attention, flash, sharding, transformer
from nla_jax.models.attention import AttnSpec, attend
from nla_jax.models.transformer import forward

B = 2
# T tokens, N heads, K kv heads, H, window, soft-cap, several samples in a row. With tiles of 128: whole tiles, part of
# one, and several and a rest; windows within a tile and over several.
SHAPES = [
    (256, 2, 2, 16, 0, None, False),
    (300, 3, 1, 16, 150, 2.0, False),
    (90, 2, 1, 16, 2, None, False),
    (260, 4, 2, 16, 40, 1.5, True),
]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 128, so that short sequences have several."""
    for name in ("_LEAST", "_IDEAL", "_MOST"):
        monkeypatch.setattr(flash, name, 128)


def _inputs(shape, dtype=jnp.float32) -> tuple[Any, ...]:
    """q, k, v, the gradient of the output, segments."""
    T, N, K, H, _, _, packed = shape
    rng = np.random.default_rng(T + N)

    def normal(*size):
        return jnp.asarray(rng.normal(size=size), dtype)

    # Padding after the samples of a row is a segment of its own, 0, as packing numbers it.
    segments = np.sort(rng.integers(1, 4, (B, T)), axis=1)
    segments[:, T - 9 :] = 0
    ids = jnp.asarray(segments, jnp.int32) if packed else None
    return 2 * normal(B, T, N, H), normal(B, K, T, H), normal(B, K, T, H), normal(B, T, N, H), ids


def _softmax(q, k, v, g, segments, *, scale, window, cap):
    """The output [B, T, N, H] and the gradients of q, k and v, where the output's is `g`; all in float64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
    T, groups = q.shape[1], q.shape[2] // k.shape[1]
    q, g = np.swapaxes(q, 1, 2), np.swapaxes(g, 1, 2)
    keys, values = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    at = np.arange(T)
    seen = (at[:, None] >= at) & ((at[:, None] - at < window) | (not window))
    seen = seen[None, None]
    if segments is not None:
        ids = np.asarray(segments)
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    s = q @ np.swapaxes(keys, -1, -2) * scale
    slope = 1.0
    if cap is not None:
        s = cap * np.tanh(s / cap)
        slope = 1 - (s / cap) ** 2
    s = np.where(seen, s, -np.inf)
    w = np.exp(s - s.max(-1, keepdims=True))
    w /= w.sum(-1, keepdims=True)
    dw = g @ np.swapaxes(values, -1, -2)
    ds = w * (dw - (dw * w).sum(-1, keepdims=True)) * slope * scale
    dk, dv = np.swapaxes(ds, -1, -2) @ q, np.swapaxes(w, -1, -2) @ g
    own = (len(q), -1, groups, T, q.shape[-1])
    return np.swapaxes(w @ values, 1, 2), np.swapaxes(ds @ keys, 1, 2), *(x.reshape(own).sum(2) for x in (dk, dv))


def _with_gradients(fn, q, k, v, g):
    out, back = jax.vjp(fn, q, k, v)
    return out, *back(g)


def _distance(got, expected) -> float:
    """Largest deviation over the largest entry, of the whole array: single vectors of a gradient may be zero."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / np.abs(expected).max()


def _attend(spec, window, segments, q, k, v):
    at = jnp.arange(q.shape[1])
    return attend(q, k, v, spec, q_pos_T=at, k_pos_S=at, window=window, segments=segments)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_splash_and_plain_against_a_float64_softmax(shape, small_tiles):
    _, _, _, H, window, cap, _ = shape
    q, k, v, g, segments = _inputs(shape)
    expected = _softmax(q, k, v, g, segments, scale=H**-0.5, window=window, cap=cap)
    for kernel in ("flash", "plain"):
        spec = AttnSpec(scale=H**-0.5, softcap=cap, kernel=kernel, interpret=True)
        run = functools.partial(_attend, spec, window, segments)
        found = jax.jit(functools.partial(_with_gradients, run))(q, k, v, g)
        for got, right in zip(found, expected, strict=True):
            assert _distance(got, right) < 1e-5, kernel
        assert relative_error(found[0], expected[0]) < 1e-4, kernel


def test_bfloat16_is_as_near_as_plain_is(small_tiles):
    shape = SHAPES[3]
    q, k, v, g, segments = _inputs(shape, jnp.bfloat16)
    expected = _softmax(q, k, v, g, segments, scale=0.3, window=shape[4], cap=shape[5])
    for kernel in ("flash", "plain"):
        spec = AttnSpec(scale=0.3, softcap=shape[5], kernel=kernel, interpret=True)
        run = functools.partial(_attend, spec, shape[4], segments)
        found = jax.jit(functools.partial(_with_gradients, run))(q, k, v, g)
        for got, right in zip(found, expected, strict=True):
            assert got.dtype == jnp.bfloat16
            assert _distance(got, right) < 0.02, kernel


def test_what_stands_after_a_token_changes_nothing(small_tiles):
    """Right padding, to the bit."""
    q, k, v, _, _ = _inputs((300, 2, 1, 16, 0, None, False))
    spec = AttnSpec(scale=0.25, kernel="flash", interpret=True)
    run = jax.jit(functools.partial(_attend, spec, 0, None))
    other = [x.at[:, 200:].set(1e4) if x is q else x.at[:, :, 200:].set(1e4) for x in (q, k, v)]
    np.testing.assert_array_equal(run(*other)[:, :200], run(q, k, v)[:, :200])


def _stacked(spec, packed):
    """Three blocks, one without a window, one with, one whose window reaches over everything, rematerialised."""
    q, k, v, g, segments = _inputs((260, 4, 2, 16, 0, None, packed))
    q, g = jnp.concatenate([q, -q]), jnp.concatenate([g, g])
    k, v = jnp.concatenate([k, v]), jnp.concatenate([v, k])
    segments = None if segments is None else jnp.concatenate([segments, segments])

    def blocks(q, k, v):
        def block(q, window):
            return q + _attend(spec, window, segments, q, k, v), None

        return jax.lax.scan(jax.checkpoint(block), q, jnp.asarray(spec.windows, jnp.int32))[0]

    return jax.jit(functools.partial(_with_gradients, blocks)), (q, k, v, g)


@pytest.mark.parametrize("packed", [False, True])
def test_windows_that_change_from_block_to_block_on_and_off_a_mesh(packed, small_tiles):
    """Traced windows under scan, rematerialisation and gradients; 4 shards of the rows and 2 of the heads."""
    run, inputs = _stacked(AttnSpec(scale=0.25, kernel="plain", windows=(0, 70, 1000)), packed)
    expected = run(*inputs)
    spec = AttnSpec(scale=0.25, kernel="flash", windows=(0, 70, 1000), interpret=True)
    mesh = sharding.make_mesh(sharding.MeshSettings(fsdp=4, tensor=2))
    for on in (None, mesh):
        with sharding.under(on):
            run, inputs = _stacked(spec, packed)
            assert ("shard_map" in str(run.trace(*inputs).jaxpr)) == (on is not None)
            for got, right in zip(run(*inputs), expected, strict=True):
                assert _distance(got, right) < 1e-5


@pytest.mark.parametrize("case", ["qwen2", "gemma2", "gemma3_text"])
def test_whole_decoder(case, small_tiles, monkeypatch):
    cfg, params = load(case)
    expected = forward(params, tokens(), cfg)

    def spec(**given):
        return AttnSpec(**{**given, "windows": cfg.windows, "kernel": "flash", "interpret": True})

    monkeypatch.setattr(transformer, "AttnSpec", spec)
    assert relative_error(jax.jit(forward, static_argnames="cfg")(params, tokens(), cfg=cfg), expected) < 1e-4


# Which programs have which kernel


def _program(platform, T, *, dtype=jnp.bfloat16, windows=(0, 64), N=4, K=2, prefix=False, cached=False, backward=False):
    """Stable HLO of one block's attention whose window is traced, lowered for a platform that need not be here."""

    def shaped(*size):
        return jax.ShapeDtypeStruct(size, dtype)

    def run(q, k, v, window):
        at = jnp.arange(T)
        shared = (k[0, :, :8], v[0, :, :8]) if prefix else None
        spec = AttnSpec(scale=0.25, windows=windows)
        return attend(q, k, v, spec, q_pos_T=at, k_pos_S=at, window=window, prefix=shared, cached=cached)

    def summed(*args):
        return run(*args).astype(jnp.float32).sum()

    arrays = shaped(8, T, N, 128), shaped(8, K, T, 128), shaped(8, K, T, 128), jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(jax.grad(summed) if backward else run).trace(*arrays)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("backward", [False, True])
def test_long_rows_have_the_kernel_of_the_platform_they_are_compiled_for(backward):
    assert "splash_mha_fwd" in (on_tpu := _program("tpu", 1024, backward=backward))
    assert ("splash_mha_dkv" in on_tpu) == backward
    assert "1024x1024xf32" not in on_tpu
    for platform in ("cpu", "cuda"):  # no GPU is here that could be asked what it supports
        assert "custom_call" not in _program(platform, 1024, backward=backward)


@pytest.mark.parametrize(
    "changed",
    [
        {"T": 128},
        {"T": 384},  # the longest rows of AV and AR training
        {"T": 1023},
        {"dtype": jnp.float32},
        {"windows": ()},
        {"prefix": True},
        {"cached": True},
    ],
    ids=str,
)
def test_all_else_is_plain_xla(changed):
    assert "custom_call" not in _program("tpu", **{"T": 1024, **changed})


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("NLA_FLASH", "0")
    assert "custom_call" not in _program("tpu", 1024)


def test_windows_that_reach_over_everything_share_one_kernel():
    assert _program("tpu", 1024, windows=(0, 64)).count("tpu_custom_call") == 2
    assert _program("tpu", 1024, windows=(0, 4096)).count("tpu_custom_call") == 1


def test_heads_that_a_mesh_does_not_divide_are_plain_xla():
    with sharding.under(sharding.make_mesh(sharding.MeshSettings(fsdp=2, tensor=4))):
        assert "splash_mha" in _program("tpu", 1024, N=8, K=4)
        assert "splash_mha" not in _program("tpu", 1024, N=8, K=2)


def test_tiles_pad_little():
    for T in [n for n in _LENGTHS if n >= attention._FLASH]:
        assert T % flash.tile(T) == 0
    for T in range(attention._FLASH, 9000, 8):
        assert flash.tile(T) % 128 == 0
        assert -(-T // flash.tile(T)) * flash.tile(T) < 1.2 * T


# cuDNN


def _compare_with_cudnns_interface(shape, dtype, implementation, tolerance):
    _, _, _, H, window, _, _ = shape
    q, k, v, g, _ = _inputs(shape, dtype)
    expected = _softmax(q, k, v, g, None, scale=H**-0.5, window=window, cap=None)
    run = functools.partial(flash.cudnn, scale=H**-0.5, window=window, implementation=implementation)
    for got, right in zip(jax.jit(functools.partial(_with_gradients, run))(q, k, v, g), expected, strict=True):
        assert _distance(got, right) < tolerance


CUDNN = [(256, 4, 4, 64, 0, None, False), (300, 4, 2, 64, 0, None, False), (300, 4, 1, 128, 70, None, False)]


@pytest.mark.parametrize("shape", CUDNN, ids=str)
def test_what_cudnn_is_asked_for(shape):
    """The same call with XLA in cuDNN's place."""
    _compare_with_cudnns_interface(shape, jnp.float32, "xla", 1e-5)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU; set JAX_PLATFORMS=cuda")
@pytest.mark.parametrize("shape", CUDNN, ids=str)
def test_cudnn_against_a_float64_softmax(shape):
    assert flash.cudnn_takes(jnp.bfloat16, shape[3], None, packed=False)
    _compare_with_cudnns_interface(shape, jnp.bfloat16, "cudnn", 0.02)


@pytest.mark.parametrize(
    ("capability", "head_dim", "changed", "taken"),
    [
        ("9.0", 256, {}, True),
        ("8.0", 128, {}, True),
        ("8.0", 256, {}, False),
        ("7.5", 64, {}, False),
        ("gfx942", 64, {}, False),
        ("9.0", 100, {}, False),
        ("9.0", 64, {"softcap": 30.0}, False),
        ("9.0", 64, {"packed": True}, False),
        ("9.0", 64, {"dtype": jnp.float32}, False),
        (None, 64, {}, False),
    ],
)
def test_what_cudnn_supports(capability, head_dim, changed, taken, monkeypatch):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu" if capability is None else "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    given: dict[str, Any] = {"dtype": jnp.bfloat16, "softcap": None, "packed": False, **changed}
    assert flash.cudnn_takes(head_dim=head_dim, **given) == taken
