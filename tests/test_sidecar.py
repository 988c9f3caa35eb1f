"""Sidecars: the released ones, the older keys, what is written, and the check against a live tokenizer."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import AR, AV, DATA, LLAMA_CONFIG, QWEN, llama_like, needs_data, sidecar_dict, write

from nla_jax.errors import SidecarError
from nla_jax.sidecar import Sidecar, parse_sidecar, read_sidecar, sidecar_path, sidecar_to_dict, write_sidecar
from nla_jax.tokenizer import Tokenizer


def dataset() -> dict[str, Any]:
    """A dataset's sidecar in version 1, with the reference's older key names."""
    raw = sidecar_dict(
        kind="nla_dataset", schema_version=1, role=..., d_model=..., extraction_layer_index=..., stage="rl"
    )
    raw["extraction"] = {"base_model": "Qwen/Qwen2.5-7B-Instruct", "d_model": 16, "layer_index": 20, "norm": "none"}
    raw["prompt_templates"] = {"actor": raw["prompt_templates"]["av"], "critic": raw["prompt_templates"]["ar"]}
    return raw | {"row_count": 10}


# --- reading


@needs_data
def test_released_sidecars() -> None:
    av, ar = read_sidecar(AV), read_sidecar(AR)
    assert (av.kind, av.role, av.stage, av.d_model, av.layer_index) == ("nla_model", "av", "rl", 3584, 20)
    assert (av.injection_scale, av.mse_scale) == (150.0, pytest.approx(math.sqrt(3584), rel=1e-12))
    assert (av.marker, av.marker_id, av.left_id, av.right_id) == ("㈎", 149705, 29, 522)
    assert (av.injection_mode, av.ar_suffix_ids, av.variance_nrm) == ("replace", None, None)
    assert (ar.role, ar.layer_index, ar.injection_scale) == ("ar", 20, None)
    assert ar.ar_suffix_ids == (1318, 29, 366, 1708, 29)
    assert av.av_template is not None and av.av_template.endswith("\n\nPlease provide an explanation.")
    assert ar.ar_template == "Summary of the following text: <text>{explanation}</text> <summary>"


@needs_data
@pytest.mark.parametrize("directory", [AV, AR], ids=lambda p: p.name)
def test_released_sidecars_are_written_back_byte_for_byte(directory: Path, tmp_path: Path) -> None:
    written = write_sidecar(read_sidecar(directory), tmp_path)
    assert written.read_bytes() == (directory / "nla_meta.yaml").read_bytes()


@needs_data
def test_released_sidecars_match_the_real_tokenizer() -> None:
    tokenizer = Tokenizer.from_dir(QWEN)
    for directory in (AV, AR):
        read_sidecar(directory).check(tokenizer, directory)


@pytest.mark.parametrize(
    ("written", "injection", "mse"),
    [
        (150, 150.0, 150.0),
        ("150", 150.0, 150.0),
        ("1.5e2", 150.0, 150.0),
        ("sqrt_d_model", 4.0, 4.0),
        (None, None, None),
        ("raw", None, None),
        ("none", None, None),
        (..., None, 4.0),  # an absent mse_scale is the default, an absent injection_scale is missing
    ],
)
def test_scales(written: Any, injection: float | None, mse: float | None) -> None:
    sidecar = parse_sidecar(sidecar_dict(extraction__injection_scale=written, extraction__mse_scale=written))
    assert (sidecar.injection_scale, sidecar.mse_scale) == (injection, mse)


def test_a_scale_that_is_needed_and_not_there() -> None:
    sidecar = parse_sidecar(
        sidecar_dict(extraction__injection_scale=..., extraction__mse_scale=None, extraction_layer_index=...)
    )
    for call, words in (
        (sidecar.need_injection_scale, "scale missing"),
        (sidecar.need_mse_scale, "raw mode"),
        (sidecar.need_layer_index, "extraction_layer_index"),
    ):
        with pytest.raises(SidecarError, match=words) as e:
            call("dir")
        assert str(e.value).startswith("dir: ") and "Try:" in str(e.value)
    full = parse_sidecar(sidecar_dict())
    assert (full.need_injection_scale(), full.need_mse_scale(), full.need_layer_index()) == (150.0, 4.0, 20)


@pytest.mark.parametrize(("old", "new"), [("actor", "av"), ("critic", "ar"), ("av", "av"), ("ar", "ar")])
def test_roles(old: str, new: str) -> None:
    assert parse_sidecar(sidecar_dict(role=old)).role == new


@pytest.mark.parametrize(
    "layer",
    [
        {"extraction_layer_index": 20},
        {"extraction__layer_index": 20},
        {"critic__extraction_layer_index": 20},
        {"critic__num_hidden_layers": 20},  # holds K despite its name
        {"critic__num_hidden_layers": 21, "critic__extraction_layer_index": 20},
        {"extraction_layer_index": 20, "critic__extraction_layer_index": 20},
    ],
)
def test_every_place_of_the_layer(layer: dict[str, int]) -> None:
    assert parse_sidecar(sidecar_dict(**{"extraction_layer_index": ..., **layer})).layer_index == 20


def test_dataset_in_version_1() -> None:
    sidecar = parse_sidecar(dataset())
    assert (sidecar.kind, sidecar.role, sidecar.d_model, sidecar.layer_index) == ("nla_dataset", None, 16, 20)
    assert (sidecar.base_model, sidecar.mse_scale) == ("Qwen/Qwen2.5-7B-Instruct", 4.0)
    assert (sidecar.av_template, sidecar.ar_template) == ("<c>{injection_char}</c>", "<t>{explanation}</t> <s>")


def test_our_own_keys() -> None:
    raw = sidecar_dict(extraction__variance_nrm=0.7335, extraction__injection_mode="add_norm_matched")
    sidecar = parse_sidecar(raw)
    assert (sidecar.variance_nrm, sidecar.injection_mode) == (0.7335, "add_norm_matched")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": ...}, "kind"),
        ({"kind": "nla_other"}, "kind"),
        ({"schema_version": 3}, "schema_version"),
        ({"schema_version": True}, "schema_version"),
        ({"role": ...}, "role"),
        ({"role": "judge"}, "role"),
        ({"d_model": ...}, "d_model"),
        ({"d_model": "16"}, "d_model"),
        ({"d_model": 0}, "d_model"),
        ({"tokens": ...}, "tokens.injection_char"),
        ({"tokens": [1]}, "tokens"),
        ({"tokens__injection_char": ""}, "tokens.injection_char"),
        ({"tokens__injection_token_id": ...}, "tokens.injection_token_id"),
        ({"tokens__injection_left_neighbor_id": -1}, "tokens.injection_left_neighbor_id"),
        ({"tokens__injection_right_neighbor_id": True}, "tokens.injection_right_neighbor_id"),
        ({"tokens__critic_suffix_ids": []}, "tokens.critic_suffix_ids"),
        ({"tokens__critic_suffix_ids": ["1"]}, "tokens.critic_suffix_ids"),
        ({"prompt_templates": ...}, "prompt_templates.av"),
        ({"prompt_templates__av": "no place"}, "prompt_templates.av"),
        ({"prompt_templates__av": "{{injection_char}}"}, "prompt_templates.av"),  # an escape, not the field
        ({"prompt_templates__av": "{injection_char} {injection_char}"}, "prompt_templates.av"),
        ({"prompt_templates__av": 3}, "prompt_templates.av"),
        ({"prompt_templates__ar": "no place"}, "prompt_templates.ar"),
        ({"role": "ar", "prompt_templates__ar": ...}, "prompt_templates.ar"),
        ({"extraction__injection_scale": "big"}, "extraction.injection_scale"),
        ({"extraction__injection_scale": -1}, "extraction.injection_scale"),
        ({"extraction__mse_scale": float("nan")}, "extraction.mse_scale"),
        ({"extraction__mse_scale": True}, "extraction.mse_scale"),
        ({"extraction__mse_scale": [1]}, "extraction.mse_scale"),
        ({"extraction__injection_mode": "sideways"}, "extraction.injection_mode"),
        ({"extraction_layer_index": -1}, "extraction_layer_index"),
        ({"extraction_layer_index": "20"}, "extraction_layer_index"),
        ({"critic__extraction_layer_index": 21}, "layer index"),
        ({"critic__num_hidden_layers": 21}, "layer index"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "nla_meta.yaml").write_text(yaml.safe_dump(sidecar_dict(**changes)))
    with pytest.raises(SidecarError) as e:
        read_sidecar(tmp_path)
    assert words in str(e.value) and "expected" in str(e.value) and "\n" not in str(e.value)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("content", [None, "", "- 1", "{", "a: [", "\x00"])
def test_files_that_are_no_sidecar(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "nla_meta.yaml").write_text(content)
    with pytest.raises(SidecarError) as e:
        read_sidecar(tmp_path)
    assert "\n" not in str(e.value) and "nla_meta.yaml" in str(e.value)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / "nla_meta.yaml").write_text("kind: !!python/object/apply:os.system ['touch /nowhere']")
    with pytest.raises(SidecarError, match="YAML"):
        read_sidecar(tmp_path)


def test_paths(tmp_path: Path) -> None:
    assert sidecar_path(tmp_path) == tmp_path / "nla_meta.yaml"
    assert sidecar_path(tmp_path / "new") == tmp_path / "new" / "nla_meta.yaml"
    assert sidecar_path(tmp_path / "nla_meta.yaml") == tmp_path / "nla_meta.yaml"
    data = tmp_path / "rows.parquet"
    assert sidecar_path(data) == tmp_path / "rows.parquet.nla_meta.yaml" == sidecar_path(f"{data}@[0:10]")
    assert sidecar_path(tmp_path / "rows.parquet.nla_meta.yaml") == tmp_path / "rows.parquet.nla_meta.yaml"
    (dotted := tmp_path / "qwen2.5").mkdir()
    assert sidecar_path(dotted) == dotted / "nla_meta.yaml"


# --- writing


def reference_reads(raw: dict[str, Any]) -> tuple[Any, ...]:
    """What the PyTorch reference takes from a sidecar, by the keys it looks up (nla/schema.py, nla_inference.py)."""
    extraction = raw["extraction"]
    d_model = raw["d_model"] if raw["kind"] == "nla_model" else extraction["d_model"]
    tokens, templates = raw["tokens"], raw["prompt_templates"]
    critic = (raw.get("critic") or {}).get("extraction_layer_index")
    scales = extraction.get("injection_scale"), extraction.get("mse_scale", "sqrt_d_model")
    scales = tuple(math.sqrt(d_model) if s == "sqrt_d_model" else None if s is None else float(s) for s in scales)
    return (
        d_model,
        *(tokens["injection_" + k] for k in ("char", "token_id", "left_neighbor_id", "right_neighbor_id")),
        templates.get("av") or templates["actor"],
        templates.get("ar") or templates.get("critic"),
        tokens.get("critic_suffix_ids"),
        critic,
        scales,
    )


@pytest.mark.parametrize(
    "raw",
    [
        sidecar_dict(),
        sidecar_dict(extraction__mse_scale="sqrt_d_model", extraction__injection_scale="150"),
        sidecar_dict(extraction__mse_scale=None),
        sidecar_dict(extraction__mse_scale=...),
        dataset(),
        sidecar_dict(role="critic", schema_version=1, critic__num_hidden_layers=20, tokens__critic_suffix_ids=[1, 2]),
        sidecar_dict(role="ar", critic__extraction_layer_index=20, extraction__injection_scale=None),
    ],
)
def test_what_is_written_means_the_same(raw: dict[str, Any], tmp_path: Path) -> None:
    raw |= {"layer": 53, "training": {"lr": 7.07e-05}, "trained_on": ["a"]}
    before = copy.deepcopy(raw)
    sidecar = parse_sidecar(raw)
    path = write_sidecar(sidecar, tmp_path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert read_sidecar(tmp_path) == sidecar and raw == before
    assert (written["schema_version"], written["extraction_layer_index"]) == (2, 20)
    assert (written["layer"], written["training"], written["trained_on"]) == (53, {"lr": 7.07e-05}, ["a"])
    assert not {"actor", "critic"} & set(written["prompt_templates"])
    *expected, scales = reference_reads(raw)
    if sidecar.role == "ar":
        assert written["role"] == "ar" and written["critic"] == {"extraction_layer_index": 20}
        expected[-1] = 20
    assert reference_reads(written) == (*expected, scales)
    if sidecar.kind == "nla_dataset":
        assert written["extraction"]["layer_index"] == 20 and written["extraction"]["norm"] == "none"
    assert sidecar_to_dict(read_sidecar(tmp_path)) == written  # writing once more changes nothing


def test_changed_fields_are_written(tmp_path: Path) -> None:
    sidecar = dataclasses.replace(
        parse_sidecar(dataset()),
        kind="nla_model",
        role="ar",
        stage="sl",
        d_model=32,
        layer_index=5,
        injection_scale=7.0,
        mse_scale=None,
        injection_mode="add_norm_matched",
        marker="㈜",
        marker_id=1,
        left_id=2,
        right_id=3,
        ar_suffix_ids=(4, 5),
        av_template="A {injection_char}",
        ar_template="B {explanation}",
        variance_nrm=0.03,
        base_model="other",
    )
    write_sidecar(sidecar, tmp_path)
    assert read_sidecar(tmp_path) == sidecar
    none = dataclasses.replace(sidecar, layer_index=None, base_model=None, stage=None, injection_scale=None, role="av")
    write_sidecar(none, tmp_path)
    assert read_sidecar(tmp_path) == none


def test_a_sidecar_made_from_nothing(tmp_path: Path) -> None:
    fields = {
        f.name: getattr(parse_sidecar(sidecar_dict()), f.name) for f in dataclasses.fields(Sidecar) if f.name != "raw"
    }
    fresh = Sidecar(**fields)
    text = write_sidecar(fresh, tmp_path / "new").read_text(encoding="utf-8")
    assert read_sidecar(tmp_path / "new") == fresh
    assert "㈎" in text and reference_reads(yaml.safe_load(text)) == reference_reads(sidecar_dict())


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"])), st.text(st.characters(blacklist_categories=["Cs"])))
def test_templates_round_trip_exactly(tmp_path_factory: pytest.TempPathFactory, left: str, right: str) -> None:
    directory = tmp_path_factory.mktemp("t")
    clean = [s.replace("{", "(").replace("<INJECT>", "") for s in (left, right)]
    template = f"{clean[0]}{{injection_char}}{clean[1]}"
    write_sidecar(parse_sidecar(sidecar_dict(prompt_templates__av=template)), directory)
    assert read_sidecar(directory).av_template == template


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sidecar(parse_sidecar(sidecar_dict()), tmp_path)
    old = path.read_bytes()
    changed = dataclasses.replace(parse_sidecar(sidecar_dict()), d_model=99)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SidecarError, match="disk full"):
        write_sidecar(changed, tmp_path)
    monkeypatch.undo()
    unwritable = dataclasses.replace(changed, raw=sidecar_dict(extra=object()))
    with pytest.raises(SidecarError, match="written"):
        write_sidecar(unwritable, tmp_path)
    with pytest.raises(SidecarError, match="d_model"):
        write_sidecar(dataclasses.replace(changed, d_model=0), tmp_path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["nla_meta.yaml"]


# --- the check against a live tokenizer


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Sidecar]:
    """A small tokenizer with a marker token, and the sidecar that is right for it."""
    t = llama_like()
    t.add_tokens(["㈎", "<c>", "</c>"])
    tok = Tokenizer.from_dir(write(tmp_path_factory.mktemp("live"), t, LLAMA_CONFIG))
    one = {s: tok.encode(s)[0] for s in ("㈎", "<c>", "</c>")}
    suffix = tok.encode("</t> <s>")[1:]
    raw = sidecar_dict(
        tokens__injection_token_id=one["㈎"],
        tokens__injection_left_neighbor_id=one["<c>"],
        tokens__injection_right_neighbor_id=one["</c>"],
        tokens__critic_suffix_ids=suffix,
    )
    return tok, parse_sidecar(raw)


def test_the_right_tokenizer_passes(live: tuple[Tokenizer, Sidecar]) -> None:
    tok, sidecar = live
    sidecar.check(tok)
    dataclasses.replace(sidecar, role="ar").check(tok)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"marker_id": 3}, ["tokens.injection_token_id", "[3]"]),
        ({"marker": "日"}, ["tokens.injection_token_id", "'日'"]),  # several byte tokens
        ({"left_id": 3}, ["tokens.injection_left_neighbor_id", "3 and "]),
        ({"right_id": 3}, ["tokens.injection_right_neighbor_id", " and 3"]),
        ({"ar_suffix_ids": (1, 2)}, ["tokens.critic_suffix_ids", "[1, 2]"]),
        ({"av_template": "<c>{injection_char}</c> ㈎"}, ["prompt_templates.av", "2 places"]),
        ({"av_template": "none"}, ["prompt_templates.av", "0 places"]),
        ({"av_template": "{injection_char}"}, ["tokens.injection_left_neighbor_id"]),
        ({"ar_template": "<|bos|>{explanation}</t> <s>"}, ["prompt_templates.ar", "BOS once"]),
        ({"ar_template": "none"}, ["prompt_templates.ar", "{explanation} once"]),
    ],
)
def test_each_mismatch_is_named(live: tuple[Tokenizer, Sidecar], changes: dict[str, Any], words: list[str]) -> None:
    tok, sidecar = live
    with pytest.raises(SidecarError) as e:
        dataclasses.replace(sidecar, **changes).check(tok, "some/dir")
    line = str(e.value)
    assert line.startswith("some/dir: ") and "\n" not in line and "expected" in line and "got" in line
    assert "Try:" in line and all(w in line for w in words), line


def test_an_unknown_marker(live: tuple[Tokenizer, Sidecar], tmp_path: Path) -> None:
    t = llama_like()
    t.add_tokens(["<c>", "</c>"])
    t.add_special_tokens(["㈎"])
    tok = Tokenizer.from_dir(write(tmp_path, t, {**LLAMA_CONFIG, "unk_token": "㈎"}))
    unknown = dataclasses.replace(live[1], marker_id=tok.encode("㈎", parse_special=True)[0])
    with pytest.raises(SidecarError, match="tokens.injection_char.*unknown"):
        unknown.check(tok)


def test_a_marker_that_is_a_special_token(live: tuple[Tokenizer, Sidecar]) -> None:
    """Some community pairs use a special token such as <|image_pad|> as the marker."""
    tok, sidecar = live
    marker = tok.encode("<|end|>", parse_special=True)[0]
    dataclasses.replace(sidecar, marker="<|end|>", marker_id=marker).check(tok)


def test_a_tokenizer_without_a_chat_template(live: tuple[Tokenizer, Sidecar], tmp_path: Path) -> None:
    t = llama_like()
    t.add_tokens(["㈎", "<c>", "</c>"])
    tok = Tokenizer.from_dir(write(tmp_path, t, {**LLAMA_CONFIG, "chat_template": None}))
    dataclasses.replace(live[1], role="ar").check(tok)
    with pytest.raises(SidecarError, match="no chat template"):
        live[1].check(tok)


@needs_data
def test_the_wrong_tokenizer_is_refused() -> None:
    other = Tokenizer.from_dir(DATA / "tokenizers" / "mistral-7b-instruct-v0.3")
    with pytest.raises(SidecarError, match=r"tokens.injection_token_id: expected '㈎' to be \[149705\]"):
        read_sidecar(AV).check(other, AV)
