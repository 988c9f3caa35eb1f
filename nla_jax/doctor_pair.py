"""The checks of directories against each other: one tokenizer, one layer, one width, one pair."""

from __future__ import annotations

import itertools

import numpy as np

from nla_jax.configs.released import published
from nla_jax.doctor import Report
from nla_jax.doctor_files import Found, sample_rows
from nla_jax.models.safetensors_io import DTYPES
from nla_jax.tokenizer import Tokenizer

_RELEASE = "the two halves of one release"
# AV and AR of a pair are saved at the same training step; a few steps apart is another save of the same run.
_NEAR_STEPS = 100


def check_together(found: list[Found], report: Report) -> None:
    """Compares every two of them, by what they are."""
    models = sorted((f for f in found if f.is_model), key=lambda f: ("target", "AV", "AR").index(f.kind))
    kinds = [f.kind for f in models]
    for kind in ("target", "AV", "AR"):
        if kinds.count(kind) > 1:
            paths = ", ".join(str(f.path) for f in models if f.kind == kind)
            extra = "; an AV without its nla_meta.yaml looks like one" if kind == "target" else ""
            report.warning("all", "roles", f"{kinds.count(kind)} directories are taken for {kind}: {paths}{extra}")
    for a, b in itertools.combinations(models, 2):
        if a.kind == b.kind:
            continue
        where = f"{a.kind} + {b.kind}"
        if a.tokenizer is not None and b.tokenizer is not None:
            _tokenizers(where, a.tokenizer, b.tokenizer, report)
        _architecture(where, a, b, report)
        _embeddings(where, a, b, report)
    for av, ar in itertools.product(*([f for f in models if f.kind == k] for k in ("AV", "AR"))):
        _pair(av, ar, report)
    for target in models:
        for other in models:
            if target.kind == "target" and other.kind != "target":
                _blocks(target, other, report)
    for data in found:
        for model in models:
            if not data.is_model and model.sidecar is not None:
                _data(data, model, report)
    _variance(models, report)


def _tokenizers(where: str, a: Tokenizer, b: Tokenizer, report: Report) -> None:
    if a.fingerprint == b.fingerprint:
        report.ok(where, "tokenizer", "the same tokenizer")
        return
    shared = min(a.vocab_size, b.vocab_size)
    other = [i for i in range(shared) if a.token_str(i) != b.token_str(i)]
    fix = "tokenizer files of one model in all directories"
    if other:
        i = other[0]
        first = f"first: {i}, {a.token_str(i)!r} and {b.token_str(i)!r}"
        text = f"{len(other)} of {shared} token ids mean something else ({first})"
        report.problem(where, "tokenizer", f"tokenizer drift: {text}", fix)
    elif a.vocab_size != b.vocab_size:
        text = f"{a.vocab_size} and {b.vocab_size} ids; the shared ones agree"
        report.warning(where, "tokenizer", f"tokenizer drift: {text}", fix)
    else:
        text = "the same vocabulary, but a text is split into other tokens (merges, normalisation or added tokens)"
        report.problem(where, "tokenizer", f"tokenizer drift: {text}", fix)


def _architecture(where: str, a: Found, b: Found, report: Report) -> None:
    if a.cfg is None or b.cfg is None:
        return
    differ = [
        f"{name} {x} and {y}"
        for name, x, y in (
            ("family", a.cfg.family, b.cfg.family),
            ("D", a.cfg.d_model, b.cfg.d_model),
            ("heads", a.cfg.n_heads, b.cfg.n_heads),
            ("MLP width", a.cfg.d_ff, b.cfg.d_ff),
        )
        if x != y
    ]
    if differ:
        fix = "directories that descend from one base model"
        report.problem(where, "architecture", "not of one base model: " + ", ".join(differ), fix)
        return
    notes = [
        f"{name} {x} and {y}"
        for name, x, y in (
            ("vocabulary rows", a.cfg.vocab_size, b.cfg.vocab_size),
            ("rope", a.cfg.rope, b.cfg.rope),
            ("norm eps", a.cfg.norm_eps, b.cfg.norm_eps),
            ("query scale", a.cfg.query_scale, b.cfg.query_scale),
        )
        if x != y
    ]
    if notes:
        fix = "comparing the two config.json"
        report.warning(where, "architecture", "config.json differs where it changes numbers: " + ", ".join(notes), fix)
    else:
        report.ok(where, "architecture", f"both {a.cfg.family}, D {a.cfg.d_model}")


def _embeddings(where: str, a: Found, b: Found, report: Report) -> None:
    """Fine-tuning hardly turns embedding rows: a few of them tell whether two models descend from one base."""
    if a.embedding is None or b.embedding is None or a.embedding.shape[1:] != b.embedding.shape[1:]:
        return
    if a.embedding.dtype not in DTYPES or b.embedding.dtype not in DTYPES:
        return
    known = [f.tokenizer.vocab_size for f in (a, b) if f.tokenizer is not None]
    limit = min([a.embedding.shape[0], b.embedding.shape[0], *known])
    x, y = sample_rows(a.embedding, limit), sample_rows(b.embedding, limit)
    size = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    alike = float(np.median((x * y).sum(1) / np.maximum(size, 1e-12)))
    if alike < 0.5:
        text = f"token embeddings have nothing in common (median cosine {alike:.2f}): different base models or pairs"
        report.problem(where, "base model", text, _RELEASE + ", and the target they were trained on")
    else:
        report.ok(where, "base model", f"token embeddings agree (median cosine {alike:.3f}): one base model")


def _pair(av: Found, ar: Found, report: Report) -> None:
    where, a, b = "AV + AR", av.sidecar, ar.sidecar
    if a is None or b is None:
        return
    differ = []
    if a.layer_index is not None and b.layer_index is not None and a.layer_index != b.layer_index:
        hint = ", one apart: block K is hidden_states[K+1]" if abs(a.layer_index - b.layer_index) == 1 else ""
        differ.append(f"layer K {a.layer_index} and {b.layer_index}{hint}")
    facts: tuple[tuple[str, object, object], ...] = (
        ("d_model", a.d_model, b.d_model),
        ("marker", (a.marker, a.marker_id), (b.marker, b.marker_id)),
        ("neighbours", (a.left_id, a.right_id), (b.left_id, b.right_id)),
    )
    differ += [f"{name} {x} and {y}" for name, x, y in facts if x != y]
    for name, mine, its in (
        ("AV templates", a.av_template, b.av_template),
        ("AR templates", a.ar_template, b.ar_template),
    ):
        if mine and its and mine != its:
            differ.append(name)
    steps = [f.section("training").get("rollout_id") for f in (av, ar)]
    apart = abs(steps[0] - steps[1]) if isinstance(steps[0], int) and isinstance(steps[1], int) else 0
    if apart > _NEAR_STEPS:
        differ.append(f"training steps (rollout_id) {steps[0]} and {steps[1]}")
    if differ:
        report.problem(
            where, "pair", "AV and AR are of different pairs: their sidecars differ in " + "; ".join(differ), _RELEASE
        )
    else:
        report.ok(where, "pair", "one pair: the sidecars agree on layer, marker and templates")
    if a.mse_scale != b.mse_scale:
        text = f"mse_scale {a.mse_scale} and {b.mse_scale}; the AR's is used"
        report.warning(where, "mse scale", text, "the sidecars of one release")
    if 0 < apart <= _NEAR_STEPS:
        report.note(where, "pair", f"saved at training steps {steps[0]} and {steps[1]}")
    elif (steps[0] is None) != (steps[1] is None):
        bare = "AV" if steps[0] is None else "AR"
        text = f"the {bare}'s sidecar has no training record and the other has: it may be its base checkpoint's"
        report.warning(where, "pair", text, f"the {bare}'s own nla_meta.yaml")


def _blocks(target: Found, other: Found, report: Report) -> None:
    if target.cfg is None or other.cfg is None:
        return
    where, n, m = f"target + {other.kind}", target.cfg.n_layers, other.cfg.n_layers
    if other.kind == "AV" and n != m:
        text = f"the AV has {m} blocks and the target {n}: an AV is a whole copy of its target"
        report.problem(where, "blocks", text, "the target that the AV was trained on")
    elif other.kind == "AR" and m > n:
        text = f"the AR has {m} blocks, more than the target's {n}"
        report.problem(where, "blocks", text, "the target that the AR was trained on")
    elif other.kind == "AR" and m == n:
        text = f"the AR has all {n} blocks of the target: K is the last block, or the AR was never cut to K + 1"
        report.warning(where, "blocks", text)
    else:
        part = "as many" if other.kind == "AV" else f"the first {m}"
        report.ok(where, "blocks", f"the {other.kind} has {part} blocks of the target's {n}")


def _data(data: Found, model: Found, report: Report) -> None:
    where, a, b = f"dataset + {model.kind}", data.sidecar, model.sidecar
    if a is None or b is None:
        return
    differ = [
        f"{name} {x} and {y}"
        for name, x, y in (
            ("d_model", a.d_model, b.d_model),
            ("layer K", a.layer_index, b.layer_index),
            ("marker id", a.marker_id, b.marker_id),
            ("neighbours", (a.left_id, a.right_id), (b.left_id, b.right_id)),
        )
        if x is not None and y is not None and x != y
    ]
    for name, x, y in (("AV templates", a.av_template, b.av_template), ("AR templates", a.ar_template, b.ar_template)):
        if x and y and x != y:
            differ.append(name)
    if differ:
        fix = "data extracted for this pair, or the pair's own sidecars"
        report.problem(where, "data", f"{data.path} does not fit the {model.kind}: " + "; ".join(differ), fix)
    else:
        report.ok(where, "data", f"{data.path.name} and the {model.kind} agree on width, layer, marker and templates")
    if model.kind == "AV" and a.injection_scale is not None and a.injection_scale != b.injection_scale:
        text = f"injection_scale {a.injection_scale:g} in the data and {b.injection_scale} in the AV, whose own is used"
        report.warning(where, "injection scale", text)


def _variance(models: list[Found], report: Report) -> None:
    """Where the denominator of fve_nrm will come from."""
    for f in sorted((f for f in models if f.sidecar is not None), key=lambda f: f.kind):  # the AR's is preferred
        s = f.sidecar
        assert s is not None
        if s.variance_nrm is not None:
            report.ok(
                "all", "variance", f"fve_nrm is measured against variance_nrm {s.variance_nrm:g} ({f.kind} sidecar)"
            )
            return
        known = published(s.d_model, s.layer_index, s.marker_id)
        if known is not None:
            text = f"fve_nrm is measured against {known['variance_nrm']}, published for {known['name']}"
            report.ok("all", "variance", text)
            return
    if any(f.kind == "AR" for f in models):
        report.note("all", "variance", "no variance_nrm in the sidecars: fve_nrm is not shown unless it is given")
