"""Retrieval: expectations over random candidates against enumeration, planted readings, and what cannot be done."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import D, Planted, ignores_text, row, value, vector, whole

from nla_jax.errors import InputError
from nla_jax.evals.retrieval import CHANCE, SHUFFLED, Ranks, expected, run

N = 24
DOCS = np.repeat(np.arange(8), 3)
TOKENS = np.tile([7, 8], 12)
NAMES = [[f"row {i}"] for i in range(N)]


def noisy(text: str) -> np.ndarray:
    return vector(text) + 1.5 * vector(f"noise of {text}")


VECTORS = np.stack([vector(name) for (name,) in NAMES])


def by_enumeration(above: int, tied: int, pool: int, size: int) -> tuple[float, float]:
    """Top-1 and reciprocal rank, averaged over every set of candidates and every order of what ties."""
    kinds = [1] * above + [0] * tied + [-1] * (pool - above - tied)
    top, reciprocal = [], []
    for chosen in itertools.combinations(kinds, size - 1):
        first, ties = chosen.count(1) + 1, chosen.count(0)
        top.append((first == 1) / (1 + ties))
        reciprocal.append(np.mean([1 / (first + t) for t in range(ties + 1)]))
    return float(np.mean(top)), float(np.mean(reciprocal))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_expectations_are_those_over_all_sets_of_candidates(data):
    pool = data.draw(st.integers(1, 9))
    above = data.draw(st.integers(0, pool))
    tied = data.draw(st.integers(0, pool - above))
    size = data.draw(st.integers(2, pool + 1))
    one = Ranks(*(np.array([x]) for x in (above, tied, pool)))
    got = [float(x[0]) for x in expected(one, size)]
    np.testing.assert_allclose(got, by_enumeration(above, tied, pool, size), rtol=1e-12)
    np.testing.assert_allclose(expected(one, pool + 1), expected(one), rtol=1e-12)


def test_expectations_of_large_sets_are_finite_and_between_0_and_1():
    n = 100_000
    found = Ranks(np.array([0, 1, 50, n // 2, n - 1]), np.zeros(5, np.int64), np.full(5, n - 1))
    for size in (2, 10, 1000, n):
        top, reciprocal = expected(found, size)
        assert top[0] == 1 and reciprocal[0] == pytest.approx(1, rel=1e-12)
        assert (np.diff(top) <= 0).all() and (np.diff(reciprocal) < 0).all() and (reciprocal > 0).all()
    assert expected(found, 2)[0][3] == pytest.approx(0.5, rel=1e-4)


def test_every_number_is_that_of_the_dumped_vectors():
    ctx = Planted(NAMES, noisy, DOCS, VECTORS, tokens=TOKENS)
    result = run(ctx, candidates=(10, 24))
    whole(result)
    p, v = (np.asarray(result.columns[name], np.float64) for name in ("predicted", "vector"))
    v = v / np.linalg.norm(v, axis=1, keepdims=True)
    mean = v.mean(axis=0)
    p = p / np.linalg.norm(p, axis=1, keepdims=True) - mean
    v = v - mean
    cosine = (p @ v.T) / np.linalg.norm(p, axis=1)[:, None] / np.linalg.norm(v, axis=1)
    for group, labels, size in [
        ("N=10", np.zeros(N), 10),
        ("N=24", np.zeros(N), 24),
        ("same document", DOCS, None),
        ("same token", TOKENS, None),
    ]:
        top, reciprocal = [], []
        for i in range(N):
            others = [j for j in range(N) if j != i and labels[j] == labels[i]]
            above = sum(cosine[i, j] > cosine[i, i] for j in others)
            if size == 10:  # drawn, to be near
                rng = np.random.default_rng(i)
                better = np.array([cosine[i, j] > cosine[i, i] for j in others])
                drawn = 1 + np.array([better[rng.permutation(len(others))[:9]].sum() for _ in range(2000)])
                top.append(np.mean(drawn == 1))
                reciprocal.append(np.mean(1 / drawn))
            else:
                top.append(above == 0)
                reciprocal.append(1 / (1 + above))
        near = {"abs": 0.01} if size == 10 else {"rel": 1e-12}
        assert value(result, "top_1", group) == pytest.approx(np.mean(top), **near)
        assert value(result, "mrr", group) == pytest.approx(np.mean(reciprocal), **near)
    assert 0.2 < value(result, "top_1", "N=24") < 0.95
    low, high = row(result, "mrr", "N=10").low, row(result, "mrr", "N=10").high
    assert low < value(result, "mrr", "N=10") < high
    assert result.rows == run(ctx, candidates=(10, 24)).rows


def test_shuffled_pairs_are_the_readings_of_other_documents_and_near_chance():
    result = run(Planted(NAMES, noisy, DOCS, VECTORS), candidates=(24,))
    c = result.columns
    where = {row: i for i, row in enumerate(c["row"].tolist())}
    other = np.array([where[r] for r in c["shuffled_with"].tolist()])
    assert (np.asarray(c["doc"])[other] != c["doc"]).all()
    np.testing.assert_allclose(
        value(result, "mrr", "N=24", SHUFFLED), np.mean(1 / (1 + np.asarray(c["above_shuffled"]))), rtol=1e-12
    )
    assert value(result, "mrr", "N=24", SHUFFLED) < 0.35 < value(result, "mrr", "N=24")


def test_vectors_that_are_their_own_targets_are_found_first_everywhere():
    result = run(Planted(NAMES, vector, DOCS, tokens=TOKENS))
    for group in ("N=10", "same document", "same token"):
        assert value(result, "top_1", group) == 1 == value(result, "mrr", group)
        assert value(result, "top_1", group, SHUFFLED) < 0.5
    assert value(result, "top_1", "N=10", CHANCE) == pytest.approx(0.1)
    assert value(result, "mrr", "N=10", CHANCE) == pytest.approx(sum(1 / r for r in range(1, 11)) / 10)
    assert value(result, "top_1", "same document", CHANCE) == pytest.approx(1 / 3)
    assert "left out: N=100, N=1000; there are 24 candidates" in result.notes


def test_an_ar_that_ignores_the_text_is_at_chance():
    result = run(Planted(NAMES, ignores_text, DOCS, VECTORS), candidates=(2, 5, 24))
    for size in (2, 5, 24):
        for metric in ("top_1", "mrr"):
            chance = value(result, metric, f"N={size}", CHANCE)
            assert value(result, metric, f"N={size}") == pytest.approx(chance, rel=1e-9)


def test_failed_texts_and_readings_that_are_no_number_are_at_chance():
    broken = lambda text: np.full(D, np.nan) if text == "row 3" else vector(text)  # noqa: E731
    failed = np.zeros((N, 1), bool)
    failed[5] = True
    result = run(Planted(NAMES, broken, DOCS, VECTORS, failed=failed), candidates=(10,))
    assert value(result, "top_1", "N=10") == pytest.approx((N - 2 + 2 / 10) / N)
    assert np.flatnonzero(result.columns["tied"]).tolist() == [3, 5]


def test_equal_vectors_tie():
    result = run(Planted([["a"], ["a"], ["b"]], vector, [0, 1, 2]), candidates=(3,))
    assert value(result, "top_1", "N=3") == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert value(result, "mrr", "N=3") == pytest.approx((0.75 + 0.75 + 1) / 3)


def test_the_training_mean_is_the_centre_where_it_is_known():
    mean = 0.3 * vector("mean")
    result = run(Planted(NAMES, noisy, DOCS, VECTORS, mean=mean), candidates=(24,))
    p, v = (np.asarray(result.columns[name], np.float64) for name in ("predicted", "vector"))
    p, v = (4 * x / np.linalg.norm(x, axis=1, keepdims=True) - mean for x in (p, v))
    p, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (p, v))
    cosine = p @ v.T
    above = np.sum(cosine > np.diag(cosine)[:, None], axis=1)
    assert np.array_equal(result.columns["above"], above)
    assert result.settings["centre"] == "mean of the training rows"


def test_masked_rows_are_no_candidates():
    apart = run(Planted(NAMES, noisy, DOCS, VECTORS, masked=4), candidates=(20,))
    alone = run(Planted(NAMES[:20], noisy, DOCS[:20], VECTORS[:20]), candidates=(20,))
    assert apart.rows == alone.rows


def test_one_document_has_no_interval_and_no_shuffled_pairs():
    result = run(Planted(NAMES, noisy, np.zeros(N, int), VECTORS), candidates=(10,))
    found = row(result, "top_1", "N=10")
    assert found.low is None and "one document: no interval" in found.note
    assert not [r for r in result.rows if r.control == SHUFFLED]
    assert any("one document" in note for note in result.notes)


def test_sets_too_small_for_what_is_asked():
    few = run(Planted(NAMES[:7], noisy, DOCS[:7], VECTORS[:7]))
    assert {r.group for r in few.rows if r.group.startswith("N=")} == {"N=7"}
    assert "left out: N=10, N=100, N=1000; there are 7 candidates" in few.notes
    assert any("negatives of the same token" in note for note in few.notes)
    apart = run(Planted(NAMES[:4], noisy, range(4), VECTORS[:4], tokens=range(4)))
    assert "no negatives of the same document: no two rows share one" in apart.notes
    assert "no negatives of the same token: no two rows share one" in apart.notes
    with pytest.raises(InputError, match="at least 2 rows.*got 1"):
        run(Planted(NAMES[:1], noisy, [0], VECTORS[:1]))
    with pytest.raises(InputError, match="sizes of 2 or more"):
        run(Planted(NAMES, noisy, DOCS, VECTORS), candidates=(1, 10))
