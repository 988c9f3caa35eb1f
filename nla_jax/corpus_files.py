"""The files a corpus may consist of, as a stream of rows.

A row is anything that may become one document: a line of JSON, a row of a table, a piece of a text file. Every reader
yields `(row number, value)` in order, the number counted from 0 within the file and independent of what is skipped,
so that a document keeps its name whatever else is read. A value is a dict, a str, or a `Bad` row that says why there
is no document in it. Files are read a block at a time, however large they are.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from nla_jax.errors import HubError, InputError

MAX_LINE = 1 << 26  # bytes of one line or JSON value: longer ones are no documents
_BLOCK = 1 << 20
_TABLE_ROWS = 64  # rows turned into Python values at a time
_PACKED = (".gz", ".zst")
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
# Files of Hugging Face `datasets` directories that describe the data and are none.
_METADATA = {"state.json", "dataset_info.json", "dataset_dict.json", "dataset_infos.json"}


@dataclass(frozen=True)
class Bad:
    """A row without a document: `reason` is the name it is counted under."""

    reason: str
    why: str


@dataclass(frozen=True)
class CorpusFile:
    path: Path
    kind: str
    stem: str  # what its documents are named by


Row = tuple[int, Any]


def kind_of(path: Path) -> str | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1].lower() in _PACKED:
        suffixes = suffixes[:-1]
    return KINDS.get(suffixes[-1].lower()) if suffixes else None


def find_files(source: Path, split: str | None) -> list[CorpusFile]:
    """The files of a file or directory, sorted; InputError in one line if there are none."""
    if source.is_file():
        return [CorpusFile(source, kind_of(source) or "text", _stem(Path(source.name)))]
    if not source.exists():
        raise InputError(f"{source}: no such file or directory", expected="a corpus", fix="check the path")
    if (source / "dataset_dict.json").is_file():
        source, split = _dataset_split(source, split), None
    if (source / "state.json").is_file():
        return _saved_dataset(source)
    paths = sorted(p for p in source.rglob("*") if kind_of(p) and p.name not in _METADATA and p.is_file())
    paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(source).parts)]
    if split is not None:
        # As on the hub: data/train-00000-of-00002.parquet, train.jsonl, train/part0.jsonl
        wanted = re.compile(rf"(?:^|[/_.-]){re.escape(split)}(?:[/_.-]|$)")
        chosen = [p for p in paths if wanted.search(p.relative_to(source).as_posix())]
        if paths and not chosen:
            raise InputError(f"{source}: no files of split {split!r}", got=_some(paths, source))
        paths = chosen
    if not paths:
        kinds = " ".join(KINDS)
        raise InputError(f"{source}: no files to read", expected=f"{kinds}, or those with .gz or .zst added")
    names = [_stem(p.relative_to(source)) for p in paths]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    return [
        CorpusFile(p, kind_of(p) or "text", p.relative_to(source).as_posix() if name in twice else name)
        for p, name in zip(paths, names, strict=True)
    ]


def _stem(relative: Path) -> str:
    name = relative.name
    while Path(name).suffix.lower() in (*_PACKED, *KINDS):
        name = Path(name).stem
    return relative.with_name(name or relative.name).as_posix()


def _some(paths: list[Path], source: Path) -> str:
    return ", ".join(p.relative_to(source).as_posix() for p in paths[:3]) + (" ..." if len(paths) > 3 else "")


def _dataset_split(source: Path, split: str | None) -> Path:
    try:
        splits = [str(s) for s in json.loads((source / "dataset_dict.json").read_text())["splits"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source}/dataset_dict.json is not readable", got=repr(error)) from None
    if split is None:
        split = splits[0] if len(splits) == 1 else "train"
    if split not in splits:
        raise InputError(f"{source}: split {split!r}", expected=" or ".join(splits), fix="--split")
    return source / split


def _saved_dataset(source: Path) -> list[CorpusFile]:
    try:
        state = json.loads((source / "state.json").read_text())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
        selected = state.get("_indices_data_files") or state.get("_indices_files")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{source}/state.json is not readable", got=repr(error)) from None
    if selected:
        fix = "dataset.flatten_indices() before save_to_disk"
        raise InputError(f"{source}: a selection of rows over other files", expected="plain rows", fix=fix)
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise InputError(f"{source}/{missing[0]} is missing", expected="the files that state.json names")
    return [CorpusFile(source / name, "arrow", Path(name).stem) for name in names]


def download(name: str, split: str | None) -> Path:
    """A hub dataset `org/name` or `org/name@revision` as a local directory: its parquet and JSON lines files only."""
    # Imported here: it takes a second, and local files need none of it.
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"hub:{name}", expected="hub:org/name or hub:org/name@revision")
    patterns = [f"*{ending}{packed}" for ending in (".parquet", ".jsonl") for packed in ("", *_PACKED)]
    if split is not None:
        patterns = [f"*{split}*{pattern[1:]}" for pattern in patterns] + [f"*{split}*/{p}" for p in patterns]
    try:
        return Path(
            snapshot_download(repository, repo_type="dataset", revision=revision or None, allow_patterns=patterns)
        )
    except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        got = type(error).__name__
        fix = "check the spelling; `hf auth login` where the dataset is gated or private"
        raise HubError(f"hub:{name} cannot be read", got=got, fix=fix) from None
    except Exception as error:  # its HTTP client is not ours to name, and differs between versions
        got = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        fix = "check the connection (HF_ENDPOINT, HF_HUB_OFFLINE, proxy), or a corpus on disk"
        raise HubError(f"hub:{name} cannot be downloaded", got=got, fix=fix) from None


def read_rows(file: CorpusFile, *, text_split: str, columns: list[str] | None, skip: int) -> Iterator[Row]:
    """Rows of one file; those before number `skip` may be left out. `columns`: of a table, those that are needed."""
    try:
        if file.kind == "parquet":
            yield from _parquet(file.path, columns, skip)
        elif file.kind == "arrow":
            yield from _arrow(file.path, columns, skip)
        elif file.kind == "text":
            yield from _text(file.path, text_split)
        elif file.kind == "json" and _first_byte(file.path) == b"[":
            yield from _json_list(file.path)
        else:
            yield from _json_lines(file.path)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        # What was read before stays; a file that cannot be read further is one fault, not the end of the corpus.
        why = " ".join(str(error).split())[:200] or type(error).__name__
        yield -1, Bad("unreadable", f"the file cannot be read further: {why}")


def column_names(file: CorpusFile) -> list[str] | None:
    """Columns of a table; None for files that are none or cannot be read."""
    try:
        if file.kind == "parquet":
            return list(pq.read_schema(file.path).names)
        if file.kind == "arrow":
            with pa.memory_map(str(file.path)) as source:
                return list(pa.ipc.open_stream(source).schema.names)
    except (OSError, pa.ArrowException):
        pass
    return None


def _open(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 16))
    return open(path, "rb", buffering=_BLOCK)


def _first_byte(path: Path) -> bytes:
    with _open(path) as stream:
        return stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their ends; None for one longer than MAX_LINE."""
    for number in itertools.count():
        line = stream.readline(MAX_LINE)
        if not line:
            return
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE)
            yield number, None
        else:
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


def _json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as stream:
        for number, line in _lines(stream):
            if line is None:
                yield number, Bad("too_long", f"a line of more than {MAX_LINE >> 20} MiB")
            elif line.strip():
                yield number, _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Bad("not_utf8", f"not UTF-8 (byte {error.start} of the line)")
    except RecursionError:
        return Bad("malformed", "nested too deeply")
    except ValueError as error:
        return Bad("malformed", f"not JSON ({error})")


def _json_list(path: Path) -> Iterator[Row]:
    """The items of one JSON list, decoded one by one."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\n\r]*")
    with _open(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape") as text:
        buffer, at, ended = text.read(_BLOCK), 0, False
        at = space.match(buffer).end() + 1  # type: ignore[union-attr]  # the opening bracket, which the caller saw
        for number in itertools.count():
            while True:
                at = space.match(buffer, at).end()  # type: ignore[union-attr]
                try:
                    if at < len(buffer) and buffer[at] in ",]":
                        if buffer[at] == "]":
                            return
                        at += 1
                        continue
                    value, end = decoder.raw_decode(buffer, at)
                    # A number or a cut word may go on behind the buffer; a bracket or quote ends the value.
                    if end < len(buffer) or ended or buffer[end - 1] in '}]"':
                        break
                except RecursionError:
                    yield number, Bad("malformed", "nested too deeply; the rest of the list was not read")
                    return
                except ValueError as error:
                    if ended or len(buffer) - at > MAX_LINE:
                        yield number, Bad("malformed", f"not JSON ({error}); the rest of the list was not read")
                        return
                more = text.read(max(_BLOCK, len(buffer) - at))
                ended = not more
                buffer, at = buffer[at:] + more, 0
            yield number, value
            at = end


def _parquet(path: Path, columns: list[str] | None, skip: int) -> Iterator[Row]:
    with pq.ParquetFile(path) as table:
        first, groups = 0, list(range(table.metadata.num_row_groups))
        while groups and first + table.metadata.row_group(groups[0]).num_rows <= skip:
            first += table.metadata.row_group(groups.pop(0)).num_rows
        for batch in table.iter_batches(_TABLE_ROWS, row_groups=groups, columns=columns):
            yield from enumerate(_python_rows(batch), first)
            first += batch.num_rows


def _arrow(path: Path, columns: list[str] | None, skip: int) -> Iterator[Row]:
    first = 0
    with pa.memory_map(str(path)) as source:
        for batch in pa.ipc.open_stream(source):
            if first + batch.num_rows > skip:
                chosen = batch if columns is None else batch.select(columns)
                for start in range(0, batch.num_rows, _TABLE_ROWS):
                    yield from enumerate(_python_rows(chosen.slice(start, _TABLE_ROWS)), first + start)
            first += batch.num_rows


def _python_rows(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        pass
    rows: list[Any] = []
    for i in range(batch.num_rows):
        try:
            rows += batch.slice(i, 1).to_pylist()
        except UnicodeDecodeError:
            rows.append(Bad("not_utf8", "not UTF-8"))
    return rows


def check_text_split(text_split: str) -> str:
    if not re.fullmatch(r"file|paragraph|lines|words:[1-9]\d*", text_split):
        raise InputError("text_split", expected="file, paragraph, lines or words:N", got=repr(text_split))
    return text_split


def _text(path: Path, text_split: str) -> Iterator[Row]:
    """A text file as one document, or cut at blank lines, line ends, or after every N words."""
    if text_split == "file":
        with _open(path) as stream:
            data = stream.read(MAX_LINE).removeprefix(b"\xef\xbb\xbf")
            whole = not stream.read(1)
        yield 0, _decoded(data, "the file", whole)
        return
    with _open(path) as stream:
        for number, piece in enumerate(_pieces(stream, text_split)):
            if isinstance(piece, Bad) or any(not c.isspace() for c in piece):
                yield number, piece


def _pieces(stream: BinaryIO, text_split: str) -> Iterator[str | Bad]:
    waiting: list[bytes] = []
    words, wanted = 0, int(text_split.partition(":")[2] or 0)
    for number, line in _lines(stream):
        if line is None:
            yield Bad("too_long", f"line {number + 1}: more than {MAX_LINE >> 20} MiB")
            continue
        if text_split == "lines":
            yield _decoded(line.rstrip(b"\r\n"), f"line {number + 1}")
        elif text_split == "paragraph":
            if line.strip():
                waiting.append(line)
            elif waiting:
                yield _decoded(b"".join(waiting).rstrip(b"\r\n"), f"the paragraph that ends at line {number}")
                waiting = []
        else:
            at = 0
            for match in re.finditer(rb"\S+\s*", line):
                words += 1
                if words == wanted:
                    piece = b"".join([*waiting, line[at : match.end()]])
                    yield _decoded(piece, f"the words up to line {number + 1}")
                    waiting, words, at = [], 0, match.end()
            waiting.append(line[at:])
        if sum(map(len, waiting)) > MAX_LINE:
            yield Bad("too_long", f"the piece that ends at line {number + 1}")
            waiting, words = [], 0
    if waiting:
        rest = b"".join(waiting)
        yield _decoded(rest.rstrip(b"\r\n") if text_split == "paragraph" else rest, "the last piece")


def _decoded(data: bytes, where: str, whole: bool = True) -> str | Bad:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not whole and error.start > len(data) - 4:  # cut inside a character
            return data[: error.start].decode("utf-8")
        reason = "binary" if b"\0" in data else "not_utf8"
        return Bad(reason, f"{where}: not UTF-8 (byte {error.start})")
