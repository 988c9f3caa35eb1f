"""`nla doctor`: a good set passes, and each way of breaking one is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import save_file

from nla_jax.doctor import Diagnosis, diagnose
from nla_jax.errors import InputError
from nla_jax.models import safetensors_io
from nla_jax.tools.cli import main
from nla_jax.tools.mini import MiniPair, make_mini

FAMILIES = ("qwen2", "gemma3")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    pairs = {family: make_mini(out / family, family=family, d_model=32) for family in FAMILIES}
    pairs["other seed"] = make_mini(out / "seed", d_model=32, seed=1)
    pairs["other layer"] = make_mini(out / "layer", d_model=32, layer=1)
    return pairs


def copied(pair: MiniPair, out: Path) -> MiniPair:
    for directory in (pair.target, pair.av, pair.ar):
        shutil.copytree(directory, out / directory.name)
    return MiniPair(out / "target", out / "av", out / "ar")


def check(*directories: Path) -> Diagnosis:
    return diagnose(list(directories))


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not ...:
            content[key] = value
    file.write_text(json.dumps(content))


def edit_sidecar(directory: Path, change) -> None:
    file = directory / "nla_meta.yaml"
    content = yaml.safe_load(file.read_text())
    change(content)
    file.write_text(yaml.safe_dump(content, allow_unicode=True))


def edit_weights(file: Path, change) -> None:
    with safe_open(file, "numpy") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    change(tensors)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file, {"format": "pt"})


def set_layer(directory: Path, k: int) -> None:
    def change(content):
        content["extraction_layer_index"] = k
        if "critic" in content:
            content["critic"]["extraction_layer_index"] = k

    edit_sidecar(directory, change)


# -- good sets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_good_set_has_neither_problems_nor_warnings_in_any_order(originals, family):
    pair = originals[family]
    a, b = check(pair.target, pair.av, pair.ar), check(pair.ar, pair.target, pair.av)
    for diagnosis in (a, b):
        assert diagnosis.healthy
        assert not [f for f in diagnosis.findings if f.level == "warning"]
        assert {Path(p).name: kind for p, kind in diagnosis.parts} == {"target": "target", "av": "AV", "ar": "AR"}
    assert sorted(a.findings, key=str) == sorted(b.findings, key=str)


def test_layer_is_printed_with_its_aliases(originals):
    text = next(f.text for f in check(originals["qwen2"].ar).findings if f.check == "layer")
    for alias in ("K = 2", "model.layers[2]", "blocks.2.hook_resid_post", "hidden_states[3]"):
        assert alias in text


def test_notes_of_a_good_gemma_set(originals):
    pair = originals["gemma3"]
    notes = {f.check: f.text for f in check(pair.target, pair.av, pair.ar).findings if f.level == "note"}
    assert "exactly one" in notes["double BOS"] and "gets two" in notes["double BOS"]
    assert "sqrt(D)" in notes["embedding scale"]
    assert "identity" in notes["value head"]
    assert "padding" in notes["vocabulary"]
    assert "float32" in notes["memory"]


def test_memory_of_the_target_counts_only_the_blocks_that_are_run(originals):
    pair = originals["qwen2"]
    alone = next(f.text for f in check(pair.target).findings if f.check == "memory")
    in_set = next(f.text for f in check(pair.target, pair.ar).findings if f.check == "memory")
    assert "whole model" in alone and "first 3 blocks" in in_set


def test_no_weights_are_loaded(originals, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(safetensors_io, "read_tensor", forbidden)
    monkeypatch.setattr("nla_jax.models.hf.read_tensor", forbidden)
    pair = originals["qwen2"]
    assert check(pair.target, pair.av, pair.ar).healthy


def test_released_configs_without_weights(shared_data):
    names = ("qwen2.5-7b-L20-av", "qwen2.5-7b-L20-ar", "Qwen2.5-7B-Instruct")
    diagnosis = check(*(shared_data / "released" / name for name in names))
    lines = {(f.check, f.level): f.text for f in diagnosis.findings}
    assert "4 weight files" in lines["weights", "problem"]
    assert not [f for f in diagnosis.findings if f.level == "problem" and f.check in ("key set", "layer", "pair")]
    assert "0.7335" in lines["variance", "ok"] and "L20" in lines["variance", "ok"]
    memory = next(f.text for f in diagnosis.findings if f.check == "memory" and f.where.endswith("-av"))
    assert "14.2 GiB in bfloat16" in memory and "28.4 GiB in float32" in memory  # 7,615,616,512 parameters


# -- one thing broken at a time -----------------------------------------------------------------------------------

BREAKS = {}


def breaks(family: str, name: str, level: str, *phrases: str):
    """Registers a way to break a pair and what doctor must then say: check, level, and parts of its text."""

    def register(function):
        BREAKS[function.__name__] = (function, family, name, level, phrases)
        return function

    return register


@breaks("qwen2", "layer", "problem", "K + 1 = 4 blocks and has 3", "one block too few")
def k_one_too_high(pair):
    set_layer(pair.av, 3)
    set_layer(pair.ar, 3)


@breaks("qwen2", "layer", "problem", "K + 1 = 2 blocks and has 3", "one block too many")
def k_one_too_low(pair):
    set_layer(pair.av, 1)
    set_layer(pair.ar, 1)


@breaks("qwen2", "pair", "problem", "layer K 1 and 2", "one apart")
def av_layer_one_apart(pair):
    set_layer(pair.av, 1)


@breaks("qwen2", "layer", "problem", "num_hidden_layers is 3", "holds K = 2")
def old_field_holds_k_plus_one(pair):
    def change(content):
        del content["extraction_layer_index"]
        content.update(schema_version=1, critic={"num_hidden_layers": 3})

    edit_sidecar(pair.ar, change)


@breaks("qwen2", "layer", "problem", "num_hidden_layers is 3")
def old_field_contradicts_the_new_one(pair):
    edit_sidecar(pair.ar, lambda c: c.update(critic={"num_hidden_layers": 3}))


@breaks("qwen2", "layer", "problem", "only 4 blocks")
def layer_beyond_the_model(pair):
    set_layer(pair.av, 9)


@breaks("qwen2", "layer", "problem", "names no layer")
def no_layer(pair):
    edit_sidecar(pair.av, lambda c: c.pop("extraction_layer_index"))


@breaks("qwen2", "injection scale", "problem", "injection_scale is missing")
def no_injection_scale(pair):
    edit_sidecar(pair.av, lambda c: c["extraction"].update(injection_scale=None))


@breaks("gemma3", "injection scale", "warning", "implausible")
def tiny_injection_scale(pair):
    edit_sidecar(pair.av, lambda c: c["extraction"].update(injection_scale=0.5))


@breaks("qwen2", "injection scale", "warning", "copied over")
def injection_scale_is_the_mse_scale(pair):
    edit_sidecar(pair.av, lambda c: c["extraction"].update(injection_scale=32**0.5))


@breaks("qwen2", "mse scale", "problem", "raw error")
def raw_mse(pair):
    edit_sidecar(pair.ar, lambda c: c["extraction"].update(mse_scale=None))


@breaks("qwen2", "mse scale", "warning", "not sqrt(D)")
def odd_mse_scale(pair):
    edit_sidecar(pair.ar, lambda c: c["extraction"].update(mse_scale=1.0))


@breaks("qwen2", "width", "problem", "d_model 64", "hidden_size 32")
def width(pair):
    edit_sidecar(pair.av, lambda c: c.update(d_model=64))


@breaks("gemma3", "embedding scale", "problem", "says llama", "sqrt(D)")
def gemma_called_llama(pair):
    edit_json(pair.av / "config.json", model_type="llama")


@breaks("gemma3", "dtype", "warning", "65504")
def gemma_in_float16(pair):
    def change(tensors):
        tensors.update({k: v.astype(np.float16) for k, v in tensors.items()})

    edit_weights(pair.av / "model.safetensors", change)


@breaks("gemma3", "double BOS", "problem", "BOS twice")
def template_with_two_bos(pair):
    file = pair.av / "chat_template.jinja"
    file.write_text("{{- bos_token -}}\n" + file.read_text())


@breaks("gemma3", "double BOS", "problem", "AR prompt starts with BOS twice")
def ar_template_with_bos(pair):
    for directory in (pair.av, pair.ar):
        edit_sidecar(directory, lambda c: c["prompt_templates"].update(ar="<bos>" + c["prompt_templates"]["ar"]))


@breaks("gemma3", "BOS", "problem", "AR prompt starts without BOS", ".31")
def ar_tokenizer_without_bos(pair):
    edit_json(pair.ar / "tokenizer.json", post_processor=None)


@breaks("gemma3", "BOS", "warning", "add_bos_token false, but tokenizer.json adds BOS")
def bos_declared_otherwise(pair):
    edit_json(pair.ar / "tokenizer_config.json", add_bos_token=False)


@breaks("gemma3", "BOS", "warning", "template writes no BOS")
def template_without_bos(pair):
    file = pair.av / "chat_template.jinja"
    file.write_text(file.read_text().replace("{{- bos_token -}}\n", ""))


@breaks("gemma3", "stop ids", "problem", "answers end with 4 '<end_of_turn>'", "only at 1")
def one_stop_id_of_two(pair):
    edit_json(pair.av / "generation_config.json", eos_token_id=1)
    edit_json(pair.av / "config.json", eos_token_id=1)


@breaks("gemma3", "stop ids", "warning", "one token (1)")
def bos_is_eos(pair):
    edit_json(pair.av / "tokenizer_config.json", bos_token="<eos>")


@breaks("qwen2", "chat template", "problem", "cannot be rendered")
def no_chat_template(pair):
    (pair.av / "chat_template.jinja").unlink()


@breaks("qwen2", "marker", "problem", "[2047]", "sidecar says [2046]")
def marker_id(pair):
    edit_sidecar(pair.av, lambda c: c["tokens"].update(injection_token_id=2046))


@breaks("qwen2", "neighbours", "problem", "beside the marker", "expected 33 and")
def neighbours(pair):
    edit_sidecar(pair.av, lambda c: c["tokens"].update(injection_left_neighbor_id=33))


@breaks("qwen2", "AR suffix", "problem", "the end of the AR prompt")
def suffix(pair):
    edit_sidecar(pair.ar, lambda c: c["tokens"].update(critic_suffix_ids=[1, 2, 3]))


def swap_tokens(file: Path, a: str, b: str) -> None:
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(content))


@breaks("qwen2", "tokenizer", "problem", "tokenizer drift", "2 of 2048 token ids", "'q' and 'z'")
def tokenizer_drift(pair):
    swap_tokens(pair.ar / "tokenizer.json", "q", "z")


@breaks("qwen2", "tokenizer", "problem", "split into other tokens")
def tokenizer_with_other_merges(pair):
    content = json.loads((pair.av / "tokenizer.json").read_text())
    content["model"]["merges"] = []
    (pair.av / "tokenizer.json").write_text(json.dumps(content))


@breaks("qwen2", "vocabulary", "problem", "only 1000 rows")
def small_embedding(pair):
    edit_json(pair.av / "config.json", vocab_size=1000)


@breaks("qwen2", "key set", "problem", "1 tensors missing", "model.norm.weight")
def missing_tensor(pair):
    edit_weights(pair.target / "model.safetensors", lambda t: t.pop("model.norm.weight"))


@breaks("qwen2", "key set", "problem", "misshapen", "q_proj.weight is [3, 5], should be [32, 32]")
def misshapen_tensor(pair):
    key = "model.layers.1.self_attn.q_proj.weight"
    edit_weights(pair.av / "model.safetensors", lambda t: t.update({key: t[key][:3, :5]}))


@breaks("qwen2", "key set", "problem", "unknown (1 whole blocks; config.json says 2)")
def config_shorter_than_weights(pair):
    edit_json(pair.ar / "config.json", num_hidden_layers=2)


@breaks("qwen2", "key set", "warning", "no lm_head.weight and no model.norm.weight")
def ar_with_a_final_norm(pair):
    extra = {"model.norm.weight": np.ones(32, np.float32), "lm_head.weight": np.ones((2176, 32), np.float32)}
    edit_weights(pair.ar / "model.safetensors", lambda t: t.update(extra))


@breaks("qwen2", "weights", "problem", "truncated")
def truncated_weights(pair):
    file = pair.av / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@breaks("qwen2", "value head", "problem", "NaN")
def nan_head(pair):
    head = np.full((32, 32), np.nan, ml_dtypes.bfloat16)
    edit_weights(pair.ar / "value_head.safetensors", lambda t: t.update(weight=head))


@breaks("qwen2", "value head", "problem", "should hold weight [32, 32]")
def head_of_another_shape(pair):
    edit_weights(pair.ar / "value_head.safetensors", lambda t: t.update(weight=t["weight"][:16]))


@breaks("qwen2", "value head", "problem", "is missing")
def no_head(pair):
    (pair.ar / "value_head.safetensors").unlink()


@breaks("qwen2", "value head", "ok", "not the identity")
def trained_head(pair):
    edit_weights(pair.ar / "value_head.safetensors", lambda t: t.update(weight=t["weight"] * 2))


@breaks("qwen2", "sidecar kind", "problem", "dataset's")
def sidecar_of_a_dataset(pair):
    def change(content):
        content.update(kind="nla_dataset", extraction={**content["extraction"], "d_model": 32, "layer_index": 2})
        del content["role"]

    edit_sidecar(pair.av, change)


@breaks("qwen2", "role", "problem", "says role 'ar'", "makes it the AV")
def sidecars_swapped(pair):
    a, b = pair.av / "nla_meta.yaml", pair.ar / "nla_meta.yaml"
    texts = a.read_text(), b.read_text()
    b.write_text(texts[0])
    a.write_text(texts[1])


@breaks("qwen2", "pair", "problem", "AR templates")
def another_ar_template(pair):
    template = "Other words: <text>{explanation}</text> <summary>"
    edit_sidecar(pair.av, lambda c: c["prompt_templates"].update(ar=template))


@breaks("qwen2", "pair", "problem", "rollout_id) 1000 and 9000")
def another_training_step(pair):
    edit_sidecar(pair.ar, lambda c: c.update(training={"rollout_id": 9000}))


@breaks("qwen2", "pair", "warning", "no training record")
def sidecar_of_the_base_checkpoint(pair):
    edit_sidecar(pair.av, lambda c: c.pop("training"))


@breaks("qwen2", "roles", "warning", "2 directories are taken for target", "nla_meta.yaml")
def av_without_sidecar(pair):
    (pair.av / "nla_meta.yaml").unlink()


@breaks("qwen2", "architecture", "warning", "rope")
def another_rope(pair):
    edit_json(pair.av / "config.json", rope_theta=5e5)


@breaks("qwen2", "blocks", "problem", "whole copy")
def av_of_another_depth(pair):
    edit_json(pair.av / "config.json", num_hidden_layers=3)


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_named(originals, tmp_path, name):
    function, family, kind, level, phrases = BREAKS[name]
    pair = copied(originals[family], tmp_path)
    function(pair)
    diagnosis = check(pair.target, pair.av, pair.ar)
    texts = [f.text for f in diagnosis.findings if (f.check, f.level) == (kind, level)]
    assert any(all(phrase in text for phrase in phrases) for text in texts), diagnosis.findings
    assert diagnosis.healthy == (not [f for f in diagnosis.findings if f.level == "problem"])
    if level == "problem":
        assert not diagnosis.healthy


def test_directories_of_different_pairs(originals):
    a, b, c = originals["qwen2"], originals["other seed"], originals["other layer"]
    seeds = {f.check: f.text for f in check(a.av, b.ar).findings if f.level == "problem"}
    assert "nothing in common" in seeds["base model"] and "rollout_id" in seeds["pair"]
    layers = {f.check: f.text for f in check(a.av, c.ar).findings if f.level == "problem"}
    assert set(layers) == {"pair"} and "layer K 2 and 1" in layers["pair"]
    target = {f.check for f in check(b.target, a.av, a.ar).findings if f.level == "problem"}
    assert target == {"base model"}


def test_different_families(originals):
    a, b = originals["qwen2"], originals["gemma3"]
    problems = {f.check for f in check(a.av, b.ar).findings if f.level == "problem"}
    assert {"architecture", "tokenizer", "pair"} <= problems


def test_data_against_its_models(originals, tmp_path):
    pair = originals["qwen2"]
    content = yaml.safe_load((pair.av / "nla_meta.yaml").read_text())
    data = {k: content[k] for k in ("schema_version", "tokens", "prompt_templates")}
    data |= {"kind": "nla_dataset", "extraction": {"d_model": 32, "layer_index": 2, "injection_scale": 150.0}}
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"")
    sidecar = tmp_path / "rows.parquet.nla_meta.yaml"
    sidecar.write_text(yaml.safe_dump(data, allow_unicode=True))
    for given in (file, sidecar, tmp_path):
        diagnosis = check(given, pair.av)
        assert diagnosis.healthy and ("data", "ok") in {(f.check, f.level) for f in diagnosis.findings}
    data["extraction"] |= {"layer_index": 1, "injection_scale": 80.0}
    sidecar.write_text(yaml.safe_dump(data, allow_unicode=True))
    found = {(f.check, f.level): f.text for f in check(file, pair.av).findings}
    assert "layer K 1 and 2" in found["data", "problem"]
    assert "80 in the data and 150" in found["injection scale", "warning"]


@pytest.mark.parametrize("file", ["config.json", "nla_meta.yaml", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff garbage", b"[]", b"{}"])
def test_garbage_in_any_file_is_a_problem_and_no_crash(originals, tmp_path, file, content):
    pair = copied(originals["qwen2"], tmp_path)
    (pair.ar / file).write_bytes(content)
    diagnosis = check(pair.target, pair.av, pair.ar)
    assert any(f.level == "problem" and str(pair.ar) in f.where for f in diagnosis.findings)
    assert all("\n" not in f.text for f in diagnosis.findings)


@pytest.mark.parametrize("value", ["text", [1], 7, {"a": []}, None])
def test_fields_of_the_wrong_type_never_crash(originals, tmp_path, value):
    pair = copied(originals["qwen2"], tmp_path)
    originals_ = {d: (d / "nla_meta.yaml").read_text() for d in (pair.av, pair.ar)}
    for key in ("kind", "role", "extraction", "tokens", "prompt_templates", "critic", "training", "schema_version"):
        for directory, text in originals_.items():
            (directory / "nla_meta.yaml").write_text(text)
            edit_sidecar(directory, lambda c, key=key: c.update({key: value}))
        check(pair.target, pair.av, pair.ar)
    for directory, text in originals_.items():
        (directory / "nla_meta.yaml").write_text(text)
    for key in ("model_type", "eos_token_id", "num_hidden_layers", "torch_dtype", "vocab_size"):
        edit_json(pair.av / "config.json", **{key: value})
        edit_json(pair.ar / "tokenizer_config.json", bos_token=value, chat_template=value)
        edit_json(pair.av / "generation_config.json", eos_token_id=value)
        check(pair.target, pair.av, pair.ar)


# -- the command --------------------------------------------------------------------------------------------------


def test_exit_codes_and_output(originals, tmp_path):
    pair = copied(originals["qwen2"], tmp_path)
    paths = [str(p) for p in (pair.target, pair.av, pair.ar)]
    run = CliRunner().invoke
    good = run(main, ["doctor", *paths])
    assert good.exit_code == 0 and good.output.endswith("no problems, no warnings\n")
    edit_sidecar(pair.ar, lambda c: c["extraction"].update(mse_scale=None))
    bad = run(main, ["doctor", *paths, "--quiet"])
    assert bad.exit_code == 1
    lines = bad.output.splitlines()
    assert lines[0] == f"AR: {pair.ar}" and lines[1].startswith("  problem mse scale:") and "->" in lines[1]
    assert lines[-1].startswith("1 problem, ")
    parsed = json.loads(run(main, ["doctor", *paths, "--json"]).output)
    assert parsed["healthy"] is False and [p["kind"] for p in parsed["parts"]] == ["target", "AV", "AR"]
    assert {f["level"] for f in parsed["findings"]} == {"ok", "note", "warning", "problem"}


@pytest.mark.parametrize("kind", ["absent", "empty", "file", "none"])
def test_unusable_input_exits_with_2_and_one_line(tmp_path, kind):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("hello")
    arguments = [] if kind == "none" else [str(tmp_path / kind)]
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.output
    with pytest.raises(InputError):
        diagnose(arguments)


def test_an_injection_scale_unlike_the_released_one_is_a_warning():
    from nla_jax.configs.released import RELEASED
    from nla_jax.doctor_checks import _scales

    pair = RELEASED[0]
    for scale, levels in (
        (pair["injection_scale"], []),
        (pair["injection_scale"] / pair["d_model"] ** 0.5, ["warning"]),
    ):
        sidecar = SimpleNamespace(
            d_model=pair["d_model"],
            layer_index=pair["layer_index"],
            marker_id=pair["marker_id"],
            injection_mode="replace",
            injection_scale=scale,
            mse_scale=pair["d_model"] ** 0.5,
        )
        report = _Recorder()
        _scales(SimpleNamespace(path="x", kind="AV", section=lambda name: {"mse_scale": 1}), sidecar, report)
        assert [level for level, name in report.seen if name == "injection scale"] == levels


class _Recorder:
    def __init__(self):
        self.seen = []

    def __getattr__(self, level):
        return lambda where, name, *rest: self.seen.append((level, name))
