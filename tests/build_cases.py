"""Small stores that `build` can work on, made with the tokenizer of the mini checkpoints, and reference-like sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nla_jax.manifest import StoreSpec
from nla_jax.store import Store
from nla_jax.store_write import IndexedDocument, ShardWriter, create_index, write_explanations
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools.mini_tokenizer import write_mini_tokenizer

D = 16
WORDS = "the model reads a long text about ships, words and “numbers” 12 naïve 日本 🙂 and then it ends".split()
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
AV = "Read the vector.\n\n<concept>{injection_char}</concept>\n\nExplain {{it}}."
AR = "Summary: <text>{explanation}</text> <summary>"


def mini_tokenizer(directory: Path, style: str = "chatml") -> Tokenizer:
    write_mini_tokenizer(directory, style)
    return Tokenizer.from_dir(directory)


def documents(tokenizer: Tokenizer, n: int) -> Iterator[IndexedDocument]:
    for i in range(n):
        rng = np.random.default_rng(i)
        text = " ".join([*rng.choice(WORDS, int(rng.integers(6, 30))), f"number {i}"])
        ids, offsets = tokenizer.encode_with_offsets(text)
        ends = np.array([len(text[:end].encode()) for _, end in offsets], np.int32)
        positions = np.sort(rng.choice(len(ids), min(len(ids), 5), replace=False))
        yield IndexedDocument(f"doc/ü{i}", text, np.array(ids, np.int32), np.zeros(len(ids), np.int8), ends, positions)


def vectors(n: int, d: int = D, seed: int = 0) -> np.ndarray:
    """Off-centre and of very different norms, as residual streams are."""
    rng = np.random.default_rng(seed)
    raw = rng.standard_normal((n, d)) + np.linspace(-1, 2, d)
    return (raw * rng.uniform(5, 40, (n, 1))).astype(np.float32)


def explanation(row: int) -> str:
    endings = ("a sentence.", "digits 12", "a line\n\nand another", "“quoted”", "日本語")
    return f"Feature {row} of {{a}} text with {endings[row % len(endings)]}"


def make_store(
    path: Path, tokenizer: Tokenizer, n: int = 40, layers: tuple[int, ...] = (3,), taught: bool = True
) -> Store:
    spec = StoreSpec(
        d_model=D,
        layers=layers,
        model={"name": "mini", "config_sha256": "c", "weights": "w", "n_layers": 8},
        tokenizer={"fingerprint": tokenizer.fingerprint},
        settings={"per_document": 5},
        corpus={"name": "words"},
        shard_rows=32,
    )
    create_index(path, spec, documents(tokenizer, n))
    writer = ShardWriter(path)
    all_vectors = vectors(writer.manifest["n_rows"])
    for shard in writer.pending():
        a, b = writer.rows(shard)
        writer.write_shard(shard, all_vectors[a:b])
    writer.finish()
    if taught:
        teach(path)
    return Store.open(path)


def teach(path: Path, every: int = 7) -> None:
    """An explanation for each row but every seventh, of which half were never asked for and half dropped."""
    n = Store.open(path).n_rows
    texts = [None if i % every == 0 else explanation(i) for i in range(n)]
    write_explanations(path, texts, {"provider": "test"}, dropped=np.arange(n) % (2 * every) == 0)


# -- sets as the reference writes them


def sidecar(stage: str, n: int, version: int = 1, d: int = D, **changes) -> dict:
    one = version == 1
    raw = {
        "dataset_id": f"{stage}_Base_L20_0123abcd",
        "stage": stage,
        "row_count": n,
        "extraction": {
            "base_model": "org/Base",
            "d_model": d,
            "layer_index": 20,
            "norm": "none",
            "corpus": "org/corpus",
            "corpus_slice": {"start": 0, "length": 100},
            "positions_per_doc": 3,
        },
        "kind": "nla_dataset",
        "schema_version": version,
        "keep_debug_metadata": True,
        "tokens": {
            "injection_char": "㈎",
            "injection_token_id": 149705,
            "injection_left_neighbor_id": 29,
            "injection_right_neighbor_id": 522,
            "critic_suffix_ids": [1318, 29] if stage == "ar_sft" else None,
        },
        "prompt_templates": {"actor" if one else "av": AV, "critic" if one else "ar": AR},
        "parent_datasets": ["base_Base_L20_0123abcd"],
        "created_at": "2026-03-16T17:38:23+00:00",
        "created_by": "nla.datagen.stage3_build",
        "git_commit": "abc1234",
    }
    if not one:
        raw["extraction_layer_index"] = 20
        raw["extraction"] |= {"injection_scale": 150.0, "mse_scale": "sqrt_d_model", "variance_nrm": 0.7335}
    for key, value in changes.items():
        raw[key] = value
    return raw


def table(stage: str, n: int, d: int = D, first_doc: int = 0, shuffled: bool = True) -> pa.Table:
    """A set of `n` rows, three of each document, whose positions come in any order; every fourth text ends in half
    a character, as a tokenizer's decoder shows it."""
    rng = np.random.default_rng([SEEDS[stage], n, first_doc])
    docs = first_doc + np.arange(n) // 3
    positions = 50 + np.concatenate([rng.permutation(3) for _ in range(-(-n // 3))])[:n] * 7
    texts = []
    for doc, position in zip(docs.tolist(), positions.tolist(), strict=True):
        whole = f"Document {doc}: " + "é日本 ship " * 40
        cut = whole[: 3 * position]
        texts.append(cut[:-1] + "\ufffd" if position % 2 else cut)
    explanations = [f"Feature one of {i}.\n\nFeature {{two}} 日本{'  ' * (i % 2)}" for i in range(n)]
    message = [{"role": "user", "content": AV.replace("{injection_char}", "<INJECT>").replace("{{it}}", "{it}")}]
    flat = vectors(n, d, SEEDS[stage]).reshape(-1)
    columns: dict = {"prompt": pa.array([message] * n, MESSAGES)}
    if stage == "av_sft":
        columns["response"] = pa.array([f"<explanation>\n{e}\n</explanation>" for e in explanations])
    if stage == "ar_sft":
        columns["prompt"] = pa.array([AR.replace("{explanation}", e) for e in explanations])
    columns["activation_vector"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), d)
    columns["n_raw_tokens"] = pa.array(positions + 1, pa.int64())
    columns["activation_layer"] = pa.array([20] * n, pa.int64())
    columns["doc_id"] = pa.array([f"org/corpus:train:{doc}" for doc in docs])
    columns["detokenized_text_truncated"] = pa.array(texts)
    made = pa.table(columns)
    return made.take(pa.array(rng.permutation(n))) if shuffled else made


SEEDS = {"av_sft": 1, "ar_sft": 2, "rl": 3}


def write_set(path: Path, stage: str, made: pa.Table, version: int = 1, **changes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, row_group_size=20)
    path.with_name(path.name + ".nla_meta.yaml").write_text(
        yaml.safe_dump(sidecar(stage, len(made), version, **changes), sort_keys=False, allow_unicode=True)
    )
    return path


def write_sets(directory: Path, n: int = 60, version: int = 1) -> list[Path]:
    """The three sets, which share no document."""
    return [
        write_set(directory / f"{stage}.parquet", stage, table(stage, n, first_doc=1000 * i), version)
        for i, stage in enumerate(SEEDS)
    ]


def replaced(made: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return made.set_column(made.schema.get_field_index(name), name, column)
