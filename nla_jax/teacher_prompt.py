"""What a teacher is asked, and what counts as an answer.

A prompt is an instruction with a text prefix in it, marked off so that nothing in the prefix can end the mark. A
reply is split into features; one with too few of them, or one that was cut or refused, is dropped for a named reason.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from nla_jax.errors import InputError

TEXT_FIELD = "{text}"
CONTEXT_CHARS = 4000  # about 1000 tokens: what is further back adds cost and hardly changes a description of the end
MIN_FEATURES = 2
MAX_WORDS = 150  # a warm start on longer ones would teach the AV to run into its length cap

# Why a row has no explanation although it was asked for.
REASONS = {
    "too_few": "fewer than two features",
    "too_long": "longer than --max-words",
    "length": "cut by --max-tokens",
    "refused": "the model refused",
    "empty": "empty reply",
    "tags": "explanation tags inside the text",
    "no_answer": "no reply after all retries; the next run asks these again",
}


@dataclass(frozen=True)
class Answer:
    """A reply as it came: its text, why it ended ("stop", "length" or "refused"), and what it cost in tokens."""

    text: str
    finish: str = "stop"
    input_tokens: int | None = None
    output_tokens: int | None = None
    endpoint: str = ""


@dataclass(frozen=True)
class Instruction:
    """The words around a text prefix: `before` and `after` it. `sha256` names them in what is written."""

    before: str
    after: str

    @property
    def text(self) -> str:
        return self.before + TEXT_FIELD + self.after

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_instruction(path: str | Path | None = None) -> Instruction:
    """The instruction of a file, or our own. The prefix goes where `{text}` stands, or to the end without it."""
    if path is None:
        text = resources.files("nla_jax").joinpath("instruction.txt").read_text("utf-8")
    else:
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            raise InputError(f"{path}: instruction", expected="UTF-8 text", fix="iconv -t UTF-8") from None
    text = text.replace("\r\n", "\n").strip()
    before, *after = text.split(TEXT_FIELD)
    if len(after) > 1:
        raise InputError(f"{path}: instruction", expected=f"{TEXT_FIELD} at most once", got=f"{len(after)} times")
    if not (before + "".join(after)).strip():
        raise InputError(f"{path}: instruction", expected="some text", got="none")
    return Instruction(before, after[0]) if after else Instruction(before + "\n\n", "")


def build_prompt(instruction: Instruction, prefix: str, context_chars: int = CONTEXT_CHARS) -> str:
    """The message for one prefix, of which the last `context_chars` characters are shown. Same input, same message.

    The marks carry a code made from the text itself, which the text can hardly contain; if it does, another is made.
    The text is therefore shown as it is, without escapes, and cannot close its own mark.
    """
    text = prefix[-context_chars:]
    code, n = "", 0
    while not code or code in text:
        code = hashlib.sha256(f"{n} {text}".encode("utf-8", "replace")).hexdigest()[:12]
        n += 1
    cut = " (its beginning is left out)" if len(prefix) > len(text) else ""
    # No line end is put before the closing mark: whether the text ends in one is part of what it says.
    shown = f"<<<text {code}{cut}>>>\n{text}<<<end of text {code}>>>"
    return f"{instruction.before}{shown}{instruction.after}"


_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_WRAPPED = re.compile(r"\s*<(explanation|features)>(.*?)(?:</\1>\s*|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"\A\s*```[a-z]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_BLANK = re.compile(r"\n[ \t]*\n\s*")
_BULLET = re.compile(
    r"\A(?:[-*\u2022\u2013]\s+|\(?\d{1,2}[.):]\s+|#{1,6}\s+|(?:feature|snippet)\s*\d{0,2}\s*[:.)-]\s*)+", re.IGNORECASE
)
_LABEL = re.compile(r"\A(?:\*\*|__)(.{1,60}?)(?:\*\*|__)")
_TAG = re.compile(r"</?explanation>", re.IGNORECASE)


def parse_features(text: str) -> list[str]:
    """The features in a reply, each on one line: paragraphs, or lines where there is but one paragraph.

    Wrapping tags, thoughts, code fences, list marks, bold marks and a line that only announces the features go."""
    text = _THINKING.sub("", text.replace("\r\n", "\n"))
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[2]
    if fenced := _FENCE.match(text):
        text = fenced[1]
    parts = [p for p in _BLANK.split(text.strip()) if p.strip()]
    if len(parts) > 1 and _announces(parts[0]):
        parts = parts[1:]
    if len(parts) == 1:
        parts = parts[0].splitlines()
        if len(parts) > 1 and _announces(parts[0]):
            parts = parts[1:]
    features = []
    for part in parts:
        part = " ".join(part.split())
        part = _BULLET.sub("", _LABEL.sub(r"\1", _BULLET.sub("", part))).strip()
        if len(re.findall(r"\w+", part)) >= 2:  # a rule or a stray mark is not a feature
            features.append(part)
    return features


def _announces(part: str) -> bool:
    return part.rstrip().endswith(":") and len(part) < 120


def read_explanation(answer: Answer | None, max_words: int = MAX_WORDS) -> tuple[str | None, str]:
    """(explanation, "ok"), features separated by an empty line; or (None, reason), a key of REASONS."""
    if answer is None:
        return None, "no_answer"
    if answer.finish != "stop":
        return None, answer.finish
    if not answer.text.strip():
        return None, "empty"
    features = parse_features(answer.text)
    if len(features) < MIN_FEATURES:
        return None, "too_few"
    text = "\n\n".join(features)
    if _TAG.search(text):
        return None, "tags"  # inside the AV's own tags they would end the explanation early
    if len(text.split()) > max_words:
        return None, "too_long"
    return text, "ok"
