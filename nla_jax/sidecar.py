"""nla_meta.yaml: what a checkpoint or dataset was made with, and the check of it against the live tokenizer.

A model directory holds `nla_meta.yaml` (kind nla_model); a data file has `{name}.nla_meta.yaml` beside it
(kind nla_dataset). The format is that of the PyTorch reference (nla/schema.py there): versions 1 and 2 and
the older key names are read, version 2 is written, and keys that are unknown here are kept.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import yaml

from nla_jax.errors import PromptError, SidecarError
from nla_jax.prompt import (
    EXPLANATION_FIELD,
    INJECT,
    MARKER_FIELD,
    ar_prompt_ids,
    av_prompt_ids,
    find_marker,
    template_parts,
)

if TYPE_CHECKING:
    from nla_jax.tokenizer import Tokenizer

NAME = "nla_meta.yaml"
SQRT_D = "sqrt_d_model"
_ROLES = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}
_MODES = ("replace", "add_norm_matched")
_SAMPLE = "A sample explanation, of 2 parts {with braces}: the end."


@dataclass(frozen=True)
class Sidecar:
    """The facts of a sidecar. Two are equal when they mean the same; `raw`, what was read, does not count.

    - `layer_index`: K, 0-based, the output of block K (Hugging Face: hidden_states[K+1]).
    - `injection_scale`: L2 norm at which a vector is injected; None where it was never chosen.
    - `mse_scale`: L2 norm of both sides before the error; None is the reference's raw mode.
    - `marker`, `marker_id`, `left_id`, `right_id`: what the vector replaces, its token, its neighbours.
    - `ar_suffix_ids`: the ids that end every AR prompt; None where they were not recorded.
    - `variance_nrm`: variance of v_n over the training set (mean over D), the denominator of fve_nrm.
    """

    kind: Literal["nla_model", "nla_dataset"]
    role: Literal["av", "ar"] | None
    d_model: int
    layer_index: int | None
    injection_scale: float | None
    mse_scale: float | None
    injection_mode: Literal["replace", "add_norm_matched"]
    marker: str
    marker_id: int
    left_id: int
    right_id: int
    ar_suffix_ids: tuple[int, ...] | None
    av_template: str | None
    ar_template: str | None
    variance_nrm: float | None = None
    base_model: str | None = None
    stage: str | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def need_injection_scale(self, source: object = "sidecar") -> float:
        """injection_scale, or a SidecarError where it is not set."""
        if self.injection_scale is None:
            fix = "the AV's own sidecar, or passing the scale it was trained with"
            raise _error(source, "extraction.injection_scale", "the norm to inject at", "none (scale missing)", fix)
        return self.injection_scale

    def need_mse_scale(self, source: object = "sidecar") -> float:
        """mse_scale, or a SidecarError in raw mode: scores here compare directions at one norm."""
        if self.mse_scale is None:
            fix = "an AR trained with mse_scale: sqrt_d_model"
            raise _error(source, "extraction.mse_scale", "a norm", "null (raw mode, which is not supported)", fix)
        return self.mse_scale

    def need_layer_index(self, source: object = "sidecar") -> int:
        """layer_index, or a SidecarError where it is not set."""
        if self.layer_index is None:
            fix = "adding it: K when vectors are the output of block K (hidden_states[K+1])"
            raise _error(source, "extraction_layer_index", "the layer of the vectors", "none", fix)
        return self.layer_index

    def check(self, tokenizer: Tokenizer, source: object = "sidecar") -> None:
        """Raises SidecarError where the live tokenizer does not do what the sidecar says.

        The marker is one token, alone and in the rendered AV prompt, between its neighbours; the AR prompt
        ends with the suffix ids; neither prompt has BOS twice. The AV prompt of an AR is checked only if its
        tokenizer has a chat template, since an AR never renders one.
        """
        fix = "the tokenizer that this checkpoint was trained with"
        ids = tokenizer.encode(self.marker, parse_special=True)
        if len(ids) == 2 and tokenizer.token_str(ids[0]) == " ":
            ids = ids[1:]  # the space that SentencePiece tokenizers put before a text
        if ids != [self.marker_id]:
            raise _error(source, "tokens.injection_token_id", f"{self.marker!r} to be [{self.marker_id}]", ids, fix)
        if self.marker_id == tokenizer.unk_id:
            raise _error(
                source,
                "tokens.injection_char",
                "a character of the vocabulary",
                f"{self.marker!r}, unknown",
                fix,
            )
        if self.av_template is not None and (self.role != "ar" or tokenizer.chat_template is not None):
            try:
                prompt = av_prompt_ids(tokenizer, self)
                find_marker(prompt, self)
            except PromptError as e:
                raise _error(source, e.what, e.expected, e.got, e.fix or fix) from None
            _check_bos(source, "prompt_templates.av", prompt, tokenizer)
        if self.ar_template is not None:
            try:
                prompt = ar_prompt_ids(tokenizer, self, _SAMPLE)
            except PromptError as e:
                raise _error(source, e.what, e.expected, e.got, e.fix or fix) from None
            _check_bos(source, "prompt_templates.ar", prompt, tokenizer)


def sidecar_path(path: str | Path) -> Path:
    """Where the sidecar of a model directory or data file is; a sidecar's own path is returned as it is.

    A path that does not exist is taken for a directory when its name has no suffix. The reference's slices of
    a parquet file (`rows.parquet@[0:1000]`) are understood.
    """
    p = Path(str(path).split("@[")[0])
    if p.name == NAME or p.name.endswith("." + NAME):
        return p
    if p.is_dir() or (not p.exists() and not p.suffix):
        return p / NAME
    return p.with_name(f"{p.name}.{NAME}")


def read_sidecar(path: str | Path) -> Sidecar:
    """The sidecar of a model directory, a data file, or at its own path; SidecarError in one line."""
    where = sidecar_path(path)
    if not where.is_file():
        fix = "the directory of an NLA checkpoint; the sidecar lies beside its config.json"
        raise SidecarError(f"{where}: no sidecar", expected="a file", got="none", fix=fix)
    try:
        raw = yaml.safe_load(where.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as e:
        raise SidecarError(f"{where}: not readable as YAML", got=e, fix="downloading it again") from None
    return parse_sidecar(raw, where)


def parse_sidecar(raw: Any, source: object = "sidecar") -> Sidecar:
    """A sidecar from the mapping that its YAML holds."""
    top = _Reader(raw, "", source)
    kind = top.one_of("kind", ("nla_model", "nla_dataset"))
    version = top.get("schema_version", 1)
    if version not in (1, 2) or isinstance(version, bool):
        fix = "a newer nla_jax, or the sidecar of an earlier release"
        raise _error(source, "schema_version", "1 or 2", repr(version), fix)
    extraction, tokens = top.sub("extraction"), top.sub("tokens")
    templates, critic = top.sub("prompt_templates"), top.sub("critic")

    role = None
    if top.get("role") is not None or kind == "nla_model":
        role = _ROLES[top.one_of("role", tuple(_ROLES))]
    d_model = (extraction if kind == "nla_dataset" else top).integer("d_model", least=1)
    layers = {
        r.prefix + key: r.integer(key, least=0)
        for r, key in (
            (top, "extraction_layer_index"),
            (extraction, "layer_index"),
            (critic, "extraction_layer_index"),
            (critic, "num_hidden_layers"),  # version 1; despite its name it holds K
        )
        if r.get(key) is not None
    }
    if "critic.extraction_layer_index" in layers:
        layers.pop("critic.num_hidden_layers", None)
    if len(set(layers.values())) > 1:
        got = ", ".join(f"{k} {v}" for k, v in layers.items())
        raise _error(source, "layer index", "one value", got, "keeping the K whose block output was extracted")

    suffix = tokens.get("critic_suffix_ids")
    if suffix is not None:
        if not isinstance(suffix, list) or not suffix or not all(type(i) is int and i >= 0 for i in suffix):
            raise _error(source, "tokens.critic_suffix_ids", "a list of token ids", repr(suffix))
        suffix = tuple(suffix)
    av = templates.text("av", templates.text("actor"))
    ar = templates.text("ar", templates.text("critic"))
    if role != "ar" and av is None and (role == "av" or ar is None):
        raise _error(source, "prompt_templates.av", "a template", "none", "the sidecar of the released checkpoint")
    if role == "ar" and ar is None:
        raise _error(source, "prompt_templates.ar", "a template", "none", "the sidecar of the released checkpoint")
    marker = tokens.text("injection_char")
    if not marker:
        raise _error(source, "tokens.injection_char", "the marker", "none", "the sidecar of the released checkpoint")
    for name, template, fields in (("av", av, (MARKER_FIELD, INJECT)), ("ar", ar, (EXPLANATION_FIELD,))):
        if template is not None:
            n = sum(len(template_parts(template, f)) - 1 if f[0] == "{" else template.count(f) for f in fields)
            if n != 1:
                raise _error(source, f"prompt_templates.{name}", f"{fields[0]} once", f"{n} times in {template[:60]!r}")

    return Sidecar(
        kind=cast(Any, kind),
        role=cast(Any, role),
        d_model=d_model,
        layer_index=next(iter(layers.values()), None),
        injection_scale=extraction.scale("injection_scale", d_model, None),
        mse_scale=extraction.scale("mse_scale", d_model, SQRT_D),
        injection_mode=cast(Any, extraction.one_of("injection_mode", _MODES, "replace")),
        marker=marker,
        marker_id=tokens.integer("injection_token_id"),
        left_id=tokens.integer("injection_left_neighbor_id"),
        right_id=tokens.integer("injection_right_neighbor_id"),
        ar_suffix_ids=suffix,
        av_template=av,
        ar_template=ar,
        variance_nrm=extraction.scale("variance_nrm", d_model, None),
        base_model=extraction.text("base_model", top.text("base_checkpoint", top.text("base_model"))),
        stage=top.text("stage"),
        raw=top.data,
    )


def sidecar_to_dict(sidecar: Sidecar) -> dict[str, Any]:
    """The mapping to write: `sidecar.raw` under the key names of version 2, with every field as it is now."""
    out = copy.deepcopy(sidecar.raw)
    before = parse_sidecar(out) if out else None
    out.update(kind=sidecar.kind, schema_version=2)
    extraction, tokens, templates = (_own(out, k) for k in ("extraction", "tokens", "prompt_templates"))
    for old, new in (("actor", "av"), ("critic", "ar")):
        templates.pop(old, None)
        templates[new] = getattr(sidecar, f"{new}_template")
    if sidecar.role is not None:
        out["role"] = sidecar.role
    if sidecar.stage is not None or "stage" in out:
        out["stage"] = sidecar.stage
    is_data = sidecar.kind == "nla_dataset"
    (extraction if is_data else out)["d_model"] = sidecar.d_model
    if not is_data and "d_model" in extraction:
        extraction["d_model"] = sidecar.d_model
    for key in ("injection_scale", "mse_scale", "variance_nrm"):
        value = getattr(sidecar, key)
        # As numbers, never as "sqrt_d_model": the reference's AR reader takes extraction.mse_scale for a
        # number.
        if value is not None or key in extraction or key == "mse_scale":
            extraction[key] = None if value is None else float(value)
    if sidecar.injection_mode != "replace" or "injection_mode" in extraction:
        extraction["injection_mode"] = sidecar.injection_mode
    if before is None or sidecar.base_model != before.base_model:
        for key in ("base_checkpoint", "base_model"):
            out.pop(key, None)
        extraction.pop("base_model", None)
        if sidecar.base_model is not None:
            (extraction if is_data else out)["base_model" if is_data else "base_checkpoint"] = sidecar.base_model
    tokens.update(
        injection_char=sidecar.marker,
        injection_token_id=sidecar.marker_id,
        injection_left_neighbor_id=sidecar.left_id,
        injection_right_neighbor_id=sidecar.right_id,
        critic_suffix_ids=None if sidecar.ar_suffix_ids is None else list(sidecar.ar_suffix_ids),
    )
    k = sidecar.layer_index
    critic = out.get("critic") or {}
    critic.pop("num_hidden_layers", None)
    if k is not None:
        out["extraction_layer_index"] = k
        if is_data or "layer_index" in extraction:
            extraction["layer_index"] = k
        if sidecar.role == "ar" or critic:
            critic["extraction_layer_index"] = k
    else:
        for place, key in ((out, "extraction_layer_index"), (extraction, "layer_index")):
            place.pop(key, None)
        critic.pop("extraction_layer_index", None)
    if critic:
        out["critic"] = critic
    return out


def write_sidecar(sidecar: Sidecar, path: str | Path) -> Path:
    """Writes the sidecar of a model directory or data file (version 2) in one step; returns its path."""
    where = sidecar_path(path)
    content = sidecar_to_dict(sidecar)
    parse_sidecar(content, where)  # never write what could not be read
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{where.name}.", dir=where.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
            os.replace(temporary, where)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise SidecarError(f"{where}: cannot be written", got=e) from None
    return where


def _own(out: dict[str, Any], key: str) -> dict[str, Any]:
    if out.get(key) is None:
        out[key] = {}
    return out[key]


def _check_bos(source: object, name: str, ids: list[int], tokenizer: Tokenizer) -> None:
    if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        raise _error(source, name, "BOS once at most", f"{ids[:3]}...", "a template without the BOS string")


def _error(source: object, name: str, expected: object, got: object, fix: str | None = None) -> SidecarError:
    return SidecarError(f"{source}: {name}", expected=expected, got=got, fix=fix)


class _Dumper(yaml.SafeDumper):
    """Quotes text with Unicode's own line ends so that they are read back; PyYAML would fold them."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        folds = any(c in text for c in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if folds else None)


_Dumper.add_representer(str, _Dumper.represent_text)


class _Reader:
    """One mapping of a sidecar; every read says which field it was and what it should have been."""

    def __init__(self, data: Any, prefix: str, source: object):
        if not isinstance(data, dict):
            what = prefix.rstrip(".") or "nla_meta.yaml"
            raise _error(source, what, "a mapping", type(data).__name__, "the sidecar of the released checkpoint")
        self.data, self.prefix, self.source = data, prefix, source

    def get(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)

    def sub(self, key: str) -> _Reader:
        value = self.data.get(key)
        return _Reader({} if value is None else value, f"{self.prefix}{key}.", self.source)

    def fail(self, key: str, expected: str) -> SidecarError:
        got = repr(self.data[key])[:80] if key in self.data else "nothing (the key is missing)"
        return _error(self.source, self.prefix + key, expected, got)

    def one_of(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or value not in allowed:
            raise self.fail(key, " or ".join(allowed))
        return value

    def integer(self, key: str, least: int = 0) -> int:
        value = self.data.get(key)
        if type(value) is not int or value < least:
            raise self.fail(key, f"an integer of at least {least}")
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.data.get(key)
        if value is None or value == "":
            return default
        if not isinstance(value, str):
            raise self.fail(key, "text")
        return value

    def scale(self, key: str, d_model: int, absent: str | None) -> float | None:
        """A positive number, also as text; "sqrt_d_model"; None for null, "raw" and "none"."""
        value = self.data.get(key, absent)
        if value is None or value in ("raw", "none"):
            return None
        if value == SQRT_D:
            return math.sqrt(d_model)
        try:
            number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number > 0):
            raise self.fail(key, f"a positive number, {SQRT_D!r} or null")
        return number
