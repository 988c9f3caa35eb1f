"""What a demo's run came to: variance explained, controls and the truth of stated facts, before and after RL.

`measure(OUT)` puts the numbers together that the stages wrote (OUT/rl/metrics.jsonl and samples.jsonl, the control run
OUT/frozen/rl where there is one) with the facts of the stories. Everything is of documents that no stage trained on.
Intervals are of 95%, by bootstrap over documents: rows of one document are not independent.
"""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax import __version__
from nla_jax.errors import InputError
from nla_jax.evals import intervals
from nla_jax.store import Store
from nla_jax.tools.demo_rows import Places, examples, fact_probes, last_token_fve, places, training_rows
from nla_jax.tools.outputs import finite
from nla_jax.tools.world import CORPUS_SHARES, Story, read_facts, stated
from nla_jax.tools.world_facts import truth
from nla_jax.train.report_read import STAGES, Stage, read_stage

CHANGES = ("shuffle", "drop_quotes", "noise")
_LEAST_FVE = 0.05  # a share of less than this is no share of anything


def measure(out: Path, *, seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The numbers of the demo in `out`, as JSON holds them: None where there is no number. `seconds`: what each stage
    took. InputError if `out` holds no finished joint run, or a run on another store."""
    out = Path(out)
    rl, store, stories = read_stage(out / "rl"), Store.open(out / "store"), _stories(out)
    before, after = _evaluations(rl)
    if (found := rl.run.get("store")) not in (None, store.manifest["hash"]):
        raise InputError(f"{out}/rl was trained on another store", expected=store.manifest["hash"], got=found)
    common = sorted({r["row"] for r in before[1]} & {r["row"] for r in after[1]})
    if not common:
        raise InputError(f"{out}/rl/samples.jsonl", expected=f"the same rows at steps {before[0]} and {after[0]}")
    at = places(store, stories, np.array(common, np.int64))
    variance = float(rl.run["variance_nrm"])
    sides, errors, texts = [], [], []
    for step, rows in (before, after):
        of_row = {r["row"]: r for r in rows}
        picked = [of_row[row] for row in common]
        errors.append(np.array([r["mse_nrm"] for r in picked], np.float64))
        texts.append([str(r["explanation"]) for r in picked])
        sides.append(_side(rl, step, 1.0 - errors[-1] / variance, texts[-1], at))
    train, held_out = training_rows(store, rl.run.get("layer_index"))
    both = [places(store, stories, rows) for rows in (train, held_out)]
    settings = rl.run.get("settings", {})
    results = {
        "seed": settings.get("seed"),
        "n": len(common),
        "documents": len(np.unique(at.docs)),
        "resamples": intervals.RESAMPLES,
        "variance_nrm": variance,
        "before": sides[0],
        "after": sides[1],
        "gain": bootstrap((errors[0] - errors[1]) / variance, np.ones(len(common)), at.docs),
        "ar_only": _ar_only(out / "frozen" / "rl", variance),
        "last_token": last_token_fve(store, train, at.rows, variance),
        "probes": fact_probes(store, *both),
        "world": _world(out, store, rl),
        "stages": {s.name: _summary(s) for name in STAGES if not (s := read_stage(out / name)).empty},
        "examples": examples(store, at, (before, after)),
        "commands": _commands(out),
        "seconds": dict(seconds or {}),
        "versions": {
            "nla_jax": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "numpy")},
        },
    }
    return finite(results)


def bootstrap(numerator: np.ndarray, denominator: np.ndarray, docs: np.ndarray) -> dict[str, float | None]:
    """A ratio of sums over rows ([n] each) as {value, low, high}, its interval by document (nla_jax.evals.intervals);
    None where there is none, as of one document."""
    value, low, high = intervals.ratio(numerator, denominator, docs)
    if value is not None and not np.isfinite(value):
        value = low = high = None
    return {"value": value, "low": low, "high": high}


# -- one evaluation ----------------------------------------------------------------------------------------------------


def _evaluations(stage: Stage) -> tuple[tuple[int, list[dict[str, Any]]], tuple[int, list[dict[str, Any]]]]:
    """The first and the last evaluation's samples."""
    if len(stage.samples) < 2 or "eval/fve_nrm" not in stage.series or "variance_nrm" not in stage.run:
        raise InputError(
            f"{stage.path} holds no finished joint run",
            expected="metrics.jsonl and samples.jsonl with an evaluation before training and one after",
            got=f"{len(stage.samples)} evaluations with samples",
            fix="nla demo, the same command again, which goes on where it stopped",
        )
    first, last = stage.samples
    return first, last


def _side(stage: Stage, step: int, fve: np.ndarray, texts: list[str], at: Places) -> dict[str, Any]:
    """Numbers of one evaluation; `fve` float64 [n] is 1 - mse_nrm / variance of each row."""

    def metric(name: str) -> float | None:
        return stage.series.get(f"eval/{name}", {}).get(step)

    whole = metric("fve_nrm")
    changed = {name: metric(f"fve_nrm_{name}") for name in CHANGES}
    found = truth(texts, at.stories, at.ends)
    claims = [stated(text) for text in texts]
    hits = [sum(s.facts[k] in values for k, values in c.items()) for c, s in zip(claims, at.stories, strict=True)]
    counts = [sum(map(len, c.values())) for c in claims]
    return {
        "step": step,
        "fve_nrm": bootstrap(fve, np.ones(len(fve)), at.docs),
        "greedy": metric("fve_nrm_greedy"),
        "teacher": metric("fve_nrm_teacher"),
        "calibrated": metric("fve_calibrated"),
        "shuffled": metric("fve_shuffled"),
        "shuffled_calibrated": metric("fve_shuffled_calibrated"),
        "constant_floor": metric("constant_floor"),
        "cosine": metric("cosine"),
        "failed_share": metric("failed_share"),
        "length": metric("length"),
        "changed": changed,
        "costs": {name: cost(whole, value) for name, value in changed.items()},
        "facts": {kind: dataclasses.asdict(k) for kind, k in found.kinds.items()},
        "overall": dataclasses.asdict(found.overall),
        "true": bootstrap(np.array(hits, float), np.array(counts, float), at.docs),
        "quoted": found.quoted,
        "quote_last": found.quote_last,
    }


def cost(whole: float | None, changed: float | None) -> float | None:
    """What a change of the texts takes off FVE, in percent of it; None where there is next to no FVE."""
    if whole is None or changed is None or not whole >= _LEAST_FVE:
        return None
    return 100 * (whole - changed) / whole


def _ar_only(path: Path, variance: float) -> dict[str, Any] | None:
    """FVE before and after the AR was trained on what a frozen AV writes."""
    stage = read_stage(path)
    if stage.empty:
        return None
    (first, before), (last, after) = _evaluations(stage)
    of_row = {r["row"]: r for r in before}
    pairs = [(of_row[r["row"]], r) for r in after if r["row"] in of_row]
    docs = np.array([r["doc"] for _, r in pairs])
    errors = np.array([[a["mse_nrm"], b["mse_nrm"]] for a, b in pairs], np.float64).T
    ones = np.ones(len(pairs))
    return {
        "steps": last - first,
        "before": bootstrap(1 - errors[0] / variance, ones, docs),
        "after": bootstrap(1 - errors[1] / variance, ones, docs),
        "gain": bootstrap((errors[0] - errors[1]) / variance, ones, docs),
    }


# -- the run -----------------------------------------------------------------------------------------------


def _stories(out: Path) -> dict[str, Story]:
    path = out / "world" / "facts.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing", expected="the facts of a demo's stories", fix="nla demo --out A_NEW_DIR")
    return read_facts(path)


def _world(out: Path, store: Store, rl: Stage) -> dict[str, Any]:
    corpus = out / "world" / "lm.jsonl"
    lines = corpus.read_bytes().count(b"\n") if corpus.is_file() else None
    return {
        "stories": store.n_docs,
        "corpus_documents": lines,
        "corpus_shares": dict(CORPUS_SHARES),
        "activations": store.n_rows,
        "width": store.d_model,
        "layer": rl.run.get("layer_index"),
        "held_out_documents": int((store.doc_splits < 0).sum()),
    }


def _summary(stage: Stage) -> dict[str, Any]:
    """How a stage was trained, and what it was held to on held-out data, first and last."""
    settings = stage.run.get("settings", {})
    metric = next((m for m in ("eval/fve_nrm", "eval/fve_nrm_teacher", "eval/loss") if m in stage.series), None)
    values = [v for _, v in sorted(stage.series.get(metric or "", {}).items())]
    return {
        "steps": stage.steps,
        "held_out": {"metric": metric, "first": values[0], "last": values[-1]} if values else None,
        "settings": {
            name: settings[name]
            for name in ("batch_size", "length", "samples", "model", "optim", "av_optim", "ar_optim", "transforms")
            + ("replay_ar", "replay_av", "claim_penalty", "kl", "kl_coef")
            if settings.get(name)
        },
    }


def _commands(out: Path) -> list[str]:
    """The commands that made the demo, where it wrote them down: each once."""
    path = out / "commands.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


# -- the README's table ------------------------------------------------------------------------------------------------

_COLUMNS = (
    *("seed", "warm start", "after RL", "gain", "calibrated, shuffled pairs", "AR only: gain", "failures"),
    *("stated facts true (chance)", "clause shuffle costs", "quote dropping costs", "minutes"),
)
RESULTS_HEADER = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"


def results_row(results: Mapping[str, Any]) -> str:
    """One Markdown row of the table over seeds: sampled fve_nrm with half the width of its interval, and the rest
    before -> after RL. A dash where there is no number."""
    before, after, alone = results["before"], results["after"], results["ar_only"]
    chance = _share(after["overall"]["chance"])
    costs = [[_percent(side["costs"][name]) for side in (before, after)] for name in CHANGES[:2]]
    minutes = sum(results["seconds"].values()) / 60
    cells = [
        str(results["seed"]),
        _interval(before["fve_nrm"]),
        _interval(after["fve_nrm"]),
        _interval(results["gain"], sign=True),
        _signed(after["shuffled_calibrated"]),
        "–" if alone is None else _interval(alone["gain"], sign=True),
        "–" if after["failed_share"] is None else f"{100 * after['failed_share']:.1f}%",
        f"{_share(before['true']['value'])} → {_share(after['true']['value'])} ({chance})",
        *(" → ".join(pair) for pair in costs),
        f"{minutes:.1f}" if minutes else "–",
    ]
    return f"| {' | '.join(cells)} |"


def results_table(*results: Mapping[str, Any]) -> str:
    """The table with a row for each run."""
    return "\n".join([RESULTS_HEADER, *map(results_row, results)])


def _interval(found: Mapping[str, float | None], sign: bool = False) -> str:
    value, low, high = (found[name] for name in ("value", "low", "high"))
    if value is None:
        return "–"
    width = "" if low is None or high is None else f" ±{_short((high - low) / 2)}"
    return f"{'+' if sign and value >= 0 else ''}{_short(value)}{width}"


def _short(value: float, digits: int = 3) -> str:
    """Without the zero before the point, as shares are written."""
    return re.sub(r"^(-?)0(?=\.)", r"\1", f"{value:.{digits}f}").replace("-", "−")


def _share(value: float | None) -> str:
    return "–" if value is None else _short(value, 2)


def _signed(value: float | None) -> str:
    return "–" if value is None else _short(value if abs(value) >= 5e-4 else 0.0)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}%".replace("-", "−")
