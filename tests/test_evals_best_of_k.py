"""Best of k: expectations over all choices of samples, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from planted import D, Planted, ignores_text, row, value, vector, whole

from nla_jax.errors import InputError
from nla_jax.evals.best_of_k import MEAN, best_of, run, sizes

N, K = 15, 6
DOCS = np.repeat(np.arange(5), 3)
TEXTS = [[f"{i} sample {g}" for g in range(K)] for i in range(N)]
VECTORS = np.stack([vector(f"{i}") for i in range(N)])


def noisy(text: str) -> np.ndarray:
    return vector(text.split()[0]) + vector(text)


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_the_best_of_k_is_the_mean_over_all_choices(k):
    ctx = Planted(TEXTS, noisy, DOCS, VECTORS)
    result = run(ctx, k=K)
    whole(result)
    errors = np.asarray(result.columns["mse_nrm"]).reshape(N, K)
    cosine = np.asarray(result.columns["cosine"]).reshape(N, K)
    np.testing.assert_allclose(errors, 2 * (1 - cosine), atol=1e-12)
    chosen = [
        errors[i, max(some, key=lambda g: cosine[i, g])]
        for i in range(N)
        for some in itertools.combinations(range(K), k)
    ]
    best, mean = 1 - np.mean(chosen) / 0.7, 1 - errors.mean() / 0.7
    assert value(result, "fve_nrm_best", f"k={k}") == pytest.approx(best, rel=1e-12)
    assert value(result, "fve_nrm_best", f"k={k}", MEAN) == pytest.approx(mean, rel=1e-12)
    if k > 1:
        assert value(result, "fve_nrm_gain", f"k={k}") == pytest.approx(best - mean, rel=1e-9)
        assert row(result, "fve_nrm_gain", f"k={k}").low > 0
    # The cosines themselves, from the dumped texts.
    text, at = result.columns["text"], np.asarray(result.columns["row"]) // 3
    p = np.stack([noisy(t) for t in text]).astype(np.float32).astype(np.float64)
    v = VECTORS.astype(np.float32).astype(np.float64)[at]
    again = np.sum(p * v, 1) / np.linalg.norm(p, axis=1) / np.linalg.norm(v, axis=1)
    np.testing.assert_allclose(result.columns["cosine"], again, rtol=1e-12)


def test_it_never_falls_as_k_grows():
    result = run(Planted(TEXTS, noisy, DOCS, VECTORS), k=K)
    found = [value(result, "fve_nrm_best", f"k={k}") for k in sizes(K)]
    assert sizes(K) == [1, 2, 4, 6] and sizes(8) == [1, 2, 4, 8] and sizes(1) == [1]
    assert found == sorted(found) and found[-1] > found[0] + 0.1
    assert found[0] == pytest.approx(value(result, "fve_nrm_best", "k=1", MEAN), rel=1e-12)
    assert best_of(np.arange(5.0)[None], 5)[0] == 0 and best_of(np.arange(5.0)[None], 1)[0] == pytest.approx(2)


def test_a_perfect_sample_among_k_is_found():
    texts = [[f"{i} x", f"{i}", f"{i} y", f"{i} z"] for i in range(N)]
    exact = lambda text: vector(text)  # noqa: E731
    result = run(Planted(texts, exact, DOCS, VECTORS), k=4)
    assert value(result, "fve_nrm_best", "k=4") == pytest.approx(1, abs=1e-6)
    assert value(result, "fve_nrm_best", "k=1") < 0


def test_an_ar_that_ignores_the_text_gains_nothing():
    result = run(Planted(TEXTS, ignores_text, DOCS, VECTORS), k=K)
    assert all(abs(value(result, "fve_nrm_gain", f"k={k}")) < 1e-15 for k in (2, 4, 6))


def test_failed_samples_count_as_orthogonal():
    failed = np.zeros((N, K), bool)
    failed[:, 1:] = True
    result = run(Planted([[str(i)] * K for i in range(N)], vector, DOCS, VECTORS, failed=failed), k=K)
    assert value(result, "fve_nrm_best", f"k={K}") == pytest.approx(1, abs=1e-6)
    assert value(result, "fve_nrm_best", "k=1") == pytest.approx(1 - 2 * (K - 1) / K / 0.7, abs=1e-6)
    assert "orthogonal" in result.notes[0]
    nothing = run(Planted(TEXTS, lambda text: np.full(D, np.nan), DOCS, VECTORS), k=2)
    assert value(nothing, "fve_nrm_best", "k=2") == pytest.approx(1 - 2 / 0.7)


def test_masked_rows_are_left_out_and_bad_input_is_named():
    apart = run(Planted(TEXTS, noisy, DOCS, VECTORS, masked=3), k=4)
    assert apart.rows == run(Planted(TEXTS[:12], noisy, DOCS[:12], VECTORS[:12]), k=4).rows
    one = run(Planted(TEXTS[:3], noisy, [0] * 3, VECTORS[:3]), k=2)
    assert row(one, "fve_nrm_best", "k=2").low is None and "one document" in row(one, "fve_nrm_best", "k=2").note
    with pytest.raises(InputError, match="samples of a row.*at least 1, got 0"):
        run(Planted(TEXTS, noisy, DOCS, VECTORS), k=0)
