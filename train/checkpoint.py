"""Checkpoints of a training run: Orbax writes and reads the arrays, seals tell whole ones from damaged ones.

    checkpoints/<step>/state/        Orbax: a flat dictionary {"params.layers.wq": array, ...}
    checkpoints/<step>/meta/         Orbax: JSON {"step", "arrays", "settings", "loader", "loop"}
    checkpoints/<step>/nla_jax.json  the seal (seals.py), written last, with the metrics that keep-best compares

A save returns as soon as the arrays have left the devices; files are written by threads while training goes on. What
is no longer kept is deleted once a newer step is sealed, so at every moment there is a whole checkpoint to go back to.
All processes of a run make the same calls in the same order; process 0 writes seals and deletes.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from nla_jax.errors import CheckpointError, NLAError
from nla_jax.train.resuming import check_arrays, check_settings
from nla_jax.train.seals import SEAL, damage, read_seal, relabel, write_seal

Best = tuple[str, str]  # a metric's name, "max" or "min"


@dataclasses.dataclass(frozen=True)
class Restored:
    """`meta` is what `save` was given."""

    step: int
    state: Any
    meta: dict[str, Any]


def abstract(state: Any) -> Any:
    """The same tree with shape, dtype and sharding instead of arrays, which may then be freed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), state)


def kept(metrics: Mapping[int, Mapping[str, float]], keep_last: int, best: Best | None) -> set[int]:
    """Of the steps that `metrics` has, those to keep: the last ones, and the one with the best metric.

    Of equals the first is best; a metric that is not finite never is."""
    keep = set(sorted(metrics)[-keep_last:])
    if best is not None:
        name, mode = best
        sign = {"max": 1.0, "min": -1.0}[mode]
        values = {step: m[name] for step, m in metrics.items() if isinstance(m.get(name), int | float)}
        finite = {step: value for step, value in values.items() if math.isfinite(value)}
        if finite:
            keep.add(max(finite, key=lambda step: (sign * finite[step], -step)))
    return keep


class Checkpoints:
    """The checkpoints in one directory. Use as a context manager, or `close()` it: saves go on in the background.

    `keep_last` newest ones are kept and, with `best`, the one whose metric is best."""

    def __init__(self, directory: Path, *, keep_last: int = 2, best: Best | None = None):
        import orbax.checkpoint as ocp  # takes seconds to import

        self.directory, self.keep_last, self.best = Path(directory).resolve(), keep_last, best
        self._ocp = ocp
        # Orbax is to delete nothing by itself: it would before the newer step is sealed.
        options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._sealer = ThreadPoolExecutor(1)
        self._unsealed: tuple[int, dict[str, float]] | None = None  # the step being saved, and its metrics
        self._sealing: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _at(self, step: int) -> Path:
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Steps whose checkpoint was finished, ascending; whether it is still whole is found out by `restore`."""
        return [step for step in sorted(self._manager.all_steps()) if (self._at(step) / SEAL).is_file()]

    def save(self, step: int, state: Any, meta: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Starts to save; waits first for a save that is still going on. An unfinished or damaged one of the same step
        is replaced. `state` may be donated afterwards. CheckpointError where the one before could not be written."""
        self.wait()
        if step in self._manager.all_steps():
            self._delete(step)
        arrays = _flat(state)
        row = {**meta, "step": step, "arrays": _described(arrays)}
        args = self._ocp.args
        with _written(step, self.directory):
            self._manager.save(
                step, args=args.Composite(state=args.StandardSave(_stored(arrays)), meta=args.JsonSave(row)), force=True
            )
        self._unsealed = (step, dict(metrics or {}))

    def poll(self) -> None:
        """Starts to seal what has been written meanwhile; cheap, call it once per step."""
        if self._unsealed is None or self._sealing is not None or self._manager.is_saving_in_progress():
            return
        step, metrics = self._unsealed
        if jax.process_index() == 0 and self._at(step).is_dir():
            self._sealing = self._sealer.submit(write_seal, self._at(step), step, metrics)

    def wait(self) -> None:
        """Until what was saved is written and sealed; then deletes what is no longer kept."""
        if self._unsealed is None:
            return
        step, _ = self._unsealed
        with _written(step, self.directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
            self.poll()
            if self._sealing is not None:
                self._sealing.result()
        self._unsealed = self._sealing = None
        _meet(f"sealed {step}")
        metrics = {}
        for number in self.steps():
            try:
                seal = read_seal(self._at(number))
            except ValueError:
                seal = None
            metrics[number] = {} if seal is None else seal.metrics
        _meet(f"listed {step}")
        for number in metrics.keys() - kept(metrics, self.keep_last, self.best):
            self._delete(number)

    def restore(
        self,
        like: Any,
        *,
        step: int | None = None,
        settings: Mapping[str, Any] | None = None,
        note: Callable[[str], None] = lambda line: None,
    ) -> Restored | None:
        """The newest checkpoint that is whole (or the newest up to `step`); None where none was ever finished.

        `like`: a tree as was saved, of arrays or of what `abstract` gives; the result has its structure, shardings and
        dtypes. `note` gets a line for every checkpoint that is passed over. What was saved after the one restored is
        deleted, training being about to go there again. CheckpointError where none is whole, where its `settings`
        were others, or where its arrays are not those of `like`.
        """
        wanted = _flat(abstract(like))  # in this order: mapping over the flat dictionary would sort its names
        newest = [s for s in sorted(self._manager.all_steps(), reverse=True) if step is None or s <= step]
        problems: list[tuple[int, str]] = []
        for number in newest:
            problem = _told(damage(self._at(number)) if jax.process_index() == 0 else None)
            found: Restored | str = problem if problem is not None else self._load(number, like, wanted, settings)
            if isinstance(found, Restored):
                for later, why in problems:
                    note(f"checkpoint of step {later} is not used ({why}): going on from step {number}")
                if step is None:
                    self._clear({*newest} - {*self.steps()} | {later for later, _ in problems})
                return found
            problems.append((number, found))
        if all(why == "it was not finished" for _, why in problems):
            for number, why in problems:
                note(f"checkpoint of step {number} is not used ({why})")
            self._clear({number for number, _ in problems})
            return None
        listed = "; ".join(f"step {number}: {why}" for number, why in problems)
        fix = f"another directory, or remove {self.directory} to train from the start"
        raise CheckpointError(f"{self.directory}: no checkpoint is whole ({listed})", fix=fix)

    def label(self, step: int, metrics: Mapping[str, float]) -> None:
        """Gives a step that was saved before it was evaluated its metrics."""
        self.wait()
        if jax.process_index() == 0:
            relabel(self._at(step), metrics)

    def _load(self, step: int, like: Any, wanted: dict[str, Any], settings: Mapping[str, Any] | None) -> Restored | str:
        """The checkpoint, or why it cannot be read."""
        args = self._ocp.args
        try:
            meta = self._manager.restore(step, args=args.Composite(meta=args.JsonRestore()))["meta"]
            if settings is not None:
                check_settings(self.directory, step, meta["settings"], settings)
            check_arrays(self.directory, step, meta["arrays"], _described(wanted))
            stored = args.StandardRestore(_stored(wanted))
            state = self._manager.restore(step, args=args.Composite(state=stored))["state"]
        except NLAError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many kinds
            return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        leaves = [state[name] if name in state else _empty(a) for name, a in wanted.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(like), leaves), meta)

    def _clear(self, steps: set[int]) -> None:
        _meet("clearing")
        for step in sorted(steps):
            self._delete(step)

    def _delete(self, step: int) -> None:
        """Its seal first: a step that is half deleted is to look unfinished, not damaged."""
        if jax.process_index() == 0:
            (self._at(step) / SEAL).unlink(missing_ok=True)
        self._manager.delete(step)
        if jax.process_index() == 0:
            shutil.rmtree(self._at(step), ignore_errors=True)  # what Orbax does not know of

    def close(self) -> None:
        """Waits for what is being saved."""
        try:
            self.wait()
        finally:
            self._sealer.shutdown()
            self._manager.close()


class _written:  # noqa: N801  (used as a statement)
    """Turns what Orbax raises while writing into one line."""

    def __init__(self, step: int, directory: Path):
        self.what = f"{directory}: the checkpoint of step {step} could not be written"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, NLAError):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            fix = "making room on the disk, then the same command again"
            raise CheckpointError(f"{self.what} ({reason})", fix=fix) from error


def _meet(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"nla_jax checkpoint {name}")


def _told(problem: str | None) -> str | None:
    """What process 0 found, so that one process reads the files and all go the same way."""
    if jax.process_count() == 1:
        return problem
    bad = bool(multihost_utils.broadcast_one_to_all(problem is not None))
    return (problem or "process 0 says why") if bad else None


def _flat(state: Any) -> dict[str, Any]:
    """Leaves by name, in the order of `jax.tree.leaves`. Plain, so that Orbax alone can read them."""
    pairs = jax.tree_util.tree_leaves_with_path(state)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
    if len(flat) != len(pairs):
        raise ValueError("two arrays of the state have one name")
    return flat


def _stored(arrays: dict[str, Any]) -> dict[str, Any]:
    """Those that Orbax takes: it refuses arrays without elements."""
    return {name: array for name, array in arrays.items() if math.prod(array.shape)}


def _empty(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)


def _described(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: [list(a.shape), str(a.dtype)] for name, a in arrays.items()}
