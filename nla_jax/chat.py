"""Chat templates: where a tokenizer directory keeps them, and rendering them in a sandbox.

A chat template is a program that comes with a checkpoint. It runs here without access to Python's internals,
on a copy of the messages made of plain JSON values, with the names and filters that `transformers` gives it
(`transformers.utils.chat_template_utils` is what the output is compared with).
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nla_jax.errors import InputError, PromptError, TokenizerError

Message = Mapping[str, Any]

# A template may repeat a string, but not fill the memory of the machine with it.
_MAX_REPEAT = 10_000_000


def find_chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """A directory's template: from chat_template.jinja, chat_template.json, or tokenizer_config.json.

    `config` is the parsed tokenizer_config.json. Of several named templates the one called "default" is
    taken.
    """
    jinja_file, json_file = directory / "chat_template.jinja", directory / "chat_template.json"
    try:
        if jinja_file.is_file():
            return jinja_file.read_text(encoding="utf-8")
        found = config.get("chat_template")
        where = directory / "tokenizer_config.json"
        if json_file.is_file():
            where = json_file
            found = json.loads(json_file.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError) as e:
        raise TokenizerError(f"{directory}: unreadable chat template", got=e) from None
    if found is None or isinstance(found, str):
        return found
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        if isinstance(named.get("default"), str):
            return named["default"]
        raise TokenizerError(f"{where}: chat_template", expected='one named "default"', got=sorted(map(str, named)))
    raise TokenizerError(f"{where}: chat_template", expected="a string or a list", got=type(found).__name__)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A deep copy of chat messages, of JSON values only; keys that are None are left out, as transformers
    does.

    Raises InputError when the messages are not a non-empty list of mappings, each with a `role`.
    """
    shape = 'a list such as [{"role": "user", "content": "..."}]'
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InputError("chat messages", expected=shape, got=type(messages).__name__)
    if not messages:
        raise InputError("chat messages", expected=shape, got="an empty list")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(
                f"chat message {i}",
                expected="a mapping with a `role` and a `content`",
                got=repr(message)[:80],
            )
        out.append({k: _plain(v, f"chat message {i}, {k}") for k, v in message.items() if v is not None})
    return out


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, where) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, where) for v in value]
    raise InputError(where, expected="JSON values (text, numbers, lists, mappings)", got=type(value).__name__)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant wrote, which rendering passes through."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """A namespace without underscore names, through which a template could pose as another Python object."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # no named self: a template may call namespace(self=...)
        for name in dict(*args[1:], **kwargs):
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"the name {name!r} is not allowed in a namespace")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, stricter in two points: forbidden attributes raise at once, and `*` is bounded."""

    intercepted_binops = frozenset({"*", "**"})

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} is not allowed")

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (isinstance(right, int) and abs(right) <= 64):
            raise SecurityError("a power above 64 is not allowed")
        for value, times in ((left, right), (right, left)):
            if operator == "*" and isinstance(times, int) and hasattr(value, "__len__"):
                if len(value) * times > _MAX_REPEAT:
                    raise SecurityError(f"repeating a value {times} times is not allowed")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change the tokens.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


class ChatTemplate:
    """One chat template; `variables` are the tokenizer's named special tokens (`bos_token` and so on).

    The text is compiled on first use, so that a tokenizer with a broken template still encodes plain text.
    """

    def __init__(self, text: str, variables: Mapping[str, Any], source: str):
        self.text, self.source = text, source
        self._variables = dict(variables)

    @cached_property
    def _compiled(self) -> jinja2.Template:
        env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        env.filters["tojson"] = _tojson
        env.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
        try:
            return env.from_string(self.text)
        except (jinja2.TemplateError, RecursionError) as e:
            fix = "a chat_template.jinja from the base model"
            raise TokenizerError(f"{self.source}: the chat template does not compile", got=e, fix=fix) from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        today: datetime.date | None = None,
    ) -> str:
        """The prompt text; PromptError if the template rejects the messages or reaches out of the sandbox.

        `today` is the date that a template which writes one is given, instead of the machine's.
        """
        values: dict[str, Any] = {
            **self._variables,
            "messages": plain_messages(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if today is not None:
            moment = datetime.datetime.combine(today, datetime.time())
            values["strftime_now"] = moment.strftime
        template = self._compiled
        try:
            return template.render(values)
        except SecurityError as e:
            fix = "a chat_template.jinja that you trust"
            raise PromptError(f"{self.source}: the chat template left its sandbox", got=e, fix=fix) from None
        except Exception as e:  # the template's own code fails in whatever way it was written to
            got = f"{type(e).__name__}: {e}"
            fix = "messages that this model's template accepts"
            raise PromptError(f"{self.source}: the chat template failed on these messages", got=got, fix=fix) from None


@dataclass(frozen=True)
class ChatTokens:
    """A rendered chat: `text`; `ids` and `offsets` (characters of the text, per token); and `spans`, the parts of
    the text [start, end) that are the content of message `i`. What lies outside of them is the template's."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    spans: list[tuple[int, int, int]]


def content_spans(
    messages: Sequence[Message],
    text: str,
    render: Callable[[list[dict[str, Any]]], str],
    fresh: Callable[[], str],
) -> list[tuple[int, int, int]]:
    """Where a rendered chat `text` shows the contents of its messages: (start, end, index of the message).

    The chat is rendered again with a private character (one `fresh()` each) at both ends of every content, inside
    its outer white space, which templates like to strip. Where a template looks into its messages in a way that this
    disturbs, the contents are looked for in the text instead, one after another.
    """
    marks: dict[str, int] = {}
    marked: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        core = content.strip() if isinstance(content, str) else ""
        if not core:
            marked.append(dict(message))
            continue
        assert isinstance(content, str)
        mark = fresh()
        marks[mark] = i
        start = len(content) - len(content.lstrip())
        marked.append({**message, "content": f"{content[:start]}{mark}{core}{mark}{content[start + len(core) :]}"})
    if not marks:
        return []
    try:
        found = _between_marks(render(marked), marks)
    except PromptError:
        found = None
    if found is not None and found[0] == text:
        return found[1]
    return _searched(messages, text)


def _between_marks(text: str, marks: Mapping[str, int]) -> tuple[str, list[tuple[int, int, int]]] | None:
    """The text without its marks, and the spans between pairs of them; None if they do not come in pairs."""
    parts = re.split(f"([{''.join(marks)}])", text)
    spans = []
    at, begun = 0, None
    for part in parts:
        if part not in marks:
            at += len(part)
        elif begun is None:
            begun = (part, at)
        elif begun[0] == part:
            spans.append((begun[1], at, marks[part]))
            begun = None
        else:
            return None
    return None if begun is not None else ("".join(p for p in parts if p not in marks), spans)


def _searched(messages: Sequence[Message], text: str) -> list[tuple[int, int, int]]:
    spans = []
    at = 0
    for i, message in enumerate(messages):
        content = message.get("content")
        core = content.strip() if isinstance(content, str) else ""
        # Templates of reasoning models leave out what an earlier answer thought.
        for shown in dict.fromkeys((core, core.rpartition("</think>")[2].strip())):
            start = text.find(shown, at) if shown else -1
            if start >= 0:
                at = start + len(shown)
                spans.append((start, at, i))
                break
    return spans
