"""Steering by edited explanations: whole forward passes, float64 sums from the dump, and planted pairs."""

from __future__ import annotations

import numpy as np
import pytest
from eval_cases import Planted, found, mini_nla
from eval_documents import read_documents, whole_passes

from nla_jax.errors import InputError
from nla_jax.evals import steering
from nla_jax.pair import NLA

ALPHAS = (0.0, 1.0, 4.0)
NEW = 5


@pytest.fixture(scope="module")
def nla(tmp_path_factory) -> NLA:
    return mini_nla(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def data(nla):
    return read_documents(nla)


@pytest.fixture(scope="module")
def result(nla, data):
    """A perfect pair: delta is the donor's vector less the row's."""
    return steering.run(Planted(nla, data), alphas=(1.0, 4.0), continued=7, max_new_tokens=NEW)


@pytest.fixture(scope="module")
def whole(nla):
    return whole_passes(nla)


def test_columns_are_those_of_whole_forward_passes(result, data, whole):
    c = result.columns
    assert result.settings["alphas"] == list(ALPHAS)
    for i in (0, 5, 11):
        row, donor = int(c["row"][i]), int(c["donor"][i])
        assert data.docs[row] != data.docs[donor]
        p, q = int(data.positions[row]), int(data.positions[donor])
        goal = whole(data.tokens[donor], -1, data.vectors[0])[q]
        assert c["top_donor"][i] == goal.argmax()
        h, other = (data.vectors[r].astype(np.float64) for r in (row, donor))
        delta = other - h
        for j, alpha in enumerate(ALPHAS):
            vector = h + alpha * np.linalg.norm(h) * delta / np.linalg.norm(delta)
            logs = whole(data.tokens[row], p, vector)[p]
            kl = np.sum(np.exp(goal) * (goal - logs))
            np.testing.assert_allclose(c["kl_steered"][i, j], kl, rtol=1e-4, atol=1e-5)
            assert c["top_steered"][i, j] == logs.argmax()
        logs = whole(data.tokens[row], p, other)[p]
        np.testing.assert_allclose(c["kl_swap"][i], np.sum(np.exp(goal) * (goal - logs)), rtol=1e-4, atol=1e-5)


def test_continuations_and_their_coherence(result, data, whole):
    """Unsteered, they are the target's own greedy ones."""
    c = result.columns
    wrote = np.flatnonzero(np.isfinite(c["logprob_steered"][:, 0]))
    assert len(wrote) == 7
    for i in wrote[:2]:
        row = int(c["row"][i])
        tokens = list(data.tokens[row][: int(data.positions[row]) + 1])
        total, count = 0.0, int(c["written_steered"][i, 0])
        for _ in range(count):
            logs = whole(tokens, -1, data.vectors[0])[len(tokens) - 1]
            tokens.append(int(logs.argmax()))
            total += logs.max()
        np.testing.assert_allclose(c["logprob_steered"][i, 0], total, rtol=1e-4)
        assert isinstance(c["continuation_steered_0"][i], str)
    assert sum(text is not None for text in c["continuation_random_4"]) == 7


def test_every_number_follows_from_the_columns(result):
    c, rows = result.columns, result.rows
    base = c["kl_steered"][:, 0]
    other = c["top_steered"][:, 0] != c["top_donor"]
    wrote = np.isfinite(c["logprob_steered"][:, 0])
    for kind, control in (("steered", ""), ("random", "random direction")):
        for j, alpha in enumerate(ALPHAS):
            group = f"alpha {alpha:g}"
            row = found(rows, "steering_success", group, control)
            assert row.value == pytest.approx(1 - c[f"kl_{kind}"][:, j].sum() / base.sum(), rel=1e-9, abs=1e-12)
            assert row.documents == 6 and (alpha == 0 or row.low < row.value < row.high)
            row = found(rows, "steering_top", group, control)
            assert row.value == pytest.approx((c[f"top_{kind}"][:, j] == c["top_donor"])[other].mean(), abs=1e-12)
            row = found(rows, "coherence", group, control)
            expected = c[f"logprob_{kind}"][wrote, j].sum() / c[f"written_{kind}"][wrote, j].sum()
            assert row.value == pytest.approx(expected, rel=1e-9)
    swap = found(rows, "steering_success", "", steering.SWAP)
    assert swap.value == pytest.approx(1 - c["kl_swap"].sum() / base.sum())


def test_alpha_0_changes_nothing_at_all(result):
    c = result.columns
    for control in ("", "random direction"):
        for metric in ("steering_success", "steering_top"):
            assert found(result.rows, metric, "alpha 0", control).value == 0
    np.testing.assert_array_equal(c["kl_random"][:, 0], c["kl_steered"][:, 0])
    assert c["continuation_random_0"] == c["continuation_steered_0"]
    h = np.float32(np.random.default_rng(0).standard_normal((3, 32)) * 100)
    assert steering.steered(h, np.ones((3, 32)), 0.0).tobytes() == h.tobytes()


def test_a_pair_that_says_where_to_go_gets_there(nla, data):
    """With the donor's vector as delta's goal, and h itself short beside it, a strong push is the swap; the random one
    is not."""
    result = steering.run(Planted(nla, data), alphas=[1.0], continued=0)
    value = {r.control: r.value for r in result.rows if r.metric == "steering_success" and r.group != "alpha 0"}
    assert value[""] > value["random direction"] + 0.2 and value[steering.SWAP] > 0.5
    assert not any(r.metric == "coherence" for r in result.rows)


def test_what_is_left_out_is_said(nla, data):
    bad = np.zeros((len(data), 1), bool)
    bad[0] = True
    some = Planted(nla, data, reading=lambda t: np.ones(32) * (t == "row 3") + np.arange(32), bad=bad)
    result = steering.run(some, alphas=[1.0], continued=0)
    assert len(result.columns["row"]) == 2 and result.rows[0].n == 2  # row 3, and the row whose donor it is
    notes = " ".join(result.notes)
    assert "16 rows left out" in notes and "2 of 18 pairs have a failed explanation" in notes
    same = steering.run(Planted(nla, data, reading=lambda t: np.ones(32)))
    assert not same.rows and "nothing measured" in same.notes[-1]
    alone = steering.run(Planted(nla, data.take(np.arange(3))))
    assert not alone.rows and "one document" in alone.notes[0]
    for wrong in ([float("nan")], [float("inf")]):
        with pytest.raises(InputError, match="finite numbers"):
            steering.run(some, alphas=wrong)
    with pytest.raises(InputError, match="at least 1 token"):
        steering.run(some, max_new_tokens=0)
