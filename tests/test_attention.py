"""Attention kernels against a float64 loop, and what must hold of the whole decoder whatever its weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from families import golden, load, tokens
from reference import relative_error

from nla_jax.models import attention
from nla_jax.models.attention import AttnSpec, attend
from nla_jax.models.errors import InputError
from nla_jax.models.layers import embed, unembed
from nla_jax.models.params import truncate
from nla_jax.models.transformer import forward, prefix_of, residual, residuals, run_blocks

residual_jit = jax.jit(residual, static_argnames=("cfg", "layer"))

# T queries, N heads, K kv heads, H, window, soft-cap, P shared prefix tokens, earlier cached tokens, empty slots.
# With blocks of 8 queries, T = 8, 16: whole blocks; 5: less than one; 19, 21: several and a rest.
SHAPES = [
    (5, 4, 4, 6, 0, None, 0, 0, 0),
    (19, 6, 2, 4, 0, None, 0, 0, 0),
    (21, 6, 3, 4, 4, None, 0, 0, 0),
    (16, 4, 1, 8, 5, 1.5, 0, 0, 0),
    (8, 4, 2, 6, 0, 0.7, 11, 0, 0),
    (13, 6, 2, 4, 6, 2.0, 7, 0, 0),
    (3, 6, 2, 4, 5, None, 9, 4, 6),
    (1, 4, 2, 6, 0, 1.0, 0, 10, 5),
    (1, 4, 2, 6, 3, None, 5, 10, 5),
    (19, 2, 1, 4, 40, None, 3, 0, 2),
]


def _inputs(shape):
    T, N, K, H, _, _, P, earlier, empty = shape
    rng = np.random.default_rng(sum(shape[:4]) + 100 * P)
    S = earlier + T + empty

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    q, k, v = 2 * normal(2, T, N, H), normal(2, S, K, H), normal(2, S, K, H)
    k[:, earlier + T :], v[:, earlier + T :] = 50.0, 1e6  # what stands in empty slots must not be seen
    return q, k, v, normal(P, K, H), normal(P, K, H)


def _heads_first(x):
    return np.swapaxes(x, -3, -2)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 queries, so that short sequences have several."""
    monkeypatch.setattr(attention, "_MIN_BLOCK", 8)
    monkeypatch.setattr(attention, "_MAX_BLOCK", 8)


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [(kernel, s) for kernel in ("plain", "blocked") for s in SHAPES if kernel == "plain" or not s[7] + s[8]],
    ids=str,
)
def test_kernel_against_a_float64_loop(kernel, shape, small_blocks):
    T, _, _, H, window, cap, P, earlier, empty = shape
    q, k, v, k_prefix, v_prefix = _inputs(shape)
    first = P + earlier
    spec = AttnSpec(scale=H**-0.5, softcap=cap, kernel=kernel)
    out = jax.jit(functools.partial(attend, spec=spec, cached=earlier + empty > 0))(
        q,
        _heads_first(k),
        _heads_first(v),
        q_pos_T=first + np.arange(T),
        k_pos_S=P + np.arange(k.shape[1]),
        window=window,
        prefix=(_heads_first(k_prefix), _heads_first(v_prefix)) if P else None,
    )
    for row in range(2):
        keys, values = np.concatenate([k_prefix, k[row]]), np.concatenate([v_prefix, v[row]])
        expected = reference.attention(q[row], keys, values, scale=H**-0.5, window=window, cap=cap, offset=first)
        assert relative_error(out[row], expected) < 1e-5


def test_scores_far_apart_do_not_overflow(small_blocks):
    """Scores of +-1e4 (no soft-cap): weights are still a softmax, with finite gradients."""
    q, k, v, _, _ = _inputs((9, 2, 1, 4, 0, None, 0, 0, 0))
    jk, jv = jnp.asarray(_heads_first(k)), jnp.asarray(_heads_first(v))
    at = jnp.arange(9)
    for kernel in ("plain", "blocked"):
        spec = AttnSpec(scale=1e4, kernel=kernel)

        @jax.jit
        def run(q, spec=spec):
            out, grad = jax.vjp(lambda q: attend(q, jk, jv, spec, q_pos_T=at, k_pos_S=at), q)
            return out, grad(jnp.ones_like(out))[0]

        out, grad = run(q)
        assert relative_error(out[0], reference.attention(q[0], k[0], v[0], scale=1e4)) < 1e-4
        assert np.isfinite(grad).all()


def test_long_sequences_take_the_blocked_kernel(small_blocks):
    """Its memory grows with T: no array of T x T scores, forwards or backwards."""
    T = 50
    q, k, at = jnp.ones((1, T, 2, 4)), jnp.ones((1, 2, T, 4)), jnp.arange(T)

    def program(kernel):
        spec = AttnSpec(scale=0.5, kernel=kernel)
        return str(jax.make_jaxpr(jax.grad(lambda q: attend(q, k, k, spec, q_pos_T=at, k_pos_S=at).sum()))(q))

    def largest_kept(kernel):
        spec = AttnSpec(scale=0.5, kernel=kernel)
        backward = jax.vjp(lambda q, k: attend(q, k, k, spec, q_pos_T=at, k_pos_S=at), q, k)[1]
        return max(x.size for x in jax.tree.leaves(backward))

    assert largest_kept("plain") >= 2 * T * T
    assert largest_kept("blocked") <= q.size  # not even one block's scores wait for the backward pass
    assert f"{T},{T}]" in program("plain")
    assert f"{T},{T}]" not in program("blocked")
    assert f"{T},{T}]" not in program("auto")


def _jacobian_support(case, n_layers, T=12):
    """[T, T] booleans: does the stream at t depend on what entered at s?"""
    cfg, params = load(case)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(1, T, cfg.d_model)), jnp.float32)
    direction = jnp.asarray(rng.normal(size=cfg.d_model), jnp.float32)

    @jax.jit
    def outputs(x):
        return run_blocks(params, x, cfg, n_layers=n_layers)[0][0] @ direction

    return np.abs(np.asarray(jax.jit(jax.jacrev(outputs))(x))[:, 0]).max(axis=-1) > 0


@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_causality_through_gradients(case):
    """d out[t] / d in[s] is exactly zero for s > t, and not zero for any s <= t once a block sees the whole past."""
    cfg, _ = load(case)
    np.testing.assert_array_equal(_jacobian_support(case, cfg.n_layers), np.tri(12, dtype=bool))


def test_a_window_counts_the_token_itself():
    cfg, _ = load("mistral")
    assert cfg.windows[0] == 5
    expected = np.tri(12, dtype=bool) & ~np.tri(12, k=-5, dtype=bool)
    np.testing.assert_array_equal(_jacobian_support("mistral", 1), expected)


def _tail(params, tokens_BxT, cfg, P, shared, remat="none"):
    """Streams after every block [L, B, T - P, D] and logits of the tokens after the first P, which all rows share."""

    def keep(layer, x, kept):
        return kept.at[layer].set(x)

    def run(ids, prefix):
        x = embed(params, ids, cfg)
        kept = jnp.zeros((cfg.n_layers, *x.shape))
        x, _, streams = run_blocks(params, x, cfg, prefix=prefix, tap=(keep, kept), remat=remat)
        return streams, unembed(params, x, cfg)

    if shared:
        return run(tokens_BxT[:, P:], prefix_of(params, tokens_BxT[0, :P], cfg))
    streams, logits = run(tokens_BxT, None)
    return streams[:, :, P:], logits[:, P:]


def test_shared_prefix_equals_unshared():
    """Streams, logits and the gradients of every parameter; the prefix is long enough to leave the windows."""
    cfg, params = load("mistral")
    P, B, T = 9, 3, 20
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (B, T)).astype(np.int32)
    ids[:, :P] = ids[0, :P]

    @functools.partial(jax.jit, static_argnames=("shared", "remat"))
    def both(params, shared, remat="none"):
        def loss(params):
            streams, logits = _tail(params, jnp.asarray(ids), cfg, P, shared, remat)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, P:, None], axis=-1)
            return -chosen.mean(), (streams, logits)

        return jax.grad(loss, has_aux=True)(params)

    grads, (streams, logits) = both(params, shared=False)
    grads_shared, (streams_shared, logits_shared) = both(params, shared=True, remat="dots")
    assert relative_error(streams_shared, streams) < 1e-4
    assert relative_error(logits_shared, logits) < 1e-4
    for got, expected in zip(jax.tree.leaves(grads_shared), jax.tree.leaves(grads), strict=True):
        assert np.abs(expected).max() > 0
        assert relative_error(got.reshape(1, -1), expected.reshape(1, -1)) < 1e-4


def test_trunk_does_not_touch_later_blocks():
    cfg, params = load("gemma3_text")
    ids = jnp.asarray(tokens()[:, :8])
    n = 3
    poisoned = params.replace(
        layers=jax.tree.map(lambda p: jnp.asarray(np.where(np.arange(len(p)) < n, p.T, np.nan).T), params.layers)
    )
    trunk = residual_jit(poisoned, ids, cfg=cfg, layer=n - 1)
    assert np.isfinite(trunk).all()
    assert np.isnan(residual_jit(poisoned, ids, cfg=cfg, layer=n)).all()
    np.testing.assert_array_equal(trunk, residual_jit(truncate(params, n), ids, cfg=cfg.truncated(n), layer=n - 1))


def test_trunk_runs_exactly_its_blocks():
    """Counted while it runs: every block once, in order, none beyond the last that is asked for."""
    cfg, params = load("llama")
    x = embed(params, jnp.asarray(tokens()[:, :8]), cfg)
    for n in (1, 3):

        @jax.jit
        def count(params, n=n):
            state = (jnp.zeros((), jnp.int32), jnp.full(cfg.n_layers, -1))

            def fold(layer, x, state):
                return state[0] + 1, state[1].at[state[0]].set(layer)

            return run_blocks(params, x, cfg, n_layers=n, tap=(fold, state))[2]

        steps, order = count(params)
        assert int(steps) == n and order.tolist() == [*range(n), *[-1] * (cfg.n_layers - n)]


@pytest.mark.parametrize("layer", [-1, 5])
def test_layer_out_of_range(layer):
    cfg, params = load("llama")
    with pytest.raises(InputError, match=r"0\.\.4"):
        residual(params, tokens(), cfg, layer=layer)


def test_right_padding_changes_nothing_before_it():
    cfg, params = load("gemma3_text")
    ids = jnp.asarray(tokens())
    padded = ids.at[:, 13:].set(0)
    run = jax.jit(forward, static_argnames="cfg")
    np.testing.assert_array_equal(run(params, padded, cfg=cfg)[:, :13], run(params, ids, cfg=cfg)[:, :13])


def test_several_layers_at_once_equal_one_by_one():
    cfg, params = load("gemma3_text")
    ids, layers = jnp.asarray(tokens()[:, :8]), (3, 2)
    together = jax.jit(residuals, static_argnames=("cfg", "layers"))(params, ids, cfg=cfg, layers=layers)
    assert together.shape[0] == 2
    for i, layer in enumerate(layers):
        assert relative_error(together[i], residual_jit(params, ids, cfg=cfg, layer=layer)) < 1e-6


@pytest.mark.parametrize("case", ["qwen2", "gemma3_text"])
def test_bfloat16_parameters(case):
    """Runs in bfloat16 throughout, gives float32 logits, and stays near float32."""
    cfg, params = load(case)
    low = jax.tree.map(lambda p: np.asarray(p).astype(jnp.bfloat16), params)
    stream = jax.eval_shape(lambda: residual(low, tokens(), cfg, 2))
    logits = jax.jit(forward, static_argnames="cfg")(low, tokens(), cfg=cfg)
    assert stream.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    exact = golden(case)["logits"]
    assert np.linalg.norm(logits - exact) / np.linalg.norm(exact) < 0.05
