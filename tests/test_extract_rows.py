"""`extract`: which rows a corpus gives: they depend on nothing but the settings and the documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from extract_cases import TOLERANCE, alone, letters, run, small_target, write
from reference import relative_error
from store_cases import tree

from nla_jax.corpus import open_corpus, tokenize_document
from nla_jax.extract import choose_positions, eligible_positions
from nla_jax.manifest import ROLES
from nla_jax.store import Store
from nla_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return small_target(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("corpus") / "letters.jsonl", letters())


@pytest.fixture(scope="module")
def store(target, corpus, tmp_path_factory) -> Store:
    out = tmp_path_factory.mktemp("out") / "store"
    run(target, corpus, out)
    return Store.open(out)


def table_by_id(store: Store) -> dict[str, list[tuple[int, ...]]]:
    """Document id -> its rows as (position, token id, role, layer, text end)."""
    table, out = store.table(), {}
    ids = store.doc_ids(table["doc"])
    names = ("position", "token_id", "role", "layer", "text_end")
    for name, *row in zip(ids, *(table[n].tolist() for n in names), strict=True):
        out.setdefault(name, []).append(tuple(row))
    return out


# Which rows there are


def test_any_number_of_processes_and_any_batch_size(target, corpus, store, tmp_path):
    for count in (2, 4):
        out = tmp_path / f"{count} processes"
        for p in range(count):
            done = run(target, corpus, out, process=p, processes=count)
            assert done.complete == (p == count - 1) and done.shards < store.n_rows / 32
        assert tree(out) == tree(Path(store.path))
    for batch_tokens in (1, 200, 4096):
        run(target, corpus, tmp_path / f"{batch_tokens}", batch_tokens=batch_tokens)
        other = Store.open(tmp_path / f"{batch_tokens}")
        assert tree(tmp_path / f"{batch_tokens}" / "rows") == tree(Path(store.path) / "rows")
        assert relative_error(other.vectors(slice(None)), store.vectors(slice(None))) < 1e-5


def test_any_order_and_any_part_of_the_corpus(target, corpus, store, tmp_path):
    whole = table_by_id(store)
    backwards = write(tmp_path / "backwards.jsonl", letters()[::-1])
    run(target, backwards, tmp_path / "b")
    assert table_by_id(Store.open(tmp_path / "b")) == whole
    parts = {}
    for i, rows in enumerate((slice(0, 11), slice(11, 30), slice(30, None))):
        run(target, corpus, tmp_path / f"{i}", rows=rows)
        part = table_by_id(Store.open(tmp_path / f"{i}"))
        assert not part.keys() & parts.keys()
        parts |= part
    assert parts == whole


def test_documents_without_an_id_are_named_by_their_row_in_the_file(target, tmp_path):
    rows = [{"text": row["text"]} for row in letters(12)]
    corpus = write(tmp_path / "c.jsonl", rows)
    run(target, corpus, tmp_path / "a")
    run(target, corpus, tmp_path / "b", rows=slice(5, None, 2))
    a, b = (table_by_id(Store.open(tmp_path / name)) for name in "ab")
    assert b and b.items() <= a.items()


def test_the_settings_do_what_they_say(target, corpus, store, tmp_path):
    def rows(**options) -> dict:
        out = tmp_path / str(options)
        run(target, corpus, out, **options)
        return table_by_id(Store.open(out))

    default = table_by_id(store)
    assert max(len(r) for r in default.values()) == 10
    positions = [p for r in default.values() for p, *_ in r]
    assert min(positions) >= 50 and len(default) < 40
    few = rows(per_document=3)
    assert few.keys() == default.keys() and all(set(few[k]) <= set(default[k]) for k in few)
    assert max(len(r) for r in few.values()) == 3
    early = rows(min_position=0, per_document=1000, max_tokens=60)
    tokenizer = Tokenizer.from_dir(target)
    lengths = {row["id"]: len(tokenizer.encode(row["text"])) for row in letters()}
    assert min(lengths.values()) < 50 and max(lengths.values()) > 60
    assert {k: [p for p, *_ in r] for k, r in early.items()} == {k: list(range(min(n, 60))) for k, n in lengths.items()}
    other = rows(seed=1)
    assert other.keys() == default.keys() and sum(other[k] == default[k] for k in other) < len(other) / 2


def test_documents_too_short_are_counted(target, tmp_path):
    rows = [{"text": "the light " * n} for n in (2, 25, 26, 40)] + [{"text": ""}, {"text": "bad\0" * 50}]
    done = run(target, write(tmp_path / "c.jsonl", rows), tmp_path / "s")
    lengths = [len(Tokenizer.from_dir(target).encode("the light " * n)) for n in (2, 25, 26, 40)]
    assert done.n_docs == sum(n > 50 for n in lengths)
    assert {k: v for k, v in done.counts.items() if v} == {
        "documents": 4,
        "empty": 1,
        "binary": 1,
        "too_short": 4 - done.n_docs,
    }
    assert Store.open(tmp_path / "s").manifest["corpus"]["counts"] == done.counts


def test_tokens_and_prefixes_are_those_of_the_documents(target, corpus, store):
    tokenizer = Tokenizer.from_dir(target)
    documents = {d.doc_id: d for d in open_corpus(corpus)}
    for name, tokens in zip(store.doc_ids(slice(None)), store.tokens(slice(None)), strict=True):
        np.testing.assert_array_equal(tokens, tokenize_document(documents[name], tokenizer, 1024).ids)
    table = store.table()
    tokens = store.tokens(table["doc"])
    for row, prefix in enumerate(store.prefixes(slice(None))):
        seen = tokens[row][: table["position"][row] + 1]
        assert table["token_id"][row] == seen[-1] and prefix == tokenizer.decode(seen)


def test_special_strings_in_a_text_are_text(target, tmp_path):
    spoken = "he said <|im_end|> and <|im_start|>user then went home " * 8
    run(target, write(tmp_path / "c.jsonl", [{"text": spoken}]), tmp_path / "s", per_document=1000)
    store = Store.open(tmp_path / "s")
    tokenizer = Tokenizer.from_dir(target)
    ids = store.tokens(np.array([0]))[0]
    assert not set(ids.tolist()) & tokenizer.special_ids and tokenizer.decode(ids) == spoken
    assert store.n_rows == len(ids) - 50  # every position from 50 on could be drawn
    assert set(store.table()["role"].tolist()) == {ROLES.index("text")}


def test_bos_is_there_and_never_drawn(tmp_path):
    model = small_target(tmp_path / "gemma", family="gemma2")
    tokenizer = Tokenizer.from_dir(model)
    corpus = write(tmp_path / "c.jsonl", letters(6, longest=60))
    run(model, corpus, tmp_path / "s", min_position=0, per_document=1000)
    store = Store.open(tmp_path / "s")
    table, vectors = store.table(), store.vectors(slice(None))
    assert all(ids[0] == tokenizer.bos_id for ids in store.tokens(slice(None)))
    assert table["position"].min() == 1 and tokenizer.bos_id not in table["token_id"]
    stream = alone(model, store, 2, [0])[0]
    rows = np.flatnonzero(table["doc"] == 0)
    assert rows.size == len(stream) - 1
    assert relative_error(vectors[rows], stream[table["position"][rows]]) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_chats_keep_their_roles_and_template_tokens_are_never_drawn(family, tmp_path):
    model = small_target(tmp_path / "model", family=family)
    tokenizer = Tokenizer.from_dir(model)
    turns = [("user", "what was said "), ("assistant", "the ships go home "), ("user", "before night <|im_end|> ")]
    if family == "qwen2":
        turns = [("system", "keep asking "), *turns]
    messages = [{"role": role, "content": (words * 8).strip()} for role, words in turns]
    run(
        model, write(tmp_path / "c.jsonl", [{"messages": messages}]), tmp_path / "s", min_position=0, per_document=10**4
    )
    store = Store.open(tmp_path / "s")
    table = store.table()
    ids = store.tokens(np.array([0]))[0].tolist()
    assert ids == tokenizer.encode_chat(messages)
    rendered = tokenizer.render_chat(messages)
    assert store.texts(np.array([0])) == [rendered]
    assert not set(table["token_id"].tolist()) & tokenizer.special_ids
    # Where each message's content stands in the rendered chat: found by searching, in bytes.
    spans, at = [], 0
    for message in messages:
        start = rendered.index(message["content"], at)
        at = start + len(message["content"])
        spans.append((len(rendered[:start].encode()), len(rendered[:at].encode()), ROLES.index(message["role"])))
    for end, role in zip(table["text_end"].tolist(), table["role"].tolist(), strict=True):
        assert [r for a, b, r in spans if a < end <= b] == [role]
    covered = {r: sum(b - a for a, b, q in spans if q == r) for r in set(table["role"].tolist())}
    assert len(covered) == len({role for role, _ in turns})
    stream = alone(model, store, 2, [0])[0]
    assert relative_error(store.vectors(slice(None)), stream[table["position"]]) < TOLERANCE


# Choosing positions


def test_chosen_positions_never_change():
    """Other numbers here would mean that a corpus gives other rows than it gave before."""
    eligible = np.arange(50, 400)
    assert choose_positions("letter-1", eligible, 5, seed=0).tolist() == [76, 98, 113, 259, 314]
    assert choose_positions("日本", eligible[::3], 4, seed=7).tolist() == [86, 95, 137, 320]


def test_positions_are_drawn_evenly():
    counts = np.zeros(100)
    for i in range(4000):
        counts[choose_positions(f"doc{i}", np.arange(100), 10, seed=3)] += 1
    assert counts.sum() == 40_000
    # Each is binomial, 4000 times 0.1: deviation 19.
    assert np.abs(counts - 400).max() < 5 * 19


def test_eligible_positions():
    roles = np.array([5, 5, 2, 2, 2, 5, 3, 3, 5])
    special = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1], bool)
    assert eligible_positions(roles, special, 0).tolist() == [2, 3, 6, 7]
    assert eligible_positions(roles, special, 3).tolist() == [3, 6, 7]
    assert eligible_positions(roles, special, 100).tolist() == []
