"""Runs a stage's programs on the devices that are there, on arrays made for them, and takes their times.

The programs are those of `nla plan` (train/plan_programs.py), which are training's own: what it lowers from shapes is
compiled here and called. Results feed the programs after them; a training state is donated and carried from call to
call; whatever a later program does not need is let go at once, as in training.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nla_jax.models.sampler import Samples
from nla_jax.tools.bench_device_arrays import filled, make, named
from nla_jax.train.plan import beside_bytes, least_bytes, peak_bytes, refused_bytes
from nla_jax.train.plan_stage import Call, Program, Stage
from nla_jax.train.plan_work import Work


@dataclasses.dataclass(frozen=True)
class Timing:
    """A program's measured calls, in seconds. `compile_seconds`: before them. `needs`: bytes of a chip as compiled,
    arguments included. `drawn`: tokens that decoding drew in all rows together, `longest`: of a row, `cap`: at most.
    `loss`: of the last update."""

    name: str
    once: bool
    work: Work
    seconds: tuple[float, ...]
    compile_seconds: float = 0.0
    needs: float = 0.0
    drawn: int | None = None
    longest: int | None = None
    cap: int | None = None
    loss: float | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """A stage's programs in the order they ran; `refused`: one line on what did not fit, where something did not."""

    stage: Stage
    timings: tuple[Timing, ...]
    refused: str | None = None
    peak: float | None = None  # bytes in use on the first device at the most, since the process began; where it tells


class DoesNotFitError(Exception):
    """A program needs more memory than the devices have. str: one line."""


class Runner:
    """A stage's arrays, compiled programs and results."""

    def __init__(
        self,
        stage: Stage,
        vocabulary: int,
        memory: float | None = None,
        note: Callable[[str], None] = lambda text: None,
    ):
        """See `measure`."""
        self.stage, self.vocabulary, self.memory, self.note = stage, vocabulary, memory, note
        self.outputs: dict[str, Any] = {}
        self.compiled: dict[str, Any] = {}
        self.timings: dict[str, Timing] = {}
        self._resident = {id(leaf) for leaf in jax.tree.leaves(dict(stage.residents))}
        self._held: dict[int, jax.Array] = {}  # by the identity of the shape that it is an array for
        self._batches: dict[Any, jax.Array] = {}

    def run(self, program: Program, measured: bool) -> Any:
        """Calls a program once, compiled first where it was not, and waits for what it gives.

        DoesNotFitError where memory is exhausted; the stage's state may be lost then."""
        try:
            return self._run(program, measured)
        except jax.errors.JaxRuntimeError as error:
            text = str(error)
            if "RESOURCE_EXHAUSTED" not in text and refused_bytes(text) is None:
                raise
            why = f"{program.name}: {' '.join(text.split())[:200]}"
        raise DoesNotFitError(why)  # outside of the handler, whose traceback would hold this stage's arrays

    def _run(self, program: Program, measured: bool) -> Any:
        call = program.call(self.outputs)
        if program.name not in self.compiled:
            self._compile(program)
        args, options = self._arrays(program, call)
        begin = time.perf_counter()
        result = self.compiled[program.name](*args, **options)
        jax.block_until_ready(result)
        seconds = time.perf_counter() - begin
        if measured:
            self._note_time(program, seconds, result)
        if call.carries is not None:
            shapes = jax.tree.leaves(call.args[call.carries])
            self._held |= {id(s): x for s, x in zip(shapes, jax.tree.leaves(result[0]), strict=True)}
        elif any(program.name in p.after for p in self.stage.programs):
            self.outputs[program.name] = result
        return result

    def _compile(self, program: Program) -> None:
        self.note(f"compiling {program.name}")
        begin = time.perf_counter()
        compiled = program.lower(self.outputs).compile()
        seconds = time.perf_counter() - begin
        needs = peak_bytes(compiled)
        total = needs + beside_bytes(program, self.stage)
        if self.memory is not None and total > self.memory:
            raise DoesNotFitError(f"{program.name} needs {_gib(total)} of a chip, which has {_gib(self.memory)}")
        self.compiled[program.name] = compiled
        self.timings[program.name] = Timing(program.name, program.once, program.work, (), seconds, needs)

    def _arrays(self, program: Program, call: Call) -> tuple[list[Any], dict[str, Any]]:
        """The call's arguments with arrays in place of shapes. Residents' are kept for all programs, others for this
        one."""
        beside = named(call)

        def one(path: tuple[str, ...], leaf: Any) -> Any:
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return leaf
            kept: dict[Any, jax.Array] = self._held if id(leaf) in self._resident else self._batches
            key: Any = id(leaf) if kept is self._held else (program.name, path)
            if key not in kept:
                kept[key] = make(path, beside, self.vocabulary)
            return kept[key]

        return filled(call, one)

    def _note_time(self, program: Program, seconds: float, result: Any) -> None:
        before = self.timings[program.name]
        after = dataclasses.replace(before, seconds=(*before.seconds, seconds))
        for part in result if type(result) is tuple else (result,):
            if isinstance(part, Samples):
                lengths, cap = np.asarray(part.lengths), part.tokens.shape[1]
                after = dataclasses.replace(after, drawn=int(lengths.sum()), longest=int(lengths.max()), cap=cap)
            elif isinstance(part, dict) and "loss" in part:
                after = dataclasses.replace(after, loss=float(part["loss"]))
        self.timings[program.name] = after

    def round(self, programs: tuple[Program, ...], measured: bool) -> None:
        """Calls each of the programs once, in order; results are let go where nothing that runs later needs them."""
        for i, program in enumerate(programs):
            self.run(program, measured)
            later = {name for p in programs[i + 1 :] for name in p.after}
            for other in programs[: i + 1]:
                if not other.once and other.name not in later:
                    self.outputs.pop(other.name, None)


def measure(
    stage: Stage,
    vocabulary: int,
    *,
    rounds: int = 3,
    profile: Path | None = None,
    memory: float | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Runs a stage: every program once unmeasured, then `rounds` times those that are part of every step, then those
    that are not and that no other needs. `profile`: a directory for a trace of one more
    round. `memory`: bytes of a device, where they are known: what surely needs more is not tried.
    """
    least = least_bytes(stage)
    if memory is not None and least > memory:
        return Measured(stage, (), f"needs {_gib(least)} of a chip at least, which has {_gib(memory)}")
    runner = Runner(stage, vocabulary, memory, note)
    refused = None
    try:
        _rounds(runner, rounds, profile)
    except DoesNotFitError as error:
        refused = str(error)
    device = min(jax.tree.leaves(dict(stage.residents))[0].sharding.device_set, key=lambda d: d.id)
    stats = device.memory_stats() or {}
    timings = tuple(runner.timings[p.name] for p in stage.programs if p.name in runner.timings)
    del runner
    gc.collect()  # the next stage needs the memory
    return Measured(stage, timings, refused, stats.get("peak_bytes_in_use"))


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _rounds(runner: Runner, rounds: int, profile: Path | None) -> None:
    programs = runner.stage.programs
    needed = {name for p in programs for name in p.after}
    first = tuple(p for p in programs if p.once and p.name in needed)
    step = tuple(p for p in programs if not p.once)
    runner.round(first, True)
    runner.round(step, False)
    for i in range(rounds):
        runner.note(f"round {i + 1} of {rounds}")
        runner.round(step, True)
    if profile is not None:
        with jax.profiler.trace(profile):
            runner.round(step, False)
    runner.round(tuple(p for p in programs if p.once and p.name not in needed), True)
