"""A program under measurement in a process of its own, asked over pipes: no library sees the other's threads or memory.

The child runs `serve(programs)`; the parent's `Worker` asks it in lines of JSON. A program is an object made from a
folder of inputs, whose methods return what JSON can hold. Both sides get the same cores, and OpenMP threads that do
not spin while they wait, which would slow whichever program runs next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}


class Worker:
    """The parent's end. `ask(name, ...)` calls a method of the child's program and waits for its answer."""

    def __init__(self, module: str, program: str, folder: Path, threads: int):
        env = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.name = f"{module.rpartition('.')[2]} {program}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, program, str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            text=True,
        )
        self.loaded = self._answer()  # bytes resident once the weights are there

    def ask(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}; its error stands above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def take_turns(sides: Mapping[str, Worker], rounds: int) -> dict[str, Any]:
    """`rounds` steps of each side in turn, after one of each that is not counted. For each side: all wall and processor
    seconds and their medians, and the peak memory while stepping above what was resident with the weights; with
    "torch" beside "ours", the medians of torch's times over ours."""
    for worker in sides.values():
        worker.ask("seconds")  # whatever is left to compile or allocate
        worker.ask("reset_peak")
    times: dict[str, list[list[float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, worker in sides.items():
            times[side].append(worker.ask("seconds"))
    out: dict[str, Any] = {}
    for side, worker in sides.items():
        walls, cpus = zip(*times[side], strict=True)
        out |= {f"{side}_all": walls, f"{side}_s": statistics.median(walls)}
        out |= {f"{side}_cpu_all": cpus, f"{side}_cpu_s": statistics.median(cpus)}
        out |= {f"{side}_memory": worker.ask("memory")["peak"] - worker.loaded, f"{side}_loaded": worker.loaded}
    if "torch" in sides:
        for kind, i in (("ratio", 0), ("cpu_ratio", 1)):
            pairs = zip(times["ours"], times["torch"], strict=True)
            out[kind] = statistics.median(theirs[i] / ours[i] for ours, theirs in pairs)
    return out


def serve(programs: Mapping[str, Callable[[Path], Any]]) -> None:
    """The child's main loop: `python -m MODULE PROGRAM FOLDER THREADS`."""
    name, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    use_cores(threads)
    # Answers keep the pipe to themselves: what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    program = programs[name](folder)

    def answer(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    answer(memory()["now"])
    calls = {"seconds": lambda: timed(program.step), "memory": memory, "reset_peak": reset_peak}
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answer((calls.get(method) or getattr(program, method))(*arguments))


def use_cores(n: int) -> None:
    """Restricts this process to `n` of its cores, where the system can; to be called before a library counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds (of all threads) of one call; `run` must block until its result is there.

    On a machine that others use too, processor seconds say more than the wall's."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def memory() -> dict[str, int]:
    """Resident bytes of this process, `now` and at their `peak` since its start or the last `reset_peak`."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"now": peak, "peak": peak}
    text = status.read_text()
    now, peak = (int(re.search(rf"{name}:\s*(\d+)", text)[1]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[index]
    return {"now": now, "peak": peak}


def reset_peak() -> bool:
    """Makes `peak` start from what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
