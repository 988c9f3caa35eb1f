"""Sets in the reference's parquet format: what comes in goes out again, and bad files are one line."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from build_cases import (
    AR,
    D,
    documents,
    explanation,
    make_store,
    mini_tokenizer,
    replaced,
    sidecar,
    table,
    vectors,
    write_set,
    write_sets,
)
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import AV as RELEASED_AV
from tiny_tokenizers import QWEN, needs_data

from nla_jax.build import AR_TEMPLATE, AV_TEMPLATE, Plan, build, open_build
from nla_jax.errors import InputError, NLAError, SidecarError
from nla_jax.exchange import export_sets, set_schema
from nla_jax.exchange_import import import_sets
from nla_jax.sidecar import read_sidecar
from nla_jax.store import SPLITS, Store
from nla_jax.store_splits import write_splits
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools.cli import main


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return mini_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def same(a: Path, b: Path) -> None:
    """All columns equal, in order, and the vectors to the bit; the sidecars mean the same."""
    one, two = pq.read_table(a), pq.read_table(b)
    assert one.schema.names == two.schema.names
    assert one.schema.equals(two.schema)
    for name in one.schema.names:
        assert one[name].combine_chunks().equals(two[name].combine_chunks()), name
    bits = [np.asarray(t["activation_vector"].combine_chunks().flatten()).tobytes() for t in (one, two)]
    assert bits[0] == bits[1]
    assert read_sidecar(a) == read_sidecar(b)


# -- import, export


@pytest.mark.parametrize("version", [1, 2])
def test_sets_come_back(tmp_path: Path, version: int) -> None:
    files = write_sets(tmp_path / "in", version=version)
    notes: list[str] = []
    built = import_sets(files, tmp_path / "store", note=notes.append)
    assert notes == [] and built.sets == SPLITS
    written = export_sets(tmp_path / "store", "all", tmp_path / "out")
    assert [(w.name, w.rows) for w in written] == [("av_sft", 60), ("ar_sft", 60), ("rl", 60)]
    for file in files:
        same(file, tmp_path / "out" / file.name)
        before, after = (
            yaml.safe_load(Path(f"{p}.nla_meta.yaml").read_text()) for p in (file, tmp_path / "out" / file.name)
        )
        for key in ("dataset_id", "stage", "row_count", "created_at", "created_by", "git_commit", "parent_datasets"):
            assert before[key] == after[key]
        for key in ("base_model", "layer_index", "norm", "corpus_slice"):
            assert before["extraction"][key] == after["extraction"][key]
    # And once more, from what was written.
    import_sets([w.path for w in written], tmp_path / "again")
    for w in export_sets(tmp_path / "again", "all", tmp_path / "out2"):
        same(w.path, tmp_path / "in" / w.path.name)


def test_an_imported_store_is_a_store(tmp_path: Path) -> None:
    files = write_sets(tmp_path / "in", version=2)
    built = import_sets(files, tmp_path / "store")
    store = built.store
    assert store.check() == []
    assert (store.n_rows, store.n_docs, store.d_model, store.layers) == (180, 60, D, (20,))
    rows = store.table()
    assert set(rows["token_id"].tolist()) == {-1} and set(rows["role"].tolist()) == {0}
    assert all((tokens == -1).all() for tokens in store.tokens(slice(None)))
    # Row by row, by document and position, whatever order the file had.
    for file, name in zip(files, SPLITS, strict=True):
        made = pq.read_table(file).to_pylist()
        wanted = {(r["doc_id"], r["n_raw_tokens"]): r for r in made}
        mine = built.rows(name)
        at = store.table(mine)
        ids, prefixes, found = store.doc_ids(at["doc"]), store.prefixes(mine), store.vectors(mine)
        texts = store.explanations(mine)
        assert len(mine) == len(wanted) == 60
        for i in range(60):
            row = wanted[ids[i], int(at["position"][i]) + 1]
            np.testing.assert_array_equal(found[i], np.array(row["activation_vector"], np.float32))
            assert prefixes[i] == row["detokenized_text_truncated"] or "\ufffd" in row["detokenized_text_truncated"]
            if name == "av_sft":
                assert row["response"] == f"<explanation>\n{texts[i]}\n</explanation>"
            elif name == "ar_sft":
                assert row["prompt"] == AR.replace("{explanation}", str(texts[i]))
            else:
                assert texts[i] is None
    # What training needs: the sidecars' own scale and variance, and our mean.
    raw = store.vectors(slice(None)).astype(np.float64)
    v = raw / np.linalg.norm(raw, axis=1, keepdims=True) * 4
    np.testing.assert_allclose(built.mu, v.mean(0), rtol=0, atol=1e-13)
    assert (built.injection_scale, built.variance_nrm, built.mse_scale) == (150.0, 0.7335, 4.0)
    assert built.info["variance_of_rows"] == pytest.approx(np.mean((v - v.mean(0)) ** 2), rel=1e-12)
    assert built.sidecar("ar").ar_suffix_ids == built.sidecar("av").ar_suffix_ids == (1318, 29)


def test_scales_that_a_sidecar_lacks_are_ours_but_are_not_written_into_it(tmp_path: Path) -> None:
    built = import_sets(write_sets(tmp_path / "in", version=1), tmp_path / "store")
    assert built.sidecar("av_sft").injection_scale is None and built.sidecar("av_sft").variance_nrm is None
    assert built.sidecar("av").injection_scale == built.injection_scale >= built.info["norms"]["mean"]
    assert built.sidecar("av").variance_nrm == built.variance_nrm == built.info["variance_of_rows"]


def test_files_of_one_stage_are_joined_and_order_is_kept(tmp_path: Path) -> None:
    a = write_set(tmp_path / "a.parquet", "rl", table("rl", 30))
    b = write_set(tmp_path / "b.parquet", "rl", table("rl", 30, first_doc=5))  # documents 5 to 9 are in both files
    import_sets([a, b], tmp_path / "store")
    (out,) = export_sets(tmp_path / "store", "rl", tmp_path / "out.parquet")
    assert pq.read_table(out.path).equals(pa.concat_tables([pq.read_table(a), pq.read_table(b)]))
    assert Store.open(tmp_path / "store").n_docs == 15
    assert yaml.safe_load((tmp_path / "out.parquet.nla_meta.yaml").read_text())["row_count"] == 60


@pytest.mark.parametrize("kind", ["list", "large_list", "float16", "float64", "float64 list"])
def test_other_vector_types(tmp_path: Path, kind: str) -> None:
    made = table("rl", 40)
    flat = np.asarray(made["activation_vector"].combine_chunks().flatten())
    numpy = {"float16": np.float16, "float64": np.float64, "float64 list": np.float64}.get(kind, np.float32)
    given = flat.astype(numpy)
    if "list" in kind:
        maker = pa.LargeListArray if kind == "large_list" else pa.ListArray
        offsets = pa.array(np.arange(0, len(flat) + 1, D), pa.int64() if kind == "large_list" else pa.int32())
        column = maker.from_arrays(offsets, pa.array(given))
    else:
        column = pa.FixedSizeListArray.from_arrays(pa.array(given), D)
    file = write_set(tmp_path / "rl.parquet", "rl", replaced(made, "activation_vector", column))
    import_sets([file], tmp_path / "store")
    (out,) = export_sets(tmp_path / "store", "rl", tmp_path / "out")
    found = pq.read_table(out.path)
    assert found.schema.field("activation_vector").type == pa.list_(pa.float32(), D)
    values = np.asarray(found["activation_vector"].combine_chunks().flatten())
    np.testing.assert_array_equal(values.astype(numpy), given)
    for name in found.schema.names:
        assert name == "activation_vector" or found[name].equals(made[name])


def test_float64_that_float32_cannot_hold_is_rounded_and_said(tmp_path: Path) -> None:
    given = np.linspace(0.1, 1, 10 * D)
    column = pa.FixedSizeListArray.from_arrays(pa.array(given), D)
    file = write_set(tmp_path / "rl.parquet", "rl", replaced(table("rl", 10), "activation_vector", column))
    notes: list[str] = []
    built = import_sets([file], tmp_path / "store", note=notes.append)
    assert len(notes) == 1 and "10 vectors of float64" in notes[0]
    order = np.argsort(built.store.vectors(slice(None))[:, 0])
    np.testing.assert_array_equal(built.store.vectors(order).reshape(-1), given.astype(np.float32))


OPTIONAL = ["n_raw_tokens", "activation_layer", "doc_id", "detokenized_text_truncated"]


@pytest.mark.parametrize("left", [[], *[[n] for n in OPTIONAL], OPTIONAL[1:], OPTIONAL[:2]])
def test_tables_without_the_optional_columns(tmp_path: Path, left: list[str]) -> None:
    files = []
    for i, stage in enumerate(SPLITS):
        made = table(stage, 30, first_doc=100 * i)
        made = made.drop_columns([n for n in OPTIONAL if n not in left])
        files.append(write_set(tmp_path / "in" / f"{stage}.parquet", stage, made))
    built = import_sets(files, tmp_path / "store")
    assert built.store.check() == []
    if "doc_id" not in left:
        assert built.store.n_docs == 90 and built.store.doc_ids(np.array([0])) == ["av_sft.parquet:0"]
    for w in export_sets(tmp_path / "store", "all", tmp_path / "out"):
        same(w.path, tmp_path / "in" / w.path.name)


def test_unshuffled_sets_and_sets_in_small_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("nla_jax.exchange_read._BLOCK", 7 * D)
    monkeypatch.setattr("nla_jax.exchange._GROUP_ROWS", 11)
    for shuffled in (False, True):
        here = tmp_path / str(shuffled)
        file = write_set(here / "av.parquet", "av_sft", table("av_sft", 61, shuffled=shuffled))
        import_sets([file], here / "store")
        (out,) = export_sets(here / "store", "av_sft", here / "out")
        same(file, out.path)
        assert (here / "store" / "import").is_dir()  # half characters, and the order
        assert json.loads((here / "store" / "import.json").read_text())["reordered"] is shuffled
        assert pq.ParquetFile(out.path).num_row_groups == 6


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_texts_come_back(tmp_path_factory, data) -> None:
    here = tmp_path_factory.mktemp("any")
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    n = data.draw(st.integers(1, 8))
    made = table("av_sft", n)
    explanations = data.draw(st.lists(text.filter(lambda t: "<" not in t), min_size=n, max_size=n))
    made = replaced(made, "response", pa.array([f"<explanation>\n{e}\n</explanation>" for e in explanations]))
    made = replaced(made, "doc_id", pa.array(data.draw(st.lists(text, min_size=n, max_size=n))))
    made = replaced(
        made,
        "detokenized_text_truncated",
        pa.array(data.draw(st.lists(text.map(lambda t: t[:8]), min_size=n, max_size=n))),
    )
    file = write_set(here / "av.parquet", "av_sft", made)
    built = import_sets([file], here / "store")
    assert built.store.check() == []
    (out,) = export_sets(here / "store", "av_sft", here / "out")
    same(file, out.path)
    shutil.rmtree(here)


def test_rows_whose_explanation_does_not_fit_are_counted(tmp_path: Path) -> None:
    made = table("av_sft", 12)
    responses = made["response"].to_pylist()
    responses[2], responses[5], responses[7] = "no tags", "<explanation>bare</explanation>", ""
    file = write_set(tmp_path / "av.parquet", "av_sft", replaced(made, "response", pa.array(responses)))
    notes: list[str] = []
    built = import_sets([file], tmp_path / "store", note=notes.append)
    assert len(notes) == 2 and ": 2 rows whose explanation" in notes[0] and ": 1 responses in another" in notes[1]
    assert len(built.rows("av_sft")) == 10 and built.info["sets"]["av_sft"]["dropped"] == {"none": 0, "dropped": 2}
    (out,) = export_sets(tmp_path / "store", "av_sft", tmp_path / "out")
    found = pq.read_table(out.path)["response"].to_pylist()
    responses[5] = "<explanation>\nbare\n</explanation>"
    assert found == [r for i, r in enumerate(responses) if i not in (2, 7)]
    assert read_sidecar(out.path).raw["row_count"] == 10


# -- our own sets


def test_our_own_sets_are_as_the_reference_writes_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = make_store(tmp_path / "store", tokenizer)
    built = build(store.path, tokenizer, Plan())
    written = export_sets(store.path, "all", tmp_path / "out")
    truth = {d.doc_id: d for d in documents(tokenizer, 40)}
    all_vectors = vectors(store.n_rows)
    for w in written:
        rows = built.rows(w.name)
        found = pq.read_table(w.path)
        expected = table(w.name, 3)  # as the reference makes them
        assert [(f.name, f.type) for f in found.schema] == [(f.name, f.type) for f in expected.schema]
        assert found.schema.equals(set_schema(w.name, D)) and found.num_rows == len(rows)
        got = found["activation_vector"].combine_chunks().flatten().to_numpy().reshape(-1, D)
        np.testing.assert_array_equal(got, all_vectors[rows])
        for row, item in zip(rows.tolist(), found.to_pylist(), strict=True):
            document = truth[item["doc_id"]]
            end = document.text_end[item["n_raw_tokens"] - 1]
            assert item["detokenized_text_truncated"] == document.text.encode()[:end].decode()
            assert item["activation_layer"] == 3
            if w.name == "av_sft":
                assert item["response"] == f"<explanation>\n{explanation(row)}\n</explanation>"
            if w.name == "ar_sft":
                assert item["prompt"] == AR_TEMPLATE.replace("{explanation}", explanation(row))
            else:
                content = AV_TEMPLATE.replace("{injection_char}", "<INJECT>")
                assert item["prompt"] == [{"role": "user", "content": content}]
        meta = yaml.safe_load(Path(f"{w.path}.nla_meta.yaml").read_text())
        assert (meta["kind"], meta["schema_version"], meta["stage"], meta["row_count"]) == (
            "nla_dataset",
            2,
            w.name,
            len(rows),
        )
        assert meta["extraction"]["norm"] == "none" and meta["extraction"]["d_model"] == D
        assert meta["created_at"] and meta["created_by"] and meta["dataset_id"].startswith(f"{w.name}_mini_L3_")
        assert read_sidecar(w.path) == built.sidecar(w.name)
        read_sidecar(w.path).check(tokenizer)
    # The file's groups hold whole vectors, and nothing tried to compress them.
    column = pq.ParquetFile(written[0].path).metadata.row_group(0).column(3)
    assert column.path_in_schema.startswith("activation_vector") and column.compression == "UNCOMPRESSED"
    # Out and in again: the same sets with the same numbers.
    again = import_sets([w.path for w in written], tmp_path / "again", tokenizer=tokenizer)
    assert again.variance_nrm == built.variance_nrm and again.injection_scale == built.injection_scale
    for w in export_sets(tmp_path / "again", "all", tmp_path / "out2"):
        same(w.path, tmp_path / "out" / w.path.name)


def test_export_without_texts_and_over_what_is_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = make_store(tmp_path / "store", tokenizer)
    build(store.path, tokenizer, Plan())
    export_sets(store.path, "rl", tmp_path / "rl.parquet", with_text=False)
    assert "detokenized_text_truncated" not in pq.read_schema(tmp_path / "rl.parquet").names
    assert read_sidecar(tmp_path / "rl.parquet").raw["keep_debug_metadata"] is False
    before = (tmp_path / "rl.parquet").read_bytes()
    with pytest.raises(InputError, match="is there already"):
        export_sets(store.path, "rl", tmp_path / "rl.parquet")
    assert (tmp_path / "rl.parquet").read_bytes() == before
    export_sets(store.path, "rl", tmp_path / "rl.parquet", overwrite=True)
    assert "detokenized_text_truncated" in pq.read_schema(tmp_path / "rl.parquet").names
    assert read_sidecar(tmp_path / "rl.parquet").raw["keep_debug_metadata"] is True
    with pytest.raises(InputError, match="a directory for several sets"):
        export_sets(store.path, "all", tmp_path / "all.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rl.parquet", "rl.parquet.nla_meta.yaml", "store"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = make_store(tmp_path / "store", tokenizer)
    build(store.path, tokenizer, Plan())
    victim = next(p for p in Path(store.path, "vectors").rglob("*") if p.is_file() and p.name != "zarr.json")
    victim.unlink()
    with pytest.raises(NLAError, match="has no vector"):
        export_sets(store.path, "all", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_more_than_4_gib_would_not_overflow() -> None:
    """No list of variable length is made of vectors, in any set."""
    for name in SPLITS:
        vector = set_schema(name, 3584).field("activation_vector").type
        assert pa.types.is_fixed_size_list(vector) and vector.list_size == 3584


# -- overlap


def test_a_document_in_two_sets_is_reported(tmp_path: Path) -> None:
    av = write_set(tmp_path / "av.parquet", "av_sft", table("av_sft", 30))
    rl = write_set(
        tmp_path / "rl.parquet", "rl", table("rl", 30, first_doc=8, shuffled=False)
    )  # documents 8 and 9 are in both
    with pytest.raises(
        InputError, match=r"2 documents by id and 0 by text are in two sets.*'org/corpus:train:[89]'.*--drop"
    ):
        import_sets([av, rl], tmp_path / "store")
    assert not (tmp_path / "store").exists()
    notes: list[str] = []
    built = import_sets([av, rl], tmp_path / "store", drop_overlap=True, note=notes.append)
    assert len(notes) == 1 and "6 rows left out" in notes[0]
    assert (len(built.rows("av_sft")), len(built.rows("rl"))) == (30, 24)
    assert built.store.check() == []
    (out,) = export_sets(tmp_path / "store", "rl", tmp_path / "out")
    original = pq.read_table(rl)
    keep = [doc not in ("org/corpus:train:8", "org/corpus:train:9") for doc in original["doc_id"].to_pylist()]
    assert pq.read_table(out.path).equals(original.filter(pa.array(keep)))


def test_the_same_text_under_another_id_is_reported(tmp_path: Path) -> None:
    av = table("av_sft", 9)
    rl = replaced(table("rl", 9, first_doc=100), "doc_id", pa.array([f"other:{i}" for i in range(9)]))
    texts = rl["detokenized_text_truncated"].to_pylist()
    texts[4] = max(av["detokenized_text_truncated"].to_pylist()[i] for i in (0, 1, 2))
    longest = {}
    for doc, text in zip(av["doc_id"].to_pylist(), av["detokenized_text_truncated"].to_pylist(), strict=True):
        longest[doc] = max(longest.get(doc, ""), text, key=len)
    texts[4] = longest["org/corpus:train:1"]
    rl = replaced(rl, "detokenized_text_truncated", pa.array(texts))
    files = [write_set(tmp_path / "av.parquet", "av_sft", av), write_set(tmp_path / "rl.parquet", "rl", rl)]
    with pytest.raises(InputError, match="0 documents by id and 1 by text.*'other:4'"):
        import_sets(files, tmp_path / "store")
    built = import_sets(files, tmp_path / "store", drop_overlap=True)
    assert len(built.rows("rl")) == 8


def test_texts_that_begin_alike_are_noted(tmp_path: Path) -> None:
    av = table("av_sft", 9)
    rl = table("rl", 9, first_doc=100)
    text = max(av["detokenized_text_truncated"].to_pylist(), key=len)[:190]
    rl = replaced(rl, "detokenized_text_truncated", pa.array([f"{text} but other {i}" for i in range(9)]))
    rl = replaced(rl, "doc_id", pa.array([f"other:{i}" for i in range(9)]))
    files = [write_set(tmp_path / "av.parquet", "av_sft", av), write_set(tmp_path / "rl.parquet", "rl", rl)]
    notes: list[str] = []
    import_sets(files, tmp_path / "store", note=notes.append)
    assert notes == ["9 documents begin with the same 256 bytes as one of another set"]


# -- bad input


def bad(tmp_path: Path, file: Path, match: str, kind: type[NLAError] = InputError) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=match) as error:
        import_sets([file], tmp_path / "store")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before  # nothing half-written


def changed(tmp_path: Path, stage: str, name: str, change) -> Path:
    made = table(stage, 12)
    values = change(made[name].to_pylist())
    column = (
        values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values, made.schema.field(name).type)
    )
    return write_set(tmp_path / "set.parquet", stage, replaced(made, name, column))


def put(row: int, value):
    return lambda values: [value if i == row else v for i, v in enumerate(values)]


def test_no_sidecar(tmp_path: Path) -> None:
    file = write_set(tmp_path / "set.parquet", "rl", table("rl", 12))
    (tmp_path / "set.parquet.nla_meta.yaml").unlink()
    bad(tmp_path, file, "has no sidecar: expected set.parquet.nla_meta.yaml", SidecarError)
    bad(tmp_path, tmp_path / "absent.parquet", "no such file")


@pytest.mark.parametrize(
    ("stage", "changes", "match"),
    [
        ("rl", {"kind": "nla_model", "role": "av", "d_model": D}, "kind: expected nla_dataset"),
        ("base", {}, "stage: expected av_sft or ar_sft or rl, got base"),
        ("rl", {"schema_version": 3}, "schema_version"),
        ("rl", {"extraction": {"d_model": D, "layer_index": 20, "norm": "whitened"}}, "raw vectors"),
        ("rl", {"extraction": {"d_model": D}}, "extraction_layer_index"),
        ("ar_sft", {"prompt_templates": {"actor": "x {injection_char}"}}, "prompt_templates.ar"),
        ("rl", {"tokens": {}}, "injection_char"),
    ],
)
def test_sidecars_that_do_not_describe_a_set(tmp_path: Path, stage: str, changes: dict, match: str) -> None:
    file = write_set(tmp_path / "set.parquet", stage, table("rl" if stage == "base" else stage, 12), **changes)
    bad(tmp_path, file, match, SidecarError)


def test_widths_that_differ(tmp_path: Path) -> None:
    file = write_set(tmp_path / "set.parquet", "rl", table("rl", 12))
    raw = sidecar("rl", 12, d=D + 1)
    (tmp_path / "set.parquet.nla_meta.yaml").write_text(yaml.safe_dump(raw, allow_unicode=True))
    bad(tmp_path, file, r"activation_vector: expected lists of 17 \(the sidecar's d_model\)")
    rows = [[1.0] * (D - (i == 7)) for i in range(12)]
    file = changed(tmp_path, "rl", "activation_vector", lambda _: pa.array(rows, pa.list_(pa.float32())))
    bad(tmp_path, file, "row 7, activation_vector: expected 16, the sidecar's d_model, got 15 numbers")


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize(
    ("value", "match"),
    [
        (None, "row 4, activation_vector: expected a value in every row, got null"),
        ([1.0] * (D - 1) + [None], "row 4, activation_vector.*a null among its numbers"),
        ([1.0] * (D - 1) + [float("nan")], "row 4, activation_vector: expected finite.*NaN"),
        ([float("inf")] + [1.0] * (D - 1), "row 4, activation_vector.*infinite"),
    ],
)
def test_vectors_that_are_none(tmp_path: Path, value, match: str, fixed: bool) -> None:
    rows = [[float(i + 1)] * D if i != 4 else value for i in range(12)]
    kind = pa.list_(pa.float32(), D) if fixed else pa.list_(pa.float64())
    bad(tmp_path, changed(tmp_path, "rl", "activation_vector", lambda _: pa.array(rows, kind)), match)


def test_a_float64_beyond_float32(tmp_path: Path) -> None:
    rows = [[1e300 if i == 3 else 1.0] * D for i in range(12)]
    file = changed(tmp_path, "rl", "activation_vector", lambda _: pa.array(rows, pa.list_(pa.float64(), D)))
    bad(tmp_path, file, "row 3, activation_vector: expected finite float32")


@pytest.mark.parametrize(
    ("stage", "name", "change", "match"),
    [
        ("rl", "activation_vector", lambda v: pa.array(["x"] * 12), "activation_vector: expected lists of"),
        ("rl", "activation_vector", lambda v: pa.array([[1] * D] * 12), "activation_vector: expected lists of"),
        ("rl", "prompt", lambda v: pa.array(["text"] * 12), "prompt: expected lists of messages"),
        ("ar_sft", "prompt", lambda v: pa.array([1] * 12), "prompt: expected text"),
        ("av_sft", "response", lambda v: pa.array([1] * 12), "response: expected text"),
        ("rl", "n_raw_tokens", lambda v: pa.array(["a"] * 12), "n_raw_tokens: expected integers"),
        ("rl", "n_raw_tokens", put(3, 0), "row 3, n_raw_tokens: expected a count from 1.*got 0"),
        ("rl", "n_raw_tokens", put(3, None), "row 3, n_raw_tokens.*null"),
        ("rl", "n_raw_tokens", put(3, 2**40), "row 3, n_raw_tokens"),
        ("rl", "activation_layer", put(5, 21), "row 5, activation_layer: expected 20, as the sidecar says, got 21"),
        ("rl", "doc_id", put(2, None), "row 2, doc_id.*null"),
        ("rl", "detokenized_text_truncated", put(2, None), "row 2, detokenized_text_truncated.*null"),
        ("av_sft", "response", put(1, None), "row 1, response.*null"),
        ("av_sft", "response", lambda v: ["no tags"] * 12, "response: expected the template's text, got none"),
        ("ar_sft", "prompt", lambda v: ["another"] * 12, "prompt: expected the template's text, got none"),
        ("rl", "prompt", put(6, [{"role": "user", "content": "<INJECT>"}]), "row 6, prompt.*AV template"),
        ("rl", "prompt", put(6, []), "row 6, prompt"),
        ("av_sft", "prompt", put(0, [{"role": "system", "content": "x"}] * 2), "row 0, prompt"),
        ("rl", "detokenized_text_truncated", put(2, "x" * 200), "rows of one text, got two that part at byte 0"),
    ],
)
def test_columns_that_cannot_be_read(tmp_path: Path, stage: str, name: str, change, match: str) -> None:
    bad(tmp_path, changed(tmp_path, stage, name, change), match)


@pytest.mark.parametrize("name", ["activation_vector", "prompt", "response"])
def test_missing_columns(tmp_path: Path, name: str) -> None:
    file = write_set(tmp_path / "set.parquet", "av_sft", table("av_sft", 12).drop_columns([name]))
    bad(tmp_path, file, f"column {name} of a set of stage av_sft")


def test_half_written_and_empty_files(tmp_path: Path) -> None:
    file = write_set(tmp_path / "set.parquet", "rl", table("rl", 60))
    data = file.read_bytes()
    for part in (data[: len(data) // 2], data[:100], b"", data[:200] + bytes(3000) + data[3200:]):
        file.write_bytes(part)
        bad(tmp_path, file, "not a readable parquet file|row|parquet")
    file = write_set(tmp_path / "set.parquet", "rl", table("rl", 12).slice(0, 0))
    bad(tmp_path, file, "holds no rows")


def test_sets_that_do_not_belong_together(tmp_path: Path) -> None:
    av = write_set(tmp_path / "av.parquet", "av_sft", table("av_sft", 12))
    for changes, field in (
        ({"prompt_templates": {"actor": "Other <INJECT>", "critic": AR}}, "av_template"),
        ({"extraction": sidecar("rl", 12)["extraction"] | {"base_model": "org/Other"}}, "base_model"),
        ({"tokens": sidecar("rl", 12)["tokens"] | {"injection_token_id": 7}}, "marker_id"),
    ):
        rl = write_set(tmp_path / "rl.parquet", "rl", table("rl", 12, first_doc=50), **changes)
        with pytest.raises(SidecarError, match=f"rl.parquet: {field}: expected .* as in .*av.parquet"):
            import_sets([av, rl], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_odd_things_are_noted(tmp_path: Path) -> None:
    made = table("rl", 12).append_column("token_position", pa.array(range(12)))
    file = write_set(tmp_path / "rl.parquet", "rl", made, row_count=13)
    notes: list[str] = []
    import_sets([file], tmp_path / "store", note=notes.append)
    assert len(notes) == 2 and "token_position" in notes[0] and "12 rows, its sidecar says 13" in notes[1]


def test_an_import_that_ends_early_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    files = write_sets(tmp_path / "in")

    def full(*args, **options) -> None:
        raise OSError(28, "No space left on device")

    for name in ("nla_jax.exchange_import.write_splits", "nla_jax.exchange_import.save_build", "os.preadv"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(NLAError, match="No space left"):
                import_sets(files, tmp_path / "store")
        assert [p.name for p in tmp_path.iterdir()] == ["in"]
    # What a killed run left behind is removed by the next one.
    (tmp_path / ".store.killed.tmp" / "scratch.x").mkdir(parents=True)
    import_sets(files, tmp_path / "store")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "store"]


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    file = write_set(tmp_path / "set.parquet", "rl", table("rl", 12))
    import_sets([file], tmp_path / "store")
    with pytest.raises(NLAError, match="holds a store already"):
        import_sets([file], tmp_path / "store")


# -- the commands and the released pair's own sidecars


def test_the_commands(tmp_path: Path) -> None:
    files = [str(p) for p in write_sets(tmp_path / "in")]
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    run = CliRunner().invoke(main, ["data", "import", *files, "--out", store])
    assert run.exit_code == 0, run.output
    assert "180 rows of 60 documents; no document id and no text is in two sets" in run.output
    run = CliRunner().invoke(main, ["data", "check", store])
    assert run.exit_code == 0 and "sound" in run.output
    run = CliRunner().invoke(main, ["data", "info", store])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(main, ["data", "export", store, "--out", out])
    assert run.exit_code == 0 and run.output.count("wrote ") == 3
    run = CliRunner().invoke(main, ["data", "export", store, "--set", "rl", "--out", out])
    assert run.exit_code == 2 and run.stderr.count("\n") == 1 and "is there already" in run.stderr
    run = CliRunner().invoke(main, ["data", "import", files[0], "--out", store])
    assert run.exit_code == 2 and "holds a store already" in run.stderr


def test_a_store_without_sets_says_what_to_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = make_store(tmp_path / "store", tokenizer)
    write_splits(store.path)
    run = CliRunner().invoke(main, ["data", "export", store.path, "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and "nla build" in run.stderr


@needs_data
def test_with_the_released_templates_and_tokenizer(tmp_path: Path) -> None:
    qwen, released = Tokenizer.from_dir(QWEN), read_sidecar(RELEASED_AV)
    assert released.av_template and released.ar_template
    templates = {"actor": released.av_template, "critic": released.ar_template}
    tokens = sidecar("ar_sft", 12)["tokens"] | {"critic_suffix_ids": [1318, 29, 366, 1708, 29]}
    made = table("ar_sft", 12)
    prompts = [p.replace("Summary: ", "Summary of the following text: ") for p in made["prompt"].to_pylist()]
    made = replaced(made, "prompt", pa.array(prompts))
    file = write_set(tmp_path / "ar.parquet", "ar_sft", made, prompt_templates=templates, tokens=tokens)
    built = import_sets([file], tmp_path / "store", tokenizer=qwen)
    assert built.sidecar("ar_sft").ar_template == released.ar_template
    (out,) = export_sets(tmp_path / "store", "ar_sft", tmp_path / "out")
    same(file, out.path)
    tokens["injection_left_neighbor_id"] = 30
    file = write_set(tmp_path / "ar.parquet", "ar_sft", made, prompt_templates=templates, tokens=tokens)
    with pytest.raises(SidecarError, match="neighbor"):
        import_sets([file], tmp_path / "other", tokenizer=qwen)


def _peak_of_import(file: str, out: str, sender) -> None:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import_sets([file], out)
    export_sets(out, "rl", f"{out}.parquet")
    sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


@pytest.mark.slow
def test_memory_is_flat_as_rows_grow(tmp_path: Path) -> None:
    peaks = []
    for n in (6000, 60000):
        d = 1024
        file = tmp_path / f"{n}.parquet"
        made = table("rl", n, d)
        write_set(file, "rl", made, extraction=sidecar("rl", n, d=d)["extraction"])
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe()
        process = context.Process(target=_peak_of_import, args=(str(file), str(tmp_path / f"s{n}"), sender))
        process.start()
        peaks.append(receiver.recv())
        process.join()
    assert peaks[1] < peaks[0] + 80  # MiB; the vectors alone grow by 210
    assert open_build(tmp_path / "s60000").rows("rl").shape == (60000,)
