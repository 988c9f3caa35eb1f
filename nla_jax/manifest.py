"""What an activation store says about itself: the specification it was made from, and `manifest.json`.

    manifest.json    format, version, status ("extracting" or "complete"), n_rows, n_docs, d_model, dtype, layers,
                     shard_rows, chunk_rows, model, tokenizer, settings, corpus, arrays, hash
    rows/*           one integer per row: doc, position, token_id, role, layer, text_end
    docs/*           texts and ids as UTF-8 bytes plus offsets, token ids plus offsets, n_tokens, later split
    vectors          [n_rows, d_model], one shard file per shard_rows rows
    done/0000012.json  one record per finished shard

`arrays` gives the sha256 of each array's elements in order, little-endian; that of `vectors` is the sha256 over the
shards' own, as hexadecimal text one after another. `hash` is the sha256 of everything else in the manifest. No file
holds a time, a host or a path of the machine, so the same corpus, model and settings give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nla_jax.arrays import DTYPES, Root, canonical
from nla_jax.errors import StoreError

FORMAT, VERSION = "nla_jax.store", 1
MANIFEST = "manifest.json"
ROLES = ("text", "system", "user", "assistant", "tool", "template")  # a row's `role` is an index into this
ROW_DTYPES = {
    "doc": "int32",  # index of the document in the store
    "position": "int32",  # 0-based token position in the document
    "token_id": "int32",
    "role": "int8",
    "layer": "int16",
    "text_end": "int32",  # bytes of the document's text up to and including the token
}
_COMPARED = ("format", "version", "d_model", "dtype", "layers", "shard_rows", "chunk_rows")
_GROUPS = ("model", "tokenizer", "settings", "corpus")


@dataclass(frozen=True)
class StoreSpec:
    """What a store is to be made of; two runs may share a store only if all of it is equal.

    `layers` are 0-based blocks whose output is stored. `model` is {name, config_sha256, weights, n_layers},
    `tokenizer` {fingerprint}, `settings` whatever else decides which rows there are and what they hold (seed,
    positions, lengths, kind), `corpus` {name, ...} without the counts, which are known later.
    """

    d_model: int
    layers: tuple[int, ...]
    model: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    corpus: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    shard_rows: int = 1024
    chunk_rows: int = 1

    def __post_init__(self) -> None:
        def refuse(name: str, expected: str) -> None:
            raise StoreError(f"store specification: {name}", expected=expected, got=repr(getattr(self, name)))

        if self.dtype not in DTYPES:
            refuse("dtype", " or ".join(DTYPES))
        if self.d_model < 1:
            refuse("d_model", "at least 1")
        if not self.layers or len(set(self.layers)) != len(self.layers) or not 0 <= min(self.layers) < 2**15:
            refuse("layers", "different block numbers, 0 or more")
        if self.chunk_rows < 1 or self.shard_rows < 1 or self.shard_rows % self.chunk_rows:
            refuse("shard_rows", f"a multiple of chunk_rows ({self.chunk_rows})")

    def fields(self) -> dict[str, Any]:
        """The manifest's entries that are known before any document is read."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "d_model": self.d_model,
            "dtype": self.dtype,
            "layers": list(self.layers),
            "shard_rows": self.shard_rows,
            "chunk_rows": self.chunk_rows,
            "model": dict(self.model),
            "tokenizer": dict(self.tokenizer),
            "settings": dict(self.settings),
            "corpus": dict(self.corpus),
        }


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in manifest.items() if k != "hash"}).encode()).hexdigest()


def write_manifest(root: Root, manifest: Mapping[str, Any]) -> dict[str, Any]:
    sealed = {**manifest, "hash": manifest_hash(manifest)}
    root.write_json(MANIFEST, sealed)
    return sealed


def read_manifest(root: Root) -> dict[str, Any]:
    """The manifest of the store at `root`; StoreError where there is none, or it is foreign or was changed."""
    manifest = root.read_json(MANIFEST)
    where = f"{root.path}/{MANIFEST}"
    if manifest is None:
        if root.local is not None and not root.local.is_dir():
            what = "a file" if root.local.exists() else "no such directory"
            raise StoreError(
                f"{root.path}", expected="an activation store", got=what, fix="check the path; nla extract"
            )
        fix = "nla extract writes it first; a directory without it is no store"
        raise StoreError(f"{root.path} is not an activation store", expected=MANIFEST, got="none", fix=fix)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = repr(manifest.get("format")) if isinstance(manifest, dict) else type(manifest).__name__
        raise StoreError(f"{where}: format", expected=FORMAT, got=got, fix="the directory of an activation store")
    if manifest.get("version") != VERSION:
        fix = "the nla_jax that wrote it, or a newer one"
        raise StoreError(f"{where}: version", expected=VERSION, got=manifest.get("version"), fix=fix)
    if manifest.get("hash") != manifest_hash(manifest):
        fix = "the original file; every number in it is covered by its hash"
        raise StoreError(f"{where} was changed or is damaged", expected=f"hash {manifest_hash(manifest)}", fix=fix)
    return manifest


def index_exists(path: Any) -> bool:
    """Whether the first phase of an extraction has been finished at `path` (StoreError if what is there is damaged)."""
    root = Root(path)
    return root.read(MANIFEST) is not None and bool(read_manifest(root))


def check_spec(manifest: Mapping[str, Any], spec: StoreSpec, path: str) -> None:
    """StoreError that names the first field in which a store differs from what is now asked for."""
    asked = spec.fields()
    # What is asked for goes through JSON once, as the stored one did.
    for name in _COMPARED:
        _compare(path, name, manifest.get(name), asked[name])
    for group in _GROUPS:
        stored, wanted = dict(manifest.get(group) or {}), asked[group]
        if group == "corpus":
            stored = {k: v for k, v in stored.items() if k not in ("counts", "problems")}
        if group == "model":  # its hashes tell models apart; a directory may have been moved
            stored, wanted = ({k: v for k, v in d.items() if k != "name"} for d in (stored, wanted))
        for name in sorted({*stored, *wanted}):
            _compare(path, f"{group}.{name}", stored.get(name), wanted.get(name))


def _compare(path: str, name: str, stored: Any, asked: Any) -> None:
    if canonical(stored) != canonical(asked):
        fix = "the settings it was begun with, or another directory"
        got = f"{name} = {_short(asked)}"
        raise StoreError(
            f"{path} is a store of another extraction", expected=f"{name} = {_short(stored)}", got=got, fix=fix
        )


def _short(value: Any) -> str:
    text = canonical(value)
    return text if len(text) <= 80 else text[:77] + "..."


def shard_range(manifest: Mapping[str, Any], shard: int) -> tuple[int, int]:
    """Rows [a, b) of a shard."""
    size, n = manifest["shard_rows"], manifest["n_rows"]
    return shard * size, min((shard + 1) * size, n)


def shard_count(manifest: Mapping[str, Any]) -> int:
    return -(-manifest["n_rows"] // manifest["shard_rows"])


def done_key(shard: int) -> str:
    return f"done/{shard:08d}.json"


def done_shards(root: Root) -> set[int]:
    """Numbers of the shards that have a record, without opening the records."""
    names = (key.removeprefix("done/").removesuffix(".json") for key in root.keys("done/"))
    return {int(name) for name in names if name.isascii() and name.isdigit()}
