"""Value of claims: what leaving each out costs an AR that reads words, beside random spans of the same length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import D, Planted, bag_of_words, ignores_text, mse, row, value, vector, whole

from nla_jax.claims import split_claims, variants, without_span
from nla_jax.errors import InputError
from nla_jax.evals.claim_value import ONE, SPAN, run

N, V = 12, 0.7
DOCS = np.repeat(np.arange(4), 3)
TEXTS = [[f"A letter{i} home. idle idler idlest.\n\nThe harbour{i} sleeps. Next a noun{i}."] for i in range(N)]
VECTORS = np.stack([bag_of_words(t[0]) + vector(f"what no text says {i}") for i, t in enumerate(TEXTS)])


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from(["one", "two", "three", "x.\n", "- y"]), min_size=1, max_size=9), st.integers(1, 9))
def test_a_span_is_as_many_words_in_a_row(words, length):
    text = " ".join(words).strip()
    claim, n = " ".join(["w"] * length), len(text.split())
    left = without_span(text, claim, np.random.default_rng(length))
    if length < n:
        found = left.split()
        assert len(found) == n - length
        assert any(found == text.split()[:i] + text.split()[i + length :] for i in range(n))
        assert left == left.rstrip()


def test_every_span_is_drawn_and_scripts_without_spaces_lose_characters():
    drawn = {without_span("a b c d", "x y", np.random.default_rng(seed)) for seed in range(60)}
    assert drawn == {"c d", "a d", "a b"}
    assert {without_span("港の手紙。", "手紙。", np.random.default_rng(seed)) for seed in range(40)} == {
        "港の",
        "港。",
        "紙。",
    }
    assert without_span("a b.", "a b.", np.random.default_rng(0)) == ""


def test_every_number_is_that_of_the_dumped_texts():
    ctx = Planted(TEXTS, bag_of_words, DOCS, VECTORS, variance=V)
    result = run(ctx)
    whole(result)
    c = result.columns
    about = VECTORS.astype(np.float32)[np.asarray(c["row"]) // 3]
    full, less, span = (
        mse(np.stack([bag_of_words(t) for t in c[name]]), about)
        for name in ("text", "text_without", "text_without_span")
    )
    drop, other = (less - full) / V, (span - full) / V
    place = np.array(c["place"])
    for group, at in [("", place != ""), *((f"{p} claim", place == p) for p in ("first", "middle", "last"))]:
        assert value(result, "fve_drop", group) == pytest.approx(drop[at].mean(), rel=1e-9)
        assert value(result, "fve_drop", group, SPAN) == pytest.approx(other[at].mean(), rel=1e-9)
        assert value(result, "fve_drop_over_span", group) == pytest.approx((drop - other)[at].mean(), rel=1e-9)
        # Rounding decides no claim but an idle one, whose drop is exactly 0.
        assert value(result, "idle_share", group) == pytest.approx((drop <= 1e-12)[at].mean(), abs=1e-12)
        assert value(result, "idle_share", group, SPAN) == pytest.approx((other <= 1e-12)[at].mean(), abs=1e-12)
        assert row(result, "fve_drop", group).n == at.sum()
    assert value(result, "claims_per_text") == 4 and len(place) == 4 * N
    idle = np.array([claim == "idle idler idlest." for claim in c["claim_text"]])
    assert np.array_equal((np.asarray(c["mse_nrm_without"]) <= np.asarray(c["mse_nrm"]))[idle], np.ones(N, bool))
    for i, text in enumerate(c["text"]):
        at = c["claim"][i]
        assert c["text_without"][i] == variants(text)[at] and c["claim_text"][i] == split_claims(text)[at]
        assert len(c["text_without_span"][i].split()) == len(text.split()) - len(c["claim_text"][i].split())
    assert result.rows == run(ctx).rows
    assert (
        run(Planted(TEXTS, bag_of_words, DOCS, VECTORS, seed=1)).columns["text_without_span"] != c["text_without_span"]
    )


def test_an_ar_that_ignores_the_text_loses_exactly_nothing():
    result = run(Planted(TEXTS, ignores_text, DOCS, VECTORS))
    drops = [r for r in result.rows if r.metric.startswith("fve_drop")]
    assert len(drops) == 12 and all(r.value == r.low == r.high == 0 for r in drops)
    assert all(r.value == 1 for r in result.rows if r.metric == "idle_share")


def test_the_claim_that_says_it_all_is_told_from_the_rest():
    texts = [[f"idle one two. The key{i} key{i} turns. idle three four."] for i in range(N)]
    reads = lambda text: sum((vector(w.strip(".")) for w in text.split() if "key" in w), np.full(D, 1e-3))  # noqa: E731
    result = run(Planted(texts, reads, DOCS, variance=V))
    assert value(result, "idle_share", "first claim") == 1 == value(result, "idle_share", "last claim")
    assert value(result, "idle_share", "middle claim") == 0
    assert value(result, "fve_drop", "middle claim") > 0.5
    assert value(result, "fve_drop_over_span", "middle claim") > 0.2


def test_texts_with_one_claim_stand_apart():
    texts = [t if i % 2 else [f"Only harbour{i}."] for i, t in enumerate(TEXTS)]
    result = run(Planted(texts, bag_of_words, DOCS, VECTORS, variance=V))
    whole(result)
    place = np.array(result.columns["place"])
    assert row(result, "fve_drop").n == 4 * N // 2 and row(result, "fve_drop", ONE).n == N // 2
    c = result.columns
    drop = (np.asarray(c["mse_nrm_without"]) - np.asarray(c["mse_nrm"])) / V
    assert value(result, "fve_drop", ONE) == pytest.approx(drop[place == "only"].mean(), rel=1e-12)
    assert {t for t, p in zip(c["text_without"], place, strict=True) if p == "only"} == {""}
    assert value(result, "share_of_texts", ONE) == 0.5 and value(result, "claims_per_text") == 2.5
    alone = run(Planted([["Only one."]] * 3, bag_of_words, [0, 1, 2], VECTORS[:3]))
    assert {r.metric for r in alone.rows} == {"claims_per_text", "share_of_texts", "fve_drop"}
    assert any("no text has two claims" in note for note in alone.notes)


def test_the_threshold_of_idleness_counts():
    ctx = Planted(TEXTS, bag_of_words, DOCS, VECTORS)
    shares = [value(run(ctx, idle=t), "idle_share") for t in (0.0, 0.01, 5.0)]
    assert shares[0] == 0.25 and shares == sorted(shares) and shares[-1] == 1


def test_failed_and_masked_texts_are_left_out():
    failed = np.zeros((N, 1), bool)
    failed[[0, 4]] = True
    result = run(Planted(TEXTS, bag_of_words, DOCS, VECTORS, failed=failed, masked=3))
    assert set(np.asarray(result.columns["row"]) // 3) == set(range(9)) - {0, 4}
    assert "2 failed texts left out" in result.notes


def test_bad_input():
    with pytest.raises(InputError, match="an explanation with a claim.*12 texts without a claim, and 0 that failed"):
        run(Planted([[" "]] * N, bag_of_words, DOCS, VECTORS))
    with pytest.raises(InputError, match="0 texts without a claim, and 12 that failed"):
        run(Planted(TEXTS, bag_of_words, DOCS, VECTORS, failed=np.ones((N, 1), bool)))
    with pytest.raises(InputError, match="idle.*0 or more, got -1"):
        run(Planted(TEXTS, bag_of_words, DOCS, VECTORS), idle=-1)
    one = run(Planted(TEXTS[:3], bag_of_words, [0] * 3, VECTORS[:3]))
    assert row(one, "fve_drop").low is None and "one document" in row(one, "fve_drop").note
