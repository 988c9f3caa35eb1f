"""Run configs: what ships, what a key may hold, and how the command line changes it.

The numbers of the shipped configs are compared with the published ones, written out here.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import types
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from nla_jax import configs
from nla_jax.configs.released import RELEASED
from nla_jax.errors import InputError
from nla_jax.tools import run_config
from nla_jax.tools.cli import main
from nla_jax.tools.train import take_overrides
from nla_jax.train.settings import (
    SECTIONS,
    LMSettings,
    OptimizerSettings,
    RLSettings,
    SFTSettings,
    from_config,
    keys_of,
)

PAIRS = {
    "qwen2_5_7b_l20": ("Qwen2.5-7B-Instruct L20", 1.41e-5),
    "gemma3_12b_l32": ("Gemma-3-12B-IT L32", 1.41e-5),
    "gemma3_27b_l41": ("Gemma-3-27B-IT L41", 1.41e-5),
    "llama3_3_70b_l53": ("Llama-3.3-70B-Instruct L53", 5e-6),
}
DATA = ("__init__", "released", "chips", "architectures")
FILES = sorted(p for p in Path(configs.__path__[0]).glob("*.py") if p.stem not in DATA)
STAGES = [(name, stage) for name in PAIRS for stage in ("ar", "av", "rl")]
STAGES += [(name, stage) for name in ("tiny", "demo") for stage in SECTIONS]
TEXTS = [("lm.corpus", "docs.jsonl"), ("lm.tokenizer", "tok")]


def parsed(name: str, stage: str, *assignments: str):
    config = run_config.load(name)
    run_config.override(config, [*TEXTS, *take_overrides([f"--config.{a}" for a in assignments])[0]], stage)
    return from_config(config, stage)


def nla(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *args])
    out, err = capsys.readouterr()
    return stopped.value.code or 0, out, err


def small(**sections) -> ConfigDict:
    config = ConfigDict({"out": "runs/x", "target": "T", "store": "S", "ar": {}, "av": {}, "rl": {"steps": 4}})
    for key, value in sections.items():
        config[key] = value
    return config


# ---------------------------------------------------------------------------------------------- what ships


def test_every_packaged_config_is_a_run_and_tested_here():
    assert set(run_config.names()) >= {*PAIRS, "tiny"}
    assert "common" not in run_config.names() and "released" not in run_config.names()


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_shipped_config_parses(name, stage):
    settings = parsed(name, stage)
    assert isinstance(settings, SECTIONS[stage])
    assert {hash(settings)} == {hash(parsed(name, stage))} and settings == parsed(name, stage)
    assert all(getattr(settings, optim).steps == settings.steps for optim in settings.optimizers())


@pytest.mark.parametrize("file", FILES, ids=lambda p: p.stem)
def test_config_opens_with_its_commands_and_imports_no_code_of_ours(file):
    tree = ast.parse(file.read_text())
    text = ast.get_docstring(tree)
    assert text and "nla train" in text and "--config=" in text
    if file.stem != "common":
        for part in ("nla extract", "nla teach", "nla build", "Hardware", "esult to expect"):
            assert part in text, part
        for stage in ("ar", "av", "rl"):
            assert f"nla train {stage} --config={file.stem}" in text
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.module in ("ml_collections", "nla_jax.configs"), node.module


@pytest.mark.parametrize("name", PAIRS)
def test_released_pairs_have_the_published_settings(name):
    published, lr = PAIRS[name]
    facts = next(pair for pair in RELEASED if pair["name"] == published)
    for stage in ("ar", "av"):
        s = parsed(name, stage)
        assert (s.batch_size, s.epochs, s.steps) == (256, 1, 0)
        assert (s.optim.name, s.optim.lr, s.optim.schedule) == ("adamw", 2e-5, "cosine")
        assert s.optim.lr * s.optim.end == pytest.approx(2e-6) and s.optim.warmup == 0.05
        assert (s.target, s.stage) == (facts["target"], stage)
    s = parsed(name, "rl")
    assert (s.batch_size, s.samples, s.batch_size * s.samples) == (128, 8, 1024)
    assert (s.max_new_tokens, s.clip_ratio) == (150, 0.2)
    assert (s.kl, s.kl_coef, s.reward, s.advantage, s.aggregate) == ("k2", 0.01, "neg_mse", "group_std", "sample")
    for optim in (s.av_optim, s.ar_optim):
        assert (optim.lr, optim.schedule, optim.warmup) == (lr, "constant", 0.0)
    assert 2000 <= s.steps <= 4000
    text = (Path(configs.__path__[0]) / f"{name}.py").read_text()
    assert f"--layer {facts['layer_index']} " in text and f"of {facts['n_layers']}" in text
    assert f"--injection-scale {facts['injection_scale']:g}\n" in text
    assert f"fve_nrm .{round(facts['fve_nrm'] * 1000):03d}".rstrip("0") in text and str(facts["variance_nrm"]) in text


def test_defaults_in_code_are_the_published_settings_too():
    s = RLSettings(target="T", store="S", av="A", ar="B", steps=1)
    assert (s.batch_size, s.samples, s.max_new_tokens, s.kl, s.kl_coef) == (128, 8, 150, "k2", 0.01)
    assert s.av_optim == s.ar_optim and s.av_optim.lr == 1.41e-5 and s.av_optim.schedule == "constant"
    s = SFTSettings(stage="ar", target="T", store="S")
    assert (s.batch_size, s.epochs, s.optim.lr, s.optim.schedule, s.optim.end) == (256, 1, 2e-5, "cosine", 0.1)


def test_tiny_model_is_one_that_is_computed():
    from nla_jax.models.config import ModelConfig

    model = parsed("tiny", "lm").model
    assert ModelConfig.from_hf({**model, "vocab_size": 500}).n_layers == 4


# ---------------------------------------------------------------------------------------------- from a config


def test_sections_go_before_the_top_level_and_that_before_defaults():
    config = small(seed=3, log_every=7, rl=ConfigDict({"steps": 4, "seed": 5}))
    rl, ar = from_config(config, "rl"), from_config(config, "ar")
    assert (rl.seed, ar.seed, rl.log_every, ar.keep_last) == (5, 3, 7, 2)
    assert (ar.out, ar.target, ar.store, ar.stage) == ("runs/x", "T", "S", "ar")
    assert (rl.av, rl.ar) == ("runs/x/av/export/av", "runs/x/ar/export/ar")
    assert from_config(small(rl=ConfigDict({"steps": 4, "av": "elsewhere"})), "rl").av == "elsewhere"


def test_lr_of_a_stage_is_that_of_all_its_optimizers():
    rl = from_config(small(rl=ConfigDict({"steps": 4, "lr": 1e-6, "av_optim": {"b2": 0.99}})), "rl")
    assert (rl.av_optim.lr, rl.ar_optim.lr, rl.av_optim.b2, rl.av_optim.schedule) == (1e-6, 1e-6, 0.99, "constant")
    assert from_config(small(ar=ConfigDict({"lr": 1e-3})), "ar").optim.lr == 1e-3


def test_the_last_word_on_a_learning_rate_holds(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from nla_jax.configs import common\n"
        "def get_config():\n"
        "    config = common.get_config()\n"
        "    config.out, config.target, config.store = 'o', 't', 's'\n"
        "    config.rl.lr = 5e-6\n"
        "    return config\n"
    )

    def rates(*assignments):
        rl = parsed(str(file), "rl", *assignments)
        return rl.av_optim.lr, rl.ar_optim.lr

    assert rates() == (5e-6, 5e-6)
    assert rates("rl.av_optim.lr=1e-4") == (1e-4, 5e-6)
    assert rates("rl.av_optim.lr=1e-4", "rl.lr=1e-3") == (1e-3, 1e-3)
    assert rates("rl.lr=1e-3", "rl.av_optim.lr=1e-4") == (1e-4, 1e-3)


def test_transforms_from_a_dictionary_or_pairs():
    for given in ({"shuffle": 0.5, "noise": 1}, (("noise", 1.0), ("shuffle", 0.5)), [["noise", 1], ["shuffle", 0.5]]):
        rl = from_config(small(rl=ConfigDict({"steps": 4, "transforms": given})), "rl")
        assert rl.transforms == (("noise", 1.0), ("shuffle", 0.5))
        hash(rl)


def test_schedules_follow_the_steps_unless_they_have_their_own():
    rl = from_config(small(rl=ConfigDict({"steps": 4, "ar_optim": {"steps": 9}})), "rl")
    assert (rl.av_optim.steps, rl.ar_optim.steps) == (4, 9)
    more = rl.with_steps(6)
    assert (more.steps, more.av_optim.steps, more.ar_optim.steps) == (6, 6, 9)
    ar = from_config(small(), "ar")
    assert (ar.optim.steps, ar.with_steps(10).optim.steps, ar.with_steps(10).with_steps(7).optim.steps) == (0, 10, 7)


def test_a_typo_in_another_stage_shows_too():
    with pytest.raises(InputError, match=r"config\.rl\.samples"):
        from_config(small(rl=ConfigDict({"steps": 4, "samples": "8"})), "ar")


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("rl", "lrr", 1.0, r"config\.rl\.lrr: unknown key\. Try: config\.rl\.lr$"),
        ("rl", "max_tokens", 1, r"Try: config\.rl\.max_new_tokens$"),
        ("rl", "b1", 0.9, r"Try: config\.rl\.av_optim\.b1$"),
        ("rl", "stage", "ar", r"config\.rl\.stage: unknown key"),
        ("ar", "samples", 8, r"config\.ar\.samples: unknown key"),
        ("rl", "xyzzy", 1, r"expected one of accumulate, advantage, "),
        ("rl", "samples", 8.0, r"config\.rl\.samples: expected a whole number, got 8\.0"),
        ("rl", "samples", True, r"config\.rl\.samples: expected a whole number, got True"),
        ("rl", "train_av", 1, r"config\.rl\.train_av: expected True or False, got 1"),
        ("rl", "kl", "k9", r"config\.rl\.kl: expected 'k2' or 'k3', got 'k9'"),
        ("rl", "compute_dtype", "float16", r"config\.rl\.compute_dtype: expected 'float32' or 'bfloat16'"),
        ("rl", "batch_size", None, r"config\.rl\.batch_size: expected a whole number, got None"),
        ("rl", "av_optim", {"lrr": 1.0}, r"config\.rl\.av_optim\.lrr: unknown key\. Try: config\.rl\.av_optim\.lr$"),
        ("rl", "av_optim", {"lr": -1.0}, r"config\.rl\.av_optim\.lr: expected a number above 0, got -1\.0"),
        ("rl", "av_optim", {"b1": 1.0}, r"config\.rl\.av_optim\.b1: expected a number from 0, below 1"),
        ("rl", "av_optim", {"name": "sgd"}, r"config\.rl\.av_optim\.name: expected 'adamw' or 'muon', got 'sgd'"),
        ("rl", "av_optim", "adamw", r"config\.rl\.av_optim: expected a section of settings, got 'adamw'"),
        ("rl", "lr", float("nan"), r"config\.rl\.av_optim\.lr: expected a number above 0, got nan"),
        ("rl", "lr", float("inf"), r"config\.rl\.av_optim\.lr: expected a number above 0, got inf"),
        ("rl", "samples", 1, r"config\.rl\.samples: expected 2 or more"),
        ("rl", "accumulate", 3, r"config\.rl\.accumulate: expected a divisor of the 1024 samples"),
        ("rl", "rollout_parts", 3, r"config\.rl\.rollout_parts: expected a divisor of the 128 activations"),
        ("rl", "rollout_parts", 0, r"config\.rl\.rollout_parts: expected "),
        ("rl", "transforms", {"shufle": 0.5}, r"config\.rl\.transforms: expected shuffle or drop_quotes or noise"),
        ("rl", "transforms", {"shuffle": 1.5}, r"config\.rl\.transforms: shuffle: expected a probability"),
        ("rl", "transforms", ("shuffle",), r"config\.rl\.transforms: expected \(name, probability\) pairs"),
        ("rl", "replay_ar", 1.0, r"config\.rl\.replay_ar: expected a share"),
        ("rl", "kl_coef", -0.1, r"config\.rl\.kl_coef: expected 0 or more"),
        ("rl", "steps", 0, r"config\.rl\.steps: expected 1 or more, got 0"),
        ("ar", "epochs", None, r"config\.ar\.steps: expected 1 or more where epochs is None, got 0"),
        ("ar", "buckets", (256, 96), r"config\.ar\.buckets: expected ascending lengths"),
        ("ar", "buckets", (), r"config\.ar\.buckets: expected at least one length"),
        ("ar", "buckets", "96", r"config\.ar\.buckets: expected a tuple of whole numbers, got '96'"),
        ("ar", "accumulate", 3, r"config\.ar\.accumulate: expected a divisor of the 256 samples"),
        ("av", "transforms", {"shuffle": 1.0}, r"config\.av\.transforms: expected none"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(section, key, value, says):
    config = small()
    config[section][key] = value
    with pytest.raises(InputError, match=says) as caught:
        from_config(config, section)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_at_the_top_level_is_named_there():
    for changes, says in (
        ({"sed": 1}, r"config\.sed: unknown key\. Try: config\.seed$"),
        ({"seed": -1}, r"config\.seed: expected 0 to 4294967295, got -1"),
        ({"rl": 3}, r"config\.rl: expected a section of settings, got 3"),
        ({"target": None}, r"config\.target is not set\. Try: --config\.target=TARGET"),
        ({"out": ""}, r"config\.rl\.av is not set\. Try: --config\.rl\.av=AV"),
        ({"rl": None}, r"config\.rl: expected a section of settings for rl, got none"),
    ):
        config = small().unlock()
        config = ConfigDict({**config.to_dict(), **changes})
        with pytest.raises(InputError, match=says):
            from_config(config, "rl")
    with pytest.raises(InputError, match="stage: expected lm or ar or av or rl, got 'sft'"):
        from_config(small(), "sft")


def test_a_language_model_is_new_or_goes_on():
    given = {"corpus": ("docs",), "tokenizer": "tok", "steps": 3}
    with pytest.raises(InputError, match="model, init: expected one of the two, got neither"):
        LMSettings(**given)
    with pytest.raises(InputError, match="model, init: expected one of the two, got both"):
        LMSettings(**given, model={"hidden_size": 8}, init="dir")
    a = LMSettings(**given, model={"hidden_size": 8, "rope_parameters": {"factors": [1, 2]}})
    b = LMSettings(**given, model={"rope_parameters": {"factors": [1, 2]}, "hidden_size": 8})
    assert a == b and hash(a) == hash(b) and a != dataclasses.replace(b, model={"hidden_size": 9})
    a.model["rope_parameters"]["factors"].append(3)  # a copy
    assert a.model["rope_parameters"] == {"factors": [1, 2]}
    with pytest.raises(InputError, match="model: expected only what JSON can hold"):
        LMSettings(**given, model={"hidden_size": object()})


@pytest.mark.parametrize(("name", "stage"), [("tiny", s) for s in SECTIONS])
def test_settings_are_frozen_and_go_to_json_and_back(name, stage):
    settings = parsed(name, stage)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.steps = 1
    written = json.loads(json.dumps(settings.to_dict()))
    assert written["steps"] == settings.steps and set(written) == {f.name for f in dataclasses.fields(settings)}
    out = written.pop("out")
    written.pop("stage", None)
    assert from_config({"out": out, stage: written}, stage) == settings


def test_every_field_of_every_stage_can_be_set_in_a_config():
    for cls in set(SECTIONS.values()):
        assert set(keys_of(cls)) == {f.name for f in dataclasses.fields(cls)} - {"out", "stage"} | {"lr"}


# ---------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("stage", "assignment", "field", "value"),
    [
        ("rl", "rl.samples=4", "samples", 4),
        ("rl", "rl.kl_coef=1e-3", "kl_coef", 1e-3),
        ("rl", "rl.kl_coef=1", "kl_coef", 1.0),
        ("rl", "rl.kl=k3", "kl", "k3"),
        ("rl", "rl.train_ar=false", "train_ar", False),
        ("rl", "rl.train_ar=True", "train_ar", True),
        ("rl", "rl.train_ar", "train_ar", True),
        ("rl", "remat=dots", "remat", "dots"),
        ("rl", "rl.av=a=b", "av", "a=b"),
        ("rl", "rl.eval_store=None", "eval_store", None),
        ("rl", "eval_store=held", "eval_store", "held"),
        ("rl", "rl.eval_store=123", "eval_store", "123"),
        ("rl", "rl.transforms=shuffle:0.5,noise:1", "transforms", (("shuffle", 0.5), ("noise", 1.0))),
        ("rl", "rl.transforms={'shuffle': 0.5}", "transforms", (("shuffle", 0.5),)),
        ("rl", "rl.transforms=()", "transforms", ()),
        ("rl", "rl.transforms=", "transforms", ()),
        ("ar", "ar.buckets=64,128", "buckets", (64, 128)),
        ("ar", "ar.buckets=(64,)", "buckets", (64,)),
        ("ar", "ar.buckets=64", "buckets", (64,)),
        ("ar", "ar.epochs=2", "epochs", 2),
        ("av", "av.epochs=none", "epochs", None),
        ("lm", "lm.corpus=a,b", "corpus", ("a", "b")),
        ("lm", "lm.corpus=('a, b',)", "corpus", ("a, b",)),
        ("lm", "seed=4294967295", "seed", 4294967295),
    ],
)
def test_text_from_the_command_line_becomes_a_value(stage, assignment, field, value):
    got = getattr(parsed("tiny", stage, assignment), field)
    assert got == value and type(got) is type(value)


def test_nested_keys_also_where_the_file_has_none():
    rl = parsed("tiny", "rl", "rl.av_optim.skip_above=10", "rl.ar_optim={'lr': 0.5}", "rl.ar_optim.name=muon")
    assert rl.av_optim.skip_above == 10.0 and rl.av_optim.lr == 2e-4
    assert rl.ar_optim == dataclasses.replace(
        RLSettings.__dataclass_fields__["ar_optim"].default, lr=0.5, name="muon", steps=rl.steps
    )
    lm = parsed("tiny", "lm", "lm.model.hidden_size=64", "lm.model.tie_word_embeddings=false", "lm.model.act='silu'")
    assert (lm.model["hidden_size"], lm.model["tie_word_embeddings"], lm.model["act"]) == (64, False, "silu")
    assert lm.model["num_hidden_layers"] == 4
    assert parsed("qwen2_5_7b_l20", "lm", "lm.steps=2", "lm.init=dir").init == "dir"


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("rl.lrr=1", "config.rl.lrr: unknown key. Try: config.rl.lr"),
        ("lr=1", "config.lr: unknown key. Try: config.rl.lr"),
        ("rl.av_optim.bb1=1", "config.rl.av_optim.bb1: unknown key. Try: config.rl.av_optim.b1"),
        ("r1.lr=1", "config.r1: unknown key. Try: config.rl"),
        ("rl.lr=fast", "config.rl.lr: expected a number, got 'fast'"),
        ("rl.steps=1.5", "config.rl.steps: expected a whole number, got '1.5'"),
        ("rl.steps=True", "config.rl.steps: expected a whole number, got 'True'"),
        ("rl.steps", "config.rl.steps: expected a value, got none. Try: --config.rl.steps=VALUE"),
        ("rl.train_av=yes", "config.rl.train_av: expected True or False, got 'yes'"),
        ("rl.kl=k9", "config.rl.kl: expected 'k2' or 'k3', got 'k9'"),
        ("rl.batch_size=None", "config.rl.batch_size: expected a whole number, got 'None'"),
        ("rl.steps.x=3", "config.rl.steps.x: expected no keys below config.rl.steps, which is one value"),
        ("rl.av_optim=3", "config.rl.av_optim: expected a dictionary of its keys, got '3'"),
        ("rl.av_optim={'b3': 1}", "config.rl.av_optim.b3: unknown key"),
        ("rl.transforms=shuffle", "config.rl.transforms: expected (name, probability) pairs"),
        ("ar.buckets=64,many", "config.ar.buckets: expected a tuple of whole numbers, got '64,many'"),
        ("lm.model={'a.b': 1}", "config.lm.model: expected a value for a config"),
        ("=1", "'--config.=1': expected --config.KEY=VALUE"),
        ("rl.lr=nan", "config.rl.av_optim.lr: expected a number above 0, got nan"),
        ("rl.lr=(1" + ")" * 3, "config.rl.lr: expected a number"),
    ],
)
def test_a_wrong_assignment_is_one_line_and_exit_code_2(capsys, assignment, says):
    code, out, err = nla(capsys, "rl", "--config=tiny", f"--config.{assignment}")
    assert code == 2 and out == ""
    assert err.startswith(f"nla: error: {says}") and err.count("\n") == 1


def test_arguments_are_told_apart():
    args = "--config=tiny --config.a.b=1 --out x --config.c -1 --config.d --wandb p --config.e=".split()
    overrides, rest = take_overrides(args)
    assert overrides == [("a.b", "1"), ("c", "-1"), ("d", None), ("e", "")]
    assert rest == "--config=tiny --out x --wandb p".split()


def test_print_config(capsys):
    code, out, err = nla(
        capsys,
        "rl",
        "--config",
        "tiny",
        "--out",
        "elsewhere",
        "--config.rl.lr=3e-4",
        "--config.rl.eval_store",
        "None",
        "--print-config",
    )
    shown = json.loads(out)
    assert (code, err) == (0, "")
    assert shown["av_optim"]["lr"] == shown["ar_optim"]["lr"] == 3e-4 and shown["eval_store"] is None
    assert (shown["out"], shown["av"], shown["samples"]) == ("elsewhere", "elsewhere/av/export/av", 8)


def test_help_has_an_example(capsys):
    for stage in SECTIONS:
        code, out, _ = nla(capsys, stage, "--help")
        assert code == 0 and f"nla train {stage} --config=" in out and "--config.KEY" in out


CONFIGS = {
    "missing": (None, "no such file"),
    "syntax": ("def get_config(:\n", "SyntaxError"),
    "empty": ("", "expected a function get_config(), got none"),
    "raises": ("def get_config():\n    raise KeyError('x')\n", "KeyError: 'x'"),
    "exits": ("raise SystemExit(0)\n", "SystemExit"),
    "dict": ("def get_config():\n    return {}\n", "ConfigDict, got dict"),
    "type": (
        "from nla_jax.configs.tiny import get_config as base\n"
        "def get_config():\n    c = base()\n    c.rl.samples = 'many'\n    return c\n",
        "TypeError",
    ),
    "locked": (
        "from nla_jax.configs.tiny import get_config as base\n"
        "def get_config():\n    c = base().lock()\n    c.rl.samplse = 3\n    return c\n",
        "samples",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_bad_config_file_is_one_line(tmp_path, capsys, kind):
    text, says = CONFIGS[kind]
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    code, _, err = nla(capsys, "rl", f"--config={file}")
    assert code == 2 and err.count("\n") == 1 and str(file) in err and says in err


def test_an_unknown_name_gets_the_closest(capsys):
    code, _, err = nla(capsys, "rl", "--config=qwen2_5_7b_l21")
    assert code == 2 and err.rstrip().endswith("Try: --config=qwen2_5_7b_l20") and "tiny" in err


@pytest.mark.parametrize("reason", ["finished", "SIGTERM"])
def test_the_task_runs_in_the_directory_of_the_run_and_its_end_is_the_exit_code(monkeypatch, tmp_path, capsys, reason):
    from nla_jax.train import loop

    seen, real = {}, inspect.signature(loop.run)
    exports = (tmp_path / "rl" / "export" / "av",) if reason == "finished" else ()

    def run(task, out_dir, **options):
        real.bind(task, out_dir, **options)
        seen.update(task=task, out_dir=out_dir, **options)
        return loop.Result(3, reason, tmp_path / "rl", exports)

    monkeypatch.setattr(loop, "run", run)
    monkeypatch.setitem(sys.modules, "nla_jax.train.tasks", types.SimpleNamespace(make_task=lambda settings: settings))
    code, out, _ = nla(capsys, "rl", "--config=tiny", "--out", str(tmp_path), "--config.rl.steps=3", "--no-tensorboard")
    assert code == (0 if reason == "finished" else 75) and seen["out_dir"] == tmp_path
    assert out == "".join(f"wrote {path}\n" for path in exports)
    assert isinstance(seen["task"], RLSettings) and seen["task"].steps == 3 and seen["task"].out == str(tmp_path)
    assert seen["tensorboard"] is False and seen["wandb"] is None


def test_optimizer_settings_stand_alone():
    assert hash(OptimizerSettings(lr=1e-3, name="muon")) == hash(OptimizerSettings(lr=1e-3, name="muon"))
    with pytest.raises(InputError, match="schedule: expected 'constant' or 'cosine' or 'linear', got 'step'"):
        OptimizerSettings(schedule="step")
