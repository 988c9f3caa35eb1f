"""A mini pair on disk and a way to run the `nla` command on it, for the tests of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from click.testing import CliRunner

from nla_jax.tools.cli import main
from nla_jax.tools.mini import MiniPair, make_mini

VARIANCE = 0.7
D = 64


def mini_pair(out: Path) -> MiniPair:
    return make_mini(out, d_model=D, variance_nrm=VARIANCE)


def saved_vectors(path: Path) -> Path:
    np.save(path, np.random.default_rng(0).normal(size=(6, D)).astype(np.float32))
    return path


def run(*args: object, code: int = 0, stdin: str | bytes | None = None):
    done = CliRunner().invoke(main, [str(a) for a in args], input=stdin)
    assert done.exit_code == code, f"{done.exit_code}\n{done.stdout}\n{done.stderr}\n{done.exception!r}"
    return done


def roles(pair: MiniPair, *names: str) -> list[str]:
    return [part for name in names or ("target", "av", "ar") for part in (f"--{name}", str(getattr(pair, name)))]


SHORT = ("--max-new-tokens", "6")
