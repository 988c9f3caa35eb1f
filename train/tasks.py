"""From settings to the task that the loop drives."""

from __future__ import annotations

from typing import Any

from nla_jax.train.settings import LMSettings, RLSettings, Settings, SFTSettings


def make_task(settings: Settings) -> Any:
    """The task of a stage's settings. Each module is imported for its own stage alone."""
    if isinstance(settings, LMSettings):
        from nla_jax.train.task_lm import LMTask

        return LMTask(settings)
    if isinstance(settings, SFTSettings):
        from nla_jax.train.task_sft import SFTTask

        return SFTTask(settings)
    assert isinstance(settings, RLSettings)
    from nla_jax.train.task_rl import RLTask

    return RLTask(settings)
