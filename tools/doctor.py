"""`nla doctor`: checks directories of a pair alone and against each other, in words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from nla_jax.doctor import Diagnosis, diagnose


@click.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="DIR...")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--quiet", is_flag=True, help="Print warnings and problems only.")
@click.pass_context
def doctor(ctx: click.Context, directories: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Check a target, an AV, an AR or data alone and against each other.

    The order does not matter: what each directory is follows from its files. Nothing is changed and no weights are
    loaded. Exits with 0 when there is no problem, 1 when there is one, 2 when a path is nothing that can be checked.

    \b
    Example:
      nla doctor Qwen2.5-7B-Instruct nla-qwen2.5-7b-L20-av nla-qwen2.5-7b-L20-ar
    """
    diagnosis = diagnose(directories)
    click.echo(as_json_text(diagnosis) if as_json else as_text(diagnosis, quiet=quiet))
    ctx.exit(0 if diagnosis.healthy else 1)


def as_text(diagnosis: Diagnosis, *, quiet: bool = False) -> str:
    """One line per finding, under the directory or pair that it is about."""
    kinds = dict(diagnosis.parts)
    places = [*kinds, *(f.where for f in diagnosis.findings)]
    lines = []
    for where in dict.fromkeys(places):
        shown = [f for f in diagnosis.findings if f.where == where and not (quiet and f.level in ("ok", "note"))]
        if not shown:
            continue
        lines.append(f"{kinds[where]}: {where}" if where in kinds else where)
        for f in shown:
            fix = f" -> {f.fix}" if f.fix else ""
            lines.append(f"  {f.level:8}{f.check}: {f.text}{fix}")
    counts = {level: sum(f.level == level for f in diagnosis.findings) for level in ("problem", "warning")}
    lines.append(", ".join(f"{n or 'no'} {level}{'' if n == 1 else 's'}" for level, n in counts.items()))
    return "\n".join(lines)


def as_json_text(diagnosis: Diagnosis) -> str:
    """The findings as JSON: `healthy`, `parts` (path and what it is) and `findings`."""
    content = {
        "healthy": diagnosis.healthy,
        "parts": [{"path": path, "kind": kind} for path, kind in diagnosis.parts],
        "findings": [dataclasses.asdict(f) for f in diagnosis.findings],
    }
    return json.dumps(content, indent=2, ensure_ascii=False)
