"""`extract`: its vectors are the model's own, it goes on where it stopped, and it refuses what does not fit."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from extract_cases import TOLERANCE, alone, letters, run, small_target, write
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import relative_error
from store_cases import tree
from test_end_to_end import edit_weights
from tiny_tokenizers import QWEN

from nla_jax import extract_run
from nla_jax.corpus import open_corpus
from nla_jax.errors import CheckpointError, InputError, NLAError, StoreError
from nla_jax.extract import Settings, bucket, gather, plan
from nla_jax.store import Store
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools.mini import make_mini


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


# What the vectors are


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, shared_data) -> Path:
    """A target of reduced width with the real Qwen2.5 tokenizer."""
    return make_mini(tmp_path_factory.mktemp("qwen"), tokenizer=QWEN, d_model=64, dtype="float32").target


def real_text(shared_data: Path, which: str) -> tuple[Path, dict]:
    if which == "c4":
        return shared_data / "corpus" / "c4-train-00000-of-01637.parquet", {}
    return shared_data / "corpus" / "tinyshakespeare.txt", {"text_split": "words:300"}


@pytest.mark.parametrize("which", ["c4", "shakespeare"])
def test_vectors_are_those_of_each_document_alone(which, qwen, shared_data, tmp_path):
    path, options = real_text(shared_data, which)
    run(qwen, path, tmp_path / "s", rows=slice(0, 7), max_tokens=300, **options)
    store = Store.open(tmp_path / "s")
    table, vectors = store.table(), store.vectors(slice(None))
    assert store.n_docs >= 5 and store.n_rows >= 40
    for doc, stream in enumerate(alone(qwen, store, 2, list(range(store.n_docs)))):
        rows = np.flatnonzero(table["doc"] == doc)
        assert relative_error(vectors[rows], stream[table["position"][rows]]) < TOLERANCE
    assert store.check() == []


@pytest.mark.parity
@pytest.mark.parametrize("which", ["c4", "shakespeare"])
def test_vectors_are_hidden_states_of_transformers(which, qwen, shared_data, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the [parity] extra: torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs the [parity] extra: torch and transformers")
    path, options = real_text(shared_data, which)
    layers = (0, 2, 3)
    run(qwen, path, tmp_path / "s", layers, rows=slice(0, 100), **options)
    store = Store.open(tmp_path / "s")
    model = transformers.AutoModel.from_pretrained(qwen, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen)
    # The last of hidden_states has the final norm applied; the stream before it is that norm's input.
    seen = {}
    model.norm.register_forward_pre_hook(lambda module, args: seen.update(last=args[0]))
    table, vectors, texts = store.table(), store.vectors(slice(None)), store.texts(slice(None))
    documents = {d.doc_id: d.text for d in open_corpus(path, **options)}
    worst = 0.0
    for doc, name in enumerate(store.doc_ids(slice(None))):
        ids = tokenizer(documents[name], return_tensors="pt").input_ids[:, :1024]
        assert store.tokens(np.array([doc]))[0].tolist() == ids[0].tolist()
        assert documents[name].startswith(texts[doc])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states
        for layer in layers:
            stream = seen["last"] if layer == 3 else hidden[layer + 1]
            rows = np.flatnonzero((table["doc"] == doc) & (table["layer"] == layer))
            expected = stream[0, table["position"][rows].tolist()].numpy()
            worst = max(worst, relative_error(vectors[rows], expected))
            assert np.abs(vectors[rows] - expected).max() < 1e-4
    assert store.n_docs > 80 and worst < TOLERANCE


def test_several_layers_in_one_pass_are_the_separate_passes(target, corpus, tmp_path):
    # 32 rows a shard and 3 layers: shards begin and end between the layers of a position.
    run(target, corpus, tmp_path / "all", (0, 2, 3))
    together = Store.open(tmp_path / "all")
    table, vectors = together.table(), together.vectors(slice(None))
    assert table["layer"][:6].tolist() == [0, 2, 3, 0, 2, 3]
    for layer in (0, 2, 3):
        run(target, corpus, tmp_path / f"{layer}", (layer,))
        one = Store.open(tmp_path / f"{layer}")
        rows = table["layer"] == layer
        for name, column in one.table().items():
            np.testing.assert_array_equal(column, table[name][rows])
        assert relative_error(vectors[rows], one.vectors(slice(None))) < 1e-6


def test_eight_devices_are_one_device(target, corpus, store, tmp_path, monkeypatch):
    assert extract_run._mesh().shape == {"data": 8, "fsdp": 1, "tensor": 1}
    monkeypatch.setattr(extract_run, "_mesh", lambda split: None)
    run(target, corpus, tmp_path / "s")
    one = Store.open(tmp_path / "s")
    assert tree(tmp_path / "s" / "rows") == tree(Path(store.path) / "rows")
    assert relative_error(one.vectors(slice(None)), store.vectors(slice(None))) < 1e-6


def test_the_later_blocks_are_not_computed(target, corpus, store, tmp_path):
    """Were block 3 computed or block 2's output normed, its NaN would spread or the numbers would differ."""
    poisoned = shutil.copytree(target, tmp_path / "model")

    def poison(tensors):
        for name in [
            n for n in tensors if n.startswith("model.layers.3.") or n in ("model.norm.weight", "lm_head.weight")
        ]:
            tensors[name] = np.full_like(tensors[name], np.nan)

    edit_weights(poisoned / "model.safetensors", poison)
    run(poisoned, corpus, tmp_path / "s")
    np.testing.assert_array_equal(Store.open(tmp_path / "s").vectors(slice(None)), store.vectors(slice(None)))


def test_a_vector_that_is_not_finite_is_refused_by_name(target, corpus, tmp_path):
    broken = shutil.copytree(target, tmp_path / "model")
    token = Tokenizer.from_dir(target).encode(" night")
    assert len(token) == 1

    def poison(tensors):
        tensors["model.embed_tokens.weight"][token[0]] = np.nan

    edit_weights(broken / "model.safetensors", poison)
    rows = [{"id": "fine", "text": "the light " * 60}, {"id": "bad", "text": "the light " * 30 + "night " * 30}]
    with pytest.raises(StoreError, match=r"document 'bad', position \d+, layer 2\) is not finite.*--dtype float32"):
        run(broken, write(tmp_path / "c.jsonl", rows), tmp_path / "s")
    with pytest.raises(StoreError, match="half-written"):
        Store.open(tmp_path / "s")


def test_bfloat16_stores_and_models(target, corpus, store, tmp_path):
    run(target, corpus, tmp_path / "s", store_dtype="bfloat16")
    rounded = Store.open(tmp_path / "s").vectors(slice(None))
    expected = store.vectors(slice(None)).astype(jax.numpy.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(rounded, expected)
    run(target, corpus, tmp_path / "m", compute_dtype="bfloat16")
    half = Store.open(tmp_path / "m").vectors(slice(None))
    assert 1e-4 < relative_error(half, store.vectors(slice(None))) < 0.1


# Batches


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5000), max_size=80),
    batch_tokens=st.sampled_from([1, 512, 2048, 8192]),
    devices=st.sampled_from([1, 2, 8]),
)
def test_batches_hold_every_document_once(lengths, batch_tokens, devices):
    planned = plan(lengths, batch_tokens, devices)
    assert sorted(i for _, _, chosen in planned for i in chosen) == list(range(len(lengths)))
    for T, B, chosen in planned:
        assert T == bucket(max(lengths[i] for i in chosen)) and 0 < len(chosen) <= B
        assert B == max(batch_tokens // T, 1) * devices
    by_length: dict[int, int] = {}
    for n in lengths:
        by_length[bucket(n)] = by_length.get(bucket(n), 0) + 1
    plain = sum(-(-n // (B := max(batch_tokens // T, 1) * devices)) * B * T for T, n in by_length.items())
    assert sum(T * B for T, B, _ in planned) <= plain


def test_few_programs_are_compiled(target, tmp_path):
    corpus = write(tmp_path / "c.jsonl", letters(90, longest=500))
    gather.clear_cache()
    done = run(target, corpus, tmp_path / "s", shard_rows=17)
    assert done.shards > 40
    # Lengths 64 to 512; a shard with few documents, or with few positions of them, needs no program of its own.
    assert gather._cache_size() <= 9, gather._cache_size()


# Going on, and refusals


def test_a_second_run_does_nothing(target, corpus, store, tmp_path, monkeypatch):
    before = tree(Path(store.path))
    monkeypatch.setattr(extract_run.hf, "load_model", lambda *a, **k: pytest.fail("the model was read"))
    done = run(target, corpus, Path(store.path))
    assert done.complete and done.shards == 0 and done.tokens == 0 and done.n_rows == store.n_rows
    assert tree(Path(store.path)) == before


def test_other_settings_are_refused_by_name(target, corpus, store, tmp_path):
    other_weights = small_target(tmp_path / "w", seed=1)
    other_config = shutil.copytree(target, tmp_path / "config" / "target")
    config = (other_config / "config.json").read_text()
    (other_config / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    other_tokenizer = small_target(
        tmp_path / "t", family="qwen2", tokenizer=small_target(tmp_path / "g", family="gemma2")
    )
    longer = write(tmp_path / "letters.jsonl", letters(41))
    out = Path(store.path)
    before = tree(out)
    for changes, named in [
        ({"layers": (1,)}, r"layers = \[2\]"),
        ({"layers": (2, 3)}, r"layers = \[2\]"),
        ({"seed": 1}, "settings.seed = 0"),
        ({"min_position": 40}, "settings.min_position = 50"),
        ({"per_document": 9}, "settings.per_document = 10"),
        ({"max_tokens": 512}, "settings.max_tokens = 1024"),
        ({"batch_tokens": 1024}, "settings.batch_tokens = 512"),
        ({"compute_dtype": "bfloat16"}, "settings.compute_dtype = "),
        ({"store_dtype": "bfloat16"}, "dtype = "),
        ({"shard_rows": 64}, "shard_rows = 32"),
        ({"target": other_weights}, "model.weights"),
        ({"target": other_config}, "model.config_sha256"),
        ({"target": other_tokenizer}, "model.config_sha256|tokenizer.fingerprint"),
        ({"corpus": longer}, "corpus.sizes_sha256"),
        ({"rows": slice(0, 5)}, "corpus.options"),
    ]:
        with pytest.raises(StoreError, match=f"is a store of another extraction: expected {named}"):
            run(**{"target": target, "corpus": corpus, "out": out, **changes})
    assert tree(out) == before


def test_bad_settings_are_refused_before_anything_is_read(target, corpus, tmp_path):
    for changes, message in [
        ({"layers": (4,)}, r"layer: expected 0 to 3 \(the target's blocks\), got 4"),
        ({"layers": (-1,)}, "layer: expected 0 to 3"),
        ({"layers": (1, 1)}, "layers: expected one or more different"),
        ({"layers": ()}, "layers"),
        ({"per_document": 0}, "per_document: expected at least 1"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"max_tokens": 10**6}, "max_tokens: expected at most 32768, the max_position_embeddings"),
        ({"max_tokens": 50}, "max_tokens above min_position"),
        ({"min_position": -1}, "min_position: expected at least 0"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"shard_rows": 0}, "shard_rows"),
        ({"process": 2, "processes": 2}, "process: expected 0 to 1"),
        ({"compute_dtype": "int8"}, "dtype"),
    ]:
        with pytest.raises(NLAError, match=message) as caught:
            run(**{"target": target, "corpus": corpus, "out": tmp_path / "s", **changes})
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_extract_leaves_nothing(target, tmp_path):
    short = write(tmp_path / "short.jsonl", [{"text": "a word"}])
    with pytest.raises(StoreError, match="nothing to extract.*--min-position"):
        run(target, short, tmp_path / "s")
    empty = write(tmp_path / "empty.jsonl", [{"text": " "}])
    with pytest.raises(InputError, match="no documents"):
        run(target, empty, tmp_path / "s")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.jsonl", "short.jsonl"]


def test_a_tokenizer_with_more_ids_than_the_model(target, corpus, tmp_path):
    model = shutil.copytree(target, tmp_path / "model")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(re.sub(r'"vocab_size": \d+', '"vocab_size": 300', config))
    edit_weights(
        model / "model.safetensors",
        lambda t: t.update({k: t[k][:300] for k in ("model.embed_tokens.weight", "lm_head.weight")}),
    )
    with pytest.raises(CheckpointError, match=r"document 'letter-0': token \d+: expected under 300"):
        run(model, corpus, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_out_of_memory_says_what_helps(target, corpus, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")

    monkeypatch.setattr(extract_run, "shard_vectors", fail)
    with pytest.raises(InputError, match="out of memory.*--batch-tokens 128"):
        run(target, corpus, tmp_path / "s")


def test_other_processes_wait_for_the_index(target, corpus, tmp_path):
    with pytest.raises(StoreError, match="no index after 0 s: expected process 0's"):
        run(target, corpus, tmp_path / "s", process=1, processes=2, wait_seconds=0)
    assert not (tmp_path / "s").exists()


def test_settings_are_in_the_manifest(store):
    fields = {f.name: f.default for f in dataclasses.fields(Settings) if f.name != "layers"}
    assert store.manifest["settings"].items() >= fields.items()
    assert store.manifest["layers"] == [2] and store.manifest["model"]["n_layers"] == 4
