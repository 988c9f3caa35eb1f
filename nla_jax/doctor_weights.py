"""The checks of one directory's weights: names, shapes and dtypes from the headers, and a few rows of two tensors."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from nla_jax.doctor import Report
from nla_jax.doctor_files import Found, sample_rows
from nla_jax.models.config import ModelConfig
from nla_jax.models.hf_keys import NORM, ignorable, layout_of, slots
from nla_jax.models.params import n_params
from nla_jax.models.safetensors_io import DTYPES
from nla_jax.sidecar import Sidecar
from nla_jax.tokenizer import Tokenizer

# Released pairs inject at 40 (Llama) to over 1000 (Gemma) times the norm of an ordinary token's embedding.
_INJECTION_RATIO = (1.0, 1e5)


def key_set(found: Found, cfg: ModelConfig, report: Report) -> None:
    """Every tensor that config.json implies is there, no other, each in its shape."""
    assert found.tensors is not None
    layout = layout_of(found.tensors)
    wanted = slots(cfg, head=found.kind != "AR", layout=layout)
    present = {key for key in found.tensors if not ignorable(key)}
    unused = {layout[1]} if cfg.tied and found.kind != "AR" else set()
    if found.kind == "AR" and (extra := present & {layout[0] + NORM, layout[1]}):
        unused = extra
        report.warning(
            found.path,
            "key set",
            f"an AR holds no {' and no '.join(sorted(extra))}: it is read from the raw output of its last block; "
            "they are not used here, but another client may apply them",
            "exporting the AR without them",
        )
    missing, unknown = sorted(set(wanted) - present), sorted(present - set(wanted) - unused)
    misshapen = [
        f"{key} is {list(info.shape)}, should be {list(wanted[key].shape)}"
        for key, info in found.tensors.items()
        if key in wanted and info is not None and info.shape != wanted[key].shape
    ]
    for what, keys in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen)):
        if keys:
            fix = "config.json and weights of one save"
            extra_blocks = sum(".layers." in key and key.endswith(".input_layernorm.weight") for key in keys)
            depth = f" ({extra_blocks} whole blocks; config.json says {cfg.n_layers})" if extra_blocks else ""
            report.problem(found.path, "key set", f"{len(keys)} tensors {what}{depth}: {_some(keys)}", fix)
    if not (missing or unknown or misshapen):
        head = " besides its head" if found.kind == "AR" else ""
        seen = "are there, in the right shapes" if all(found.tensors.values()) else "are in the index"
        text = f"all {len(wanted)} tensors of {_article(found.kind)}{head} {seen}"
        report.ok(found.path, "key set", text)


def gemma_by_another_name(found: Found, report: Report) -> None:
    """Gemma weights under another model_type, which drops the embedding multiplier."""
    kind = (found.config or {}).get("model_type")
    gemma_norms = any(key.endswith("pre_feedforward_layernorm.weight") for key in found.tensors or {})
    if gemma_norms and isinstance(kind, str) and not kind.startswith("gemma"):
        report.problem(
            found.path,
            "embedding scale",
            f"the weights are a Gemma model's (pre_feedforward_layernorm), but config.json says {kind}: token "
            "embeddings would not be multiplied by sqrt(D)",
            "model_type gemma3_text or gemma2 in config.json, as in the base model's",
        )


def dtypes(found: Found, report: Report) -> None:
    """How the weights are stored."""
    assert found.tensors is not None
    infos = [i for i in [*found.tensors.values(), *(found.head or {}).values()] if i is not None]
    counts = Counter(i.dtype for i in infos)
    if not counts:
        return
    listed = ", ".join(f"{n} {dtype}" for dtype, n in counts.most_common())
    if unsupported := sorted(set(counts) - set(DTYPES)):
        report.problem(
            found.path, "dtype", f"tensors of dtype {', '.join(unsupported)} ({listed})", "the unquantized checkpoint"
        )
    elif "F16" in counts and found.cfg is not None and found.cfg.scale_embeddings:
        report.warning(
            found.path,
            "dtype",
            "stored as float16, whose largest number is 65504: a Gemma residual stream passes it",
            "running it with --dtype float32 or bfloat16",
        )
    elif len(counts) > 1:
        report.note(found.path, "dtype", f"mixed dtypes: {listed}")
    elif "F32" in counts:
        report.note(found.path, "dtype", "stored as float32; --dtype bfloat16 halves the memory it needs")
    else:
        report.ok(found.path, "dtype", f"stored as {DTYPES[next(iter(counts))]}")


def memory(found: Found, cfg: ModelConfig, report: Report, layer: int | None) -> None:
    """What the weights need; `layer` is K where it is known, and then a target needs its first K + 1 blocks only."""
    what = "the whole model"
    if found.kind == "AR":
        count, what = n_params(cfg, head=False) + cfg.d_model**2, f"{cfg.n_layers} blocks and the head"
    elif found.kind == "target" and layer is not None and layer < cfg.n_layers:
        count, what = n_params(cfg.truncated(layer + 1), head=False), f"its first {layer + 1} blocks"
    else:
        count = n_params(cfg)
    stored = {i.dtype for i in (found.tensors or {}).values() if i is not None} & set(DTYPES)
    sizes = {str(DTYPES[d]): DTYPES[d].itemsize for d in stored or {"BF16"}} | {"float32": 4}
    listed = ", ".join(f"{_bytes(count * size)} in {name}" for name, size in sizes.items())
    report.note(found.path, "memory", f"weights of {what}: {listed}")


def vocabulary(found: Found, cfg: ModelConfig, tok: Tokenizer, report: Report) -> None:
    """Token ids against embedding rows."""
    if tok.vocab_size > cfg.vocab_size:
        report.problem(
            found.path,
            "vocabulary",
            f"the tokenizer has ids up to {tok.vocab_size - 1}, the embedding only {cfg.vocab_size} rows",
            "the tokenizer files of this model",
        )
    elif tok.vocab_size < cfg.vocab_size:
        report.note(
            found.path,
            "vocabulary",
            f"the embedding has {cfg.vocab_size} rows for {tok.vocab_size} token ids: padding, which is fine; an id "
            "from the padding that is sampled decodes to nothing",
        )


def embedding_scale(found: Found, cfg: ModelConfig, sidecar: Sidecar, report: Report) -> None:
    """The norm at which vectors are injected against the norm at which ordinary tokens enter."""
    info, scale = found.embedding, sidecar.injection_scale
    if info is None or info.dtype not in DTYPES or len(info.shape) != 2 or scale is None:
        return
    stored = float(np.median(np.linalg.norm(sample_rows(info, _known(found, info.shape[0])), axis=1)))
    entering = stored * (math.sqrt(cfg.d_model) if cfg.scale_embeddings else 1.0)
    ratio = scale / max(entering, 1e-12)
    multiplied = f" ({stored:.3g} x sqrt(D) = {math.sqrt(cfg.d_model):.2f})" if cfg.scale_embeddings else ""
    text = f"vectors enter at norm {scale:g}, token embeddings at {entering:.3g}{multiplied}"
    if not math.isfinite(stored):
        report.problem(found.path, "embedding", "the token embedding holds NaN or infinite numbers", "a fresh copy")
    elif not _INJECTION_RATIO[0] <= ratio <= _INJECTION_RATIO[1]:
        report.warning(
            found.path,
            "injection scale",
            f"{text}: a ratio of {ratio:.3g} is implausible (released pairs: about 40 to 1000)",
            "the AV's own sidecar, and model_type as in the base model",
        )
    else:
        report.ok(found.path, "injection scale", text)
    if cfg.scale_embeddings:
        report.note(
            found.path,
            "embedding scale",
            f"{cfg.family} multiplies token embeddings by sqrt(D); the vector replaces the marker's after that, at "
            f"exactly {scale:g}. A client that feeds input embeddings itself must multiply them, and not the vector",
        )


def value_head(found: Found, report: Report) -> None:
    """The AR's head: shape, finite numbers, and whether it ever left the identity."""
    info = (found.head or {}).get("weight")
    if info is None or found.cfg is None:
        return
    d = found.cfg.d_model
    if info.shape != (d, d) or set(found.head or {}) != {"weight"}:
        names = ", ".join(f"{k} {list(i.shape)}" for k, i in (found.head or {}).items())
        report.problem(found.path, "value head", f"value_head.safetensors holds {names}, should hold weight [{d}, {d}]")
        return
    if info.dtype not in DTYPES:
        return
    rows = np.unique(np.linspace(0, d - 1, 64).astype(int))
    sample = sample_rows(info, d)
    if not np.isfinite(sample).all():
        report.problem(found.path, "value head", "the value head holds NaN or infinite numbers", "a fresh copy")
    elif np.array_equal(sample, np.eye(d, dtype=np.float32)[rows]):
        report.note(
            found.path, "value head", "the value head is the identity: an AR that was not trained, or only its trunk"
        )
    else:
        report.ok(found.path, "value head", f"weight [{d}, {d}], not the identity")


def _known(found: Found, rows: int) -> int:
    return min(rows, found.tokenizer.vocab_size) if found.tokenizer is not None else rows


def _bytes(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 / 2 else f"{n / 2**20:.1f} MiB"


def _article(kind: str) -> str:
    return {"AV": "an AV", "AR": "an AR"}.get(kind, "the model")


def _some(keys: list[str], limit: int = 3) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")
