"""Tokenizers of the supported checkpoints: text to ids and back, and chat prompts.

Both kinds of tokenizer file are read: `tokenizer.json` through the `tokenizers` library, and a SentencePiece
`tokenizer.model` (see spm.py) where there is no other. Nothing here changes after loading: encoding is a pure
function.

A special token's string that stands in somebody's text (a corpus that quotes a chat log, a user who types
`<|im_end|>`) is plain text. It becomes the special token only with `parse_special`, or when a chat template
wrote it.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from nla_jax.chat import ChatTemplate, ChatTokens, Message, content_spans, find_chat_template, plain_messages
from nla_jax.errors import InputError, PromptError, TokenizerError
from nla_jax.spm import Offsets, SentencePieceBackend, longest_first

_SENTENCEPIECE_FILES = ("tokenizer.model", "tokenizer.model.v3")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Leading space, runs of spaces, line ends, digits, contractions, composed and decomposed accents, CJK, emoji,
# bytes.
_PROBE = " It's 2024,  and\n\n\tnaïve cafe\u0301s don't cost 12345 yen: 日本語 ㈎ 🙂\u200d\u0007 <b>x</b>  "
_PRIVATE = range(0xF0000, 0xFFFFE)  # private-use characters, which stand for hidden strings


class Backend(Protocol):
    """What a tokenizer file format must offer. Ids passed in exist; texts hold no lone surrogates."""

    kind: str
    special: dict[str, int]  # strings of the tokens that are flagged special
    prefix_ids: list[int]  # what the file's own post-processor puts before a text
    suffix_ids: list[int]
    defaults: dict[str, str | None]  # bos_token and so on where tokenizer_config.json does not name them

    def vocab(self) -> dict[str, int]: ...
    def encode(self, text: str, parse: bool) -> list[int]: ...
    def offsets(self, text: str, parse: bool) -> tuple[list[int], Offsets]: ...
    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]: ...
    def offsets_pieces(self, pieces: Sequence[str | int]) -> tuple[list[int], Offsets]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_str(self, i: int) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def has(self, i: int) -> bool: ...


class JsonBackend:
    """tokenizer.json. `added`: strings of tokenizer_config.json -> (id, special); `named`: special."""

    kind = "tokenizers"

    def __init__(self, path: Path, added: Mapping[str, tuple[int, bool]], named: Collection[str]):
        try:
            parsing = tokenizers.Tokenizer.from_file(str(path))
        except Exception as e:  # the library raises a bare Exception
            raise TokenizerError(f"{path}: not a usable tokenizer.json", got=e, fix="downloading it again") from None
        parsing.no_truncation()  # a length saved with the file would cut texts silently
        parsing.no_padding()
        known = {t.content for t in parsing.get_added_tokens_decoder().values()}
        for content, (i, special) in sorted(added.items(), key=lambda item: item[1]):
            if content not in known:
                parsing.add_tokens([tokenizers.AddedToken(content, special=special, normalized=False)])
                if parsing.token_to_id(content) != i:
                    got = parsing.token_to_id(content)
                    raise TokenizerError(f"{path}: {content!r}", expected=f"{i} (tokenizer_config.json)", got=got)
                known.add(content)
        present = [c for c in named if c not in known and parsing.token_to_id(c) is not None]
        parsing.add_special_tokens([tokenizers.AddedToken(c, normalized=False) for c in present])

        tokens = parsing.get_added_tokens_decoder()
        self.special = {t.content: i for i, t in tokens.items() if t.special}
        self._added = frozenset(tokens)
        self._parsing = parsing
        self.defaults: dict[str, str | None] = {}
        # Whether special strings are parsed is a switch on the library's object; two objects keep encoding
        # pure.
        self._plain = tokenizers.Tokenizer.from_str(parsing.to_str())
        self._plain.encode_special_tokens = True
        # In the plain object a stand-in marks where a special token goes, so that the text on both sides is
        # treated exactly as beside a special token. Stand-ins are not special, hence found; one per stripping
        # behaviour.
        self._stand_in: dict[int, str] = {}
        for i, t in tokens.items():
            if t.special:
                self._stand_in[i] = f"\U0010fffd{'l' if t.lstrip else ''}{'r' if t.rstrip else ''}\U0010fffc"
                self._plain.add_tokens(
                    [tokenizers.AddedToken(self._stand_in[i], lstrip=t.lstrip, rstrip=t.rstrip, normalized=False)]
                )
        self._stand_in_ids = {self._plain.token_to_id(s) for s in self._stand_in.values()}

        bare = parsing.encode("a", add_special_tokens=False).ids
        full = parsing.encode("a").ids
        at = next((k for k in range(len(full)) if full[k : k + len(bare)] == bare), 0) if bare else 0
        self.prefix_ids, self.suffix_ids = full[:at], full[at + len(bare) :]

    def vocab(self) -> dict[str, int]:
        return self._parsing.get_vocab(with_added_tokens=True)

    def encode(self, text: str, parse: bool) -> list[int]:
        return (self._parsing if parse else self._plain).encode(text, add_special_tokens=False).ids

    def offsets(self, text: str, parse: bool) -> tuple[list[int], Offsets]:
        encoding = (self._parsing if parse else self._plain).encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        return self.offsets_pieces(pieces)[0]

    def offsets_pieces(self, pieces: Sequence[str | int]) -> tuple[list[int], Offsets]:
        written = [self._stand_in[p] if isinstance(p, int) else p for p in pieces]
        specials = [p for p in pieces if isinstance(p, int)]
        encoding = self._plain.encode("".join(written), add_special_tokens=False)
        if sum(i in self._stand_in_ids for i in encoding.ids) != len(specials):
            raise InputError("the text holds the characters U+10FFFD and U+10FFFC together", fix="removing them")
        queue = iter(specials)
        names = {i: content for content, i in self.special.items()}
        ids = [next(queue) if i in self._stand_in_ids else i for i in encoding.ids]
        # Where each character of the text with stand-ins is in the text with the special strings themselves.
        place: list[int] = []
        at = 0
        for piece, text in zip(pieces, written, strict=True):
            if isinstance(piece, int):
                place += [at] * len(text)
                at += len(names[piece])
            else:
                place += range(at, at + len(text))
                at += len(text)
        place.append(at)
        return ids, [(place[a], place[b]) for a, b in encoding.offsets]

    def decode(self, ids: Sequence[int]) -> str:
        return self._parsing.decode(list(ids), skip_special_tokens=False)

    def token_str(self, i: int) -> str:
        piece = self._parsing.id_to_token(i) or ""
        if i in self._added:
            return piece
        if "\u2581" in piece:  # a SentencePiece-like vocabulary, whose decoder drops the leading space
            return piece.replace("\u2581", " ")
        return " " if piece == "<0x20>" else self._parsing.decode([i], skip_special_tokens=False)

    def token_to_id(self, token: str) -> int | None:
        return self._parsing.token_to_id(token)

    def has(self, i: int) -> bool:
        return self._parsing.id_to_token(i) is not None


class Tokenizer:
    """One tokenizer directory. Make it with `Tokenizer.from_dir`.

    Attributes: `vocab_size` (ids the tokenizer knows: highest + 1; a model's embedding may have more rows),
    `bos_id`, `eos_id`, `pad_id`, `unk_id` (int or None), `special_ids`, `special_tokens` (name -> string, as
    chat templates see them), `chat_template` (its text or None), `kind` ("tokenizers" or "sentencepiece"),
    `source`.
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any], template: str | None, source: str):
        self._backend, self.source, self.kind, self.chat_template = backend, source, backend.kind, template
        self.special_tokens: dict[str, Any] = {k: v for k, v in backend.defaults.items() if v is not None}
        self.special_tokens.update(_named_tokens(config))
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = map(self._named_id, _NAMES[:4])
        named = {self.bos_id, self.eos_id, self.pad_id} - {None}
        self.special_ids: frozenset[int] = frozenset(backend.special.values()) | frozenset(named)  # type: ignore[arg-type]
        self.vocab_size = max(backend.vocab().values()) + 1
        self._prefix, self._suffix = list(backend.prefix_ids), list(backend.suffix_ids)
        self.declared_bos = config.get("add_bos_token")
        if backend.kind == "sentencepiece":
            # The model file says nothing of this; the families that use it add BOS unless told otherwise. A
            # tokenizer.json does say it, in its post-processor, and then add_bos_token counts for nothing: so
            # does transformers 5 decide.
            add_bos, add_eos = self.declared_bos is not False, config.get("add_eos_token") is True
            self._prefix = [self.bos_id] if add_bos and self.bos_id is not None else []
            self._suffix = [self.eos_id] if add_eos and self.eos_id is not None else []
        self.adds_bos = self.bos_id is not None and self.bos_id in self._prefix
        self._special_re = longest_first(backend.special)
        self._template = ChatTemplate(template, self.special_tokens, source) if template is not None else None

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json if there is one, else tokenizer.model; raises TokenizerError in one line."""
        path = Path(path)
        if not path.is_dir():
            raise TokenizerError(f"{path}", expected="a directory with tokenizer files", got="no such directory")
        config = {
            **_read_json(path / "special_tokens_map.json"),
            **_read_json(path / "tokenizer_config.json"),
        }
        added = _declared_tokens(path, config)
        model = next((path / name for name in _SENTENCEPIECE_FILES if (path / name).is_file()), None)
        backend: Backend
        if (path / "tokenizer.json").is_file():
            named = [t for v in _named_tokens(config).values() for t in (v if isinstance(v, list) else [v])]
            backend = JsonBackend(path / "tokenizer.json", added, named)
        elif model is not None:
            backend = SentencePieceBackend(model, config, added)
        else:
            names = " or ".join(("tokenizer.json", *_SENTENCEPIECE_FILES))
            fix = "copying the tokenizer files of the base model here"
            raise TokenizerError(f"{path}: no tokenizer", expected=names, got="neither", fix=fix)
        return cls(backend, config, find_chat_template(path, config), str(path))

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        found = self._backend.token_to_id(token)
        if found is None and name in ("bos_token", "eos_token"):
            raise TokenizerError(f"{self.source}: {name}", expected="a token of the vocabulary", got=repr(token))
        return found

    def __repr__(self) -> str:
        return f"Tokenizer({self.source!r}, kind={self.kind!r}, vocab_size={self.vocab_size})"

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 that two directories share if they hold the same tokenizer, in whatever file format.

        It covers the vocabulary with added tokens (token -> id) and the ids of a probe text, which sees
        merges, normalisation and splitting. Chat templates and the choice of BOS, EOS and padding are not
        part of it.
        """
        content = [sorted(self._backend.vocab().items()), self._backend.encode(_PROBE, False)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids; `add_special` adds what the tokenizer adds to texts (Llama, Gemma: BOS; Qwen: nothing)."""
        return self._wrap(self._backend.encode(_checked(text), parse_special), add_special)

    def encode_with_offsets(
        self, text: str, *, add_special: bool = False, parse_special: bool = False
    ) -> tuple[list[int], Offsets]:
        """Token ids, and for each the characters [start, end) of `text` it stands for; (0, 0) for BOS and
        EOS.

        Tokens that are parts of one character all get its range.
        """
        ids, offsets = self._backend.offsets(_checked(text), parse_special)
        if add_special:
            offsets = [(0, 0)] * len(self._prefix) + offsets + [(0, 0)] * len(self._suffix)
        return self._wrap(ids, add_special), offsets

    def encode_parts(self, parts: Sequence[tuple[str, bool]], *, add_special: bool = False) -> list[int]:
        """Ids of the parts joined to one text; special strings count as tokens only in parts marked True.

        For prompts that put somebody's text into a template: BPE merges across the seams as in the joined
        text.
        """
        hidden = _Hidden(self._special_re, [t for t, _ in parts])
        text = "".join(t if trusted else hidden.hide(t) for t, trusted in parts)
        return self._wrap(self._encode_hidden(_checked(text), hidden)[0], add_special)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of the ids. Ids outside the vocabulary (padded embedding rows) are dropped."""
        known = [int(i) for i in ids if 0 <= int(i) < self.vocab_size and self._backend.has(int(i))]
        return self._backend.decode([i for i in known if not (skip_special and i in self.special_ids)])

    def token_str(self, i: int) -> str:
        """One token for display, leading space kept; U+FFFD for part of a character, "" if unknown."""
        i = int(i)
        return self._backend.token_str(i) if 0 <= i < self.vocab_size and self._backend.has(i) else ""

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """Chat messages as the template writes them; PromptError if it rejects them or there is none."""
        return self._chat_template().render(messages, add_generation_prompt=add_generation_prompt)

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            fix = "the instruct model's tokenizer, or its chat_template.jinja copied into the directory"
            raise PromptError(f"{self.source}: the tokenizer has no chat template", fix=fix)
        return self._template

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        keep_special: Collection[str] = (),
    ) -> list[int]:
        """Ids of a rendered chat. Nothing is added to it: BOS is there if the template wrote it.

        Special strings inside the messages are plain text, but for those in `keep_special`.
        """
        plain = plain_messages(messages)
        hidden = _Hidden(self._special_re, list(_strings(plain)), keep_special)
        text = self.render_chat(hidden.hide_all(plain), add_generation_prompt=add_generation_prompt)
        return self._one_bos(self._encode_hidden(_checked(text), hidden)[0])

    def encode_chat_with_spans(self, messages: Sequence[Message], *, today: datetime.date) -> ChatTokens:
        """The ids of `encode_chat`, where each stands in the rendered text, and whose words that text is.

        `today` is what a template that writes the date is given.
        """
        template = self._chat_template()
        plain = plain_messages(messages)
        hidden = _Hidden(self._special_re, list(_strings(plain)))
        masked = hidden.hide_all(plain)
        text = _checked(template.render(masked, today=today))
        ids, offsets = self._encode_hidden(text, hidden)
        spans = content_spans(masked, text, lambda marked: template.render(marked, today=today), hidden.fresh)
        place = hidden.places(text)
        shown = [(place[a], place[b], i) for a, b, i in spans]
        return ChatTokens(hidden.show(text), self._one_bos(ids), offsets, shown)

    def _one_bos(self, ids: list[int]) -> list[int]:
        if self.bos_id is not None and ids[:2] == [self.bos_id] * 2:
            raise PromptError(f"{self.source}: the chat template writes BOS twice", fix="the base model's template")
        return ids

    def _wrap(self, ids: list[int], add_special: bool) -> list[int]:
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def _encode_hidden(self, text: str, hidden: _Hidden) -> tuple[list[int], Offsets]:
        """Ids, and the characters [start, end) of `hidden.show(text)` that each stands for."""
        if not hidden.names:
            return self._backend.offsets(text, True)
        assert self._special_re is not None  # it found what was hidden
        pieces: list[str | int] = []
        at = 0
        for match in self._special_re.finditer(text):
            pieces += [hidden.show(text[at : match.start()]), self._backend.special[match[0]]]
            at = match.end()
        pieces.append(hidden.show(text[at:]))
        return self._backend.offsets_pieces([p for p in pieces if p != ""])


class _Hidden:
    """Special strings in untrusted text, each replaced by a private character while rendering."""

    def __init__(self, special: re.Pattern[str] | None, texts: Sequence[str], keep: Collection[str] = ()):
        self._special, self._keep = special, keep
        self.names: dict[str, str] = {}  # hidden string -> its character
        self._used = set().union(*texts) if any(0xF0000 <= ord(max(t, default=" ")) for t in texts) else set()
        self._free = (c for c in map(chr, _PRIVATE) if c not in self._used)

    def hide(self, text: str) -> str:
        return self._special.sub(self._character, text) if self._special else text

    def _character(self, match: re.Match[str]) -> str:
        if match[0] in self._keep:
            return match[0]
        if match[0] not in self.names:
            self.names[match[0]] = self.fresh()
        return self.names[match[0]]

    def fresh(self) -> str:
        """A private character that no text holds and nothing else stands for."""
        return next(self._free)

    def hide_all(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, dict):
            return {k: self.hide_all(v) for k, v in value.items()}
        return [self.hide_all(v) for v in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        for name, character in self.names.items():
            text = text.replace(character, name)
        return text

    def places(self, text: str) -> Sequence[int]:
        """For every index into `text`, and its length, the index into `show(text)`."""
        if not self.names:
            return range(len(text) + 1)
        longer = {character: len(name) for name, character in self.names.items()}
        return [0, *itertools.accumulate(longer.get(c, 1) for c in text)]


def _strings(value: Any) -> Sequence[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [s for v in inner for s in _strings(v)]


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise InputError("text to tokenize", expected="a str", got=type(text).__name__)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        got = f"the lone surrogate U+{ord(text[e.start]):04X} at character {e.start}"
        fix = 'text.encode("utf-8", "replace").decode()'
        raise InputError("text to tokenize", expected="valid Unicode", got=got, fix=fix) from None
    return text


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise TokenizerError(f"{path}: not readable as JSON", got=e, fix="downloading it again") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}", expected="a JSON object", got=type(value).__name__)
    return value


def _content(token: Any) -> str | None:
    """A special token is written as a string, or as a mapping that has it under `content`."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """The named special tokens that are set: strings, and for the lists of further ones lists of strings."""
    out: dict[str, Any] = {name: _content(config.get(name)) for name in _NAMES}
    for name in _LISTS:
        if isinstance(config.get(name), list):
            out[name] = [c for c in map(_content, config[name]) if c is not None]
    return {name: value for name, value in out.items() if value}


def _declared_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, bool]]:
    """String -> (id, special) of added_tokens.json and of tokenizer_config.json's added_tokens_decoder."""
    where = path / "tokenizer_config.json"
    out: dict[str, tuple[int, bool]] = {}
    try:
        for content, i in _read_json(path / "added_tokens.json").items():
            out[content] = (int(i), False)
        for key, token in (config.get("added_tokens_decoder") or {}).items():
            out[str(_content(token))] = (int(key), bool(isinstance(token, Mapping) and token.get("special")))
    except (AttributeError, TypeError, ValueError) as e:
        raise TokenizerError(f"{where}: added tokens", expected="ids and their tokens", got=e) from None
    return out
