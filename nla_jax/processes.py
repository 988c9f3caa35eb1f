"""Several processes that compute together: how they find each other, tell each other numbers, and end together.

The engine is `jax.distributed`. Every process runs the same command on its own host; process 0 writes. On TPU pods,
under Slurm, Open MPI and in Kubernetes JAX finds out by itself who takes part; elsewhere the command line says it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from nla_jax.errors import InputError, NLAError

HEARTBEAT_SECONDS = 60  # a process that is not heard of for so long is lost
EXIT_LOST = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on
_START_SECONDS = 300
# What an error says where another process went away in the middle of a collective or of a checkpoint.
_LOST = (
    *("gloo", "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe"),
    *("heartbeat", "coordination service", "distributed service", "unavailable:", "deadline_exceeded", "nccl"),
)


class LostProcessError(NLAError):
    """Another process of the run is gone, so that this one cannot go on."""


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat: int = HEARTBEAT_SECONDS,
) -> bool:
    """Joins the other processes, if there are any; to be called before anything is computed. Whether it did.

    `coordinator` is HOST:PORT of process 0. Without any of the three, the cluster says it where there is one
    (`cluster`); `processes` 1 is this process alone. InputError where they are given in part, or wrong."""
    given = {"--coordinator": coordinator, "--num-processes": processes, "--process-id": process}
    if processes == 1 and process in (None, 0):
        return False
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given) and cluster() is None:
        raise InputError("several processes", expected=", ".join(given), got=f"no {', '.join(missing)}")
    if len(missing) == len(given) and cluster() is None:
        return False
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise InputError("--coordinator", expected="HOST:PORT of process 0, such as 10.0.0.1:8476", got=coordinator)
    if processes is not None and process is not None and not 0 <= process < processes:
        raise InputError("--process-id", expected=f"0 to {processes - 1}", got=process)
    if (os.environ.get("JAX_PLATFORMS") or "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        # Where a process is lost, JAX's client says so and aborts the others (jaxlib 0.10 cannot call back instead: its
        # missed_heartbeat_callback dies converting its argument), unless a failed collective was there first.
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=_START_SECONDS,  # at the end, process 0 may still be writing
        )
    except (RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        fix = "all processes started with the same --coordinator, within five minutes"
        raise InputError(f"the processes did not come together ({first})", fix=fix) from None
    return True


def cluster() -> str | None:
    """What starts several processes here, by its environment: "Slurm", "Open MPI", "Kubernetes" or "TPU"; None for a
    process of its own."""
    env = os.environ

    def number(name: str) -> int:
        value = env.get(name, "")
        return int(value) if value.isdigit() else 0

    if "SLURM_STEP_NODELIST" in env and number("SLURM_NTASKS") > 1:
        return "Slurm"
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or number("MEGASCALE_NUM_SLICES") > 1:
        return "TPU"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    # A Cloud TPU VM names its pod in its metadata alone. A pod of one host joins itself, at no cost.
    platforms = env.get("JAX_PLATFORMS", "")
    here = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    if here and "TPU_SKIP_MDS_QUERY" not in env and (not platforms or "tpu" in platforms):
        return "TPU"
    return None


def of_all(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Numbers of each process: name -> float64 [processes], in every process."""
    if jax.process_count() == 1:
        return {name: np.asarray([value], np.float64) for name, value in values.items()}
    # As bytes: without 64-bit mode, JAX would round float64 to float32.
    packed = np.asarray(list(values.values()), np.float64).view(np.uint8)
    told = np.asarray(multihost_utils.process_allgather(packed)).reshape(jax.process_count(), -1)
    table = np.ascontiguousarray(told).view(np.float64)
    return {name: table[:, i] for i, name in enumerate(values)}


def of_first(value: Any) -> Any:
    """Process 0's value, in every process: what JSON can hold."""
    if jax.process_count() == 1:
        return value
    text = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(size, b" "), np.uint8))
    return json.loads(bytes(np.asarray(told, np.uint8)))


def lost(error: BaseException) -> LostProcessError | None:
    """The error to show for one that says, or was caused by one that says, that another process is gone."""
    if jax.process_count() == 1:
        return None
    cause: BaseException | None = error
    while cause is not None:
        if not isinstance(cause, NLAError) and any(word in str(cause).lower() for word in _LOST):
            return _lost(str(cause))
        cause = cause.__cause__ or cause.__context__
    return None


def _lost(why: str) -> LostProcessError:
    return LostProcessError(
        f"another process of this run is gone, so this one ends too ({' '.join(why.split())[:160]})",
        fix="the same command on all hosts: a run goes on from its last checkpoint; what ended it stands in its log",
    )
