"""Mini checkpoints have the released shape, and the package opens what they wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors import safe_open

from nla_jax.errors import InputError
from nla_jax.models.config import FAMILIES, ModelConfig
from nla_jax.models.hf import load_ar, load_model
from nla_jax.pair import NLA
from nla_jax.sidecar import read_sidecar
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools.mini import MARKERS, make_mini
from nla_jax.tools.mini_tokenizer import write_mini_tokenizer


def names_of(directory: Path) -> dict[str, tuple[int, ...]]:
    out = {}
    for file in directory.glob("model*.safetensors"):
        with safe_open(file, "numpy") as f:
            out |= {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_and_checks_itself(tmp_path, family):
    pair = make_mini(tmp_path, family=family, n_layers=3, layer=1)
    nla = NLA.from_pretrained(av=str(pair.av), ar=str(pair.ar), target=str(pair.target))
    assert nla.av.cfg.family == nla.ar.cfg.family == family
    assert (nla.target.cfg.n_layers, nla.ar.cfg.n_layers, nla.av.cfg.n_layers) == (2, 2, 3)
    assert nla.av.prompt.ids[nla.av.prompt.marker] == nla.av.sidecar.marker_id
    ends = {nla.av.tokenizer.token_str(i) for i in nla.av.stop_ids}
    if family.startswith("gemma"):
        assert nla.av.prompt.ids[0] == nla.av.tokenizer.bos_id == 2 and nla.av.prompt.ids.count(2) == 1
        assert ends == {"<eos>", "<end_of_turn>"}
        assert "lm_head.weight" not in names_of(pair.av)
    if family.startswith("qwen"):
        assert nla.av.tokenizer.bos_id is None
        assert "lm_head.weight" in names_of(pair.av)


def test_tokenizer_is_the_same_every_time_and_keeps_the_marker_whole(tmp_path):
    for name in ("a", "b"):
        write_mini_tokenizer(tmp_path / name)
    a, b = (Tokenizer.from_dir(tmp_path / name) for name in ("a", "b"))
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert a.fingerprint == b.fingerprint
    (marker,) = a.encode(MARKERS[0])
    for text in (f"<concept>{MARKERS[0]}</concept>", f"a{MARKERS[0]}b", f" {MARKERS[0]} "):
        assert a.encode(text).count(marker) == 1
    text = "It's naïve: 日本語 🙂\n\n  twice  <|im_end|>"
    assert a.decode(a.encode(text)) == text


def test_padding_rows_exist_beyond_the_tokenizer(tmp_path):
    pair = make_mini(tmp_path)
    rows = names_of(pair.av)["lm_head.weight"][0]
    assert rows > Tokenizer.from_dir(pair.av).vocab_size
    assert rows == names_of(pair.ar)["model.embed_tokens.weight"][0]


def test_ar_is_the_first_blocks_of_the_target_with_an_identity_head(tmp_path):
    pair = make_mini(tmp_path, n_layers=3, layer=1)
    _, target = load_model(pair.target)
    cfg, trunk, head = load_ar(pair.ar)
    assert cfg.n_layers == 2 and trunk.final_norm is None and trunk.lm_head is None
    np.testing.assert_array_equal(np.asarray(head, np.float32), np.eye(64))
    np.testing.assert_array_equal(np.asarray(trunk.layers.wq), np.asarray(target.layers.wq)[:2])
    np.testing.assert_array_equal(np.asarray(trunk.embed), np.asarray(target.embed))
    _, av = load_model(pair.av)
    assert not np.array_equal(np.asarray(av.layers.wq), np.asarray(target.layers.wq))


def test_dtype_and_seed(tmp_path):
    a = make_mini(tmp_path / "a", dtype="float32")
    b = make_mini(tmp_path / "b", dtype="float32", seed=1)
    c = make_mini(tmp_path / "c", dtype="float32")
    assert (a.av / "model.safetensors").read_bytes() == (c.av / "model.safetensors").read_bytes()
    assert (a.av / "model.safetensors").read_bytes() != (b.av / "model.safetensors").read_bytes()
    with safe_open(a.ar / "value_head.safetensors", "numpy") as f:
        assert list(f.keys()) == ["weight"] and f.get_tensor("weight").dtype == np.float32


def test_bad_shapes_are_one_line(tmp_path):
    for options in ({"d_model": 40}, {"layer": 4}, {"family": "gpt2"}, {"dtype": "int8"}, {"like_released": "x"}):
        with pytest.raises(InputError, match="expected"):
            make_mini(tmp_path, **options)
    assert not any(tmp_path.iterdir())


def test_only_what_it_made_itself_is_replaced(tmp_path):
    (tmp_path / "av").mkdir()
    (tmp_path / "av" / "precious").write_text("weights")
    with pytest.raises(InputError, match="another output directory"):
        make_mini(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["av", "precious"]
    (tmp_path / "av" / "precious").unlink()
    first = make_mini(tmp_path)
    (first.av / "left.over").write_text("")
    assert make_mini(tmp_path) == first and not (first.av / "left.over").exists()


@pytest.fixture(scope="module")
def released(shared_data, tmp_path_factory):
    tokenizer = shared_data / "tokenizers" / "qwen2.5"
    out = tmp_path_factory.mktemp("released")
    return make_mini(
        out,
        tokenizer=tokenizer,
        like_released="qwen2.5-7b-L20",
        sidecar_from=shared_data / "released",
        d_model=32,
    )


@pytest.mark.parametrize(
    ("role", "name", "count"),
    [
        ("av", "qwen2.5-7b-L20-av", 339),
        ("ar", "qwen2.5-7b-L20-ar", 253),
        ("target", "Qwen2.5-7B-Instruct", 339),
    ],
)
def test_key_sets_equal_the_released_index_files(shared_data, released, role, name, count):
    directory = getattr(released, role)
    index = json.loads((shared_data / "released" / name / "model.safetensors.index.json").read_text())
    mine = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(names_of(directory)) == set(mine["weight_map"]) == set(index["weight_map"])
    assert len(mine["weight_map"]) == count
    assert sorted(set(mine["weight_map"].values())) == sorted(set(index["weight_map"].values()))
    config = json.loads((shared_data / "released" / name / "config.json").read_text())
    assert ModelConfig.from_dir(directory).n_layers == config["num_hidden_layers"]
    assert ModelConfig.from_dir(directory).vocab_size == config["vocab_size"] == 152064


@pytest.mark.parametrize("role", ["av", "ar"])
def test_released_sidecar_differs_only_in_width(shared_data, released, role):
    source = yaml.safe_load((shared_data / "released" / f"qwen2.5-7b-L20-{role}" / "nla_meta.yaml").read_text())
    mine = yaml.safe_load((getattr(released, role) / "nla_meta.yaml").read_text())
    source["d_model"], source["extraction"]["mse_scale"] = 32, 32**0.5
    assert mine == source
    sidecar = read_sidecar(getattr(released, role))
    assert (sidecar.role, sidecar.layer_index) == (role, 20)


def test_own_sidecar_on_the_real_tokenizer_finds_the_released_ids(shared_data, tmp_path):
    """The mini's own templates use the released tags, so its ids, computed from the tokenizer, must be the same."""
    pair = make_mini(tmp_path, tokenizer=shared_data / "tokenizers" / "qwen2.5", d_model=32, n_layers=2, layer=1)
    av, ar = read_sidecar(pair.av), read_sidecar(pair.ar)
    assert (av.marker, av.marker_id, av.left_id, av.right_id) == ("㈎", 149705, 29, 522)
    assert ar.ar_suffix_ids == (1318, 29, 366, 1708, 29)
    assert av.av_template != read_sidecar(shared_data / "released" / "qwen2.5-7b-L20-av").av_template
