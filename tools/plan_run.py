"""What `nla plan` does with a stage: its settings on slices, compiled or counted, and what to change."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_jax.errors import InputError
from nla_jax.tools.options import note

if TYPE_CHECKING:
    from nla_jax.train.plan import Report
    from nla_jax.train.plan_search import Change
    from nla_jax.train.plan_slices import Slice
    from nla_jax.train.plan_stage import Model

_RANK = 16  # of LoRA where it is tried
_TRIES = 3  # layouts of a slice that are compiled where any slice will do
_ROLLOUT = "rollout"  # the program that may be cut into parts
_PARTS = 16  # of it, at most
_LEAST_EFFORT = -1.0  # of the compiler, for programs that are looked at and not run
_SEARCHED = {"remat", "accumulate", "rollout_parts"}  # settings that a search changes, each of some programs alone
# Settings that change no program.
_ELSEWHERE = (
    *("out", "seed", "log_every", "eval_every", "save_every", "keep_last", "target", "store", "av", "ar", "init"),
    *("eval_rows", "eval_store", "eval_samples", "paraphrase", "paraphraser", "paraphraser_url", "transforms"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    config: Any
    model: Model
    cache: bool
    document_tokens: int
    quick: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """A stage on a slice: what was found, the flags to type for it, `steps` and `epochs` of the whole run (0 steps: as
    many as the pairs are), why nothing was compiled where it was not, and what to change where it does not fit."""

    slice: Slice
    report: Report
    flags: list[str]
    steps: int
    epochs: int
    why: str | None
    advice: str | None


def plan_stage(run: Run, stage: str, slices: list[Slice], search: bool) -> Result:
    """One stage on the first of `slices` that it fits on, or on the last."""
    # What is asked for is the smallest slice for the training that the config says, or how to get it onto one slice.
    several = len(slices) > 1
    options: dict[str, Any] = {
        "ranks": (_RANK,) if not several and stage != "extract" else (),
        "tries": _TRIES if several else None,
    }
    for one in slices if several else ():
        found = _searched(run, stage, one, options)
        if found is not None:
            return found
    found = _searched(run, stage, slices[-1], options) if search and not several else None
    return _as_given(run, stage, slices[-1]) if found is None else found


@dataclasses.dataclass(frozen=True)
class _Trial:
    """A stage on a slice under changed settings."""

    run: Run
    stage: str
    slice: Slice
    why: str | None
    devices: list[Any]

    def built(self, change: Change) -> tuple[Any, Any]:
        return stage_of(self.run, self.stage, change, self.devices)

    def least(self, change: Change) -> float:
        from nla_jax.train.plan import least_bytes

        return least_bytes(self.built(change)[0])

    def in_parts(self, change: Change) -> list[Change]:
        """The same with the rollout in ever more parts."""
        if self.stage != "rl":
            return [change]
        N = _settings(self.run, self.stage).batch_size
        parts = (change.rollout_parts * 2**i for i in range(_PARTS.bit_length()))
        return [dataclasses.replace(change, rollout_parts=n) for n in parts if n <= _PARTS and N % n == 0] or [change]

    def attempt(self, change: Change, effort: float = 0.0) -> tuple[Change, Report]:
        """Compiles with the fewest parts of the rollout that it fits in."""
        every = self.in_parts(change)
        open_ = [one for one in every[:-1] if self.least(one) <= self.slice.chip.hbm] + every[-1:]
        for one in open_:
            report = self.count(one, effort)
            if _ROLLOUT not in report.too_large:
                break
        return one, report

    def count(self, change: Change, effort: float = 0.0, whole: bool = False) -> Report:
        """Compiles the updates first, which need the most, and stops at what does not fit unless `whole`."""
        from nla_jax.train.plan import row_of, summary
        from nla_jax.train.plan_stage import UPDATE

        programs, place = self.built(change)
        compiler = None if self.why is not None else _compiler(self.run, self.stage, self.slice, change, effort)
        rows = {}
        for program in sorted(programs.programs, key=lambda p: p.varies != UPDATE):
            row = rows[program.name] = row_of(program, programs, place, self.slice.chip, compiler)
            if not whole and (row.refused or row.total > self.slice.chip.hbm):
                break
        kept = [rows[p.name] for p in programs.programs if p.name in rows]
        return summary(programs, place, self.slice.chip, kept, compiler is None)

    def result(self, report: Report, **more: Any) -> Result:
        given: dict[str, Any] = {"flags": [], "why": self.why, "advice": None, **more}
        settings = None if self.stage == "extract" else _settings(self.run, self.stage)
        given |= {"steps": getattr(settings, "steps", 0), "epochs": getattr(settings, "epochs", None) or 1}
        return Result(self.slice, report, **given)


def _trial(run: Run, stage: str, one: Slice) -> _Trial:
    from nla_jax.train.plan_slices import devices_of, why_not

    why = why_not(one)
    if why is not None and one.chip.tpu:
        raise InputError(why)
    return _Trial(run, stage, one, why, devices_of(one) if why is None else _stand_ins(one.chips))


def _searched(run: Run, stage: str, one: Slice, options: dict[str, Any]) -> Result | None:
    """Looks with the compiler's least effort, and compiles what was found as training does, unless the run is quick.

    The two differ by a few percent of memory. Where what was found does not fit as training compiles it, the search is
    done again that way. That nothing fits is taken from the look alone, which errs towards too much."""
    from nla_jax.train.plan_search import search

    trial, given, rows = _trial(run, stage, one), change_of(run, stage), _rows(run, stage)

    def tell(change: Change, why: str) -> None:
        what = [_mesh_words(change.mesh.shape(one.chips)), f"accumulate {change.accumulate}", f"remat {change.remat}"]
        what += [f"rollout in {change.rollout_parts} parts"] if change.rollout_parts > 1 else []
        what += [f"LoRA of rank {change.rank}"] if change.rank else []
        note(f"{one.name}, {', '.join(what)}: {why}")

    hbm = one.chip.hbm
    if trial.why is not None:
        options = {**options, "tries": None}  # arithmetic costs nothing

    def least(change: Change) -> float:
        return trial.least(trial.in_parts(change)[-1])

    for effort in (_LEAST_EFFORT, 0.0):
        attempt = functools.partial(trial.attempt, effort=effort)
        found = search(given, one.chips, rows, least, attempt, hbm, tell, _most(stage), **options)
        if found is None:
            return None
        change, report = found
        if effort and not run.quick:
            change, report = trial.attempt(change)
        if report.fits:
            return trial.result(report, flags=_flags(stage, change, given))
    raise AssertionError("a search found what does not fit")


def _as_given(run: Run, stage: str, one: Slice) -> Result:
    """As the config says; what to change where that does not fit."""
    from nla_jax.train.plan import report as count

    trial, given = _trial(run, stage, one), change_of(run, stage)
    if trial.least(given) > one.chip.hbm and trial.why is None:
        programs, place = trial.built(given)
        why = "nothing was compiled: what the stage must hold is more than a chip has"
        found, more = count(programs, place, one.chip, None), {"why": why}
    else:
        found, more = trial.count(given, _LEAST_EFFORT if run.quick else 0.0, whole=True), {}
    if not found.fits:
        more["advice"] = _advice(trial, given, _rows(run, stage))
    return trial.result(found, **more)


def _stand_ins(chips: int) -> list[Any]:
    """Devices for arithmetic alone: a mesh needs some, and only counts them."""
    import jax

    here = jax.devices()
    if len(here) < chips:
        raise InputError("JAX_NUM_CPU_DEVICES", expected=f"{chips} or more", got=len(here), fix="unsetting it")
    return list(here[:chips])


def change_of(run: Run, stage: str) -> Change:
    """What the config says of all that a search may change."""
    from nla_jax.models.sharding import MeshSettings
    from nla_jax.train.plan_search import Change

    if stage == "extract":  # its own options, not the config's
        return Change("blocks", 1, MeshSettings())
    settings = _settings(run, stage)
    parts = getattr(settings, "rollout_parts", 1)
    return Change(settings.remat, settings.accumulate, settings.mesh, settings.lora.rank, parts)


def _settings(run: Run, stage: str) -> Any:
    from nla_jax.train.settings import from_config

    return from_config(run.config, stage)


def _rows(run: Run, stage: str) -> int:
    if stage == "extract":
        return 2**20  # any number of documents
    settings = _settings(run, stage)
    return int(settings.batch_size * getattr(settings, "samples", 1))


def _most(stage: str) -> int:
    """Micro-batches that may be tried."""
    return 1 if stage == "extract" else 64


def stage_of(run: Run, stage: str, change: Change, devices: list[Any]) -> tuple[Any, Any]:
    """A stage's programs on `devices`, and where they lie."""
    from nla_jax.train.plan_programs import extraction, joint_rl, warm_start
    from nla_jax.train.plan_stage import make_place

    place = make_place(change.mesh, devices)
    if stage == "extract":
        length = run.document_tokens
        options: dict[str, Any] = {"batch_tokens": 2048, "length": length, "per_document": min(10, length)}
        return extraction(run.model, place, dtype="bfloat16", **options), place
    given = _settings(run, stage)
    lora = dataclasses.replace(given.lora, rank=change.rank)
    changed = {name: getattr(change, name) for name in ("remat", "accumulate", "mesh")}
    if stage == "rl":
        changed["rollout_parts"] = change.rollout_parts
    settings = dataclasses.replace(given, lora=lora, **changed)
    return (joint_rl if stage == "rl" else warm_start)(settings, run.model, place), place


def _compiler(run: Run, stage: str, one: Slice, change: Change, effort: float) -> Any:
    from nla_jax.train.plan import Compiler

    settings = {} if stage == "extract" else _settings(run, stage).to_dict()

    def key(varies: tuple[str, ...]) -> str:
        left_out = _SEARCHED - set(varies)
        kept = {name: value for name, value in settings.items() if name not in (*_ELSEWHERE, *left_out)}
        changed = {name: value for name, value in dataclasses.asdict(change).items() if name not in left_out}
        said = [repr(run.model), kept, run.document_tokens, one.name, changed, effort, versions(), _sources()]
        return json.dumps(said, sort_keys=True)

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = home / "nla_jax" / "plan" if run.cache else None

    def compiling(name: str) -> None:
        note(f"compiling {name} for {one.name}, {_mesh_words(change.mesh.shape(one.chips))}")

    return Compiler(key, directory, compiling, effort)


def versions() -> list[str]:
    out = []
    for name in ("jax", "jaxlib", "libtpu", "flax", "optax"):
        try:
            out.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            out.append(f"no {name}")
    return out


def _sources() -> str:
    """Names the code that the programs are made of: a change of it is another program."""
    import nla_jax
    from nla_jax import models, train

    digest = hashlib.sha256()
    for package in (models, nla_jax, train):
        for path in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            if path.stem.startswith("plan") and path.stem not in ("plan_programs", "plan_stage", "plan_hlo"):
                continue  # looks at programs, and makes none
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _flags(stage: str, change: Change, given: Change) -> list[str]:
    flags = change.flags(stage, given)
    if stage != "extract":
        return flags
    return [f"--{name} {getattr(change.mesh, name)}" for name in ("fsdp", "tensor") if getattr(change.mesh, name) > 1]


def _mesh_words(shape: tuple[int, int, int]) -> str:
    return "data {} x fsdp {} x tensor {}".format(*shape)


def _advice(trial: _Trial, given: Change, rows: int) -> str:
    """The first change that arithmetic does not rule out."""
    from nla_jax.errors import NLAError
    from nla_jax.train.plan_search import changes

    stage, one = trial.stage, trial.slice
    for whole in changes(given, one.chips, rows, _most(stage), (_RANK,) if stage != "extract" else ()):
        for change in trial.in_parts(whole):
            try:
                if change != given and trial.least(change) <= one.chip.hbm:
                    return f"{' '.join(_flags(stage, change, given))} may fit; --search finds out"
            except NLAError:
                break
    return f"no mesh of {one.chips} chips holds it: a larger slice"
