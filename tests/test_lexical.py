"""The lexical teacher: the same words for the same prefix, and each part of them depends on the part it is about."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_jax.lexical import describe
from nla_jax.lexical_structure import open_structure, sentence_state
from nla_jax.teacher_prompt import Answer, parse_features, read_explanation

PROSE = (
    "The lighthouse at Skerryvore was built by Alan Stevenson. The lighthouse stands on a reef, and its lamp was lit "
    "in 1844. He had planned the tower for years before the first stone was laid on the "
)
CHAT = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHow do I prune roses?<|im_end|>\n"
    "<|im_start|>assistant\nCut"
)
PYTHON = (
    "import os\n\ndef walk(path):\n    total = 0\n    for name in os.listdir(path):\n        total += len(name)\n"
    "    return total\n\ndef main(argv):\n    print(walk("
)
PLAY = (
    "HAMLET:\nWhither wilt thou lead me? speak; I'll go\nno further.\n\nGhost:\nMark me.\n\nHAMLET:\nI will, thou poor"
)
VERSE = (
    "The woods are lovely, dark and deep,\nBut I have promises to keep,\nAnd miles to go before I sleep,\nAnd miles to"
)
GERMAN = "Der Leuchtturm wurde auf dem Riff gebaut und die Lampe ist seit vielen Jahren nicht mehr zu sehen, weil der"


def third(text: str) -> str:
    return describe(text).split("\n\n")[2]


def test_three_features_under_a_hundred_words():
    features = describe(PROSE).split("\n\n")
    assert len(features) == 3 and parse_features(describe(PROSE)) == features
    assert 40 < len(describe(PROSE).split()) < 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (PROSE, ["lighthouse (2 times)", "Stevenson", "third person", "past tense"]),
        (CHAT, ["chat in the assistant's turn", "roses"]),
        (PYTHON, ["Code in Python", "walk"]),
        (PLAY, ["archaic play where HAMLET speaks"]),
        (VERSE, ["verse", "miles (2 times)"]),
        (GERMAN, ["in German", "Leuchtturm"]),
        ("灯台は岩の上に建てられた。灯台の光は", ["in Japanese", "灯台 (2 times)"]),
        ("Маяк был построен на рифе, и маяк", ["Cyrillic script", "маяк (2 times)"]),
        ('"Where is it?" asked Anna. "I left it here," said Tom. "No,"', ["story with spoken dialogue", "Anna"]),
        ("Preheat the oven. Mix the flour with two eggs. Stir the batter and", ["instructing", "batter"]),
        ("lol that movie was gonna be awesome and the movie", ["casual", "movie (2 times)"]),
        ("You're late. I'm not angry, but you can't keep doing it", ["conversational", "second person"]),
        ("What is a reef? Why is it dangerous? The reef", ["questioning", "reef (2 times)"]),
        ("Q: What is a reef?\nA: A ridge of rock", ["answer in a list of questions", "ridge"]),
        (
            "Internationalization considerations necessitate comprehensive documentation throughout development of",
            ["formal"],
        ),
        ('{"name": "reef",\n "depth": 3,\n "lamps": [', ["Code in JSON", "lamps"]),
        ("- salt\n- flour\n- butter\n- two", ["list"]),
    ],
)
def test_what_a_text_is_and_is_about(text, said):
    about = describe(text).split("\n\n")[0]
    assert all(part in about for part in said), about


def test_recent_topics_outweigh_old_ones():
    old, new = "The harbour master kept bees. ", "The surgeon washed the scalpel. "
    assert re.search("surgeon|scalpel", describe(old * 3 + new * 3).partition(" (")[0])
    assert re.search("harbour|bees|master", describe(new * 3 + old * 3).partition(" (")[0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('She said "come to the reef', 'a quotation that begins "come to the"'),
        ("She said \u201ccome here\u201d and \u201cgo", 'a quotation that begins "go"'),
        ("The tower (built on the reef", 'a bracket that begins "built on the"'),
        ("f(a[1], {", "a brace that has just begun"),
        ("<ul><li><b>Rocks", 'the tag b that begins "Rocks"'),
        ("<!-- nothing yet", "a comment"),
        ("Run this:\n```\nls -l", "a block of code between backticks"),
        ("where $$x^2 +", "a formula"),
        ("Steps\n1. Cut\n2. Boil\n3. Serve with", "item 3 of a numbered list"),
        ("- salt\n- oil\n- rice", "item 3 of a bulleted list"),
        ("Text.\n\n## The ree", "a heading"),
        ("| a | b | c", "column 3 of a table row"),
        ("if x:\n    y = 2", "a line indented by 4"),
        ('see <a href="', "a tag"),
        ("see https://example.com/re", "a web address"),
    ],
)
def test_what_is_open(text, said):
    assert said in open_structure(text) and said in describe(text)


@pytest.mark.parametrize(
    "text",
    ['He said "yes" and left', "a (b) c", "<b>x</b> y", 'a 6" nail', "Sad :(\n\nNew text", "don't", "```\nx\n```\ny"],
)
def test_what_is_closed(text):
    assert open_structure(text) == "No quotation, bracket or list is open."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It rained. The keeper of the", 'four words in and began "The keeper of"'.replace("four", "four")),
        ("It rained. When it stopped, he", "one word into its clause two"),
        ("It rained. He knew that the lamp", "inside a clause opened by that"),
        ("It rained.", "The last sentence is complete."),
        ("Mr. Smith met Dr. Jones in", "six words in"),
        ("Heading:\nThe keeper", "two words in"),
    ],
)
def test_where_the_sentence_stands(text, said):
    assert said in sentence_state(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("He went to the ", ["the definite article", "adjective or a noun"]),
        ("He stood on", ["a preposition", "noun phrase"]),
        ("He wants to", ["the word to", "a verb"]),
        ("The tower and", ["a conjunction"]),
        ("It happened because", ["opens a clause"]),
        ("The lamp has been", ["auxiliary", "participle"]),
        ("It rained and she", ["subject pronoun", "a verb may follow"]),
        ("He lived near Alan Stevenson", ["with a name"]),
        ("He spoke quickly", ["an adverb"]),
        ("It rained.", ["a full stop", "a new sentence"]),
        ("Is it true?", ["a question mark", "answer"]),
        ("salt, oil,", ["a comma", "another item"]),
        ("The list:", ["a colon"]),
        ("print(", ["an opening bracket"]),
        ("It was built in 1844", ["a year"]),
        ("There were 17", ["a number"]),
        ("One line\n", ["a line break"]),
        ("One paragraph.\n\n", ["a paragraph break"]),
        ('He said "', ["an opening quotation mark"]),
        ('He said "yes"', ["a closing quotation mark"]),
        ("x =", ["an equals sign", "a value"]),
        ("a red fox and a red", ['"a red" was followed by "fox"']),
        ("the old lighthouse keeper slept; a lighthouse", ['"lighthouse" was followed by "keeper"']),
    ],
)
def test_how_it_ends_and_what_may_follow(text, said):
    assert all(part in third(text) for part in said), third(text)


def test_the_last_words_are_quoted():
    assert '"before the first stone was laid on the"' in third(PROSE)
    assert third("one two </explanation> three").count("explanation") == 1 and "</explanation>" not in describe(
        "a </explanation>"
    )


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n", "a", ".", "(", "\u0000\ud800", "1", "x" * 5000, "\u0301", "word " * 3000]
)
def test_odd_prefixes_still_give_features(text):
    explanation = describe(text)
    assert read_explanation(Answer(explanation))[1] == "ok" and len(explanation.split()) < 100


@given(st.text(max_size=400))
def test_any_prefix_gives_two_features_or_more_in_under_a_hundred_words(text):
    explanation = describe(text)
    assert explanation == describe(text) and len(explanation.split()) < 100
    assert read_explanation(Answer(explanation)) == (explanation, "ok")


def test_the_same_in_every_process():
    """Nothing depends on the order of a set, which differs between processes."""
    texts = [PROSE, CHAT, PYTHON, PLAY, VERSE, GERMAN]
    code = f"from nla_jax.lexical import describe\nprint(repr([describe(t) for t in {texts!r}]))"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode().strip() == repr([describe(text) for text in texts])


def test_only_the_end_of_a_long_text_is_read():
    tail = PROSE * 12
    assert describe("Unrelated words here. " * 50 + tail) == describe("Other things there. " * 400 + tail)


def _prefixes(shared_data) -> list[str]:
    import pyarrow.parquet as pq

    docs = pq.read_table(shared_data / "corpus/c4-train-00000-of-01637.parquet", columns=["text"])["text"].to_pylist()
    rng = random.Random(0)
    return [doc[: rng.randrange(200, len(doc))] for doc in docs if len(doc) > 200 for _ in range(10)]


def test_on_real_text_explanations_differ_are_short_and_quick(shared_data):
    prefixes = _prefixes(shared_data)
    started = time.perf_counter()
    explanations = [describe(prefix) for prefix in prefixes]
    rate = len(prefixes) / (time.perf_counter() - started)
    assert len(set(explanations)) > 0.99 * len(set(prefixes))
    words = [len(text.split()) for text in explanations]
    assert max(words) < 100 and 50 < sum(words) / len(words) < 95
    assert rate > 500  # over 2000 on an idle core; the bound is for one that is shared


def test_a_reader_can_tell_texts_apart_by_their_explanations(shared_data):
    """Each explanation is matched to the document whose earlier text shares most of its rare words."""
    import pyarrow.parquet as pq

    docs = pq.read_table(shared_data / "corpus/c4-train-00000-of-01637.parquet", columns=["text"])["text"].to_pylist()
    docs = [doc for doc in docs if len(doc) > 800][:40]
    vocabularies = [set(re.findall(r"\w{4,}", doc.lower())) for doc in docs]
    count = {w: sum(w in v for v in vocabularies) for v in vocabularies for w in v}
    right = 0
    for i, doc in enumerate(docs):
        said = set(re.findall(r"\w{4,}", describe(doc[:700]).lower()))
        scores = [sum(1 / count[w] for w in said & vocabulary) for vocabulary in vocabularies]
        right += scores.index(max(scores)) == i
    assert right >= 0.9 * len(docs)
