"""Values of a run config against the fields of a settings dataclass: types, choices, and text from a command line."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from nla_jax.errors import InputError


class Frozen(Mapping[str, Any]):
    """A dictionary of what JSON can hold, hashable and unchangeable: every look-up gives a fresh copy."""

    def __init__(self, items: Mapping[str, Any], name: str):
        try:
            self._json = json.dumps(plain(items), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(name, expected="only what JSON can hold", got=str(error)) from None

    def __getitem__(self, key: str) -> Any:
        return json.loads(self._json)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(json.loads(self._json))

    def __len__(self) -> int:
        return len(json.loads(self._json))

    def __hash__(self) -> int:
        return hash(self._json)

    def __repr__(self) -> str:
        return self._json


def plain(value: Any) -> Any:
    """Settings as dictionaries, lists, numbers, strings and None."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def hints(cls: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields, as types."""
    found = typing.get_type_hints(cls)
    return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def require(ok: bool, name: str, expected: str, got: object) -> None:
    """InputError about a field unless `ok`."""
    if not ok:
        raise InputError(name, expected=expected, got=got)


def positive(settings: Any, *names: str) -> None:
    """InputError for the first of these fields that is no finite number above 0."""
    for name in names:
        value = getattr(settings, name)
        require(0 < value < math.inf, name, "1 or more" if isinstance(value, int) else "a number above 0", value)


def not_negative(settings: Any, *names: str) -> None:
    """InputError for the first of these fields that is no finite number from 0 on."""
    for name in names:
        value = getattr(settings, name)
        require(0 <= value < math.inf, name, "0 or more", value)


def check_choices(settings: Any) -> None:
    """InputError for a field whose value is none of the choices that its annotation lists."""
    for name, hint in hints(type(settings)).items():
        if typing.get_origin(hint) is typing.Literal:
            convert(getattr(settings, name), hint, name)


def closest(name: str, known: Sequence[str]) -> str | None:
    """The name most like `name`: one without dots, or the end of a dotted one. None where nothing is like it."""
    direct = [key for key in known if "." not in key]
    ends: dict[str, str] = {}
    for key in known:
        ends.setdefault(key.rpartition(".")[2], key)
    for names, cutoff in ((direct, 0.7), (list(ends), 0.7), (direct, 0.5)):
        found = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
        if found:
            return found[0] if names is direct else ends[found[0]]
    return None


def unknown_key(where: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a key that nothing reads. `known`: keys beside it, and dotted ones below."""
    names = list(known)
    beside = [key for key in names if "." not in key]
    near = closest(name, names)
    expected = "one of " + ", ".join(sorted(beside))
    return InputError(
        f"{where}.{name}: unknown key", expected=None if near else expected, fix=near and f"{where}.{near}"
    )


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint` says, or InputError. An int is a float, a list a tuple; nothing else changes its type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and types.NoneType in args:
            return None
        (inner,) = (a for a in args if a is not types.NoneType)
        return convert(value, inner, where)
    if origin is typing.Literal:
        if value in args and isinstance(value, str):
            return value
    elif origin is tuple:
        return _convert_tuple(value, hint, where)
    elif origin is not None and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return value
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise InputError(where, expected=describe(hint), got=repr(value))


def _convert_tuple(value: Any, hint: Any, where: str) -> tuple[Any, ...]:
    args = typing.get_args(hint)
    variadic = len(args) == 2 and args[1] is Ellipsis
    if isinstance(value, Mapping) and typing.get_origin(args[0]) is tuple:
        value = tuple(sorted(value.items()))  # a ConfigDict keeps no order
    if isinstance(value, str) and variadic and args[0] is str:
        value = (value,)
    if not isinstance(value, list | tuple) or not (variadic or len(value) == len(args)):
        raise InputError(where, expected=describe(hint), got=repr(value))
    inner = (args[0],) * len(value) if variadic else args
    try:
        return tuple(convert(item, kind, where) for item, kind in zip(value, inner, strict=True))
    except InputError:
        raise InputError(where, expected=describe(hint), got=repr(value)) from None


def parse(text: str, hint: Any, where: str) -> Any:
    """The value that a command line's `text` means for a field of type `hint`; InputError if it means none."""
    args = typing.get_args(hint)
    if types.NoneType in args and text.lower() == "none":
        return None
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (a for a in args if a is not types.NoneType)
    if hint is str and text.lower() == "none":
        return None  # not set; what needs a value says so later
    if hint is str or typing.get_origin(hint) is typing.Literal:
        return convert(text, hint, where)
    value: Any = literal(text)
    if hint is float and isinstance(value, str):  # inf and nan are no literals; whether they make sense is said later
        try:
            value = float(text)
        except ValueError:
            pass
    elif typing.get_origin(hint) is tuple and not isinstance(value, list | tuple | Mapping):
        value = _listed(text, typing.get_args(hint)[0])
    try:
        return convert(value, hint, where)
    except InputError:
        raise InputError(where, expected=describe(hint), got=repr(text)) from None


def literal(text: str) -> Any:
    """What `text` says as a Python literal (also true and false), else the text itself."""
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return text


def _listed(text: str, inner: Any) -> tuple[Any, ...]:
    """`a,b` as two items, and `a:0.5,b:1` as two pairs where pairs are wanted."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if inner is str:
        return tuple(parts)
    if typing.get_origin(inner) is tuple:
        return tuple((name.strip(), literal(number.strip())) for name, _, number in (p.partition(":") for p in parts))
    return tuple(literal(part) for part in parts)


def describe(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in args)
    if origin is tuple:
        if args[-1] is not Ellipsis:
            return f"({', '.join(_NAMES.get(a, str(a)) for a in args)})"
        if typing.get_origin(args[0]) is tuple:
            return "(name, probability) pairs such as shuffle:0.5,noise:0.1"
        return f"a tuple of {_PLURAL[args[0]]}"
    if origin is not None:
        return "a dictionary"
    return _NAMES.get(hint, "a section of settings")


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    types.NoneType: "None",
}
_PLURAL = {int: "whole numbers", float: "numbers", str: "texts"}
