"""`nla build`: markers, suffixes, statistics and sets, against plain numpy and the released pair's own numbers."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from build_cases import D, documents, make_store, mini_tokenizer, teach
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from store_cases import tree
from tiny_tokenizers import AR as RELEASED_AR
from tiny_tokenizers import AV as RELEASED_AV
from tiny_tokenizers import GEMMA_CHAT, LLAMA_CONFIG, MISTRAL, QWEN, llama_like, needs_data, write

from nla_jax.build import AR_TEMPLATE, AV_TEMPLATE, Plan, build, open_build
from nla_jax.build_stats import round_scale, training_stats
from nla_jax.errors import InputError, NLAError, PromptError, StoreError, TokenizerError, VectorError
from nla_jax.marker import check_marker, choose_marker, suffix_ids, token_counts
from nla_jax.prompt import ar_prompt_ids, build_av_prompt
from nla_jax.sidecar import read_sidecar
from nla_jax.store import SPLITS, Store
from nla_jax.store_splits import write_splits
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools.build import parse_fractions
from nla_jax.tools.cli import main


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return mini_tokenizer(tmp_path_factory.mktemp("tokenizer"))


opened = functools.cache(Tokenizer.from_dir)


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer) -> Store:
    return make_store(tmp_path / "store", tokenizer)


# -- markers


@needs_data
def test_qwen_gets_the_released_marker_and_suffix() -> None:
    qwen, released = opened(QWEN), read_sidecar(RELEASED_AR)
    assert released.av_template and released.ar_template
    for template in (released.av_template, AV_TEMPLATE):
        marker = choose_marker(qwen, template, np.zeros(qwen.vocab_size, np.int64))
        assert (marker.char, marker.id, marker.left_id, marker.right_id) == ("㈎", 149705, 29, 522)
    assert suffix_ids(qwen, released.ar_template) == released.ar_suffix_ids == (1318, 29, 366, 1708, 29)
    # The one that Gemma's pairs have is a marker here too, and what is in the corpus is passed over.
    assert check_marker(qwen, AV_TEMPLATE, "㈜", np.zeros(qwen.vocab_size, np.int64)).left_id == 29
    counts = np.zeros(qwen.vocab_size, np.int64)
    counts[149705] = 1
    assert choose_marker(qwen, AV_TEMPLATE, counts).char == "㈏"


@needs_data
def test_mistral_has_no_enclosed_sign_and_gets_a_symbol() -> None:
    mistral = opened(MISTRAL)
    marker = choose_marker(mistral, AV_TEMPLATE, np.zeros(mistral.vocab_size, np.int64))
    assert 0x2600 <= ord(marker.char) <= 0x27BF
    assert mistral.decode([marker.id]).strip() == marker.char


@needs_data
@pytest.mark.parametrize("directory", [QWEN, MISTRAL], ids=lambda p: p.name)
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_suffix_ends_the_prompt_of_any_explanation(directory: Path, text: str) -> None:
    tokenizer = opened(directory)
    before, after = AR_TEMPLATE.split("{explanation}")
    suffix = suffix_ids(tokenizer, AR_TEMPLATE)
    ids = tokenizer.encode_parts([(before, True), (text, False), (after, True)], add_special=True)
    assert tuple(ids[-len(suffix) :]) == suffix
    assert len(suffix) >= 3  # more than the last tag


def test_the_rarest_marker_is_chosen_where_all_occur(tokenizer: Tokenizer) -> None:
    counts = np.full(tokenizer.vocab_size, 9, np.int64)
    counts[2047] = 5
    marker = choose_marker(tokenizer, AV_TEMPLATE, counts)
    assert (marker.char, marker.id, marker.count) == ("㈎", 2047, 5)


def test_a_small_vocabulary_falls_back_to_a_sign_that_the_corpus_lacks(tmp_path: Path) -> None:
    small = Tokenizer.from_dir(write(tmp_path / "t", llama_like(), LLAMA_CONFIG))
    counts = np.zeros(small.vocab_size, np.int64)
    first = choose_marker(small, AV_TEMPLATE, counts)
    assert len(first.char) == 1 and not first.char.isalnum() and first.char not in AV_TEMPLATE
    counts[first.id] = 1
    assert choose_marker(small, AV_TEMPLATE, counts).char != first.char


@pytest.mark.parametrize(
    ("char", "why"),
    [
        ("㈜", "is .* tokens"),
        ("ab", "not one printable"),
        ("", "not one printable"),
        (" ", "not one printable"),
        ("\u0301", "not one printable"),
        ("e", "does not fit the prompt"),  # it is in the template
    ],
)
def test_a_marker_that_cannot_be_one_is_refused(tokenizer: Tokenizer, char: str, why: str) -> None:
    with pytest.raises(TokenizerError, match=why) as error:
        check_marker(tokenizer, AV_TEMPLATE, char, np.zeros(tokenizer.vocab_size, np.int64))
    assert "\n" not in str(error.value)


def test_a_marker_that_merges_in_context_is_refused(tmp_path: Path) -> None:
    # One token alone; but "~>" is a merge, so inside the tags it is another token.
    import tokenizers
    from tokenizers import models, pre_tokenizers

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merged = letters | {"~<": len(letters)}
    raw = tokenizers.Tokenizer(models.BPE(merged, [("~", "<")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    config = {"chat_template": "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"}
    merging = Tokenizer.from_dir(write(tmp_path / "t", raw, config))
    assert merging.encode("~") == [letters["~"]]
    counts = np.zeros(merging.vocab_size, np.int64)
    with pytest.raises(TokenizerError, match="not exactly one token"):
        check_marker(merging, AV_TEMPLATE, "~", counts)
    assert check_marker(merging, AV_TEMPLATE, "^", counts).id == letters["^"]
    assert choose_marker(merging, AV_TEMPLATE, counts).char != "~"


def test_neighbours_that_change_with_the_words_around_are_refused(tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab = letters | {"x(": len(letters), ")": letters[")"]}
    raw = tokenizers.Tokenizer(models.BPE(vocab, [("x", "(")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    config = {"chat_template": "{% for m in messages %}{{ m.role }}x{{ m.content }}\n{% endfor %}"}
    loose = Tokenizer.from_dir(write(tmp_path / "t", raw, config))
    counts = np.zeros(loose.vocab_size, np.int64)
    with pytest.raises(TokenizerError, match="other tokens beside it"):
        check_marker(loose, "({injection_char}) says what?", "^", counts)
    assert check_marker(loose, "<({injection_char}) says what?", "^", counts).left_id == letters["("]


def test_no_chat_template_is_said_once(tmp_path: Path) -> None:
    base = Tokenizer.from_dir(write(tmp_path / "t", llama_like(), {"bos_token": "<|bos|>"}))
    with pytest.raises(PromptError, match="no chat template"):
        choose_marker(base, AV_TEMPLATE, np.zeros(base.vocab_size, np.int64))


def test_a_template_that_ends_with_the_explanation_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="the same last token"):
        suffix_ids(tokenizer, "Text: {explanation}")
    with pytest.raises(PromptError, match="once"):
        suffix_ids(tokenizer, "Text: <vector>")


def test_token_counts(store: Store, tokenizer: Tokenizer) -> None:
    expected = np.zeros(tokenizer.vocab_size, np.int64)
    for document in documents(tokenizer, 40):
        np.add.at(expected, document.ids, 1)
    np.testing.assert_array_equal(token_counts(store, tokenizer.vocab_size), expected)


# -- statistics


def test_statistics_equal_float64_numpy(store: Store) -> None:
    rows = np.sort(np.random.default_rng(0).choice(store.n_rows, 150, replace=False))
    found = training_stats(store, rows, 4.0)
    raw = store.vectors(rows).astype(np.float64)
    v = raw / np.linalg.norm(raw, axis=1, keepdims=True) * 4.0
    mu = v.mean(axis=0)
    np.testing.assert_allclose(found.mu, mu, rtol=0, atol=1e-13)
    assert found.variance_nrm == pytest.approx(np.mean((v - mu) ** 2), rel=1e-12)
    scaled = mu / np.linalg.norm(mu) * 4.0
    assert found.baseline_meannorm == pytest.approx(np.mean((v - scaled) ** 2), rel=1e-12)
    assert found.n == 150
    norms = np.linalg.norm(raw, axis=1)
    assert found.norms["mean"] == pytest.approx(norms.mean(), rel=1e-12)
    assert found.norms["0.95"] == pytest.approx(np.quantile(norms, 0.95), rel=1e-12)


def test_statistics_do_not_depend_on_how_much_is_read_at_a_time(store: Store, monkeypatch) -> None:
    rows = np.arange(store.n_rows)
    whole = training_stats(store, rows, 4.0)
    seen = []
    monkeypatch.setattr("nla_jax.build_stats._BLOCK", 7 * D)
    parts = training_stats(store, rows, 4.0, lambda done, total: seen.append((done, total)))
    np.testing.assert_allclose(parts.mu, whole.mu, rtol=0, atol=1e-14)
    assert parts.variance_nrm == pytest.approx(whole.variance_nrm, rel=1e-13)
    assert seen[0] == (7, store.n_rows) and seen[-1] == (store.n_rows, store.n_rows)


def test_a_small_variance_is_not_lost_to_cancellation() -> None:
    class Near:
        path, d_model = "near", 64

        def vectors(self, rows: np.ndarray) -> np.ndarray:
            rng = np.random.default_rng(3)
            return (1e4 * (1 + 1e-5 * rng.standard_normal((len(rows), 64)))).astype(np.float32)

    near = Near()
    raw = near.vectors(np.arange(500)).astype(np.float64)
    v = raw / np.linalg.norm(raw, axis=1, keepdims=True) * 8.0
    found = training_stats(near, np.arange(500), 8.0)  # type: ignore[arg-type]
    assert found.variance_nrm == pytest.approx(np.mean((v - v.mean(0)) ** 2), rel=1e-9)


def test_a_zero_vector_has_no_direction() -> None:
    class Zero:
        path, d_model = "zero", 4

        def vectors(self, rows: np.ndarray) -> np.ndarray:
            return np.where(np.asarray(rows)[:, None] == 12, 0, np.ones((len(rows), 4))).astype(np.float32)

    with pytest.raises(VectorError, match="row 12"):
        training_stats(Zero(), np.arange(10, 20), 2.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("norm", "scale"),
    [(143, 150), (150, 150), (150.1, 200), (57000, 60000), (76000, 80000), (27, 30), (9.5, 10), (0.12, 0.15), (1, 1)],
)
def test_round_scale(norm: float, scale: float) -> None:
    assert round_scale(norm) == scale


# -- the sets


def test_what_a_build_holds(store: Store, tokenizer: Tokenizer) -> None:
    built = build(store.path, tokenizer, Plan())
    opened = open_build(store.path)
    assert opened.info == json.loads(json.dumps(built.info)) and opened.sets == SPLITS
    assert (opened.layer, opened.mse_scale) == (3, 4.0)

    # Rows: of the split, with an explanation, each document in one set.
    store = opened.store
    status = store.explanation_status(slice(None))
    docs = store.table()["doc"]
    for name in SPLITS:
        rows = store.rows_of(name)
        wanted = rows if name == "rl" else rows[status[rows] == 1]
        np.testing.assert_array_equal(opened.rows(name), wanted)
        dropped = opened.info["sets"][name]["dropped"]
        assert sum(dropped.values()) == len(rows) - len(wanted)
        if name != "rl":
            assert dropped == {"none": int((status[rows] == 0).sum()), "dropped": int((status[rows] == 2).sum())}
            assert None not in store.explanations(opened.rows(name))
    of_set = {name: set(docs[opened.rows(name)].tolist()) for name in SPLITS}
    assert not (
        of_set["av_sft"] & of_set["ar_sft"] or of_set["av_sft"] & of_set["rl"] or of_set["ar_sft"] & of_set["rl"]
    )
    shares = {name: store.splits[name]["fraction"] for name in SPLITS}
    assert shares == {"av_sft": 0.25, "ar_sft": 0.25, "rl": 0.5}

    # Numbers: over the rows of all sets.
    rows = np.unique(np.concatenate([opened.rows(name) for name in SPLITS]))
    raw = store.vectors(rows).astype(np.float64)
    v = raw / np.linalg.norm(raw, axis=1, keepdims=True) * 4.0
    np.testing.assert_allclose(opened.mu, v.mean(0), rtol=0, atol=1e-13)
    assert opened.variance_nrm == pytest.approx(np.mean((v - v.mean(0)) ** 2), rel=1e-12)
    mean = np.linalg.norm(raw, axis=1).mean()
    assert mean <= opened.injection_scale <= 1.5 * mean and opened.info["training_rows"] == len(rows)

    # Sidecars: enough to make every prompt, and true of the tokenizer.
    for name in (*SPLITS, "av", "ar"):
        sidecar = opened.sidecar(name)
        sidecar.check(tokenizer)
        assert sidecar.injection_scale == opened.injection_scale and sidecar.variance_nrm == opened.variance_nrm
        assert (sidecar.d_model, sidecar.layer_index, sidecar.base_model) == (D, 3, "mini")
        assert (sidecar.av_template, sidecar.ar_template) == (AV_TEMPLATE, AR_TEMPLATE)
    assert opened.sidecar("rl").stage == "rl" and opened.sidecar("rl").raw["row_count"] == len(opened.rows("rl"))
    assert (opened.sidecar("ar").kind, opened.sidecar("ar").role) == ("nla_model", "ar")
    prompt = build_av_prompt(tokenizer, opened.sidecar("av"))
    assert prompt.ids[prompt.marker] == opened.info["marker"]["id"]
    for text in store.explanations(opened.rows("ar_sft")):
        assert text and ar_prompt_ids(tokenizer, opened.sidecar("ar"), text)
    assert store.check() == []


def test_model_sidecars_survive_being_written(store: Store, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from nla_jax.sidecar import write_sidecar

    built = build(store.path, tokenizer, Plan())
    for role in ("av", "ar"):
        write_sidecar(built.sidecar(role), tmp_path / role)
        assert read_sidecar(tmp_path / role) == built.sidecar(role)


def test_the_same_again_changes_nothing_and_another_needs_overwrite(store: Store, tokenizer: Tokenizer) -> None:
    path = Path(store.path)
    build(path, tokenizer, Plan())
    before = tree(path)
    build(path, tokenizer, Plan())
    assert tree(path) == before
    with pytest.raises(StoreError, match="other training sets already.*--overwrite"):
        build(path, tokenizer, Plan(injection_scale=77))
    assert tree(path) == before
    assert build(path, tokenizer, Plan(injection_scale=77), overwrite=True).injection_scale == 77
    assert open_build(path).sidecar("av_sft").injection_scale == 77
    build(path, tokenizer, Plan(), overwrite=True)
    assert tree(path) == before


def test_a_build_that_ends_early_is_no_build(store: Store, tokenizer: Tokenizer, monkeypatch) -> None:
    build(store.path, tokenizer, Plan())
    before = tree(Path(store.path))

    def full(*args, **options) -> None:
        raise StoreError("no space")

    for name in ("nla_jax.arrays.Root.write_json", "nla_jax.build.GrowingArray.close"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(StoreError, match="no space"):
                build(store.path, tokenizer, Plan(injection_scale=1), overwrite=True)
        with pytest.raises(StoreError, match="no training sets"):
            open_build(store.path)
        build(store.path, tokenizer, Plan())
        assert tree(Path(store.path)) == before


def test_two_stores_get_the_same_bytes(store: Store, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", tokenizer)
    build(store.path, tokenizer, Plan())
    build(other.path, tokenizer, Plan())
    assert tree(Path(store.path)) == tree(tmp_path / "other")


def test_in_an_object_store(store: Store, tokenizer: Tokenizer) -> None:
    # TensorStore's own memory keeps what a bucket would.
    url = f"memory://build-{hashlib.sha256(store.path.encode()).hexdigest()[:8]}/store"
    make_store(url, tokenizer)  # type: ignore[arg-type]
    assert build(url, tokenizer, Plan()).info == build(store.path, tokenizer, Plan()).info
    np.testing.assert_array_equal(open_build(url).mu, open_build(store.path).mu)


def test_splits_that_are_there_are_kept(store: Store, tokenizer: Tokenizer) -> None:
    write_splits(store.path, {"av_sft": 0.4, "ar_sft": 0.4, "rl": 0.2}, 5)
    before = Store.open(store.path).doc_splits
    build(store.path, tokenizer, Plan())
    np.testing.assert_array_equal(Store.open(store.path).doc_splits, before)
    for plan in (Plan(seed=6), Plan(fractions={"av_sft": 0.25, "ar_sft": 0.25, "rl": 0.5})):
        with pytest.raises(StoreError, match="split already"):
            build(store.path, tokenizer, plan)
    build(store.path, tokenizer, Plan(seed=5, fractions={"av_sft": 0.4, "ar_sft": 0.4, "rl": 0.2}))
    build(store.path, tokenizer, Plan(seed=6), overwrite=True)
    splits = Store.open(store.path).splits
    assert splits["seed"] == 6 and splits["av_sft"]["fraction"] == 0.4


def test_a_build_knows_when_its_store_has_changed(store: Store, tokenizer: Tokenizer) -> None:
    build(store.path, tokenizer, Plan())
    teach(Path(store.path), every=5)
    with pytest.raises(StoreError, match="its explanations changed"):
        open_build(store.path)
    build(store.path, tokenizer, Plan(), overwrite=True)
    open_build(store.path)
    write_splits(store.path, None, 9)
    with pytest.raises(StoreError, match="its splits changed"):
        open_build(store.path)


def test_damage_is_seen(store: Store, tokenizer: Tokenizer) -> None:
    build(store.path, tokenizer, Plan())
    sidecar = Path(store.path, "build", "rl.nla_meta.yaml")
    sidecar.write_text(sidecar.read_text().replace("injection_scale: 1", "injection_scale: 9"))
    with pytest.raises(StoreError, match="rl.nla_meta.yaml is missing or was changed"):
        open_build(store.path).sidecar("rl")
    Path(store.path, "build.json").write_text('{"format": "other"}')
    with pytest.raises(StoreError, match="expected nla_jax.build 1"):
        open_build(store.path)
    Path(store.path, "build.json").unlink()
    with pytest.raises(StoreError, match="no training sets.*nla build"):
        open_build(store.path)


def test_without_explanations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = make_store(tmp_path / "store", tokenizer, taught=False)
    with pytest.raises(StoreError, match="holds no explanations.*nla teach"):
        build(store.path, tokenizer, Plan())
    built = build(store.path, tokenizer, Plan(fractions={"rl": 1.0}), overwrite=True)
    assert built.sets == ("rl",) and len(built.rows("rl")) == store.n_rows
    assert built.sidecar("ar").ar_suffix_ids  # RL trains both
    with pytest.raises(StoreError, match="expected rl, got no rows of it"):
        built.rows("av_sft")


def test_one_layer_of_several(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = make_store(tmp_path / "store", tokenizer, layers=(2, 5))
    with pytest.raises(InputError, match="--layer.*one of 2, 5"):
        build(store.path, tokenizer, Plan())
    with pytest.raises(InputError, match="got 3"):
        build(store.path, tokenizer, Plan(layer=3))
    built = build(store.path, tokenizer, Plan(layer=5))
    assert built.sidecar("rl").layer_index == 5
    for name in SPLITS:
        assert set(store.table(built.rows(name))["layer"].tolist()) == {5}


def test_another_tokenizer_is_refused(store: Store, tmp_path: Path) -> None:
    other = Tokenizer.from_dir(write(tmp_path / "t", llama_like(), LLAMA_CONFIG | {"chat_template": GEMMA_CHAT}))
    with pytest.raises(StoreError, match="not the tokenizer of"):
        build(store.path, other, Plan())


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scales_that_mean_nothing(store: Store, tokenizer: Tokenizer, scale: float) -> None:
    with pytest.raises(InputError, match="positive"):
        build(store.path, tokenizer, Plan(injection_scale=scale))


def test_templates_of_ones_own(store: Store, tokenizer: Tokenizer) -> None:
    built = build(
        store.path, tokenizer, Plan(av_template="Say <v>{injection_char}</v> now.", ar_template="{explanation} <end>")
    )
    built.sidecar("av").check(tokenizer)
    for template in ("no field", "{injection_char} {injection_char}"):
        with pytest.raises(NLAError):
            build(store.path, tokenizer, Plan(av_template=template), overwrite=True)


# -- the command


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("25/25/50", (0.25, 0.25, 0.5)),
        ("0.25,0.25,0.5", (0.25, 0.25, 0.5)),
        ("0/0/100", (0, 0, 1)),
        ("0/0/1", (0, 0, 1)),
        ("10/10/30", (0.1, 0.1, 0.3)),
    ],
)
def test_fractions(text: str, shares: tuple[float, ...]) -> None:
    assert parse_fractions(text) == dict(zip(SPLITS, shares, strict=True))


@pytest.mark.parametrize("text", ["", "50/50", "a/b/c", "1/2/3/4"])
def test_bad_fractions(text: str) -> None:
    with pytest.raises(InputError, match="25/25/50"):
        parse_fractions(text)


def test_the_command(store: Store, tokenizer: Tokenizer) -> None:
    run = CliRunner().invoke(main, ["build", store.path, "--target", tokenizer.source, "--base-model", "org/Mini"])
    assert run.exit_code == 0, run.output
    assert "marker          ㈎ (token 2047, 0 times in the corpus)" in run.output
    assert "whose explanation was dropped" in run.output and "variance_nrm" in run.output
    assert open_build(store.path).sidecar("rl").base_model == "org/Mini"
    run = CliRunner().invoke(main, ["build", store.path, "--av-tokenizer", tokenizer.source, "--marker", "e"])
    assert run.exit_code == 2 and run.stderr.count("\n") == 1 and "the marker 'e'" in run.stderr


@needs_data
def test_templates_from_a_released_sidecar(tmp_path: Path) -> None:
    qwen = opened(QWEN)
    store = make_store(tmp_path / "store", qwen)
    command = ["build", store.path, "--target", str(QWEN), "--template-from", str(RELEASED_AV)]
    run = CliRunner().invoke(main, command)
    assert run.exit_code == 0, run.output
    built, released = open_build(store.path), read_sidecar(RELEASED_AV)
    for field in ("marker", "marker_id", "left_id", "right_id", "av_template", "ar_template", "injection_scale"):
        assert getattr(built.sidecar("av"), field) == getattr(released, field)
    assert built.sidecar("ar").ar_suffix_ids == (1318, 29, 366, 1708, 29)
