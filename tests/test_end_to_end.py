"""A pair from its directories to explanations and scores, against computations that share no code with that path."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file

import nla_jax
from nla_jax.errors import ConfigError, InputError, SidecarError, VectorError
from nla_jax.pair import NLA, Explanation
from nla_jax.prompt import ar_prompt_ids, build_av_prompt
from nla_jax.sidecar import read_sidecar
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools.cli import main
from nla_jax.tools.mini import MiniPair, make_mini

TEXT = "The keeper counted the ships twice."
TOKENS = 10  # sampled per explanation: random weights never end one


def open_pair(pair: MiniPair, **options) -> NLA:
    return NLA.from_pretrained(av=str(pair.av), ar=str(pair.ar), target=str(pair.target), **options)


def edit_weights(file: Path, change) -> None:
    with safe_open(file, "numpy") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file, {"format": "pt"})


def edit_sidecar(directory: Path, change) -> None:
    file = directory / "nla_meta.yaml"
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content, allow_unicode=True))


def with_random_head(pair: MiniPair) -> MiniPair:
    """An identity head would hide a transposed one."""
    w = np.random.default_rng(5).standard_normal((64, 64)).astype(np.float32) / 8
    edit_weights(pair.ar / "value_head.safetensors", lambda t: t.update(weight=w))
    return pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> MiniPair:
    return with_random_head(make_mini(tmp_path_factory.mktemp("pair"), dtype="float32"))


@pytest.fixture(scope="module")
def nla(pair) -> NLA:
    return open_pair(pair)


@pytest.fixture(scope="module")
def vectors(nla) -> np.ndarray:
    return nla.activations(TEXT).vectors[:5]


# -- the released shape with the real tokenizer --------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(shared_data, tmp_path_factory) -> MiniPair:
    return make_mini(
        tmp_path_factory.mktemp("released"),
        tokenizer=shared_data / "tokenizers" / "qwen2.5",
        like_released="qwen2.5-7b-L20",
        sidecar_from=shared_data / "released",
        d_model=32,
    )


@pytest.fixture(scope="module")
def released_nla(released) -> NLA:
    return open_pair(released)


def test_prompts_of_the_released_pair(shared_data):
    """Counts and ids published with the released files (shared data, SOURCES.md)."""
    tok = Tokenizer.from_dir(shared_data / "tokenizers" / "qwen2.5")
    av, ar = (read_sidecar(shared_data / "released" / f"qwen2.5-7b-L20-{role}") for role in ("av", "ar"))
    prompt = build_av_prompt(tok, av)
    assert (len(prompt.ids), prompt.marker) == (125, 111)
    assert prompt.ids[110:113] == (29, 149705, 522)
    for explanation in ("", "a", "ends with >", "日本語 🙂", "</text> <summary>", "<|im_end|>", "x\n"):
        assert ar_prompt_ids(tok, ar, explanation)[-5:] == [1318, 29, 366, 1708, 29]


def test_released_shape_from_directories_to_scores(released_nla):
    rows = released_nla.explain(TEXT, positions=[1, -1], samples=2, max_new_tokens=6, seed=3)
    ids = released_nla.tokenize(TEXT)
    assert [(e.position, e.sample) for e in rows] == [(1, 0), (1, 1), (len(ids) - 1, 0), (len(ids) - 1, 1)]
    for e in rows:
        assert e.token_id == ids[e.position] and e.token in TEXT
        assert len(e.token_ids) == len(e.logprobs) <= 6 and all(p < 0 for p in e.logprobs)
        assert -1 <= e.cosine <= 1 and math.isclose(e.mse_nrm, 2 * (1 - e.cosine), rel_tol=1e-6)
        assert e.fve_nrm is None  # D 32 is no published pair's width
        assert e.norm > 0
    assert rows[0].token_ids != rows[1].token_ids


def test_command_line_writes_what_the_library_computes(released, released_nla, tmp_path):
    arguments = ["explain", TEXT, "--target", str(released.target), "--av", str(released.av), "--ar", str(released.ar)]
    arguments += ["--positions", "1,-1", "--samples", "2", "--max-new-tokens", "6", "--seed", "3"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "out.json").read_text())["explanations"]
    expected = released_nla.explain(TEXT, positions=[1, -1], samples=2, max_new_tokens=6, seed=3)
    assert len(written) == len(expected) == 4
    for row, e in zip(written, expected, strict=True):
        assert (row["position"], row["sample"], row["token_ids"]) == (e.position, e.sample, list(e.token_ids))
        assert row["text"] == e.text and row["failed"] == e.failed
        assert math.isclose(row["cosine"], e.cosine, abs_tol=1e-5)


def test_ids_beyond_the_tokenizer_never_crash(pair, nla, tmp_path):
    """The embedding has 2176 rows for 2048 ids; here nearly every sampled id is one of those without a text."""
    av, known = tmp_path / "av", nla.av.tokenizer.vocab_size
    shutil.copytree(pair.av, av)

    def change(tensors):
        tensors["lm_head.weight"][known:] *= 100

    edit_weights(av / "model.safetensors", change)
    odd = NLA.from_pretrained(av=str(av), ar=str(pair.ar), target=str(pair.target))
    for temperature in (0.0, 1.0):
        rows = odd.explain(TEXT, positions=[2, 3], max_new_tokens=6, temperature=temperature)
        assert all(i >= known for e in rows for i in e.token_ids)
        assert all(e.raw == e.text == "" and e.failed and e.cosine is not None for e in rows)
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "parquet", "html")}
    arguments = ["explain", TEXT, "--target", str(pair.target), "--av", str(av), "--positions", "2,3"]
    files = [x for kind, file in out.items() for x in (f"--{kind}", str(file))]
    result = CliRunner().invoke(main, [*arguments, "--max-new-tokens", "6", *files])
    assert result.exit_code == 0, result.output
    assert min(json.loads(out["json"].read_text())["explanations"][0]["token_ids"]) >= known
    assert all(file.stat().st_size > 0 for file in out.values())


# -- exactness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3"])
def test_shared_prefix_decoding_equals_recomputing_the_whole_prompt(tmp_path, family):
    """The vector becomes one more row of the embedding table, so that `forward` alone does everything again."""
    pair = make_mini(tmp_path, family=family, dtype="float32")
    scale = 5.0  # near the norm of other rows: at the usual 150 and more, norms hide a wrong scale
    edit_sidecar(pair.av, lambda c: c["extraction"].update(injection_scale=scale))
    nla = NLA.from_pretrained(av=str(pair.av))
    vectors = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32) * 7
    rows = nla.verbalize(vectors, temperature=0.0, max_new_tokens=TOKENS)

    cfg, params = nla_jax.load_model(pair.av, dtype="float32")
    multiplier = math.sqrt(64) if family.startswith("gemma") else 1.0
    prompt, marker, v = list(nla.av.prompt.ids), nla.av.prompt.marker, cfg.vocab_size
    prompt[marker] = v
    bigger = dataclasses.replace(cfg, vocab_size=v + 1)
    forward = jax.jit(nla_jax.forward, static_argnames="cfg")
    for e, vector in zip(rows, vectors, strict=True):
        row = vector.astype(np.float64) * scale / np.linalg.norm(vector.astype(np.float64)) / multiplier
        table = jnp.concatenate([params.embed, jnp.asarray(row[None], jnp.float32)])
        ids = list(prompt)
        for token, logprob in zip(e.token_ids, e.logprobs, strict=True):
            padded = np.zeros((1, len(prompt) + TOKENS), np.int32)
            padded[0, : len(ids)] = ids
            logits = np.asarray(forward(params.replace(embed=table), padded, cfg=bigger))[0, len(ids) - 1, :v]
            logits = logits.astype(np.float64)
            expected = logits - logits.max()
            expected -= np.log(np.exp(expected).sum())
            assert token == int(np.argmax(logits))
            assert abs(logprob - expected[token]) < 1e-4
            ids.append(token)
        assert len(e.token_ids) == TOKENS or e.finish_reason == "stop"


def test_explained_vectors_are_the_residual_stream_at_k(pair, nla):
    cfg, params = nla_jax.load_model(pair.target, dtype="float32")
    assert cfg.n_layers == 4 and nla.target.cfg.n_layers == 3
    ids = nla.tokenize(TEXT)
    stream = np.asarray(nla_jax.residual(params, np.asarray([ids]), cfg, layer=2))[0]
    found = nla.activations(TEXT)
    assert found.positions == tuple(range(len(ids)))
    np.testing.assert_allclose(found.vectors, stream, rtol=1e-5, atol=1e-5)
    last = nla.activations(TEXT, [-1])
    np.testing.assert_allclose(last.vectors[0], stream[-1], rtol=1e-5, atol=1e-5)
    rows = nla.explain(TEXT, positions=[0, 4], max_new_tokens=6)
    np.testing.assert_allclose([e.norm for e in rows], np.linalg.norm(stream[[0, 4]], axis=1), rtol=1e-5)
    alone = nla.verbalize(stream[4], max_new_tokens=6, row_ids=[4])[0]
    assert alone.token_ids == rows[1].token_ids


def test_bos_is_read_but_not_explained_by_default(tmp_path):
    pair = make_mini(tmp_path, family="gemma3", n_layers=3, layer=1)
    nla = open_pair(pair)
    assert nla.tokenize(TEXT)[0] == nla.target.tokenizer.bos_id
    assert nla.activations(TEXT).positions[0] == 1
    assert nla.activations(TEXT, [0]).positions == (0,)
    chat = [{"role": "user", "content": TEXT}]
    assert nla.tokenize(chat).count(nla.target.tokenizer.bos_id) == 1
    assert not {nla.tokenize(chat)[p] for p in nla.activations(chat).positions} & nla.target.tokenizer.special_ids


def test_reconstruction_is_the_head_on_the_last_token_of_the_trunk(pair, nla):
    texts = ["short", "a much longer explanation, of several words and " * 4, ""]
    cfg, trunk = nla_jax.load_model(pair.target, dtype="float32")  # the AR's blocks are the target's first ones
    with safe_open(pair.ar / "value_head.safetensors", "numpy") as f:
        head = f.get_tensor("weight").astype(np.float64)
    predicted = nla.reconstruct(texts)
    for text, row in zip(texts, predicted, strict=True):
        ids = nla.ar.tokenizer.encode("What a model had in mind: <text>" + text + "</text> <summary>")
        last = np.asarray(nla_jax.residual(trunk, np.asarray([ids]), cfg, layer=2))[0, -1]
        expected = head @ last.astype(np.float64)
        assert np.abs(row - expected).max() < 1e-4 * np.abs(expected).max()


def test_scores_equal_their_definitions(nla, vectors):
    rows = open_pair(MiniPair(nla.target.path, nla.av.path, nla.ar.path), variance_nrm=0.5).verbalize(
        vectors, samples=2, max_new_tokens=TOKENS
    )
    predicted = nla.reconstruct([e.text for e in rows]).astype(np.float64)
    for e, guess in zip(rows, predicted, strict=True):
        v = vectors[e.row].astype(np.float64)
        cosine = v @ guess / math.sqrt(v @ v) / math.sqrt(guess @ guess)
        unit = guess * 8 / math.sqrt(guess @ guess) - v * 8 / math.sqrt(v @ v)  # mse_scale sqrt(64)
        error = (unit**2).mean()
        assert abs(e.cosine - cosine) < 1e-5
        assert abs(e.mse_nrm - error) < 1e-5 and abs(e.mse_nrm - 2 * (1 - cosine)) < 1e-5
        assert abs(e.fve_nrm - (1 - error / 0.5)) < 1e-4
    scores = nla.score([e.text for e in rows], vectors[[e.row for e in rows]])
    np.testing.assert_allclose(scores.cosine, [e.cosine for e in rows], atol=1e-5)
    assert scores.fve_nrm is None


def test_a_vector_s_explanation_does_not_depend_on_its_batch(nla, vectors):
    options = {"samples": 2, "max_new_tokens": TOKENS, "seed": 9}
    together = nla.verbalize(vectors, **options)
    small_batches = nla.verbalize(vectors, **options, batch_size=4)
    reversed_ = nla.verbalize(vectors[::-1], **options)
    assert len({e.token_ids for e in together}) == 10
    for i, v in enumerate(vectors):
        alone = nla.verbalize(v, **options)
        for g in (0, 1):
            rows = [together[2 * i + g], small_batches[2 * i + g], reversed_[2 * (4 - i) + g]]
            for row in rows:
                assert row.token_ids == alone[g].token_ids
                np.testing.assert_allclose(row.logprobs, alone[g].logprobs, atol=1e-4)
    assert [e.token_ids for e in nla.verbalize(vectors, samples=2, max_new_tokens=TOKENS, seed=10)] != [
        e.token_ids for e in together
    ]


# -- choices --------------------------------------------------------------------------------------------------------


def test_best_of_keeps_what_the_ar_ranks_first(nla, vectors):
    every = nla.verbalize(vectors, samples=4, max_new_tokens=TOKENS)
    best = nla.verbalize(vectors, best_of=4, max_new_tokens=TOKENS)
    assert len(best) == len(vectors)
    assert any(e.sample > 0 for e in best)
    for i, e in enumerate(best):
        group = every[4 * i : 4 * i + 4]
        assert e.token_ids == max(group, key=lambda x: x.cosine).token_ids
        assert e.row == i


def test_best_of_prefers_an_explanation_that_parsed(nla, vectors, monkeypatch):
    """Half of the samples are made to parse: the best of those wins, though a failed one may score higher."""
    monkeypatch.setattr("nla_jax.pair.parse_explanation", lambda raw, stopped: (raw, len(raw) % 2 == 0))
    every = nla.verbalize(vectors, samples=4, max_new_tokens=TOKENS)
    best = nla.verbalize(vectors, best_of=4, max_new_tokens=TOKENS)
    groups = [every[4 * i : 4 * i + 4] for i in range(len(vectors))]
    assert any(max(g, key=lambda x: x.cosine).failed and not all(x.failed for x in g) for g in groups)
    for e, group in zip(best, groups, strict=True):
        parsed = [x for x in group if not x.failed]
        assert e.token_ids == max(parsed or group, key=lambda x: x.cosine).token_ids


def test_bfloat16_files_run_in_float32_on_cpu(tmp_path):
    pair = make_mini(tmp_path, n_layers=2, layer=1)
    nla = open_pair(pair)
    leaves = jax.tree.leaves((nla.av.params(), nla.ar.params(), nla.target.params()))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    with safe_open(pair.av / "model.safetensors", "numpy") as f:
        stored = f.get_tensor("model.layers.1.mlp.up_proj.weight")
    assert stored.dtype == jnp.dtype("bfloat16")
    np.testing.assert_array_equal(np.asarray(nla.av.params().layers.up[1]), stored.astype(np.float32).T)
    half = open_pair(pair, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.av.params())} == {jnp.dtype("bfloat16")}
    exact, rounded = nla.activations(TEXT).vectors, half.activations(TEXT).vectors
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()
    with pytest.raises(InputError, match="float32, bfloat16 or float16"):
        open_pair(pair, dtype="int8")


def test_low_memory_changes_nothing_but_what_is_kept(pair, nla):
    small = open_pair(pair, low_memory=True)
    options = {"positions": [1, 2], "samples": 2, "max_new_tokens": TOKENS}
    assert small.explain(TEXT, **options) == nla.explain(TEXT, **options)
    assert [role._params for role in (small.target, small.av, small.ar)] == [None] * 3
    assert nla.av._params is not None


def test_source_of_the_variance(tmp_path, monkeypatch):
    pair = make_mini(tmp_path, n_layers=2, layer=1, variance_nrm=0.25)
    edit_sidecar(pair.av, lambda c: c["extraction"].update(variance_nrm=0.75))

    def source(**options):
        nla = open_pair(pair, **options)
        return nla.variance_nrm, nla.variance_source

    assert source(variance_nrm=0.9) == (0.9, "given")
    assert source() == (0.25, "AR sidecar")
    edit_sidecar(pair.ar, lambda c: c["extraction"].pop("variance_nrm"))
    assert source() == (0.75, "AV sidecar")
    edit_sidecar(pair.av, lambda c: c["extraction"].pop("variance_nrm"))
    assert source() == (None, None)
    monkeypatch.setattr("nla_jax.pair.published", lambda *key: {"variance_nrm": 0.3, "name": f"{key}"})
    assert source() == (0.3, "published for (64, 1, 2047)")
    with pytest.raises(InputError, match="variance_nrm"):
        open_pair(pair, variance_nrm=-1.0)


# -- what does not fit ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, MiniPair]:
    out = tmp_path_factory.mktemp("others")
    return {
        "width": make_mini(out / "width", d_model=32),
        "layer": make_mini(out / "layer", layer=1),
        "shallow": make_mini(out / "shallow", n_layers=2, layer=1),
        "template": make_mini(out / "template"),
    }


def test_roles_of_different_pairs_are_refused(pair, others):
    edit_sidecar(
        others["template"].ar,
        lambda c: c["prompt_templates"].update(ar="Other words: <text>{explanation}</text> <summary>"),
    )

    def refused(error, match, **roles):
        with pytest.raises(error, match=match) as caught:
            NLA.from_pretrained(**{role: str(path) for role, path in roles.items()})
        assert "\n" not in str(caught.value) and "Try: " in str(caught.value)

    refused(ConfigError, "d_model differs", av=pair.av, ar=others["width"].ar)
    refused(ConfigError, "d_model differs", av=pair.av, target=others["width"].target)
    refused(SidecarError, "expected layer_index 2", av=pair.av, ar=others["layer"].ar)
    refused(SidecarError, "AR templates differ", av=pair.av, ar=others["template"].ar)
    refused(ConfigError, "layer_index 2", av=pair.av, target=others["shallow"].target)
    refused(SidecarError, "swap", av=pair.ar)
    refused(SidecarError, "swap", ar=pair.av)
    refused(SidecarError, "no sidecar", av=pair.target)
    refused(InputError, "layer of the target", target=pair.target)


def test_bad_calls_are_one_line(nla, vectors):
    def refused(error, match, call, *args, **options):
        with pytest.raises(error, match=match) as caught:
            call(*args, **options)
        assert "\n" not in str(caught.value)

    nan, zero = vectors.copy(), vectors.copy()
    nan[1, 3], zero[2] = np.nan, 0
    refused(VectorError, "vector 1 has NaN", nla.verbalize, nan)
    refused(VectorError, "vector 2 is all zero", nla.verbalize, zero)
    refused(VectorError, r"\[N, 64\]", nla.verbalize, vectors[:, :10])
    refused(VectorError, "at least one row", nla.verbalize, vectors[:0])
    refused(InputError, "no tokens", nla.explain, "")
    refused(InputError, "position 99", nla.explain, TEXT, positions=[99])
    refused(InputError, "at least one", nla.explain, TEXT, positions=[])
    refused(InputError, "samples", nla.verbalize, vectors, samples=0)
    refused(InputError, "temperature", nla.verbalize, vectors, temperature=float("nan"))
    refused(InputError, "one text per vector", nla.score, ["a"], vectors)
    refused(InputError, "list of strings", nla.reconstruct, "a")
    refused(InputError, "needs the ar", NLA(av=nla.av).verbalize, vectors, best_of=2)
    refused(InputError, "needs the target", NLA(av=nla.av).explain, TEXT)


def test_explanation_fields(nla):
    (e,) = nla.explain(TEXT, positions=[3], max_new_tokens=6)
    assert isinstance(e, Explanation) and isinstance(e.text, str) and isinstance(e.token_ids, tuple)
    assert e.failed and e.finish_reason == "length" and e.raw == e.text
    assert nla.av.tokenizer.decode(e.token_ids) == e.raw
    without_ar = NLA(av=nla.av, target=nla.target).explain(TEXT, positions=[3], max_new_tokens=6)[0]
    assert without_ar == dataclasses.replace(e, cosine=None, mse_nrm=None, fve_nrm=None)
