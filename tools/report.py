"""What a command ran with and what it found, in the form that tables, files and pages are written from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from nla_jax.pair import NLA, Explanation
    from nla_jax.tools.tokens import MessageSpan, TokenView

# Before this many tokens of context, activations are dominated by a few sink directions.
EARLY = 50


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a command ran with. `models` maps a role to what was given and the directory it resolved to.

    `variance_nrm` is the fve_nrm denominator and `variance_source` where it came from (None: not known).
    """

    command: str
    arguments: tuple[str, ...]
    models: dict[str, dict[str, str]]
    device: str
    dtype: str
    d_model: int
    layer_index: int | None
    mse_scale: float | None
    variance_nrm: float | None
    variance_source: str | None
    settings: dict[str, Any]

    @property
    def floor(self) -> float | None:
        return constant_floor(self.variance_nrm, self.mse_scale, self.d_model)


@dataclasses.dataclass(frozen=True)
class Report:
    """A setup and its explanations. `vectors` [N, D] are the explained ones; `index` has one entry per explanation.

    `source` is the text or the messages of `explain` and `tokens` all of its tokens; None for `verbalize`.
    """

    setup: Setup
    explanations: Sequence[Explanation]
    vectors: np.ndarray
    index: Sequence[int]
    source: str | list[dict[str, Any]] | None = None
    tokens: Sequence[TokenView] = ()
    messages: Sequence[MessageSpan] = ()

    @property
    def scored(self) -> bool:
        return any(e.cosine is not None for e in self.explanations)


def describe(nla: NLA, given: dict[str, str | None], dtype: str | None, **rest: Any) -> Setup:
    """The setup of a command from its `NLA`; `given` holds the paths or ids of the roles as typed."""
    import jax

    from nla_jax.roles import default_dtype

    roles = {name: getattr(nla, name) for name in ("target", "av", "ar") if getattr(nla, name) is not None}
    dtypes = {name: dtype or default_dtype(role.path) for name, role in roles.items()}
    same = len(set(dtypes.values())) == 1
    layers = [nla.target.layer_index] if nla.target else [r.sidecar.layer_index for r in roles.values()]
    device = jax.devices()[0]
    kind = device.device_kind
    return Setup(
        models={name: {"given": str(given.get(name)), "path": str(role.path)} for name, role in roles.items()},
        device=device.platform if kind.lower() == device.platform else f"{device.platform} ({kind})",
        dtype=next(iter(dtypes.values())) if same else ", ".join(f"{k} {v}" for k, v in dtypes.items()),
        d_model=next(iter(roles.values())).cfg.d_model,
        layer_index=next((k for k in layers if k is not None), None),
        mse_scale=nla.ar.sidecar.mse_scale if nla.ar else None,
        variance_nrm=nla.variance_nrm,
        variance_source=nla.variance_source,
        **rest,
    )


def layer_aliases(layer_index: int | None) -> dict[str, str]:
    """The names of one place: the output of block K in torch, TransformerLens and transformers' hidden_states."""
    if layer_index is None:
        return {}
    return {
        "module": f"model.layers[{layer_index}]",
        "transformer_lens": f"blocks.{layer_index}.hook_resid_post",
        "hidden_states": f"hidden_states[{layer_index + 1}]",
    }


def notes(setup: Setup) -> list[str]:
    """What the reader of any number must know: device, dtype, layer, and the denominator of fve_nrm."""
    out = [f"device {setup.device}, {setup.dtype}, D {setup.d_model}"]
    if setup.layer_index is None:
        out.append("layer_index: not named by the sidecars")
    else:
        names = " = ".join(layer_aliases(setup.layer_index).values())
        out.append(f"layer_index {setup.layer_index} = output of {names}")
    if setup.variance_nrm is not None and setup.mse_scale is not None:
        out.append(f"fve_nrm denominator {setup.variance_nrm:.4g} ({setup.variance_source})")
    elif setup.mse_scale is not None:
        out.append("fve_nrm: the variance of the training set is not known; give it with --variance")
    return out


def constant_floor(variance: float | None, mse_scale: float | None, d_model: int) -> float | None:
    """The fve_nrm of always predicting the mean direction: 1 - 2 (1 - sqrt(1 - V)) / V at mse_scale sqrt(D).

    At scale s the mean squared entry is u = s^2 / D, and V / u takes the place of V.
    """
    if variance is None or mse_scale is None:
        return None
    v = variance * d_model / mse_scale**2
    return 1 - 2 * (1 - math.sqrt(1 - v)) / v if 0 < v <= 1 else None


@dataclasses.dataclass(frozen=True)
class Tally:
    """Means over `n` explanations of `places` tokens or vectors; `failed` of them did not parse.

    `fve_nrm` is 1 - sum(mse_nrm) / (n * variance): a ratio of sums. None where there is nothing to average.
    """

    name: str
    n: int
    places: int
    failed: int
    cosine: float | None
    mse_nrm: float | None
    fve_nrm: float | None


def tally(name: str, rows: Iterable[Explanation], variance: float | None) -> Tally:
    """Means of the scored explanations (NaN counts: a broken score must show)."""
    rows = list(rows)
    errors = [e.mse_nrm for e in rows if e.mse_nrm is not None]
    cosines = [e.cosine for e in rows if e.cosine is not None]
    mse = math.fsum(errors) / len(errors) if errors else None
    return Tally(
        name=name,
        n=len(rows),
        places=len({(e.position, e.row) for e in rows}),
        failed=sum(e.failed for e in rows),
        cosine=math.fsum(cosines) / len(cosines) if cosines else None,
        mse_nrm=mse,
        fve_nrm=None if mse is None or variance is None else 1 - mse / variance,
    )


def tallies(report: Report) -> list[Tally]:
    """Tallies by place: the headline over positions from 50 on, early ones and special tokens apart.

    One sink token can move a mean by 0.3. Vectors without a position are one group.
    """
    variance = report.setup.variance_nrm
    if report.source is None:
        return [tally("all vectors", report.explanations, variance)]
    special = {view.position for view in report.tokens if view.special}
    names = (f"positions >= {EARLY}", f"positions < {EARLY}", "special tokens")
    groups: dict[str, list[Explanation]] = {name: [] for name in names}
    late, early, other = groups.values()
    for e in report.explanations:
        (other if e.position in special else late if (e.position or 0) >= EARLY else early).append(e)
    return [tally(name, rows, variance) for name, rows in groups.items() if rows]
