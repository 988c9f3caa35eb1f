"""How Hugging Face names the parameters: one table, used for reading and for writing.

Matrices stand in checkpoints as [out, in] and here as [in, out]; `Slot.transpose` says where that matters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from nla_jax.models.config import ModelConfig
from nla_jax.models.params import Params, ParamSpec, param_specs

EMBED, NORM, LM_HEAD = "embed_tokens.weight", "norm.weight", "lm_head.weight"

# Field of `Layers` -> name within a block. Gemma norms each branch's output too, and then `post_attention_layernorm`
# is that output norm; in the other families it is the norm before the MLP.
_BLOCK = {
    "attn_norm": "input_layernorm.weight",
    "wq": "self_attn.q_proj.weight",
    "wk": "self_attn.k_proj.weight",
    "wv": "self_attn.v_proj.weight",
    "wo": "self_attn.o_proj.weight",
    "bq": "self_attn.q_proj.bias",
    "bk": "self_attn.k_proj.bias",
    "bv": "self_attn.v_proj.bias",
    "bo": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "b_gate": "mlp.gate_proj.bias",
    "b_up": "mlp.up_proj.bias",
    "b_down": "mlp.down_proj.bias",
}
_GEMMA_BLOCK = {
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}

# (what stands before embed_tokens, layers and norm; the name of lm_head beside it)
LAYOUTS = (
    ("model.", LM_HEAD),  # a causal language model
    ("language_model.model.", "language_model.lm_head.weight"),  # multimodal Gemma 3, most releases
    ("model.language_model.", LM_HEAD),  # multimodal Gemma 3, saves of transformers 4.52 and later
    ("language_model.", LM_HEAD),  # its headless form
    ("", LM_HEAD),  # the headless form of a language model
)
_SKIPPED = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*|.*\.rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Slot:
    """One checkpoint tensor's place: a field of `Params` (`layer` None) or row `layer` of a field of `Layers`.

    `shape` is the tensor's own, as it stands in a checkpoint."""

    field: str
    layer: int | None
    shape: tuple[int, ...]
    transpose: bool


def slots(cfg: ModelConfig, *, head: bool = True, layout: tuple[str, str] = LAYOUTS[0]) -> dict[str, Slot]:
    """Every tensor of a checkpoint of `cfg` by name, in the order of the forward pass."""
    specs = param_specs(cfg, head=head)
    prefix, lm_head = layout
    out = {prefix + EMBED: _slot("embed", specs.embed, None)}
    names = {**_BLOCK, **_GEMMA_BLOCK} if cfg.post_norms else _BLOCK
    for layer in range(cfg.n_layers):
        for field, name in names.items():
            spec = getattr(specs.layers, field)
            if spec is not None:
                out[f"{prefix}layers.{layer}.{name}"] = _slot(field, spec, layer)
    if specs.final_norm is not None:
        out[prefix + NORM] = _slot("final_norm", specs.final_norm, None)
    if specs.lm_head is not None:
        out[lm_head] = _slot("lm_head", specs.lm_head, None)
    return out


def _slot(field: str, spec: ParamSpec, layer: int | None) -> Slot:
    shape = spec.shape if layer is None else spec.shape[1:]
    transpose = len(shape) == 2 and field != "embed"  # the embedding is a table of rows in both
    return Slot(field, layer, shape[::-1] if transpose else shape, transpose)


def leaf(tree: Params, slot: Slot) -> Any:
    """The entry of a `Params`-shaped tree that a slot belongs to (the whole stack where it is one block's)."""
    return getattr(tree if slot.layer is None else tree.layers, slot.field)


def layout_of(keys: Collection[str]) -> tuple[str, str]:
    """The naming that a checkpoint's tensors follow; the plain one where none is recognised."""
    for prefix, lm_head in LAYOUTS:
        if prefix + EMBED in keys or f"{prefix}layers.0.input_layernorm.weight" in keys:
            return prefix, lm_head if lm_head in keys else LM_HEAD
    return LAYOUTS[0]


def ignorable(key: str) -> bool:
    """True for what a text model has no use for: the vision tower, and rotary tables that old saves contain."""
    return _SKIPPED.fullmatch(key) is not None
