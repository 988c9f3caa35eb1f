"""Transforms of explanations before the AR reads them: what they change, and above all what they leave alone."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nla_jax.claims import split_claims
from nla_jax.errors import InputError
from nla_jax.transforms import TRANSFORMS, apply, drop_quotes, noise, shuffle

PATIENT = settings(deadline=None, max_examples=150)  # a busy machine is no failure
STORY = 'A sailor story in the harbor. Mood happy. The last word is "rope". Next comes a place.'
FEATURES = (
    "A letter in the first person, about a harbour.\n\nNo bracket is open. The sentence began “He said ‘hello’”, "
    'five words in.\n\nThe last words are "and took the", ending with an article; a noun may follow.'
)
ALL = tuple((name, 1.0) for name in TRANSFORMS)
hostile = st.one_of(
    st.text(), st.text(st.sampled_from("aBß1İ \n.;!?…\"'“”‘’«»()-。「」#:,\u2028\r\x00\ud800\u0301"), max_size=40)
)
seeds = st.integers(0, 2**32)
words = st.lists(st.sampled_from("rain snow harbour mood rope Anna is 3.5 e.g. dogs'".split()), min_size=1, max_size=6)
sentences = words.map(lambda some: "The " + " ".join(some) + " end.")
quotations = st.sampled_from(['"rope"', "“and took the”", "'don't stop'", "‘x’", "«mot»", '"Stop. Go."', "„nein“"])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def letters(text: str) -> str:
    """What is left of a text when case and punctuation do not count."""
    return re.sub(r"\s+", " ", re.sub(r"[,;:.!?…]", "", text.casefold())).strip()


# -- shuffle ----------------------------------------------------------------------------------------------------------


@PATIENT
@given(hostile, seeds)
@example("A\nB. C.", 0)
@example('x "y. z" w "v. u" t', 1)
def test_shuffling_keeps_the_claims(text, seed):
    assert Counter(split_claims(shuffle(text, rng(seed)))) == Counter(split_claims(text))


@PATIENT
@given(st.lists(sentences, min_size=2, max_size=6), st.sampled_from([" ", "\n", "\n\n", "\n- "]), seeds)
def test_shuffling_two_distinct_claims_or_more_changes_their_order(claims, gap, seed):
    assume(len(set(claims)) > 1)
    text = gap.join(claims)
    moved = shuffle(text, rng(seed))
    assert split_claims(moved) != split_claims(text) and sorted(split_claims(moved)) == sorted(claims)
    assert moved.count("\n") == text.count("\n")


def test_every_order_but_the_texts_own_is_drawn():
    text = "One a. Two b. Three c."
    drawn = Counter(shuffle(text, rng(seed)) for seed in range(600))
    assert len(drawn) == 5 and text not in drawn and min(drawn.values()) > 50


def test_shuffling_leaves_list_marks_in_their_places():
    assert shuffle("1. a one\n2. b two", rng()) == "1. b two\n2. a one"
    assert shuffle("a; b.", rng()) == "b; a."
    assert shuffle("same\nsame", rng()) == "same\nsame"


# -- quotes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, left",
    [
        (STORY, "A sailor story in the harbor. Mood happy. The last word is. Next comes a place."),
        ('Next: "x".', "Next."),
        ("The last words are \"He said 'hello,' and\", ending here.", "The last words are, ending here."),
        ('Words such as "a", "b", "c" or "d" come.', "Words such as come."),
        ('A list (e.g. "x" or "y") and ("z") more.', "A list (e.g.) and more."),
        ('A.\n- "only"\n- "first" is it', "A.\n- is it"),
        ('One. "Two", says he. "Three". Four.', "One. says he. Four."),
        ('He said "Stop. Go." Then left.', "He said. Then left."),
        ("the dogs' owner said 'don't stop' aloud, 6' tall", "the dogs' owner said aloud, 6' tall"),
        ('It ends "never closed, here. More', "It ends. More"),
        ('A 6" nail', "A 6 nail"),
        ("他说「你好」吗", "他说吗"),
        ('"all of it"', '"all of it"'),
        ('"all" "of it"\n', '"all" "of it"\n'),
        ("no quotes,  at all .", "no quotes,  at all ."),
    ],
)
def test_dropping_quotes_leaves_readable_text(text, left):
    assert drop_quotes(text) == left
    assert drop_quotes(left) == left


QUOTATION = r'"[^"\n]*"|“[^”\n]*”|«[^»\n]*»|„[^“\n]*“'


@PATIENT
@given(hostile)
def test_no_quoted_span_outlives_dropping(text):
    left = drop_quotes(text)
    assert left == text or not re.search(QUOTATION, left)
    assert drop_quotes(left) == left
    assert bool(left) == bool(text)


@PATIENT
@given(st.lists(st.one_of(sentences, quotations, st.sampled_from(["and", "with", ","])), min_size=1, max_size=12))
def test_what_is_left_has_no_gaps_and_no_stray_punctuation(pieces):
    text = " ".join(["Begin", *pieces, "so."]).replace(" ,", ",")
    left = drop_quotes(text)
    assert not re.search(QUOTATION + r"|(?<!\w)'\w[^']*\w'(?!\w)|[‘’]", left)
    assert "  " not in left and not re.search(r"\s[,.;:!?]|[,;:][.!?]|^\W|\s$", left)
    gone = Counter(re.findall(r"\w+", text)) - Counter(re.findall(r"\w+", left))
    # All that went is in the quotations, or is a short word between two of them.
    assert set(gone) <= set(re.findall(r"\w+", " ".join(p for p in pieces if p[0] in "\"“'‘«„"))) | {"and"}


# -- noise ------------------------------------------------------------------------------------------------------------


@PATIENT
@given(st.text(st.sampled_from("aBßİıǅÀé1 \n.;!?…\"'“”()-。:,\u0301x"), max_size=60), seeds)
def test_noise_changes_only_case_and_stops(text, seed):
    assert letters(noise(text, rng(seed))) == letters(text)


@PATIENT
@given(hostile, seeds)
def test_noise_keeps_words_apart(text, seed):
    assert len(noise(text, rng(seed)).split()) <= len(text.split())
    assert [w.casefold() for w in re.findall(r"\w+", noise(text, rng(seed)))] == [
        w.casefold() for w in re.findall(r"\w+", text)
    ]


def test_noise_makes_a_difference():
    drawn = {noise(FEATURES, rng(seed)) for seed in range(50)}
    assert len(drawn) > 30
    assert any(text == text.lower() for text in drawn) and any("Letter" in text for text in drawn)
    assert any(text.count(".") < FEATURES.count(".") for text in drawn)


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMS)
@PATIENT
@given(text=hostile, seed=seeds)
def test_no_text_breaks_a_transform_or_becomes_empty(name, text, seed):
    left = apply(text, ((name, 1.0),), rng(seed))
    assert bool(left) == bool(text) and bool(left.strip()) == bool(text.strip())
    assert left == apply(text, ((name, 1.0),), rng(seed))


@PATIENT
@given(hostile, seeds)
def test_probability_0_changes_nothing(text, seed):
    assert apply(text, (), rng(seed)) == text
    assert apply(text, tuple((name, 0.0) for name in TRANSFORMS), rng(seed)) == text


def test_each_transform_happens_as_often_as_asked():
    drawn = [apply(STORY, (("drop_quotes", 0.25),), rng(seed)) for seed in range(1000)]
    assert 190 < sum(text != STORY for text in drawn) < 310


def test_transforms_do_not_depend_on_each_others_presence_or_order():
    for seed in range(20):
        both = apply(STORY, (("noise", 1.0), ("shuffle", 1.0)), rng(seed))
        assert both == apply(STORY, (("shuffle", 1.0), ("noise", 1.0)), rng(seed))
        shuffled = apply(STORY, (("shuffle", 1.0),), rng(seed))
        without_quotes = apply(STORY, (("shuffle", 1.0), ("drop_quotes", 1.0)), rng(seed))
        assert without_quotes == drop_quotes(shuffled)


def test_a_generator_goes_on_alike_whatever_was_applied():
    ends = set()
    for transforms in [(), ALL, (("noise", 0.5),)]:
        generator = rng(7)
        apply(STORY, transforms, generator)
        ends.add(int(generator.integers(2**62)))
    assert len(ends) == 1


def test_an_unknown_transform_is_named():
    with pytest.raises(InputError, match="'shufle'.*shuffle or drop_quotes or noise"):
        apply(STORY, (("shufle", 0.5),), rng())
