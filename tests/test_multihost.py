"""Commands on two processes with four simulated devices each: what one process with one device does, and what happens
when one of the two is killed."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import training
from click.testing import CliRunner
from comparing import close, same_files
from several import finish, kill_one, log, refused, start
from training import World, lines

from nla_jax import processes
from nla_jax.errors import InputError
from nla_jax.store import Store
from nla_jax.tools import cli
from nla_jax.train.checkpoint import Checkpoints

MESH = ("--config.mesh.data=0", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return training.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def config(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.config_file(tmp_path_factory.mktemp("config") / "config.py")


# How processes find each other

CLUSTERS = {
    "Slurm": {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "4"},
    "Kubernetes": {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"},
    "TPU": {"TPU_WORKER_HOSTNAMES": "a,b"},
}
ALONE: list[dict[str, str]] = [
    {},
    {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"},
    {"SLURM_NTASKS": "8"},  # an allocation without srun
    {"TPU_WORKER_HOSTNAMES": "localhost"},
    {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_are_known_by_their_environment(name, bare):
    for key, value in CLUSTERS[name].items():
        bare.setenv(key, value)
    assert processes.cluster() == name


@pytest.mark.parametrize("env", ALONE)
def test_a_process_of_its_own_joins_nobody(env, bare):
    for key, value in env.items():
        bare.setenv(key, value)
    assert processes.cluster() is None and not processes.start()
    assert not processes.start(processes=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("127.0.0.1:1", 2, None), "--process-id"),
        ((None, 2, 1), "--coordinator"),
        (("127.0.0.1", 2, 1), "HOST:PORT"),
        (("127.0.0.1:1", 2, 2), "0 to 1"),
    ],
)
def test_half_a_description_is_refused(given, said, bare):
    with pytest.raises(InputError, match=said):
        processes.start(*given)


def test_numbers_and_values_of_one_process():
    assert {k: v.tolist() for k, v in processes.of_all({"a": 1, "b": 0.1}).items()} == {"a": [1.0], "b": [0.1]}
    assert processes.of_first({"a": None}) == {"a": None}
    assert processes.lost(RuntimeError("Gloo: connection closed by peer")) is None  # there is no other


def test_joining_and_sharing_exclude_each_other(world):
    arguments = ["extract", "x.jsonl", "--target", str(world.target), "--layer", "1", "--out", "y", "--process", "0"]
    (world.path / "x.jsonl").write_text('{"text": "one"}\n')
    arguments[1] = str(world.path / "x.jsonl")
    done = CliRunner().invoke(cli.main, [*arguments, "--coordinator", "127.0.0.1:1"])
    assert done.exit_code == 2 and done.output.splitlines()[-1].startswith("nla: error: --coordinator: expected")


# What two processes make


@pytest.mark.parametrize("stage", ["ar", *(pytest.param(s, marks=SLOW) for s in ("lm", "av", "rl"))])
def test_two_processes_are_one(stage, world, config, tmp_path):
    """Metrics to rounding, the same files and no others: process 1 wrote none."""
    one = world.train(stage, tmp_path / "one").directory
    finish(["train", stage, f"--config={config}", "--out", tmp_path / "two", "--no-tensorboard", *MESH], tmp_path)
    two = tmp_path / "two" / stage
    close(two, one)
    same_files(two / "export", one / "export")
    assert [row["step"] for row in lines(two)] == [row["step"] for row in lines(one)]
    assert "wrote" in log(tmp_path, 0) and "wrote" not in log(tmp_path, 1)


def newest(checkpoints: Path) -> int:
    done = checkpoints.glob("*/nla_jax.json") if checkpoints.is_dir() else []
    return max((int(p.parent.name) for p in done), default=-1)


@SLOW
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_and_a_restart_resumes(victim, world, config, tmp_path):
    """The other says so and does not hang; the restart, on another mesh, ends where an undisturbed run does."""
    more = {"steps": 30, "save_every": 3, "eval_rows": 0, "epochs": None}
    settings = [f"--config.av.{name}={value}" for name, value in more.items()]
    arguments = ["train", "av", f"--config={config}", "--out", tmp_path / "two", "--no-tensorboard", *settings]
    running = start([*arguments, *MESH], tmp_path, heartbeat=10)
    checkpoints = tmp_path / "two" / "av" / "checkpoints"
    kill_one(running, victim, tmp_path, lambda: newest(checkpoints) >= 6)
    finish([*arguments, "--config.mesh.data=0", "--config.mesh.fsdp=4"], tmp_path)
    assert "going on from step" in log(tmp_path, 0) and "going on" not in log(tmp_path, 1)
    one = world.train("av", tmp_path / "one", **more).directory
    close(tmp_path / "two" / "av", one)
    same_files(tmp_path / "two" / "av" / "export", one / "export")


@SLOW
def test_a_checkpoint_of_two_processes_is_restored_on_one(world, config, tmp_path):
    """Bit for bit, and sealed: damage is still found."""
    finish(["train", "av", f"--config={config}", "--out", tmp_path / "two", "--no-tensorboard", *MESH], tmp_path)
    run = tmp_path / "two" / "av"
    found = [training.restored(world.task("av", mesh=mesh), run) for mesh in ({"data": 1}, {"fsdp": 0, "tensor": 2})]
    assert [step for step, _, _ in found] == [4, 4]
    assert training.bits(found[0][1]) == training.bits(found[1][1])
    largest = max((p for p in (run / "checkpoints" / "4").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    from nla_jax.train.seals import damage

    assert "its bytes have changed" in str(damage(run / "checkpoints" / "4"))
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [4]


@SLOW
@pytest.mark.parametrize("split", [(), ("--fsdp", 4, "--tensor", 2)], ids=["a shard each", "every shard together"])
def test_extraction_on_two_processes(split, world, tmp_path):
    """The rows and, to rounding, the vectors of one process, whether the target fits one of the two or not."""
    corpus, out = world.path / "world" / "stories.jsonl", tmp_path / "store"
    finish(
        ["extract", corpus, "--target", world.target, "--layer", training.LAYER, "--out", out, "--per-document", 4,
         "--min-position", 8, "--shard-rows", 128, *split],
        tmp_path,
    )  # fmt: skip
    one, two = Store.open(world.store), Store.open(out)
    assert two.n_rows == one.n_rows
    for name, column in one.table().items():
        np.testing.assert_array_equal(two.table()[name], column)
    np.testing.assert_allclose(two.vectors(slice(None)), one.vectors(slice(None)), rtol=1e-4, atol=1e-5)


@SLOW
def test_bad_input_ends_all(config, tmp_path):
    arguments = ["train", "av", f"--config={config}", "--out", tmp_path / "two", "--config.mesh.tensor=3"]
    refused(arguments, "nla: error: mesh: expected all 8 devices of the 2 processes, got 3", tmp_path)
