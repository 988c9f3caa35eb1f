"""`build`: the AV-SFT, AR-SFT and RL sets of a store, with everything that training needs to know about them.

    build.json                     marker, suffix ids, scales, variance, norms, counts, and hashes of what it rests on
    build/mu                       float64 [D], the mean of v_n over the training rows
    build/{set}.nla_meta.yaml      the sidecar of each set

No row is copied: a set is the rows of its split (for the SFT sets, those with an explanation), in the store's order.
build.json is written last and names the store, splits and explanations by hash, so a build that was interrupted, or
whose store has changed since, is not taken for a whole one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from nla_jax.arrays import NUMBERS, GrowingArray, canonical
from nla_jax.build_stats import Progress, Stats, round_scale, training_stats
from nla_jax.errors import InputError, StoreError
from nla_jax.marker import Marker, check_marker, choose_marker, suffix_ids, token_counts
from nla_jax.sidecar import Sidecar, parse_sidecar, sidecar_to_dict, write_sidecar
from nla_jax.store import EXPLANATIONS, SPLIT_FILE, SPLITS, Store
from nla_jax.store_splits import DEFAULT_FRACTIONS, check_fractions, write_splits
from nla_jax.tokenizer import Tokenizer

BUILD_FILE, FORMAT, VERSION = "build.json", "nla_jax.build", 1
SFT = ("av_sft", "ar_sft")

# What changes from prompt to prompt comes last, so that all before it is computed once.
AV_TEMPLATE = """\
A language model was stopped in the middle of a text, and one vector of its inner state was read at the last token. \
Put into words what this vector holds: what the text is about at that point, how it is written, what is still open \
in it, and what is likely to come next.

Answer with 2 or 3 short features, separated by empty lines, between <explanation> and </explanation>.

The vector: <concept>{injection_char}</concept>"""
AR_TEMPLATE = "Features of an unfinished text: <features>{explanation}</features> <vector>"

_BLOCK = 1 << 18  # rows looked at together
_TEXTS = 1 << 10


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `build` is asked for. None: our own templates, a marker and scale of our choice, the store's one layer, its
    splits as they are (25/25/50 and seed 0 where it has none), the model's name from the store."""

    av_template: str | None = None
    ar_template: str | None = None
    marker: str | None = None
    injection_scale: float | None = None
    layer: int | None = None
    fractions: Mapping[str, float] | None = None
    seed: int | None = None
    base_model: str | None = None


class Build:
    """The sets of a store, opened with `open_build`.

    Attributes: `store`, `info` (build.json), `layer` (K), `sets` (names of those that hold rows), `injection_scale`,
    `mse_scale`, `variance_nrm` (denominator of fve_nrm), `baseline_meannorm`.
    """

    def __init__(self, store: Store, info: dict[str, Any]):
        self.store, self.info = store, info
        self.layer: int = info["layer"]
        self.sets = tuple(name for name in SPLITS if info["sets"].get(name, {}).get("rows"))
        self.injection_scale: float = info["injection_scale"]
        self.mse_scale: float = info["mse_scale"]
        self.variance_nrm: float = info["variance_nrm"]
        self.baseline_meannorm: float = info["baseline_meannorm"]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {self.info['sets'][name]['rows']}" for name in self.sets)
        return f"Build({self.store.path!r}, layer {self.layer}, {sizes})"

    @cached_property
    def mu(self) -> np.ndarray:
        """float64 [D]: the un-normalised mean of v_n over the training rows."""
        found = self.store.root.open("build/mu").read().result()
        if hashlib.sha256(found.tobytes()).hexdigest() != self.info["mu"]["sha256"]:
            raise StoreError(f"{self.store.path}: build/mu is damaged", fix="nla build --overwrite")
        return found

    def rows(self, name: str) -> np.ndarray:
        """int64 row numbers of a set, ascending."""
        self._require(name)
        found, _ = set_rows(self.store, name, self.layer)
        wanted = self.info["sets"][name]["rows"]
        if len(found) != wanted:
            fix = "nla build --overwrite"
            raise StoreError(f"{self.store.path}: set {name}", expected=f"{wanted} rows", got=len(found), fix=fix)
        return found

    def sidecar(self, name: str) -> Sidecar:
        """The sidecar of a set ("av_sft", "ar_sft", "rl"), or the one for a model trained on them ("av", "ar").

        A model's has the build's injection scale and variance, and the suffix ids."""
        if name in ("av", "ar"):
            return self._model_sidecar(name)
        self._require(name)
        data = self.store.root.read(_sidecar_key(name))
        if data is None or hashlib.sha256(data).hexdigest() != self.info["sets"][name]["sidecar"]:
            fix = "nla build --overwrite"
            raise StoreError(f"{self.store.path}: {_sidecar_key(name)} is missing or was changed", fix=fix)
        return parse_sidecar(yaml.safe_load(data), f"{self.store.path}/{_sidecar_key(name)}")

    def _model_sidecar(self, role: str) -> Sidecar:
        known = [self.sidecar(name) for name in self.sets]

        def first(field: str) -> Any:
            return next((getattr(s, field) for s in known if getattr(s, field) is not None), None)

        return dataclasses.replace(
            known[0],
            kind="nla_model",
            role=role,  # type: ignore[arg-type]
            stage=None,
            raw={},
            injection_scale=self.injection_scale,
            mse_scale=self.mse_scale,
            variance_nrm=self.variance_nrm,
            **{field: first(field) for field in ("av_template", "ar_template", "ar_suffix_ids")},
        )

    def _require(self, name: str) -> None:
        if name not in self.sets:
            expected = " or ".join(self.sets)
            raise StoreError(f"{self.store.path}: set {name!r}", expected=expected, got="no rows of it")


def open_build(store: Store | str | Path) -> Build:
    """The sets that `nla build` or `nla data import` made of a store.

    StoreError where there are none, or where the store's splits or explanations have changed since."""
    store = store if isinstance(store, Store) else Store.open(store)
    info = store.root.read_json(BUILD_FILE)
    if info is None:
        raise StoreError(f"{store.path} has no training sets", expected=BUILD_FILE, got="none", fix="nla build")
    if not isinstance(info, dict) or (info.get("format"), info.get("version")) != (FORMAT, VERSION):
        got = f"{info.get('format')} {info.get('version')}" if isinstance(info, dict) else type(info).__name__
        raise StoreError(f"{store.path}/{BUILD_FILE}", expected=f"{FORMAT} {VERSION}", got=got)
    for what, digest in _rests_on(store).items():
        if info["rests_on"].get(what) != digest:
            fix = "nla build --overwrite, which makes them anew"
            raise StoreError(f"{store.path}: its {what} changed after the training sets were made", fix=fix)
    return Build(store, info)


def build(
    path: str | Path,
    tokenizer: Tokenizer,
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Build:
    """Makes the sets of a complete store. The same call again changes nothing; another one needs `overwrite`."""
    store = Store.open(path)
    recorded = store.manifest["tokenizer"].get("fingerprint")
    if recorded is not None and recorded != tokenizer.fingerprint:
        fix = "the tokenizer of the model whose activations these are"
        raise StoreError(f"{tokenizer.source}: not the tokenizer of {path}", fix=fix)
    layer = _layer(store, plan.layer)
    store = _split(store, plan, overwrite)
    rows, dropped = {}, {}
    for name in SPLITS:
        rows[name], dropped[name] = set_rows(store, name, layer)
    _require_explanations(store, rows, dropped)

    av_template, ar_template = plan.av_template or AV_TEMPLATE, plan.ar_template or AR_TEMPLATE
    counts = token_counts(store, tokenizer.vocab_size)
    if plan.marker is None:
        marker = choose_marker(tokenizer, av_template, counts)
    else:
        marker = check_marker(tokenizer, av_template, plan.marker, counts)
    suffix = suffix_ids(tokenizer, ar_template, _explanations(store, rows["ar_sft"]))

    mse_scale = math.sqrt(store.d_model)
    training = np.unique(np.concatenate(list(rows.values())))
    stats = training_stats(store, training, mse_scale, progress)
    scale = plan.injection_scale if plan.injection_scale is not None else round_scale(stats.norms["mean"])
    if not 0 < scale < math.inf:
        raise InputError("--injection-scale", expected="a positive number", got=scale)
    facts = Sidecar(
        kind="nla_dataset",
        role=None,
        d_model=store.d_model,
        layer_index=layer,
        injection_scale=float(scale),
        mse_scale=mse_scale,
        injection_mode="replace",
        marker=marker.char,
        marker_id=marker.id,
        left_id=marker.left_id,
        right_id=marker.right_id,
        ar_suffix_ids=suffix,
        av_template=av_template,
        ar_template=ar_template,
        variance_nrm=stats.variance_nrm,
        base_model=plan.base_model or store.manifest["model"].get("name"),
    )
    facts.check(tokenizer, "nla build")
    sidecars = {n: _set_sidecar(facts, store, n, len(rows[n])) for n in SPLITS if len(rows[n])}
    more = {"marker": dataclasses.asdict(marker), "tokenizer": {"fingerprint": tokenizer.fingerprint}}
    return save_build(store, facts, sidecars, rows, dropped, stats, more, overwrite=overwrite)


def save_build(
    store: Store,
    facts: Sidecar,
    sidecars: Mapping[str, Sidecar],
    rows: Mapping[str, np.ndarray],
    dropped: Mapping[str, Mapping[str, int]],
    stats: Stats,
    more: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Build:
    """Writes a build in place. StoreError if there is another one already and `overwrite` is not given."""
    texts = {name: _yaml(sidecar) for name, sidecar in sidecars.items()}
    assert facts.injection_scale is not None and facts.mse_scale is not None
    info: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "rests_on": _rests_on(store),
        "layer": facts.layer_index,
        "injection_scale": facts.injection_scale,
        "mse_scale": facts.mse_scale,
        "variance_nrm": facts.variance_nrm,
        "baseline_meannorm": stats.baseline_meannorm,
        "norms": stats.norms,
        "training_rows": stats.n,
        "ar_suffix_ids": None if facts.ar_suffix_ids is None else list(facts.ar_suffix_ids),
        "sets": {
            name: {
                "rows": len(rows[name]),
                "dropped": dict(dropped[name]),
                "sidecar": hashlib.sha256(texts[name]).hexdigest() if name in texts else None,
            }
            for name in SPLITS
        },
        "mu": {"sha256": hashlib.sha256(stats.mu.tobytes()).hexdigest(), "shape": [len(stats.mu)], "dtype": "float64"},
        **more,
    }
    root = store.root
    found = root.read_json(BUILD_FILE)
    if found is not None and canonical(found) == canonical(info):
        return Build(store, info)
    if found is not None and not overwrite:
        name = next((k for k in sorted({*found, *info}) if found.get(k) != info.get(k)), "format")
        raise StoreError(
            f"{store.path} has other training sets already",
            expected=f"{name} = {_short(found.get(name))}",
            got=_short(info.get(name)),
            fix="--overwrite, or the options they were made with",
        )
    root.delete(BUILD_FILE)  # a kill from here on leaves no build, never a mixture
    root.delete_below("build/")
    array = GrowingArray(root, "build/mu", "float64", NUMBERS)
    array.append(stats.mu)
    array.close()
    for name, text in texts.items():
        root.write(_sidecar_key(name), text)
    root.write_json(BUILD_FILE, info)
    return Build(store, info)


def set_rows(store: Store, name: str, layer: int) -> tuple[np.ndarray, dict[str, int]]:
    """int64 rows of a set, and how many of its split were dropped for want of an explanation ("none", "dropped")."""
    rows = store.rows_of(name)
    if len(store.layers) > 1:
        blocks = [rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK)]
        rows = np.concatenate([b[store.table(b)["layer"] == layer] for b in blocks]) if blocks else rows
    if name not in SFT or not len(rows):
        return rows, {}
    if not store.has_explanations:
        return rows[:0], {"none": len(rows)}
    status = store.explanation_status(rows)
    return rows[status == 1], {"none": int((status == 0).sum()), "dropped": int((status == 2).sum())}


def _layer(store: Store, layer: int | None) -> int:
    if layer is None and len(store.layers) == 1:
        return store.layers[0]
    if layer not in store.layers:
        expected = "one of " + ", ".join(map(str, store.layers))
        raise InputError("--layer", expected=expected, got="none" if layer is None else layer)
    return layer


def _split(store: Store, plan: Plan, overwrite: bool) -> Store:
    """The store with splits: those it has, unless others are asked for."""
    fractions = None if plan.fractions is None else check_fractions(plan.fractions)
    if store.splits is not None:
        now = {name: store.splits[name]["fraction"] for name in SPLITS}
        same = fractions is None or all(abs(now[n] - fractions[n]) < 1e-9 for n in SPLITS)
        if same and (plan.seed is None or plan.seed == store.splits["seed"]):
            return store
        if not overwrite:
            raise StoreError(
                f"{store.path} is split already",
                expected=f"fractions {'/'.join(f'{f:g}' for f in now.values())}, seed {store.splits['seed']}",
                fix="leaving out --fractions and --seed, or --overwrite (explanations stay with their rows)",
            )
        fractions = fractions or now
    write_splits(store.path, fractions or DEFAULT_FRACTIONS, plan.seed or 0)
    return Store.open(store.path)


def _require_explanations(store: Store, rows: Mapping[str, np.ndarray], dropped: Mapping[str, dict[str, int]]) -> None:
    for name in SFT:
        if not len(rows[name]) and any(dropped[name].values()):
            what = "no row has an explanation" if store.has_explanations else "the store holds no explanations"
            fix = f"nla teach {store.path} --rows {','.join(SFT)}; --fractions 0/0/100 makes an RL set alone"
            raise StoreError(f"{store.path}: set {name} is empty, {what}", fix=fix)


def _explanations(store: Store, rows: np.ndarray) -> Iterator[str]:
    for start in range(0, len(rows), _TEXTS):
        yield from (text for text in store.explanations(rows[start : start + _TEXTS]) if text is not None)


def _set_sidecar(facts: Sidecar, store: Store, name: str, n_rows: int) -> Sidecar:
    """A set's sidecar with what the reference's own have besides: see nla/datagen/sidecar.py there."""
    basis = sidecar_to_dict(dataclasses.replace(facts, stage=name))
    model = str(facts.base_model or "model").rstrip("/").rsplit("/", 1)[-1]
    corpus, settings = store.manifest["corpus"], store.manifest["settings"]
    extraction = {
        "base_model": facts.base_model,
        "d_model": facts.d_model,
        "layer_index": facts.layer_index,
        "norm": "none",  # vectors are raw; they are scaled where they are used
        "corpus": corpus.get("name"),
        "positions_per_doc": settings.get("per_document"),
        **basis.pop("extraction"),
    }
    raw = {
        "kind": "nla_dataset",
        "schema_version": 2,
        "dataset_id": f"{name}_{model}_L{facts.layer_index}_{store.manifest['hash'][:8]}",
        "stage": name,
        "row_count": n_rows,
        "extraction": {k: v for k, v in extraction.items() if v is not None},
        **{k: v for k, v in basis.items() if k not in ("kind", "schema_version", "stage")},
        "keep_debug_metadata": True,
        "created_by": "nla_jax.build",
    }
    if name in SFT:
        teacher = store.root.read_json(EXPLANATIONS) or {}
        raw["explanations"] = {k: v for k, v in teacher.items() if k not in ("counts", "arrays", "store")}
    return parse_sidecar(raw, "nla build")


def _yaml(sidecar: Sidecar) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return write_sidecar(sidecar, Path(directory, "nla_meta.yaml")).read_bytes()


def _sidecar_key(name: str) -> str:
    return f"build/{name}.nla_meta.yaml"


def _rests_on(store: Store) -> dict[str, str | None]:
    """Hashes of what the sets are made of."""
    files = {"splits": SPLIT_FILE, "explanations": EXPLANATIONS}
    found = {name: store.root.read(key) for name, key in files.items()}
    digests = {name: None if data is None else hashlib.sha256(data).hexdigest() for name, data in found.items()}
    return {"vectors": store.manifest["hash"], **digests}


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = ["AR_TEMPLATE", "AV_TEMPLATE", "Build", "Marker", "Plan", "build", "open_build", "save_build", "set_rows"]
