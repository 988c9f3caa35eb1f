"""The benchmark's other half: what a transformers user would write for the same three programs. Needs [parity]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

VERSIONS = f"{torch.__version__}, transformers {transformers.__version__}"


class Programs:
    """Extraction with a forward hook, explanation with `generate`, reconstruction with a truncated model."""

    def __init__(self, path: Path, layer: int):
        transformers.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None  # every answer runs to its full length, as ours does
        self.layer = layer
        trunk = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().model
        trunk.layers = trunk.layers[: layer + 1]
        trunk.norm = torch.nn.Identity()
        self.trunk = trunk
        self.head = torch.nn.Linear(self.model.config.hidden_size, self.model.config.hidden_size, bias=False)
        torch.nn.init.eye_(self.head.weight)

    @torch.inference_mode()
    def extract(self, tokens: np.ndarray) -> np.ndarray:
        """Output of block `layer`, caught by a hook while the whole model runs (without logits)."""
        caught = []
        hook = self.model.model.layers[self.layer].register_forward_hook(
            lambda module, args, out: caught.append(out[0] if isinstance(out, tuple) else out)
        )
        try:
            self.model.model(torch.from_numpy(tokens).long(), use_cache=False)
        finally:
            hook.remove()
        return caught[0].numpy()

    @torch.inference_mode()
    def explain(
        self, ids: tuple[int, ...], marker: int, vectors: np.ndarray, temperature: float, length: int
    ) -> np.ndarray:
        """`generate` from embeddings, the vector in the marker's place, one row per vector."""
        embeds = self.model.get_input_embeddings()(torch.tensor(ids))[None].repeat(len(vectors), 1, 1)
        embeds[:, marker] = torch.from_numpy(vectors)
        sampling = (
            {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            if temperature
            else {"do_sample": False}
        )
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        out = self.model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=length, pad_token_id=0, **sampling
        )
        return out.numpy()

    @torch.inference_mode()
    def reconstruct(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The truncated model on a right-padded batch, read at each row's last token."""
        ids = torch.from_numpy(tokens).long()
        mask = (torch.arange(ids.shape[1])[None] < torch.from_numpy(lengths)[:, None]).long()
        hidden = self.trunk(ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids)), torch.from_numpy(lengths).long() - 1]
        return self.head(last).numpy()
