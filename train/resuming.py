"""Whether a run may go on from a checkpoint: what was set and what was trained then, and now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nla_jax.errors import CheckpointError

# Changing these does not change what is trained, or by rounding alone: a run may be resumed with others, on a slice
# that is smaller too. Not micro-batches: teacher pairs that are replayed come in multiples of them.
MAY_CHANGE = (
    *("mesh", "remat", "logit_chunk", "rollout_parts"),
    *("out", "log_every", "eval_every", "save_every", "keep_last"),
)


def changed_setting(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """(name, before, now) of the first setting that differs and may not; nested ones are named a.b."""
    for key in sorted({*before, *now}):
        if not prefix and key in MAY_CHANGE:
            continue
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if found := changed_setting(old, new, f"{prefix}{key}."):
                return found
        elif old != new:
            return f"{prefix}{key}", old, new
    return None


def check_settings(directory: Path, step: int, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """CheckpointError naming the first setting that differs from those of the checkpoint."""
    difference = changed_setting(before, now)
    if difference is not None:
        name, old, new = difference
        raise CheckpointError(
            f"{directory}: the run was started with another {name}",
            expected=f"{old!r}, as at step {step}",
            got=repr(new),
            fix="the same settings to resume it, or another directory to train anew",
        )


def check_arrays(directory: Path, step: int, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """CheckpointError naming the first array, name -> [shape, dtype], that is not the one that was stored."""
    for name in sorted({*stored, *now}):
        if stored.get(name) != now.get(name):
            raise CheckpointError(
                f"{directory}: the state saved at step {step} is another model's or optimizer's: {name}",
                expected=now.get(name, "nothing"),
                got=stored.get(name, "nothing"),
                fix="another directory to train anew",
            )
