"""Decoding: the same tokens as recomputing everything, the same draws in any batch, the softmax's own distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, hf_weights, load, text_config
from reference import decoder
from scipy import stats

from nla_jax.models.cache import empty_cache
from nla_jax.models.sampler import _invert_cdf, draw, row_keys
from nla_jax.prompt import AVPrompt
from nla_jax.verbalizer import av_prefix, sample_explanations

PROMPT = AVPrompt(ids=(5, 90, 17, 3, 44, 71, 8, 120, 33, 12, 64), marker=7)
SCALE = 6.0
NEW = 12


def vectors(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32) * 37.0


def sample(case, rows, *, samples=1, temperature=1.0, seed=3, stop_ids=(), prompt=PROMPT):
    """Explanations of the given rows of a fixed set of vectors, each drawn under its row number."""
    cfg, params = load(case)
    rows = np.asarray(rows)
    result = sample_explanations(
        params,
        av_prefix(params, prompt, cfg),
        jnp.asarray(vectors(16, cfg.d_model)[rows]),
        row_keys(seed, jnp.asarray(rows), samples),
        prompt=prompt,
        cfg=cfg,
        injection_scale=SCALE,
        samples=samples,
        temperature=temperature,
        max_new_tokens=NEW,
        stop_ids=stop_ids,
    )
    return jax.tree.map(np.asarray, result)


def recomputed(case, row, new_tokens, prompt=PROMPT):
    """Log-probabilities [new, V] of each new token's place, by the float64 decoder on the whole sequence."""
    config = text_config(CONFIGS[case])

    def inject(x):
        x = x.copy()
        v = vectors(16, config["hidden_size"])[row].astype(np.float64)
        x[prompt.marker] = v / np.linalg.norm(v) * SCALE
        return x

    ids = np.asarray([*prompt.ids, *new_tokens[:-1]])
    logits = decoder(hf_weights(CONFIGS[case]), config, ids, embeddings=inject)[1][len(prompt.ids) - 1 :]
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma2", "gemma3_text"])
def test_greedy_with_prefix_and_cache_equals_recomputing_everything(case):
    """Token for token; log-probabilities to 1e-4. The prompt and the answer leave the sliding windows."""
    result = sample(case, range(7), samples=2, temperature=0.0)
    assert result.lengths.tolist() == [NEW] * 14 and not result.stopped.any()
    np.testing.assert_array_equal(result.tokens[0::2], result.tokens[1::2])
    for row in range(3):
        logprobs = recomputed(case, row, result.tokens[2 * row])
        np.testing.assert_array_equal(result.tokens[2 * row], logprobs.argmax(axis=-1))
        np.testing.assert_allclose(result.logprobs[2 * row], logprobs.max(axis=-1), atol=1e-4, rtol=0)


def test_marker_at_the_start_of_the_prompt():
    """Then there is no prefix to share."""
    prompt = AVPrompt(ids=PROMPT.ids, marker=0)
    cfg, params = load("llama")
    assert av_prefix(params, prompt, cfg) is None
    result = sample("llama", [4, 5], temperature=0.0, prompt=prompt)
    for i, row in enumerate((4, 5)):
        logprobs = recomputed("llama", row, result.tokens[i], prompt)
        np.testing.assert_array_equal(result.tokens[i], logprobs.argmax(axis=-1))


@pytest.fixture(scope="module")
def batch_of_seven():
    return sample("llama", range(7), samples=2)


def test_sampled_logprobs_are_the_policys_own(batch_of_seven):
    """At temperature 1, what the sampler reports is what a forward pass over the finished text gives: ratio 1."""
    for i in (0, 5):
        logprobs = recomputed("llama", i // 2, batch_of_seven.tokens[i])
        chosen = np.take_along_axis(logprobs, batch_of_seven.tokens[i][:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(batch_of_seven.logprobs[i], chosen, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("rows", "samples"), [([3], 5), ([6, 3, 0, 1, 2, 5, 4], 2)], ids=["alone, more samples", "another order"]
)
def test_samples_do_not_depend_on_the_batch(batch_of_seven, rows, samples):
    result = sample("llama", rows, samples=samples)
    for i, row in enumerate(rows):
        for g in range(2):
            here, there = samples * i + g, 2 * row + g
            np.testing.assert_array_equal(result.tokens[here], batch_of_seven.tokens[there])
            np.testing.assert_allclose(result.logprobs[here], batch_of_seven.logprobs[there], atol=1e-4)


def test_seeds_rows_and_samples_differ(batch_of_seven):
    assert len({tuple(row) for row in batch_of_seven.tokens}) == 14
    same, other = sample("llama", range(7), samples=2), sample("llama", range(7), samples=2, seed=4)
    np.testing.assert_array_equal(same.tokens, batch_of_seven.tokens)
    assert (other.tokens != batch_of_seven.tokens).mean() > 0.8


def test_row_keys_are_all_different():
    data = jax.random.key_data(row_keys(0, jnp.asarray([0, 1, 2**31, 2**32 - 1], jnp.uint32), 8))
    assert len({tuple(k) for k in np.asarray(data)}) == 32


def test_a_stop_token_ends_its_row_only(batch_of_seven):
    """One stop id comes up in mid-row, another only as the last token under the cap: that, too, is a stop."""
    free = batch_of_seven
    middle, last = int(free.tokens[2, 4]), int(free.tokens[5, -1])
    assert middle not in free.tokens[2, :4] and middle not in free.tokens[5] and last not in free.tokens[5, :-1]
    result = sample("llama", range(7), samples=2, stop_ids=(middle, last, 999))
    for i in range(14):
        hits = np.flatnonzero(np.isin(free.tokens[i], [middle, last]))
        end = hits[0] + 1 if len(hits) else NEW
        assert result.stopped[i] == bool(len(hits)) and result.lengths[i] == end
        np.testing.assert_array_equal(result.tokens[i, :end], free.tokens[i, :end])
        np.testing.assert_allclose(result.logprobs[i, :end], free.logprobs[i, :end], atol=1e-6)
        assert not result.tokens[i, end:].any() and not result.logprobs[i, end:].any()
    assert result.lengths[2] == 5 and result.lengths[5] == NEW and result.stopped[5]
    assert not free.stopped.any() and not result.stopped.all()


def test_the_first_token_may_be_a_stop(batch_of_seven):
    stops = tuple(sorted({int(t) for t in batch_of_seven.tokens[:, 0]}))
    result = sample("llama", range(7), samples=2, stop_ids=stops)
    assert result.stopped.all() and result.lengths.tolist() == [1] * 14
    np.testing.assert_array_equal(result.tokens[:, 0], batch_of_seven.tokens[:, 0])
    assert not result.tokens[:, 1:].any() and not result.logprobs[:, 1:].any()


def test_the_cache_is_in_memory_once():
    """Filled, grown to all samples and decoded with in place: two of them would be twice as much."""
    cfg, params = load("llama")
    rows, samples, new = 64, 4, 128
    given = (params, av_prefix(params, PROMPT, cfg), jnp.asarray(vectors(rows, cfg.d_model)))
    keys = row_keys(0, jnp.arange(rows), samples)
    options = {"prompt": PROMPT, "cfg": cfg, "injection_scale": SCALE, "samples": samples, "max_new_tokens": new}
    memory = sample_explanations.lower(*given, keys, **options).compile().memory_analysis()
    cache = empty_cache(cfg, rows * samples, len(PROMPT.ids) - PROMPT.marker + new)
    assert memory.temp_size_in_bytes < 1.5 * (cache.k.nbytes + cache.v.nbytes)


# Draws.

draw_jit = jax.jit(draw)


def draws(logits, n, temperature=1.0, step=0, seed=0):
    tiled = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, len(logits)))
    tokens, logprobs = draw_jit(tiled, row_keys(seed, jnp.arange(n), 1), step, temperature)
    return np.asarray(tokens), np.asarray(logprobs)


def softmax(logits):
    w = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return w / w.sum()


@pytest.mark.parametrize(("size", "temperature"), [(7, 1.0), (7, 0.5), (512, 1.0), (1300, 2.0)])
def test_draws_follow_the_softmax(size, temperature):
    """Chi-square on a fixed seed; 1300 is no multiple of the sampler's chunk, 512 is one."""
    logits = np.random.default_rng(size).normal(size=size)
    n = 20_000
    tokens, logprobs = draws(logits, n, temperature)
    counts = np.bincount(tokens, minlength=size)
    expected = n * softmax(logits / temperature)
    kept = expected >= 5
    observed = np.append(counts[kept], counts[~kept].sum())
    predicted = np.append(expected[kept], expected[~kept].sum())
    if predicted[-1] == 0:
        observed, predicted = observed[:-1], predicted[:-1]
    assert stats.chisquare(observed, predicted).pvalue > 1e-3
    # Whatever the temperature, the log-probability is the model's own.
    np.testing.assert_allclose(logprobs, np.log(softmax(logits))[tokens], atol=1e-5)


def test_every_step_draws_anew():
    logits = np.zeros(600)
    first, second = draws(logits, 2000, step=0)[0], draws(logits, 2000, step=1)[0]
    assert (first == second).mean() < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.1


def test_temperature_zero_takes_the_largest():
    logits = np.random.default_rng(0).normal(size=600)
    tokens, logprobs = draws(logits, 2000, temperature=0.0)
    assert set(tokens) == {int(logits.argmax())}
    np.testing.assert_allclose(logprobs, np.log(softmax(logits)).max(), atol=1e-5)
    assert (draws(logits, 2000, temperature=1.0)[0] != logits.argmax()).any()
    assert (draws(logits, 2000, temperature=1e-3)[0] == logits.argmax()).all()


@pytest.mark.parametrize("allowed", [[3], [599], [0, 599], [512], [511, 513], list(range(530, 560))])
def test_impossible_tokens_are_never_drawn(allowed):
    logits = np.full(600, -np.inf)
    logits[allowed] = np.random.default_rng(1).normal(size=len(allowed))
    tokens, logprobs = draws(logits, 2000)
    assert set(tokens) <= set(allowed) and len(set(tokens)) >= min(2, len(allowed))
    assert np.isfinite(logprobs).all()


def test_extreme_logits():
    logits = np.full(600, -1e4)
    logits[[10, 550]] = 1e4
    tokens, logprobs = draws(logits, 2000)
    assert set(tokens) == {10, 550} and 0.4 < (tokens == 10).mean() < 0.6
    np.testing.assert_allclose(logprobs, np.log(0.5), atol=1e-5)


def test_cumulative_inverse_at_every_token():
    """Aimed at the middle of each token's share of (0, 1], each token is hit; the ends give tokens that have mass."""
    logits = np.random.default_rng(5).normal(size=1300)
    p = softmax(logits)
    middle = np.cumsum(p) - p / 2
    tiled = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (1300, 1300))
    np.testing.assert_array_equal(jax.jit(_invert_cdf)(tiled, jnp.asarray(middle, jnp.float32)), np.arange(1300))
    some = np.where((np.arange(1300) >= 600) & (np.arange(1300) < 700), logits, -np.inf)
    ends = jnp.asarray([1.0, 2.0**-24, 1.0 - 2.0**-24], jnp.float32)
    hit = jax.jit(_invert_cdf)(jnp.broadcast_to(jnp.asarray(some, jnp.float32), (3, 1300)), ends)
    assert hit.tolist() == [699, 600, 699]
