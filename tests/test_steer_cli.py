"""`nla steer` on a mini pair: no push changes nothing, a push does what it says, and one line for every mistake."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_pair import mini_pair, roles, run

import nla_jax
from nla_jax.pair import NLA
from nla_jax.tools.mini import MiniPair
from nla_jax.tools.steer import new_text, parse_alphas

TEXT = "The keeper counted the ships twice."
GIVEN = ("--explanation", "A keeper who counts ships.", "--edit", "ships=>birds")
NEW = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> MiniPair:
    return mini_pair(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def steered(pair, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "out.json"
    args = ("--position", -1, *GIVEN, "--edit", "keeper=>child", "--alphas", "0,1,8", "--max-new-tokens", NEW)
    done = run("steer", TEXT, *args, "--json", out, *roles(pair, "target", "ar"))
    return done, json.loads(out.read_text())


def test_what_is_written_and_said(steered, pair):
    done, found = steered
    assert found["edited"] == "A child who counts birds." and found["format"] == "nla_jax.steer"
    nla = NLA.from_pretrained(ar=str(pair.ar), target=str(pair.target))
    before, after = nla.reconstruct([GIVEN[1], found["edited"]]).astype(np.float64)
    assert found["delta_norm"] == pytest.approx(np.linalg.norm(after - before), rel=1e-4)
    h = nla.activations(TEXT, [-1]).vectors[0]
    assert found["norm"] == pytest.approx(np.linalg.norm(h), rel=1e-5)
    rows = found["continuations"]
    assert [(r["alpha"], r["control"]) for r in rows] == [(a, c) for a in (0, 1, 8) for c in (False, True)]
    for line in ("original: A keeper who counts ships.", "edited:   A child who counts birds."):
        assert line in done.stdout
    # Without a push the target goes on greedily; coherence is its own mean log-probability of what it wrote.
    cfg, params = nla_jax.load_model(str(pair.target), dtype="float32")
    ids = nla.tokenize(TEXT)
    for row in rows:
        tokens = np.asarray(ids + row["token_ids"], np.int32)
        logits = np.asarray(nla_jax.forward(params, tokens[None], cfg), np.float64)[0, len(ids) - 1 : -1]
        logits -= logits.max(-1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = logs[np.arange(len(row["token_ids"])), row["token_ids"]]
        assert row["coherence"] == pytest.approx(chosen.mean(), abs=1e-3)
        if row["alpha"] == 0:
            np.testing.assert_allclose(chosen, logs.max(-1), atol=1e-4)
    assert rows[0] | {"control": True} == rows[1]  # no push: both directions are the same
    assert rows[4]["token_ids"] != rows[0]["token_ids"] and rows[4]["token_ids"] != rows[5]["token_ids"]


def test_everywhere_samples_and_a_drawn_explanation(pair, tmp_path):
    out = tmp_path / "out.json"
    args = ("--position", 3, "--edited", "Birds.", "--alphas", "0,4", "--max-new-tokens", NEW, "--everywhere")
    more = ("--samples", 2, "--temperature", 1, "--explanation-tokens", 5, "--seed", 2)
    done = run("steer", TEXT, *args, *more, "--json", out, *roles(pair))
    found = json.loads(out.read_text())
    assert found["explanation"]["drawn"] and "the explanation failed" in done.stderr
    rows = found["continuations"]
    assert [(r["alpha"], r["sample"], r["control"]) for r in rows] == [
        (a, g, c) for a in (0, 4) for g in (0, 1) for c in (False, True)
    ]
    assert rows[0]["token_ids"] != rows[2]["token_ids"]  # samples differ
    run("steer", TEXT, *args[:-1], *more, "--json", out, *roles(pair))
    here = json.loads(out.read_text())["continuations"]
    assert here[0] == rows[0] and here[4] != rows[4]  # alpha 0 is the same wherever it is applied; alpha 4 is not


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--edit", "cats=>dogs"], "'cats' does not occur in the explanation: got 'A keeper who counts ships.'"),
        (["--edit", "ships=>ships"], "the edited explanation: expected another text than the original, got the same"),
        (["--edited", "A keeper who counts ships."], "expected another text than the original"),
        (["--edited", " "], "the edited explanation: expected a text"),
        (["--edit", "ships"], '--edit: expected "OLD=>NEW"'),
        (["--edit", "=>x"], '--edit: expected "OLD=>NEW"'),
        ([], "the edit: expected one of"),
        (["--edit", "ships=>a", "--edited", "b"], "the edit: expected one of"),
        (["--edit", "ships=>birds", "--alphas", "0,x"], "--alphas: expected numbers"),
        (["--edit", "ships=>birds", "--alphas", "inf"], "--alphas: expected numbers"),
        (["--edit", "ships=>birds", "--samples", "2"], "--samples at temperature 0"),
        (["--edit", "ships=>birds", "--position", "50"], "position 50 is out of range"),
        (["--edit", "ships=>birds", "--temperature", "-1"], "--temperature"),
    ],
)
def test_one_line_for_every_mistake(pair, args, message):
    place = [] if "--position" in args else ["--position", "3"]
    done = run("steer", TEXT, *place, *GIVEN[:2], *args, *roles(pair, "target", "ar"), code=2)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("nla: error: ") and message in line, line
    assert not done.stdout


def test_readings_without_a_difference(pair, monkeypatch):
    monkeypatch.setattr(NLA, "reconstruct", lambda self, texts, **_: np.ones((len(texts), 64), np.float32))
    done = run("steer", TEXT, "--position", "3", *GIVEN, *roles(pair, "target", "ar"), code=2)
    assert "expected a direction between them, got no difference" in done.stderr


def test_edits_and_strengths():
    assert new_text("a b a", [("a", "c"), ("c b", "d")], None) == "d c"
    assert parse_alphas(" 2,0, -0.5,2") == [2.0, 0.0, -0.5]
