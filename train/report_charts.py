"""Which charts a training report has: what is drawn together, in which unit, on which scale."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from nla_jax.train.report_plots import COLOURS, Chart, Line, line
from nla_jax.train.report_read import Stage

_FVE = {  # metric: (label, line style)
    "eval/fve_nrm": ("sampled", "-"),
    "eval/fve_nrm_greedy": ("greedy", "-"),
    "eval/fve_nrm_teacher": ("teacher's texts", "-"),
    "eval/fve_calibrated": ("sampled, calibrated", "--"),
    "eval/fve_calibrated_teacher": ("teacher's texts, calibrated", "--"),
    "eval/fve_shuffled_calibrated": ("shuffled pairs, calibrated", ":"),
    "eval/fve_shuffled_calibrated_teacher": ("shuffled pairs, calibrated", ":"),
    "eval/fve_nrm_transformed": ("with the training transforms", "-."),
}
_OF_TEXTS = {
    "eval/fve_nrm": ("untouched", "-"),
    "eval/fve_nrm_shuffle": ("claims shuffled", "-"),
    "eval/fve_nrm_drop_quotes": ("quotes dropped", "-"),
    "eval/fve_nrm_noise": ("case and punctuation", "-"),
    "eval/fve_nrm_transformed": ("training transforms", "--"),
    "eval/fve_nrm_paraphrase": ("paraphrased", "-"),
}
_UNIT = "FVE of directions (fve_nrm)"
# title, unit, last parts of the names, logarithmic
_PANELS = [
    ("Reward", "reward", ("reward",), False),
    ("FVE of the training batch", "fve_nrm", ("fve_nrm",), False),
    ("Length of explanations", "tokens", ("length",), False),
    ("Samples that do not parse", "share", ("failed_share",), False),
    ("KL to the warm start", "nats per token", ("kl",), False),
    ("Entropy of sampled tokens", "nats per token", ("entropy",), False),
    ("Gradient norm, before clipping", "norm", ("grad_norm",), True),
    ("Learning rate", "learning rate", ("lr",), False),
    ("Speed", "steps per second", ("steps_per_s",), False),
]
_LOSS_UNIT = {"lm": "nats per token", "av": "nats per token", "ar": "mse_nrm", "rl": "loss"}
_COUNTED = {
    "Samples that do not parse, in all": ("parse_failures",),
    "Updates skipped, vectors unusable": ("skipped", "bad_vectors"),
}
_COUNTS = tuple(itertools.chain.from_iterable(_COUNTED.values()))


def fve_charts(stage: Stage) -> list[Chart]:
    """FVE of the evaluations against steps, linear and logarithmic, and under changes of the texts."""
    lines = _named(stage, _FVE)
    charts = []
    if lines:
        charts.append(Chart("FVE against training steps", _UNIT, lines, wide=True))
        if any((of.steps > 0).sum() > 1 for of in lines):
            charts.append(Chart("The same, steps on a logarithmic scale", _UNIT, lines, log_x=True, wide=True))
    changed = _named(stage, _OF_TEXTS)
    if len(changed) > 1 and changed[0].label == "untouched":
        charts.append(Chart("FVE when the texts are changed", _UNIT, changed, wide=True))
    return charts


def brief_charts(stage: Stage) -> list[Chart]:
    """What another stage's page shows of this one."""
    fve = [dataclasses.replace(chart, wide=False) for chart in fve_charts(stage)[:1]]
    return [*fve, *_losses(stage), *_counts(stage)]


def stage_charts(stage: Stage) -> list[Chart]:
    """Losses, then what is watched beside them, then what went wrong."""
    charts = list(_losses(stage))
    for title, unit, endings, log in _PANELS:
        names = [n for n in stage.series if _last(n) in endings and not n.startswith("eval/fve")]
        charts += _charts(title, unit, stage, names, log)
    return charts + _counts(stage)


def _counts(stage: Stage) -> list[Chart]:
    """What went wrong over the run, where anything did."""
    charts = []
    # Two charts: one skipped update would not show beside a hundred samples that do not parse.
    for title, counted in _COUNTED.items():
        lines = tuple(_running(stage, name) for name in counted if stage.total(name) > 0)
        if lines:
            charts.append(Chart(title, "count so far", lines, whole=True))
    return charts


def other_charts(stage: Stage) -> list[Chart]:
    """Metrics that have no chart of their own, each in one."""
    known = {ending for panel in _PANELS for ending in panel[2]} | {"loss", "loss_shuffled", "eval_seconds", *_COUNTS}
    names = [
        name
        for name in sorted(stage.series)
        if name not in _FVE and name not in _OF_TEXTS and _last(name) not in known and name != "eval/constant_floor"
    ]
    return [chart for name in names for chart in _charts(name, _last(name), stage, [name], False)]


def _losses(stage: Stage) -> Iterator[Chart]:
    """A chart for each loss: the two models' losses of a joint run have different units."""
    named = [n for n in stage.series if _last(n) in ("loss", "loss_shuffled")]
    groups = {n.rpartition("/")[0].removeprefix("eval").strip("/") for n in named}
    for group in sorted(groups):
        names = [n for n in named if n.rpartition("/")[0].removeprefix("eval").strip("/") == group]
        unit = {"av": "policy loss", "ar": "mse_nrm"}.get(group, _LOSS_UNIT.get(stage.name, "loss"))
        yield from _charts(f"Loss of the {group.upper()}" if group else "Loss", unit, stage, names, False)


def _charts(title: str, unit: str, stage: Stage, names: list[str], log: bool) -> list[Chart]:
    lines = []
    for name in sorted(names, key=lambda n: (n.startswith("eval/"), n)):
        held_out = name.startswith("eval/")
        label = _label(name)
        lines.append(line(label, list(stage.series[name].items()), "--" if held_out else "-"))
    lines = [of for of in lines if not of.empty][:COLOURS]
    return [Chart(title, unit, tuple(lines), log_y=log)] if lines else []


def _label(name: str) -> str:
    held_out = name.startswith("eval/")
    label = name.removeprefix("eval/")
    if held_out:
        return (
            f"held out, vectors of other documents ({label})" if label.endswith("_shuffled") else f"held out ({label})"
        )
    return label


def _named(stage: Stage, names: dict[str, tuple[str, str]]) -> tuple[Line, ...]:
    lines = [
        line(label, list(stage.series[n].items()), style) for n, (label, style) in names.items() if n in stage.series
    ]
    return tuple(of for of in lines if not of.empty)


def _running(stage: Stage, name: str) -> Line:
    """A count's sum up to each step, over both models."""
    at: dict[int, float] = {}
    for metric, series in stage.series.items():
        if _last(metric) == name:
            for step, value in series.items():
                at[step] = at.get(step, 0.0) + (value if math.isfinite(value) else 0.0)
    steps = sorted(at)
    return line(name, list(zip(steps, itertools.accumulate(at[s] for s in steps), strict=True)))


def _last(name: str) -> str:
    return name.rpartition("/")[2]
