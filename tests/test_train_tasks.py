"""The stages as tasks: poisoned batches, frozen halves, and options against plain runs."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
import pytest
import training
from training import World, bits, finite, lines, restored

from nla_jax.claims import idle_shares, split_claims
from nla_jax.errors import InputError
from nla_jax.models.sampler import Samples
from nla_jax.prompt import ar_prompt_ids
from nla_jax.train.rl import rollout, step_keys
from nla_jax.train.texts import decode_texts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return training.make_world(tmp_path_factory)


def first_step(world: World, stage: str, batch: Any = None, **changes: Any) -> tuple[Any, dict[str, float], Any]:
    """(state, metrics, batch) after one step from the beginning."""
    task = world.task(stage, eval_rows=0, **changes)
    state = task.init()
    batch = next(task.loader()) if batch is None else batch
    state, values = task.step(state, batch, 0)
    return state, {k: float(v) for k, v in values.items()}, batch


# -- poisoned batches ----------------------------------------------------------------------------------------------


POISONS = {
    "nan": lambda v: np.full_like(v, np.nan),
    "one infinity": lambda v: np.where(np.arange(v.size) == 3, np.inf, v).astype(np.float32),
    "zero": np.zeros_like,
    "huge": lambda v: v * np.float32(1e12),
    "overflows when squared": lambda v: v * np.float32(1e30),
    "tiny": lambda v: v * np.float32(1e-12),
}


def vectors_of(batch: Any) -> dict[str, np.ndarray]:
    """The part of a batch that holds the vectors that are poisoned."""
    return batch["rl"] if "rl" in batch else batch


def poisoned(batch: Any, how: str, rows: slice) -> Any:
    part = dict(vectors_of(batch))
    part["vectors"] = part["vectors"].copy()
    for row in part["vectors"][rows]:
        row[:] = POISONS[how](row)
    return {**batch, "rl": part} if "rl" in batch else part


def without(batch: Any, row: int) -> Any:
    """The same batch, whose row counts as padding."""
    part = dict(vectors_of(batch))
    part["valid"] = part["valid"].copy()
    part["valid"][row] = False
    if "loss_mask" in part:
        part["loss_mask"] = part["loss_mask"] & part["valid"][:, None]
    return {**batch, "rl": part} if "rl" in batch else part


@pytest.mark.parametrize("stage", ["ar", "av", "rl"])
def test_a_poisoned_row_is_left_out_and_counted(world, stage):
    """The update is that of the batch without the row, to the bit: nothing of it gets through."""
    _, clean, batch = first_step(world, stage)
    assert clean["bad_vectors"] == 0 and clean["skipped"] == 0
    expected, values, _ = first_step(world, stage, without(batch, 1))
    assert values["bad_vectors"] == 0
    for how in POISONS:
        state, values, _ = first_step(world, stage, poisoned(batch, how, slice(1, 2)))
        assert values["bad_vectors"] == 1 and values["skipped"] == 0, how
        assert bits(state) == bits(expected), how
        assert all(math.isfinite(v) for v in values.values()), how


class Poisoned:
    """A loader whose batches are poisoned at some steps."""

    def __init__(self, loader: Any, steps: dict[int, tuple[str, slice]]):
        self.loader, self.steps, self.number = loader, steps, 0

    def __next__(self) -> Any:
        batch, self.number = next(self.loader), self.number + 1
        how = self.steps.get(self.number - 1)
        return batch if how is None else poisoned(batch, *how)

    def state(self) -> Any:
        return self.loader.state()


@pytest.mark.parametrize("stage", ["ar", "av", "rl"])
def test_a_run_over_poisoned_batches(world, stage, tmp_path):
    task = world.task(stage, steps=6, eval_rows=0)
    everything = slice(None)
    loader = Poisoned(task.loader(), {1: ("nan", slice(0, 2)), 2: ("nan", everything), 4: ("huge", everything)})
    task.loader = lambda: loader
    assert training.quietly(task, tmp_path).step == 6
    rows = {row["step"]: row for row in lines(tmp_path / stage) if "loss" in row or "av/loss" in row}
    n = 4 if stage == "rl" else 16
    assert [rows[step]["bad_vectors"] for step in range(1, 7)] == [0, 2, n, 0, n, 0]
    _, state, meta = restored(world.task(stage, steps=6, eval_rows=0), tmp_path / stage)
    assert finite(state) and bits(state) != bits(task.init())
    assert meta["tally"]["totals"]["bad_vectors"] == 2 + 2 * n


def babbling(task: Any) -> Any:
    """The task, its AV drawing all tokens alike, so that no explanation is ever closed."""
    make = task.init

    def init() -> Any:
        state = make()
        av = state.av.params
        return state.replace(av=state.av.replace(params=av.replace(lm_head=0 * av.lm_head)))

    task.init = init
    return task


@pytest.mark.parametrize("why", ["babble", pytest.param("cut", marks=pytest.mark.slow)])
def test_where_every_sample_fails_nothing_is_learned(world, why, tmp_path):
    """All rewards are those of an orthogonal guess; the AR has no text."""
    options = {"steps": 3, "replay_ar": 0.0}
    if why == "cut":  # two tokens cannot close an explanation
        options |= {"max_new_tokens": 2, "replay_av": 0.0}
    task = world.task("rl", **options)
    task = babbling(task) if why == "babble" else task
    before = task.init()
    result = training.quietly(task, tmp_path)
    rows = [row for row in lines(tmp_path / "rl") if "reward" in row]
    assert [row["parse_failures"] for row in rows] == [16.0] * 3
    assert all(row["failed_share"] == 1 and row["reward"] == -2 and row["mse_nrm"] == 2 for row in rows)
    assert all(row["reward_std_in_group"] == 0 and row["skipped"] == 0 for row in rows)
    _, state, meta = restored(task, tmp_path / "rl")
    assert bits(state.ar.params) == bits(before.ar.params)
    for new, old in zip(jax.tree.leaves(state.av.params), jax.tree.leaves(before.av.params), strict=True):
        assert np.abs(np.asarray(new) - np.asarray(old)).max() <= 3 * 1e-3 * 1.01
    assert finite(state) and meta["tally"]["totals"]["parse_failures"] == 48
    assert result.evaluation["eval/failed_share"] == 1
    assert result.evaluation["eval/fve_nrm"] == pytest.approx(1 - 2 / task.variance)


def test_cut_untagged_and_empty_explanations_have_failed(world):
    role = world.task("rl", eval_rows=0).av
    texts = ["<explanation>\na b\n</explanation>", "<explanation>\n\n</explanation>", "a b", "<explanation>\na b\n", ""]
    ids = [role.tokenizer.encode(text) for text in texts]
    ids = [*(row + [role.tokenizer.eos_id] for row in ids), ids[0]]  # the last: closed, but cut
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for line, row in zip(tokens, ids, strict=True):
        line[: len(row)] = row
    stopped = np.asarray([True] * len(texts) + [False])
    lengths = np.asarray([len(row) for row in ids], np.int32)
    found = decode_texts(Samples(tokens, np.zeros(tokens.shape, np.float32), lengths, stopped), role.tokenizer)
    assert found.failed.tolist() == [False, True, True, True, True, True]
    assert found.texts[0] == "a b"


def test_an_empty_explanation_is_read_like_any_other(world):
    """In a store there is none (teachers' are dropped); in a batch it is a prompt around nothing."""
    role = world.task("ar", eval_rows=0).role
    _, _, batch = first_step(world, "ar")
    ids = ar_prompt_ids(role.tokenizer, role.sidecar, "")
    batch["tokens"][:, :] = 0
    batch["tokens"][:, : len(ids)] = ids
    batch["lengths"][:] = len(ids)
    state, values, _ = first_step(world, "ar", batch)
    assert finite(state) and math.isfinite(values["loss"]) and values["skipped"] == 0


@pytest.mark.parametrize("stage", ["lm", "ar", "av"])
def test_a_huge_gradient_is_not_taken_and_counted(world, stage):
    task = world.task(stage, optim={"lr": 1e-3, "skip_above": 1e-9, "steps": 20})
    start = task.init()
    state, values = task.step(task.init(), next(task.loader()), 0)
    assert float(values["skipped"]) == 1 and (int(state.skipped), int(state.step)) == (1, 0)
    assert bits((state.params, state.opt)) == bits((start.params, start.opt))


@pytest.mark.parametrize("broken", ["av", "ar"])
def test_a_model_that_has_broken_down_does_not_break_the_other(world, broken):
    """NaN in the weights: its own steps are skipped and counted, and the other goes on with numbers."""
    task = world.task("rl", eval_rows=0)

    def start() -> Any:
        state = task.init()
        part = getattr(state, broken)
        if broken == "av":
            nan = part.params.replace(final_norm=part.params.final_norm.at[0].set(np.nan))
        else:
            nan = part.params.replace(head=part.params.head.at[0, 0].set(np.nan))
        return state.replace(**{broken: part.replace(params=nan)})

    state, values = task.step(start(), next(task.loader()), 0)
    before, other = start(), "ar" if broken == "av" else "av"
    after = getattr(state, broken)
    assert float(values["skipped"]) == 1 and int(after.skipped) == 1
    assert bits((after.params, after.opt)) == bits((getattr(before, broken).params, getattr(before, broken).opt))
    assert finite(getattr(state, other)) and int(getattr(state, other).skipped) == 0
    if broken == "ar":
        assert float(values["reward"]) == -2, "an error that is no number counts as an orthogonal guess"


# -- what joint RL may and may not change --------------------------------------------------------------------------


@pytest.mark.parametrize(("frozen", "trained"), [("av", "ar"), ("ar", "av")])
def test_one_half_alone(world, frozen, trained):
    task = world.task("rl", eval_rows=0, **{f"train_{frozen}": False})
    start, state = task.init(), task.init()
    for number in range(3):
        state, values = task.step(state, next(task.loader()), number)
        assert f"{frozen}/loss" not in values and math.isfinite(float(values[f"{trained}/loss"]))
        assert not ({"kl", "entropy"} & set(values)) or trained == "av"
    assert bits(getattr(state, frozen)) == bits(getattr(start, frozen))
    assert bits(getattr(state, trained).params) != bits(getattr(start, trained).params)


def moments(state: Any) -> list[np.ndarray]:
    """The first moments of both optimizers: after one step, the clipped gradients times 1 - b1."""
    found: list[Any] = []
    for part in (state.av, state.ar):
        states = jax.tree.leaves(part.opt, is_leaf=lambda x: hasattr(x, "mu"))
        found += [leaf for s in states if hasattr(s, "mu") for leaf in jax.tree.leaves(s.mu)]
    return [np.asarray(x, np.float64) for x in found]


@pytest.mark.parametrize("changes", [{"on_policy_ratio": "sampled"}, {"accumulate": 4}])
def test_choices_that_must_not_change_the_first_step(world, changes):
    state, values, _ = first_step(world, "rl")
    other, others, _ = first_step(world, "rl", **changes)
    mine, theirs = moments(state), moments(other)
    largest = max(np.abs(m).max() for m in mine)
    assert mine and largest > 0
    assert max(np.abs(a - b).max() for a, b in zip(mine, theirs, strict=True)) < 1e-5 * largest
    assert values["ratio_error"] < 1e-5 and others["clipped"] == 0
    for name in ("ar/loss", "av/loss", "av/grad_norm", "ar/grad_norm", "entropy", "reward"):
        assert others[name] == pytest.approx(values[name], rel=2e-5, abs=2e-6), name


def test_the_claim_penalty_is_taken_off_the_reward(world):
    _, plain, batch = first_step(world, "rl", transforms=[])
    weight, options = 0.25, {"transforms": [], "claim_threshold": 0.01}
    state, values, _ = first_step(world, "rl", batch, claim_penalty=weight, **options)
    task = world.task("rl", eval_rows=0, claim_penalty=weight, **options)
    start = task.init()
    vectors = batch["rl"]["vectors"]
    keys = step_keys(np.uint32(0), np.uint32(0), rows=4, samples=4)
    found = decode_texts(rollout(start.av.params, vectors, keys, cfg=task.cfg), task.av.tokenizer)
    read = task._reader(start.ar.params)
    shares = idle_shares(found.texts, found.failed, np.repeat(vectors, 4, 0), read, task.ar.mse_scale, 0.01)
    assert max(len(split_claims(text)) for text in found.texts) > 1 and 0 < shares.mean() < 1
    assert values["reward"] == pytest.approx(plain["reward"] - weight * shares.mean(), abs=1e-5)
    assert values["idle_claims"] == pytest.approx(shares[~found.failed].mean(), abs=1e-6)
    assert finite(state) and values["mse_nrm"] == plain["mse_nrm"]


def test_packed_rows_and_changed_texts_exclude_each_other(world):
    with pytest.raises(InputError, match="transforms"):
        world.task("ar", pack=True, buckets=[64], transforms=[["noise", 0.5]])
    task = world.task("ar", pack=True, buckets=[64], batch_size=4, eval_rows=0)
    _, values = task.step(task.init(), next(task.loader()), 0)
    assert math.isfinite(float(values["loss"]))
