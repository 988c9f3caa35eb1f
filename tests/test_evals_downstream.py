"""Downstream effect of reconstructions: against whole forward passes, float64 sums from the dump, and planted pairs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from eval_cases import Planted, found, mini_nla
from eval_documents import read_documents, whole_passes

from nla_jax.errors import InputError
from nla_jax.evals import downstream
from nla_jax.pair import NLA

AFTER = 6


@pytest.fixture(scope="module")
def nla(tmp_path_factory) -> NLA:
    return mini_nla(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def data(nla):
    return read_documents(nla)


def halfway(data):
    """A reading that is right but for noise as large as half the vector; of another length, which must not matter."""

    def reading(text: str) -> np.ndarray:
        i = int(text.split()[1]) if text.startswith("row") else 0
        h = data.vectors[i].astype(np.float64)
        noise = np.random.default_rng(i).standard_normal(len(h))
        return 7.0 * (h + 0.5 * np.linalg.norm(h) * noise / np.linalg.norm(noise))

    return reading


@pytest.fixture(scope="module")
def ctx(nla, data):
    bad = np.zeros((len(data), 1), bool)
    bad[[1, 6]] = True
    return Planted(nla, data, reading=halfway(data), bad=bad)


@pytest.fixture(scope="module")
def result(ctx):
    return downstream.run(ctx, after=AFTER)


@pytest.fixture(scope="module")
def whole(nla):
    return whole_passes(nla)


def test_columns_are_those_of_whole_forward_passes(result, ctx, data, whole):
    c = result.columns
    mean = data.train_mean_raw
    for i in (0, 4, 13):
        row, p = int(c["row"][i]), int(c["position"][i])
        h, tokens = data.vectors[row].astype(np.float64), data.tokens[row]
        read = halfway(data)(f"row {row}")
        m = int(c["tokens_after"][i])
        assert m == min(AFTER, len(tokens) - 1 - p)
        clean, next_m = whole(tokens, -1, h)[p : p + m], tokens[p + 1 : p + 1 + m]
        np.testing.assert_allclose(c["ce_clean"][i, :m], -clean[np.arange(m), next_m], rtol=1e-4, atol=1e-5)
        patched_with = {
            "reconstruction": read * np.linalg.norm(h) / np.linalg.norm(read),
            "mean": mean,
            "zero": np.zeros_like(h),
            "gold": h,
        }
        for name, vector in patched_with.items():
            log_q = whole(tokens, p, vector)[p : p + m]
            kl = np.sum(np.exp(clean) * (clean - log_q), axis=-1)
            np.testing.assert_allclose(c[f"kl_{name}"][i, :m], kl, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(c[f"ce_{name}"][i, :m], -log_q[np.arange(m), next_m], rtol=1e-4, atol=1e-5)
            assert np.isnan(c[f"kl_{name}"][i, m:]).all()


def test_every_number_follows_from_the_columns(result):
    c, rows = result.columns, result.rows
    for window in (1, 4, AFTER):
        for ablation in downstream.ABLATIONS:
            v = np.isfinite(c[f"kl_{ablation}"][:, 0])
            kl, kl_a, ce, ce_a, clean = (
                np.nansum(np.asarray(c[name], np.float64)[v, :window])
                for name in ("kl_reconstruction", f"kl_{ablation}", "ce_reconstruction", f"ce_{ablation}", "ce_clean")
            )
            group = f"next {window}, against {ablation}"
            row = found(rows, "kl_recovered", group)
            assert row.value == pytest.approx(1 - kl / kl_a, rel=1e-9)
            assert row.n == v.sum() and row.documents == 6 and row.low < row.value < row.high
            row = found(rows, "ce_recovered", group)
            if ce_a > clean:
                assert row.value == pytest.approx((ce_a - ce) / (ce_a - clean), rel=1e-9)
            else:
                assert row.value is None and "does not raise" in row.note
    head = {"group": f"next {AFTER}"}
    assert found(rows, "kl", **head).value == pytest.approx(np.nanmean(c["kl_reconstruction"]), rel=1e-9)
    assert found(rows, "ce", **head, control="clean").value == pytest.approx(np.nanmean(c["ce_clean"]), rel=1e-9)
    ok = ~np.asarray(c["failed"])
    kl, kl_a = (np.nansum(c[name][ok]) for name in ("kl_reconstruction", "kl_mean"))
    parsed = found(rows, "kl_recovered", f"next {AFTER}, against mean; parsed ones alone")
    assert parsed.value == pytest.approx(1 - kl / kl_a) and parsed.n == ok.sum()
    for t in (1, 4):
        curve = result.series["kl by offset, reconstruction"]
        assert curve["y"][curve["x"].index(t)] == pytest.approx(np.nanmean(c["kl_reconstruction"][:, t - 1]))


def test_gold_noise_and_what_is_said(result, data):
    rows = result.rows
    assert found(rows, "kl", f"next {AFTER}", "gold repatch").value < 1e-5
    against = f"next {AFTER}, against mean"
    assert found(rows, "kl_recovered", against, "gold repatch").value == pytest.approx(1, abs=1e-4)
    for control in ("noise of matched norm", "shuffled pairs", "text-only writer"):
        assert found(rows, "kl_recovered", against, control).value is not None
    assert any("1 of 18 rows end their document" in note for note in result.notes)
    assert any("2 of 17 explanations failed" in note for note in result.notes)
    assert any("mean of the training rows" in note for note in result.notes)
    c = result.columns
    h, read = (c[name].astype(np.float64) for name in ("vector", "vector_reconstruction"))
    np.testing.assert_allclose(np.linalg.norm(read, axis=1), np.linalg.norm(h, axis=1), rtol=1e-5)
    without = np.array([data.teacher[r] is None for r in c["row"]])
    assert np.isnan(c["kl_text_only"][without]).all() and np.isfinite(c["kl_text_only"][~without, 0]).all()


def test_a_perfect_pair_recovers_everything(nla, data):
    result = downstream.run(Planted(nla, data), after=2)
    for row in result.rows:
        if row.metric.endswith("recovered") and not row.control and row.value is not None:
            assert row.value == pytest.approx(1, abs=2e-3)
        if row.metric == "kl" and not row.control:
            assert row.value < 1e-5


def test_the_same_again_and_row_by_row(nla, data, result):
    """A row's numbers depend on nothing but the row, its partner and the seed."""
    again = downstream.run(Planted(nla, data, reading=halfway(data)), after=AFTER)
    np.testing.assert_array_equal(again.columns["kl_noise"], result.columns["kl_noise"])
    one = downstream.run(Planted(nla, data.take(np.array([4])), reading=lambda t: halfway(data)("row 4")), after=AFTER)
    i = list(result.columns["row"]).index(4)
    for name in ("kl_noise", "kl_reconstruction"):
        np.testing.assert_allclose(one.columns[name][0], result.columns[name][i], rtol=1e-4, atol=1e-6)


def test_windows_that_hold_the_same_tokens_are_one():
    assert downstream._windows(40, 32) == [1, 4, 8, 16, 32]
    assert downstream._windows(5, 32) == [1, 4, 8] and downstream._windows(4, 32) == [1, 4]
    assert downstream._windows(1, 32) == [1] and downstream._windows(9, 6) == [1, 4, 6]


def test_one_document_no_tokens_and_readings_without_direction(nla, data):
    alone = data.take(np.arange(3))
    zero = Planted(nla, alone, reading=lambda text: np.zeros(32))
    result = downstream.run(zero, after=1)
    assert not any("resample" in row.group or row.control == "shuffled pairs" for row in result.rows)
    notes = " ".join(result.notes)
    assert "one document" in notes and "2 readings have no direction" in notes
    row = found(result.rows, "kl_recovered", "next 1, against mean")
    assert row.value == 0 and row.low is None and "one document: no interval" in row.note
    ends = dataclasses.replace(alone.take(np.array([2])))
    empty = downstream.run(Planted(nla, ends), after=1)
    assert not empty.rows and "nothing to measure" in empty.notes[-1]
    with pytest.raises(InputError, match="at least 1"):
        downstream.run(Planted(nla, alone), after=0)
