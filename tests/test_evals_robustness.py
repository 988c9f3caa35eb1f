"""Robustness: what each change does to a text, and to an AR that reads words, or nothing at all."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from fake_llm import FakeLLM
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import D, Planted, Words, bag_of_words, ignores_text, mse, row, value, vector, whole
from teaching import KEY, QUICK, provider_of

from nla_jax.claims import split_claims
from nla_jax.errors import InputError, TeacherError
from nla_jax.evals.robustness import CHANGES, EMPTY, UNTOUCHED, Rewriter, run
from nla_jax.paraphrase import INSTRUCTION, translation
from nla_jax.providers import open_provider
from nla_jax.teacher_asking import Asking
from nla_jax.transforms import TRANSFORMS, quoted_only, reorder_bullets, truncate

N, V = 12, 0.7
DOCS = np.repeat(np.arange(4), 3)
TEXTS = [
    [f'- A letter {i} about harbour h{i}. It is kind{i}.\n- The last words are "took r{i}".\n- Next a noun{i}.']
    for i in range(N)
]
VECTORS = np.stack([bag_of_words(t[0]) + vector(f"what no text says {i}") for i, t in enumerate(TEXTS)])
PATIENT = settings(deadline=None, max_examples=100)


# -- the changes ------------------------------------------------------------------------------------------------------


def test_training_knows_only_its_own_transforms():
    assert list(TRANSFORMS) == ["shuffle", "drop_quotes", "noise"]  # drawn in this order: one more would change runs


@PATIENT
@given(st.text(st.sampled_from("aB1 \n.-*\"'“”#:\u2028\r"), max_size=40), st.integers(0, 2**32))
def test_no_text_breaks_a_change_or_becomes_empty(text, seed):
    for change in CHANGES.values():
        new = change(text, np.random.default_rng(seed))
        assert new == change(text, np.random.default_rng(seed))
        assert bool(new.strip()) == bool(text.strip())
    for count in (1, 3):
        assert bool(truncate(text, count, Words()).strip()) == bool(text.strip())


def test_bullets_move_whole_and_marks_stay():
    text = "1. One a. Two b.\n\n2. Three c.\n  * Four d\n"
    seen = Counter(reorder_bullets(text, np.random.default_rng(seed)) for seed in range(200))
    assert len(seen) == 5 and text not in seen
    for new in seen:
        assert re.fullmatch(r"1\. .*\n\n2\. .*\n  \* .*\n", new)
        assert sorted(split_claims(new)) == sorted(split_claims(text)) and "One a. Two b." in new
    assert reorder_bullets("One a. Two b.", np.random.default_rng(0)) == "One a. Two b."
    assert reorder_bullets("- same\n- same", np.random.default_rng(0)) == "- same\n- same"


@pytest.mark.parametrize(
    "text, left",
    [
        ('Ends in "took the", not “x y”.', '"took the" “x y”'),
        ("He said 'go on', it's his", "'go on'"),
        ("no quotes", "no quotes"),
        ('nothing in "" it', 'nothing in "" it'),
        ("", ""),
    ],
)
def test_quoted_only(text, left):
    assert quoted_only(text) == left
    assert quoted_only(left) == left


def test_truncation_keeps_the_first_tokens():
    assert truncate("one two  three\nfour", 3, Words()) == "one two  three"
    assert truncate("one two", 2, Words()) == "one two" == truncate("one two", 9, Words())
    with pytest.raises(InputError, match="at least 1, got 0"):
        truncate("one", 0, Words())


# -- the suite --------------------------------------------------------------------------------------------------------


def test_every_number_is_that_of_the_dumped_texts():
    ctx = Planted(TEXTS, bag_of_words, DOCS, VECTORS, variance=V)
    result = run(ctx, tokens=(4, 10, 80))
    whole(result)
    c = result.columns
    about = VECTORS.astype(np.float32)[np.asarray(c["row"]) // 3]
    before = mse(np.stack([bag_of_words(t) for t in c["text_untouched"]]), about)
    after = mse(np.stack([bag_of_words(t) for t in c["text"]]), about)
    name = np.array(c["change"])
    untouched = 1 - before[:N].mean() / V
    assert value(result, "fve_nrm") == pytest.approx(untouched, rel=1e-9)
    empty = 1 - mse(np.repeat(bag_of_words("")[None], N, 0), VECTORS.astype(np.float32)).mean() / V
    assert value(result, "fve_nrm", control=EMPTY) == pytest.approx(empty, rel=1e-9)
    assert set(name) == {*CHANGES, "first 4 tokens", "first 10 tokens", "first 80 tokens"}
    for change in dict.fromkeys(c["change"]):
        at = name == change
        fve = 1 - after[at].mean() / V
        assert value(result, "fve_nrm", change) == pytest.approx(fve, rel=1e-9)
        assert value(result, "fve_nrm", change, UNTOUCHED) == pytest.approx(untouched, rel=1e-9)
        assert value(result, "fve_kept", change) == pytest.approx(fve / untouched, rel=1e-9)
        assert value(result, "fve_nrm_change", change) == pytest.approx(fve - untouched, abs=1e-9)
        differs = np.array(c["text"])[at] != np.array(c["text_untouched"])[at]
        assert value(result, "share_changed", change) == differs.mean()
    assert untouched > 0.1
    assert result.rows == run(ctx, tokens=(80, 10, 4)).rows
    # Words alone are read: their order and spelling change nothing, what is left out does.
    for change in ("sentence shuffle", "bullet reorder", "case and punctuation noise"):
        assert value(result, "share_changed", change) > 0.5
        assert value(result, "fve_nrm_change", change) == 0 and value(result, "fve_kept", change) == 1
    for change in ("quote removal", "quoted only", "first 4 tokens", "first 10 tokens"):
        assert value(result, "fve_nrm_change", change) < -0.02 and row(result, "fve_nrm_change", change).high < 0
    assert value(result, "share_changed", "first 80 tokens") == 0


def test_an_ar_that_ignores_the_text_changes_by_exactly_0():
    result = run(Planted(TEXTS, ignores_text, DOCS, np.stack([ignores_text("")] * N) + 0.05 * VECTORS))
    changes = [r for r in result.rows if r.metric == "fve_nrm_change"]
    assert len(changes) >= 9 and all(r.value == r.low == r.high == 0 for r in changes)
    assert all(r.value == 1 for r in result.rows if r.metric == "fve_kept")


def test_texts_that_a_change_does_not_apply_to_are_counted_apart():
    texts = [t if i % 3 else [f"Plain words p{i}."] for i, t in enumerate(TEXTS)]
    failed = np.zeros((N, 1), bool)
    failed[1] = True
    result = run(Planted(texts, bag_of_words, DOCS, VECTORS, failed=failed, variance=V))
    c, name = result.columns, "quote removal"
    changed = np.array([i % 3 != 0 and i != 1 for i in range(N)])
    at = np.array(c["change"]) == name
    assert np.asarray(c["changed"])[at].tolist() == changed.tolist()
    assert value(result, "share_changed", name) == changed.mean()
    after, before = (np.asarray(c[key])[at] for key in ("mse_nrm", "mse_nrm_untouched"))
    assert after[1] == before[1] == 2 and any("failed" in note for note in result.notes)
    part = f"{name}, of those changed"
    assert row(result, "fve_nrm", part).n == changed.sum()
    assert value(result, "fve_nrm", part) == pytest.approx(1 - after[changed].mean() / V, rel=1e-12)
    assert value(result, "fve_nrm", part, UNTOUCHED) == pytest.approx(1 - before[changed].mean() / V, rel=1e-12)
    whole_change = value(result, "fve_nrm_change", name)
    assert value(result, "fve_nrm_change", part) * changed.mean() == pytest.approx(whole_change, rel=1e-9)


def test_where_nothing_is_explained_no_share_of_it_is_kept():
    result = run(Planted(TEXTS, lambda text: vector("off" + text), DOCS, VECTORS, variance=V))
    kept = [r for r in result.rows if r.metric == "fve_kept"]
    assert kept and all(r.value is None and "explain nothing" in r.note for r in kept)


def test_readings_that_are_no_number_count_as_orthogonal():
    broken = lambda text: np.full(D, np.nan) if "took" in text else bag_of_words(text)  # noqa: E731
    result = run(Planted(TEXTS, broken, DOCS, VECTORS, variance=V))
    assert value(result, "fve_nrm") == pytest.approx(1 - 2 / V)


def test_what_a_text_becomes_depends_on_no_other_row():
    few = run(Planted(TEXTS[3:6], bag_of_words, DOCS[3:6], VECTORS[3:6]))
    all_of = run(Planted(TEXTS, bag_of_words, DOCS, VECTORS))
    where = {(change, old): new for change, old, new in zip(*(all_of.columns[k] for k in KEYS), strict=True)}
    for change, old, new in zip(*(few.columns[k] for k in KEYS), strict=True):
        assert where[change, old] == new
    other = run(Planted(TEXTS, bag_of_words, DOCS, VECTORS, seed=7))
    assert other.columns["text"] != all_of.columns["text"]


KEYS = ("change", "text_untouched", "text")


def test_bad_input_is_named_and_a_missing_provider_is_said():
    with pytest.raises(InputError, match="tokens to keep.*at least 1"):
        run(Planted(TEXTS, bag_of_words, DOCS, VECTORS), tokens=(0, 10))
    result = run(Planted(TEXTS[:3], bag_of_words, [0] * 3, VECTORS[:3]))
    assert any("need a provider" in note for note in result.notes)
    assert row(result, "fve_nrm", "quoted only").low is None
    assert "one document" in row(result, "fve_nrm", "quoted only").note


# -- by a provider ----------------------------------------------------------------------------------------------------


def reply(prompt: str) -> str:
    """The description backwards, or in a "language" where every word has an ending."""
    text = prompt.partition(">>>\n")[2].partition("<<<end of text")[0]
    if prompt.startswith(INSTRUCTION.before):
        return " ".join(reversed(text.split()))
    assert "into French" in prompt
    return re.sub(r"(\w+)", r"\1eux", text)


def test_paraphrase_and_translation_by_a_provider(tmp_path):
    with FakeLLM(reply=reply, fault=lambda seen: "refusal" if "h5" in seen.prompt else None) as fake:
        rewriter = Rewriter(provider_of(fake), tmp_path, asking=Asking(limits=QUICK))
        ctx = Planted(TEXTS, bag_of_words, DOCS, VECTORS, variance=V)
        result = run(ctx, tokens=(), provider=rewriter)
        assert len(fake.asked) == 2 * N
        again = run(Planted(TEXTS, bag_of_words, DOCS, VECTORS, variance=V), tokens=(), provider=rewriter)
        assert again.rows == result.rows and len(fake.asked) == 2 * N  # what was answered is on disk
    assert value(result, "fve_nrm_change", "paraphrase") == 0  # the same words
    assert value(result, "fve_nrm_change", "translation to French") < -0.1
    for name in ("paraphrase", "translation to French"):
        found = row(result, "share_changed", name)
        assert found.value == pytest.approx((N - 1) / N) and "text kept: 1 refused" in found.note
        assert row(result, "fve_nrm", f"{name}, of those changed").n == N - 1
    assert not any("need a provider" in note for note in result.notes)
    assert result.settings["provider"]["paraphrase"]["model"] == "m"


def test_a_provider_that_is_down_is_an_error_and_its_key_is_nowhere(tmp_path):
    with FakeLLM(reply=reply, fault=lambda seen: ("status", 400)) as fake:
        rewriter = Rewriter(provider_of(fake), tmp_path, asking=Asking(limits=QUICK))
        with pytest.raises(TeacherError, match="HTTP 400"):
            run(Planted(TEXTS, bag_of_words, DOCS, VECTORS), provider=rewriter)
    provider = open_provider("openai:m", base_url="http://127.0.0.1:9/v1", environ={"OPENAI_API_KEY": KEY})
    hidden = Rewriter(provider, tmp_path, languages=("French", "German"))
    assert KEY not in repr(hidden) + repr(hidden.describe())
    assert set(hidden.describe()) == {"paraphrase", "translation to French", "translation to German"}


def test_languages_are_part_of_the_instruction():
    assert "into German" in translation("German").before and "in German" in translation("German").after
    assert translation("German").sha256 != translation("French").sha256
    with pytest.raises(InputError, match="a language by its English name"):
        translation(" ")
