"""What a transformers user would write to extract activations: a forward hook and batches by length. Needs [parity]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers

VERSIONS = f"{torch.__version__}, transformers {transformers.__version__}"


@torch.inference_mode()
def extract(
    model_dir: Path,
    texts: Mapping[str, str],
    positions: Mapping[str, np.ndarray],
    out: Path,
    *,
    layer: int,
    max_tokens: int,
    batch_tokens: int,
) -> np.ndarray:
    """Loads the model, runs all of it on the documents (longest first, right-padded, about `batch_tokens` a batch),
    catches the output of block `layer` and saves the vectors [n, D] at the `positions`, in the documents' order."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    # AutoTokenizer would put Qwen's own pre-tokenizer in the place of the file's.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model_dir)
    ids = {name: tokenizer(texts[name], add_special_tokens=False)["input_ids"][:max_tokens] for name in positions}
    caught: list[torch.Tensor] = []
    hook = model.model.layers[layer].register_forward_hook(
        lambda module, args, result: caught.append(result[0] if isinstance(result, tuple) else result)
    )
    found = {}
    names = sorted(positions, key=lambda name: -len(ids[name]))
    while names:
        longest = len(ids[names[0]])
        batch, names = names[: max(batch_tokens // longest, 1)], names[max(batch_tokens // longest, 1) :]
        tokens = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, name in enumerate(batch):
            tokens[row, : len(ids[name])] = torch.tensor(ids[name])
            mask[row, : len(ids[name])] = 1
        model.model(tokens, attention_mask=mask, use_cache=False)
        hidden = caught.pop()
        for row, name in enumerate(batch):
            found[name] = hidden[row, torch.as_tensor(positions[name])].numpy()
    hook.remove()
    vectors = np.concatenate([found[name] for name in positions])
    np.save(out, vectors)
    return vectors
