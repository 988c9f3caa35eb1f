"""Held-out evaluation: which rows it is of, that it is always the same, and what planted predictions get."""

from __future__ import annotations

import dataclasses
import math
import shutil

import numpy as np
import pytest
import training
from training import World, bits

from nla_jax import metrics
from nla_jax.errors import StoreError
from nla_jax.store import Store
from nla_jax.train import evaluate


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return training.make_world(tmp_path_factory)


@pytest.mark.parametrize("stage", ["lm", "ar", "av", "rl"])
def test_evaluation_is_deterministic_and_does_not_touch_the_state(world, stage):
    changes = {} if stage == "lm" else {"eval_rows": 16}
    task, again = world.task(stage, **changes), world.task(stage, seed=7, **changes)
    state = task.init()
    before = bits(state)
    scores, rows = task.evaluate(state, 0)
    next(task.loader())
    assert task.evaluate(state, 3) == (scores, rows)
    if stage != "lm":  # whose weights are the seed's
        again.init()
        assert again.evaluate(state, 0) == (scores, rows)
        assert len(rows) == (0 if stage == "av" else 16)
    assert bits(state) == before
    assert scores and all(name.startswith("eval/") and math.isfinite(value) for name, value in scores.items())
    assert task.best[0] in scores


def test_held_out_rows_are_of_documents_that_nothing_was_trained_on(world):
    made = world.build()
    docs = made.store.table()["doc"]
    trained = {name: set(docs[made.rows(name)].tolist()) for name in made.sets}
    assert set(trained) == {"av_sft", "ar_sft", "rl"} and all(trained.values())
    assert not any(a & b for i, a in enumerate(trained.values()) for b in list(trained.values())[:i])
    for stage in ("ar", "av", "rl"):
        held = world.task(stage, eval_rows=40).held
        assert len(held) == 40 and not set(held.docs.tolist()) & set().union(*trained.values())
        np.testing.assert_array_equal(held.docs, docs[held.rows])
        np.testing.assert_array_equal(held.vectors, made.store.vectors(held.rows))
    # One of each document before a second of any.
    held = evaluate.held_out(made, None, 10)
    assert len(set(held.docs.tolist())) == 10
    place = held.rows - np.searchsorted(docs, held.docs)  # among the rows of its document
    assert len(set(place.tolist())) > 1, "only the earliest positions are evaluated"
    texts = held.contexts
    assert all(made.store.prefixes(held.rows)[i] == texts[i] for i in range(10))


def test_another_store_to_evaluate_on(world, tmp_path):
    """All documents of another store count; those of the same store by another path do not."""
    same = shutil.copytree(world.store, tmp_path / "copy")
    task = world.task("av", eval_rows=24, eval_store=str(same))
    assert (Store.open(same).doc_splits[task.held.docs] == -1).all()
    other = training.other_store(world, tmp_path / "other")
    for stage in ("ar", "rl"):
        task = world.task(stage, eval_rows=16, eval_store=str(other))
        assert len(task.held) == 16
        np.testing.assert_array_equal(task.held.vectors, Store.open(other).vectors(task.held.rows))
        scores, _ = task.evaluate(task.init(), 0)
        assert all(math.isfinite(value) for value in scores.values())


def test_without_held_out_documents(world, tmp_path):
    full = shutil.copytree(world.store, tmp_path / "full")
    training.build_sets(world, full, (0.3, 0.3, 0.4))
    with pytest.raises(StoreError, match="no held-out rows.*nla build --fractions"):
        world.task("rl", store=str(full))
    assert world.task("rl", store=str(full), eval_rows=0).evaluate(None, 0) == ({}, [])


def test_the_pairing_never_pairs_a_document_with_itself():
    rng = np.random.default_rng(0)
    for _ in range(300):
        docs = rng.integers(0, rng.integers(2, 30), int(rng.integers(2, 60)))
        other = evaluate.other_documents(docs)
        assert sorted(other.tolist()) == list(range(len(docs)))
        if np.bincount(docs).max() <= len(docs) // 2:
            assert (docs[other] != docs).all()


def held_of(vectors: np.ndarray, docs: np.ndarray) -> evaluate.HeldOut:
    n = len(vectors)
    return evaluate.HeldOut(vectors, np.arange(n), docs.astype(np.int32), [""] * n, [None] * n)


def scores_of(predicted: np.ndarray, held: evaluate.HeldOut, failed: np.ndarray | None = None) -> dict[str, float]:
    n, scale = len(held), math.sqrt(held.vectors.shape[1])
    failed = np.zeros(n, bool) if failed is None else failed
    variance = metrics.variance_nrm(held.vectors, scale)
    return evaluate.text_scores([""] * n, failed, held, lambda texts: predicted, scale, variance)[0]


def test_planted_predictions_get_the_scores_they_deserve():
    rng = np.random.default_rng(1)
    n, D = 600, 16
    vectors = (rng.standard_normal((n, D)) + np.linspace(0, 2, D)).astype(np.float32) * 9
    held = held_of(vectors, np.arange(n) // 3)
    mean = vectors.mean(axis=0)
    own = scores_of(vectors * 3, held)
    assert own["eval/fve_nrm"] == pytest.approx(1, abs=1e-6)
    assert own["eval/fve_calibrated"] == pytest.approx(1, abs=1e-6)
    assert own["eval/fve_shuffled"] < -0.5 and abs(own["eval/fve_shuffled_calibrated"]) < 0.02
    opposite = scores_of(2 * mean - vectors, held)
    assert opposite["eval/fve_calibrated"] < -0.5
    noise = scores_of(rng.standard_normal((n, D)), held)
    assert abs(noise["eval/fve_calibrated"]) < 0.02 and noise["eval/fve_nrm"] < 0
    constant = scores_of(np.repeat(mean[None], n, 0), held)
    assert abs(constant["eval/fve_calibrated"]) < 1e-6
    # Failed samples and predictions that are no numbers are orthogonal guesses, whatever the AR made of their text.
    bad = np.arange(n) % 4 == 0
    half = scores_of(np.where(bad[:, None], np.nan, vectors), held, np.arange(n) % 4 == 1)
    variance = metrics.variance_nrm(vectors, 4.0)
    assert half["eval/fve_nrm"] == pytest.approx(1 - 0.5 * 2 / variance, abs=1e-6)
    assert half["eval/cosine"] == pytest.approx(0.5, abs=1e-6)
    one = scores_of(vectors, dataclasses.replace(held, docs=np.zeros(n, np.int32)))
    assert "eval/fve_shuffled" not in one, "a document was paired with itself"


def test_the_floor_of_a_constant_prediction():
    """Against the best constant direction, found in numpy: that of the mean of the normalised vectors."""
    rng = np.random.default_rng(2)
    D = 12
    for shift in (0.2, 1.0, 4.0):
        v = rng.standard_normal((5000, D)) + shift
        variance = metrics.variance_nrm(v, math.sqrt(D))
        unit = v * math.sqrt(D) / np.linalg.norm(v, axis=1, keepdims=True)
        guess = unit.mean(axis=0)
        guess = guess * math.sqrt(D) / np.linalg.norm(guess)
        fve = 1 - np.mean((unit - guess) ** 2) / np.mean((unit - unit.mean(axis=0)) ** 2)
        floor = metrics.constant_floor(variance)
        assert floor == pytest.approx(fve, abs=1e-9)
        assert floor == pytest.approx(1 - 2 * (1 - math.sqrt(1 - variance)) / variance)
