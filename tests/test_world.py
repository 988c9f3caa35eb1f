"""The story world of the demo: stories, notes, tokenizer, the measure of facts, and the notes' way into a store."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from nla_jax.examples import av_response_ids
from nla_jax.manifest import StoreSpec
from nla_jax.marker import check_marker, choose_marker, suffix_ids
from nla_jax.prompt import ar_prompt_ids, build_av_prompt, parse_explanation
from nla_jax.sidecar import Sidecar
from nla_jax.store import Store
from nla_jax.store_write import IndexedDocument, ShardWriter, create_index
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools import world, world_words
from nla_jax.tools.cli import main
from nla_jax.tools.world import FACT_KINDS, Story, corpus, generate, last_word, next_label, note, stated
from nla_jax.tools.world_facts import known_facts, probe, probes, truth
from nla_jax.tools.world_tokenizer import AR_TEMPLATE, AV_TEMPLATE, MARKER, write_world_tokenizer
from nla_jax.tools.world_words import VALUES

STORIES = generate(400, 7)
D = 8


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer")
    write_world_tokenizer(path)
    return Tokenizer.from_dir(path)


# -- stories and notes -------------------------------------------------------------------------------------------------


def test_stories_are_the_same_for_a_seed_and_differ_between_seeds():
    again = generate(50, 7)
    assert [s.text for s in again] == [s.text for s in STORIES[:50]]
    assert [s.text for s in generate(50, 8)] != [s.text for s in again]
    assert list(corpus(30, 1)) == list(corpus(30, 1)) != list(corpus(30, 2))
    assert [Story.from_json(json.loads(json.dumps(s.to_json()))).text for s in again] == [s.text for s in again]


def test_every_value_occurs_and_belongs_to_one_kind():
    for kind in FACT_KINDS:
        assert {s.facts[kind] for s in STORIES} == set(VALUES[kind])
    words = [v.lower() for values in VALUES.values() for v in values]
    assert len(set(words)) == len(words)
    for s in STORIES:  # place and animal are those of the setting
        _, places, animals, _ = world_words.SETTINGS[s.facts["setting"]]
        assert s.facts["place"] in places.split() and s.facts["animal"] in animals.split()


def test_a_fact_is_known_from_the_first_word_that_decides_it():
    stories = generate(3000, 3)
    beside: dict[tuple[str, str], set[str]] = {}  # values of a kind in stories that hold a word
    for s in stories:
        for word in set(s.text.lower().replace(".", " ").split()):
            for kind in FACT_KINDS:
                beside.setdefault((word, kind), set()).add(s.facts[kind])
    for s in STORIES:
        for kind in FACT_KINDS:
            ends = [m.end() for m in re.finditer(r"\w+", s.text) if len(beside[m[0].lower(), kind]) == 1]
            assert ends[0] == s.known[kind]
        assert all(s.text[: w.end].endswith(w.text) for w in s.words)
        assert s.words[-1].end == len(s.text) and s.text[0].isupper()


def test_stories_vary_in_what_comes_next_and_tell_nothing_twice():
    for s in STORIES:
        assert len(set(s.plan)) == len(s.plan)
    sentences = [sentence for s in STORIES for sentence in s.plan[5:]]
    weather = [sentence for sentence in sentences if sentence.startswith("{weather}")]
    assert 0.08 < len(weather) / len(sentences) < 0.2
    assert all(f"{w} {w}" not in s.text.lower() for s in STORIES[:50] for w in ("rain", "foxes"))


def test_notes_state_only_what_the_prefix_has_told(monkeypatch):
    monkeypatch.setattr(world, "WRONG_RATE", 0.0)
    rng = np.random.default_rng(0)
    for s in STORIES:
        word = s.words[int(rng.integers(len(s.words)))]
        text = note(s, word.end, rng)
        told = {kind: {s.facts[kind]} for kind, end in s.known.items() if end <= word.end}
        found = stated(text)
        assert found.items() <= told.items()
        # The clauses say exactly that, read with another eye: by their form.
        forms = {kind: re.escape(c).replace(r"\{\}", "(\\w+)") for kind, c in world_words.CLAUSES.items()}
        clauses = re.findall(r"[^.]+?\"?\.", text)
        by_form = {k: {m[1]} for c in clauses for k, f in forms.items() if (m := re.fullmatch(f, c.strip()))}
        assert by_form == found
        assert all(q == last_word(s.text[: word.end]) for q in re.findall(r'"(.*?)"', text))


def test_rates_of_the_teacher():
    rng = np.random.default_rng(1)
    rows = [(s, s.words[int(rng.integers(len(s.words)))].end) for s in STORIES for _ in range(20)]
    texts = [note(s, end, rng) for s, end in rows]
    told = sum(s.known[k] <= end for s, end in rows for k in FACT_KINDS)
    found = [(k, v, s) for text, (s, _) in zip(texts, rows, strict=True) for k, vs in stated(text).items() for v in vs]
    assert len(found) / told == pytest.approx(0.8, abs=0.015)
    assert sum(s.facts[k] != v for k, v, s in found) / len(found) == pytest.approx(0.05, abs=0.01)
    assert np.mean(["Next:" in t for t in texts]) == pytest.approx(0.4, abs=0.02)
    assert np.mean(['"' in t for t in texts]) == pytest.approx(0.5, abs=0.03)  # and where nothing else is said
    with pytest.raises(Exception, match="at least its first word"):
        note(STORIES[0], 1, rng)


def test_the_next_clause_does_not_tell_what_the_prefix_leaves_open():
    seen: dict[str, set[str]] = {}
    for s in generate(1500, 3):
        for n in range(1, len(s.words)):
            seen.setdefault(s.text[: s.words[n - 1].end], set()).add(next_label(s, n))
    assert all(len(labels) == 1 for labels in seen.values())
    assert set().union(*seen.values()) == {"stop", *world_words.NEXT.values()}
    s = STORIES[0]
    for n in range(1, len(s.words)):
        assert (next_label(s, n) == "sentence") == (s.words[n - 1].text == ".")
        assert next_label(s, n) != "stop" or s.words[n].text in (".", "near", "past")


def test_quotations_state_nothing():
    assert stated('Last "foxes". In forests. “Anna” ran.') == {"setting": {"forests"}}
    assert stated("Feels sad. Happy. With the fox.") == {"mood": {"sad", "happy"}}


# -- tokenizer ---------------------------------------------------------------------------------------------------------


def test_every_word_is_one_token(tok):
    for s in STORIES:
        assert [
            tok.token_str(i).strip() for i in tok.encode(s.text)
        ] == s.text.split()  # a full stop belongs to its word
    rng = np.random.default_rng(0)
    known = {tok.encode(c)[0] for c in (".", "\n", " ", ":")}
    for s in STORIES:
        ids = tok.encode(note(s, s.words[int(rng.integers(len(s.words)))].end, rng))
        assert all(i in known or len(tok.token_str(i)) > 1 for i in ids)
    assert tok.vocab_size < 800


@pytest.mark.parametrize(
    "text",
    [
        "",
        ' "a" "',
        '"fox".',
        '""x"" "."',
        "naïve 日本語 🙂\u200d\n\n\t x",
        "<concept>㈎</concept> <b>12</b>",
        "FOX fox.",
    ],
)
def test_any_text_comes_back(tok, text):
    assert tok.decode(tok.encode(text)) == text


def test_corpus_comes_back_and_quoted_words_are_the_words_of_the_story(tok):
    for text in corpus(200, 5):
        assert tok.decode(tok.encode(text)) == text
    assert tok.encode('Last "caves".')[2] == tok.encode("near caves")[-1]
    ids, offsets = tok.encode_with_offsets(STORIES[0].text)
    stops = {w.end - 1 for w in STORIES[0].words if w.text == "."}
    assert [end for _, end in offsets] == [w.end for w in STORIES[0].words if w.end not in stops]


def test_prompts(tok):
    marker = check_marker(tok, AV_TEMPLATE, MARKER, np.zeros(tok.vocab_size, np.int64))
    assert choose_marker(tok, AV_TEMPLATE, np.zeros(tok.vocab_size, np.int64)) == marker
    suffix = suffix_ids(tok, AR_TEMPLATE)
    sidecar = Sidecar(
        kind="nla_model",
        role=None,
        d_model=D,
        layer_index=1,
        injection_scale=1.0,
        mse_scale=1.0,
        injection_mode="replace",
        marker=marker.char,
        marker_id=marker.id,
        left_id=marker.left_id,
        right_id=marker.right_id,
        ar_suffix_ids=suffix,
        av_template=AV_TEMPLATE,
        ar_template=AR_TEMPLATE,
    )
    prompt = build_av_prompt(tok, sidecar)
    assert len(prompt.ids) <= 16 and len(prompt.ids) - prompt.marker <= 2
    text = 'In forests. Ended "caves". Next: sentence.'
    ids = av_response_ids(tok, sidecar, text, prompt)
    assert parse_explanation(tok.decode(ids), True) == (text, False)
    assert ids[-1] == tok.eos_id and len(ids) == 14
    # The AV is asked and answers as the corpus writes, the AR reads what the corpus writes.
    asked = tok.decode([*prompt.ids, *ids[:-1]]).replace(MARKER, "Anna")
    reading = r"<concept>Anna.*</concept><explanation>\n.*\n</explanation>"
    documents = list(corpus(200, 1))
    assert re.fullmatch(reading, asked) and any(re.fullmatch(reading.replace("Anna", ""), d) for d in documents)
    ar = tok.decode(ar_prompt_ids(tok, sidecar, text))
    assert ar == f"<text> {text}</text><summary>"
    assert any(re.fullmatch(r"<text> .*</text><summary> .*", d) for d in documents)


# -- facts and probes --------------------------------------------------------------------------------------------------


def test_truth_of_planted_claims():
    stories = STORIES[:300]
    ends = [s.words[40].end for s in stories]
    right = [f'In {s.facts["setting"]}. Last "{s.words[40].text}".' for s in stories]
    found = truth(right, stories, ends)
    setting = found.kinds["setting"]
    assert (setting.said, setting.true, setting.coverage, setting.known) == (1.0, 1.0, 1.0, 1.0)
    frequencies = np.unique([s.facts["setting"] for s in stories], return_counts=True)[1] / 300
    assert setting.chance == pytest.approx((frequencies**2).sum(), abs=0.03)
    assert np.isnan(found.kinds["mood"].true) and found.kinds["mood"].coverage == 0
    assert found.quoted == 1.0
    last = np.mean([s.words[40].text != "." for s in stories])
    assert found.quote_last == pytest.approx(last)

    # Two values, one of them true, for every other row.
    mixed = [
        f"Feels {s.facts['mood']}. Feels bad." if i % 2 else "Feels happy. Feels sad." for i, s in enumerate(stories)
    ]
    moods = truth(mixed, stories, ends)
    lucky = sum(s.facts["mood"] in ("happy", "sad") for s in stories[::2])
    assert moods.kinds["mood"].stated == 150 + 300
    assert moods.kinds["mood"].true == pytest.approx((150 + lucky) / 450)
    assert moods.overall.stated == 450 and moods.overall.coverage == pytest.approx((150 + lucky) / 300 / 7)
    assert moods.quoted == 0 and np.isnan(moods.quote_last)


def test_truth_of_facts_not_yet_told():
    stories = STORIES[:100]
    texts = [f"There is {s.facts['weather']}." for s in stories]
    ends = [s.known["weather"] - (i % 2) for i, s in enumerate(stories)]
    weather = truth(texts, stories, ends).kinds["weather"]
    assert (weather.true, weather.known, weather.true_known) == (1.0, 0.5, 1.0)
    with pytest.raises(Exception, match="one story"):
        truth(texts, stories[:-1])


def test_probes_find_what_was_planted_and_nothing_else():
    rng = np.random.default_rng(0)
    stories = generate(3000, 11)
    directions = {v: rng.normal(size=32) for v in VALUES["place"]}
    x = np.stack([directions[s.facts["place"]] for s in stories]) + rng.normal(size=(3000, 32))
    found = probes(x[:2000], stories[:2000], x[2000:], stories[2000:])
    assert found["place"].accuracy > 0.95 and found["setting"].accuracy > 0.9  # a place is of one setting
    for kind in ("name", "weather", "mood", "goal"):
        assert found[kind].accuracy == pytest.approx(1 / len(VALUES[kind]), abs=0.05)
        assert found[kind].majority < 0.3
    one = probe(np.zeros((4, 2)), list("aaab"), np.zeros((2, 2)), list("ab"))
    assert (one.accuracy, one.majority, one.n) == (0.5, 0.5, 2)
    known = known_facts(stories, [s.known["mood"] for s in stories])
    assert known["mood"].all() and known["setting"].all() and not known["place"].any()


# -- files, and the way into a store -----------------------------------------------------------------------------------


def make_store(path: Path, stories: dict[str, str], tok: Tokenizer) -> Store:
    def documents():
        for name, text in stories.items():
            ids, offsets = tok.encode_with_offsets(text)
            n = len(ids)
            yield IndexedDocument(
                doc_id=name,
                text=text,
                ids=np.asarray(ids, np.int32),
                roles=np.zeros(n, np.int8),
                text_end=np.array([end for _, end in offsets], np.int32),
                positions=np.array([3, 20, n - 1]),
            )

    spec = StoreSpec(D, (1,), {"name": "m", "n_layers": 2}, {"fingerprint": "f"}, shard_rows=64)
    create_index(path, spec, documents())
    writer = ShardWriter(path)
    for shard in writer.pending():
        a, b = writer.rows(shard)
        writer.write_shard(shard, np.ones((b - a, D), np.float32))
    writer.finish()
    return Store.open(path)


@pytest.fixture
def made(tmp_path, tok):
    world.write_world(tmp_path / "world", seed=4, n_stories=12, n_lm=20)
    lines = [json.loads(line) for line in (tmp_path / "world/stories.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [s.text for s in generate(12, 4)]
    store = make_store(tmp_path / "store", {line["id"]: line["text"] for line in lines}, tok)
    written = world.write_notes(store, tmp_path / "world/facts.jsonl", tmp_path / "notes.jsonl", seed=0)
    assert written == store.n_rows == 36
    return tmp_path, store


def teach(store: Path, teacher: str, *extra: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["teach", str(store), teacher, *extra])
    assert result.exit_code == code, result.output
    if code:
        assert len(result.stderr.strip().splitlines()) == 1
    return result.output if not code else result.stderr


def test_notes_go_into_the_store(made):
    path, store = made
    world.write_notes(store, path / "world/facts.jsonl", path / "again.jsonl", seed=0)
    assert (path / "again.jsonl").read_bytes() == (path / "notes.jsonl").read_bytes()
    assert "36 explanations of 36 rows" in teach(store.path, f"file:{path}/notes.jsonl", "--rows", "all")
    lines = [json.loads(line) for line in (path / "notes.jsonl").read_text().splitlines()]
    assert Store.open(store.path).explanations(slice(None)) == [line["explanation"] for line in lines]
    stories = world.read_facts(path / "world/facts.jsonl")
    for line, prefix in zip(lines, store.prefixes(slice(None)), strict=True):
        story, claims = stories[line["doc_id"]], stated(line["explanation"])
        assert all(len(prefix) >= story.known[k] for k, v in claims.items() if v == {story.facts[k]})
        assert all(q == last_word(prefix) for q in re.findall(r'"(.*?)"', line["explanation"]))
    table = pa.table({k: [line[k] for line in lines[5:9]] for k in ("doc_id", "position", "explanation")})
    pq.write_table(table, path / "some.parquet")
    teach(store.path, f"file:{path}/some.parquet", "--rows", "all", code=2)  # another teacher's are there
    assert "4 explanations of 36" in teach(store.path, f"file:{path}/some.parquet", "--rows", "all", "--replace")
    found = Store.open(store.path).explanations(slice(None))
    assert found[5:9] == [line["explanation"] for line in lines[5:9]] and found[:5] + found[9:] == [None] * 32


def test_texts_that_cannot_be_explanations_are_dropped(made):
    path, store = made
    lines = [json.loads(line) for line in (path / "notes.jsonl").read_text().splitlines()]
    bad = [" ", "x " * 40, "a </explanation> b", None]
    for line, text in zip(lines, bad, strict=False):
        line["explanation"] = text
    (path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = teach(store.path, f"file:{path}/bad.jsonl", "--rows", "all", "--max-words", "30")
    assert "32 explanations of 36 rows" in out and "1 empty" in out and "1 too_long" in out and "1 tags" in out
    assert Store.open(store.path).explanation_status(slice(0, 5)).tolist() == [2, 2, 2, 0, 1]


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"doc_id": "other", "position": 3, "explanation": "x"}', "document 'other' is not in the store"),
        ('{"doc_id": "story-4-000000", "position": 4, "explanation": "x"}', "position 4 of document"),
        ('{"doc_id": "story-4-000000", "position": -1, "explanation": "x"}', "a token position"),
        ('{"doc_id": "story-4-000000", "position": 3, "explanation": 5}', "expected a string"),
        ('{"position": 3, "explanation": "x"}', "line 1: doc_id"),
        ("[1]", "expected a JSON object"),
        ("", "doc_id, position, explanation"),
        (
            '{"doc_id": "a", "position": 3, "explanation": "x"}\n{"doc_id": "a", "position": 3, "explanation": "y"}',
            "second",
        ),
    ],
)
def test_bad_files(made, text, says):
    path, store = made
    (path / "bad.jsonl").write_text(text + "\n")
    assert says in teach(store.path, f"file:{path}/bad.jsonl", "--rows", "all", code=2)
    assert not Store.open(store.path).has_explanations


def test_files_that_are_not_there_or_no_parquet(made):
    path, store = made
    assert "no such file" in teach(store.path, f"file:{path}/none.jsonl", code=2)
    (path / "x.parquet").write_text("no")
    assert "not readable as parquet" in teach(store.path, f"file:{path}/x.parquet", "--rows", "all", code=2)
    pq.write_table(pa.table({"doc_id": ["a"]}), path / "y.parquet")
    assert "columns" in teach(store.path, f"file:{path}/y.parquet", "--rows", "all", code=2)
