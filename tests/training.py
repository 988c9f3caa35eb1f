"""A tiny story world for the tests of training, from nothing to a warm-started pair: made once, in seconds.

A target of 3 blocks and width 32 (a few steps of `lm`), its store, short notes as explanations, training sets with
documents held out, and an AR and AV that were trained just long enough for explanations to parse.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from nla_jax.build import Build, Plan, build, open_build
from nla_jax.claims import join_claims, split_claims
from nla_jax.store import SPLITS, Store
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools import cli, world
from nla_jax.tools.world_tokenizer import AR_TEMPLATE, AV_TEMPLATE, MARKER
from nla_jax.train.checkpoint import Checkpoints, abstract
from nla_jax.train.loop import Result, run
from nla_jax.train.settings import from_config
from nla_jax.train.tasks import make_task
from nla_jax.train.writers import read_lines

LAYER = 1
STORIES, DOCUMENTS = 160, 400
NEW_TOKENS = 14
MODEL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
_MUON = {"name": "muon", "lr": 0.02, "adam_lr": 1e-2, "schedule": "constant", "warmup": 0.0}
# Its own length, so that runs of any number of steps share their compiled programs.
_ADAM = {"name": "adamw", "lr": 1e-3, "schedule": "linear", "warmup": 2.0, "steps": 20}
# What RL can do beside its objective, at once.
_OPTIONS: dict[str, Any] = {
    "replay_ar": 1 / 3,
    "replay_av": 0.1,
    "transforms": [["shuffle", 0.5], ["drop_quotes", 0.3], ["noise", 0.3]],
}


@dataclasses.dataclass(frozen=True)
class World:
    """Paths of what was made, below `path`."""

    path: Path

    @property
    def store(self) -> Path:
        return self.path / "store"

    @property
    def target(self) -> Path:
        return self.path / "run" / "lm" / "export" / "target"

    @property
    def av(self) -> Path:
        return self.path / "run" / "av" / "export" / "av"

    @property
    def ar(self) -> Path:
        return self.path / "run" / "ar" / "export" / "ar"

    def build(self) -> Build:
        return open_build(self.store)

    def config(self) -> dict[str, Any]:
        """A run config as a dictionary; the stages have 4 steps."""
        stage = {"steps": 4, "log_every": 1, "eval_rows": 16}
        warm = {**stage, "epochs": None, "batch_size": 16, "buckets": [32], "optim": _ADAM}
        return {
            "out": str(self.path / "run"),
            "target": str(self.target),
            "store": str(self.store),
            "seed": 0,
            "logit_chunk": 4096,
            "mesh": {"data": 1},
            "lm": {
                "corpus": str(self.path / "world" / "lm.jsonl"),
                "tokenizer": str(self.path / "world" / "tokenizer"),
                "steps": 4,
                "log_every": 1,
                "batch_size": 8,
                "length": 64,
                "model": MODEL,
                "optim": _ADAM,
            },
            "ar": warm,
            "av": warm,
            "rl": {
                **stage,
                "av": str(self.av),
                "ar": str(self.ar),
                "batch_size": 4,
                "samples": 4,
                "max_new_tokens": NEW_TOKENS,
                "av_optim": _ADAM,
                "ar_optim": _ADAM,
                **_OPTIONS,
            },
        }

    def settings(self, stage: str, **changes: Any) -> Any:
        """Settings of a stage; changes of its section, or of the top level where that has the key alone."""
        config = self.config()
        config[stage] = {**config[stage], **changes}
        return from_config(config, stage)

    def task(self, stage: str, **changes: Any) -> Any:
        return make_task(self.settings(stage, **changes))

    def train(self, stage: str, out: Path, stop_at: int | None = None, **changes: Any) -> Result:
        """`nla train` of a stage without a report; `stop_at` is the step after which it is stopped."""
        return quietly(self.task(stage, **changes), out, stop_at)

    def config_file(self, path: Path, **sections: Any) -> Path:
        """A config for the command line; sections are merged key by key."""
        config = self.config()
        for name, value in sections.items():
            config[name] = {**config[name], **value} if isinstance(value, dict) else value
        text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config!r})\n"
        path.write_text(text)
        return path


def quietly(task: Any, out: Path, stop_at: int | None = None, progress: bool = False) -> Result:
    return run(task, out, stop=lambda step: step == stop_at, tensorboard=False, report=False, progress=progress)


def nla(*arguments: object) -> str:
    """Runs a command in this process; its output."""
    done = CliRunner().invoke(cli.main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def command(*arguments: object) -> list[str]:
    """The `nla` command for a process of its own."""
    return [sys.executable, "-m", "nla_jax.tools.cli", *map(str, arguments)]


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, **options)


def make_world(factory: pytest.TempPathFactory) -> World:
    """The world of this session."""
    return _make(factory.getbasetemp() / "training")


@functools.cache
def _make(path: Path) -> World:
    made = World(path)
    world.write_world(path / "world", 0, STORIES, DOCUMENTS)
    out = path / "run"
    made.train("lm", out, steps=12, log_every=12, optim=_MUON)
    extract(made, path / "world" / "stories.jsonl", made.store)
    nla("teach", made.store, f"file:{short_notes(made.store, path / 'world')}")
    build_sets(made, made.store, (0.3, 0.3, 0.3))
    made.train("ar", out, steps=25, log_every=25, eval_rows=0, optim=_MUON)
    made.train("av", out, steps=50, log_every=50, eval_rows=0, optim=_MUON)
    return made


def extract(made: World, corpus: Path, store: Path) -> None:
    nla("extract", corpus, "--target", made.target, "--layer", LAYER, "--out", store, "--per-document", 4,
        "--min-position", 8)  # fmt: skip


def short_notes(store: Path, folder: Path) -> Path:
    """The world's notes cut to their last two clauses, so that few tokens are sampled, as a file for `nla teach`."""
    world.write_notes(Store.open(store), folder / "facts.jsonl", folder / "notes.jsonl", 0)
    rows = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
    short = [{**row, "explanation": join_claims(split_claims(row["explanation"])[-2:], "a. b.")} for row in rows]
    (folder / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    return folder / "short.jsonl"


def build_sets(made: World, store: Path, fractions: tuple[float, float, float]) -> Build:
    """`nla build` with the story world's prompts."""
    shares = dict(zip(SPLITS, fractions, strict=True))
    plan = Plan(AV_TEMPLATE, AR_TEMPLATE, MARKER, fractions=shares)
    return build(store, Tokenizer.from_dir(made.target), plan, overwrite=True)


def other_store(made: World, path: Path) -> Path:
    """A store of 20 other stories, with explanations and without training sets."""
    world.write_world(path / "world", 1, 20, 1)
    extract(made, path / "world" / "stories.jsonl", path / "store")
    nla("teach", path / "store", f"file:{short_notes(path / 'store', path / 'world')}")
    return path / "store"


# -- what runs are compared by -----------------------------------------------------------------------------------------

_TIMED = ("time", "steps_per_s", "eval_seconds")


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl of a stage's directory without what depends on the clock and on the directory."""
    rows = [{k: v for k, v in row.items() if k not in _TIMED} for row in read_lines(run_dir / "metrics.jsonl")]
    for row in rows:
        row.get("run", {}).get("settings", {}).pop("out", None)
    return rows


def restored(task: Any, run_dir: Path) -> tuple[int, Any, dict[str, Any]]:
    """(step, state, meta) of the newest checkpoint of a stage's directory."""
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        found = checkpoints.restore(abstract(task.init()))
    assert found is not None
    return found.step, found.state, found.meta


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def finite(tree: Any) -> bool:
    return all(bool(np.isfinite(np.asarray(x, np.float32)).all()) for x in jax.tree.leaves(tree))
