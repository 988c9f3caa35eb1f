"""The evaluation benchmark's other half: what a transformers user would write. Needs [parity].

`generate` from embeddings with the vector in the marker's place and a key/value cache, then the truncated model read
at the last token, then fve_nrm in numpy. Batches of the same size as ours.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from nla_jax.tools.bench_train_torch import Reader, prompt_embeddings, versions
from nla_jax.tools.bench_worker import serve


class Eval:
    """AV sample, AR read, fve_nrm, a batch after another."""

    def __init__(self, folder: Path):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.folder = folder
        self.shapes = json.loads((folder / "shapes.json").read_text())
        torch.set_num_threads(self.shapes["threads"])
        self.data = {name: torch.from_numpy(value) for name, value in np.load(folder / "data.npz").items()}
        self.av = transformers.Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        self.av.generation_config.eos_token_id = None  # every sample runs to its full length, as ours does
        self.ar = Reader(folder / "model", self.shapes["ar_layers"]).eval()
        self.times: dict[str, float] = {}

    def versions(self) -> str:
        return versions()

    def step(self) -> float:
        """fve_nrm of one explanation for each vector."""
        return self.score(self.read(self.sample(1.0, self.shapes["cap"])))

    def parts(self) -> dict[str, float]:
        """Processor seconds of each part of one step."""
        self.times.clear()
        self.step()
        return dict(self.times)

    def check(self) -> dict[str, Any]:
        """Greedy tokens; fve_nrm and the file of the AR's vectors for the samples that our side saved."""
        vectors = self.read(np.load(self.folder / "samples.npy"))
        np.save(self.folder / "torch.npy", vectors)
        greedy = self.sample(0.0, self.shapes["check_tokens"]).tolist()
        return {"greedy": greedy, "vectors": str(self.folder / "torch.npy"), "fve_nrm": self.score(vectors)}

    @torch.inference_mode()
    def sample(self, temperature: float, length: int) -> np.ndarray:
        """Tokens [N, length]."""
        started, out = time.process_time(), []
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        for vectors in self.data["vectors"].split(self.shapes["batch"]):
            embeds = prompt_embeddings(self.av, self.data, vectors, self.shapes["injection_scale"])
            mask = torch.ones(embeds.shape[:2], dtype=torch.long)
            made = self.av.generate(
                inputs_embeds=embeds,
                attention_mask=mask,
                max_new_tokens=length,
                use_cache=True,
                pad_token_id=0,
                **sampling,
            )
            out.append(made.numpy())
        self._took("AV", started)
        return np.concatenate(out)

    @torch.inference_mode()
    def read(self, tokens: np.ndarray) -> np.ndarray:
        """The AR's vectors float32 [N, D] for explanations given as tokens."""
        started, out = time.process_time(), []
        for chunk in torch.from_numpy(tokens).long().split(self.shapes["batch"]):
            start, end = (self.data[name].long().expand(len(chunk), -1) for name in ("ar_start", "ar_end"))
            texts = torch.cat([start, chunk, end], 1)
            out.append(self.ar(texts, torch.full((len(texts),), texts.shape[1])).numpy())
        self._took("AR", started)
        return np.concatenate(out)

    def score(self, predicted: np.ndarray) -> float:
        """fve_nrm at mse_scale sqrt(D), in float64 on the host."""
        started = time.process_time()
        p, v = predicted.astype(np.float64), self.data["vectors"].numpy().astype(np.float64)
        p, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (p, v))
        value = 1 - float(((p - v) ** 2).sum(1).mean()) / self.shapes["variance"]
        self._took("fve", started)
        return value

    def _took(self, name: str, started: float) -> None:
        self.times[name] = self.times.get(name, 0.0) + time.process_time() - started


if __name__ == "__main__":
    serve({"eval": Eval})
