"""Run configs: found by name or path, and changed by `--config.KEY=VALUE` of a command line.

Values from the command line are read as the type of the field they set (train/settings.py), so that a key may be
set that the config file does not mention, None is possible, and a wrong type is an error before anything runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nla_jax import configs
from nla_jax.errors import InputError, NLAError
from nla_jax.train.fields import literal, parse, unknown_key
from nla_jax.train.settings import LR, SECTIONS, keys_of, paths, top_level_keys

_NOT_RUNS = ("released", "common", "chips", "architectures")  # modules of nla_jax.configs that no run can be made from


def names() -> list[str]:
    """The configs that come with the package."""
    return sorted(m.name for m in pkgutil.iter_modules(configs.__path__) if m.name not in _NOT_RUNS)


def load(name_or_path: str) -> ConfigDict:
    """What `get_config()` of a packaged config or of a .py file returns. InputError if there is none."""
    if name_or_path.endswith(".py") or "/" in name_or_path:
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise InputError(f"--config {name_or_path}: no such file", fix=f"a path, or one of {', '.join(names())}")
        spec = importlib.util.spec_from_file_location(f"_nla_jax_config_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise InputError(f"--config {name_or_path}", expected="a .py file", got=path.suffix or "no suffix")
        module = importlib.util.module_from_spec(spec)
        run = spec.loader.exec_module
    elif name_or_path in names():
        module = importlib.import_module(f"nla_jax.configs.{name_or_path}")
        run = None
    else:
        close = difflib.get_close_matches(name_or_path, names(), n=1)
        expected = f"a path of a .py file, or one of {', '.join(names())}"
        raise InputError(
            "--config", expected=expected, got=repr(name_or_path), fix=f"--config={close[0]}" if close else None
        )
    try:
        if run is not None:
            run(module)
        if not callable(getattr(module, "get_config", None)):
            raise InputError(f"--config {name_or_path}", expected="a function get_config()", got="none")
        config = module.get_config()
    except NLAError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's file does wrong is said in one line
        raise InputError(f"--config {name_or_path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        expected = "get_config() to return an ml_collections.ConfigDict"
        raise InputError(f"--config {name_or_path}", expected=expected, got=type(config).__name__)
    config = ConfigDict(config.to_dict(), type_safe=False)
    for stage in SECTIONS:
        section = config.get(stage)
        if isinstance(section, ConfigDict) and section.get(LR) is not None:
            _set_lr(config, stage, section[LR])
            del section[LR]
    return config


def override(config: ConfigDict, assignments: Iterable[tuple[str, str | None]], stage: str) -> None:
    """Sets dotted keys in place, in order; a text of None stands for a key without a value, which only a switch may be.

    InputError for a key that no settings have, naming the closest (first in the section of `stage`), and for a text
    that is not of its type."""
    for key, text in assignments:
        _assign(config, key, text, stage)


def _assign(config: ConfigDict, key: str, text: str | None, stage: str) -> None:
    parts, hint = key.split("."), None
    known = {stage: SECTIONS[stage], **top_level_keys()}
    for i, part in enumerate(parts):
        where = ".".join(["config", *parts[:i]])
        if part not in known:
            raise unknown_key(where, part, paths(known))
        hint = known[part]
        if dataclasses.is_dataclass(hint):
            known = keys_of(hint)
        elif i + 1 < len(parts):
            if part != "model":
                raise InputError(f"config.{key}", expected=f"no keys below {where}.{part}, which is one value")
            hint = None  # any field of a config.json
            break
    where = f"config.{key}"
    if text is None:
        if hint is not bool:
            raise InputError(where, expected="a value", got="none", fix=f"--{where}=VALUE")
        text = "true"
    if hint is None:
        value: Any = None if text.lower() == "none" else literal(text)
    elif dataclasses.is_dataclass(hint):
        value = literal(text)
        if not isinstance(value, Mapping):
            example = f"--{where}.{next(iter(keys_of(hint)))}=VALUE"
            raise InputError(where, expected="a dictionary of its keys", got=repr(text), fix=example)
    else:
        value = parse(text, hint, where)
    if len(parts) == 2 and parts[1] == LR and parts[0] in SECTIONS:
        _set_lr(config, parts[0], value)
        return
    try:
        _section(config, parts[:-1])[parts[-1]] = value
    except (KeyError, TypeError, ValueError) as error:  # keys that a ConfigDict cannot have
        raise InputError(where, expected="a value for a config", got=f"{text!r} ({error})") from None


def _section(config: ConfigDict, parts: list[str]) -> ConfigDict:
    """The section at a path, made where it is missing."""
    for part in parts:
        if not isinstance(config.get(part), ConfigDict):
            config[part] = ConfigDict(type_safe=False)
        config = config[part]
    return config


def _set_lr(config: ConfigDict, stage: str, lr: Any) -> None:
    """The learning rate of every optimizer of a stage."""
    for optim in SECTIONS[stage].optimizers():
        _section(config, [stage, optim])[LR] = lr
