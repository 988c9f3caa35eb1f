"""What every test runs under: the CPU backend with 8 simulated devices, and no silent rank promotion."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from nla_jax import host_memory
from nla_jax.xla_cache import machine

REPO = Path(__file__).resolve().parent.parent


# By environment, so that the processes which tests start inherit it. Name an accelerator there to use it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation, and a warm cache saves most of that (`make clean` empties it).
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(REPO / ".pytest_cache" / "jax" / machine()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Compiled in less than half the time, and slower, which programs of this size do not notice. Set both to "" for code as
# users get it. (The flag is jaxlib 0.10's: one that no longer has it says so.)
QUICK_COMPILATION = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
for _name, _value in QUICK_COMPILATION.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402  (after the environment it reads)

# For this process only: what tests start is to run as it does for a user.
# Eight devices cost nothing measurable (arrays that no mesh shards stay on the first) and spare the sharding
# tests a process each. A missing axis that broadcasting would hide is an error here.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# What `nla train` asks of malloc cannot be taken back, and this process does more than train.
host_memory.keep_freed_memory = lambda: False

# A compiled program keeps its memory mappings for as long as JAX knows it. Linux grants a process 65530 of them, and
# XLA crashes past that.
_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def same_environment() -> Iterator[None]:
    """What a test file's commands set in the environment of this process does not reach the next one's."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def usual_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test starts is compiled as for a user: for what runs long."""
    for name in QUICK_COMPILATION:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True, scope="module")
def few_mappings() -> Iterator[None]:
    """Forgets compiled programs between test files where there are many."""
    yield
    mapped = Path("/proc/self/maps")
    if mapped.exists() and mapped.read_bytes().count(b"\n") > _MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real tokenizers, released sidecars and text that lies beside the repository."""
    path = REPO.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("needs the shared data directory beside the repository (../shared/data)")
    return path
