"""Where compiled programs are kept between runs, so that the second start of a command does not compile again."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path


def machine() -> str:
    """Names this kind of CPU: code compiled for one may not run on another that shares the directory."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = [line for line in lines if line.lower().startswith(("model name", "flags", "features"))][:2]
    return hashlib.sha256("\n".join([platform.machine(), *features]).encode()).hexdigest()[:12]


def enable() -> None:
    """Points jax at a per-user cache; to be called before jax is imported. A place set by the user is kept.

    Setting JAX_ENABLE_COMPILATION_CACHE=false turns it off, as for any jax program."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "nla_jax" / f"xla-{machine()}"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
