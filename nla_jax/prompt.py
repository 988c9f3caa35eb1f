"""Prompts of the AV and the AR, and the explanation in what the AV writes.

The AV prompt is the sidecar's template, with the marker character in it, as a user turn of the tokenizer's
chat template with a generation prompt. The AR prompt is plain text around the explanation, tokenized with
special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nla_jax.errors import InputError, PromptError

if TYPE_CHECKING:  # sidecar.py builds prompts to check itself
    from nla_jax.sidecar import Sidecar
    from nla_jax.tokenizer import Tokenizer

INJECT = "<INJECT>"  # stands for the marker in the prompts of datasets
MARKER_FIELD = "{injection_char}"
EXPLANATION_FIELD = "{explanation}"

_OPEN, _CLOSE = "<explanation>", "</explanation>"
_FORMAT = re.compile(r"\{\{|\}\}|\{injection_char\}|\{explanation\}")


@dataclass(frozen=True)
class AVPrompt:
    """Token ids of an AV prompt and the index of the marker among them, where the vector goes."""

    ids: tuple[int, ...]
    marker: int


def template_parts(template: str, field: str) -> tuple[str, ...]:
    """The literal text of a template between the occurrences of one field (n occurrences give n + 1 parts).

    Templates are written for `str.format`, hence `{{` and `}}` mean one brace. Any other brace stands for
    itself, so that a template, or an explanation put into it, may hold whatever text it likes.
    """
    parts = [""]
    at = 0
    for match in _FORMAT.finditer(template):
        parts[-1] += template[at : match.start()]
        at = match.end()
        if match[0] == field:
            parts.append("")
        else:
            parts[-1] += {"{{": "{", "}}": "}"}.get(match[0], match[0])
    parts[-1] += template[at:]
    return tuple(parts)


def build_av_prompt(
    tokenizer: Tokenizer, sidecar: Sidecar, template: str | Sequence[Mapping[str, Any]] | None = None
) -> AVPrompt:
    """The AV prompt with the place of its marker.

    `template` replaces the sidecar's: a text with `{injection_char}` or `<INJECT>`, or chat messages with
    `<INJECT>` as they stand in a dataset. Raises PromptError unless the marker's id is there exactly once,
    between both of its neighbours.
    """
    ids = av_prompt_ids(tokenizer, sidecar, template)
    return AVPrompt(tuple(ids), find_marker(ids, sidecar))


def av_prompt_ids(
    tokenizer: Tokenizer, sidecar: Sidecar, template: str | Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Ids of the AV prompt, the marker not yet looked for; PromptError unless the text has it once."""
    messages = av_messages(sidecar, template)
    # The marker may be a special token of the tokenizer; everything else in the text is text.
    return tokenizer.encode_chat(messages, add_generation_prompt=True, keep_special=(sidecar.marker,))


def av_messages(sidecar: Sidecar, template: str | Sequence[Mapping[str, Any]] | None = None) -> list[Mapping[str, Any]]:
    """The chat that asks the AV, with the marker in its place; PromptError unless it is there once."""
    if template is None:
        template = sidecar.av_template
    if template is None:
        raise PromptError("the sidecar has no AV template (prompt_templates.av)", fix="the sidecar of the AV")
    if isinstance(template, str):
        text = sidecar.marker.join(template_parts(template, MARKER_FIELD)).replace(INJECT, sidecar.marker)
        messages: list[Mapping[str, Any]] = [{"role": "user", "content": text}]
    else:
        messages = [
            {k: v.replace(INJECT, sidecar.marker) if isinstance(v, str) else v for k, v in m.items()} for m in template
        ]
    found = sum(v.count(sidecar.marker) for m in messages for v in m.values() if isinstance(v, str))
    if found != 1:
        raise PromptError(
            "the AV template (prompt_templates.av)",
            expected=f"{MARKER_FIELD} or {INJECT} once, and the marker {sidecar.marker!r} nowhere else",
            got=f"{found} places in {_short(template)}",
            fix=f"putting {INJECT} where the vector goes" if not found else "removing the others from the text",
        )
    return messages


def find_marker(ids: Sequence[int], sidecar: Sidecar) -> int:
    """Index of the marker in prompt ids, by its id and both neighbours; PromptError unless it is there."""
    places = [i for i, token in enumerate(ids) if token == sidecar.marker_id]
    if len(places) != 1:
        fix = "the tokenizer that the AV was trained with, and tags around the marker"
        what = f"the marker {sidecar.marker!r} in the AV prompt (tokens.injection_token_id)"
        raise PromptError(what, expected=f"token {sidecar.marker_id} once", got=f"{len(places)} times", fix=fix)
    (i,) = places
    left = ids[i - 1] if i else None
    right = ids[i + 1] if i + 1 < len(ids) else None
    if (left, right) != (sidecar.left_id, sidecar.right_id):
        raise PromptError(
            f"the tokens beside the marker {sidecar.marker!r} in the AV prompt "
            "(tokens.injection_left_neighbor_id, tokens.injection_right_neighbor_id)",
            expected=f"{sidecar.left_id} and {sidecar.right_id}",
            got=f"{left} and {right}",
            fix="the marker inside the same tags as in the sidecar's template, and the AV's own tokenizer",
        )
    return i


def ar_prompt_ids(tokenizer: Tokenizer, sidecar: Sidecar, explanation: str) -> list[int]:
    """Ids of the AR prompt for an explanation, special tokens (BOS where the tokenizer adds it) included.

    The prediction is read at the last of them. Special-token strings inside the explanation are plain text.
    Raises PromptError when the ids do not end with the sidecar's suffix.
    """
    if sidecar.ar_template is None:
        raise PromptError("the sidecar has no AR template (prompt_templates.ar)", fix="the sidecar of the AR")
    if not isinstance(explanation, str):
        raise InputError("explanation", expected="a str", got=type(explanation).__name__)
    before, *after = template_parts(sidecar.ar_template, EXPLANATION_FIELD)
    if len(after) != 1:
        got = f"{len(after)} times in {_short(sidecar.ar_template)}"
        raise PromptError("the AR template (prompt_templates.ar)", expected=f"{EXPLANATION_FIELD} once", got=got)
    ids = tokenizer.encode_parts([(before, True), (explanation, False), (after[0], True)], add_special=True)
    suffix = sidecar.ar_suffix_ids
    if suffix is not None and tuple(ids[-len(suffix) :]) != suffix:
        fix = "the AR's own tokenizer and sidecar"
        raise PromptError(
            "the end of the AR prompt (tokens.critic_suffix_ids)",
            expected=list(suffix),
            got=ids[-len(suffix) :],
            fix=fix,
        )
    return ids


def parse_explanation(text: str, finished: bool) -> tuple[str, bool]:
    """(explanation, failed) of what the AV wrote: what stands between the first tag and its close, stripped.

    A text without the tags, or one that the length cap cut (`finished` is False), has failed and is returned
    as is: a cut sample that happens to parse must not pass, or training drifts to ever longer samples.
    """
    start = text.find(_OPEN)
    end = text.find(_CLOSE, start + len(_OPEN)) if start >= 0 else -1
    if not finished or end < 0:
        return text, True
    return text[start + len(_OPEN) : end].strip(), False


def wrap_explanation(text: str) -> str:
    """An explanation as the AV is trained to write it; the inverse of `parse_explanation`."""
    return f"{_OPEN}\n{text}\n{_CLOSE}"


def _short(template: object) -> str:
    text = template if isinstance(template, str) else repr(template)
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
