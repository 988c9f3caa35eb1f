"""AV and AR prompts against the published facts, and the parsing of explanations."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import AR, AV, GEMMA_CHAT, LLAMA_CONFIG, QWEN, llama_like, needs_data, sidecar_dict, write

from nla_jax.errors import InputError, PromptError
from nla_jax.prompt import (
    AVPrompt,
    ar_prompt_ids,
    build_av_prompt,
    find_marker,
    parse_explanation,
    template_parts,
    wrap_explanation,
)
from nla_jax.sidecar import Sidecar, parse_sidecar, read_sidecar
from nla_jax.tokenizer import Tokenizer

EXPLANATIONS = [
    "a text about cooking",
    "ends with a bracket >",
    "braces {like} {explanation} {{this}} {0} }{",
    "",
    "ends in space ",
    "line\nbreaks\n",
    "<|im_end|> and </text> <summary>",
    "日本語 🙂",
]


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    if not QWEN.is_dir():
        pytest.skip("needs the real tokenizers in ../shared/data")
    return Tokenizer.from_dir(QWEN)


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Sidecar]:
    """BOS from the post-processor and from the chat template, as Gemma has it, and a sidecar that fits."""
    t = llama_like()
    t.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    t.add_tokens(["㈎", "<c>", "</c>"])
    directory = write(tmp_path_factory.mktemp("g"), t, {**LLAMA_CONFIG, "chat_template": GEMMA_CHAT})
    tok = Tokenizer.from_dir(directory)
    marker, left, right = (tok.encode(s)[0] for s in ("㈎", "<c>", "</c>"))
    raw = sidecar_dict(
        tokens__injection_token_id=marker,
        tokens__injection_left_neighbor_id=left,
        tokens__injection_right_neighbor_id=right,
        tokens__critic_suffix_ids=tok.encode("</t> <s>")[1:],
    )
    return tok, parse_sidecar(raw)


@needs_data
def test_released_av_prompt(qwen: Tokenizer) -> None:
    prompt = build_av_prompt(qwen, read_sidecar(AV))
    assert (len(prompt.ids), prompt.marker) == (125, 111)
    assert prompt.ids[110:113] == (29, 149705, 522)
    assert prompt.ids[:3] == (151644, 8948, 198) and prompt.ids[-3:] == (151644, 77091, 198)
    assert build_av_prompt(qwen, read_sidecar(AR)) == prompt and hash(prompt) == hash(AVPrompt(prompt.ids, 111))


@needs_data
@pytest.mark.parametrize("explanation", EXPLANATIONS)
def test_released_ar_prompt(qwen: Tokenizer, explanation: str) -> None:
    ids = ar_prompt_ids(qwen, read_sidecar(AR), explanation)
    assert ids[-5:] == [1318, 29, 366, 1708, 29]
    assert qwen.decode(ids) == f"Summary of the following text: <text>{explanation}</text> <summary>"
    assert not set(ids) & qwen.special_ids


@needs_data
def test_dataset_prompt_is_the_template(qwen: Tokenizer) -> None:
    sidecar = read_sidecar(AV)
    assert sidecar.av_template is not None
    text = sidecar.av_template.replace("{injection_char}", "<INJECT>")
    expected = build_av_prompt(qwen, sidecar)
    assert build_av_prompt(qwen, sidecar, text) == expected
    assert build_av_prompt(qwen, sidecar, [{"role": "user", "content": text}]) == expected


def test_one_bos_in_both_prompts(gemma_like: tuple[Tokenizer, Sidecar]) -> None:
    tok, sidecar = gemma_like
    av, ar = build_av_prompt(tok, sidecar).ids, ar_prompt_ids(tok, sidecar, "x")
    assert av[0] == ar[0] == tok.bos_id and av.count(tok.bos_id) == ar.count(tok.bos_id) == 1
    assert av[-1:] == tuple(tok.encode("\n"))  # the generation prompt is there


@pytest.mark.parametrize("explanation", EXPLANATIONS)
def test_explanations_are_put_in_literally(gemma_like: tuple[Tokenizer, Sidecar], explanation: str) -> None:
    tok, sidecar = gemma_like
    ids = ar_prompt_ids(tok, sidecar, explanation + "<|end|>")
    assert tok.decode(ids[1:]) == f"<t>{explanation}<|end|></t> <s>"
    assert set(ids) & tok.special_ids == {tok.bos_id}


@pytest.mark.parametrize(
    "template",
    [
        "no place",
        "<c><INJECT></c> <c><INJECT></c>",
        "<c><INJECT></c> and ㈎ in the text",
        "<c>{{injection_char}}</c>",
        "{injection_char}",
        "<c> <INJECT></c>",
        "<c><INJECT>",
        [{"role": "user", "content": "nothing"}],
        [{"role": "system", "content": "<c><INJECT></c>"}, {"role": "user", "content": "<c><INJECT></c>"}],
    ],
)
def test_templates_without_one_proper_place(gemma_like: tuple[Tokenizer, Sidecar], template: object) -> None:
    with pytest.raises(PromptError) as e:
        build_av_prompt(*gemma_like, template)  # type: ignore[arg-type]
    assert "expected" in str(e.value) and "Try:" in str(e.value) and "\n" not in str(e.value)


def test_a_marker_that_merges_in_context(tmp_path: Path) -> None:
    """A marker that is one token alone may not be one between its tags; the rendered prompt decides."""
    t = llama_like()
    t.add_tokens(["#", "<c>", "</c>", "<c>#"])
    tok = Tokenizer.from_dir(write(tmp_path, t, LLAMA_CONFIG))
    marker, left, right = (tok.encode(s)[0] for s in ("#", "<c>", "</c>"))
    raw = sidecar_dict(
        tokens__injection_char="#",
        tokens__injection_token_id=marker,
        tokens__injection_left_neighbor_id=left,
        tokens__injection_right_neighbor_id=right,
    )
    with pytest.raises(PromptError, match=r"tokens.injection_token_id\): expected token \d+ once, got 0 times"):
        build_av_prompt(tok, parse_sidecar(raw))


def test_marker_at_the_edges(gemma_like: tuple[Tokenizer, Sidecar]) -> None:
    _, s = gemma_like
    assert find_marker([0, s.left_id, s.marker_id, s.right_id], s) == 2
    for ids in ([s.marker_id, s.right_id], [s.left_id, s.marker_id], [s.marker_id], []):
        with pytest.raises(PromptError):
            find_marker(ids, s)


def test_missing_templates_and_wrong_explanations(gemma_like: tuple[Tokenizer, Sidecar]) -> None:
    tok, sidecar = gemma_like
    with pytest.raises(PromptError, match="prompt_templates.av"):
        build_av_prompt(tok, dataclasses.replace(sidecar, av_template=None))
    with pytest.raises(PromptError, match="prompt_templates.ar"):
        ar_prompt_ids(tok, dataclasses.replace(sidecar, ar_template=None), "x")
    with pytest.raises(PromptError, match="tokens.critic_suffix_ids"):
        ar_prompt_ids(tok, dataclasses.replace(sidecar, ar_suffix_ids=(1,)), "x")
    for bad in (None, 3, "\ud800"):
        with pytest.raises(InputError):
            ar_prompt_ids(tok, sidecar, bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "value", "expected"),
    [
        ("a {explanation} b", "{x}", "a {x} b"),
        ("{{a}} {explanation}", "z", "{a} z"),
        ("{{{explanation}}}", "z", "{z}"),
        ("{{explanation}}", "z", "{explanation}"),
        ("json {'a': 1} {explanation} {", "z", "json {'a': 1} z {"),  # str.format would fail here
        ("{other} {explanation}", "z", "{other} z"),
    ],
)
def test_template_filling(template: str, value: str, expected: str) -> None:
    assert value.join(template_parts(template, "{explanation}")) == expected


@given(st.text(), st.text())
def test_template_filling_is_str_format(left: str, right: str) -> None:
    """Where str.format accepts a template, filling gives the same."""
    template = left.replace("{", "{{").replace("}", "}}") + "{explanation}" + right.replace("{", "").replace("}", "")
    assert "{z}".join(template_parts(template, "{explanation}")) == template.format(explanation="{z}")


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        ("<explanation>\na b\n</explanation>", True, ("a b", False)),
        ("so: <explanation> a </explanation> b </explanation>", True, ("a", False)),
        ("<explanation>a</explanation><explanation>b</explanation>", True, ("a", False)),
        ("<explanation></explanation>", True, ("", False)),
        ("<explanation>a <explanation>b</explanation>", True, ("a <explanation>b", False)),
        ("<explanation>a</explanation> trailing", False, ("<explanation>a</explanation> trailing", True)),
        ("<explanation>a", True, ("<explanation>a", True)),
        ("</explanation>a<explanation>", True, ("</explanation>a<explanation>", True)),
        (" plain ", True, (" plain ", True)),
        ("", True, ("", True)),
    ],
)
def test_parsing(text: str, finished: bool, expected: tuple[str, bool]) -> None:
    assert parse_explanation(text, finished) == expected


@given(st.text())
def test_wrapping_is_undone_by_parsing(text: str) -> None:
    inner = text.replace("</explanation>", "").strip()
    assert parse_explanation(wrap_explanation(inner), True) == (inner, False)


@pytest.mark.parity
@needs_data
def test_released_prompts_against_transformers(qwen: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(QWEN)
    av, ar = read_sidecar(AV), read_sidecar(AR)
    assert av.av_template is not None and ar.ar_template is not None
    messages = [{"role": "user", "content": av.av_template.format(injection_char=av.marker)}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(build_av_prompt(qwen, av).ids) == ids
    for explanation in EXPLANATIONS[:-2]:
        expected = theirs(ar.ar_template.format(explanation=explanation), add_special_tokens=True)["input_ids"]
        assert ar_prompt_ids(qwen, ar, explanation) == expected
