"""Keeps freed memory in the process while training on CPU: a step's arrays are a few large blocks, given back and asked
for again every step, and each time the system fills gigabytes of fresh pages with zeros (13% of a step's processor time
at 2 GB of temporaries; several times that in virtual machines that hand free pages back to their host)."""

from __future__ import annotations

import ctypes
import importlib.util
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def keep_freed_memory() -> bool:
    """To be called before other threads run; True where it took effect (glibc, and no accelerator's plugin installed:
    there the large arrays are not in the host's memory)."""
    if not sys.platform.startswith("linux") or any(importlib.util.find_spec(name) for name in _ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # One heap that only grows: no block gets pages of its own, none are returned. -1 is the largest threshold.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
    return mallopt is not None and all([bool(mallopt(name, value)) for name, value in settings])
