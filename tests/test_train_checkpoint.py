"""Checkpoints: what is kept, what is found damaged, and that what comes back is what was saved, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nla_jax.errors import CheckpointError
from nla_jax.train.checkpoint import Checkpoints, abstract, kept
from nla_jax.train.resuming import changed_setting
from nla_jax.train.seals import SEAL, damage

META = {"loader": {"next": 3}, "settings": {"lr": 0.1, "keep_last": 2}}


def a_state(seed: int) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 2)
    odd = jnp.array([np.nan, -0.0, np.inf, 1e-42], jnp.float32)  # what a detour through another format would change
    return {
        "w": jax.random.normal(keys[0], (32, 16)),
        "half": jax.random.normal(keys[1], (5, 3)).astype(jnp.bfloat16),
        "opt": (odd, None, jnp.int32(seed), [jnp.zeros(0)]),
    }


def same(a: Any, b: Any) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole checkpoints of steps 10 and 20, of the states a_state(10) and a_state(20)."""
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(directory) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, a_state(step), META)
    return directory


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def restore(directory: Path, **options: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    with Checkpoints(directory) as checkpoints:
        return checkpoints.restore(abstract(a_state(0)), note=notes.append, **options), notes


def test_what_comes_back_is_what_was_saved(saved: Path, copy: Path) -> None:
    found, notes = restore(copy)
    assert found.step == 20 and not notes
    assert same(found.state, a_state(20))
    assert {key: found.meta[key] for key in META} == META
    assert restore(copy, step=19)[0].step == 10
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.steps() == [10, 20]  # looking at an older one deletes nothing
    assert restore(copy.parent / "none")[0] is None


def test_arrays_come_back_with_the_shardings_asked_for(copy: Path) -> None:
    mesh: Mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("data"))
    like = abstract(a_state(0))
    like["w"] = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=split)
    with Checkpoints(copy) as checkpoints:
        found = checkpoints.restore(like)
        assert found is not None
        assert found.state["w"].sharding == split and found.state["half"].sharding == like["half"].sharding
        assert same(found.state, a_state(20))
        checkpoints.save(30, found.state, META)  # and from there back to one device
    assert same(restore(copy)[0].state, a_state(20))


def test_the_state_may_be_donated_at_once(tmp_path: Path) -> None:
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    state = jnp.zeros((512, 1024))
    with Checkpoints(tmp_path, keep_last=3) as checkpoints:
        for step in (1, 2, 3):
            state = add(state)
            checkpoints.save(step, {"x": state}, META)
            for _ in range(4):
                state = add(state)
        state.block_until_ready()
        checkpoints.wait()
        for step, value in ((1, 1), (2, 6), (3, 11)):
            found = checkpoints.restore({"x": state}, step=step)
            assert found is not None and (np.asarray(found.state["x"]) == value).all()


def largest(directory: Path) -> Path:
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit of the arrays": (lambda d: flip(largest(d / "state")), "its bytes have changed"),
    "arrays truncated": (lambda d: os.truncate(largest(d / "state"), 100), "100 of its"),
    "arrays deleted": (lambda d: largest(d / "state").unlink(), "missing"),
    "description deleted": (lambda d: (d / "state" / "_METADATA").unlink(), "missing"),
    "loader state": (lambda d: flip(d / "meta" / "metadata"), "its bytes have changed"),
    "the seal": (lambda d: (d / SEAL).write_text("{"), "cannot be read"),
    "no seal": (lambda d: (d / SEAL).unlink(), "not finished"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_the_checkpoint_before_it_used(copy: Path, name: str) -> None:
    harm, reason = DAMAGE[name]
    assert damage(copy / "20") is None
    harm(copy / "20")
    found, notes = restore(copy)
    assert found.step == 10 and same(found.state, a_state(10))
    assert len(notes) == 1 and "step 20" in notes[0] and reason in notes[0] and "from step 10" in notes[0]
    # Training gets to step 20 again, and its checkpoint is a whole one then.
    with Checkpoints(copy) as checkpoints:
        checkpoints.save(20, a_state(21), META)
    assert same(restore(copy)[0].state, a_state(21))


def test_no_whole_checkpoint_is_an_error_and_nothing_is_deleted(copy: Path) -> None:
    for step in ("10", "20"):
        flip(largest(copy / step / "state"))
    with pytest.raises(CheckpointError, match=r"no checkpoint is whole \(step 20: .*; step 10: .*Try: "):
        restore(copy)
    assert (copy / "20" / "state").is_dir() and (copy / "10" / "state").is_dir()


def test_an_unfinished_save_is_ignored(copy: Path) -> None:
    (copy / "20" / SEAL).unlink()
    (copy / "20").rename(copy / "20.orbax-checkpoint-tmp-1")
    (copy / "20.orbax-checkpoint-tmp-1" / "commit_success.txt").unlink()
    found, notes = restore(copy)
    assert found.step == 10 and not notes
    assert not list(copy.glob("*tmp*"))  # cleared away
    (copy / "10" / SEAL).unlink()
    found, notes = restore(copy)
    assert found is None and len(notes) == 1  # as if nothing had been saved
    assert not (copy / "10").exists()


def test_other_settings_and_other_arrays_are_named(copy: Path) -> None:
    assert restore(copy, settings={"lr": 0.1, "keep_last": 7})[0].step == 20
    with pytest.raises(CheckpointError, match=r"another lr: expected 0.1, as at step 20, got 0.2\. Try: "):
        restore(copy, settings={"lr": 0.2, "keep_last": 2})
    with Checkpoints(copy) as checkpoints:
        wrong = {**a_state(0), "w": jnp.zeros((32, 17))}
        with pytest.raises(CheckpointError, match=r"w: expected \[\[32, 17\], 'float32'\], got \[\[32, 16\]"):
            checkpoints.restore(wrong)
        with pytest.raises(CheckpointError, match="extra: expected"):
            checkpoints.restore({**a_state(0), "extra": jnp.zeros(1)})


def test_changed_settings() -> None:
    before = {"steps": 5, "optim": {"lr": 1, "name": "adamw"}, "log_every": 1, "out": "a"}
    assert changed_setting(before, {**before, "log_every": 2, "out": "b"}) is None
    assert changed_setting(before, {**before, "steps": 6}) == ("steps", 5, 6)
    assert changed_setting(before, {**before, "optim": {"lr": 2, "name": "adamw"}}) == ("optim.lr", 1, 2)
    assert changed_setting(before, {**before, "new": 3}) == ("new", None, 3)


def test_which_are_kept() -> None:
    metrics: dict[int, dict[str, Any]] = {
        5: {"m": 0.2},
        10: {"m": 0.9},
        15: {"m": float("nan")},
        20: {},
        25: {"m": 0.9},
    }
    assert kept(metrics, 2, None) == {20, 25}
    assert kept(metrics, 1, ("m", "max")) == {10, 25}  # of equals the first
    assert kept(metrics, 1, ("m", "min")) == {5, 25}
    assert kept(metrics, 2, ("other", "max")) == {20, 25}
    assert kept({1: {"m": None}, 2: {}}, 1, ("m", "max")) == {2}


def test_the_last_and_the_best_are_kept_on_disk(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, keep_last=1, best=("m", "max")) as checkpoints:
        for step, value in ((1, 0.1), (2, 0.8), (3, None), (4, 0.3)):
            checkpoints.save(step, {"x": jnp.zeros(3)}, META, {} if value is None else {"m": value})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]
        checkpoints.label(4, {"m": 0.9})
        checkpoints.save(5, {"x": jnp.zeros(3)}, META)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]
    assert json.loads((tmp_path / "4" / SEAL).read_text())["metrics"] == {"m": 0.9}
    assert damage(tmp_path / "4") is None


def test_a_save_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)}, META)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "save", full)
            with pytest.raises(
                CheckpointError, match=r"step 2 could not be written \(.*No space left.*Try: making room"
            ):
                checkpoints.save(2, {"x": jnp.zeros(3)}, META)
        assert checkpoints.steps() == [1]
