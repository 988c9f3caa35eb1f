"""The table of shardings: what lies where, what does not divide, and whole runs that give the single device's numbers
and move from mesh to mesh."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from comparing import close, same_files
from families import CONFIGS
from jax.sharding import PartitionSpec
from training import World, restored

from nla_jax.errors import InputError
from nla_jax.models import sharding
from nla_jax.models.config import ModelConfig
from nla_jax.models.params import map_specs, param_specs
from nla_jax.models.sharding import DECODE, RULES, MeshSettings, constrain, make_mesh, spec_of, under
from nla_jax.train.layout import make_layout

FULL = MeshSettings(fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return training.make_world(tmp_path_factory)


# The mesh


@pytest.mark.parametrize(
    ("given", "devices", "shape"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 8, (8, 1, 1)),
        ({"tensor": 4}, 8, (2, 1, 4)),
        ({"fsdp": 0, "tensor": 2}, 8, (1, 4, 2)),
        ({"data": 2, "fsdp": 0}, 8, (2, 4, 1)),
        ({"data": 1}, 8, (1, 1, 1)),
        ({"data": 2, "tensor": 2}, 8, (2, 1, 2)),
    ],
)
def test_what_is_left_goes_to_the_axis_that_is_0(given, devices, shape):
    assert MeshSettings(**given).shape(devices) == shape


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tensor": 3}, "8 devices"),
        ({"data": 16}, "got data 16, fsdp 1, tensor 1"),
        ({"fsdp": 16}, "8 devices"),
        ({"fsdp": 0, "data": 3}, "fsdp 0"),
    ],
)
def test_axes_must_make_up_the_devices(given, said):
    with pytest.raises(InputError, match=said):
        MeshSettings(**given).shape(8)


@pytest.mark.parametrize("given", [{"data": -1}, {"fsdp": -2}, {"tensor": 0}])
def test_axes_are_not_negative(given):
    with pytest.raises(InputError, match=f"mesh.{next(iter(given))}"):
        MeshSettings(**given)


def test_slices_are_joined_by_data_alone():
    """The network between slices is slow; parameters are not split over it."""
    devices = [SimpleNamespace(slice_index=i // 4) for i in range(8)]
    with pytest.raises(InputError, match="mesh.data: expected a multiple of the 2 slices, got 1"):
        make_mesh(MeshSettings(data=1, fsdp=8), devices)


def test_one_device_has_no_mesh():
    assert make_mesh(MeshSettings(data=1)) is None
    mesh = make_mesh(FULL)
    assert mesh is not None and dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}


# The table


def test_two_axes_of_an_array_cannot_be_split_over_the_same_devices():
    assert spec_of(("layers", "embed", "heads")) == PartitionSpec(None, "fsdp", "tensor")
    assert spec_of(("rows", None, "vocab")) == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert spec_of(("layers", "embed", "heads"), DECODE) == PartitionSpec(None, None, "tensor")
    with pytest.raises(ValueError, match="heads and mlp both want the mesh axis 'tensor'"):
        spec_of(("heads", "mlp"))
    with pytest.raises(KeyError):
        spec_of(("no such axis",))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("rules", [RULES, DECODE], ids=["training", "decoding"])
def test_every_parameter_has_a_place(family, rules):
    """Every logical axis is in the table, none collides, and no matrix of the training layout is whole."""
    specs = param_specs(ModelConfig.from_hf(CONFIGS[family]))
    found = []
    map_specs(lambda spec: found.append((spec, spec_of(spec.axes, rules))), specs)
    assert len(found) > 8
    for spec, place in found:
        assert place[0] is None or spec.axes[0] != "layers"
        if rules is RULES and len(spec.shape) - (spec.axes[0] == "layers") == 2:
            assert {"fsdp", "tensor"} <= {x for x in place if isinstance(x, str)}, spec


def qwen(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 104, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6}
    return ModelConfig.from_hf({**CONFIGS["qwen2"], **sizes, "num_key_value_heads": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "mesh", "said"),
    [
        ({"vocab_size": 131}, FULL, ["tensor 2 does not divide the vocabulary, 131"]),
        ({"intermediate_size": 77}, FULL, ["tensor 2 does not divide the MLP width, 77"]),
        ({}, MeshSettings(tensor=4), ["tensor 4 does not divide the attention heads, 6"]),
        ({}, MeshSettings(fsdp=5, data=1), ["fsdp 5 does not divide the model width, 48"]),
        ({"vocab_size": 131, "intermediate_size": 77}, FULL, ["vocabulary, 131", "MLP width, 77"]),
    ],
)
def test_what_does_not_divide_is_named(changes, mesh, said):
    mesh = make_mesh(mesh)
    with pytest.raises(InputError) as error:
        sharding.rules_for(qwen(**changes), mesh)
    assert all(part in str(error.value) for part in said)


def test_too_few_key_heads_are_copied():
    mesh = make_mesh(FULL)
    layers = sharding.shardings(param_specs(qwen()), qwen(), mesh).layers
    assert layers.wk.spec == PartitionSpec(None, "fsdp", "tensor") and not sharding.copied_kv_heads(qwen(), mesh)
    one = qwen(num_key_value_heads=1)
    layers = sharding.shardings(param_specs(one), one, mesh).layers
    assert layers.wk.spec == PartitionSpec(None, "fsdp", None) and layers.bk.spec == PartitionSpec(None, None)
    assert layers.wq.spec == PartitionSpec(None, "fsdp", "tensor") and sharding.copied_kv_heads(one, mesh)


def test_constraints_go_as_far_as_sizes_divide():
    x = jnp.zeros((6, 4, 3))
    assert constrain(x, "rows", None, "vocab") is x  # no mesh
    fn = jax.jit(lambda x: constrain(x, "rows", None, "vocab"))
    with under(make_mesh(FULL)):
        for shape, part in (((6, 4, 3), (3, 4, 3)), ((8, 4, 2), (2, 4, 1)), ((1, 4, 2), (1, 4, 1))):
            assert {s.data.shape for s in fn(jnp.zeros(shape)).addressable_shards} == {part}


# Batches


@pytest.mark.parametrize(("rows", "parts"), [(8, 4), (6, 2), (3, 1)])
def test_batches_go_to_the_mesh_and_back(rows, parts):
    layout = make_layout(FULL)
    batch = {"tokens": np.arange(rows * 3).reshape(rows, 3), "valid": np.arange(rows) % 2 == 0}
    np.testing.assert_array_equal(layout.rows(rows), np.arange(rows))
    for put in (layout.put(batch, rows), layout.put_whole(batch)):
        assert {s.data.shape for s in put["tokens"].addressable_shards} == {(rows // parts, 3)}
        for back in (layout.local(put), layout.whole(put)):
            np.testing.assert_array_equal(back["tokens"], batch["tokens"])
            np.testing.assert_array_equal(back["valid"], batch["valid"])


def test_a_batch_that_cannot_be_split_is_refused(world):
    with pytest.raises(InputError, match="batch_size.*12 samples of a step to be split over 8 shards of the mesh"):
        world.task("av", batch_size=12, mesh={"data": 8})
    with pytest.raises(InputError, match="8 shards of the mesh x 4 micro-batches"):
        world.task("rl", accumulate=4, mesh={"data": 8})
    world.task("rl", accumulate=4, mesh={"data": 4})


# Whole runs


@pytest.mark.parametrize("stage", ["ar", *(pytest.param(s, marks=pytest.mark.slow) for s in ("lm", "av", "rl"))])
def test_a_run_on_a_mesh_is_that_of_one_device(world, stage, tmp_path):
    """Metrics, evaluation and exports; from a checkpoint of one mesh the run goes on on another, with less memory."""
    world.train(stage, tmp_path / "one")
    world.train(stage, tmp_path / "mesh", stop_at=2, mesh={"data": 0, "fsdp": 2, "tensor": 2})
    less = {"remat": "blocks", "logit_chunk": 8, **({"rollout_parts": 2} if stage == "rl" else {})}
    world.train(stage, tmp_path / "mesh", mesh={"data": 0, "fsdp": 4, "tensor": 1}, **less)
    close(tmp_path / "mesh" / stage, tmp_path / "one" / stage)
    same_files(tmp_path / "mesh" / stage / "export", tmp_path / "one" / stage / "export")
    done = json.loads((tmp_path / "mesh" / stage / "done.json").read_text())
    assert done["step"] == 4


@pytest.mark.slow
def test_checkpoints_go_from_mesh_to_mesh_bit_for_bit(world, tmp_path):
    meshes = [{"data": 1}, {"data": 8}, {"data": 0, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 4, "tensor": 2}]
    for i, saved in enumerate(meshes):
        world.train("av", tmp_path / str(i), steps=2, mesh=saved, eval_rows=0)
        first = None
        for mesh in meshes:
            step, state, _ = restored(world.task("av", steps=2, mesh=mesh, eval_rows=0), tmp_path / str(i) / "av")
            first = training.bits(state) if first is None else first
            assert step == 2 and training.bits(state) == first
