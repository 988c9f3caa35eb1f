"""The tables of README's "What it will take": every released pair on the smallest slices, and weak scaling.

    python -m nla_jax.tools.plan_survey            runs `nla plan` for all that plans.json does not hold yet: hours
    python -m nla_jax.tools.plan_survey --table    prints the tables, in Markdown, from plans.json

Needs jax[tpu]; no TPU. Results stand in configs/plans.json with the command and the versions that gave each.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from nla_jax.train.plan_slices import parse_slice

RESULTS = Path(__file__).resolve().parent.parent / "configs" / "plans.json"
RANK = 16
CHIPS = ("v5e", "v6e", "v5p")
CONFIGS = {
    "qwen2_5_7b_l20": "Qwen2.5-7B L20",
    "gemma3_12b_l32": "Gemma-3-12B L32",
    "gemma3_27b_l41": "Gemma-3-27B L41",
    "llama3_3_70b_l53": "Llama-3.3-70B L53",
}
# Slices of 8 to 256 chips: parameters split over 8, and ever more copies, each with its 32 activations.
SCALING = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SCALED = 8
_GIB = 2.0**30


def commands() -> dict[str, list[str]]:
    """Name -> arguments of `nla plan`."""
    out = {}
    for lora in (RANK, 0):
        for chip in CHIPS:
            for config in CONFIGS:
                name = f"{config} {'LoRA' if lora else 'full'} {chip}"
                out[name] = [f"--config={config}", f"--config.lora.rank={lora}", "--slice", chip, "--search", "--quick"]
    for shape in SCALING:
        copies = parse_slice(f"v5p:{shape}").chips // SCALED
        out[f"weak scaling v5p:{shape}"] = [
            *("--config=qwen2_5_7b_l20", "--slice", f"v5p:{shape}", f"--config.mesh.fsdp={SCALED}"),
            f"--config.rl.batch_size={32 * copies}",
            "--quick",
        ]
    return out


def compact(found: dict[str, Any], command: list[str]) -> dict[str, Any]:
    """What the tables need of `nla plan --json`. Bytes are of one chip."""
    (stage,) = found["stages"]
    worst = max(stage["programs"], key=lambda p: p["total"])
    sent: dict[str, dict[str, float]] = {}
    for program in stage["programs"]:
        if not program["once"] and program["sent"]:
            sent[program["name"]] = {kind: size for kind, size in program["sent"].items() if size}
    kept = {name: stage[name] for name in ("slice", "chips", "mesh", "fits", "flags", "hbm", "residents")}
    return {
        "command": shlex.join(["nla", "plan", *command]),
        "versions": found["versions"],
        **kept,
        "worst": worst["name"],
        "needs": worst["total"],
        "step_samples": stage["step_samples"],
        "step_seconds": stage["step_seconds"],
        "bounds": {p["name"]: p["bound"] for p in stage["programs"] if not p["once"]},
        "sent": sent,
    }


def read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def write(results: dict[str, Any]) -> None:
    ordered = {name: results[name] for name in commands() if name in results}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def run(name: str, command: list[str]) -> None:
    """Plans one of them and adds it to the results."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        call = [sys.executable, "-m", "nla_jax.tools.cli", "plan", *command, "--json", str(out)]
        subprocess.run(call, stdout=subprocess.DEVNULL)  # what it tries, it tells on stderr
        if not out.is_file():
            raise click.ClickException(f"{name}: nla plan found nothing (see above)")
        found = json.loads(out.read_text(encoding="utf-8"))
    write({**read(), name: compact(found, command)})


def pairs_table(results: dict[str, Any]) -> list[str]:
    """Markdown: the smallest slice of each chip, what a chip holds at its fullest there, and the bound on the speed."""
    lines = ["| joint training of | on | slice (data x fsdp x tensor) | GiB of a chip | of it kept | samples/s/chip |"]
    lines.append("|---|---|---|---|---|---|")
    for config, label in CONFIGS.items():
        for kind in ("full", "LoRA"):
            for chip in CHIPS:
                found = results.get(f"{config} {kind} {chip}")
                if found is not None:
                    lines.append(f"| {label}, {kind} | {chip} | {_cells(found)} |")
    return lines


def _cells(found: dict[str, Any]) -> str:
    if not found["fits"]:
        return f"none up to {found['slice'].partition(':')[2]} | – | – | –"
    mesh = " x ".join(str(found["mesh"][axis]) for axis in ("data", "fsdp", "tensor"))
    more = [flag.rpartition(".")[2] for flag in found["flags"] if "accumulate" in flag or "rollout_parts" in flag]
    layout = f"{found['slice'].partition(':')[2]} ({', '.join([mesh, *more])})"
    kept = sum(found["residents"].values()) / _GIB
    rate = found["step_samples"] / found["step_seconds"] / found["chips"]
    return f"{layout} | {found['needs'] / _GIB:.1f} of {found['hbm'] / _GIB:.1f} | {kept:.1f} | {rate:.3g}"


def scaling_table(results: dict[str, Any]) -> list[str]:
    """Markdown: what a chip sends and holds in a step, as copies are added."""
    lines = ["| chips | copies | GB sent: rollout | reference | AR update | AV update | GiB of a chip |"]
    lines.append("|---|---|---|---|---|---|---|")
    for shape in SCALING:
        found = results.get(f"weak scaling v5p:{shape}")
        if found is None:
            continue
        sent = {name: sum(kinds.values()) / 1e9 for name, kinds in found["sent"].items()}
        parts = [("re-layout", "rollout"), ("reference log-probs",), ("AR update",), ("AV update",)]
        cells = [f"{sum(sent.get(name, 0.0) for name in names):.1f}" for names in parts]
        chips = found["chips"]
        lines.append(f"| {chips} | {chips // SCALED} | {' | '.join(cells)} | {found['needs'] / _GIB:.1f} |")
    return lines


@click.command()
@click.option("--table", is_flag=True, help="Print the tables of what is there.")
@click.option("--only", metavar="TEXT", default="", help="Those with this in their name.")
def main(table: bool, only: str) -> None:
    if not table:
        for name, command in commands().items():
            if only in name and name not in read():
                click.echo(f"{name}: nla plan {shlex.join(command)}", err=True)
                run(name, command)
    results = read()
    click.echo("\n".join([*pairs_table(results), "", *scaling_table(results)]))


if __name__ == "__main__":
    main()
