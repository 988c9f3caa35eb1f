"""Agreement: which claims count as the same, how often they recur, and what that says of their value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import D, Planted, bag_of_words, ignores_text, mse, row, value, vector, whole

from nla_jax.claims import split_claims, variants
from nla_jax.errors import InputError
from nla_jax.evals.agreement import (
    NEIGHBOURS,
    OTHERS,
    SAMPLES,
    SHUFFLED,
    bin_of,
    calibration_error,
    content_words,
    jaccard,
    neighbours,
    recurrence,
    run,
)

N, K, V = 12, 4, 0.7
DOCS = np.repeat(np.arange(4), 3)
# Every sample says the row's fact, every second one the document's, and each something of its own.
TEXTS = [
    [
        f"Fact{i} rain{i} falls{i}. " + (f"Harbour{d} ships{d}. " if g % 2 == 0 else "") + f"idle{i}x{g} idle{i}y{g}."
        for g in range(K)
    ]
    for i, d in enumerate(DOCS)
]
VECTORS = np.stack([bag_of_words(t[0]) + vector(f"what no text says {i}") for i, t in enumerate(TEXTS)])


def test_claims_are_matched_by_their_content_words():
    assert content_words("The sailor's ROPE, in it!") == {"sailor", "rope"} == content_words("rope of a sailor’s")
    assert content_words("It is there.") == {"it", "is", "there"}  # nothing else to go by
    assert content_words("... --") == frozenset() == content_words("")
    assert jaccard(frozenset("ab"), frozenset("bc")) == 1 / 3 and jaccard(frozenset(), frozenset()) == 0
    some = [[frozenset("abc")], [frozenset("xyz"), frozenset("ab")], []]
    assert recurrence(frozenset("ab"), some, 0.6) == 2 / 3 and recurrence(frozenset("ab"), some, 0.7) == 1 / 3
    assert np.isnan(recurrence(frozenset("ab"), [], 0.5))


def test_neighbours_are_the_rows_before_and_after_in_the_document():
    docs, positions = np.array([1, 0, 1, 0, 1, 2]), np.array([90, 70, 50, 60, 70, 50])
    assert [sorted(some) for some in neighbours(docs, positions)] == [[4], [3], [4], [1], [0, 2], []]


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), min_size=1, max_size=40), st.integers(1, 12))
def test_the_calibration_error_is_that_of_a_loop(pairs, bins):
    confidence, outcome = (np.array(x, np.float64) for x in zip(*pairs, strict=True))
    confidence = confidence / 7
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(len(pairs)) if b == min(pairs[i][0] * bins // 7, bins - 1)]
        if inside:
            total += len(inside) / len(pairs) * abs(outcome[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, outcome, bins) == pytest.approx(total, abs=1e-12)


def test_shares_on_an_edge_are_in_the_bin_above():
    assert bin_of(np.array([0.0, 0.3, 0.6, 0.7, 1.0, 3 / 7]), 10).tolist() == [0, 3, 6, 7, 9, 4]


def test_every_number_is_that_of_the_texts():
    ctx = Planted(TEXTS, bag_of_words, DOCS, VECTORS, variance=V)
    result = run(ctx, k=K)
    whole(result)
    own, near, far, drops = [], [], [], []

    def same(a: str, b: str) -> bool:
        a, b = (set(x.lower().strip(".").split()) for x in (a, b))
        return len(a & b) >= 0.5 * len(a | b)

    partner = (np.arange(N) + 6) % N
    assert (DOCS[partner] != DOCS).all()
    for i in range(N):
        beside = [j for j in (i - 1, i + 1) if 0 <= j < N and DOCS[j] == DOCS[i]]
        for g in range(K):
            said = split_claims(TEXTS[i][g])
            for j, claim in enumerate(said):
                texts = [TEXTS[i][h] for h in range(K) if h != g]
                nearby = [t for row in beside for t in TEXTS[row]]
                for rates, some in ((own, texts), (near, nearby), (far, TEXTS[partner[i]])):
                    rates.append(np.mean([any(same(claim, c) for c in split_claims(t)) for t in some]))
                read = np.stack([bag_of_words(TEXTS[i][g]), bag_of_words(variants(TEXTS[i][g])[j])])
                drops.append(float(np.diff(mse(read, VECTORS.astype(np.float32)[i]))[0]) if g == 0 else np.nan)
    c = result.columns
    np.testing.assert_allclose(c["recurrence_samples"], own)
    np.testing.assert_allclose(c["recurrence_neighbours"], near)
    np.testing.assert_allclose(c["recurrence_other_documents"], far)
    np.testing.assert_allclose(c["mse_nrm_rise_without"], drops, atol=1e-12)
    beside = {0: K, 1: 2 * K, 2: K}  # neighbours' samples of the first, middle and last row of a document
    assert np.array_equal(c["compared_neighbours"], [beside[r // 3 % 3] for r in c["row"].tolist()])
    assert set(c["compared_samples"]) == {K - 1} and set(c["compared_other_documents"]) == {K}
    assert value(result, "recurrence", SAMPLES) == pytest.approx(np.mean(own))
    assert value(result, "recurrence", NEIGHBOURS) == pytest.approx(np.mean(near))
    assert value(result, "recurrence", SAMPLES, OTHERS) == np.mean(far) == 0
    assert value(result, "recurrence", NEIGHBOURS, OTHERS) == 0
    first = np.asarray(c["sample"]) == 0
    rate, worth = np.array(own)[first], (np.array(drops)[first] > 1e-12).astype(float)
    assert value(result, "claims_of_value") == pytest.approx(worth.mean())
    assert value(result, "ece") == pytest.approx(calibration_error(rate, worth, 10), rel=1e-9)
    more, fewer = np.array(drops)[first][rate >= 0.5] / V, np.array(drops)[first][rate < 0.5] / V
    assert value(result, "fve_drop", "claims of half of the samples or more") == pytest.approx(more.mean(), rel=1e-9)
    assert value(result, "fve_drop", "claims of fewer") == pytest.approx(fewer.mean(), rel=1e-9)
    curve = result.series["calibration"]
    assert curve["x"] == pytest.approx(sorted(set(rate))) and sum(curve["n"]) == len(rate)
    assert curve["y"] == pytest.approx([worth[rate == x].mean() for x in sorted(set(rate))])
    assert result.rows == run(ctx, k=K).rows


def test_planted_recurrence_is_found():
    result = run(Planted(TEXTS, bag_of_words, DOCS, VECTORS), k=K)
    rate = np.asarray(result.columns["recurrence_samples"])
    claims = np.array(result.columns["claim_text"])
    for start, expected in (("Fact", {1.0}), ("Harbour", {1 / 3}), ("idle", {0.0})):
        assert set(rate[np.char.startswith(claims, start)]) == expected
    beside = np.asarray(result.columns["recurrence_neighbours"])
    assert set(beside[np.char.startswith(claims, "Harbour")]) == {0.5}
    assert set(beside[np.char.startswith(claims, "Fact")]) == {0.0}


def test_samples_that_all_say_the_same_recur_always_and_are_calibrated_where_all_has_value():
    texts = [[f"Red{i} boat{i}. Blue{i} sea{i}."] * K for i in range(N)]
    result = run(Planted(texts, bag_of_words, DOCS), k=K)
    assert value(result, "recurrence", SAMPLES) == 1 and value(result, "recurrence", SAMPLES, OTHERS) == 0
    assert value(result, "claims_of_value") == 1 and value(result, "ece") == 0


def test_claims_that_never_recur_and_all_have_value_are_off_by_1():
    texts = [[f"Red{i}{g} boat{i}{g}. Blue{i}{g} sea{i}{g}." for g in range(K)] for i in range(N)]
    result = run(Planted(texts, bag_of_words, DOCS), k=K)
    assert value(result, "recurrence", SAMPLES) == 0
    assert value(result, "claims_of_value") == 1 == value(result, "ece")


def test_an_ar_that_ignores_the_text_gives_no_claim_a_value():
    result = run(Planted(TEXTS, ignores_text, DOCS, VECTORS), k=K)
    assert value(result, "claims_of_value") == 0
    first = np.asarray(result.columns["sample"]) == 0
    assert value(result, "ece") == pytest.approx(np.asarray(result.columns["recurrence_samples"])[first].mean())
    assert value(result, "fve_drop", "claims of fewer") == 0


def test_the_control_of_the_calibration_breaks_the_link():
    texts = [[f"Red{i} boat{i}. idle{i}{g} idler{i}{g}." for g in range(K)] for i in range(N)]
    result = run(Planted(texts, bag_of_words, DOCS), k=K)
    assert value(result, "ece") == 0
    # Which claims are paired is given by their order; half of the claims have value and half recur.
    assert row(result, "ece", control=SHUFFLED).n == 2 * N


def test_failed_samples_and_texts_of_one_claim_are_left_out():
    failed = np.zeros((N, K), bool)
    failed[0] = [True, False, False, True]
    failed[1] = [False, True, True, True]
    texts = [*TEXTS[:-1], [f"Only{g} harbour{g}." for g in range(K)]]
    result = run(Planted(texts, bag_of_words, DOCS, VECTORS, failed=failed), k=K)
    at, sample = np.asarray(result.columns["row"]) // 3, np.asarray(result.columns["sample"])
    rate, rise = (np.asarray(result.columns[k]) for k in ("recurrence_samples", "mse_nrm_rise_without"))
    assert set(sample[at == 0]) == {1, 2} and set(rate[at == 0]) <= {0.0, 1.0}
    assert np.isnan(rate[at == 1]).all() and np.isfinite(rise[at == 1]).all()
    assert np.isnan(rise[at == N - 1]).all() and np.isnan(rise[sample > 0]).all()
    assert "5 of 48 samples failed: left out" in result.notes
    assert row(result, "claims_of_value").n == 3 * (N - 3)


def test_what_there_is_nothing_to_compare_with_is_said():
    one = run(Planted(TEXTS[:3], bag_of_words, [0] * 3, VECTORS[:3]), k=2)
    assert row(one, "recurrence", SAMPLES).low is None and "one document" in row(one, "recurrence", SAMPLES).note
    assert not [r for r in one.rows if r.control]
    assert sum(note.startswith("no control") for note in one.notes) == 2
    apart = run(Planted(TEXTS[:4], bag_of_words, range(4), VECTORS[:4]), k=2)
    assert any(note.startswith("no recurrence across neighbouring positions") for note in apart.notes)
    single = run(Planted([["One claim."] * 2] * 4, bag_of_words, range(4), VECTORS[:4]), k=2)
    assert any(note.startswith("no calibration") for note in single.notes) and not single.series


@pytest.mark.parametrize(
    "bad, match",
    [
        ({"k": 1}, "at least 2"),
        ({"k": 2, "overlap": 0.0}, "over 0 and up to 1"),
        ({"k": 2, "bins": 0}, "bins.*at least 1"),
        ({"k": 2, "idle": -0.1}, "0 or more"),
    ],
)
def test_bad_settings_are_named(bad, match):
    with pytest.raises(InputError, match=match):
        run(Planted(TEXTS, bag_of_words, DOCS, VECTORS), **bad)


def test_explanations_without_claims_are_an_error():
    with pytest.raises(InputError, match="explanations with a claim"):
        run(Planted([["", "..."]] * N, lambda text: np.ones(D), DOCS, VECTORS), k=2)
