"""SentencePiece models (tokenizer.model) as a tokenizer backend that gives the ids of the same model's
tokenizer.json.

Two things are done differently from the bare library. The space that SentencePiece puts before a text is put
here, because `transformers` puts it only where the text does not begin with one, and only before the first
piece of a text that special tokens cut into several. And special tokens that the model file declares as
user-defined symbols (Gemma does) are made control symbols, because the library would otherwise find them in
any text that spells them out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from nla_jax.errors import TokenizerError

Offsets = list[tuple[int, int]]
_SPACE = "\u2581"  # how a vocabulary spells a space


def longest_first(strings: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern that finds any of the strings, the longest where several begin; None when there are none."""
    ordered = sorted((s for s in strings if s), key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


class SentencePieceBackend:
    """`added` maps the token strings that tokenizer_config.json declares to (id, special)."""

    kind = "sentencepiece"

    def __init__(self, path: Path, config: Mapping[str, Any], added: Mapping[str, tuple[int, bool]]):
        model = _read_model(path)
        kinds = model.SentencePiece  # the enum of piece types
        flagged = {content for content, (_, special) in added.items() if special}
        self.special: dict[str, int] = {}
        for i, piece in enumerate(model.pieces):
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN):
                self.special[piece.piece] = i
            elif piece.type == kinds.USER_DEFINED and piece.piece in flagged:
                piece.type = kinds.CONTROL
                self.special[piece.piece] = i
        prefix = model.normalizer_spec.add_dummy_prefix
        if isinstance(config.get("add_prefix_space"), bool):
            prefix = config["add_prefix_space"]
        self._prefix = ("always" if config.get("legacy") is True else "first") if prefix else "never"
        model.normalizer_spec.add_dummy_prefix = False
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except Exception as e:
            raise TokenizerError(f"{path}: not a usable SentencePiece model", got=e) from None

        n = self._sp.get_piece_size()
        self._vocab = {p.piece: i for i, p in enumerate(model.pieces)}
        self._extra: dict[str, int] = {}  # tokens that are not special but cut a text all the same
        for content, (i, special) in added.items():
            if i < n:
                if model.pieces[i].piece != content:
                    raise TokenizerError(
                        f"{path}: token {i}",
                        expected=f"{content!r} (tokenizer_config.json)",
                        got=repr(model.pieces[i].piece),
                    )
                if special:
                    self.special[content] = i
                elif self._prefix != "never":
                    self._extra[content] = i  # cut out, so that the added space is not put before it
            else:
                self._vocab[content] = i
                (self.special if special else self._extra)[content] = i
        self._names = {i: content for content, i in self._vocab.items()}
        self._parse_re = longest_first([*self.special, *self._extra])
        self._plain_re = longest_first(self._extra)
        self.prefix_ids: list[int] = []
        self.suffix_ids: list[int] = []
        self.defaults = {
            "bos_token": self._name_of(self._sp.bos_id()),
            "eos_token": self._name_of(self._sp.eos_id()),
            "unk_token": self._name_of(self._sp.unk_id()),
            "pad_token": self._name_of(self._sp.pad_id()),
        }

    def _name_of(self, i: int) -> str | None:
        return self._names.get(i) if i >= 0 else None

    def vocab(self) -> dict[str, int]:
        return dict(self._vocab)

    def encode(self, text: str, parse: bool) -> list[int]:
        ids: list[int] = []
        for piece, start in self._split(text, self._parse_re if parse else self._plain_re):
            ids += [piece] if isinstance(piece, int) else self._sp.encode(self._spaced(piece, start))
        return ids

    def offsets(self, text: str, parse: bool) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        for piece, start in self._split(text, self._parse_re if parse else self._plain_re):
            if isinstance(piece, int):
                ids.append(piece)
                offsets.append((start, start + len(self._names[piece])))
                continue
            spaced = self._spaced(piece, start)
            shift = start - (len(spaced) - len(piece))
            new = self._sp.encode(spaced)
            ids += new
            # A token that is only the added space gets the first character, as the tokenizers library gives
            # it.
            offsets += [(max(a + shift, start), max(b + shift, start + 1)) for a, b in self._align(spaced, new)]
        return ids, offsets

    def encode_pieces(self, pieces: Sequence[str | int]) -> list[int]:
        return self.offsets_pieces(pieces)[0]

    def offsets_pieces(self, pieces: Sequence[str | int]) -> tuple[list[int], Offsets]:
        ids: list[int] = []
        offsets: Offsets = []
        start = 0  # as a special token counts for one character where the space before a text is decided ...
        shown = 0  # ... and for its string in the offsets
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
                offsets.append((shown, shown + len(self._names[piece])))
                start, shown = start + 1, shown + len(self._names[piece])
                continue
            for part, at in self._split(piece, self._plain_re):
                if isinstance(part, int):
                    ids.append(part)
                    offsets.append((shown + at, shown + at + len(self._names[part])))
                    continue
                spaced = self._spaced(part, start + at)
                first = shown + at
                shift = first - (len(spaced) - len(part))
                new = self._sp.encode(spaced)
                ids += new
                offsets += [(max(a + shift, first), max(b + shift, first + 1)) for a, b in self._align(spaced, new)]
            start, shown = start + len(piece), shown + len(piece)
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        text = "".join(self._surfaces(ids))
        return text[1:] if self._prefix != "never" and text.startswith(" ") else text

    def token_str(self, i: int) -> str:
        return "".join(self._surfaces([i]))

    def token_to_id(self, token: str) -> int | None:
        return self._vocab.get(token)

    def has(self, i: int) -> bool:
        return i in self._names

    def _split(self, text: str, pattern: re.Pattern[str] | None) -> list[tuple[str | int, int]]:
        """Plain stretches (none empty) and token ids in order, each with the character it starts at."""
        out: list[tuple[str | int, int]] = []
        at = 0
        for match in pattern.finditer(text) if pattern else ():
            if match.start() > at:
                out.append((text[at : match.start()], at))
            out.append((self._vocab[match[0]], match.start()))
            at = match.end()
        if at < len(text):
            out.append((text[at:], at))
        return out

    def _spaced(self, text: str, start: int) -> str:
        wanted = self._prefix == "always" or (self._prefix == "first" and start == 0)
        return " " + text if wanted and not text.startswith((" ", _SPACE)) else text

    def _align(self, text: str, ids: list[int]) -> Offsets:
        """Character ranges of the pieces of one stretch; the bytes of a character all get its range."""
        out: Offsets = []
        pieces = self._sp.encode(text, out_type=str)  # unlike id_to_piece, this spells out unknown characters
        at = n_bytes = 0
        for piece, i in zip(pieces, ids, strict=True):
            if self._sp.is_byte(i):
                out.append((at, at + 1))
                n_bytes += 1
                if n_bytes == len(text[at : at + 1].encode()):
                    at, n_bytes = at + 1, 0
            else:
                out.append((at, at + len(piece)))
                at += len(piece)
        if at != len(text):
            raise TokenizerError("SentencePiece pieces do not cover the text", expected=len(text), got=at)
        return out

    def _surfaces(self, ids: Iterable[int]) -> list[str]:
        out: list[str] = []
        run = bytearray()
        n = self._sp.get_piece_size()
        for i in [*ids, -1]:
            if 0 <= i < n and self._sp.is_byte(i):
                run.append(int(self._names[i][1:-1], 16))
                continue
            if run:
                try:
                    out.append(run.decode())
                except UnicodeDecodeError:  # one mark per byte, as the tokenizers library does
                    out.append("\ufffd" * len(run))
                run.clear()
            if i >= 0:
                name = self._names[i]
                out.append(name if name in self.special or name in self._extra else name.replace(_SPACE, " "))
        return out


def _read_model(path: Path) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2 as proto
    except ImportError as e:
        fix = "pip install protobuf, or a directory with tokenizer.json"
        raise TokenizerError(f"{path}: SentencePiece models need protobuf", got=e, fix=fix) from None
    model: Any = getattr(proto, "ModelProto")()  # noqa: B009 (made at run time, unknown to type checkers)
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as e:
        raise TokenizerError(f"{path}: not a SentencePiece model", got=e, fix="downloading it again") from None
    if not model.pieces:
        raise TokenizerError(f"{path}: not a SentencePiece model", got="no pieces", fix="downloading it again")
    spec = model.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        raise TokenizerError(
            f"{path}: normalizer",
            expected="the identity",
            got=spec.name or "a custom one",
            fix="a tokenizer.json",
        )
    return model
