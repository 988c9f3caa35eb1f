"""What a run shows on stderr: a bar on a terminal, else a plain line per evaluation."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm


def summary(
    values: Mapping[str, float], evaluation: Mapping[str, Any], totals: Mapping[str, float], best: str | None
) -> str:
    """Such as "loss 2.31, eval fve_nrm 0.412, skipped 3": a step's reward or loss, the metric of the last evaluation
    that the run is judged by, and counts that are over 0."""
    parts = []
    for name in ("reward", "loss"):
        if name in values:
            parts.append(f"{name} {_short(values[name])}")
            break
    judged = best if best is not None and best in evaluation else "eval/fve_nrm"
    if evaluation.get(judged) is not None:
        parts.append(f"{judged.replace('eval/', 'eval ')} {_short(evaluation[judged])}")
    parts += [f"{name} {count:.0f}" for name, count in sorted(totals.items()) if count > 0]
    return ", ".join(parts)


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "NaN"


class Progress:
    """Steps done of `steps`, from `first` on. Rate and time left are tqdm's own, of the steps of this process."""

    def __init__(self, name: str, steps: int, first: int, *, stream: TextIO | None = None, shown: bool = True):
        self._stream = sys.stderr if stream is None else stream
        self._name, self._steps, self._shown = name, steps, shown
        terminal = shown and self._stream.isatty()
        # Smoothed over the last steps: the first one compiles and would spoil the time left for long.
        self._bar = tqdm(
            total=steps, initial=first, desc=name, unit="step", disable=not terminal, file=self._stream, smoothing=0.1
        )

    @property
    def terminal(self) -> bool:
        return not self._bar.disable

    def update(self, step: int, text: str) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)

    def evaluated(self, step: int, text: str, rate: float | None) -> None:
        """Where no bar is shown: one line."""
        if self._shown and self._bar.disable:
            parts = [text] if text else []
            if rate:
                left = (self._steps - step) / rate
                parts += [f"{rate:.3g} steps/s", *([f"{tqdm.format_interval(left)} left"] if left > 0 else [])]
            self.note(f"{self._name} step {step}/{self._steps}: {', '.join(parts)}")

    def note(self, line: str) -> None:
        """A line of its own, above the bar."""
        if not self._shown:
            return
        if self._bar.disable:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.write(line, file=self._stream)

    def close(self) -> None:
        self._bar.close()
