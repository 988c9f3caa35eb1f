"""Commands on two processes of this machine with four simulated devices each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from training import command

from nla_jax import processes

TIMEOUT = 300


def start(arguments: Sequence[object], logs: Path, heartbeat: int = 30) -> list[subprocess.Popen]:
    """The command on two processes that join; each writes a log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    env = {**os.environ, "XLA_FLAGS": flags}
    running = []
    for i in range(2):
        joining = ("--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, "--process-id", i)
        with (logs / f"{i}.log").open("w") as log:
            said = {"stdout": log, "stderr": subprocess.STDOUT, "env": env}
            line = command(*arguments, *joining, "--heartbeat", heartbeat)
            running.append(subprocess.Popen(line, **said))
    return running


def log(logs: Path, process: int) -> str:
    found = (logs / f"{process}.log").read_text(errors="replace").splitlines()
    return "\n".join(line for line in found if "peer ranks is" not in line)


def finish(arguments: Sequence[object], logs: Path) -> None:
    running = start(arguments, logs)
    try:
        codes = [p.wait(TIMEOUT) for p in running]
    finally:
        for p in running:
            p.kill()
    assert codes == [0, 0], f"{log(logs, 0)}\n{log(logs, 1)}"


def kill_one(running: list[subprocess.Popen], victim: int, logs: Path, ready: Callable[[], bool]) -> float:
    """Kills one of two processes once `ready`; the other must say so and end. Seconds that took."""
    try:
        while not ready():
            codes = [p.poll() for p in running]
            assert codes == [None, None], f"{codes}\n{log(logs, 0)}\n{log(logs, 1)}"
            time.sleep(0.01)
        running[victim].kill()
        began = time.monotonic()
        code = running[1 - victim].wait(60)
        took = time.monotonic() - began
    finally:
        for p in running:
            p.kill()
            p.wait()
    said = log(logs, 1 - victim)
    # JAX's own client may be there first, and aborts.
    assert code in (processes.EXIT_LOST, -signal.SIGABRT), (code, said)
    assert "another process of this run is gone" in said or "another task died" in said
    return took


def refused(arguments: Sequence[object], message: str, logs: Path) -> None:
    """Bad input ends all processes, and the first says what is wrong."""
    running = start(arguments, logs)
    try:
        codes = [p.wait(120) for p in running]
    finally:
        for p in running:
            p.kill()
    assert codes[0] == 2 and codes[1] in (2, processes.EXIT_LOST, -signal.SIGABRT)
    assert message in log(logs, 0)
