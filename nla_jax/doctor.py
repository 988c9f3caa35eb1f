"""What is wrong with a set of directories (target, AV, AR, data), said in words: the checks behind `nla doctor`.

Each directory is checked alone and against the others. Only small files, the headers of weight files and a few rows
of a few tensors are read, so that a 100 GB checkpoint takes seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from nla_jax.errors import InputError, NLAError

Level = Literal["ok", "note", "warning", "problem"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check's result. `where`: a directory, or the pair of roles compared; `fix`: what to do, where there is
    something to do; `check`: a short fixed name of the check, for programs."""

    level: Level
    where: str
    check: str
    text: str
    fix: str | None = None


class Report:
    """Findings in the order they were made."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def add(self, level: Level, where: object, check: str, text: str, fix: str | None = None) -> None:
        line = " ".join(text.split())
        self.findings.append(Finding(level, str(where), check, line, fix))

    def ok(self, where: object, check: str, text: str) -> None:
        self.add("ok", where, check, text)

    def note(self, where: object, check: str, text: str) -> None:
        self.add("note", where, check, text)

    def warning(self, where: object, check: str, text: str, fix: str | None = None) -> None:
        self.add("warning", where, check, text, fix)

    def problem(self, where: object, check: str, text: str, fix: str | None = None) -> None:
        self.add("problem", where, check, text, fix)

    def error(self, where: object, check: str, error: NLAError) -> None:
        """A problem from an exception, which carries its own remedy."""
        text = str(error)
        if error.fix:
            text = text.removesuffix(". Try: " + " ".join(error.fix.split()))
        self.problem(where, check, text, error.fix)


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What each path was taken for, as (path, "target" | "AV" | "AR" | "dataset"), and all findings."""

    parts: tuple[tuple[str, str], ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return not any(f.level == "problem" for f in self.findings)


def diagnose(paths: Sequence[str | Path]) -> Diagnosis:
    """Checks directories (or data files) in any order. InputError for a path that is none of the known things."""
    # The checks import numpy and the models; `import nla_jax` must stay light.
    from nla_jax import doctor_checks, doctor_pair
    from nla_jax.doctor_files import find

    if not paths:
        raise InputError("doctor", expected="at least one directory", got="none", fix="nla doctor TARGET AV AR")
    report = Report()
    found = []
    for path in dict.fromkeys(str(Path(p)) for p in paths):
        found += find(Path(path), report)
    layers = [f.sidecar.layer_index for f in found if f.sidecar is not None and f.sidecar.layer_index is not None]
    for f in found:
        doctor_checks.check_alone(f, report, layers[0] if layers else None)
    doctor_pair.check_together(found, report)
    return Diagnosis(tuple((str(f.path), f.kind) for f in found), tuple(report.findings))
