"""The two HTTP APIs that teachers speak: how a prompt is put, and what a reply says.

`openai:MODEL` is the chat completions API, which local servers speak too; `anthropic:MODEL` is the messages API.
`lexical` and `file:PATH` need no model; they are in lexical.py and teacher_file.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from nla_jax.endpoint import MalformedError, check_url, is_local, parsed
from nla_jax.errors import InputError, TeacherError
from nla_jax.teacher_prompt import Answer

LEXICAL = "lexical"
MAX_TOKENS = 400  # of a reply: 100 words are about 130
_ANTHROPIC_VERSION = "2023-06-01"
_OPENAI_URL = "https://api.openai.com/v1"
_ANTHROPIC_URL = "https://api.anthropic.com"


@dataclass(frozen=True)
class Provider:
    """A model behind an HTTP API. `key` (None: no key is sent) is shown by no repr and written to no file."""

    name: str  # "openai" or "anthropic"
    model: str
    url: str
    max_tokens: int
    temperature: float | None  # None: the provider's own; some models accept no other
    key_env: str
    key: str | None = field(default=None, repr=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What shapes an answer beside model and prompt. The address is not part of it: a model answers as itself."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature}

    @property
    def path(self) -> str:
        return "chat/completions" if self.name == "openai" else "v1/messages"

    @property
    def headers(self) -> dict[str, str]:
        if self.name == "openai":
            return {"Authorization": f"Bearer {self.key}"} if self.key else {}
        key = {"x-api-key": self.key} if self.key else {}
        return {"anthropic-version": _ANTHROPIC_VERSION, **key}

    def body(self, prompt: str) -> dict[str, Any]:
        """The request for one prompt: a single user message, since not every local chat template has a system role."""
        body: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": prompt}]}
        # OpenAI's newer models reject max_tokens; other servers may not know its successor.
        own = self.name == "openai" and urlsplit(self.url).hostname == urlsplit(_OPENAI_URL).hostname
        body["max_completion_tokens" if own else "max_tokens"] = self.max_tokens
        if self.temperature is not None:
            body["temperature"] = self.temperature
        return body

    def read(self, content: bytes) -> Answer:
        """The answer in the body of a reply; MalformedError where there is none."""
        return self.read_message(parsed(content))

    def read_message(self, value: Any) -> Answer:
        """The answer in a reply's JSON (for Anthropic's batches, in the `message` of a result)."""
        try:
            return self._read_openai(value) if self.name == "openai" else self._read_anthropic(value)
        except (KeyError, IndexError, TypeError, AttributeError):
            keys = ", ".join(map(str, value))[:80] if isinstance(value, dict) else type(value).__name__
            raise MalformedError(f"a reply without an answer in it ({keys})") from None

    def _read_openai(self, value: Any) -> Answer:
        choice = value["choices"][0]
        message, why = choice["message"], choice.get("finish_reason")
        text = message.get("content") or ""
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text)
        if message.get("refusal") or why == "content_filter":
            finish = "refused"
        else:
            finish = "length" if why == "length" else "stop"
        usage = value.get("usage") or {}
        return self._answer(text, finish, usage.get("prompt_tokens"), usage.get("completion_tokens"))

    def _read_anthropic(self, value: Any) -> Answer:
        text = "".join(part["text"] for part in value["content"] if part["type"] == "text")
        why = value["stop_reason"]
        finish = {"refusal": "refused", "max_tokens": "length", "model_context_window_exceeded": "length"}.get(
            why, "stop"
        )
        usage = value.get("usage") or {}
        return self._answer(text, finish, usage.get("input_tokens"), usage.get("output_tokens"))

    def _answer(self, text: Any, finish: str, tokens_in: Any, tokens_out: Any) -> Answer:
        if not isinstance(text, str):
            raise TypeError
        count = [n if isinstance(n, int) else None for n in (tokens_in, tokens_out)]
        return Answer(text, finish, count[0], count[1], self.url)


def open_provider(
    teacher: str,
    *,
    base_url: str | None = None,
    key_env: str | None = None,
    max_tokens: int = MAX_TOKENS,
    temperature: float | None = None,
    environ: Mapping[str, str] = os.environ,
    need_key: bool = True,
) -> Provider:
    """The provider of a spec such as "openai:gpt-4.1-mini"; InputError for another spec, TeacherError without a key.

    The key comes from the environment alone. The provider's own address needs one; elsewhere it is sent when it is
    set, but never in the clear to another network.
    """
    name, colon, model = teacher.partition(":")
    if name not in ("openai", "anthropic") or not model.strip():
        raise InputError(f"teacher {teacher!r}", expected="openai:MODEL, anthropic:MODEL or lexical, or file:PATH")
    own = _OPENAI_URL if name == "openai" else _ANTHROPIC_URL
    url = check_url(base_url or own)
    if name == "anthropic":
        url = url.removesuffix("/v1")  # the path of a request has it
    variable = key_env or ("OPENAI_API_KEY" if name == "openai" else "ANTHROPIC_API_KEY")
    key = environ.get(variable, "").strip() or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise TeacherError(f"{variable} is not a key", expected="printable ASCII characters")
    if key is None and (url == own or key_env) and need_key:
        raise TeacherError(
            f"{variable} is not set",
            expected=f"a key for {url}",
            fix=f"export {variable}=..., or --base-url of a server that needs none",
        )
    if urlsplit(url).scheme == "http" and not is_local(url):
        key = None
    return Provider(name, model.strip(), url, max_tokens, temperature, variable, key)
