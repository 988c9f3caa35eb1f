"""Hugging Face directories to parameters and back: every name, every byte, and what broken files get."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nla_jax.errors import CheckpointError, ConfigError, InputError, NLAError
from nla_jax.models import hf
from nla_jax.models.config import ModelConfig
from nla_jax.models.params import abstract_params, init_params, param_specs
from nla_jax.models.safetensors_io import Entry, write_file
from nla_jax.reconstructor import ARParams, reconstruct

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
QWEN = families.CONFIGS["qwen2"]


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, np.ndarray]]:
    return {name: families.hf_weights(config) for name, config in families.CONFIGS.items()}


@pytest.fixture
def qwen(tmp_path, weights) -> Path:
    return families.write_checkpoint(tmp_path / "qwen", QWEN, weights["qwen2"])


def write_shards(folder: Path, config: dict, weights: dict[str, np.ndarray], n: int = 3) -> dict[str, str]:
    """A sharded checkpoint, its names dealt out like cards; returns the weight map."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = {key: f"model-{i % n + 1:05}-of-{n:05}.safetensors" for i, key in enumerate(weights)}
    for file in sorted(set(names.values())):
        save_file({k: w for k, w in weights.items() if names[k] == file}, folder / file, {"format": "pt"})
    write_index(folder, names)
    return names


def write_index(folder: Path, names: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of every model file in a directory, read by the library."""
    out: dict[str, np.ndarray] = {}
    for file in folder.glob("model*.safetensors"):
        part = load_file(file)
        assert not out.keys() & part.keys()
        out.update(part)
    return out


def assert_same_tree(got, expected) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def assert_same_bytes(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype and got[key].shape == tensor.shape, key
        assert got[key].tobytes() == tensor.tobytes(), key


# -- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_read_whole_and_written_back_byte_for_byte(family, weights, tmp_path):
    config, tensors = families.CONFIGS[family], weights[family]
    cfg, params = hf.load_model(families.write_checkpoint(tmp_path / "in", config, tensors))
    assert cfg == ModelConfig.from_hf(config)
    assert_same_tree(params, families.to_params(tensors))
    saved = hf.save_model(params, cfg, config, tmp_path / "out", max_shard_bytes=2e5)
    assert len(saved.files) > 1 and saved.tensors == len(tensors)
    assert saved.params == sum(w.size for w in tensors.values())
    assert_same_bytes(read_all(tmp_path / "out"), tensors)
    assert ModelConfig.from_dir(tmp_path / "out") == cfg


def test_a_linear_map_keeps_its_orientation(qwen, weights):
    _, params = hf.load_model(qwen)
    for field, name in (("wq", "self_attn.q_proj"), ("wo", "self_attn.o_proj"), ("down", "mlp.down_proj")):
        torch_layout = weights["qwen2"][f"model.layers.3.{name}.weight"]  # [out, in]: y = x W^T
        x = np.random.default_rng(0).normal(size=(4, torch_layout.shape[1]))
        ours = np.asarray(getattr(params.layers, field)[3], np.float64)
        np.testing.assert_allclose(x @ ours, np.einsum("ti,oi->to", x, torch_layout), rtol=1e-12)


def _without_prefix(tensors):
    return {k.removeprefix("model."): w for k, w in tensors.items() if k != "lm_head.weight"}


@pytest.mark.parametrize("layout", ["older", "newer", "headless", "headless multimodal"])
def test_multimodal_and_headless_names(layout, weights, tmp_path):
    config, tensors = families.CONFIGS["gemma3"], weights["gemma3"]
    if layout == "headless":
        config, named = config["text_config"], _without_prefix(tensors)
    elif layout == "headless multimodal":
        named = {f"language_model.{k}": w for k, w in _without_prefix(tensors).items()}
    else:
        named = families.wrapped(tensors, layout)
    vision = "model." if layout == "newer" else ""
    for name in ("vision_tower.encoder.layers.0.mlp.fc1.weight", "multi_modal_projector.mm_soft_emb_norm.weight"):
        named[vision + name] = np.ones((3, 2), np.int32)  # not looked at, whatever its dtype
    cfg, params = hf.load_model(families.write_checkpoint(tmp_path / "mm", config, named))
    assert_same_tree(params, families.to_params(tensors))
    hf.save_model(params, cfg, config, tmp_path / "text")
    assert_same_bytes(read_all(tmp_path / "text"), tensors)
    written = json.loads((tmp_path / "text/config.json").read_text())
    assert written["model_type"] == "gemma3_text" and "text_config" not in written and "vision_config" not in written


@pytest.mark.parametrize("layout", ["older", "newer"])
def test_untied_multimodal_head(layout, weights, tmp_path):
    text = {k: v for k, v in families.CONFIGS["gemma3_text"].items() if k != "final_logit_softcapping"}
    config = {"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}
    folder = families.write_checkpoint(tmp_path / "mm", config, families.wrapped(weights["gemma3_text"], layout))
    assert_same_tree(hf.load_model(folder)[1], families.to_params(weights["gemma3_text"]))


def test_tied_lm_head_and_rotary_tables_are_ignored(weights, tmp_path):
    extra = {"lm_head.weight": np.zeros((131, 48), np.float32)}
    extra |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32) for i in range(5)}
    folder = families.write_checkpoint(tmp_path / "a", families.CONFIGS["qwen3"], weights["qwen3"] | extra)
    assert_same_tree(hf.load_model(folder)[1], families.to_params(weights["qwen3"]))


def test_first_blocks_only_reads_nothing_else(weights, tmp_path):
    tensors = weights["qwen2"]
    names = write_shards(tmp_path / "full", QWEN, tensors)
    last = "model-00002-of-00002.safetensors"
    first = "model-00001-of-00002.safetensors"
    needed = {k for k in tensors if "embed" in k or any(f"layers.{i}." in k for i in range(2))}
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN))
    save_file({k: tensors[k] for k in needed}, folder / first)
    write_index(folder, {k: first if k in needed else last for k in names})  # and the last file does not exist
    calls = []
    cfg, trunk = hf.load_model(folder, n_layers=2, head=False, progress=lambda done, total: calls.append((done, total)))
    assert cfg == ModelConfig.from_hf(QWEN).truncated(2)
    whole = families.to_params(tensors)
    assert trunk.final_norm is None and trunk.lm_head is None
    np.testing.assert_array_equal(trunk.layers.wq, whole.layers.wq[:2])
    assert calls[-1] == (sum(tensors[k].nbytes for k in needed),) * 2 and len(calls) == len(needed)
    with pytest.raises(CheckpointError, match=f"{last} does not exist"):
        hf.load_model(folder)
    with pytest.raises(ConfigError, match="n_layers"):
        hf.load_model(folder, n_layers=6)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", [None, *DTYPES])
def test_dtypes(stored, wanted, weights, tmp_path):
    tensors = {k: w.astype(DTYPES[stored]) for k, w in weights["qwen2"].items()}
    folder = families.write_checkpoint(tmp_path / "in", QWEN | {"torch_dtype": stored}, tensors)
    assert hf.hf_dtype(folder) == stored
    cfg, params = hf.load_model(folder, wanted, n_layers=1, head=False)
    expected = tensors["model.layers.0.mlp.up_proj.weight"].astype(DTYPES[wanted or stored])
    assert params.layers.up.dtype == params.embed.dtype == expected.dtype
    assert np.asarray(params.layers.up[0]).tobytes() == np.ascontiguousarray(expected.T).tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_round_trip_and_cast_on_the_way_out(dtype, weights, tmp_path):
    tensors = {k: w.astype(DTYPES[dtype]) for k, w in weights["qwen2"].items()}
    config = QWEN | {"torch_dtype": dtype}
    cfg, params = hf.load_model(families.write_checkpoint(tmp_path / "in", config, tensors))
    hf.save_model(params, cfg, config, tmp_path / "same")
    assert_same_bytes(read_all(tmp_path / "same"), tensors)
    hf.save_model(params, cfg, config, tmp_path / "cast", dtype="float32")
    assert_same_bytes(read_all(tmp_path / "cast"), {k: w.astype(np.float32) for k, w in tensors.items()})
    assert json.loads((tmp_path / "cast/config.json").read_text())["torch_dtype"] == "float32"


def test_bad_dtype_and_float16_overflow(qwen, weights, tmp_path):
    with pytest.raises(InputError, match="bfloat16 or float16, got 'int8'"):
        hf.load_model(qwen, "int8")
    big = weights["qwen2"] | {"model.norm.weight": np.full(48, 7e4, np.float32)}
    folder = families.write_checkpoint(tmp_path / "big", QWEN, big)
    with pytest.raises(CheckpointError, match="too large for float16"):
        hf.load_model(folder, "float16")
    cfg, params = hf.load_model(folder)
    with pytest.raises(CheckpointError, match="model.norm.weight does not fit float16"):
        hf.save_model(params, cfg, QWEN, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_tensors_go_straight_to_their_shards(axis_type, weights, qwen, tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    cfg = ModelConfig.from_hf(QWEN)

    def spec(path: str, ndim: int) -> PartitionSpec:
        if path.endswith(("wq", "gate", "up", "wk", "wv")):
            return PartitionSpec(None, "data", "model")
        if path.endswith(("wo", "down")):
            return PartitionSpec(None, "model", "data")
        return PartitionSpec(None, "model") if path.endswith(("embed", "bq")) else PartitionSpec()

    shardings = jax.tree_util.tree_map_with_path(
        lambda path, a: NamedSharding(mesh, spec(jax.tree_util.keystr(path), a.ndim)), abstract_params(cfg)
    )
    _, params = hf.load_model(qwen, shardings=shardings)
    assert params.layers.up.addressable_shards[0].data.shape == (5, 24, 20)
    for array, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    assert_same_tree(params, families.to_params(weights["qwen2"]))
    hf.save_model(params, cfg, QWEN, tmp_path / "out")
    assert_same_bytes(read_all(tmp_path / "out"), weights["qwen2"])


# -- AR -----------------------------------------------------------------------------------------------------------


def write_ar(folder: Path, tensors: dict[str, np.ndarray], *, blocks: int = 3, extra: tuple[str, ...] = ()) -> Path:
    keep = {k: w for k, w in tensors.items() if "embed" in k or any(f"layers.{i}." in k for i in range(blocks))}
    families.write_checkpoint(folder, QWEN | {"num_hidden_layers": 3}, keep | {k: tensors[k] for k in extra})
    head = np.random.default_rng(0).normal(size=(48, 48)).astype(np.float32)
    save_file({"weight": head}, folder / "value_head.safetensors", {"format": "pt"})
    return folder


def test_ar_round_trip_and_its_output(weights, tmp_path):
    folder = write_ar(tmp_path / "ar", weights["qwen2"])
    cfg, trunk, head = hf.load_ar(folder)
    assert cfg.n_layers == 3 and trunk.final_norm is None and trunk.lm_head is None
    stored = load_file(folder / "value_head.safetensors")["weight"]
    np.testing.assert_array_equal(head, stored.T)
    saved = hf.save_model(trunk, cfg, QWEN, tmp_path / "out", role="ar", head=head)  # the base model's config
    assert_same_bytes(read_all(tmp_path / "out"), read_all(folder))
    assert_same_bytes(load_file(tmp_path / "out/value_head.safetensors"), {"weight": stored})
    assert saved.tensors == 1 + 1 + 3 * 12 and saved.files == ("model.safetensors", "value_head.safetensors")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 3
    _, trunk2, head2 = hf.load_ar(tmp_path / "out")
    tokens, lengths = jnp.asarray(families.tokens()), jnp.asarray([32, 20])
    live, again = (reconstruct(ARParams(t, h), tokens, lengths, cfg) for t, h in ((trunk, head), (trunk2, head2)))
    np.testing.assert_array_equal(live, again)
    assert float(jnp.abs(live).max()) > 0.1


def test_ar_tolerates_a_final_norm_with_a_note_and_nothing_else(weights, tmp_path, caplog):
    extra = ("model.norm.weight", "lm_head.weight")
    plain = hf.load_ar(write_ar(tmp_path / "a", weights["qwen2"]))
    assert not caplog.records
    noted = hf.load_ar(write_ar(tmp_path / "b", weights["qwen2"], extra=extra))
    assert "lm_head.weight and model.norm.weight not read" in caplog.text
    assert_same_tree(noted[1:], plain[1:])
    with pytest.raises(CheckpointError, match=r"12 unknown: model.layers.3.*and 6 more"):
        hf.load_ar(write_ar(tmp_path / "c", weights["qwen2"], blocks=4))
    with pytest.raises(CheckpointError, match=r"12 missing: model.layers.2"):
        hf.load_ar(write_ar(tmp_path / "d", weights["qwen2"], blocks=2))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"weight": np.zeros((48, 47), np.float32)}, r"expected weight \[48, 48\] alone, got weight \[48, 47\]"),
        ({"value_head.weight": np.zeros((48, 48), np.float32)}, r"got value_head.weight \[48, 48\]"),
        ({"weight": np.zeros((48, 48)), "bias": np.zeros(48)}, r"alone, got .*bias \[48\]"),
        ({"weight": np.zeros((48, 48))}, "dtype F64 is not supported"),
        (None, "value_head.safetensors does not exist"),
    ],
)
def test_bad_value_heads(head, message, weights, tmp_path):
    folder = write_ar(tmp_path / "ar", weights["qwen2"])
    (folder / "value_head.safetensors").unlink()
    if head is not None:
        save_file(head, folder / "value_head.safetensors")
    with pytest.raises(CheckpointError, match=message):
        hf.load_ar(folder)


# -- the released pair --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "blocks", "count"), [("av", 28, 339), ("ar", 21, 253)])
def test_key_set_of_the_released_qwen_pair(role, blocks, count, shared_data, tmp_path):
    released = shared_data / f"released/qwen2.5-7b-L20-{role}"
    index = json.loads((released / "model.safetensors.index.json").read_text())
    base = json.loads((shared_data / "released/Qwen2.5-7B-Instruct/config.json").read_text())
    narrow = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = base | narrow | {"vocab_size": 96}
    full = ModelConfig.from_hf(config)
    cfg = full.truncated(blocks)
    params = init_params(cfg, jax.random.key(0), jnp.bfloat16, head=role == "av")
    head = jnp.eye(32, dtype=jnp.bfloat16) if role == "ar" else None
    hf.save_model(params, cfg, config, tmp_path / role, role=role, head=head, max_shard_bytes=2e5)
    written = json.loads((tmp_path / role / "model.safetensors.index.json").read_text())
    assert set(written["weight_map"]) == set(index["weight_map"]) == set(read_all(tmp_path / role))
    assert len(written["weight_map"]) == count
    assert set(written["metadata"]) == set(index["metadata"])
    assert written["metadata"]["total_size"] == 2 * written["metadata"]["total_parameters"]
    for file in (tmp_path / role).glob("*.safetensors"):
        with safe_open(file, "numpy") as f:
            assert f.metadata() == {"format": "pt"}
            assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"BF16"}
    theirs = json.loads((released / "config.json").read_text())
    ours = json.loads((tmp_path / role / "config.json").read_text())
    assert ours["num_hidden_layers"] == theirs["num_hidden_layers"] == blocks
    assert (tmp_path / role / "value_head.safetensors").exists() == (role == "ar")


# -- writing ------------------------------------------------------------------------------------------------------


def test_written_files_are_what_the_library_reads(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "transposed": rng.normal(size=(300, 7000)).astype(np.float32).T,
        "strided": rng.normal(size=(64, 64)).astype(np.float16)[::2, ::3],
        "brain": rng.normal(size=(5000, 3)).astype(ml_dtypes.bfloat16),
        "vector": rng.normal(size=9).astype(np.float32)[::-1],
    }
    entries = [Entry(k, t.shape, t.dtype) for k, t in tensors.items()]
    size = write_file(tmp_path / "x.safetensors", entries, iter(tensors.values()))
    assert size == (tmp_path / "x.safetensors").stat().st_size
    assert_same_bytes(load_file(tmp_path / "x.safetensors"), {k: np.ascontiguousarray(t) for k, t in tensors.items()})


def test_config_dtype_spelling_and_depth(qwen, tmp_path):
    cfg, params = hf.load_model(qwen, "bfloat16", n_layers=2)
    config = QWEN | {"dtype": "float32", "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 3}
    hf.save_model(params, cfg, config, tmp_path / "a")
    written = json.loads((tmp_path / "a/config.json").read_text())
    assert (written["dtype"], written["num_hidden_layers"], len(written["layer_types"])) == ("bfloat16", 2, 2)
    with pytest.raises(ConfigError, match="does not describe these parameters"):
        hf.save_model(params, cfg, config | {"rope_theta": 7.0}, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_output_is_whole_or_absent(qwen, tmp_path, monkeypatch):
    cfg, params = hf.load_model(qwen)
    out = tmp_path / "out"
    out.mkdir()  # empty: may be used
    hf.save_model(params, cfg, QWEN, out)
    (out / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty.*--overwrite"):
        hf.save_model(params, cfg, QWEN, out)
    written = hf.write_file
    monkeypatch.setattr(
        hf, "write_file", lambda *a: written(*a) and (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(InputError, match="No space left"):
        hf.save_model(params, cfg, QWEN, out, overwrite=True)
    assert (out / "note.txt").exists() and (out / "model.safetensors").exists()
    monkeypatch.undo()
    hf.save_model(params, cfg, QWEN, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "qwen"]
    with pytest.raises(InputError, match="is a file"):
        hf.save_model(params, cfg, QWEN, out / "config.json")


# -- broken input -------------------------------------------------------------------------------------------------


def _drop(names):
    return lambda tensors: {k: w for k, w in tensors.items() if k not in names}


def _cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop({"lm_head.weight"}), r"1 missing: lm_head.weight\)\. Try: .tie_word_embeddings"),
        (
            lambda t: (
                _drop({"model.norm.weight"})(t)
                | {"model.layers.9.bad": np.zeros(2, np.float32), "score.weight": np.zeros(2, np.float32)}
                | {"model.embed_tokens.weight": np.zeros((131, 40), np.float32)}
            ),
            r"1 missing: model.norm.weight; 2 unknown: model.layers.9.bad, score.weight; "
            r"1 misshapen: model.embed_tokens.weight \[131, 40\] instead of \[131, 48\]\)\. Try: ",
        ),
        (lambda t: t | {"model.norm.weight": np.zeros(48)}, "dtype F64 is not supported.*F32 or F16 or BF16"),
        (lambda t: t | {"model.norm.weight": np.zeros(48, np.int8)}, "dtype I8 is not supported.*unquantized"),
    ],
)
def test_weights_that_do_not_fit(change, message, weights, tmp_path):
    folder = families.write_checkpoint(tmp_path / "bad", QWEN, change(weights["qwen2"]))
    with pytest.raises(CheckpointError, match=message) as error:
        hf.load_model(folder)
    assert str(tmp_path / "bad") in str(error.value) and "\n" not in str(error.value)


def _with_header(file: Path, header: bytes) -> None:
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _cut(f, f.stat().st_size - 1000), r"is truncated: expected \d+ bytes, got \d+"),
        (lambda f: _cut(f, 300), "is truncated"),
        (lambda f: _cut(f, 5), "is truncated"),
        (lambda f: _cut(f, 0), "is truncated"),
        (lambda f: f.write_bytes(b"\xff" * 64), "not a valid safetensors file"),
        (lambda f: f.write_bytes(f.read_bytes()[:8] + b"!" + f.read_bytes()[9:]), "not a valid safetensors file"),
        (
            lambda f: _with_header(f, b'{"a":{"dtype":"F32","shape":[2000],"data_offsets":[0,8000]}}'),
            r"is truncated: expected 80\d\d bytes, got 1\d\d\.",
        ),
        (
            lambda f: _with_header(f, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9999]}}'),
            "is truncated: expected 10064 bytes",
        ),
        (
            lambda f: _with_header(f, b'{"a":{"dtype":"F32","shape":[20],"data_offsets":[0,64]}}'),
            "not a valid safetensors file",
        ),
        (lambda f: _with_header(f, b'{"a":[1,2]}'), "not a valid safetensors file"),
        (lambda f: _with_header(f, b'["a"]'), "not a valid safetensors file"),
        (
            lambda f: f.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
            "Git LFS pointer.*git lfs pull",
        ),
        (lambda f: f.write_bytes(b"<!DOCTYPE html><html>Sign in</html>"), "is a web page"),
        (lambda f: f.unlink(), "neither model.safetensors nor"),
        (lambda f: f.rename(f.with_name("pytorch_model.bin")), "pickled weights only.*convert it to safetensors"),
        (lambda f: f.rename(f.with_name("model-00001-of-00002.safetensors")), "shards without their index"),
    ],
)
def test_damaged_files(damage, message, qwen):
    damage(qwen / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as error:
        hf.load_model(qwen)
    assert "Try: " in str(error.value) and str(qwen) in str(error.value)


def test_missing_directory_and_config(tmp_path, qwen):
    with pytest.raises(ConfigError, match="config.json does not exist"):
        hf.load_model(tmp_path / "nowhere")
    (qwen / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        hf.load_model(qwen)


def _edit_map(change):
    def edit(folder: Path, names: dict[str, str]) -> None:
        write_index(folder, change(names))

    return edit


def _twice(folder: Path, names: dict[str, str]) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    save_file(load_file(file) | {"model.embed_tokens.weight": np.zeros((131, 48), np.float32)}, file)


def _doubled(folder: Path, names: dict[str, str]) -> None:
    text = (folder / "model.safetensors.index.json").read_text()
    more = '"weight_map": {"model.norm.weight": "model-00009-of-00003.safetensors", '
    (folder / "model.safetensors.index.json").write_text(text.replace('"weight_map": {', more))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f, _: (f / "model-00002-of-00003.safetensors").unlink(), "00002-of-00003.safetensors does not exist"),
        (_edit_map(lambda n: n | {"model.norm.weight": "../x.safetensors"}), r"got '../x.safetensors'"),
        (_edit_map(lambda n: n | {"model.norm.weight": "/etc/x.safetensors"}), r"got '/etc/x.safetensors'"),
        (_edit_map(lambda n: n | {"model.norm.weight": "weights.bin"}), "names of .safetensors files"),
        (_edit_map(lambda n: n | {"model.norm.weight": n["model.embed_tokens.weight"]}), "1 missing|is in two files"),
        (_edit_map(lambda n: {}), "weight_map: expected tensor names"),
        (_edit_map(lambda n: {k: v for k, v in n.items() if "norm" not in k}), "11 missing"),
        (_twice, "embed_tokens.weight is in two files"),
        (_doubled, "model.norm.weight is in two files"),
        (lambda f, _: (f / "model.safetensors.index.json").write_text("{"), "not valid JSON"),
        (lambda f, _: (f / "model.safetensors.index.json").write_text("[1]"), "weight_map"),
        (lambda f, _: save_file({"a": np.zeros(2)}, f / "model.safetensors"), "both model.safetensors and an index"),
    ],
)
def test_damaged_indexes(damage, message, weights, tmp_path):
    names = write_shards(tmp_path / "m", QWEN, weights["qwen2"])
    assert_same_tree(hf.load_model(tmp_path / "m")[1], families.to_params(weights["qwen2"]))
    damage(tmp_path / "m", names)
    with pytest.raises(NLAError, match=message) as error:
        hf.load_model(tmp_path / "m")
    assert isinstance(error.value, CheckpointError) and "\n" not in str(error.value)


# -- what generation needs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": [1, 106]}, {"eos_token_id": 1}, (1, 106)),
        ({"eos_token_id": 7}, {"eos_token_id": [5, 6]}, (5, 6, 7)),
        (None, {"eos_token_id": 2}, (2,)),
        ({"eos_token_id": None}, {"text_config": {"eos_token_id": 1}, "eos_token_id": [1, 106]}, (1, 106)),
        ({"eos_token_id": 3}, None, (3,)),
        ({}, {}, ()),
    ],
)
def test_stop_ids_are_those_of_both_files(generation, config, ids, tmp_path):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert hf.stop_ids(tmp_path) == ids


def test_bad_stop_id(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(ConfigError, match="eos_token_id: expected an id or a list of ids"):
        hf.stop_ids(tmp_path)


# -- memory -------------------------------------------------------------------------------------------------------

_PEAK = """
import json, resource, sys
import jax, jax.numpy as jnp
from nla_jax.models import hf
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jnp.zeros(4).block_until_ready()
before = peak()
cfg, params = hf.load_model(sys.argv[1])
loaded = peak()
config = json.load(open(sys.argv[1] + "/config.json"))
hf.save_model(params, cfg, config, sys.argv[2])
result = sum(a.nbytes for a in jax.tree.leaves(params))
print(json.dumps({"result": result, "load": loaded - before - result, "save": peak() - loaded}))
"""


def test_peak_memory_is_the_result_and_one_tensor(tmp_path):
    config = {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    cfg = ModelConfig.from_hf(config)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (8192, 1024), "lm_head.weight": (8192, 1024), "model.norm.weight": (1024,)}
    for i in range(8):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.self_attn.{n}_proj.weight": (1024 if n in "qo" else 256, 1024) for n in "qkvo"}
        shapes |= {f"{block}.mlp.{n}_proj.weight": (2816, 1024) for n in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (1024, 2816)}
        shapes |= {f"{block}.{n}_layernorm.weight": (1024,) for n in ("input", "post_attention")}
    bits = np.random.default_rng(0).integers(0x3C00, 0x4000, 8192 * 1024, np.uint16)  # bfloat16 around 0.01
    save_file(
        {k: bits[: int(np.prod(s))].view(ml_dtypes.bfloat16).reshape(s) for k, s in shapes.items()},
        folder / "model.safetensors",
    )
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    largest = max(2 * int(np.prod(s)) for s in shapes.values())
    assert numbers["result"] == sum(2 * int(np.prod(s.shape)) for s in _leaves(cfg)) > 200e6
    # Compiling the placing functions and the allocator cost about 30 MB whatever the model's size; holding the file
    # or a second copy of the parameters would cost 214 MB.
    assert numbers["load"] < largest + 64e6, numbers
    assert numbers["save"] < 2 * largest + 32e6, numbers
    for a, b in zip(_tensor_bytes(folder), _tensor_bytes(tmp_path / "out"), strict=True):
        assert a == b


def _leaves(cfg):
    specs = param_specs(cfg)
    return jax.tree.leaves(specs, is_leaf=lambda x: hasattr(x, "shape"))


def _tensor_bytes(folder: Path):
    with safe_open(folder / "model.safetensors", "numpy") as f:
        for key in sorted(f.keys()):
            yield key, hash(f.get_tensor(key).tobytes())
