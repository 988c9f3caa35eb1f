"""What the benchmark works on: its rows, whether they belong to the models, and the texts drawn for them."""

from __future__ import annotations

import dataclasses
import json
import math

import build_cases
import numpy as np
import pytest
from eval_cases import D, Planted, found, mini_nla, rows, vectors

from nla_jax import metrics
from nla_jax.errors import InputError, NLAError, VectorError
from nla_jax.evals import batched, fve
from nla_jax.evals.context import Context
from nla_jax.evals.dataset import from_parquet, from_store, open_data
from nla_jax.manifest import StoreSpec
from nla_jax.pair import NLA
from nla_jax.store import Store
from nla_jax.store_splits import write_splits
from nla_jax.store_write import ShardWriter, create_index

VARIANCE = 0.6


@pytest.fixture(scope="module")
def nla(tmp_path_factory) -> NLA:
    return mini_nla(tmp_path_factory.mktemp("pair"), VARIANCE)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_cases.mini_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer) -> Store:
    """40 documents of up to 5 positions each at layers 1 and 3, most of them explained, 30% held out."""
    path = tmp_path_factory.mktemp("store") / "store"
    build_cases.make_store(path, tokenizer, layers=(1, 3))
    write_splits(path, {"av_sft": 0.2, "ar_sft": 0.2, "rl": 0.3})
    return Store.open(path)


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_held_out_and_the_same_every_time(store):
    data = from_store(store, layer=3, min_position=5, n=20, per_document=3)
    table = store.table(data.rows)
    assert (store.doc_splits[table["doc"]] == -1).all() and (table["layer"] == 3).all()
    np.testing.assert_array_equal(data.positions, table["position"])
    np.testing.assert_array_equal(data.vectors, store.vectors(data.rows))
    assert data.contexts == store.prefixes(data.rows) and data.teacher == store.explanations(data.rows)
    assert data.doc_ids == store.doc_ids(table["doc"])
    assert all((a == b).all() for a, b in zip(data.tokens, store.tokens(table["doc"]), strict=True))
    # Masked rows come last, and apart.
    assert len(data.main) <= 20 and data.masked[len(data.main) :].all() and not data.masked[: len(data.main)].any()
    assert (data.positions[data.main] >= 5).all() and (data.positions[data.masked] < 5).all()
    assert 0 < data.masked.sum() <= 5
    assert np.unique(data.docs[data.main], return_counts=True)[1].max() <= 3
    assert len(set(zip(data.docs.tolist(), data.doc_ids, strict=True))) == data.docs.max() + 1
    again = from_store(store.path, layer=3, min_position=5, n=20, per_document=3)
    assert again.hash == data.hash and (again.rows == data.rows).all()
    other = from_store(store, layer=3, min_position=5, n=20, per_document=3, seed=1)
    assert other.hash != data.hash
    assert data.source["hash"] == store.manifest["hash"] and data.source["rows"] == len(data.main)


def test_the_choice_does_not_depend_on_the_order_of_a_store(tmp_path, tokenizer):
    chosen = []
    for name, backwards in (("a", False), ("b", True)):
        documents = list(build_cases.documents(tokenizer, 30))
        spec = StoreSpec(
            d_model=8,
            layers=(0,),
            model={"name": "m", "config_sha256": "c", "weights": "w", "n_layers": 2},
            tokenizer={"fingerprint": tokenizer.fingerprint},
        )
        create_index(tmp_path / name, spec, documents[::-1] if backwards else documents)
        writer = ShardWriter(tmp_path / name)
        for shard in writer.pending():
            a, b = writer.rows(shard)
            writer.write_shard(shard, vectors(b - a, shard, 8))
        writer.finish()
        data = from_store(tmp_path / name, n=25, per_document=2, min_position=4)
        assert "no splits" in data.notes[0] and data.train is None and data.train_mean_nrm is None
        chosen.append((data.doc_ids, data.positions.tolist(), data.masked.tolist(), data.docs.tolist()))
    assert chosen[0] == chosen[1]


def test_more_rows_extend_fewer(store):
    few = from_store(store, layer=1, min_position=3, n=8, per_document=2, split="all")
    many = from_store(store, layer=1, min_position=3, n=30, per_document=2, split="all")
    assert set(few.rows[few.main].tolist()) < set(many.rows[many.main].tolist())
    assert len(few.main) == 8 and len(set(few.doc_ids)) >= 4


def test_training_rows(store):
    data = from_store(store, layer=3, min_position=0)
    rows = np.concatenate([store.rows_of(name) for name in ("av_sft", "ar_sft", "rl")])
    rows = np.sort(rows[store.table(rows)["layer"] == 3])
    v = store.vectors(rows).astype(np.float64)
    unit = v * math.sqrt(v.shape[1]) / np.linalg.norm(v, axis=1, keepdims=True)
    np.testing.assert_allclose(data.train_mean_raw, v.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(data.train_mean_nrm, unit.mean(axis=0), rtol=1e-12)
    assert data.train_variance_nrm == pytest.approx(np.mean((unit - unit.mean(axis=0)) ** 2), rel=1e-9)
    assert data.source["training_rows"] == len(rows)
    found_vectors, texts = data.train(1000)
    assert len(found_vectors) == len(rows) and len(texts) == len(rows)
    found_vectors, texts = data.train(10, explained=True)
    assert len(texts) == 10 and None not in texts
    # Of a training split, the rows' own documents are left out.
    trained = from_store(store, layer=3, min_position=0, split="rl")
    assert "not a held-out result" in trained.notes[0]
    own = {row.tobytes() for row in trained.vectors}
    assert not own & {row.tobytes() for row in trained.train(1000)[0]}


def test_special_and_template_tokens_are_masked(store):
    plain_rows = from_store(store, layer=3, min_position=0)
    assert not plain_rows.masked.any()
    ids = store.table(plain_rows.rows)["token_id"]
    data = from_store(store, layer=3, min_position=0, special_ids=[int(ids[0])])
    assert set(store.table(data.rows[data.masked])["token_id"].tolist()) == {int(ids[0])}


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({}, r"which layer.*expected one of 1, 3"),
        ({"layer": 2}, r"layer 2 is not in the store.*got 1, 3"),
        ({"layer": 3, "split": "test"}, r"--split.*held_out, av_sft"),
        ({"layer": 3, "min_position": 500}, r"nothing to evaluate.*all before position 500"),
        ({"layer": 3, "n": 0}, r"--n: expected at least 1"),
        ({"layer": 3, "per_document": 0}, r"--per-document"),
    ],
)
def test_rows_that_cannot_be_chosen(store, choice, match):
    with pytest.raises(InputError, match=match) as error:
        from_store(store, **choice)
    assert "\n" not in str(error.value)


def test_a_split_without_documents(tmp_path, tokenizer):
    build_cases.make_store(tmp_path / "store", tokenizer)
    with pytest.raises(InputError, match=r"no splits.*--split all"):
        from_store(tmp_path / "store", split="rl")
    write_splits(tmp_path / "store", {"av_sft": 0.3, "ar_sft": 0.3, "rl": 0.4})
    with pytest.raises(InputError, match=r"no document is in split held_out.*nla build --fractions"):
        from_store(tmp_path / "store")
    assert len(from_store(tmp_path / "store", split="all", min_position=0))


def test_parquet_sets(tmp_path):
    made = build_cases.table("av_sft", 60)
    file = build_cases.write_set(tmp_path / "av_sft.parquet", "av_sft", made)
    data = open_data(file, n=24, per_document=2, min_position=55)
    assert data.tokens is None and data.train is None and data.layer == 20 and "stage av_sft" in data.notes[0]
    assert len(data.main) == 24 and data.masked.sum() == 6 and (data.positions[data.main] >= 55).all()
    texts, ids = made["detokenized_text_truncated"].to_pylist(), made["doc_id"].to_pylist()
    for i, row in enumerate(data.rows.tolist()):
        np.testing.assert_array_equal(data.vectors[i], made["activation_vector"][row].as_py())
        assert (data.contexts[i], data.doc_ids[i]) == (texts[row], ids[row])
        assert f"<explanation>\n{data.teacher[i]}\n</explanation>" == made["response"][row].as_py()
        assert data.positions[i] == made["n_raw_tokens"][row].as_py() - 1
    # The order of the file does not matter.
    turned = build_cases.write_set(tmp_path / "turned" / "a.parquet", "av_sft", made.take(list(range(59, -1, -1))))
    again = from_parquet(turned, n=24, per_document=2, min_position=55)
    assert (again.doc_ids, again.positions.tolist()) == (data.doc_ids, data.positions.tolist())
    assert again.source["hash"] != data.source["hash"] and again.hash == data.hash
    for split in ("rl", "av_sft"):
        with pytest.raises(InputError, match="--split"):
            open_data(file, split=split)
    with pytest.raises(InputError, match="layer 3 is not in the set"):
        from_parquet(file, layer=3)
    with pytest.raises(InputError, match="nothing to evaluate"):
        from_parquet(file, min_position=5000)


def test_parquet_sets_without_positions_and_documents(tmp_path):
    made = build_cases.table("rl", 30).drop_columns(["doc_id", "n_raw_tokens", "detokenized_text_truncated"])
    data = from_parquet(build_cases.write_set(tmp_path / "rl.parquet", "rl", made))
    assert len(data.main) == 30 and data.docs.max() == 29 and set(data.teacher) == {None}
    assert "every row counts as a document" in data.notes[1] and "positions are not known" in data.notes[2]


# -- models and rows that do not belong together -----------------------------------------------------------------------


def test_models_and_rows_that_do_not_belong_together(nla, tmp_path):
    good = rows()
    Context(nla, good)
    bad = [
        (dataclasses.replace(good, layer=1), "layer 1: expected 2, the AV's"),
        (dataclasses.replace(good, vectors=vectors(220, d=16)), "vectors of another model: expected width 32"),
        (dataclasses.replace(good, masked=np.ones(220, bool)), "nothing to evaluate"),
        (dataclasses.replace(good, tokenizer="another"), "tokenizer is not that of planted"),
        (dataclasses.replace(good, model={"name": "m", "weights": "w"}), "extracted from other weights: expected m"),
    ]
    for data, match in bad:
        with pytest.raises(InputError, match=match) as error:
            Context(nla, data)
        assert "\n" not in str(error.value)
    zero = good.vectors.copy()
    zero[7] = 0
    with pytest.raises(VectorError, match="vector 7 is all zero"):
        Context(nla, dataclasses.replace(good, vectors=zero))
    with pytest.raises(InputError, match="needs the ar"):
        Context(NLA(av=nla.av), good)
    with pytest.raises(InputError, match="--resamples"):
        Context(nla, good, resamples=10)
    assert Context(nla, good).notes == ()
    stranger = NLA(av=nla.av, ar=mini_nla(tmp_path / "stranger", 0.5).ar)
    assert "trained on different sets: variance_nrm 0.6 and 0.5" in Context(stranger, good).notes[0]
    other = mini_nla(tmp_path / "other", layer=1)
    with pytest.raises(NLAError, match="different pairs"):
        NLA(av=nla.av, ar=other.ar)
    with pytest.raises(InputError, match="layer 2: expected 1, the target's"):
        Context(NLA(av=nla.av, ar=nla.ar, target=other.target), good)


def test_where_the_denominator_is_from(nla, tmp_path):
    assert Context(nla, rows()).variance_source == "AR sidecar"
    bare = mini_nla(tmp_path / "bare")
    data = rows()
    ctx = Context(bare, data)
    assert ctx.variance == data.train_variance_nrm and ctx.variance_source == "training rows of planted"
    alone = dataclasses.replace(data, train_variance_nrm=None)
    ctx = Context(bare, alone)
    assert ctx.variance == pytest.approx(metrics.variance_nrm(data.vectors[:200], math.sqrt(D)))
    assert "200 evaluated rows themselves" in ctx.variance_source
    assert "evaluated" in found(fve.run(Planted(bare, alone)).rows, "fve_nrm").denominator


# -- texts -------------------------------------------------------------------------------------------------------------


def small(n: int = 7) -> dict:
    data = rows(n, 2, 0)
    return {"data": data, "max_new_tokens": 5, "batch_size": 8}


def test_texts_and_readings_are_those_of_the_library(nla):
    ctx = Context(nla, **small())
    drawn = ctx.texts(2)
    assert drawn.failed.shape == drawn.length.shape == (7, 2)
    there = nla.verbalize(ctx.data.vectors, samples=2, max_new_tokens=5, seed=42)
    assert [t for row in drawn.text for t in row] == [e.text for e in there]
    assert drawn.length.ravel().tolist() == [len(e.token_ids) for e in there]
    assert drawn.failed.ravel().tolist() == [e.failed for e in there]
    texts = [e.text for e in there] + ["a text " * 30]
    np.testing.assert_allclose(ctx.read(texts), nla.reconstruct(texts), atol=1e-5)
    # A reading does not depend on what else is read.
    alone = Context(nla, **small())
    np.testing.assert_array_equal(alone.read(texts[3:4]), ctx.read(texts)[3:4])
    assert ctx.read([]).shape == (0, D)


def test_a_sample_does_not_depend_on_how_many_are_drawn(nla):
    once = Context(nla, **small())
    three = once.texts(3)
    bit_by_bit = Context(nla, **small())
    bit_by_bit.texts(1, rows=np.array([4, 2]))
    assert bit_by_bit.texts(2).text == [row[:2] for row in three.text]
    assert bit_by_bit.texts(3).text == three.text
    some = bit_by_bit.texts(3, rows=np.array([5, 0]))
    assert some.text == [three.text[5], three.text[0]] and (some.length == three.length[[5, 0]]).all()


class _KilledError(Exception):
    pass


def test_a_run_that_is_killed_draws_only_what_is_missing(nla, tmp_path, monkeypatch):
    whole = Context(nla, **small(20)).texts(2)
    drawn: list[int] = []
    real = batched.draw

    def counted(*args, **options):
        for batch in real(*args, **options):
            if len(drawn) == 3:
                raise _KilledError
            drawn.append(len(batch))
            yield batch

    monkeypatch.setattr(batched, "draw", counted)
    with pytest.raises(_KilledError):
        Context(nla, **small(20), out=tmp_path).texts(2)
    file = tmp_path / "explanations.jsonl"
    assert len(file.read_bytes().splitlines()) == 1 + 3 * 8
    file.write_bytes(file.read_bytes()[:-7])  # a torn last line
    drawn.clear()
    monkeypatch.setattr(batched, "draw", real)
    asked: list = []
    monkeypatch.setattr(batched, "draw", lambda *a, **k: asked.append(a[4]) or real(*a, **k))
    again = Context(nla, **small(20), out=tmp_path)
    assert again.texts(2).text == whole.text
    assert len(asked) == 1 and len(asked[0]) == 40 - 23
    assert again.texts(2).text == whole.text and len(asked) == 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 41 and lines[1].keys() >= {"row", "sample", "doc_id", "position", "text", "failed", "length"}
    assert Context(nla, **small(20), out=tmp_path).texts(1).text == [row[:1] for row in whole.text]
    assert len(asked) == 1


@pytest.mark.parametrize("change", [{"temperature": 0.0}, {"seed": 1}, {"max_new_tokens": 4}, {"data": rows(4, 2, 0)}])
def test_texts_of_other_settings_are_not_taken(nla, tmp_path, change):
    Context(nla, **small(4), out=tmp_path).texts(1)
    notes: list[str] = []
    options = {**small(4), **change}
    if "data" in change:
        options["data"] = dataclasses.replace(change["data"], vectors=vectors(4, 9))
    ctx = Context(nla, **options, out=tmp_path, note=notes.append)
    fresh = Context(nla, **options).texts(1)
    assert ctx.texts(1).text == fresh.text
    assert len(notes) == 1 and next(iter(change)) in notes[0] and "drawn anew" in notes[0]
    kept = Context(nla, **options, out=tmp_path, note=notes.append)
    assert kept.texts(1).text == fresh.text and len(notes) == 1


def test_several_devices_are_one(nla):
    """The conftest's 8 devices share each batch; without a mesh the first does all of it."""
    many, one = Context(nla, **small()), Context(nla, **small())
    assert many.mesh is not None and many.mesh.size == 8 and many.batch_size % 8 == 0
    one.mesh = None
    assert many.texts(2).text == one.texts(2).text
    texts = [row[0] for row in one.texts(2).text] + ["longer " * 40]
    np.testing.assert_allclose(many.read(texts), one.read(texts), atol=1e-5)


def test_a_full_disk_is_one_line(nla, tmp_path):
    ctx = Context(nla, **small(), out=tmp_path)
    ctx.texts(1, rows=np.array([0]))
    (tmp_path / "explanations.jsonl").unlink()
    (tmp_path / "explanations.jsonl").mkdir()
    with pytest.raises(InputError, match="explanations cannot be kept"):
        ctx.texts(1)


def test_one_model_at_a_time(nla, tmp_path):
    lean = NLA(av=nla.av, ar=nla.ar, target=nla.target, low_memory=True)
    ctx = Context(lean, **small())
    first = ctx.texts(1)
    assert lean.ar._params is None and lean.av._params is not None
    readings = ctx.read([row[0] for row in first.text])
    assert lean.av._params is None and lean.ar._params is not None
    ctx.use("target")
    assert lean.ar._params is None and "ar" not in ctx._placed
    np.testing.assert_array_equal(ctx.read([row[0] for row in first.text]), readings)
