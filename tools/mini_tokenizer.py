"""A small byte-level BPE tokenizer for mini checkpoints, trained on text that is made here: no download, no data file.

Two styles: `chatml` (no BOS, as in Qwen) and `bos` (the tokenizer adds BOS to a text, the chat template writes it
itself, and turns end with a token of their own, as in Gemma).
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

MARKER = "㈎"
VOCAB_SIZE = 2048
SPECIAL = {
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "bos": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
}
_NAMED: dict[str, dict[str, str | None]] = {
    "chatml": {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "bos": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}
_CHAT_TEMPLATES = {
    "chatml": """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nAnswer in plain words.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    "bos": """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set name = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<start_of_turn>' + name + '\\n' + message['content'] + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
""",
}
_COMMON = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one
you were all her she there would their we him been has when who will no more if out so up said what its about than into
them can only other time new some could these two may first then do any like my now over such our man me even most made
after also did many off before must well back through years much where your way down should because long each just
state those people too how little good world make very year still see own work men day get here old life both between
being under three never know same last another while us might great go come since against right came take used himself
few house use during without again place around however home small found thought went say part once general high upon
school every don't does got united left number course war until always away something fact water less public put think
almost hand enough far took head yet government system better set told nothing night end why called didn't eyes find
going look asked later point knew city next program business group social days light moment letter question answer
token vector text layer model explanation summary concept meaning word sentence topic tone style context snippet user
assistant system Write Describe The A This It In For And But When
"""


def write_mini_tokenizer(directory: Path, style: str = "chatml") -> None:
    """Trains the tokenizer (under a second, always the same) and writes tokenizer.json and tokenizer_config.json.

    The marker is an ordinary single token that no merge can join to its neighbours.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 1,
        special_tokens=list(SPECIAL[style]),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(_sentences(), trainer)
    tok.add_tokens([tokenizers.AddedToken(MARKER, special=False, normalized=False)])
    named = _NAMED[style]
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    if named["bos_token"] is not None:
        bos = named["bos_token"]
        tok.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tok.token_to_id(bos))]
        )
    tok.save(str(directory / "tokenizer.json"))
    config = {**named, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATES[style], encoding="utf-8")


def _sentences() -> list[str]:
    """Text to learn merges from: common words and words made of syllables, in sentences and inside tags."""
    rng = random.Random(0)
    common = _COMMON.split()
    syllables = [c + v for c in "b c d f g h l m n p r s t v w st tr pl".split() for v in "a e i o u an er".split()]
    made = ["".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(600)]
    tags = ("concept", "explanation", "text", "summary")
    out = []
    for i in range(3000):
        words = rng.choices(common, k=rng.randint(4, 12)) + rng.choices(made, k=rng.randint(0, 3))
        rng.shuffle(words)
        sentence = " ".join(words).capitalize() + rng.choice((".", ".", "?", "!", f", {rng.randint(0, 2100)}."))
        out.append(f"<{tags[i % 4]}>{sentence}</{tags[i % 4]}>\n" if i % 5 == 0 else sentence + "\n")
    return out
