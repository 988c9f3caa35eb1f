"""Mini checkpoints: a target, an AV and an AR in the released shape with random weights of reduced width.

Key names, dtypes, files and sidecars are those of the released pairs; the numbers mean nothing. They serve the demo,
the tests and speed measurements on machines that hold no real weights. The tensors are named and written here without
models/hf.py, so that loading one also checks the loader against a second reading of the format.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import yaml
from safetensors.numpy import save_file

from nla_jax.errors import InputError
from nla_jax.models.config import FAMILIES
from nla_jax.prompt import MARKER_FIELD, ar_prompt_ids, av_prompt_ids
from nla_jax.sidecar import Sidecar, parse_sidecar
from nla_jax.tokenizer import Tokenizer
from nla_jax.tools.mini_tokenizer import write_mini_tokenizer

AV_TEMPLATE = f"""\
Below is one vector that was read inside a language model while it worked on a text. It stands between concept tags.
Say in a few short lines what the model had in mind at that point, and put them between explanation tags.

<concept>{MARKER_FIELD}</concept>

Write the explanation now."""
AR_TEMPLATE = "What a model had in mind: <text>{explanation}</text> <summary>"

MARKERS = "㈎㈜㎡㎏℃※†§"  # tried in this order: the first that is one token inside the tags
RELEASED = {"qwen2.5-7b-L20": {"family": "qwen2", "n_layers": 28, "layer": 20, "shards": (4, 4, 3)}}
_SCALES = {"qwen2": 150.0, "qwen3": 150.0, "llama": 30.0, "mistral": 30.0, "gemma2": 600.0, "gemma3": 60000.0}
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_TOKENIZER_FILES = (
    "tokenizer.json tokenizer.model tokenizer.model.v3 tokenizer_config.json special_tokens_map.json "
    "added_tokens.json chat_template.jinja chat_template.json"
).split()


@dataclass(frozen=True)
class MiniPair:
    """The three directories that `make_mini` wrote."""

    target: Path
    av: Path
    ar: Path


def make_mini(
    out: Path,
    *,
    tokenizer: Path | None = None,
    family: str = "qwen2",
    d_model: int = 64,
    n_layers: int = 4,
    layer: int = 2,
    seed: int = 0,
    dtype: str = "bfloat16",
    like_released: str | None = None,
    sidecar_from: Path | None = None,
    variance_nrm: float | None = None,
) -> MiniPair:
    """Writes `out`/target, `out`/av and `out`/ar and returns their paths.

    tokenizer: a directory whose tokenizer files are copied; a small one is trained by default. The embedding has more
    rows than the tokenizer has ids, as in the released models. d_model: a multiple of 32. layer: K; the AR has K + 1
    blocks, those of the target, and an identity head; the AV is the target with every weight slightly changed.
    like_released: a name from `RELEASED`, which sets family, depth, layer and the number of weight files.
    sidecar_from: a directory with subdirectories named *-av and *-ar whose sidecars are used (widths and layer are
    replaced). variance_nrm is written into both sidecars. What an earlier call left in `out` is
    replaced; InputError where something else is in the way.
    """
    shards: tuple[int, int, int] = (1, 1, 1)
    if like_released is not None:
        if like_released not in RELEASED:
            raise InputError("like_released", expected=" or ".join(RELEASED), got=like_released)
        shape: dict[str, Any] = RELEASED[like_released]
        family, n_layers, layer, shards = shape["family"], shape["n_layers"], shape["layer"], shape["shards"]
    if family not in FAMILIES:
        raise InputError("family", expected=" or ".join(FAMILIES), got=family)
    if d_model % 32 or not 0 <= layer < n_layers or dtype not in _DTYPES:
        got = f"d_model {d_model}, layer {layer} of {n_layers}, dtype {dtype}"
        raise InputError("mini shape", expected="d_model a multiple of 32, layer < n_layers, a float dtype", got=got)

    pair = MiniPair(*(Path(out) / role for role in ("target", "av", "ar")))
    _make_room(Path(out), pair)
    if tokenizer is None:
        write_mini_tokenizer(pair.target, "bos" if family in ("llama", "mistral", "gemma2", "gemma3") else "chatml")
        tokenizer = pair.target
    for directory in (pair.target, pair.av, pair.ar):
        for name in _TOKENIZER_FILES:
            if (tokenizer / name).is_file() and tokenizer != directory:
                shutil.copyfile(tokenizer / name, directory / name)
    tok = Tokenizer.from_dir(pair.target)

    config = mini_config(family, d_model, n_layers, tok, dtype)
    tensors = dict(_tensors(config, seed))
    trunk = _without_last_blocks(tensors, layer + 1)
    stops = _stop_ids(tok)
    _write_model(pair.target, config, stops, tensors, _DTYPES[dtype], shards[0])
    tuned = {name: w + _noise(f"av {name}", w.shape, seed) * 0.05 * w.std() for name, w in tensors.items()}
    _write_model(pair.av, config, stops, tuned, _DTYPES[dtype], shards[1])
    _write_model(pair.ar, {**config, "num_hidden_layers": layer + 1}, stops, trunk, _DTYPES[dtype], shards[2])
    head = np.eye(d_model).astype(_DTYPES[dtype])
    save_file({"weight": head}, pair.ar / "value_head.safetensors", {"format": "pt"})

    for role, directory in (("av", pair.av), ("ar", pair.ar)):
        if sidecar_from is not None:
            sidecar = _released_sidecar(sidecar_from, role)
        else:
            sidecar = _own_sidecar(role, tok, family, seed)
        sidecar["d_model"] = d_model
        sidecar["extraction"]["mse_scale"] = math.sqrt(d_model)
        if variance_nrm is not None:
            sidecar["extraction"]["variance_nrm"] = variance_nrm
        sidecar["extraction_layer_index"] = layer
        if role == "ar":
            sidecar["critic"] = {"extraction_layer_index": layer}
        text = yaml.safe_dump(sidecar, sort_keys=False, allow_unicode=True)
        (directory / "nla_meta.yaml").write_text(text, encoding="utf-8")
    return pair


def _make_room(out: Path, pair: MiniPair) -> None:
    """Empty directories for the pair. What an earlier call left is removed, and nothing else."""
    note = out / "MINI.txt"
    directories = (pair.target, pair.av, pair.ar)
    foreign = [d for d in directories if d.exists() and any(d.iterdir())]
    if foreign and not note.is_file():
        raise InputError(f"{foreign[0]} is not empty and was not made by this command", fix="another output directory")
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    note.write_text("Random weights, made for a demonstration or a test; safe to delete.\n", encoding="utf-8")


def mini_config(family: str, d_model: int, n_layers: int, tok: Tokenizer, dtype: str) -> dict[str, Any]:
    """The config.json of a mini target. Heads are 16 wide, and two share a key head."""
    kinds = {"gemma2": "Gemma2", "gemma3": "Gemma3", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
    gemma = family.startswith("gemma")
    config: dict[str, Any] = {
        "architectures": [kinds.get(family, "Qwen3") + "ForCausalLM"],
        "model_type": "gemma3_text" if family == "gemma3" else family,
        "bos_token_id": tok.bos_id,
        "eos_token_id": _stop_ids(tok) if gemma else tok.eos_id,
        "pad_token_id": tok.pad_id,
        "vocab_size": _padded_vocab(tok),
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": d_model // 16,
        "num_key_value_heads": d_model // 32,
        "head_dim": 16,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6 if family.startswith("qwen") or family == "gemma3" else 1e4,
        "tie_word_embeddings": gemma,
        "torch_dtype": dtype,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if family == "qwen2":  # its config class derives the head size
        del config["head_dim"]
    if family.startswith("qwen"):
        config |= {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28}
    elif family in ("llama", "mistral"):
        config |= {"hidden_act": "silu"} | ({"sliding_window": None} if family == "mistral" else {})
    else:
        config |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16, "sliding_window": 64}
        if family == "gemma2":
            config |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        else:
            config |= {"rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
    return config


def _padded_vocab(tok: Tokenizer) -> int:
    """Embedding rows: 152064 for the Qwen2.5 tokenizer, as released, and always more than the tokenizer has ids."""
    step = 512 if tok.vocab_size > 100_000 else 128
    return (tok.vocab_size // step + 1) * step


def _tensors(config: dict[str, Any], seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors under their Hugging Face names: matrices of variance 1/fan-in, norms and biases near identity."""
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * 16, config["num_key_value_heads"] * 16
    kind = config["model_type"]
    gemma = kind.startswith("gemma")

    def matrix(name: str, rows: int, cols: int) -> tuple[str, np.ndarray]:
        return f"{name}.weight", _noise(name, (rows, cols), seed) * np.float32(cols**-0.5)

    def norm(name: str, size: int) -> tuple[str, np.ndarray]:
        return f"{name}.weight", 0.1 * _noise(name, (size,), seed) + np.float32(not gemma)

    yield matrix("model.embed_tokens", v, d)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        for name, size in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            yield matrix(f"{block}.self_attn.{name}", size, d)
            if kind == "qwen2":
                bias = f"{block}.self_attn.{name}.bias"
                yield bias, 0.1 * _noise(bias, (size,), seed)
        yield matrix(f"{block}.self_attn.o_proj", d, q)
        for name, rows, cols in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)):
            yield matrix(f"{block}.mlp.{name}", rows, cols)
        yield norm(f"{block}.input_layernorm", d)
        yield norm(f"{block}.post_attention_layernorm", d)
        if kind in ("qwen3", "gemma3_text"):
            yield norm(f"{block}.self_attn.q_norm", 16)
            yield norm(f"{block}.self_attn.k_norm", 16)
        if gemma:
            yield norm(f"{block}.pre_feedforward_layernorm", d)
            yield norm(f"{block}.post_feedforward_layernorm", d)
    yield norm("model.norm", d)
    if not config["tie_word_embeddings"]:
        yield matrix("lm_head", v, d)


def _noise(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return rng.standard_normal(shape, np.float32)


def _without_last_blocks(tensors: dict[str, np.ndarray], n_layers: int) -> dict[str, np.ndarray]:
    """The tensors of an AR trunk: embedding and the first blocks; no final norm, no lm_head."""
    blocks = {name: w for name, w in tensors.items() if name.startswith("model.layers.")}
    kept = {name: w for name, w in blocks.items() if int(name.split(".")[2]) < n_layers}
    return {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"], **kept}


def _write_model(
    directory: Path,
    config: dict[str, Any],
    stop_ids: list[int],
    tensors: dict[str, np.ndarray],
    dtype: Any,
    shards: int,
) -> None:
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    generation = {name: config[name] for name in ("bos_token_id", "pad_token_id")} | {"eos_token_id": stop_ids}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    stored = {name: np.ascontiguousarray(w.astype(dtype)) for name, w in tensors.items()}
    if shards == 1:
        save_file(stored, directory / "model.safetensors", {"format": "pt"})
        return
    names = list(stored)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: stored[name] for name in part}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = {
        "total_parameters": sum(w.size for w in stored.values()),
        "total_size": sum(w.nbytes for w in stored.values()),
    }
    index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stop_ids(tok: Tokenizer) -> list[int]:
    """What ends an answer: the tokenizer's end of sequence, and the token that closes a turn or a document."""
    names = ("<end_of_turn>", "<|im_end|>", "<|endoftext|>")
    ids = [tok.eos_id, *(tok.encode(name, parse_special=True) for name in names)]
    single = [i if isinstance(i, int) else i[0] for i in ids if isinstance(i, int) or (i and len(i) == 1)]
    return list(dict.fromkeys(single))


def _released_sidecar(directory: Path, role: str) -> dict[str, Any]:
    found = sorted(Path(directory).glob(f"*-{role}/nla_meta.yaml"))
    if len(found) != 1:
        raise InputError(f"{directory}", expected=f"one *-{role}/nla_meta.yaml", got=len(found))
    return yaml.safe_load(found[0].read_text(encoding="utf-8"))


def _own_sidecar(role: str, tok: Tokenizer, family: str, seed: int) -> dict[str, Any]:
    """A sidecar whose ids are what this tokenizer makes of the prompts."""
    sidecar: dict[str, Any] = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "rl" if role == "av" else "sl",
        "d_model": 1,
        "extraction": {"injection_scale": _SCALES[family] if role == "av" else None, "mse_scale": 1.0},
        "tokens": {
            "injection_char": MARKERS[0],
            "injection_token_id": 0,
            "injection_left_neighbor_id": 0,
            "injection_right_neighbor_id": 0,
            "critic_suffix_ids": None,
        },
        "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE},
        "created_by": "nla_jax.tools.mini (random weights)",
        "training": {"rollout_id": 1000 * (seed + 1)},
    }
    tokens = sidecar["tokens"]
    for marker in MARKERS:
        tokens["injection_char"] = marker
        alone = tok.encode(marker)[-1:]
        ids = av_prompt_ids(tok, parse_sidecar(sidecar))
        if len(alone) == 1 and ids.count(alone[0]) == 1 and tok.token_str(alone[0]) == marker:
            at = ids.index(alone[0])
            tokens |= {
                "injection_token_id": ids[at],
                "injection_left_neighbor_id": ids[at - 1],
                "injection_right_neighbor_id": ids[at + 1],
            }
            break
    else:
        raise InputError("tokenizer", expected=f"one of {MARKERS} as a single token between tags", got="none")
    if role == "ar":
        tokens["critic_suffix_ids"] = _common_tail(tok, parse_sidecar(sidecar))
    return sidecar


def _common_tail(tok: Tokenizer, sidecar: Sidecar) -> list[int]:
    """The ids that end the AR prompt whatever stands before: those in common to quite different explanations."""
    texts = (
        "A plain sentence.",
        "ends with a word",
        "(brackets)",
        'a "quote"',
        "digits 12",
        "a dash -",
        "日本語",
        "x\n",
    )
    rows = [ar_prompt_ids(tok, sidecar, text)[::-1] for text in texts]
    same = 0
    while all(len(r) > same and r[same] == rows[0][same] for r in rows):
        same += 1
    return rows[0][:same][::-1]
