"""The loader: which rows come when, in what shapes, with what masks; and that it goes on where it stopped."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from loading import BUCKETS, MARKER, digest, explanations, sidecar, store, tokenizer
from tiny_tokenizers import AR, AV, LLAMA_CONFIG, MISTRAL, QWEN, llama_like, needs_data, write

from nla_jax.epochs import Plan, bucket_groups
from nla_jax.errors import InputError, PromptError, StoreError
from nla_jax.examples import ar_example, av_example, av_response_ids, make_examples
from nla_jax.loader import make_loader
from nla_jax.prompt import build_av_prompt, wrap_explanation
from nla_jax.sidecar import parse_sidecar, read_sidecar
from nla_jax.store_splits import write_splits
from nla_jax.store_write import write_explanations
from nla_jax.tokenizer import Tokenizer

KINDS = ("av_sft", "ar_sft", "rl")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of some 140 rows, a tokenizer and a sidecar."""
    root = tmp_path_factory.mktemp("loader")
    tok = tokenizer(root / "tokenizer")
    return root, store(root / "store"), tok, sidecar(tok)


@pytest.fixture
def loader(world):
    """make_loader over all rows of the store, with what a test names changed."""
    _, data, tok, side = world

    def make(kind="av_sft", **changes):
        settings = {"batch_size": 8, "buckets": BUCKETS, "epochs": 1, "seed": 3, "tokenizer": tok, "sidecar": side}
        rows = changes.pop("rows", np.arange(data.n_rows))
        return make_loader(data, rows, kind=kind, **{**settings, **changes})

    return make


def usable(data, kind):
    """Rows that have an example of this kind."""
    if kind == "rl":
        return list(range(data.n_rows))
    without = {5} | ({4} if kind == "av_sft" else set())
    return [i for i, text in enumerate(explanations(data.n_rows)) if text is not None and i not in without]


def seen(batches):
    return [int(r) for b in batches for r in b["row"][b["valid"]].ravel()]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_once_per_epoch(world, loader, kind, pack):
    if kind == "rl" and pack:
        with pytest.raises(InputError, match="pack: expected av_sft or ar_sft"):
            loader(kind, pack=True)
        return
    data = world[1]
    made = loader(kind, pack=pack, epochs=3)
    assert made.report["used"] == len(usable(data, kind)) and made.report["rows"] == data.n_rows
    batches = list(made)
    n = made.batches_per_epoch
    assert len(batches) == 3 * n and made.epoch == 3
    epochs = [batches[i * n : (i + 1) * n] for i in range(3)]
    for epoch in epochs:
        assert sorted(seen(epoch)) == usable(data, kind)
        partial = [b for b in epoch if not b["valid"].reshape(8, -1).any(axis=1).all()]
        assert len(partial) == 1 or (pack and not partial)  # whatever the number of buckets
    assert seen(epochs[0]) != seen(epochs[1]) != seen(epochs[2])
    assert seen(loader(kind, pack=pack, seed=4)) != seen(epochs[0])


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_processes_share_the_batches_of_one(loader, kind, pack):
    """Four processes read, step by step and row by row, what one process reads alone."""
    for whole, *parts in zip(
        loader(kind, pack=pack), *(loader(kind, pack=pack, process=p, processes=4) for p in range(4)), strict=True
    ):
        for name, array in whole.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]), strict=True)


def test_rl_batches(world, loader):
    data = world[1]
    for batch in loader("rl", tokenizer=None, sidecar=None):
        assert set(batch) == {"vectors", "row", "doc", "valid"}
        rows = batch["row"][batch["valid"]]
        np.testing.assert_array_equal(batch["vectors"][batch["valid"]], data.vectors(rows), strict=True)
        np.testing.assert_array_equal(batch["doc"][batch["valid"]], data.table(rows)["doc"], strict=True)
        assert (batch["row"][~batch["valid"]] == -1).all() and (batch["doc"][~batch["valid"]] == -1).all()
        assert (np.linalg.norm(batch["vectors"], axis=1) > 0).all()  # what fills up has a direction


@pytest.mark.parametrize(("prefetch", "threads"), [(0, 0), (1, 1), (7, 4)])
def test_order_does_not_depend_on_threads(loader, prefetch, threads):
    expected = [digest(b) for b in loader(epochs=2)]
    assert [digest(b) for b in loader(epochs=2, prefetch=prefetch, threads=threads)] == expected


def test_the_order_of_rows_does_not_matter(world, loader):
    rows = np.random.default_rng(0).permutation(world[1].n_rows)
    assert [digest(b) for b in loader(rows=rows)] == [digest(b) for b in loader()]


def test_shapes_are_few_and_fixed(loader):
    made = loader(epochs=2)
    shapes = {b["tokens"].shape for b in made}
    assert shapes <= {(8, size) for size in BUCKETS} and len(shapes) > 1
    assert {s for _, s in shapes} == set(made.report["batches_by_length"])
    assert sum(made.report["batches_by_length"].values()) == made.batches_per_epoch
    real = sum(int(b["lengths"][b["valid"]].sum()) for b in loader())
    room = sum(b["tokens"].size for b in loader())
    assert made.report["padding"] == pytest.approx(1 - real / room)
    assert made.report["padding"] < 1 - real / (8 * BUCKETS[-1] * made.batches_per_epoch)  # buckets are worth it
    assert len({tuple(b[k].shape for k in sorted(b)) for b in loader(pack=True, epochs=2)}) == 1


def test_dropped_rows_are_counted(loader):
    made = loader()
    none = sum(text is None for text in explanations(made.report["rows"]))
    assert made.report["dropped"] == {"no_explanation": none, "holds_marker": 1, "too_long": 1}
    with pytest.raises(InputError, match="no av_sft examples: expected at least one, got 1 holds_marker"):
        loader(rows=np.array([4]))


def test_drop_remainder(world, loader):
    made = loader(drop_remainder=True, epochs=4)
    n, good = made.batches_per_epoch, usable(world[1], "av_sft")
    batches = list(made)
    assert n == len(good) // 8 and all(b["valid"].all() for b in batches)
    epochs = [set(seen(batches[i * n : (i + 1) * n])) for i in range(4)]
    assert all(len(e) == 8 * n and e <= set(good) for e in epochs)
    assert len({frozenset(e) for e in epochs}) > 1  # not the same rows are missing every time
    with pytest.raises(InputError, match="drop_remainder"):
        loader(drop_remainder=True, rows=np.arange(3))


def test_av_examples_are_what_the_template_renders(world, loader):
    """Prompt and answer, put together again, are the rendered chat encoded in one go; the mask is the answer."""
    _, data, tok, side = world
    texts = explanations(data.n_rows)
    made = loader()
    prompt = made.prompt
    question = {"role": "user", "content": f"<c>{MARKER}</c>"}
    for batch in made:
        for i in np.flatnonzero(batch["valid"]):
            text, n = texts[batch["row"][i]], batch["lengths"][i]
            ids = batch["tokens"][i, :n].tolist()
            assert ids[0] == side.marker_id and (batch["tokens"][i, n:] == (tok.pad_id or 0)).all()
            if "<|" not in text:
                answer = {"role": "assistant", "content": f"<explanation>\n{text}\n</explanation>"}
                whole = tok.encode(tok.render_chat([question, answer]), parse_special=True)
                rest = whole[prompt.marker + n :]
                assert [*prompt.ids[: prompt.marker], *ids] == whole[: prompt.marker + n]
                assert tok.decode(rest) == "\n"  # what the template writes after the end of the turn
            scored = batch["tokens"][i][batch["loss_mask"][i]]
            assert tok.decode(scored) == f"<explanation>\n{text}\n</explanation><|im_end|>"
            assert scored[-1] == tok.encode("<|im_end|>", parse_special=True)[0]
            assert [t in tok.special_ids for t in scored] == [False] * (len(scored) - 1) + [True]
        assert not batch["loss_mask"][~batch["valid"]].any()
        np.testing.assert_array_equal(
            batch["vectors"][batch["valid"]], data.vectors(batch["row"][batch["valid"]]), strict=True
        )


def test_ar_examples_are_prompts(world, loader):
    _, data, tok, _ = world
    texts = explanations(data.n_rows)
    for batch in loader("ar_sft"):
        for i in np.flatnonzero(batch["valid"]):
            text, n = texts[batch["row"][i]], batch["lengths"][i]
            if "<|" not in text:
                expected = tok.encode(f"<t>{text}</t> <s>", add_special=True)
                assert batch["tokens"][i, :n].tolist() == expected


def test_packed_rows_hold_whole_examples(loader):
    """Every sample is there with its vector, marker, mask and positions; rows are full but for little."""
    for kind in KINDS[:2]:
        alone = {}
        for b in loader(kind):
            alone.update({int(r): {k: v[i] for k, v in b.items()} for i, r in enumerate(b["row"]) if r >= 0})
        made = loader(kind, pack=True)
        first = 0 if made.prompt is None else made.prompt.marker
        for batch in made:
            for b, v in zip(*np.nonzero(batch["valid"]), strict=True):
                one = alone[int(batch["row"][b, v])]
                at = np.flatnonzero(batch["segments"][b] == v + 1)
                n = int(one["lengths"])
                assert (at == at[0] + np.arange(n)).all()
                np.testing.assert_array_equal(batch["tokens"][b, at], one["tokens"][:n])
                np.testing.assert_array_equal(batch["positions"][b, at], first + np.arange(n))
                np.testing.assert_array_equal(batch["vectors"][b, v], one["vectors"])
                assert batch["doc"][b, v] == one["doc"]
                if kind == "av_sft":
                    assert batch["markers"][b, v] == at[0]
                    np.testing.assert_array_equal(batch["loss_mask"][b, at], one["loss_mask"][:n])
                else:
                    assert batch["last"][b, v] == at[-1]
            if kind == "av_sft":
                assert (batch["markers"][~batch["valid"]] == -1).all()
                assert not batch["loss_mask"][batch["segments"] == 0].any()
        assert made.batches_per_epoch <= loader(kind).batches_per_epoch
        assert set(made.report["batches_by_length"]) == {BUCKETS[-1]}


def test_resumes_anywhere_bit_for_bit(loader):
    made = loader(epochs=2)
    total = 2 * made.batches_per_epoch
    states, batches = [made.state()], []
    for batch in made:
        batches.append(digest(batch))
        states.append(made.state())
    assert len(batches) == total and len(json.dumps(states[-1])) < 200
    other = loader(epochs=2)
    for start in (0, 3, made.batches_per_epoch, total - 1, 1, total):  # forwards and backwards, across the epoch
        other.restore(json.loads(json.dumps(states[start])))
        assert [digest(b) for b in other] == batches[start:]
        assert other.state() == states[-1]


def test_resumes_in_a_new_process(world, loader):
    """A state written as JSON, and everything else made again by another interpreter; endless, across an epoch."""
    made = loader(epochs=None, pack=True, batch_size=4)
    for _ in range(made.batches_per_epoch - 2):
        next(made)
    state = json.dumps(made.state())
    settings = {"kind": "av_sft", "rows": list(range(world[1].n_rows)), "batch_size": 4, "seed": 3, "pack": True}
    command = [sys.executable, "loading.py", str(world[0]), json.dumps({**settings, "buckets": BUCKETS}), state, "5"]
    out = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [digest(next(made)) for _ in range(5)]


def test_state_moves_between_numbers_of_processes(loader):
    made = loader()
    expected = [next(made) for _ in range(5)][3:]
    half = loader(process=1, processes=2)
    for _ in range(3):
        next(half)
    assert half.state() == {**made.state(), "next_batch": 3}
    quarter = loader(process=3, processes=4)
    quarter.restore(half.state())
    for batch in expected:
        np.testing.assert_array_equal(next(quarter)["row"], batch["row"][6:])


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"batch_size": 4}, {"buckets": (128,)}, {"pack": True}, {"rows": np.arange(90)}, {"kind": "ar_sft"}],
    ids=str,
)
def test_a_state_of_other_batches_is_refused(loader, change):
    state = loader().state()
    with pytest.raises(InputError, match="state of another loader"):
        loader(**change).restore(state)


def test_damaged_states_are_refused(loader):
    made = loader()
    state = made.state()
    for bad in ({}, {**state, "version": 2}, {**state, "next_batch": "3"}, {**state, "next_batch": 10**9}):
        with pytest.raises(InputError, match="state of a loader"):
            made.restore(bad)


def test_orbax_checkpoints_hold_the_state(loader, tmp_path):
    made = loader()
    next(made), next(made)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        items = {"data": grain.checkpoint.CheckpointSave(made), "step": ocp.args.JsonSave({"step": 2})}
        manager.save(2, args=ocp.args.Composite(**items))
        manager.wait_until_finished()
        other = loader()
        manager.restore(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
    assert [digest(b) for b in other] == [digest(b) for b in made]


def test_a_failed_read_is_raised_and_can_be_tried_again(loader, monkeypatch):
    made = loader(prefetch=3)
    expected = [digest(b) for b in loader()]
    assert digest(next(made)) == expected[0]
    data, read = made._batches.store, made._batches.store.vectors

    def broken(rows):
        raise StoreError("the disk is gone")

    monkeypatch.setattr(data, "vectors", broken)
    with pytest.raises(StoreError, match="the disk is gone"):
        list(made)
    at = made.state()["next_batch"]
    monkeypatch.setattr(data, "vectors", read)
    assert [digest(b) for b in made] == expected[at:]


def test_tokens_can_be_kept_for_later_runs(world, loader, tmp_path):
    """The second time nothing is tokenized; a damaged file is made again; other explanations are other tokens."""
    calls = []
    expected = [digest(b) for b in loader()]

    def run(**changes):
        calls.clear()
        return [digest(b) for b in loader(cache=tmp_path, progress=lambda *a: calls.append(a), **changes)]

    assert run() == expected and calls
    assert run() == expected and not calls
    (kept,) = tmp_path.glob("*.tokens")
    data = bytearray(kept.read_bytes())
    data[40] ^= 1
    kept.write_bytes(data)
    assert run() == expected and calls
    assert run(kind="ar_sft") != expected and calls
    assert len(list(tmp_path.iterdir())) == 4


def test_new_explanations_are_new_examples(tmp_path, world):
    _, _, tok, side = world
    data = store(tmp_path / "store", n_docs=5)
    rows = np.arange(data.n_rows)

    def examples():
        return make_examples(type(data).open(data.path), rows, "ar_sft", tokenizer=tok, sidecar=side, cache=tmp_path)

    before = examples()
    write_explanations(data.path, ["fox"] * data.n_rows, {"provider": "other"})
    after = examples()
    assert before.sha256 != after.sha256 and len(after.rows) == data.n_rows


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "sft"}, "kind of batches: expected av_sft or ar_sft or rl"),
        ({"batch_size": 6, "processes": 4}, "batch_size: expected a multiple of the 4 processes, got 6"),
        ({"process": 2, "processes": 2}, "process: expected 0 to 1, got 2"),
        ({"buckets": ()}, "buckets"),
        ({"epochs": 0}, "epochs"),
        ({"tokenizer": None}, "expected a tokenizer and a sidecar"),
        ({"rows": np.arange(0)}, "no av_sft examples"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(loader, change, match):
    with pytest.raises(InputError, match=match):
        loader(**change)


def test_templates_that_do_not_continue_the_prompt_are_refused(tmp_path):
    for name, old, new, match in (
        ("begin", "'<|im_start|>' + m.role + '\n'", "'<|im_start|>' + m.role + ': '", "begins unlike the AV prompt"),
        ("end", "<|im_end|>\n'", "\n'", "ends an answer with no special token"),
    ):
        template = LLAMA_CONFIG["chat_template"].replace(old, new)
        assert template != LLAMA_CONFIG["chat_template"]
        t = llama_like()
        t.add_tokens([MARKER])
        tok = Tokenizer.from_dir(write(tmp_path / name, t, {**LLAMA_CONFIG, "chat_template": template}))
        side = sidecar(tok)
        with pytest.raises(PromptError, match=match):
            av_response_ids(tok, side, "fox", build_av_prompt(tok, side))


@needs_data
def test_qwen_and_mistral_examples():
    """The answer as the real templates render it, up to the token that ends sampling; the AR prompt's known suffix."""
    text = "First feature: a list of names.\n\nLast word 'the', then a noun <|im_end|>."
    qwen = Tokenizer.from_dir(QWEN)
    side = read_sidecar(AV)
    prompt = build_av_prompt(qwen, side)
    ids = av_response_ids(qwen, side, text, prompt)
    assert qwen.decode(ids) == wrap_explanation(text) + "<|im_end|>"
    assert ids[-1] == 151645 and 151645 not in ids[:-1] and len(prompt.ids) - prompt.marker == 14
    assert av_example(qwen, side, text, prompt)[:15] == [*prompt.ids[111:], ids[0]]
    assert ar_example(qwen, read_sidecar(AR), text)[-5:] == [1318, 29, 366, 1708, 29]
    mistral = Tokenizer.from_dir(MISTRAL)
    raw = {**side.raw, "tokens": {**side.raw["tokens"], "injection_char": "§"}}
    # Any character that is one token between the template's tags serves as a marker.
    lone = mistral.encode_chat([{"role": "user", "content": "a>§</a"}], add_generation_prompt=True)
    at = next(i for i, t in enumerate(lone) if mistral.token_str(t).strip() == "§")
    raw["tokens"].update(
        injection_token_id=lone[at],
        injection_left_neighbor_id=lone[at - 1],
        injection_right_neighbor_id=lone[at + 1],
    )
    side = parse_sidecar(raw)
    ids = av_response_ids(mistral, side, text, build_av_prompt(mistral, side))
    assert mistral.decode(ids).strip() == wrap_explanation(text) + "</s>" and ids[-1] == 2


def test_bucket_groups_leave_one_batch_short():
    rng = np.random.default_rng(0)
    for n, size, drop in itertools.product((1, 7, 64, 1001), (1, 8, 32), (False, True)):
        lengths = rng.integers(1, 129, n).astype(np.int32)
        groups = bucket_groups(lengths, BUCKETS, size, drop)
        assert sorted(np.concatenate([items for _, items in groups])) == list(range(n))
        assert all((lengths[items] <= width).all() for width, items in groups)
        assert all(len(items) % size == 0 for _, items in groups[:-1])
        assert [w for w, _ in groups] == sorted({w for w, _ in groups})
        assert len(Plan(groups, size, 0, drop).batches) == (n // size if drop else -(-n // size))
        assert not drop or len(groups[-1][1]) >= min(n, size)


def test_shuffling_is_thorough():
    """Over many seeds a row is equally likely to come in every batch (chi-squared, 63 degrees of freedom)."""
    counts = np.zeros(64)
    for seed in range(2000):
        plan = Plan(((0, np.arange(128)),), 2, seed)
        counts[next(i for i in range(64) if 5 in plan.batch(i)[1])] += 1
    expected = 2000 / 64
    assert ((counts - expected) ** 2 / expected).sum() < 120  # p = 1e-5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_stays_flat(tmp_path):
    """Reading 160 MB of vectors in a process of its own adds what the batches in flight and the caches need."""
    path = tmp_path / "store"
    store(path, n_docs=2000, d=4096, shard_rows=1024)
    program = (
        "import re; from nla_jax.store import Store; from nla_jax.loader import make_loader\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        f"data = Store.open({str(path)!r}); rows = range(data.n_rows)\n"
        "loader = make_loader(data, rows, kind='rl', batch_size=64, epochs=1)\n"
        "next(loader); before = peak(); n = sum(b['vectors'].nbytes for b in loader); print(n >> 20, peak() - before)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    read, grown = map(int, out.split())
    assert read > 120 and grown < 80, (read, grown)


def test_vectors_are_read_once_per_batch(world, loader, monkeypatch):
    data, calls = world[1], []
    read = type(data).vectors
    monkeypatch.setattr(type(data), "vectors", lambda self, rows: calls.append(rows) or read(self, rows))
    made = loader("rl")
    list(made)
    assert len(calls) == made.batches_per_epoch and {len(c) for c in calls} == {8}
    assert sum((np.diff(c) < 0).any() for c in calls) <= 1  # in ascending order, but for what fills up the last


def test_rows_of_a_split_by_default(world, tmp_path):
    _, _, tok, side = world
    data = store(tmp_path / "store")
    with pytest.raises(StoreError, match="is not split"):
        make_loader(data, kind="rl", batch_size=4)
    write_splits(data.path, seed=1)
    data = type(data).open(data.path)
    loaders = {
        kind: make_loader(data, kind=kind, batch_size=4, epochs=1, buckets=BUCKETS, tokenizer=tok, sidecar=side)
        for kind in KINDS
    }
    for kind, made in loaders.items():
        assert set(seen(made)) == set(data.rows_of(kind)) & set(usable(data, kind))
    other = store(tmp_path / "two", n_docs=3, layers=(1, 3))
    with pytest.raises(InputError, match="rows: expected those of one layer, got a store of layers 1, 3"):
        make_loader(other, kind="rl", batch_size=4)
    with pytest.raises(InputError, match="sidecar: d_model: expected 16"):
        make_loader(store(tmp_path / "narrow", n_docs=3, d=16), kind="rl", batch_size=4, sidecar=side)
