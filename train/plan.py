"""`nla plan`: whether a stage fits on a slice, and the least time that a step can take there.

Each program is compiled for the slice; its memory is the compiler's own figure. Times are rooflines: the largest of
FLOPs over the chips' peak, bytes over the memory's bandwidth and bytes sent over the links', each as if the other two
cost nothing. A step cannot be faster than the sum over its programs; how much slower it is shows only on the machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from nla_jax.train.plan_hlo import collectives, sent
from nla_jax.train.plan_slices import Chip
from nla_jax.train.plan_stage import Outputs, Place, Program, Stage
from nla_jax.train.plan_work import Work, tree_bytes

_BOUNDS = ("compute", "memory", "links")
_REFUSED = (
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available"),
    re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
)
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program. `needs`: bytes of a chip's memory at its fullest, arguments included;
    `refused`: it did not compile, since that is more than a chip has. `sent`: bytes per chip by kind of collective.
    `outputs`: the PartitionSpecs of its results."""

    needs: float
    refused: bool = False
    sent: dict[str, float] | None = None
    outputs: list[list[Any]] | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Row:
    """A program on one slice. `beside`: bytes of a chip that hold what the stage keeps and this program does not take.
    `times`: seconds by what would bound it ("compute", "memory", "links"); links are left out where nothing was
    compiled."""

    name: str
    once: bool
    needs: float
    beside: float
    refused: bool
    work: Work
    sent: dict[str, float] | None
    times: dict[str, float]

    @property
    def total(self) -> float:
        return self.needs + self.beside

    @property
    def seconds(self) -> float:
        return max(self.times.values())

    @property
    def bound(self) -> str:
        return max(self.times, key=lambda name: self.times[name])


@dataclasses.dataclass(frozen=True)
class Report:
    """A stage on one slice and mesh. `estimated`: nothing was compiled. `residents`: bytes of a chip that hold what the
    stage keeps, by name."""

    stage: str
    mesh: dict[str, int]
    rows: tuple[Row, ...]
    samples: int
    residents: dict[str, float]
    hbm: float
    estimated: bool

    @property
    def step_seconds(self) -> float:
        return sum(row.seconds for row in self.rows if not row.once)

    @property
    def too_large(self) -> list[str]:
        """The programs that a chip has no room for."""
        return [row.name for row in self.rows if row.refused or row.total > self.hbm]

    @property
    def fits(self) -> bool:
        return not self.too_large

    @property
    def worst(self) -> Row:
        """The program that needs the most of a chip's memory."""
        return max(self.rows, key=lambda row: row.total)


class Compiler:
    """Compiles programs and keeps what was found, in files of `directory` where it is given.

    `key(varies)` says all that a program's name leaves open: slice, mesh, versions, settings. Of those that a search
    changes it says the ones that the program varies with: for others it need not be compiled again. `note` is told
    before each compilation. `effort` is the compiler's for the speed of programs, -1 to 1, 0 what training gets."""

    def __init__(
        self,
        key: Callable[[tuple[str, ...]], str],
        directory: Path | None = None,
        note: Callable[[str], None] = lambda text: None,
        effort: float = 0.0,
    ):
        self.key, self.directory, self.note, self.effort = key, directory, note, effort
        self._outputs: Outputs = {}

    def run(self, program: Program, stage: Stage) -> Compiled:
        """What was found for a program, or is now."""
        path = self._path(stage, program)
        kept = _read(path)
        if kept is not None:
            return kept
        found = self._compile(program, stage)
        _write(path, found)
        return found

    def _path(self, stage: Stage, program: Program) -> Path | None:
        if self.directory is None:
            return None
        said = f"{self.key(program.varies)}\0{stage.name}\0{program.name}"
        name = hashlib.sha256(said.encode()).hexdigest()[:24]
        return self.directory / f"{name}.json"

    def _compile(self, program: Program, stage: Stage) -> Compiled:
        missing = [name for name in program.after if self._results(name, stage) is None]
        if missing:  # a program that does not fit has no results
            return Compiled(0.0, refused=True)
        self.note(program.name)
        start = time.monotonic()
        lowered = program.lower(self._outputs)
        usual = jax.config.jax_exec_time_optimization_effort  # type: ignore[attr-defined]
        jax.config.update("jax_exec_time_optimization_effort", self.effort)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needs = refused_bytes(str(error))
            if needs is None:
                raise
            return Compiled(needs, refused=True, seconds=time.monotonic() - start)
        finally:
            jax.config.update("jax_exec_time_optimization_effort", usual)
        specs = jax.tree.map(_spec, compiled.output_shardings, is_leaf=lambda x: isinstance(x, jax.sharding.Sharding))
        leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, list))
        moved = sent(collectives(compiled.as_text()))
        return Compiled(peak_bytes(compiled), False, moved, leaves, time.monotonic() - start)

    def _results(self, name: str, stage: Stage) -> Any:
        """The shapes and shardings of what another program of the stage gives; None where it does not fit."""
        if name not in self._outputs:
            program = next(p for p in stage.programs if p.name == name)
            found = self.run(program, stage)
            self._outputs[name] = None
            if not found.refused and found.outputs is not None:
                shapes = program.lower(self._outputs).out_info
                self._outputs[name] = _laid_out(shapes, found.outputs, stage)
        return self._outputs[name]


def report(stage: Stage, place: Place, chip: Chip, compiler: Compiler | None) -> Report:
    """Every program of a stage; without a compiler, from arithmetic alone."""
    rows = list(rows_of(stage, place, chip, compiler))
    return summary(stage, place, chip, rows, compiler is None)


def summary(stage: Stage, place: Place, chip: Chip, rows: list[Row], estimated: bool) -> Report:
    mesh = {"data": 1, "fsdp": 1, "tensor": 1} if place.mesh is None else dict(place.mesh.shape)
    held = {name: tree_bytes(tree) for name, tree in stage.residents.items()}
    return Report(stage.name, mesh, tuple(rows), stage.rows, held, chip.hbm, estimated)


def rows_of(stage: Stage, place: Place, chip: Chip, compiler: Compiler | None) -> Iterator[Row]:
    """The programs in the order that they run, one at a time."""
    for program in stage.programs:
        yield row_of(program, stage, place, chip, compiler)


def row_of(program: Program, stage: Stage, place: Place, chip: Chip, compiler: Compiler | None) -> Row:
    beside = beside_bytes(program, stage)
    if compiler is None:
        found = Compiled(sum(map(tree_bytes, program.given)) + program.least)
    else:
        found = compiler.run(program, stage)
    times = roofline(program.work, found.sent, chip, place.split.chips, stage.compute_dtype)
    return Row(program.name, program.once, found.needs, beside, found.refused, program.work, found.sent, times)


def beside_bytes(program: Program, stage: Stage) -> float:
    """Bytes of a chip that hold what the stage keeps and the program is not given."""
    if program.beside is not None:
        return sum(map(tree_bytes, program.beside))
    return sum(map(tree_bytes, stage.residents.values())) - sum(map(tree_bytes, program.given))


def least_bytes(stage: Stage) -> float:
    """Bytes of a chip that the stage cannot do without, from arithmetic alone."""
    return max(
        beside_bytes(program, stage) + sum(map(tree_bytes, program.given)) + program.least for program in stage.programs
    )


def roofline(work: Work, moved: dict[str, float] | None, chip: Chip, chips: int, dtype: str) -> dict[str, float]:
    """Seconds by what would bound the program."""
    times = {"compute": work.computed / chips / chip.peak(dtype), "memory": work.moved / chip.hbm_rate}
    return times if moved is None else {**times, "links": sum(moved.values()) / chip.link_rate}


def refused_bytes(message: str) -> float | None:
    """The bytes that a program needs, of the compiler's message that it does not fit; None for another message."""
    for pattern in _REFUSED:
        found = pattern.search(message)
        if found:
            return float(found[1]) * _UNITS[found[2]]
    return None


def peak_bytes(compiled: Any) -> float:
    """Bytes of one device's memory that a program needs at its fullest, its arguments included.

    The TPU compiler's own peak, which is what it refuses programs by; its `temp_size` counts memory twice that
    results share with arguments. Of others the sum of what they give, an upper bound: the CPU's peak leaves out what
    loops hold."""
    memory = compiled.memory_analysis()
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole += memory.temp_size_in_bytes
    device = min(jax.tree.leaves(compiled.output_shardings)[0].device_set, key=lambda d: d.id)
    peak = memory.peak_memory_in_bytes if device.platform == "tpu" else 0
    return float(min(peak, whole) if peak else whole) + memory.generated_code_size_in_bytes


def _spec(sharding: Any) -> list[Any]:
    entries = sharding.spec if isinstance(sharding, NamedSharding) else ()
    return [list(e) if isinstance(e, tuple) else e for e in entries]


def _laid_out(shapes: Any, specs: list[list[Any]], stage: Stage) -> Any:
    """Shapes with the shardings that a compiled program gave them, on the mesh of the stage's residents."""
    at = jax.tree.leaves(stage.residents)[0].sharding

    def one(x: Any, spec: list[Any]) -> jax.ShapeDtypeStruct:
        if not isinstance(at, NamedSharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
        entries = PartitionSpec(*(tuple(e) if isinstance(e, list) else e for e in spec))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(at.mesh, entries))

    leaves, structure = jax.tree.flatten(shapes)
    return jax.tree.unflatten(structure, [one(x, spec) for x, spec in zip(leaves, specs, strict=True)])


def _read(path: Path | None) -> Compiled | None:
    if path is None or not path.is_file():
        return None
    try:
        return Compiled(**json.loads(path.read_text()))
    except (ValueError, TypeError):  # cut short or of another version: found again
        return None


def _write(path: Path | None, found: Compiled) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(dataclasses.asdict(found)))
    partial.replace(path)
