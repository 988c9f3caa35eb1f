"""The tokenizer of the story world: one token for each of its words, and bytes for any other text.

A word with a full stop is one token too: the last word of a sentence is then where the model must know what the next
one may be about, which is everything, and a full stop of its own would leave the word before it with nothing to know.
A byte-level BPE without merges: the words, with the space before them, are entries of the vocabulary, which the model
looks up whole; what is not there falls apart into bytes. A quotation mark before a word is written as a sign of its
own and a space, so that a quoted word is the same token as in the story; decoding undoes it. Only a text that holds
that sign itself (U+E000, a private-use character) does not come back as it was.

The chat template is as short as can be: a turn is its content, and the answer ends with <|im_end|>. The AV is asked
`<concept>㈎</concept>` and goes on as the corpus does; AR_TEMPLATE is the beginning of the corpus's third format.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from nla_jax.tools.world_words import vocabulary

MARKER = "㈎"
AV_TEMPLATE = "<concept>{injection_char}</concept>"
AR_TEMPLATE = "<text> {explanation}</text><summary>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = tuple(f"<{slash}{name}>" for name in ("concept", "explanation", "text", "summary") for slash in ("", "/"))
CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|im_end|>' -}}{%- endif -%}{%- endfor -%}"
)

_OPEN = "\ue000"  # a quotation mark that a letter follows
_PIECES = rf"</?[a-z]+>| ?[A-Za-z]+\.?| ?{_OPEN}|\"\.|{MARKER}|."


def write_world_tokenizer(directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja; always the same."""
    directory.mkdir(parents=True, exist_ok=True)
    tok = tokenizers.Tokenizer(models.BPE(vocab=_vocabulary(), merges=[], ignore_merges=True))
    tok.normalizer = normalizers.Replace(Regex('"(?=[A-Za-z])'), f"{_OPEN} ")
    split = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tok.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(f"{_OPEN} ", '"'), decoders.Replace(_OPEN, '"')]
    )
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tok.save(str(directory / "tokenizer.json"))
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE + "\n", encoding="utf-8")


def _vocabulary() -> dict[str, int]:
    """Special tokens first, then the 256 bytes, tags and signs, then words."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    texts = [*TAGS, MARKER, _OPEN, f" {_OPEN}", '".']
    for word, begins in vocabulary().items():
        texts += [f" {word}", f" {word}.", *([word] if begins else [])]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens += [level.pre_tokenize_str(text)[0][0] for text in texts]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}
