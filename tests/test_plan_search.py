"""What `nla plan --search` tries, in which order, and how hard the compiler is made to work for it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from nla_jax.errors import InputError
from nla_jax.models.sharding import MeshSettings
from nla_jax.tools import plan_run
from nla_jax.train.plan import Compiler, Report, Row, row_of
from nla_jax.train.plan_search import Change, changes, search
from nla_jax.train.plan_slices import parse_slice
from nla_jax.train.plan_stage import Call, Program, Stage, make_place
from nla_jax.train.plan_work import Work
from nla_jax.train.settings import RLSettings

GIB = 2.0**30
RL = RLSettings(target="t", store="s", av="a", ar="b", steps=5)
GIVEN = Change(remat="none", accumulate=1, mesh=MeshSettings())


def test_order_of_changes():
    every = list(changes(GIVEN, 4, 16))
    assert every[0] == GIVEN
    assert every[1] == Change("dots", 1, MeshSettings())
    assert every[2:5] == [Change("blocks", n, MeshSettings()) for n in (1, 2, 4)]
    meshes = list(dict.fromkeys((c.mesh.fsdp, c.mesh.tensor) for c in every))
    assert meshes == [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]
    for change in every:  # shards and micro-batches divide the rows
        data, fsdp, _ = change.mesh.shape(4)
        assert 16 % (data * fsdp * change.accumulate) == 0
    assert len(set(every)) == len(every)


def test_config_that_asks_for_more_is_kept():
    given = Change("blocks", 4, MeshSettings(fsdp=2))
    assert list(changes(given, 8, 64))[0] == given
    assert all(c.accumulate >= 4 and c.remat == "blocks" for c in changes(given, 8, 64))


def finding(fits, needs=1.0, name="AV update"):
    row = Row(name, False, needs * GIB, 0.0, not fits, Work(), None, {"compute": 1.0})
    return Report("rl", {}, (row,), 16, {}, GIB, False)


def test_search_compiles_only_what_may_fit():
    tried, told = [], []

    def least(change):
        if change.mesh.tensor == 2:
            raise InputError("mesh", expected="axes that divide")
        return (2.0 if change.mesh.fsdp == 1 else 0.1 + 1.6 / change.accumulate) * GIB

    def attempt(change):
        tried.append(change)
        fits = change.remat == "blocks" and change.accumulate >= 4
        return change, finding(fits, 0.5 if fits else 1.5)

    found = search(GIVEN, 4, 32, least, attempt, GIB, lambda change, why: told.append(why))
    assert found is not None
    assert found[0] == Change("blocks", 4, MeshSettings(fsdp=2))
    # One shard holds too much whatever else is changed; fsdp 2 with 1 micro-batch too. Of those left the largest
    # micro-batch is compiled, then the smallest, then those between.
    assert [c.accumulate for c in tried] == [2, 8, 4]
    assert "holds 2.0 GiB at least, in micro-batches however small" in told
    assert "AV update needs 1.5 GiB" in told
    assert found[0].flags("rl", GIVEN) == [
        *("--config.rl.remat=blocks", "--config.rl.accumulate=4", "--config.rl.mesh.fsdp=2")
    ]


def test_search_for_whether_anything_fits_begins_with_what_holds_least():
    tried, needed = [], []

    def attempt(change):
        tried.append((change.mesh.fsdp, change.mesh.tensor))
        needed.append(change.accumulate)
        return change, finding(bool(fitting) and change.accumulate >= fitting[0])

    def least(change):
        return 0.9 * GIB / (change.mesh.fsdp * change.mesh.tensor * (1 + change.mesh.tensor))

    fitting: list[int] = []
    assert search(GIVEN, 4, 16, least, attempt, GIB, tries=4) is None
    assert list(dict.fromkeys(tried)) == [(1, 4), (2, 2)] and len(tried) == 4  # once for each remat
    # Of the layout that does, the largest micro-batch; none is compiled twice.
    fitting.append(4)
    needed.clear()
    found = search(GIVEN, 4, 16, least, attempt, GIB, tries=4)
    assert found is not None and found[0].accumulate == 4
    assert needed[-4:] == [16, 1, 4, 2]


def test_lora_is_tried_last():
    every = list(changes(GIVEN, 2, 16, ranks=(16,)))
    ranks = [c.rank for c in every]
    assert ranks == sorted(ranks) and set(ranks) == {0, 16}
    found = search(GIVEN, 2, 16, lambda c: 0.0, lambda c: (c, finding(c.rank == 16)), GIB, ranks=(16,))
    assert found is not None and found[0].flags("rl", GIVEN) == ["--config.lora.rank=16"]


def test_search_that_finds_nothing():
    assert search(GIVEN, 2, 16, lambda change: 0.0, lambda change: (change, finding(False)), GIB) is None
    assert search(GIVEN, 2, 16, lambda change: 9 * GIB, lambda change: pytest.fail("compiled"), GIB) is None


# The rollout's parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "least", "needs", "tried", "chosen"),
    [
        (16, 0.0, 1.0, [1], 1),
        (16, 0.0, 3.0, [1, 2, 4], 4),
        (16, 3.0, 3.0, [4], 4),  # arithmetic rules the others out
        (128, 0.0, 99.0, [1, 2, 4, 8, 16], 16),  # and that is the most
        (6, 0.0, 99.0, [1, 2], 2),  # no other power of two divides the activations
        (16, 99.0, 99.0, [16], 16),
    ],
)
def test_rollout_gets_the_fewest_parts_that_fit(monkeypatch, batch, least, needs, tried, chosen):
    one, asked = parse_slice("h100:1x1x1"), []

    def count(self, change, effort=0.0):
        asked.append(change.rollout_parts)
        return finding(needs / change.rollout_parts <= 1, name="rollout")

    monkeypatch.setattr(plan_run, "_settings", lambda run, stage: dataclasses.replace(RL, batch_size=batch))
    monkeypatch.setattr(plan_run._Trial, "count", count)
    monkeypatch.setattr(plan_run._Trial, "least", lambda self, c: least / c.rollout_parts * one.chip.hbm)
    trial = plan_run._Trial(None, "rl", one, None, [])  # type: ignore[arg-type]
    change, report = trial.attempt(GIVEN)
    assert (asked, change.rollout_parts, report.fits) == (tried, chosen, needs / chosen <= 1)
    # Another program that does not fit is no reason for more of them.
    asked.clear()
    monkeypatch.setattr(plan_run._Trial, "count", lambda self, change, effort: asked.append(1) or finding(False))
    assert len(trial.attempt(dataclasses.replace(GIVEN, rollout_parts=1))[1].too_large) == len(asked) == 1


def test_flags_say_the_parts():
    assert dataclasses.replace(GIVEN, rollout_parts=4).flags("rl", GIVEN) == ["--config.rl.rollout_parts=4"]


def test_kept_results_are_of_the_settings_that_a_program_varies_with(monkeypatch):
    monkeypatch.setattr(plan_run, "_settings", lambda run, stage: RL)
    run = plan_run.Run(None, None, False, 1)  # type: ignore[arg-type]

    def key(varies, **change):
        one = dataclasses.replace(GIVEN, **change)
        return plan_run._compiler(run, "rl", parse_slice("v5e:2x2"), one, 0.0).key(varies)

    assert key(()) == key((), remat="blocks", accumulate=2, rollout_parts=2) != key((), rank=4)
    assert key(("remat",)) != key(("remat",), remat="blocks") != key(("remat",), remat="dots")
    assert key(("remat",)) == key(("remat",), accumulate=2, rollout_parts=2) != key(())
    assert key(()) != key((), mesh=MeshSettings(fsdp=2))


# The compiler's effort ----------------------------------------------------------------------------------------------


def test_effort_is_asked_for_while_compiling_alone():
    place = make_place(MeshSettings(), jax.devices()[:1])
    x, seen = place.array((4,), "float32"), []

    class Spied:
        def lower(self, *args):
            lowered = jax.jit(jnp.sin).lower(*args)
            compile_ = lowered.compile

            def compiled():
                seen.append(jax.config.jax_exec_time_optimization_effort)
                return compile_()

            lowered.compile = compiled
            return lowered

    program = Program("p", lambda out: Call(Spied(), (x,)), Work(), given=(x,))
    stage = Stage("rl", (program,), {"x": x}, 1, "float32")
    for effort in (-1.0, 0.0):
        row_of(program, stage, place, parse_slice("v5e:1x1").chip, Compiler(lambda varies: "k", effort=effort))
    assert seen == [-1.0, 0.0] and jax.config.jax_exec_time_optimization_effort == 0.0


@pytest.mark.parametrize(
    ("quick", "needs", "tried", "chosen"),
    [
        (False, {}, [(1, -1.0), (1, 0.0)], 1),  # looked at, and compiled once as training does
        (True, {}, [(1, -1.0)], 1),
        # Just too large as training compiles it: the search is done again, that way.
        (False, {(1, 0.0): 1.005}, [(1, -1.0), (1, 0.0), (1, 0.0), (4, 0.0), (2, 0.0)], 2),
        (False, {(n, -1.0): 2.0 for n in (1, 2, 4)}, [(1, -1.0), (4, -1.0)], None),
    ],
)
def test_what_a_search_finds_is_compiled_as_training_does(monkeypatch, quick, needs, tried, chosen):
    asked = []

    def attempt(self, change, effort=0.0):
        asked.append((change.accumulate, effort))
        return change, finding(needs.get(asked[-1], 0.9) <= 1.0)

    one = parse_slice("h100:1x1x1")
    trial = plan_run._Trial(None, "rl", one, None, [])  # type: ignore[arg-type]
    monkeypatch.setattr(plan_run._Trial, "attempt", attempt)
    monkeypatch.setattr(plan_run._Trial, "least", lambda self, change: 0.0)
    monkeypatch.setattr(plan_run._Trial, "in_parts", lambda self, change: [change])
    monkeypatch.setattr(plan_run._Trial, "result", lambda self, report, **more: more["flags"])
    monkeypatch.setattr(plan_run, "_trial", lambda *of: trial)
    monkeypatch.setattr(plan_run, "change_of", lambda *of: Change("blocks", 1, MeshSettings()))
    monkeypatch.setattr(plan_run, "_rows", lambda *of: 4)
    run = plan_run.Run(None, None, False, 1, quick)  # type: ignore[arg-type]
    flags = plan_run._searched(run, "rl", one, {})
    assert asked == tried
    more = [f"--config.rl.accumulate={chosen}"] if chosen and chosen > 1 else []
    assert flags == (None if chosen is None else more)
