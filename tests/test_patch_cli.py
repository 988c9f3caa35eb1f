"""`nla patch` on a mini pair: its numbers against whole forward passes, and one line for what cannot be done."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_pair import mini_pair, roles, run

from nla_jax.evals.patching import load_target
from nla_jax.models.layers import embed, unembed
from nla_jax.models.transformer import run_blocks
from nla_jax.pair import NLA
from nla_jax.tools.mini import MiniPair

TEXT = "The keeper counted the ships twice, and then she wrote the number into a book.\n"
AT = 5
GIVEN = ("--explanation", "A keeper who counts ships.")


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> MiniPair:
    return mini_pair(tmp_path_factory.mktemp("mini"))


def test_numbers_are_those_of_whole_passes(pair, tmp_path):
    out = tmp_path / "out.json"
    args = ("--position", AT, *GIVEN, "--tokens", 6, "--json", out)
    done = run("patch", TEXT, *args, *roles(pair, "target", "ar"))
    found = json.loads(out.read_text())
    assert found["format"] == "nla_jax.patch" and found["layer_index"] == 2 and "hidden_states" in done.stderr

    nla = NLA.from_pretrained(ar=str(pair.ar), target=str(pair.target))
    ids = np.asarray(nla.tokenize(TEXT), np.int32)
    stream = nla.activations(TEXT, range(len(ids))).vectors.astype(np.float64)
    h, read = stream[AT], nla.reconstruct([GIVEN[1]])[0].astype(np.float64)
    others = [i for i in range(1, len(ids)) if i != AT and ids[i] not in nla.target.tokenizer.special_ids]
    vectors = {
        "reconstruction": read * np.linalg.norm(h) / np.linalg.norm(read),
        "mean": stream[others].mean(axis=0),
        "zero": np.zeros_like(h),
        "gold": h,
    }
    cfg, params = load_target(nla.target)

    @jax.jit
    def logs(position, vector):
        def edit(layer, x):
            here = (layer == 2) & (jnp.arange(len(ids)) == position)[None, :, None]
            return jnp.where(here, vector[None, None], x)

        x = run_blocks(params, embed(params, ids[None], cfg), cfg, edit=edit)[0]
        return jax.nn.log_softmax(unembed(params, x, cfg))[0, AT : AT + 6]

    clean, following = np.asarray(logs(-1, jnp.float32(h)), np.float64), ids[AT + 1 : AT + 7]
    assert [t["token_id"] for t in found["tokens"]] == following.tolist()
    np.testing.assert_allclose(found["clean"]["logprob"], clean[np.arange(6), following], atol=1e-4)
    kl, ce = {}, {}
    for name, vector in vectors.items():
        q = np.asarray(logs(AT, jnp.float32(vector)), np.float64)
        kl[name], ce[name] = np.sum(np.exp(clean) * (clean - q), axis=-1), -q[np.arange(6), following]
        np.testing.assert_allclose(found["variants"][name]["kl"], kl[name], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found["variants"][name]["logprob"], -ce[name], atol=1e-4)
    for name in ("mean", "zero"):
        recovered = found["recovered"][name]
        assert recovered["kl_recovered"] == pytest.approx(1 - kl["reconstruction"].sum() / kl[name].sum(), abs=1e-3)
        lost = ce[name].sum() + clean[np.arange(6), following].sum()
        if recovered["ce_recovered"] is not None:
            assert recovered["ce_recovered"] * lost == pytest.approx((ce[name] - ce["reconstruction"]).sum(), abs=1e-3)
        assert f"against {name}, next 6 tokens: KL recovered {recovered['kl_recovered']:.3f}" in done.stdout
    assert max(found["variants"]["gold"]["kl"]) < 1e-5
    first = next(line for line in done.stdout.splitlines() if line.split()[:1] == [str(AT + 1)])
    assert f"{found['clean']['logprob'][0]:.3f}" in first and f"{kl['reconstruction'][0]:.3f}" in first


def test_an_explanation_is_that_of_explain(pair, tmp_path):
    both = ("--max-new-tokens", 5, "--seed", 3, *roles(pair))
    done = run("patch", TEXT, "--position", AT, "--tokens", 2, "--json", tmp_path / "p.json", *both)
    run("explain", TEXT, "--positions", AT, "--json", tmp_path / "e.json", *both)
    (explained,) = json.loads((tmp_path / "e.json").read_text())["explanations"]
    patched = json.loads((tmp_path / "p.json").read_text())["explanation"]
    assert patched["text"] == explained["text"] and patched["drawn"] and patched["failed"] == explained["failed"]
    assert patched["cosine"] == pytest.approx(explained["cosine"], abs=1e-4)
    assert "the explanation failed" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--position", "-1", *GIVEN], "--position: expected a token that others follow, got -1, the last one"),
        (["--position", "99", *GIVEN], "position 99 is out of range"),
        (["--position", "1,2", *GIVEN], "--position: expected one position"),
        (["--position", "x", *GIVEN], "expected numbers"),
        (["--position", "1"], "the explanation: expected --av"),
        (["--position", "1", "--explanation", " "], "--explanation: expected a text"),
        (["--position", "1", *GIVEN, "--tokens", "0"], "--tokens"),
        (["--position", "1", *GIVEN, "--json", "/no/such/dir/x.json"], "an existing directory"),
    ],
)
def test_one_line_for_what_cannot_be_done(pair, args, message):
    done = run("patch", TEXT, *args, *roles(pair, "target", "ar"), code=2)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("nla: error: ") and message in line, line
    assert not done.stdout
