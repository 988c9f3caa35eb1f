"""`nla card`: a model card in Hugging Face form from an evaluation, with its numbers for machines too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nla_jax.errors import InputError
from nla_jax.tools import options as o


@click.command()
@click.option("--eval", "evaluation", type=o.FILE, metavar="OUT", required=True, help="The --out of nla eval.")
@click.option("--av", metavar="DIR", type=o.FILE, required=True, help="The AV's directory, which the card is for.")
@click.option("--ar", metavar="DIR", type=o.FILE, help="The AR's directory.")
@click.option("--out", type=o.FILE, metavar="PATH", help="The card. Default: README.md in --av.")
@click.option("--name", metavar="NAME", help="Of the model. Default: from --av.")
@click.option("--license", "license_id", metavar="ID", help="Such as apache-2.0: a licence's name on the hub.")
@click.option("--base-model", metavar="ID", help="The target's hub id, where the sidecar names none.")
@click.option("--overwrite", is_flag=True, help="Replace a card that is there.")
def card(
    evaluation: Path,
    av: Path,
    ar: Path | None,
    out: Path | None,
    name: str | None,
    license_id: str | None,
    base_model: str | None,
    overwrite: bool,
) -> None:
    """Write the model card of a pair from its evaluation.

    The card says what the model is, how it is used, how well it does (each number with its interval and controls),
    what not to conclude, and where everything came from. Its header holds the same numbers as model-index, which the
    hub and other programs read. An evaluation of other weights than those in --av or --ar is refused.

    \b
    Example:
      nla card --eval eval --av runs/mine/rl/export/av --ar runs/mine/rl/export/ar --license apache-2.0
    """
    from nla_jax.tools import card_text, outputs
    from nla_jax.tools.eval_report import read_results

    results = read_results(evaluation)
    roles = {name: path for name, path in (("av", av), ("ar", ar)) if path is not None}
    for role, path in roles.items():
        check_directory(role, path)
        check_weights(role, path, results)
    path = out if out is not None else av / "README.md"
    if path.exists() and not overwrite:
        raise InputError(f"{path}: there is a card already", fix="--out of another name, or --overwrite")
    results_file = evaluation / "results.json" if evaluation.is_dir() else evaluation
    outputs.check_outputs([path], [results_file])
    text = card_text.card_text(results, roles, name=name, license_id=license_id, base_model=base_model)
    count = sum(len(suite["rows"]) for suite in results["suites"])

    def writer(part: Path) -> None:
        part.write_text(text, encoding="utf-8")

    outputs.write(path, writer, f"model card, {count} numbers")


def check_directory(role: str, path: Path) -> None:
    """Raises unless `path` is a directory of that role."""
    from nla_jax.sidecar import read_sidecar

    if not path.is_dir():
        raise InputError(f"--{role} {path}", expected="a directory of the model", got="none")
    found = read_sidecar(path).role
    if found not in (None, role):
        raise InputError(f"--{role} {path}", expected=f"the {role.upper()}", got=found.upper())


def check_weights(role: str, path: Path, results: dict[str, Any]) -> None:
    """Raises where the evaluation is of other weights than those in `path`."""
    from nla_jax.evals.provenance import weights_hash

    recorded = results.get("models", {}).get(role)
    if recorded is None:
        raise InputError(f"--{role} {path}", expected=f"an evaluation with the {role.upper()}", got="one without")
    if recorded.get("weights") not in (None, weights_hash(path)):
        raise InputError(
            f"--{role} {path}",
            expected=f"the weights that were evaluated ({recorded['given']})",
            got="others",
            fix="nla eval again, with this directory",
        )
