"""What a training process does with freed memory, in a process of its own: mallopt cannot be taken back."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from nla_jax.host_memory import keep_freed_memory
if len(sys.argv) > 1 and not keep_freed_memory():
    sys.exit(3)
def touch():
    np.ones(32 << 20, np.uint8)  # 32 MiB, freed at once
for _ in range(3):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode == 3:
        pytest.skip("needs glibc and a machine without an accelerator's plugin")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_block_that_was_freed_is_used_again_without_new_pages():
    assert _faults("keep") < 100
