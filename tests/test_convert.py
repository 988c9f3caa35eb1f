"""`nla convert`: what it writes, both formats and all roles, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from nla_jax.errors import CheckpointError, InputError, NLAError, SidecarError
from nla_jax.export import export_dir
from nla_jax.models import hf
from nla_jax.models.config import read_hf_config
from nla_jax.models.lora import LoRAConfig, LowRank, adapter_specs
from nla_jax.models.peft_io import save_adapters
from nla_jax.orbax_dir import read_orbax
from nla_jax.sidecar import read_sidecar
from nla_jax.tools.convert import convert, parse_size

CONFIG = families.CONFIGS["qwen2"] | {"torch_dtype": "bfloat16"}
TOKENIZER = {"tokenizer.json": '{"a": 1}', "tokenizer_config.json": "{}", "merges.txt": "a b", "vocab.json": "{}"}
GENERATION = {"chat_template.jinja": "{{ messages }}", "generation_config.json": '{"eos_token_id": [3, 4]}'}


def _sidecar(role: str) -> dict:
    return {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "rl",
        "d_model": 48,
        "extraction": {"injection_scale": 150.0 if role == "av" else None, "mse_scale": 48**0.5},
        "tokens": {
            "injection_char": "㈎",
            "injection_token_id": 9,
            "injection_left_neighbor_id": 8,
            "injection_right_neighbor_id": 7,
        },
        "prompt_templates": {"av": "<concept>{injection_char}</concept>", "ar": "<text>{explanation}</text>"},
        "extraction_layer_index": 2,
        "training": {"lr": 0.1},
    }


def _make(folder: Path, role: str) -> Path:
    """A directory of 5 blocks (3 for an AR), bfloat16, with tokenizer files and things that must not be copied."""
    blocks = 3 if role == "ar" else 5
    config = CONFIG | {"num_hidden_layers": blocks}
    weights = {k: w.astype(ml_dtypes.bfloat16) for k, w in families.hf_weights(config).items()}
    if role == "ar":
        weights = {k: w for k, w in weights.items() if "lm_head" not in k and k != "model.norm.weight"}
    families.write_checkpoint(folder, config, weights)
    if role == "ar":
        head = np.random.default_rng(0).normal(size=(48, 48)).astype(ml_dtypes.bfloat16)
        save_file({"weight": head}, folder / "value_head.safetensors")
    if role != "model":
        (folder / "nla_meta.yaml").write_text(yaml.safe_dump(_sidecar(role), allow_unicode=True))
    for name, text in (TOKENIZER | GENERATION | {"LICENSE": "mine", "modeling.py": "no", "old.bin": "no"}).items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {role: _make(root / role, role) for role in ("model", "av", "ar")}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(convert, [str(a) for a in arguments])


def refused(*arguments: object) -> NLAError:
    result = run(*arguments)
    assert isinstance(result.exception, NLAError), result.output
    assert "\n" not in str(result.exception)
    return result.exception


def tensors(folder: Path) -> dict[str, bytes]:
    out = {}
    for file in folder.glob("*.safetensors"):
        for key, value in load_file(file).items():
            out[key] = (str(value.dtype), value.shape, value.tobytes())
    return out


@pytest.mark.parametrize("role", ["model", "av", "ar"])
def test_hf_to_orbax_and_back_changes_no_byte(role, sources, tmp_path):
    source, orbax, back = sources[role], tmp_path / "orbax", tmp_path / "back"
    first = run(source, orbax, "--to", "orbax")
    assert first.exit_code == 0, first.exception
    assert not list(orbax.glob("*.safetensors"))
    second = run(orbax, back)
    assert second.exit_code == 0, second.exception
    assert tensors(back) == tensors(source)
    for name in [*TOKENIZER, *GENERATION, "LICENSE"]:
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert (back / "nla_meta.yaml").exists() == (role != "model")
    if role != "model":
        assert (back / "nla_meta.yaml").read_bytes() == (source / "nla_meta.yaml").read_bytes()
    assert not (back / "modeling.py").exists() and not (back / "old.bin").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "orbax"]  # no temporary left
    n = len(tensors(source))
    blocks = 3 if role == "ar" else 5
    head = second.output.splitlines()[0]
    assert head == f"wrote {back}: {role if role == 'model' else role.upper()}, qwen2, {blocks} blocks, D = 48"
    assert f"  {n} tensors, " in second.output and "bfloat16" in second.output
    assert ("hidden_states[3]" in second.output) == (role == "ar")


def test_dtype_and_shard_size(sources, tmp_path):
    done = run(sources["av"], tmp_path / "out", "--dtype", "float32", "--max-shard-size", "100KB")
    assert done.exit_code == 0, done.exception
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 110e3 for f in files)
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    before, after = tensors(sources["av"]), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and {t[0] for t in after.values()} == {"float32"}
    for key, (_, shape, raw) in before.items():
        assert after[key][1:] == (shape, np.frombuffer(raw, ml_dtypes.bfloat16).astype(np.float32).tobytes())
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "float32"
    total = sum(len(t[2]) for t in after.values())
    assert f"{total // 4:,} parameters, float32" in done.output
    half = run(tmp_path / "out", tmp_path / "half", "--dtype", "bfloat16", "--to", "orbax")
    assert half.exit_code == 0 and run(tmp_path / "half", tmp_path / "back").exit_code == 0
    assert tensors(tmp_path / "back") == before


@pytest.mark.parametrize("through", ["hf", "orbax"])
def test_an_initial_ar(through, sources, tmp_path):
    source = sources["model"]
    if through == "orbax":
        assert run(source, tmp_path / "orbax", "--to", "orbax").exit_code == 0
        source = tmp_path / "orbax"
    out = tmp_path / "ar"
    done = run(source, out, "--role", "ar", "--sidecar", sources["av"])
    assert done.exit_code == 0, done.exception
    got, base = tensors(out), tensors(sources["model"])
    assert got.pop("weight") == ("bfloat16", (48, 48), np.eye(48).astype(ml_dtypes.bfloat16).tobytes())
    blocks = {k for k in base if "embed" in k or any(f"layers.{i}." in k for i in range(3))}
    assert got == {k: base[k] for k in blocks}
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    sidecar = read_sidecar(out)
    assert (sidecar.role, sidecar.layer_index, sidecar.injection_scale, sidecar.stage) == ("ar", 2, None, None)
    assert sidecar.ar_template == "<text>{explanation}</text>" and "training" not in sidecar.raw
    assert "output of block 2, model.layers[2], blocks.2.hook_resid_post, hidden_states[3]" in done.output
    assert hf.load_ar(out)[0].n_layers == 3
    again = run(sources["model"], tmp_path / "b", "--role", "ar", "--layer", 4)
    assert again.exit_code == 0 and "without nla_meta.yaml" in again.output
    assert hf.load_ar(tmp_path / "b")[0].n_layers == 5


def test_export_matches_the_live_arrays(sources, tmp_path):
    cfg, trunk, head = hf.load_ar(sources["ar"])
    sharpened = jax.tree.map(lambda a: a * jnp.asarray(1.5, a.dtype), trunk)
    config = read_hf_config(sources["ar"])
    export_dir(sharpened, cfg, config, sources["ar"], tmp_path / "out", role="ar", head=head + head, dtype="float32")
    _, trunk2, head2 = hf.load_ar(tmp_path / "out", "float32")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a.astype(jnp.float32), b)), sharpened, trunk2))
    np.testing.assert_array_equal(np.asarray(head2), 2 * np.asarray(head, np.float32))
    wrong = yaml.safe_load((sources["ar"] / "nla_meta.yaml").read_text()) | {"extraction_layer_index": 1}
    source = tmp_path / "source"
    shutil.copytree(sources["ar"], source)
    (source / "nla_meta.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(SidecarError, match=r"layer_index: expected 2 \(the checkpoint has 3 blocks\), got 1"):
        export_dir(trunk, cfg, config, source, tmp_path / "bad", role="ar", head=head)
    with pytest.raises(SidecarError, match="role: expected av, got ar"):
        cfg5, params = hf.load_model(sources["model"])
        export_dir(params, cfg5, CONFIG, source, tmp_path / "bad", role="av")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("role", "options", "kind", "message"),
    [
        ("model", ["--role", "ar"], InputError, "names no layer to cut an AR at. Try: --layer K"),
        ("model", ["--role", "ar", "--layer", "5"], InputError, r"--layer: expected 0\.\.4 .* got 5"),
        ("av", ["--role", "ar", "--layer", "1"], InputError, "--layer: expected 2, the layer that the sidecar"),
        ("model", ["--layer", "2"], InputError, "--layer: expected --role ar and a source that is no AR yet"),
        ("ar", ["--layer", "2"], InputError, "--layer: expected --role ar and a source that is no AR yet"),
        ("ar", ["--role", "model"], InputError, "is an AR: it has no final norm"),
        ("model", ["--role", "av"], InputError, "has no nla_meta.yaml: expected the AV's sidecar"),
        ("model", ["--max-shard-size", "5 apples"], InputError, "--max-shard-size: expected a size such as 5GB"),
    ],
)
def test_refused_options(role, options, kind, message, sources, tmp_path):
    error = refused(sources[role], tmp_path / "out", *options)
    assert isinstance(error, kind)
    with pytest.raises(kind, match=message):
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_an_adapter_is_added_to_the_weights(to, sources, tmp_path):
    cfg, base = hf.load_model(sources["av"])
    lora = LoRAConfig(rank=2, alpha=3.0, targets=("k_proj", "up_proj"))
    rng = np.random.default_rng(0)
    adapters = {
        f: LowRank(*(rng.normal(size=x.shape).astype(np.float32) for x in (p.a, p.b)))
        for f, p in adapter_specs(cfg, lora).items()
    }
    save_adapters(tmp_path / "adapter", adapters, cfg, lora, base="base")
    out = tmp_path / "out"
    assert run(sources["av"], out, "--to", to, "--adapter", tmp_path / "adapter").exit_code == 0
    got = (read_orbax(out) if to == "orbax" else hf.load_model(out))[1]
    for field in ("wk", "up", "wq"):
        want = np.asarray(getattr(base.layers, field), np.float64)
        if field in adapters:
            want = want + 1.5 * adapters[field].a.astype(np.float64) @ adapters[field].b
        rounded = np.asarray(getattr(got.layers, field)).astype(np.float64)
        np.testing.assert_allclose(rounded, want, rtol=2**-8, atol=1e-5)  # stored in bfloat16, rounded once
    assert (out / "nla_meta.yaml").is_file() and not (out / "adapter").exists()
    # Of another depth: nothing is read or written.
    error = refused(sources["ar"], tmp_path / "ar", "--adapter", tmp_path / "adapter")
    assert "adapters of 3 blocks" in str(error) and not (tmp_path / "ar").exists()


def test_existing_output(sources, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    error = refused(sources["model"], tmp_path)
    assert "is not empty" in str(error) and "--overwrite" in str(error)
    assert (tmp_path / "note.txt").read_text() == "mine"
    # In place, over the source itself.
    copy = tmp_path / "copy"
    shutil.copytree(sources["model"], copy)
    assert run(copy, copy, "--dtype", "float32", "--overwrite").exit_code == 0
    assert {t[0] for t in tensors(copy).values()} == {"float32"}
    assert (copy / "tokenizer.json").exists() and not (copy / "old.bin").exists()


def test_damaged_sources_leave_nothing(sources, tmp_path):
    for to in ("hf", "orbax"):
        bad = tmp_path / f"bad-{to}"
        shutil.copytree(sources["model"], bad)
        data = (bad / "model.safetensors").read_bytes()
        (bad / "model.safetensors").write_bytes(data[:-100])
        assert "is truncated" in str(refused(bad, tmp_path / "out", "--to", to))
    assert "neither a directory here nor a hub id" in str(refused(tmp_path / "nowhere", tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_damaged_orbax_directories(sources, tmp_path):
    good = tmp_path / "good"
    assert run(sources["ar"], good, "--to", "orbax").exit_code == 0

    def broken(change) -> NLAError:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(good, tmp_path / "bad")
        change(tmp_path / "bad")
        return refused(tmp_path / "bad", tmp_path / "out")

    def edit_config(folder: Path) -> None:
        config = read_hf_config(folder) | {"num_hidden_layers": 2, "intermediate_size": 64}
        (folder / "config.json").write_text(json.dumps(config))

    error = broken(edit_config)
    assert isinstance(error, CheckpointError) and "12 misshapen: layers." in str(error)

    def cut_data(folder: Path) -> None:
        file = max((folder / "params").rglob("d/*"), key=lambda f: f.stat().st_size)
        file.write_bytes(file.read_bytes()[:-1])

    error = broken(cut_data)
    assert isinstance(error, CheckpointError) and "is missing or truncated: expected " in str(error)
    error = broken(lambda f: shutil.rmtree(f / "params"))
    assert isinstance(error, CheckpointError) and "more: expected" in str(error) and "got no file" in str(error)
    error = broken(lambda f: (f / "nla_jax.json").write_text('{"format": "x"}'))
    assert isinstance(error, CheckpointError) and "version 1, with a role and" in str(error)
    error = broken(lambda f: (f / "nla_jax.json").write_text((f / "nla_jax.json").read_text().replace('"ar"', '"av"')))
    assert isinstance(error, CheckpointError) and "2 missing: final_norm, lm_head; 1 unknown: head" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5e9), ("100kb", 1e5), ("1.5 GiB", 1.5 * 2**30), ("7", 7), ("9B", 9)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5TB", "0", "1e9"])
def test_bad_sizes(text):
    with pytest.raises(InputError, match="max-shard-size"):
        parse_size(text)


def test_help_shows_an_example():
    result = run("--help")
    assert result.exit_code == 0 and "nla convert" in result.output and "Examples:" in result.output
