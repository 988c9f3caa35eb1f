"""The suites of an evaluation, one after another, each kept as soon as it is done.

    OUT/suites/NAME.json      a suite's rows, notes and series, with a key of everything that decides them
    OUT/NAME.parquet          its data by row, from which every number can be computed again
    OUT/explanations.jsonl    the drawn texts
    OUT/results.json          all suites together with what they rest on, written last

The same call again does only what is missing: a suite is taken as done where its key is the same. Files appear whole or
not at all, and hold no times except below "run" in results.json.

Several processes run the suites together, in step (hosts.py); the first alone reads and writes OUT.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from nla_jax import metrics
from nla_jax.arrays import canonical
from nla_jax.errors import InputError
from nla_jax.evals import batched, hosts
from nla_jax.evals.context import Context
from nla_jax.evals.provenance import computed_on, layer_aliases, versions
from nla_jax.evals.result import SuiteResult, from_json, plain
from nla_jax.extract_run import weights_fingerprint

FORMAT, VERSION = "nla_jax.eval", 1
RESULTS = "results.json"
SUITES = {
    "fve": "fve",
    "downstream": "downstream",
    "retrieval": "retrieval",
    "robustness": "robustness",
    "claims": "claim_value",
    "agreement": "agreement",
    "best-of-k": "best_of_k",
    "steering": "steering",
}
_LACKS = {
    "target": "it needs the target model (--target)",
    "tokens": "it needs the documents' tokens, which a parquet set does not have",
    "train": "it needs training rows: a store with splits (nla build)",
    "provider": "it needs a provider of texts",
}


class Suite(Protocol):
    """A module of this package. A greater `VERSION`, where it has one, makes finished results of it be done again."""

    NAME: str
    needs: frozenset[str]

    def run(self, ctx: Context, **settings: Any) -> SuiteResult: ...


def suite(name: str) -> Suite:
    """The suite of a name; InputError for another one."""
    if name not in SUITES:
        raise InputError("--suite", expected=", ".join(SUITES), got=name)
    return cast(Suite, importlib.import_module(f"nla_jax.evals.{SUITES[name]}"))


def evaluate(
    ctx: Context,
    suites: Sequence[str] | None,
    out: str | Path,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    given: Mapping[str, str | None] | None = None,
    command: Sequence[str] = (),
    note: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Runs suites (None: all that this pair and these rows allow; the rest is listed as skipped) and gives what
    results.json then holds.

    `settings`: keyword arguments of each suite's `run`. `given`: the models as the user named them; `command`: the
    command line. A suite that was asked for by name and lacks something is an InputError. Of several processes all
    call this alike, and get the same."""
    asked = list(dict.fromkeys(suites)) if suites is not None else list(SUITES)
    settings, out = dict(settings or {}), Path(out)
    unknown = sorted(set(settings) - set(SUITES))
    if unknown:
        raise InputError("settings of a suite", expected=", ".join(SUITES), got=unknown[0])
    chosen, skipped = [], []
    for name in asked:
        module = suite(name)
        reason = _lacking(ctx, module, settings.get(name, {}))
        if reason is None:
            chosen.append(name)
        elif suites is not None:
            raise InputError(f"suite {name} cannot run: {reason}")
        else:
            skipped.append({"suite": name, "reason": reason})
    hosts.agree(lambda: {**_fingerprints(ctx), "data": ctx.data.hash, "suites": chosen, "settings": _settings(ctx)})
    batched.meet(ctx.mesh)
    hosts.by_first(lambda: _make(out))
    note = hosts.noted(note)
    done: list[SuiteResult] = []
    seconds: dict[str, float] = {}
    for name in chosen:
        started = time.monotonic()
        try:
            found, fresh = _suite(ctx, name, out, settings.get(name, {}), note)
        except InputError as error:
            if suites is not None:
                raise
            note(f"{name}: skipped, {error}")
            skipped.append({"suite": name, "reason": str(error)})
            continue
        done.append(found)
        if fresh:
            seconds[name] = round(time.monotonic() - started, 1)
    results = {
        **header(ctx, given or {}, command),
        "suites": [found.json() for found in done],
        "skipped": skipped,
        "run": {"seconds": seconds, "ended": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())},
    }
    results = plain(results)
    hosts.by_first(lambda: _replace_json(out / RESULTS, results))
    return results


def header(ctx: Context, given: Mapping[str, str | None], command: Sequence[str]) -> dict[str, Any]:
    """What results rest on: models and data by hash, layer, denominator, seeds, versions, the command."""
    data, nla = ctx.data, ctx.nla
    models = {
        name: {"given": str(given.get(name) or getattr(nla, name).path), "path": str(getattr(nla, name).path), **hashes}
        for name, hashes in ctx.hashes.items()
    }
    unit = ctx.mse_scale**2 / data.vectors.shape[1]
    return {
        "format": FORMAT,
        "format_version": VERSION,
        "versions": versions(),
        "command": list(command),
        "models": models,
        **computed_on(nla),
        "d_model": data.vectors.shape[1],
        "layer_index": data.layer,
        "layer_aliases": layer_aliases(data.layer),
        "mse_scale": ctx.mse_scale,
        "fve_nrm_denominator": {
            "variance_nrm": ctx.variance,
            "source": ctx.variance_source,
            "constant_predictor_floor": metrics.constant_floor(ctx.variance / unit),
        },
        "data": {
            **data.source,
            "rows_sha256": data.hash,
            "n": len(data.main),
            "documents": len(np.unique(data.docs[data.main])),
            "notes": list(ctx.notes),
        },
        "settings": _settings(ctx),
    }


def _fingerprints(ctx: Context) -> dict[str, str]:
    """What tells other weights of a model at a glance."""
    roles = {name: getattr(ctx.nla, name) for name in ("av", "ar", "target")}
    return {name: weights_fingerprint(Path(role.path)) for name, role in roles.items() if role is not None}


def _settings(ctx: Context) -> dict[str, Any]:
    names = ("seed", "resamples", "temperature", "max_new_tokens", "batch_size")
    return {name: getattr(ctx, name) for name in names}


def suite_key(ctx: Context, name: str, settings: Mapping[str, Any]) -> str:
    """sha256 of what decides a suite's result: models, rows, seeds, settings, and the version of its code's format."""
    module = suite(name)
    used = ("av", "ar", "target") if "target" in module.needs else ("av", "ar")
    mean = ctx.data.train_mean_nrm
    decides = {
        "format": [FORMAT, VERSION, getattr(module, "VERSION", 1)],
        "suite": name,
        "models": {role: ctx.hashes.get(role) for role in used},
        "on": computed_on(ctx.nla),
        "data": {k: v for k, v in ctx.data.source.items() if k != "path"},
        "rows": ctx.data.hash,
        "training": None if mean is None else hashlib.sha256(mean.tobytes()).hexdigest(),
        "variance": [ctx.variance, ctx.variance_source],
        "texts": ctx.texts_key(),
        "seeds": [ctx.seed, ctx.resamples],
        "settings": {k: _named(v) for k, v in settings.items()},
    }
    return hashlib.sha256(canonical(plain(decides)).encode()).hexdigest()


def _suite(
    ctx: Context, name: str, out: Path, settings: Mapping[str, Any], note: Callable[[str], None]
) -> tuple[SuiteResult, bool]:
    """A suite's result, and whether it was computed now."""
    key, file, table = suite_key(ctx, name, settings), out / "suites" / f"{name}.json", out / f"{name}.parquet"
    kept = hosts.by_first(lambda: _kept(file, key, table))
    if kept is not None:
        note(f"{name}: done already, with the same models, data and settings")
        return from_json(kept), False
    result = suite(name).run(ctx, **settings)
    if result.suite != name:
        raise ValueError(f"suite {name} calls itself {result.suite}")
    content = plain({"key": key, "table": bool(result.columns), **result.json()})

    def keep() -> None:
        file.unlink(missing_ok=True)  # never beside another run's table
        if result.columns:
            _write_table(table, result, key)
        _replace_json(file, content)

    hosts.by_first(keep)
    return from_json(content), True


def _kept(file: Path, key: str, table: Path) -> dict[str, Any] | None:
    """What was written of a suite, if it is of this key and its table is there."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("key") != key or (found["table"] and not table.is_file()):
        return None
    return found


def _lacking(ctx: Context, module: Suite, settings: Mapping[str, Any]) -> str | None:
    has = {
        "target": ctx.nla.target is not None,
        "tokens": ctx.data.tokens is not None,
        "train": ctx.data.train is not None,
        "provider": settings.get("provider") is not None,
    }
    return next((_LACKS[need] for need in _LACKS if need in module.needs and not has[need]), None)


def _named(value: Any) -> Any:
    """A setting as JSON: what is no value says what it is by its `describe()`."""
    if hasattr(value, "describe"):
        return value.describe()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    try:
        json.dumps(plain(value))
    except TypeError:
        return repr(type(value))
    return value


def _write_table(path: Path, result: SuiteResult, key: str) -> None:
    """A suite's columns as parquet: [m] and [m, D] arrays in their dtype, lists with None as null."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = {len(column) for column in result.columns.values()}
    if len(sizes) != 1:
        raise ValueError(f"suite {result.suite}: columns of different lengths {sorted(sizes)}")

    def column(values: np.ndarray | list) -> Any:
        if getattr(values, "ndim", 1) != 2:
            return pa.array(values)
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, np.asarray(values).shape[1])

    table = pa.table({name: column(values) for name, values in result.columns.items()})
    part = _part(path)
    pq.write_table(table.replace_schema_metadata({b"nla_jax.eval": key.encode()}), part, row_group_size=4096)
    os.replace(part, path)


def _make(out: Path) -> None:
    try:
        (out / "suites").mkdir(parents=True, exist_ok=True)
        probe = _part(out / RESULTS)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written", got=error.strerror, fix="another directory") from None


def _replace_json(path: Path, value: Any) -> None:
    data = (json.dumps(value, ensure_ascii=False, allow_nan=False, indent=1) + "\n").encode()
    part = _part(path)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
