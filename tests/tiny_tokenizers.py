"""Small tokenizers and sidecars that tests make for themselves, and where the real ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

DATA = Path(__file__).parents[2] / "shared" / "data"
QWEN = DATA / "tokenizers" / "qwen2.5"
MISTRAL = DATA / "tokenizers" / "mistral-7b-instruct-v0.3"
AV = DATA / "released" / "qwen2.5-7b-L20-av"
AR = DATA / "released" / "qwen2.5-7b-L20-ar"
needs_data = pytest.mark.skipif(not QWEN.is_dir(), reason="needs the real tokenizers in ../shared/data")

CORPUS = ["the quick brown fox jumps over the lazy dog", "Hello world, hello there: don't 12 34!", "<b>x</b>"] * 4
GEMMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def special(text: str, **flags: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(text, special=True, normalized=False, **flags)


def write(directory: Path, tokenizer: tokenizers.Tokenizer | None, config: dict | None = None, **files: str) -> Path:
    directory.mkdir(exist_ok=True, parents=True)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content)
    return directory


def llama_like(bos: bool = True) -> tokenizers.Tokenizer:
    """Byte-level BPE with Llama 3's special tokens; the post-processor adds BOS."""
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    t.train_from_iterator(CORPUS, trainer)
    t.add_special_tokens([special(s) for s in ("<|bos|>", "<|end|>", "<|im_start|>", "<|im_end|>")])
    t.add_tokens([tokenizers.AddedToken("<tool>", special=False, normalized=False)])
    if bos:
        t.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", t.token_to_id("<|bos|>"))]
        )
    return t


LLAMA_CONFIG = {
    "bos_token": "<|bos|>",
    "eos_token": {"__type": "AddedToken", "content": "<|end|>", "lstrip": False},
    "pad_token": None,
    "chat_template": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def sidecar_dict(**changes: Any) -> dict[str, Any]:
    """A version 2 sidecar of an AV; `a__b=v` sets a.b, and v=... (Ellipsis) removes it."""
    raw: dict[str, Any] = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": "av",
        "stage": "rl",
        "d_model": 16,
        "extraction": {"injection_scale": 150.0, "mse_scale": 4.0},
        "tokens": {
            "injection_char": "㈎",
            "injection_token_id": 7,
            "injection_left_neighbor_id": 5,
            "injection_right_neighbor_id": 6,
            "critic_suffix_ids": None,
        },
        "prompt_templates": {"av": "<c>{injection_char}</c>", "ar": "<t>{explanation}</t> <s>"},
        "extraction_layer_index": 20,
    }
    for name, value in changes.items():
        *path, key = name.split("__")
        place = raw
        for step in path:
            place = place.setdefault(step, {})
        if value is ...:
            place.pop(key)
        else:
            place[key] = value
    return raw
