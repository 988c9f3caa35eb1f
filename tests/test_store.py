"""Activation stores: what is written is what is read, whoever wrote it and however often it was interrupted."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import SPEC, D, build, documents, fill, tree, vectors

from nla_jax.arrays import SHORT_TEXT, GrowingText, Layout, Ragged, Root
from nla_jax.errors import NLAError, StoreError
from nla_jax.manifest import StoreSpec, manifest_hash
from nla_jax.store import SPLITS, Store
from nla_jax.store_merge import merge, split_store
from nla_jax.store_splits import write_splits
from nla_jax.store_write import IndexedDocument, ShardWriter, create_index, write_explanations

PROGRAM = Path(__file__).with_name("store_cases.py")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return build(tmp_path / "store")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, str]:
    """The files of a store that was written in one go."""
    path = tmp_path_factory.mktemp("reference") / "store"
    build(path)
    return tree(path)


def expected_rows() -> list[tuple[IndexedDocument, int, int]]:
    return [(d, int(p), layer) for d in documents() for p in d.positions for layer in SPEC.layers]


def test_reads_what_was_written(store: Store):
    rows = expected_rows()
    assert (store.n_rows, store.n_docs, store.d_model, store.layers) == (len(rows), 24, D, (1, 3))
    written = np.concatenate([vectors(i, (a, min(a + 16, len(rows)))) for i, a in enumerate(range(0, len(rows), 16))])
    np.testing.assert_array_equal(store.vectors(slice(None)), written)
    chosen = np.random.default_rng(0).integers(0, len(rows), 50)  # unordered, with repeats
    np.testing.assert_array_equal(store.vectors(chosen), written[chosen])
    np.testing.assert_array_equal(store.vectors(slice(3, 60, 7)), written[3:60:7])
    assert store.vectors(slice(5, 5)).shape == (0, D)

    all_documents = list(documents())
    table = store.table()
    for row, (document, position, layer) in enumerate(rows):
        at = {name: int(column[row]) for name, column in table.items()}
        assert all_documents[at["doc"]].doc_id == document.doc_id
        assert (at["position"], at["layer"]) == (position, layer)
        assert (at["token_id"], at["role"]) == (document.ids[position], document.roles[position])
        assert at["text_end"] == document.text_end[position]
    some = store.table(chosen)
    for name in table:
        np.testing.assert_array_equal(some[name], table[name][chosen])

    assert store.texts(slice(None)) == [d.text for d in all_documents]
    assert store.doc_ids(np.array([7, 0, 7])) == [all_documents[i].doc_id for i in (7, 0, 7)]
    for tokens, document in zip(store.tokens(slice(2, 9)), all_documents[2:9], strict=True):
        np.testing.assert_array_equal(tokens, document.ids)
    for row, prefix in zip(chosen, store.prefixes(chosen), strict=True):
        document, position, _ = rows[row]
        assert prefix == document.text.encode()[: document.text_end[position]].decode()
    assert store.check() == []


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 2**32 - 1))
def test_any_texts_come_back(texts: list[str], seed: int):
    root = Root(f"memory://texts-{seed}")
    root.delete_below("docs/")
    writer = GrowingText(root, "docs/bytes", "docs/offsets", Layout(32, 8, zstd=True))  # so that texts cross shards
    for text in texts:
        writer.append(text.encode())
    writer.close()
    ragged = Ragged(root, "docs/bytes", "docs/offsets")
    assert len(ragged) == len(texts)
    rng = np.random.default_rng(seed)
    items = rng.integers(0, len(texts), 30)
    assert ragged.strings(items) == [texts[i] for i in items]
    lengths = np.array([len(texts[i][: int(rng.integers(0, 31))].encode()) for i in items])
    assert ragged.strings(items, lengths) == [
        texts[i].encode()[:n].decode() for i, n in zip(items, lengths, strict=True)
    ]


def test_bfloat16_is_kept_exactly(tmp_path: Path):
    spec = dataclasses.replace(SPEC, dtype="bfloat16")
    store = build(tmp_path / "store", spec)
    rows = (0, 16)
    np.testing.assert_array_equal(
        store.vectors(slice(*rows)), vectors(0, rows).astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert store.vectors(slice(0, 1)).dtype == np.float32
    assert store.check() == []


@pytest.mark.parametrize("where", ["memory", "file"])
def test_the_same_code_runs_on_urls(where: str, tmp_path: Path, store: Store):
    """An object store has neither directories nor renames; only TensorStore's key-value calls may be used."""
    url = {"memory": f"memory://{tmp_path.name}/deep/store", "file": f"file://{tmp_path}/remote"}[where]
    root = Root(url)
    root.write("rows/doc/left-over", b"of a killed run")
    remote = build(url)
    assert {k: v for k, v in remote.manifest.items()} == store.manifest
    np.testing.assert_array_equal(remote.vectors(slice(None)), store.vectors(slice(None)))
    write_splits(url)
    write_explanations(url, ["first"] * remote.n_rows, {})
    write_explanations(url, ["again"] * remote.n_rows, {})
    remote = Store.open(url)
    assert remote.check() == [] and remote.explanations(slice(0, 1)) == ["again"]
    with pytest.raises(StoreError, match="holds a store already"):
        create_index(url, SPEC, documents())
    build(f"{url}-b", prefix="other", first=100)
    merge([url, f"{url}-b"], f"{url}-all")
    assert Store.open(f"{url}-all").check() == []
    if where == "file":
        shared = {name: digest for name, digest in tree(tmp_path / "remote").items() if "expl" not in name}
        assert {n: d for n, d in shared.items() if "split" not in n} == tree(Path(store.path))


# Determinism


def test_any_order_of_shards_gives_the_same_bytes(tmp_path: Path, reference: dict[str, str]):
    path = tmp_path / "store"
    create_index(path, SPEC, documents(), counts={"documents": 24})
    order = ShardWriter(path).pending()
    random.Random(3).shuffle(order)
    half = len(order) // 2
    assert not fill(path, order[:half]).complete
    with pytest.raises(StoreError, match=f"half-written: .*got {half} of {len(order)} shards.*nla extract"):
        Store.open(path)
    fill(path, order[half:])
    assert tree(path) == reference


def run(path: Path, process: int = 0, count: int = 1, pause: float = 0.0) -> subprocess.Popen:
    arguments = [sys.executable, str(PROGRAM), str(path), str(process), str(count), str(pause)]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)


def test_three_processes_give_the_same_bytes(tmp_path: Path, reference: dict[str, str]):
    path = tmp_path / "store"
    running = [run(path, process, 3) for process in range(3)]
    assert [p.communicate()[1] or p.returncode for p in running] == [0, 0, 0]
    assert tree(path) == reference


def killed_until_done(path: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    interrupted = 0
    for _ in range(kills):
        process = run(path, pause=0.06)  # a second or more for all of it
        time.sleep(rng.uniform(0.2, 0.8))  # from before the first file to the midst of the shards
        process.send_signal(signal.SIGKILL)
        process.communicate()
        interrupted += process.returncode == -signal.SIGKILL
    assert interrupted >= 2, "the program was done before it was killed"
    finished = run(path)
    assert finished.communicate()[1] == "" and finished.returncode == 0


def test_kills_leave_the_same_bytes(tmp_path: Path, reference: dict[str, str]):
    path = tmp_path / "store"
    killed_until_done(path, kills=5, seed=1)
    assert tree(path) == reference
    assert [p.name for p in tmp_path.iterdir()] == ["store"], "what killed runs left was not cleaned up"


@pytest.mark.slow
def test_twenty_kills_leave_the_same_bytes(tmp_path: Path, reference: dict[str, str]):
    for attempt in range(4):
        path = tmp_path / f"store{attempt}"
        killed_until_done(path, kills=5, seed=10 + attempt)
        assert tree(path) == reference


def test_a_kill_between_shard_and_record(tmp_path: Path, reference: dict[str, str]):
    path = tmp_path / "store"
    create_index(path, SPEC, documents(), counts={"documents": 24})
    writer = ShardWriter(path)
    # What a kill leaves: shard 2 written but not recorded, shard 3 recorded by a write that was cut short.
    array = writer.root.open("vectors", write=True)
    array[32:48].write(np.full((16, D), 9, np.float32)).result()
    (path / "done").mkdir()
    (path / "done" / "00000003.json").write_text('{"shard": 3, "rows": [48, 64], "sha')
    assert {2, 3} <= set(writer.pending())
    fill(path)
    assert tree(path) == reference


def test_writing_a_recorded_shard_again(store: Store):
    writer = ShardWriter(store.path)
    before = tree(Path(store.path))
    writer.write_shard(1, vectors(1, writer.rows(1)))
    assert tree(Path(store.path)) == before
    with pytest.raises(StoreError, match="shard 1 is recorded with other vectors"):
        writer.write_shard(1, vectors(2, writer.rows(1)))


# Refusals


def test_half_written_store_is_readable_where_it_is_done(tmp_path: Path):
    create_index(tmp_path / "s", SPEC, documents())
    fill(tmp_path / "s", [1])
    half = Store.open(tmp_path / "s", complete=False)
    np.testing.assert_array_equal(half.vectors(slice(16, 32)), vectors(1, (16, 32)))
    assert half.check() == [] and half.head(2)[0]["norm"] is None
    with pytest.raises(StoreError, match="shard 0 is not extracted yet"):
        half.vectors(np.array([20, 3]))
    fill(tmp_path / "s", [0])
    assert half.vectors(np.array([20, 3])).shape == (2, D)  # written since


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {**SPEC.model, "weights": "w1"}}, 'expected model.weights = "w0", got model.weights = "w1"'),
        ({"layers": (1, 2)}, r"expected layers = \[1,3\], got layers = \[1,2\]"),
        ({"settings": {**SPEC.settings, "seed": 1}}, "expected settings.seed = 0, got settings.seed = 1"),
        ({"settings": {**SPEC.settings, "max_tokens": 9}}, "settings.max_tokens = null, got settings.max_tokens = 9"),
        ({"tokenizer": {"fingerprint": "f1"}}, "tokenizer.fingerprint"),
        ({"corpus": {"name": "words"}}, 'expected corpus.name = "letters"'),
        ({"dtype": "bfloat16"}, 'expected dtype = "float32", got dtype = "bfloat16"'),
    ],
)
def test_resuming_another_extraction_names_the_difference(tmp_path: Path, change: dict, message: str):
    create_index(tmp_path / "s", SPEC, documents(n=3))
    ShardWriter(tmp_path / "s", SPEC)
    with pytest.raises(StoreError, match=message):
        ShardWriter(tmp_path / "s", dataclasses.replace(SPEC, **change))


def test_vectors_that_are_not_finite_are_refused_by_name(tmp_path: Path):
    create_index(tmp_path / "s", SPEC, documents())
    writer = ShardWriter(tmp_path / "s")
    bad = vectors(1, (16, 32))
    bad[5, 3] = np.inf
    document, position, layer = expected_rows()[21]
    with pytest.raises(StoreError) as caught:
        writer.write_shard(1, bad)
    assert f"row 21 (document '{document.doc_id}', position {position}, layer {layer}) is not finite" in str(
        caught.value
    )
    assert 1 in writer.pending()
    with pytest.raises(StoreError, match=r"expected vectors of shape \(16, 16\), got \(16, 15\)"):
        writer.write_shard(1, bad[:, :15])


def test_create_index_refuses(tmp_path: Path, store: Store):
    with pytest.raises(StoreError, match="holds a store already"):
        create_index(store.path, SPEC, documents())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="other files in it"):
        create_index(tmp_path / "other", SPEC, documents())
    with pytest.raises(StoreError, match="nothing to extract"):
        create_index(tmp_path / "none", SPEC, [])
    twice = [*documents(n=4), *documents(n=1, first=2)]
    with pytest.raises(StoreError, match="came twice: got 'doc/ü2' as documents 2 and 4"):
        create_index(tmp_path / "twice", SPEC, twice)
    first = next(documents())
    with pytest.raises(StoreError, match="ascending positions"):
        create_index(tmp_path / "bad", SPEC, [dataclasses.replace(first, positions=np.array([1, 1]))])
    with pytest.raises(StoreError, match="shard_rows.*multiple of chunk_rows"):
        dataclasses.replace(SPEC, chunk_rows=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "store"]


def test_documents_without_positions_are_counted(tmp_path: Path):
    empty = [dataclasses.replace(d, positions=np.array([], int)) for d in documents(n=3, first=50)]
    counts = {"documents": 0}

    def read():
        for document in [*documents(n=2), *empty]:
            counts["documents"] += 1
            yield document

    manifest = create_index(tmp_path / "s", SPEC, read(), counts=counts)
    assert manifest["n_docs"] == 2 and manifest["corpus"]["counts"] == {"documents": 5, "too_short": 3}


def test_open_refuses(tmp_path: Path, store: Store):
    for path, message in [
        (tmp_path / "nothing", "no such directory"),
        (tmp_path, "is not an activation store"),
        (Path(__file__), "a file"),
    ]:
        with pytest.raises(StoreError, match=message):
            Store.open(path)
    with pytest.raises(StoreError):
        Store.open("nosuchscheme://x/y")
    path = Path(store.path) / "manifest.json"
    good = json.loads(path.read_text())
    for change, message in [
        ({"format": "zarr"}, "format"),
        ({"version": 2}, "version: expected 1, got 2"),
        ({"n_rows": good["n_rows"] + 1}, "was changed or is damaged"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(StoreError, match=message):
            Store.open(store.path)
    path.write_text("{")
    with pytest.raises(StoreError, match="not readable as JSON"):
        Store.open(store.path)


def test_rows_that_do_not_exist(store: Store):
    for rows in (np.array([0, store.n_rows]), np.array([-1]), np.array([0.5]), np.array([[1]])):
        with pytest.raises(StoreError):
            store.vectors(rows)
        with pytest.raises(StoreError):
            store.table(rows)
    with pytest.raises(StoreError, match="document: expected 0 to 23, got 24"):
        store.texts(np.array([24]))
    with pytest.raises(StoreError, match="no explanations.*nla teach"):
        store.explanations(slice(0, 1))
    with pytest.raises(StoreError, match="not split.*nla data split"):
        store.rows_of("rl")
    with pytest.raises(StoreError, match="av_sft or ar_sft or rl"):
        store.rows_of("test")


# Damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def corrupt_split(path: Path) -> None:
    """Moves a document to another split, with all hashes and counts set right."""
    root = Root(path)
    meta = root.read_json("splits.json")
    codes = root.open("docs/split").read().result()
    codes[0] = (codes[0] + 1) % 3
    root.open("docs/split", write=True)[:].write(codes).result()
    meta["arrays"]["docs/split"]["sha256"] = hashlib.sha256(codes.tobytes()).hexdigest()
    docs = root.open("rows/doc").read().result()
    for i, name in enumerate(SPLITS):
        meta[name] |= {"docs": int((codes == i).sum()), "rows": int((codes[docs] == i).sum())}
    root.write_json("splits.json", meta)


def change_explanation_count(path: Path) -> None:
    meta = json.loads((path / "explanations.json").read_text())
    meta["counts"]["ok"] += 1
    (path / "explanations.json").write_text(json.dumps(meta))


def rewrite(name: str, row: int, value: int):
    """A writer's mistake: a wrong number whose hashes all agree."""

    def change(path: Path) -> None:
        root = Root(path)
        array = root.open(name, write=True)
        array[row].write(np.array(value, array.dtype.numpy_dtype)).result()
        manifest = root.read_json("manifest.json")
        manifest["arrays"][name]["sha256"] = hashlib.sha256(array.read().result().tobytes()).hexdigest()
        del manifest["hash"]
        root.write_json("manifest.json", {**manifest, "hash": manifest_hash(manifest)})

    return change


FAULTS = {
    "a flipped byte of a vector": (lambda p: flip(p / "vectors/c/2/0", 100), r"shard 2 \(rows 32 to 48\)"),
    "a flipped byte of a shard's index": (lambda p: flip(p / "vectors/c/2/0", -8), "shard 2"),
    "a shard cut short": (lambda p: os.truncate(p / "vectors/c/2/0", 500), "shard 2"),
    "a shard that is gone": (lambda p: (p / "vectors/c/2/0").unlink(), "shard 2 .* is missing"),
    "two shards exchanged": (lambda p: shutil.copy(p / "vectors/c/1/0", p / "vectors/c/2/0"), "shard 2 .*sha256"),
    "a record that is gone": (lambda p: (p / "done/00000001.json").unlink(), "record of shard 1 is missing"),
    "a damaged record": (lambda p: (p / "done/00000001.json").write_text("{}"), "record of shard 1 is damaged"),
    "a record too many": (lambda p: shutil.copy(p / "done/00000001.json", p / "done/00000099.json"), "99"),
    "a flipped byte of the texts": (lambda p: flip(p / "docs/text_bytes/c/0", 40), "docs/text_bytes"),
    "a flipped byte of the table": (lambda p: flip(p / "rows/position/c/0", 8), "rows/position"),
    "an array that is gone": (lambda p: shutil.rmtree(p / "rows/role"), "rows/role"),
    "a changed manifest": (lambda p: flip(p / "manifest.json", 300), "manifest.json"),
    "a flipped byte of the explanations": (lambda p: flip(p / "explanations/bytes/c/0", 20), "explanations/bytes"),
    "wrong counts of explanations": (change_explanation_count, "explanations.json says"),
    "a flipped byte of the splits": (lambda p: flip(p / "docs/split/c/0", 3), "docs/split"),
    "a document in another split": (corrupt_split, "not what seed 0 and the fractions give"),
    "a position outside": (rewrite("rows/position", 7, 5000), "row 7: position outside its document"),
    "a text end outside": (rewrite("rows/text_end", 7, 5000), "row 7: text_end outside its document"),
    "another token": (rewrite("rows/token_id", 7, 5000), "row 7: another token_id"),
    "another layer": (rewrite("rows/layer", 7, 2), "row 7: a layer that is not in the manifest"),
    "no such role": (rewrite("rows/role", 7, 6), "row 7: a role that does not exist"),
    "rows out of order": (rewrite("rows/doc", 0, 20), "rows/doc: not ascending"),
    "offsets that go back": (rewrite("docs/text_offsets", 3, 0), "docs/text_offsets: not ascending"),
    "wrong lengths": (rewrite("docs/n_tokens", 3, 0), "docs/n_tokens"),
}


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "store"
    n = build(path).n_rows
    write_splits(path)
    write_explanations(path, [f"about ünicode {i}" if i % 3 else None for i in range(n)], {"provider": "test"})
    assert Store.open(path).check() == []
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault: str, whole_store: Path, tmp_path: Path):
    plant, message = FAULTS[fault]
    path = tmp_path / "store"
    shutil.copytree(whole_store, path)
    store = Store.open(path)
    assert store.check() == []  # which leaves what it read in caches
    plant(path)
    with contextlib.suppress(StoreError):  # a damaged manifest
        store = Store.open(path)
    problems = store.check()
    assert any(re.search(message, p) for p in problems), problems
    assert all("\n" not in p for p in problems)


def test_text_end_inside_a_character_is_found(tmp_path: Path):
    text = "a日b"
    document = IndexedDocument(
        "d", text, np.arange(3, dtype=np.int32), np.zeros(3, np.int8), np.array([1, 3, 5], np.int32), np.arange(3)
    )
    create_index(tmp_path / "s", SPEC, [document])
    fill(tmp_path / "s")
    store = Store.open(tmp_path / "s")
    assert store.check() == ["row 2: text_end inside a character"]
    with pytest.raises(StoreError, match="UTF-8"):
        store.prefixes(slice(None))


def test_damage_is_an_error_where_it_is_read(whole_store: Path, tmp_path: Path):
    path = tmp_path / "store"
    shutil.copytree(whole_store, path)
    flip(path / "vectors/c/2/0", 100)
    (path / "vectors/c/1/0").unlink()
    store = Store.open(path)
    store.vectors(slice(0, 16))
    with pytest.raises(StoreError, match="nla data check"):
        store.vectors(slice(32, 48))
    with pytest.raises(StoreError, match="row 20 has no vector: got shard 1 is gone"):
        store.vectors(np.array([3, 20]))


# Full disks


def limited(code: str, *arguments: str, size: int) -> subprocess.CompletedProcess:
    """Runs code that cannot write a file larger than `size` bytes."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    command = [sys.executable, "-c", limit + code, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_no_room_for_shards(tmp_path: Path):
    path = tmp_path / "store"
    spec = dataclasses.replace(SPEC, d_model=2048)
    create_index(path, spec, documents(), counts={"documents": 24})
    fill(path, [0])
    code = "import sys, store_cases; store_cases.fill(sys.argv[1])"
    full = limited(code, str(path), size=60_000)  # a shard has 128 KiB
    message = full.stderr.splitlines()[-1]
    assert "StoreError" in message and "File too large" in message and "free space" in message
    assert ShardWriter(path).pending()[0] == 1
    fill(path)
    assert Store.open(path).check() == []
    build(tmp_path / "undisturbed", spec)
    assert tree(path) == tree(tmp_path / "undisturbed")


def test_no_room_for_the_index(tmp_path: Path):
    code = "import sys, store_cases; store_cases.build(sys.argv[1])"
    full = limited(code, str(tmp_path / "store"), size=3_000)
    assert "StoreError" in full.stderr and "File too large" in full.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs to mount a small file system")
def test_full_file_system(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    try:
        spec = dataclasses.replace(SPEC, d_model=2048)
        create_index(disk / "store", spec, documents(), counts={"documents": 24})
        with pytest.raises(StoreError, match="No space left.*free space"):
            fill(disk / "store")
        left = ShardWriter(disk / "store").pending()
        assert 0 < len(left) < ShardWriter(disk / "store").n_shards
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        fill(disk / "store", spec=spec)
        assert Store.open(disk / "store").check() == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# Explanations


def test_explanations_come_back(store: Store):
    texts = [None if i % 3 == 0 else f"* ünicode 日本 🙂 {i}\n\n* {i}" for i in range(store.n_rows)]
    dropped = np.arange(store.n_rows) % 6 == 0
    meta = write_explanations(store.path, iter(texts), {"provider": "lexical"}, dropped=dropped)
    store = Store.open(store.path)
    rows = np.random.default_rng(0).integers(0, store.n_rows, 40)
    assert store.has_explanations and store.explanations(rows) == [texts[i] for i in rows]
    assert store.explanations(slice(None)) == texts
    assert sum(meta["counts"].values()) == store.n_rows
    assert meta["counts"]["dropped"] == dropped.sum()
    before = tree(Path(store.path))
    for wrong in (texts[:-1], [*texts, "more"]):
        with pytest.raises(StoreError, match="one per row"):
            write_explanations(store.path, wrong, {})
    assert tree(Path(store.path)) == before, "a refused write changed the store"
    assert store.check() == []


# Splits


def test_splits_are_disjoint_and_do_not_depend_on_order(tmp_path: Path):
    spec = dataclasses.replace(SPEC, shard_rows=256)
    store = build(tmp_path / "a", spec, n=400)
    written = write_splits(store.path, seed=5)
    store = Store.open(store.path)
    rows = {name: store.rows_of(name) for name in SPLITS}
    np.testing.assert_array_equal(np.sort(np.concatenate([*rows.values()])), np.arange(store.n_rows))
    docs = {name: set(store.table(r)["doc"].tolist()) for name, r in rows.items()}
    assert not docs["av_sft"] & docs["ar_sft"] and not docs["rl"] & (docs["av_sft"] | docs["ar_sft"])
    assert [written[name]["docs"] for name in SPLITS] == [len(docs[name]) for name in SPLITS]
    # Binomial: 400 documents at 0.25 and 0.5 have deviations of 8.7 and 10.
    assert abs(len(docs["av_sft"]) - 100) < 35 and abs(len(docs["rl"]) - 200) < 40

    backwards = list(documents(n=300, first=50))[::-1]
    create_index(tmp_path / "b", spec, backwards)
    fill(tmp_path / "b")
    write_splits(tmp_path / "b", seed=5)
    other = Store.open(tmp_path / "b")
    split_of = dict(zip(store.doc_ids(slice(None)), store.doc_splits, strict=True))
    assert [split_of[i] for i in other.doc_ids(slice(None))] == other.doc_splits.tolist()
    write_splits(tmp_path / "b", seed=6)
    assert (Store.open(tmp_path / "b").doc_splits != other.doc_splits).any()


def test_equal_texts_are_never_on_both_sides(tmp_path: Path):
    same = next(documents(n=1))
    copies = [dataclasses.replace(same, doc_id=f"copy{i}") for i in range(20)]
    create_index(tmp_path / "s", SPEC, [*documents(n=20, first=30), *copies])
    fill(tmp_path / "s")
    written = write_splits(tmp_path / "s")
    codes = Store.open(tmp_path / "s").doc_splits
    assert written["equal_texts"] == 19 and len(set(codes[20:])) == 1
    codes = codes.copy()
    codes[25] = (codes[25] + 1) % 3
    with pytest.raises(StoreError, match="1 text in two splits"):
        write_splits(tmp_path / "s", assignment=codes)


def test_split_refuses(store: Store):
    for fractions, message in [
        ({"av_sft": 0.5, "test": 0.5}, "'test'"),
        ({"av_sft": 0.9, "rl": 0.2}, "sum of at most 1"),
        ({"av_sft": -0.1, "rl": 0.2}, "at least 0"),
        ({"av_sft": 1e-9, "rl": 0.5}, "split av_sft would be empty"),
    ]:
        with pytest.raises(StoreError, match=message):
            write_splits(store.path, fractions)
    assert Store.open(store.path).splits is None
    write_splits(store.path, {"rl": 0.5})
    partly = Store.open(store.path)
    assert set(partly.doc_splits.tolist()) == {-1, 2} and partly.rows_of("av_sft").size == 0
    assert partly.check() == []


# Merging and dividing


def contents(store: Store) -> dict:
    rows = slice(None)
    out = {k: v for k, v in store.table(rows).items() if k != "doc"}
    docs = store.table(rows)["doc"]
    return {**out, "vectors": store.vectors(rows), "ids": store.doc_ids(docs), "texts": store.texts(docs)}


def assert_same(a: dict, b: dict) -> None:
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_merge_is_concatenation(tmp_path: Path):
    a, b = build(tmp_path / "a", n=7), build(tmp_path / "b", n=9, first=40)
    c = build(tmp_path / "c", dataclasses.replace(SPEC, shard_rows=48), n=3, first=90)
    write_explanations(b.path, [f"row {i}" if i % 2 else None for i in range(b.n_rows)], {"provider": "x"})
    seen = []
    merge([a.path, b.path, c.path], tmp_path / "all", lambda done, total: seen.append((done, total)))
    merged = Store.open(tmp_path / "all")
    parts = [contents(s) for s in (a, b, c)]
    assert_same(contents(merged), {k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
    assert merged.check() == [] and merged.n_docs == 19
    assert merged.explanations(slice(None)) == [
        *([None] * a.n_rows),
        *Store.open(b.path).explanations(slice(None)),
        *([None] * c.n_rows),
    ]
    assert seen[-1] == (merged.n_rows, merged.n_rows)
    # As if it had been extracted at once, apart from where it says it comes from.
    at_once = [*documents(n=7), *documents(n=9, first=40), *documents(n=3, first=90)]
    create_index(tmp_path / "once", SPEC, at_once)
    wanted = tree(tmp_path / "once")
    wanted = {k: v for k, v in wanted.items() if k.startswith(("rows/", "docs/"))}
    assert {k: v for k, v in tree(tmp_path / "all").items() if k.startswith(("rows/", "docs/"))} == wanted


def test_merge_refuses(tmp_path: Path, store: Store):
    for name, change in {
        "model": {"model": {**SPEC.model, "weights": "w1"}},
        "layers": {"layers": (1, 2)},
        "d_model": {"d_model": 8},
        "tokenizer": {"tokenizer": {"fingerprint": "other"}},
    }.items():
        other = build(tmp_path / name, dataclasses.replace(SPEC, **change), n=2, prefix="other")
        with pytest.raises(StoreError, match=f"does not fit .*expected {name} = "):
            merge([store.path, other.path], tmp_path / "out")
    with pytest.raises(StoreError, match="came twice"):
        merge([store.path, store.path], tmp_path / "out")
    create_index(tmp_path / "half", SPEC, documents(n=3))
    with pytest.raises(StoreError, match="half-written"):
        merge([store.path, tmp_path / "half"], tmp_path / "out")
    with pytest.raises(StoreError, match="holds a store already"):
        merge([store.path, build(tmp_path / "b", prefix="b", first=60).path], store.path)
    assert not (tmp_path / "out").exists()


def test_splits_survive_a_merge(tmp_path: Path):
    a, b = build(tmp_path / "a", n=60), build(tmp_path / "b", n=60, first=200)
    for s in (a, b):
        write_splits(s.path, seed=4)
    merge([a.path, b.path], tmp_path / "all")
    merged = Store.open(tmp_path / "all")
    codes = np.concatenate([Store.open(s.path).doc_splits for s in (a, b)])
    np.testing.assert_array_equal(merged.doc_splits, codes)
    assert merged.check() == []


def test_split_store_divides_rows_and_documents(tmp_path: Path):
    store = build(tmp_path / "a", n=60)
    write_splits(store.path)
    write_explanations(store.path, [f"row {i}" for i in range(store.n_rows)], {"provider": "x"})
    store = Store.open(store.path)
    places = split_store(store.path, tmp_path / "parts")
    everything = contents(store)
    ids = []
    for name in SPLITS:
        part = Store.open(places[name])
        rows = store.rows_of(name)
        assert_same(contents(part), {k: np.asarray(v)[rows] for k, v in everything.items()})
        assert part.explanations(slice(None)) == [f"row {i}" for i in rows]
        assert part.check() == [] and part.manifest["settings"]["split"] == name
        ids += part.doc_ids(slice(None))
    assert sorted(ids) == sorted(store.doc_ids(slice(None)))


# Threads, processes, memory


def test_many_threads_read_the_same(store: Store):
    whole, prefixes = store.vectors(slice(None)), store.prefixes(slice(None))
    fresh = Store.open(store.path)  # so that the threads race to open its arrays, too

    def read(seed: int) -> bool:
        rows = np.random.default_rng(seed).integers(0, store.n_rows, 30)
        return bool((fresh.vectors(rows) == whole[rows]).all()) and fresh.prefixes(rows) == [prefixes[i] for i in rows]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(64)))


def _sum_of(store: Store, rows: slice) -> float:
    return float(store.vectors(rows).sum())


def test_other_processes_read_the_same(store: Store):
    assert repr(pickle.loads(pickle.dumps(store))) == repr(store)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(_sum_of, [store, store], [slice(0, 40), slice(40, 80)]))
    assert found == [_sum_of(store, slice(0, 40)), _sum_of(store, slice(40, 80))]


MEMORY = """
import resource, sys
import numpy as np
from pathlib import Path
from nla_jax.manifest import StoreSpec
from nla_jax.store import Store
from nla_jax.store_merge import merge, split_store
from nla_jax.store_splits import write_splits
from nla_jax.store_write import IndexedDocument, ShardWriter, create_index
place, n = Path(sys.argv[1]), int(sys.argv[2])
spec = StoreSpec(256, (1,), {"name": "m"}, {"fingerprint": "f"}, shard_rows=1024)
text, ends = "word " * 400, np.arange(1, 401, dtype=np.int32) * 5
def documents(first):
    for i in range(first, first + n // 20):
        head = f"{i:08d}"
        yield IndexedDocument(head, head + text[8:], np.arange(400, dtype=np.int32), np.zeros(400, np.int8), ends,
                              np.arange(10) * 40)
for name, first in (("a", 0), ("b", n)):
    create_index(place / name, spec, documents(first))
    writer = ShardWriter(place / name)
    for shard in writer.pending():
        a, b = writer.rows(shard)
        writer.write_shard(shard, np.full((b - a, 256), shard + 1, np.float32))
    writer.finish()
merge([place / "a", place / "b"], place / "c")
write_splits(place / "c")
split_store(place / "c", place / "d")
assert Store.open(place / "c").check() == []
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def peak(place: Path, n: int) -> int:
    # One heap for all threads: with one each, what they free and do not give back blurs what is measured.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", MEMORY, str(place), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path):
    """Writing, merging, dividing and checking 4 times the rows (140 MiB more of vectors, and as much again twice)."""
    small = peak(tmp_path / "small", 48_000)
    large = peak(tmp_path / "large", 192_000)
    assert large - small < 30, f"{small} MiB at 48,000 rows, {large} MiB at 192,000"


def test_every_error_is_one_line(store: Store, tmp_path: Path):
    calls = [
        lambda: Store.open(tmp_path / "a\nb"),
        lambda: store.vectors(np.array([10**6])),
        lambda: Ragged(store.root, "docs/nothing", "docs/nothing"),
        lambda: Root("gs://").read("x"),
        lambda: StoreSpec(0, (1,), {}, {}),
        lambda: GrowingText(store.root, "docs/text_bytes", "docs/text_offsets", SHORT_TEXT),
    ]
    for call in calls:
        with pytest.raises(NLAError) as caught:
            call()
        assert "\n" not in str(caught.value)
