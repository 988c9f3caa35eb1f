"""The suite of FVEs against planted answers and a float64 computation, and the files that an evaluation leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from eval_cases import D, Planted, columns, found, mini_nla, rows

from nla_jax.errors import InputError
from nla_jax.evals import controls, fve, run
from nla_jax.evals.result import Row, SuiteResult, from_json, plain
from nla_jax.evals.token_class import token_class
from nla_jax.pair import NLA

VARIANCE = 0.6
SCALE = math.sqrt(D)


@pytest.fixture(scope="module")
def nla(tmp_path_factory) -> NLA:
    return mini_nla(tmp_path_factory.mktemp("pair"), VARIANCE)


def unit(v: np.ndarray) -> np.ndarray:
    v = np.asarray(v, np.float64)
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


# -- planted answers -------------------------------------------------------------------------------------------------


def test_a_perfect_pair(nla):
    result = fve.run(Planted(nla, rows()))
    for metric in ("fve_nrm", "fve_meannorm", "fve_calibrated", "fve_nrm_median", "cosine", "cosine_median"):
        row = found(result.rows, metric)
        assert row.value == row.low == row.high == pytest.approx(1, abs=1e-6), metric
        assert (row.n, row.documents) == (200, 40)
    assert found(result.rows, "mse_nrm_median").value == pytest.approx(0, abs=1e-9)
    assert found(result.rows, "norm_error_median").value == pytest.approx(0, abs=1e-6)
    assert found(result.rows, "fve_nrm", "masked").n == 20
    # The wrong explanations are worth nothing.
    wrong = found(result.rows, "fve_calibrated", control="shuffled pairs")
    assert abs(wrong.value) < 0.02 and wrong.low is not None and wrong.n == 200
    assert found(result.rows, "fve_nrm", control="shuffled pairs").value < -0.5
    assert found(result.rows, "failed").value == 0


def test_a_constant_reading_gives_the_analytic_floor(nla):
    data = rows()
    # The floor is exact where the denominator is that of the same rows about their mean.
    own = unit(data.vectors[:200]) * SCALE
    variance = float(np.mean((own - own.mean(axis=0)) ** 2))
    bare = NLA(av=nla.av, ar=nla.ar, variance_nrm=variance)
    floor = 1 - 2 * (1 - math.sqrt(1 - variance)) / variance
    data = dataclasses.replace(data, train_mean_nrm=None)
    result = fve.run(Planted(bare, data, reading=lambda text: own.mean(axis=0)))
    assert found(result.rows, "fve_nrm").value == pytest.approx(floor, abs=1e-6)
    assert found(result.rows, "fve_nrm", control="constant floor").value == pytest.approx(floor, abs=1e-12)
    assert found(result.rows, "fve_nrm", control="constant predictor").value == pytest.approx(floor, abs=1e-9)
    assert found(result.rows, "fve_meannorm").value == pytest.approx(0, abs=1e-6)
    assert found(result.rows, "fve_calibrated").value == pytest.approx(0, abs=1e-9)
    assert found(result.rows, "fve_nrm", control="constant floor").low is None


def test_the_best_length_and_no_other(nla):
    """fve_raw does not depend on the lengths of the AR's vectors, and is 1 for vectors of one length."""
    data = rows()
    equal = dataclasses.replace(data, vectors=(unit(data.vectors) * 7).astype(np.float32))
    rng = np.random.default_rng(0)
    sizes = rng.uniform(0.1, 100, len(data))
    reading = lambda text: equal.vectors[int(text.split()[1])] * sizes[int(text.split()[1])]  # noqa: E731
    result = fve.run(Planted(nla, equal, reading=lambda t: reading(t) if t.startswith("row") else np.ones(D)))
    assert found(result.rows, "fve_raw").value == pytest.approx(1, abs=1e-6)
    perfect = fve.run(Planted(nla, data))
    h = data.vectors[:200].astype(np.float64)
    u = unit(h)
    a = np.sum(h * u) / np.sum(u * u)
    about = h - data.train_mean_raw
    assert found(perfect.rows, "fve_raw").value == pytest.approx(1 - np.sum((h - a * u) ** 2) / np.sum(about**2))
    assert "direction" in found(perfect.rows, "fve_raw").note


def test_failed_texts_are_orthogonal_guesses(nla):
    data = rows()
    bad = (np.arange(len(data)) % 4 == 0)[:, None]
    result = fve.run(Planted(nla, data, bad=bad))
    assert found(result.rows, "fve_nrm").value == pytest.approx(1 - 0.25 * 2 / VARIANCE, abs=1e-6)
    assert found(result.rows, "failed").value == 0.25
    assert found(result.rows, "cosine").value == pytest.approx(0.75, abs=1e-6)
    assert found(result.rows, "norm_error_median").n == 150
    nan = lambda text: np.full(D, np.nan) if text == "row 3" else data.vectors[5]  # noqa: E731
    result = fve.run(Planted(nla, data, reading=nan))
    assert result.columns["mse_nrm"][3] == 2 and math.isfinite(found(result.rows, "fve_calibrated").value)


def test_one_document(nla):
    data = rows(10, 10, 0)
    result = fve.run(Planted(nla, data))
    row = found(result.rows, "fve_nrm")
    assert row.value == pytest.approx(1, abs=1e-6) and row.low is None and "one document: no interval" in row.note
    assert any("no shuffled pairs: the rows are of one document" in note for note in result.notes)


def test_controls_that_the_data_cannot_give(nla):
    data = rows()
    bare = dataclasses.replace(data, train=None, teacher=[None] * len(data))
    result = fve.run(Planted(nla, bare))
    assert any("no nearest training vector's text" in note for note in result.notes)
    assert any("no text-only writer" in note for note in result.notes)
    assert {r.control for r in result.rows} == {"", "constant floor", "constant predictor", "shuffled pairs"}


# -- every number again, in float64, from what was dumped --------------------------------------------------------------


@pytest.fixture(scope="module")
def dumped(nla, tmp_path_factory) -> tuple[dict, dict, Planted]:
    """An imperfect pair's results and its table as read back from the file."""
    data = rows()
    rng = np.random.default_rng(5)
    noise = rng.standard_normal(data.vectors.shape) * np.linalg.norm(data.vectors, axis=1, keepdims=True) / 6
    bad = (rng.random((len(data), 1)) < 0.1).astype(bool)

    def reading(text: str) -> np.ndarray:
        kind, number = text.split()
        if kind == "row":
            return data.vectors[int(number)] + noise[int(number)]
        if kind == "teacher":
            return data.vectors[int(number)] + 3 * noise[int(number)]
        return np.random.default_rng(int(number)).standard_normal(D) + np.linspace(-1, 1.5, D)

    out = tmp_path_factory.mktemp("out")
    ctx = Planted(nla, data, reading=reading, bad=bad, out=out)
    results = run.evaluate(ctx, ["fve"], out, command=["nla", "eval"])
    return results, columns(out / "fve.parquet"), ctx


def test_every_number_from_the_dump(dumped):
    results, table, ctx = dumped
    table_rows = [Row(**row) for row in results["suites"][0]["rows"]]
    v, p = table["vector"].astype(np.float64), table["predicted"].astype(np.float64)
    failed, masked, docs = table["failed"], table["masked"], table["doc"]
    p = np.where(failed[:, None], 0, p)
    vn = unit(v) * SCALE
    pn = p * (SCALE / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-12))
    error = np.where(failed, 2.0, np.mean((pn - vn) ** 2, axis=1))
    main = ~masked
    np.testing.assert_allclose(table["mse_nrm"], error, atol=1e-12)
    checked = set()

    def same(value: float, metric: str, group: str = "", control: str = "") -> Row:
        row = found(table_rows, metric, group, control)
        assert row.value == pytest.approx(value, rel=1e-9, abs=1e-12), (metric, group, control)
        assert row.low is None or row.low <= row.value <= row.high
        checked.add((metric, group, control))
        return row

    def calibrated(a: np.ndarray, b: np.ndarray) -> float:
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        inner = np.sum(a * b)
        return np.sign(inner) * inner**2 / (np.sum(a * a) * np.sum(b * b))

    baseline = 2 * (1 - math.sqrt(1 - VARIANCE))
    mean = ctx.data.train_mean_raw
    u = pn / SCALE
    a = np.sum(v[main] * u[main]) / np.sum(u[main] * u[main])
    spread = np.sum((v[main] - mean) ** 2)
    cosine = np.sum(unit(v) * u, axis=1)
    same(1 - error[main].mean() / VARIANCE, "fve_nrm")
    same(1 - error[main].mean() / baseline, "fve_meannorm")
    same(calibrated(pn[main], vn[main]), "fve_calibrated")
    same(1 - np.sum((v[main] - a * u[main]) ** 2) / spread, "fve_raw")
    same(1 - np.median(error[main]) / VARIANCE, "fve_nrm_median")
    same(cosine[main].mean(), "cosine")
    same(np.median(cosine[main]), "cosine_median")
    same(np.median(error[main]), "mse_nrm_median")
    ok = main & ~failed
    size = np.linalg.norm(v, axis=1)
    same(np.median(np.abs(np.linalg.norm(p, axis=1) - size)[ok] / size[ok]), "norm_error_median")
    same(failed[main].mean(), "failed")
    same(table["length"][main].mean(), "length")
    same(1 - error[masked].mean() / VARIANCE, "fve_nrm", "masked")
    same(calibrated(pn[masked], vn[masked]), "fve_calibrated", "masked")
    same(1 - error[main].mean() / VARIANCE, "fve_nrm", "layer 2")
    for low, high in ((50, 99), (100, 199), (200, 399), (400, 10**6)):
        part = main & (table["position"] >= low) & (table["position"] <= high)
        name = f"{low}-{high}" if high < 10**6 else f"{low}+"
        row = same(1 - error[part].mean() / VARIANCE, "fve_nrm", f"position {name}")
        assert (row.n, row.documents) == (part.sum(), len(set(docs[part])))
    # Controls.
    same(1 - baseline / VARIANCE, "fve_nrm", control="constant floor")
    mu = unit(ctx.data.train_mean_nrm) * SCALE
    same(1 - np.mean((vn[main] - mu) ** 2) / VARIANCE, "fve_nrm", control="constant predictor")
    other = table["shuffled_with"]
    own = other >= 0
    assert (docs[own] != docs[other[own]]).all() and own.sum() == 200
    wrong = np.where(failed[own], 2.0, np.mean((pn[own] - vn[other[own]]) ** 2, axis=1))
    same(1 - wrong.mean() / VARIANCE, "fve_nrm", control="shuffled pairs")
    same(calibrated(pn[own], vn[other[own]]), "fve_calibrated", control="shuffled pairs")
    train = unit(ctx.data.train(300)[0]) * SCALE - ctx.data.train_mean_nrm
    nearest = np.argmax(unit(vn[main] - ctx.data.train_mean_nrm) @ unit(train).T, axis=1)
    assert table["text_nearest"][:200] == [f"train {i}" for i in nearest]
    for short, name in (("nearest", "nearest training vector's text"), ("teacher", "text-only writer")):
        reading = table[f"predicted_{short}"].astype(np.float64)
        there = np.isfinite(reading).all(axis=1)
        assert [t is not None for t in table[f"text_{short}"]] == there.tolist() and not there[masked].any()
        rn = unit(reading[there]) * SCALE
        row = same(1 - np.mean((rn - vn[there]) ** 2) / VARIANCE, "fve_nrm", control=name)
        assert row.n == there.sum()
        same(calibrated(rn, vn[there]), "fve_calibrated", control=name)
    same(0.0, "fve_calibrated", control="constant predictor")
    assert checked == {(r.metric, r.group, r.control) for r in table_rows}, "a number that nothing here computes"
    assert all(r.denominator for r in table_rows if r.metric.startswith("fve"))
    assert all(r.low is not None for r in table_rows if r.control != "constant floor")
    np.testing.assert_allclose(table["squared_from_mean"], np.sum((v - mean) ** 2, axis=1))


def test_buckets_and_pairings():
    positions = np.array([0, 9, 10, 19, 20, 39, 40, 79, 80, 5000, -1])
    found_ = {name: positions[at].tolist() for name, at in fve.buckets(positions, 10)}
    assert found_ == {"0-9": [0, 9], "10-19": [10, 19], "20-39": [20, 39], "40-79": [40, 79], "80+": [80, 5000]}
    assert list(dict(fve.buckets(np.array([60]), 50))) == ["50-99"]
    rng = np.random.default_rng(0)
    for _ in range(100):
        docs = rng.integers(0, rng.integers(2, 30), int(rng.integers(2, 60)))
        other = controls.other_documents(docs)
        assert sorted(other.tolist()) == list(range(len(docs)))
        if np.bincount(docs).max() <= len(docs) // 2:
            assert (docs[other] != docs).all()


def test_the_nearest_vector_whatever_the_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    a, b, mean = rng.standard_normal((9, 8)), rng.standard_normal((50, 8)), rng.standard_normal(8) / 5
    scale = math.sqrt(8)
    cosine = unit(unit(a) * scale - mean) @ unit(unit(b) * scale - mean).T
    for size in (1 << 24, 60):
        monkeypatch.setattr(controls, "_BLOCK", size)
        np.testing.assert_array_equal(controls.nearest(a, b, mean, scale), cosine.argmax(axis=1))


@pytest.mark.parametrize(
    ("token", "before", "kind"),
    [
        (" ship", "the", "word start"),
        ("ship", "\n", "word start"),
        ("Ship", '"', "word start"),
        ("ping", " ship", "word continuation"),
        ("'s", " ship", "word continuation"),
        ("naïve", " ", "word start"),
        (" 12", "of", "number"),
        ("3", "1", "number"),
        ("½", "", "number"),
        (",", "a", "punctuation"),
        (" (", "a", "punctuation"),
        ("\n\n", ".", "white space"),
        (" ", "a", "white space"),
        ("3rd", " ", "other"),
        ("\ufffd", "a", "other"),
        ("", "a", "other"),
    ],
)
def test_kinds_of_tokens(token, before, kind):
    assert token_class(token, before) == kind


# -- files -----------------------------------------------------------------------------------------------------------


def test_what_results_rest_on(dumped, nla):
    results, _, ctx = dumped
    assert results["format"] == "nla_jax.eval" and results["command"] == ["nla", "eval"]
    assert set(results["models"]) == {"av", "ar", "target"}
    for name, model in results["models"].items():
        assert model["path"] == str(getattr(nla, name).path) and len(model["weights"]) == len(model["facts"]) == 64
    assert results["layer_aliases"]["hidden_states"] == "hidden_states[3]"
    assert results["fve_nrm_denominator"]["variance_nrm"] == VARIANCE
    assert results["fve_nrm_denominator"]["source"] == "AR sidecar"
    assert results["data"]["n"] == 200 and results["data"]["documents"] == 40 and results["data"]["hash"] == "h"
    assert results["settings"]["seed"] == 42 and {"jax", "scipy", "numpy"} <= set(results["versions"])
    series = results["suites"][0]["series"]["fve_nrm by position"]
    assert series["x"] == ["50-99", "100-199", "200-399", "400+"] and len(series["low"]) == 4


def files(out: Path) -> dict[str, bytes]:
    """What an evaluation left, without what may differ between runs."""
    left = {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    results = json.loads(left["results.json"])
    del results["run"]
    return {**left, "results.json": json.dumps(results).encode()}


def test_a_suite_that_is_done_is_not_done_again(nla, tmp_path, monkeypatch):
    data, out = rows(), tmp_path / "out"
    done: list[str] = []
    real = fve.run
    monkeypatch.setattr(fve, "run", lambda ctx, **settings: done.append("fve") or real(ctx, **settings))
    first = run.evaluate(Planted(nla, data), ["fve"], out)
    before = files(out)
    notes: list[str] = []
    again = run.evaluate(Planted(nla, data), ["fve"], out, note=notes.append)
    assert done == ["fve"] and notes == ["fve: done already, with the same models, data and settings"]
    assert files(out) == before and again["suites"] == first["suites"] and "fve" in first["run"]["seconds"]
    # Elsewhere, to the byte.
    run.evaluate(Planted(nla, data), ["fve"], tmp_path / "other")
    assert files(tmp_path / "other") == before and len(done) == 2
    # Anything that decides the result, or a file that is gone.
    run.evaluate(Planted(nla, data, seed=1), ["fve"], out)
    run.evaluate(Planted(nla, data, seed=1), ["fve"], out, {"fve": {"nearest": 10}})
    run.evaluate(Planted(nla, dataclasses.replace(data, teacher=[None] * len(data))), ["fve"], out)
    assert len(done) == 5
    run.evaluate(Planted(nla, data), ["fve"], out)
    (out / "fve.parquet").unlink()
    run.evaluate(Planted(nla, data), ["fve"], out)
    (out / "suites" / "fve.json").write_text("{ torn")
    run.evaluate(Planted(nla, data), ["fve"], out)
    assert len(done) == 8 and files(out) == before


def test_an_edited_weight_is_another_model(tmp_path):
    """A hash of samples would not see one number; the suite has to be done again."""
    pair = mini_nla(tmp_path / "pair", VARIANCE)
    before = run.suite_key(Planted(pair, rows()), "fve", {})
    file = next(Path(pair.ar.path).glob("model*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    assert run.suite_key(Planted(pair, rows()), "fve", {}) != before


@pytest.fixture
def suites(monkeypatch):
    """Two small suites instead of the real ones: "fve" works, "retrieval" needs tokens or fails as it is told."""

    def planted(name: str, needs: set[str], error: Exception | None = None):
        def call(ctx, **settings):
            if error is not None:
                raise error
            return SuiteResult(name, (Row("x", float("nan"), n=1),), settings=settings)

        module = types.SimpleNamespace(NAME=name, needs=frozenset(needs), run=call)
        monkeypatch.setitem(sys.modules, f"nla_jax.evals.planted_{name}", module)
        return f"planted_{name}"

    def install(**which):
        monkeypatch.setattr(run, "SUITES", {name: planted(name, *given) for name, given in which.items()})

    return install


def test_suites_that_cannot_be_done(nla, tmp_path, suites):
    suites(fve=(set(),), retrieval=({"tokens"},), claims=(set(), InputError("no claims", fix="more")))
    ctx = Planted(nla, rows())
    results = run.evaluate(ctx, None, tmp_path / "out")
    assert [s["suite"] for s in results["suites"]] == ["fve"] and results["suites"][0]["rows"][0]["value"] is None
    assert [s["suite"] for s in results["skipped"]] == ["retrieval", "claims"]
    assert "parquet" in results["skipped"][0]["reason"] and "no claims" in results["skipped"][1]["reason"]
    for name, match in (("retrieval", "tokens"), ("claims", "no claims"), ("nothing", "--suite: expected fve")):
        with pytest.raises(InputError, match=match):
            run.evaluate(ctx, [name], tmp_path / "out")
    with pytest.raises(InputError, match="settings of a suite"):
        run.evaluate(ctx, ["fve"], tmp_path / "out", {"nothing": {}})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run.evaluate(ctx, ["fve"], tmp_path / "file" / "out")


def test_results_as_json():
    row = Row("x", np.float32(0.5), float("nan"), None, n=np.int64(3))
    result = SuiteResult("s", (row,), ("note",), {"a": np.zeros(2)}, {"k": np.arange(2)}, {"p": {"x": (1, 2)}})
    content = json.loads(json.dumps(result.json(), allow_nan=False))
    assert content["rows"][0] == {**row.json(), "low": None} and content["settings"] == {"k": [0, 1]}
    back = from_json(content)
    assert back.rows[0].value == 0.5 and back.series == {"p": {"x": [1, 2]}} and back.json() == content
    assert plain({1: float("inf"), "b": True}) == {"1": None, "b": True}
