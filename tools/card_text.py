"""What a model card says: YAML for machines (huggingface_hub's ModelCardData), then text and tables in plain words."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from nla_jax import __version__
from nla_jax.sidecar import Sidecar, read_sidecar
from nla_jax.tools import eval_report as tables
from nla_jax.tools.eval_report import Json, cell
from nla_jax.tools.report import layer_aliases

TASK, TASK_NAME = "natural-language-autoencoding", "Natural language autoencoding of activations"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_TAGS = ["natural-language-autoencoder", "nla", "interpretability", "activations", "jax"]
_MOST_SETTINGS = 60


def card_text(
    results: Json,
    roles: Mapping[str, Path],
    *,
    name: str | None = None,
    license_id: str | None = None,
    base_model: str | None = None,
) -> str:
    """The card of `roles` ({"av": directory, "ar": directory}) as text; the same for the same files."""
    sidecar = read_sidecar(roles["av"])
    results = _without_places(results)
    base = base_model or _hub_id(sidecar.base_model)
    title = name or model_name(roles["av"])
    data = ModelCardData(
        model_name=title,
        base_model=base,
        library_name="nla_jax",
        license=license_id,
        tags=[*_TAGS, *(f"activation-{kind}" for kind in ("verbalizer", "reconstructor")[: len(roles)])],
        metrics=_unique(row["metric"] for suite in results["suites"] for row in suite["rows"]),
        eval_results=list(eval_results(results)),
    )
    body = "\n".join(
        [
            f"# {title}",
            "",
            *_what(sidecar, roles, base),
            *_use(roles, base),
            *_numbers(results),
            *_caveats(results),
            *_training(roles),
            *_provenance(results),
        ]
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body.rstrip()}\n"))


def eval_results(results: Json) -> Iterator[EvalResult]:
    """Every number of the evaluation, controls named as such, in the form of a hub model-index."""
    data = results.get("data", {})
    path = str(data.get("path", "activations"))
    for suite in results["suites"]:
        for row in suite["rows"]:
            if row["value"] is None:
                continue
            control = f"control: {row['control']}" if row["control"] else ""
            about = {key: row[key] for key in ("low", "high", "n", "documents", "denominator") if row[key]}
            about |= {key: row[key] for key in ("low", "high") if row[key] is not None}
            yield EvalResult(
                task_type=TASK,
                task_name=TASK_NAME,
                dataset_type="activations",
                dataset_name=Path(path).name or path,
                dataset_config=suite["suite"],
                dataset_split=data.get("split"),
                dataset_revision=data.get("hash"),
                metric_type=row["metric"],
                metric_name=", ".join(part for part in (row["metric"], row["group"], control) if part),
                metric_value=row["value"],
                metric_args=about,
            )


def model_name(directory: Path) -> str:
    """A directory's name; of an export, with its run's and stage's ("mine-rl-av")."""
    parts = directory.resolve().parts
    if len(parts) > 4 and parts[-2] == "export":
        return "-".join((parts[-4], parts[-3], parts[-1]))
    return parts[-1]


# -- sections ---------------------------------------------------------------------------------------------------------


def _what(sidecar: Sidecar, roles: Mapping[str, Path], base: str | None) -> list[str]:
    target = base or Path(sidecar.base_model or "its target").name
    what = "a natural language autoencoder (NLA)" if "ar" in roles else "the AV of a natural language autoencoder (NLA)"
    layer = sidecar.layer_index
    where = "one layer"
    if layer is not None:
        names = " = ".join(f"`{alias}`" for alias in layer_aliases(layer).values())
        where = f"layer_index {layer}, counted from 0: the output of {names}"
    return [
        f"This is {what} of {cell(target)}. It puts what the model computes into words, and measures",
        "how much of it the words hold.",
        "",
        "- The **AV** (activation verbalizer) is given one residual-stream vector of the target in place of a token's",
        "  embedding, and writes an explanation of it.",
        "- The **AR** (activation reconstructor) reads the explanation and predicts the vector. The better it does,",
        "  the more of the vector the words said: that is `fve_nrm`, the share of variance of directions explained.",
        f"- The vectors are those of {where}. D is {sidecar.d_model}.",
        *([f"- Vectors are injected at norm {sidecar.injection_scale:g}."] if sidecar.injection_scale else []),
        "",
    ]


def _use(roles: Mapping[str, Path], target: str | None) -> list[str]:
    names = {"target": target or "TARGET", "av": "AV", "ar": "AR"}
    options = " ".join(f"--{role} {shlex.quote(names[role])}" for role in ("target", *roles))
    given = ", ".join(f"{role}={json.dumps(names[role], ensure_ascii=False)}" for role in (*roles, "target"))
    score = "e.fve_nrm, " if "ar" in roles else ""
    return [
        "## How to use it",
        "",
        "With nla_jax; AV" + (" and AR are" if "ar" in roles else " is") + " a directory or a hub id:",
        "",
        "```bash",
        f'nla explain "The capital of France is" {options} --samples 4',
        "```",
        "",
        "```python",
        "import nla_jax",
        "",
        f"nla = nla_jax.NLA.from_pretrained({given})",
        'for e in nla.explain("The capital of France is", positions=[-1], samples=4):',
        f"    print(e.position, e.token, {score}e.text)",
        "```",
        "",
    ]


def _numbers(results: Json) -> list[str]:
    return [
        "## How well it does",
        "",
        "One explanation for each activation unless the table says otherwise. A number without its control says",
        "little: the controls are measured on the same activations.",
        "",
        *(f"- {name}: {cell(text)}" for name, text in tables.facts(results)),
        "",
        *tables.markdown_suites(results, level=3),
    ]


def _caveats(results: Json) -> list[str]:
    measured = {suite["suite"] for suite in results["suites"]}
    first = results.get("data", {}).get("min_position")
    early = f"Positions before {first}," if first else "The first positions of a text,"
    out = [
        "An explanation is trained to let the vector be read back. It is not trained to be true.",
        "Single claims may be false, and a false claim can still help the AR. A claim that many samples and"
        " neighbouring positions share deserves more trust than one that stands alone.",
        "A high fve_nrm can come from quoting nearby words or from a code that the AV and the AR share. The controls"
        " and the changed texts in the tables bound that; they do not rule it out.",
        "fve_nrm depends on its denominator. Compare it between models only with the same target and layer, and never"
        " compare cosines across models.",
        f"The numbers hold for the data named above. {early} special tokens and other kinds of text may do worse.",
    ]
    missing = [tables.heading(name)[0].lower() for name in tables.SUITES if name not in measured]
    if missing:
        out.append(f"Not measured here: {', '.join(missing)}.")
    return ["## What not to conclude", "", *(f"- {text}" for text in out), ""]


def _training(roles: Mapping[str, Path]) -> list[str]:
    found = [(role, dict(training_settings(path))) for role, path in roles.items()]
    shown = [(role, settings) for role, settings in found if settings]
    if not shown:
        return []
    out = ["## Training", ""]
    if len(shown) == 2 and shown[0][1] == shown[1][1]:
        shown = [("AV and AR", shown[0][1])]
    for role, settings in shown:
        rows = list(_flat("", settings))[:_MOST_SETTINGS]
        whose = role.upper() if role in roles else role
        out += [f"<details><summary>Settings of the {whose}</summary>", "", "| setting | value |", "|---|---|"]
        out += [*(f"| {cell(key)} | {cell(value)} |" for key, value in rows), "", "</details>", ""]
    return out


def training_settings(directory: Path) -> Mapping[str, Any]:
    """What is known of a model's training: its sidecar's record, and the settings of the run that exported it."""
    from nla_jax.train.report_read import read_stage

    sidecar = read_sidecar(directory)
    out: dict[str, Any] = {"stage": sidecar.stage} if sidecar.stage else {}
    recorded = sidecar.raw.get("training")
    out |= recorded if isinstance(recorded, dict) else {}
    if directory.resolve().parent.name == "export":
        settings = read_stage(directory.resolve().parent.parent).run.get("settings")
        # Paths are of the machine that it ran on.
        unwanted = ("out", "target", "store", "av", "ar", "eval_store", "paraphraser_url")
        out |= {k: v for k, v in settings.items() if k not in unwanted} if isinstance(settings, Mapping) else {}
    return out


def _provenance(results: Json) -> list[str]:
    rows: list[tuple[str, str]] = []
    for role, model in results.get("models", {}).items():
        rows += [
            (f"{role}, {key.replace('_', ' ')}", f"`{value}`")
            for key, value in model.items()
            if key not in ("given", "path") and value
        ]
    data = results.get("data", {})
    rows += [(f"data, {key}", f"`{data[key]}`") for key in ("kind", "split", "hash", "rows_sha256") if data.get(key)]
    rows += [(f"version, {key}", cell(value)) for key, value in results.get("versions", {}).items()]
    rows.append(("command", f"`{' '.join(results.get('command', [])).replace('`', '').replace('|', ' ')}`"))
    return [
        "## Where the numbers come from",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {cell(name)} | {value} |" for name, value in rows),
        "",
        f"Card written by `nla card`, nla_jax {__version__}.",
        "",
    ]


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    elif value is not None and value != [] and value != "":
        yield prefix, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _without_places(results: Json) -> dict[str, Any]:
    """The results with the names alone of what lies on the machine that they were computed on: a card is published."""
    out = {**results, "command": [_named(part) for part in results.get("command", ())]}
    if "path" in (data := results.get("data", {})):
        out["data"] = {**data, "path": _named(str(data["path"]))}
    return out


def _named(text: str) -> str:
    """The last part of an absolute path or URL; other texts as they are."""
    return Path(text).name or text if text.startswith(("/", "~")) or "://" in text else text


def _hub_id(name: str | None) -> str | None:
    """A name that can be a hub id; a path on somebody's disk is none."""
    return name if name and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _unique(names: Any) -> list[str]:
    return list(dict.fromkeys(names))
