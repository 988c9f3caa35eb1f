"""Bad input: exit code 2, one line that says what to do, no output that looks whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from cli_pair import SHORT, mini_pair, roles, run, saved_vectors

from nla_jax.tools.mini import MiniPair, make_mini
from nla_jax.tools.mini_tokenizer import write_mini_tokenizer


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> MiniPair:
    return mini_pair(tmp_path_factory.mktemp("mini"))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory) -> Path:
    return saved_vectors(tmp_path_factory.mktemp("vectors") / "v.npy")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _corrupt(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def _edit_sidecar(path: Path, **templates: str) -> None:
    value = yaml.safe_load(path.read_text())
    value["prompt_templates"].update(templates)
    path.write_text(yaml.safe_dump(value, allow_unicode=True))


def _edit_config(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _wrong_tokenizer(directory: Path) -> None:
    for file in directory.glob("*token*"):
        file.unlink()
    write_mini_tokenizer(directory, "bos")


BROKEN = {
    "truncated target": (lambda p: _truncate(p.target / "model.safetensors"), "model.safetensors"),
    "truncated av": (lambda p: _truncate(p.av / "model.safetensors"), "model.safetensors"),
    "truncated ar": (lambda p: _truncate(p.ar / "model.safetensors"), "model.safetensors"),
    "corrupt av": (lambda p: _corrupt(p.av / "model.safetensors"), "model.safetensors"),
    "corrupt head": (lambda p: _corrupt(p.ar / "value_head.safetensors"), "value_head.safetensors"),
    "no weights": (lambda p: (p.av / "model.safetensors").unlink(), "model.safetensors"),
    "no head": (lambda p: (p.ar / "value_head.safetensors").unlink(), "value_head.safetensors"),
    "no sidecar": (lambda p: (p.av / "nla_meta.yaml").unlink(), "nla_meta.yaml"),
    "sidecar not yaml": (lambda p: (p.ar / "nla_meta.yaml").write_text("a: [b"), "nla_meta.yaml"),
    "wrong tokenizer": (lambda p: _wrong_tokenizer(p.av), str(Path("av"))),
    "no tokenizer": (lambda p: [f.unlink() for f in p.target.glob("*token*")], "tokenizer"),
    "unknown model_type": (lambda p: _edit_config(p.target / "config.json", model_type="mamba"), "mamba"),
    "template without marker": (
        lambda p: _edit_sidecar(p.av / "nla_meta.yaml", av="Say it."),
        "marker|INJECT|injection",
    ),
    "config not json": (lambda p: (p.target / "config.json").write_text("{"), "config.json"),
}


def _refused(done) -> str:
    """The one error line of a run that was refused."""
    print(done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("nla: error: ")]
    assert len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0], done.stderr
    assert "Traceback" not in done.stderr and not done.stdout
    return lines[0]


@pytest.mark.parametrize("what", BROKEN)
def test_broken_models_leave_one_line_and_no_output(pair, tmp_path, what):
    copy = MiniPair(*(tmp_path / role for role in ("target", "av", "ar")))
    for role in ("target", "av", "ar"):
        shutil.copytree(getattr(pair, role), getattr(copy, role))
    breaking, message = BROKEN[what]
    breaking(copy)
    out = tmp_path / "out"
    out.mkdir()
    (out / "o.json").write_text("an earlier result")
    flags = ["--json", out / "o.json", "--parquet", out / "o.parquet", "--html", out / "o.html", "--positions", -1]
    done = run("explain", "abc", *roles(copy), *SHORT, *flags, code=2)
    line = _refused(done)
    assert re.search(message, line), line
    assert done.stderr.count("\n") == 1, "found only after work had begun"
    assert [p.name for p in out.iterdir()] == ["o.json"] and (out / "o.json").read_text() == "an earlier result"


def test_models_of_different_width(pair, tmp_path):
    other = make_mini(tmp_path, d_model=32)
    line = _refused(run("explain", "abc", *roles(pair, "target", "av"), "--ar", other.ar, code=2))
    assert "d_model" in line and "32" in line and "64" in line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x ㈎ y"], r"'㈎' at character 2 .*--allow-marker"),
        ([""], "no tokens"),
        (["abc", "--positions", "99"], r"position 99 is out of range: expected -\d\.\.\d"),
        (["abc", "--positions", "99:"], "select nothing"),
        (["abc", "--positions", "one"], "expected numbers and slices"),
        (["abc", "--layer", "1"], r"--layer: expected 2"),
        (["abc", "--layer", "99"], "99"),
        (["abc", "--target", "no/such/model-at-all/anywhere"], "no/such/model-at-all"),
    ],
)
def test_bad_requests(pair, args, message):
    line = _refused(run("explain", *roles(pair), *args, code=2))
    assert re.search(message, line), line


def test_allow_marker_explains_the_text_all_the_same(pair):
    shown = run("explain", "x ㈎ y", "--allow-marker", *roles(pair, "target", "av"), "--positions", -1, *SHORT)
    assert "positions < 50: n 1" in shown.stdout


@pytest.mark.parametrize("content", [b"{", b'[{"role": "user"}]', b"\xff", b"[]"])
def test_bad_chat_files(pair, tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    assert "c.json" in _refused(run("explain", "--chat", tmp_path / "c.json", *roles(pair), code=2))


def test_bad_vectors(pair, vectors, tmp_path):
    good = np.load(vectors)
    cases = {
        "nan": (np.where(np.arange(6)[:, None] == 4, np.nan, good), "row 4 has NaN"),
        "zero": (good * (np.arange(6)[:, None] != 2), "row 2 is all zero"),
        "wide": (np.concatenate([good, good], axis=1), "expected 64 .* got 128"),
        "words": (np.array(["a", "b"]), "expected float"),
    }
    for name, (array, message) in cases.items():
        np.save(tmp_path / f"{name}.npy", array)
        out = tmp_path / "out.json"
        flags = ["--vectors", tmp_path / f"{name}.npy", "--json", out]
        line = _refused(run("verbalize", *roles(pair, "av"), *flags, code=2))
        assert re.search(message, line) and not out.exists(), line
    line = _refused(run("verbalize", *roles(pair, "av"), "--vectors", vectors, "--rows", "6", code=2))
    assert "row 6 is out of range: expected -6..5 (6 rows)" in line
    (tmp_path / "t.txt").write_text("one\ntwo\n")
    line = _refused(run("score", *roles(pair, "ar"), "--texts", tmp_path / "t.txt", "--vectors", vectors, code=2))
    assert "2 texts, 6 vectors" in line


def test_outputs_are_checked_first(pair, vectors, tmp_path):
    """Before the models, which do not exist here."""
    nowhere = ["--av", "/no/av", "--vectors", vectors]
    (tmp_path / "file").write_text("x")
    (tmp_path / "link.npy").symlink_to(vectors)
    cases = {
        tmp_path / "no" / "o.json": "expected an existing directory",
        tmp_path / "file" / "o.json": "expected an existing directory",
        tmp_path: "got a directory",
        vectors: "that this command reads",
        tmp_path / "link.npy": "that this command reads",
        Path("/dev/null"): "expected a regular file",
        Path("/proc/o.json"): "cannot write into /proc",
    }
    for path, message in cases.items():
        line = _refused(run("verbalize", *nowhere, "--json", path, code=2))
        assert message in line, line
    both = ["--json", tmp_path / "o", "--html", tmp_path / "o"]
    assert "the same twice" in _refused(run("verbalize", *nowhere, *both, code=2))
    in_model = ["--vectors", vectors, "--av", pair.av, "--json", pair.av / "config.json"]
    assert "that this command reads" in _refused(run("verbalize", *in_model, code=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link.npy"]


def test_a_link_is_followed_and_kept(pair, vectors, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "o.json").symlink_to(tmp_path / "real" / "o.json")
    run("verbalize", *roles(pair, "av"), "--vectors", vectors, "--rows", 0, *SHORT, "--json", tmp_path / "o.json")
    assert (tmp_path / "o.json").is_symlink() and json.loads((tmp_path / "real" / "o.json").read_text())
    assert len(list((tmp_path / "real").iterdir())) == 1
