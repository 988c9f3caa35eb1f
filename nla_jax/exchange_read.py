"""Reading the exchange format: one parquet set and its sidecar, checked, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nla_jax.errors import InputError, SidecarError
from nla_jax.exchange import (
    DOC_ID,
    LAYER,
    OPTIONAL,
    PROMPT,
    RESPONSE,
    TEXT,
    TOKENS,
    VECTOR,
    av_messages,
)
from nla_jax.prompt import EXPLANATION_FIELD, parse_explanation, template_parts, wrap_explanation
from nla_jax.sidecar import Sidecar, read_sidecar, sidecar_path
from nla_jax.store import SPLITS

_BLOCK = 1 << 22  # elements of vectors read at a time
_ROWS = 4096
_LONGEST = 1 << 24  # tokens of a document; a larger count is no count of tokens
_FORMATS = "lists of float16, float32 or float64"


@dataclass
class Block:
    """Rows of a file, checked. `vectors` float32 [n, D]. `explanations`: None for a set without, and for a row
    whose text is not what the sidecar's template makes. What the file has no column for is None."""

    vectors: np.ndarray
    positions: np.ndarray | None  # int64 [n], 0-based
    doc_ids: list[str] | None
    texts: list[str] | None
    explanations: list[str | None] | None

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass
class SetFile:
    """A parquet set with its sidecar, opened by `open_set`. Counts grow while `blocks` is read: `dropped`, rows
    without a usable explanation; `rewrapped`, explanations in another wrapping; `rounded`, vectors of float64 that
    float32 cannot hold exactly."""

    path: Path
    sidecar: Sidecar
    stage: str
    absent: list[str]
    unknown: list[str]  # columns that the format does not have
    n_rows: int
    file: Any = field(repr=False)
    dropped: int = 0
    rewrapped: int = 0
    rounded: int = 0

    def blocks(self) -> Iterator[Block]:
        """The rows in order; InputError that names the row where something is wrong with one."""
        columns = [c for c in (PROMPT, RESPONSE, VECTOR, *OPTIONAL) if c in self.file.schema_arrow.names]
        if self.stage != "av_sft":
            columns = [c for c in columns if c != RESPONSE]
        size = max(1, min(_ROWS, _BLOCK // self.sidecar.d_model))
        start = 0
        try:
            for batch in self.file.iter_batches(batch_size=size, columns=columns):
                if len(batch):
                    yield self._block(batch, start)
                start += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.path, error) from None

    def _block(self, batch: pa.RecordBatch, start: int) -> Block:
        def column(name: str) -> pa.Array:
            found = batch.column(batch.schema.get_field_index(name))
            if found.null_count:
                self._refuse(name, start + _first(found.is_null()), "null")
            return found

        def optional(name: str) -> pa.Array | None:
            return None if name in self.absent else column(name)

        vectors = self._vectors(column(VECTOR), start)
        positions = None
        tokens, layers, ids, texts = map(optional, (TOKENS, LAYER, DOC_ID, TEXT))
        if tokens is not None:
            positions = tokens.to_numpy(zero_copy_only=False).astype(np.int64) - 1
            wrong = (positions < 0) | (positions >= _LONGEST)
            if wrong.any():
                row = int(np.argmax(wrong))
                self._refuse(TOKENS, start + row, positions[row] + 1, f"a count from 1 to {_LONGEST}")
        if layers is not None:
            wrong = layers.to_numpy(zero_copy_only=False) != self.sidecar.layer_index
            if wrong.any():
                row = int(np.argmax(wrong))
                expected = f"{self.sidecar.layer_index}, as the sidecar says"
                self._refuse(LAYER, start + row, layers[row].as_py(), expected)
        return Block(
            vectors,
            positions,
            None if ids is None else pc.cast(ids, pa.string()).to_pylist(),
            None if texts is None else texts.to_pylist(),
            self._explanations(column, start),
        )

    def _vectors(self, column: pa.Array, start: int) -> np.ndarray:
        d_model = self.sidecar.d_model
        if not pa.types.is_fixed_size_list(column.type):
            lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            if (lengths != d_model).any():
                row = int(np.argmax(lengths != d_model))
                self._refuse(VECTOR, start + row, f"{lengths[row]} numbers", f"{d_model}, the sidecar's d_model")
        values = column.flatten()
        if values.null_count:
            self._refuse(VECTOR, start + _first(values.is_null()) // d_model, "a null among its numbers")
        given = values.to_numpy(zero_copy_only=False).reshape(-1, d_model)
        with np.errstate(over="ignore"):  # found below, as infinite
            vectors = np.ascontiguousarray(given, np.float32)
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            self._refuse(VECTOR, start + int(np.argmin(finite)), "NaN or infinite", "finite float32 numbers")
        if given.dtype == np.float64:
            self.rounded += int((vectors != given).any(axis=1).sum())
        return vectors

    def _explanations(self, column: Callable[[str], pa.Array], start: int) -> list[str | None] | None:
        prompts = column(PROMPT)
        if self.stage == "ar_sft":
            return self._count([self._of_ar(text) for text in prompts.to_pylist()])
        expected = av_messages(self.sidecar)
        given = pa.array([expected], _message_type(prompts.type))
        same = prompts.value_lengths().to_numpy(zero_copy_only=False) == len(expected)
        if same.all():
            flat, wanted = prompts.flatten(), given.flatten()
            for name in ("role", "content"):
                same &= pc.equal(pc.struct_field(flat, name), pc.struct_field(wanted, name)[0]).to_numpy(False)
        if not same.all():
            row = int(np.argmin(same))
            got = " ".join(repr(prompts[row].as_py()).split())
            got = got if len(got) < 120 else f"{got[:60]}...{got[-57:]}"
            self._refuse(PROMPT, start + row, got, "the sidecar's AV template with <INJECT>")
        if self.stage == "rl":
            return None
        return self._count([self._of_av(text) for text in column(RESPONSE).to_pylist()])

    def _of_ar(self, prompt: str) -> str | None:
        assert self.sidecar.ar_template is not None
        before, after = template_parts(self.sidecar.ar_template, EXPLANATION_FIELD)
        fits = prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before) + len(after)
        return prompt[len(before) : len(prompt) - len(after)] if fits else None

    def _of_av(self, response: str) -> str | None:
        before, after = wrap_explanation("\0").split("\0")
        inner = response[len(before) : len(response) - len(after)]
        if wrap_explanation(inner) == response:
            return inner
        text, failed = parse_explanation(response, True)
        self.rewrapped += not failed
        return None if failed else text

    def _count(self, explanations: list[str | None]) -> list[str | None]:
        self.dropped += sum(e is None for e in explanations)
        return explanations

    def _refuse(self, column: str, row: int, got: object, expected: object = None) -> None:
        raise InputError(f"{self.path}: row {row}, {column}", expected=expected or "a value in every row", got=got)


def open_set(path: str | Path) -> SetFile:
    """A set by its parquet file; SidecarError or InputError in one line if it cannot be one."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such file", expected="a parquet file")
    try:
        file = pq.ParquetFile(path)
        schema = file.schema_arrow
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    where = sidecar_path(path)
    if not where.is_file():
        fix = "the file that lies beside it where it comes from"
        raise SidecarError(f"{path} has no sidecar", expected=where.name, got="none", fix=fix)
    sidecar = read_sidecar(path)
    stage = _check_sidecar(sidecar, where)
    needed = [PROMPT, VECTOR, *([RESPONSE] if stage == "av_sft" else [])]
    for name in needed:
        if name not in schema.names:
            got = ", ".join(schema.names) or "none"
            raise InputError(f"{path}: column {name} of a set of stage {stage}", expected="it", got=got)
    known = {PROMPT, RESPONSE, VECTOR, *OPTIONAL}
    opened = SetFile(
        path=path,
        sidecar=sidecar,
        stage=stage,
        absent=[name for name in OPTIONAL if name not in schema.names],
        unknown=[name for name in schema.names if name not in known],
        n_rows=file.metadata.num_rows,
        file=file,
    )
    _check_types(path, schema, stage, sidecar.d_model)
    if not opened.n_rows:
        raise InputError(f"{path} holds no rows")
    return opened


def _check_sidecar(sidecar: Sidecar, where: Path) -> str:
    if sidecar.kind != "nla_dataset":
        raise SidecarError(f"{where}: kind", expected="nla_dataset", got=sidecar.kind)
    if sidecar.stage not in SPLITS:
        raise SidecarError(f"{where}: stage", expected=" or ".join(SPLITS), got=sidecar.stage)
    norm = (sidecar.raw.get("extraction") or {}).get("norm", "none")
    if norm != "none":
        fix = "the set with raw vectors"
        raise SidecarError(f"{where}: extraction.norm", expected="none (raw vectors)", got=norm, fix=fix)
    sidecar.need_layer_index(where)
    template = "ar" if sidecar.stage == "ar_sft" else "av"
    if getattr(sidecar, f"{template}_template") is None:
        raise SidecarError(f"{where}: prompt_templates.{template}", expected="a template", got="none")
    return sidecar.stage


def _check_types(path: Path, schema: pa.Schema, stage: str, d_model: int) -> None:
    def wrong(name: str, expected: str) -> InputError:
        return InputError(f"{path}: column {name}", expected=expected, got=schema.field(name).type)

    t = pa.types
    vector = schema.field(VECTOR).type
    if not (t.is_list(vector) or t.is_large_list(vector) or t.is_fixed_size_list(vector)):
        raise wrong(VECTOR, _FORMATS)
    if not t.is_floating(vector.value_type):
        raise wrong(VECTOR, _FORMATS)
    if t.is_fixed_size_list(vector) and vector.list_size != d_model:
        raise wrong(VECTOR, f"lists of {d_model} (the sidecar's d_model)")
    prompt = schema.field(PROMPT).type
    if stage == "ar_sft" and not _is_text(prompt):
        raise wrong(PROMPT, "text")
    if stage != "ar_sft" and _message_type(prompt) is None:
        raise wrong(PROMPT, "lists of messages {role, content}")
    if stage == "av_sft" and not _is_text(schema.field(RESPONSE).type):
        raise wrong(RESPONSE, "text")
    for name, wanted in OPTIONAL.items():
        if name in schema.names:
            given = schema.field(name).type
            integer = t.is_integer(given)
            if not (integer if t.is_integer(wanted) else _is_text(given) or (name == DOC_ID and integer)):
                raise wrong(name, "integers" if t.is_integer(wanted) else "text")


def _is_text(given: pa.DataType) -> bool:
    return pa.types.is_string(given) or pa.types.is_large_string(given)


def _message_type(given: pa.DataType) -> pa.DataType | None:
    """`given` if it is a list of structs with role and content."""
    if not (pa.types.is_list(given) or pa.types.is_large_list(given)):
        return None
    inner = given.value_type
    if not pa.types.is_struct(inner) or not {"role", "content"} <= {f.name for f in inner}:
        return None
    return given if _is_text(inner.field("role").type) and _is_text(inner.field("content").type) else None


def _first(mask: pa.Array) -> int:
    return int(np.argmax(mask.to_numpy(zero_copy_only=False)))


def _unreadable(path: Path, error: Exception) -> InputError:
    got = " ".join(str(error).split())[:200]
    return InputError(f"{path}: not a readable parquet file", got=got, fix="the whole file; it may be half-written")


def check_together(files: Sequence[SetFile]) -> Sidecar:
    """What the sidecars of several sets say together; SidecarError names the first field in which two differ."""
    names = (
        "d_model layer_index base_model marker marker_id left_id right_id injection_mode injection_scale mse_scale "
        "variance_nrm ar_suffix_ids av_template ar_template"
    ).split()
    known: dict[str, tuple[Any, Path]] = {}
    for file in files:
        for name in names:
            value = getattr(file.sidecar, name)
            if value is None:
                continue
            first, where = known.setdefault(name, (value, file.path))
            if first != value:
                expected = f"{' '.join(str(first).split())[:80]} as in {where}"
                got = " ".join(str(value).split())[:80]
                fix = "stores of their own for sets that do not belong together"
                raise SidecarError(f"{file.path}: {name}", expected=expected, got=got, fix=fix)
    values: dict[str, Any] = {name: value for name, (value, _) in known.items()}
    return replace(files[0].sidecar, stage=None, raw={}, **values)
