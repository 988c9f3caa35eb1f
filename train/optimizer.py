"""The optimizer of a stage: AdamW, or Muon for the block matrices with AdamW for the rest, after norm clipping."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from nla_jax.train.settings import OptimizerSettings


def schedule(settings: OptimizerSettings, peak: float) -> optax.Schedule:
    """Learning rate against optimizer steps: linear warm-up from 0 to `peak`, then constant, cosine or linear decay to
    `peak * end` at the last step."""
    total = max(settings.steps, 1)
    warm = settings.warmup if settings.warmup >= 1 else settings.warmup * total
    warm = min(round(warm), total)
    rest, last = max(total - warm - 1, 1), peak * settings.end  # the last update is number total - 1
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, settings.end),
        "linear": lambda: optax.linear_schedule(peak, last, rest),
    }[settings.schedule]()
    if not warm:
        return after
    # The first update has step 0: without the offset it would be lost.
    return optax.join_schedules([lambda i: peak * (i + 1) / warm, after], [warm])


def block_matrices(params: Any) -> Any:
    """Muon's dimension numbers: a stacked block matrix [L, in, out] is orthogonalised per block; None elsewhere.

    Embeddings, heads, norms and biases are not maps between layers of the same kind and stay with AdamW."""

    def one(path: tuple[Any, ...], p: Any) -> MuonDimensionNumbers | None:
        inside = any(getattr(key, "name", None) == "layers" for key in path)
        return MuonDimensionNumbers(reduction_axis=1, output_axis=2) if inside and p.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(one, params)


@functools.lru_cache(maxsize=32)
def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The update rule of `settings`; the same object for equal settings.

    Under "muon" what is no block matrix has AdamW with Nesterov's momentum, as Muon itself has it in optax."""
    lr = schedule(settings, settings.lr)
    if settings.name == "muon":
        adam_lr = schedule(settings, settings.adam_lr or settings.lr / 4)
        rule = muon(
            lr,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            adam_learning_rate=adam_lr,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=block_matrices,
        )
    else:
        rule = optax.adamw(lr, b1=settings.b1, b2=settings.b2, eps=settings.eps, weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip), rule) if settings.clip else rule
