"""The model card: numbers that huggingface_hub reads back, words and tables for people, nothing overwritten."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from cli_pair import mini_pair, run
from eval_results import results
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from nla_jax.evals.provenance import weights_hash
from nla_jax.tools.mini import MiniPair


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> MiniPair:
    return mini_pair(tmp_path_factory.mktemp("mini"))


@pytest.fixture
def evaluated(pair, tmp_path) -> Path:
    """An evaluation of the pair, made up but for the hashes of its weights."""
    found = results()
    for role in ("av", "ar"):
        found["models"][role]["weights"] = weights_hash(getattr(pair, role))
    found["command"] += ["--data", "/home/somebody/secret/store"]
    found["data"]["path"] = "/home/somebody/secret/store"
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "results.json").write_text(json.dumps(found))
    return tmp_path / "eval"


def written(evaluated: Path, pair: MiniPair, *more: object) -> tuple[ModelCard, str]:
    path = evaluated.parent / "CARD.md"
    run("card", "--eval", evaluated, "--av", pair.av, "--ar", pair.ar, "--out", path, *more)
    return ModelCard.load(path), path.read_text()


def test_the_numbers_round_trip_through_the_hub_form(evaluated, pair):
    card, text = written(evaluated, pair, "--license", "apache-2.0", "--base-model", "org/base", "--name", "mine")
    assert card.data.license == "apache-2.0" and card.data.base_model == "org/base"
    assert card.data.library_name == "nla_jax" and "activation-verbalizer" in card.data.tags
    found = json.loads((evaluated / "results.json").read_text())
    rows = [(s["suite"], r) for s in found["suites"] for r in s["rows"] if r["value"] is not None]
    header = yaml.safe_load(text.split("---\n")[1])
    name, of_index = model_index_to_eval_results(header["model-index"])
    assert name == card.data.model_name == "mine"
    for read in (card.data.eval_results, of_index):
        assert len(read) == len(rows)
        for result, (suite, row) in zip(read, rows, strict=True):
            assert result.metric_type == row["metric"] and result.metric_value == row["value"]
            assert result.dataset_config == suite and result.dataset_revision == "c" * 64
            assert result.dataset_split == "held_out" and result.dataset_name == "store"
            assert ("control" in result.metric_name) == bool(row["control"])
            assert result.metric_args.get("low") == row["low"] and result.metric_args["n"] == row["n"]
            assert row["group"] in result.metric_name and row["control"] in result.metric_name
    shuffled = [r.metric_value for r in of_index if r.metric_name == "fve_nrm, control: shuffled pairs"]
    assert shuffled == [-0.9]


def test_the_text_says_what_a_reader_needs(evaluated, pair):
    card, text = written(evaluated, pair)
    for words in (
        "hidden_states[3]",
        "blocks.2.hook_resid_post",
        "nla explain",
        "NLA.from_pretrained",
        "It is not trained to be true",
        "Not measured here: downstream, retrieval",
        "| fve_nrm |  | 0.878 [0.860, 0.896] | 1000 (200 docs) | constant floor -0.354; shuffled pairs -0.900",
        "| fve_nrm | position 50-99 |",
        "always guessing the mean direction gives -0.354",
        weights_hash(pair.av),
        "d" * 64,
    ):
        assert words in text, words
    assert "/home/somebody" not in text and "--data store" in text  # a card is published
    assert "<script" not in text and "\x1b" not in text and card.content == text
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")


def test_the_card_of_an_av_alone(evaluated, pair):
    path = evaluated.parent / "CARD.md"
    run("card", "--eval", evaluated / "results.json", "--av", pair.av, "--out", path)
    card = ModelCard.load(path)
    assert "activation-reconstructor" not in card.data.tags and "--ar" not in path.read_text().split("## How well")[0]


def test_training_settings_of_an_export_are_in_it(evaluated, pair, tmp_path):
    av = tmp_path / "mine" / "rl" / "export" / "av"
    shutil.copytree(pair.av, av)
    settings = {"steps": 250, "av_optim": {"lr": 0.001}, "store": "/home/somebody/secret"}
    line = {"step": 0, "run": {"settings": settings}}
    rows = [line, {"step": 1, "loss": 1.0}]
    (av.parent.parent / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("card", "--eval", evaluated, "--av", av)
    text = (av / "README.md").read_text()
    assert "| av_optim.lr | 0.001 |" in text and "| steps | 250 |" in text and "/home/somebody" not in text
    assert ModelCard.load(av / "README.md").data.model_name == "mine-rl-av"
    assert weights_hash(av) == weights_hash(pair.av)  # the card is none of the weights


def test_a_card_is_not_overwritten_unasked(evaluated, pair):
    path = evaluated.parent / "CARD.md"
    path.write_text("my own words")
    flags = ["card", "--eval", evaluated, "--av", pair.av, "--out", path]
    assert "there is a card already" in run(*flags, code=2).stderr
    assert path.read_text() == "my own words"
    run(*flags, "--overwrite")
    assert path.read_text().startswith("---\n")


def test_an_evaluation_of_other_weights_is_refused(evaluated, pair, tmp_path):
    found = json.loads((evaluated / "results.json").read_text())
    found["models"]["ar"]["weights"] = "0" * 64
    (evaluated / "results.json").write_text(json.dumps(found))
    done = run("card", "--eval", evaluated, "--av", pair.av, "--ar", pair.ar, "--out", tmp_path / "x.md", code=2)
    (line,) = done.stderr.splitlines()
    assert "expected the weights that were evaluated" in line and "nla eval again" in line
    assert not (tmp_path / "x.md").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval", "/no/such"], r"expected a results\.json of nla eval, got none"),
        (["--eval", "EVAL", "--av", "/no/such"], "--av /no/such: expected a directory of the model"),
        (["--eval", "EVAL", "--av", "AR"], "expected the AV, got AR"),
        (["--eval", "EVAL", "--out", "/no/such/README.md"], "expected an existing directory"),
        (["--eval", "EVAL", "--out", "EVAL/results.json", "--overwrite"], "which this command reads|that this command"),
    ],
)
def test_bad_input_is_one_line(evaluated, pair, tmp_path, flags, message):
    names = {"EVAL": str(evaluated), "AR": str(pair.ar)}
    given = [f.replace("EVAL", names["EVAL"]) if f != "AR" else names["AR"] for f in flags]
    more = [] if "--av" in given else ["--av", pair.av]
    out = [] if "--out" in given else ["--out", tmp_path / "x.md"]
    (line,) = run("card", *given, *more, *out, code=2).stderr.splitlines()
    assert re.search(message, line), line
