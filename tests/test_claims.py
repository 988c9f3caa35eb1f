"""Claims: where a text is cut, how it is put together again, and what leaving a claim out is taken to mean."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nla_jax.claims import (
    all_variants,
    idle,
    idle_shares,
    join_claims,
    parts,
    penalties,
    penalty,
    split_claims,
    variants,
    without_idle,
)
from nla_jax.errors import InputError
from nla_jax.lexical import describe

PATIENT = settings(deadline=None, max_examples=150)  # a busy machine is no failure
STORY = 'A sailor story in the harbor. Mood happy. The last word is "rope". Next comes a place.'
# Marks, breaks and letters in any order: what explanations are made of, and more of it than they ever hold.
hostile = st.one_of(
    st.text(), st.text(st.sampled_from("aBé1 \n.;!?…\"'“”‘’()-。「」#:,\u2028\r\x00\ud800\u0301"), max_size=40)
)


@pytest.mark.parametrize(
    "text, claims",
    [
        (STORY, ["A sailor story in the harbor.", "Mood happy.", 'The last word is "rope".', "Next comes a place."]),
        ("One feature\n\nAnother. And more\n", ["One feature", "Another.", "And more"]),
        ("- first\n* second\n3. third\n(4) fourth", ["first", "second", "third", "fourth"]),
        ("one; two (a; b); three.", ["one", "two (a; b)", "three"]),
        ("One; two. Three.", ["One; two.", "Three."]),
        ('He said "Stop. Go." Then he left.', ['He said "Stop. Go."', "Then he left."]),
        ('"Go!" he said. (It was late. Dark.) Yes', ['"Go!" he said.', "(It was late. Dark.)", "Yes"]),
        ("Mr. Smith and J. Doe, e.g. at 3.5 miles. It was... odd. So?", None),
        ("他说「你好。」吗？我说是。再见", ["他说「你好。」吗？", "我说是。", "再见"]),
        ("no end", ["no end"]),
        ("...", ["..."]),
        (" \n- \n", []),
        ("", []),
    ],
)
def test_claims_are_sentences_and_lines(text, claims):
    if claims is None:
        claims = ["Mr. Smith and J. Doe, e.g. at 3.5 miles.", "It was... odd.", "So?"]
    assert split_claims(text) == claims


@PATIENT
@given(hostile)
def test_a_text_is_its_claims_and_gaps(text):
    whole = parts(text)
    assert (whole.text == text and len(whole.gaps) == len(whole.claims) + 1) or (whole.claims == whole.gaps == ())
    assert all(claim == claim.strip() and claim for claim in whole.claims)
    # Nothing that a reader could read is in a gap.
    assert not any(c.isalpha() for gap in whole.gaps for c in gap)


@PATIENT
@given(hostile, hostile)
def test_claims_joined_like_their_text_are_that_text(text, other):
    claims = split_claims(text)
    assert join_claims(claims, text) == (text if claims else "")
    joined = join_claims(claims, other)
    assert all(claim in joined for claim in claims)


def test_joining_keeps_claims_apart():
    assert join_claims(["B.", "A"], "A\nB.") == "B.\nA"
    assert join_claims(["A", "B."], "X. Y.") == "A\nB."
    assert join_claims(["B.", "C.", "A."], "1. A.\n2. B.") == "1. B.\n2. C.\n2. A."
    assert join_claims(["b", "a"], "a; b.") == "b; a."


def test_variants_leave_out_one_claim_each():
    assert variants("A one. B two.\n\nC three.") == ["B two.\n\nC three.", "A one.\n\nC three.", "A one. B two."]
    assert variants("- a\n- b") == ["- b", "- a"]
    assert variants("a; b; c.") == ["b; c.", "a; c.", "a; b."]
    assert variants("only this") == [""]
    assert variants("") == variants(" \n ") == []


@PATIENT
@given(hostile)
@example('a. "b. c" d; e')
def test_a_variant_is_the_text_less_its_claim(text):
    claims = split_claims(text)
    shortened = variants(text)
    assert len(shortened) == len(claims)
    for i, variant in enumerate(shortened):
        rest = claims[:i] + claims[i + 1 :]
        assert len(variant) < len(text) and all(claim in variant for claim in rest)


@PATIENT
@given(st.text(max_size=300))
def test_the_lexical_teachers_features_have_two_claims_or_more(prefix):
    assert len(split_claims(describe(prefix))) >= 2


def test_the_penalty_is_the_share_of_claims_that_add_nothing():
    assert penalty(0.5, [0.5, 0.4, 0.6, 0.9]) == 0.5  # without the first two nothing is lost
    assert penalty(0.5, [0.5, 0.4, 0.6, 0.9], threshold=0.2) == 0.75
    assert penalty(0.5, [0.75], threshold=0.25) == 1.0  # by no more than the threshold
    assert penalty(0.5, []) == 0.0
    assert idle(0.5, [0.4, 0.6]).tolist() == [True, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_errors_that_are_not_finite_count_for_no_claim(bad):
    assert penalty(0.5, [bad, 0.4]) == 0.5
    assert penalty(bad, [0.4, 0.4]) == 0.0
    assert penalties(np.array([bad, 1.0]), np.array([0.5, bad, 0.5]), np.array([0, 1, 1])).tolist() == [0.0, 0.5]


@PATIENT
@given(st.lists(st.sampled_from([STORY, "", "a; b", "one", "A.\n\nB. C."]), max_size=6), st.integers(0, 99))
def test_penalties_of_many_texts_are_those_of_each(texts, seed):
    rng = np.random.default_rng(seed)
    listed, owner = all_variants(texts)
    assert listed == [v for text in texts for v in variants(text)] and owner.shape == (len(listed),)
    full, without = rng.uniform(size=len(texts)), rng.uniform(size=len(listed))
    want = [penalty(full[i], without[owner == i], 0.1) for i in range(len(texts))]
    got = penalties(full, without, owner, 0.1)
    assert got.dtype == np.float32 and got.tolist() == pytest.approx(want)


def test_idle_shares_are_what_a_reader_does_without():
    """A reader to whom only the words north and east mean anything."""

    def read(texts: list[str]) -> np.ndarray:
        return np.array([["north" in text, "east" in text] for text in texts], np.float32) + 1e-3

    texts = ["It is north. It is east.", "It is north. It rains. It is cold. So.", "unread", "", "It is north."]
    vectors = np.array([[1, 1], [5, 0], [1, 0], [1, 0], [0, 3]], np.float32)
    shares = idle_shares(texts, np.array([False, False, True, False, False]), vectors, read, 2**0.5, threshold=0.01)
    # Nothing to leave out, three of four, failed, empty, and a claim that is worse than none.
    assert shares.tolist() == [0.0, 0.75, 0.0, 0.0, 1.0]
    assert idle_shares(texts[:1], np.array([True]), vectors[:1], read, 1.0).tolist() == [0.0]


def test_penalties_need_one_error_a_variant():
    with pytest.raises(InputError, match="expected 2 errors of variants, got 1"):
        penalties(np.zeros(1), np.zeros(1), np.zeros(2, np.int64))


def test_idle_claims_can_be_left_out():
    text = "A one. B two.\n\nC three."
    assert without_idle(text, [True, False, True]) == "B two."
    assert without_idle(text, [False, False, False]) == text
    assert without_idle(text, [True, True, True]) == text  # never empty
    assert without_idle("", []) == ""
    with pytest.raises(InputError, match="expected 3 marks"):
        without_idle(text, [True])
