"""Our half of the evaluation benchmark: the functions behind `NLA.verbalize` and `NLA.reconstruct`, on given arrays."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import metrics
from nla_jax.models import hf
from nla_jax.models.sampler import row_keys
from nla_jax.prompt import AVPrompt
from nla_jax.reconstructor import ARParams, init_head, pad_prompts, reconstruct_jit
from nla_jax.tools.bench_worker import serve
from nla_jax.verbalizer import av_prefix_jit, sample_explanations


class Eval:
    """AV sample, AR read, fve_nrm, a batch after another."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes = json.loads((folder / "shapes.json").read_text())
        self.data = dict(np.load(folder / "data.npz"))
        self.cfg, self.params = hf.load_model(folder / "model", "float32")
        n = self.shapes["ar_layers"]
        self.ar_cfg, trunk = hf.load_model(folder / "model", "float32", n_layers=n, head=False)
        self.ar = ARParams(trunk=trunk, head=init_head(self.ar_cfg.d_model))
        self.prompt = AVPrompt(tuple(int(i) for i in self.data["prompt"]), int(self.data["marker"]))
        jax.block_until_ready((self.params, self.ar))
        self.times: dict[str, float] = {}
        self.steps = 0

    def versions(self) -> str:
        return f"jax {jax.__version__}"

    def step(self) -> float:
        """fve_nrm of one explanation for each vector."""
        self.steps += 1
        return self.score(self.read(self.sample(1.0, self.shapes["cap"])))

    def parts(self) -> dict[str, float]:
        """Processor seconds of each part of one step."""
        self.times.clear()
        self.step()
        return dict(self.times)

    def save_samples(self) -> list[int]:
        """Writes one step's sampled tokens, which both sides' ARs read to be compared; their shape."""
        tokens = self.sample(1.0, self.shapes["cap"])
        np.save(self.folder / "samples.npy", tokens)
        return list(tokens.shape)

    def check(self) -> dict[str, Any]:
        """Greedy tokens; fve_nrm and the file of the AR's vectors for the saved samples."""
        vectors = self.read(np.load(self.folder / "samples.npy"))
        np.save(self.folder / "ours.npy", vectors)
        greedy = self.sample(0.0, self.shapes["check_tokens"]).tolist()
        return {"greedy": greedy, "vectors": str(self.folder / "ours.npy"), "fve_nrm": self.score(vectors)}

    def sample(self, temperature: float, length: int) -> np.ndarray:
        """Tokens int32 [N, length]; the constant part of the prompt is run once per step."""
        started = time.process_time()
        vectors, out = self.data["vectors"], []
        prefix = av_prefix_jit(self.params, prompt=self.prompt, cfg=self.cfg)
        for first in range(0, len(vectors), self.shapes["batch"]):
            batch = vectors[first : first + self.shapes["batch"]]
            rows = jnp.arange(first, first + len(batch), dtype=jnp.uint32)
            samples = sample_explanations(
                self.params,
                prefix,
                jnp.asarray(batch),
                row_keys(self.steps, rows, 1),
                prompt=self.prompt,
                cfg=self.cfg,
                injection_scale=self.shapes["injection_scale"],
                temperature=temperature,
                max_new_tokens=length,
            )
            out.append(np.asarray(samples.tokens))
        self._took("AV", started)
        return np.concatenate(out)

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """The AR's vectors float32 [N, D] for explanations given as tokens."""
        started, out = time.process_time(), []
        for first in range(0, len(tokens), self.shapes["batch"]):
            chunk = tokens[first : first + self.shapes["batch"]]
            prompts = [[*self.data["ar_start"], *row, *self.data["ar_end"]] for row in chunk]
            out.append(np.asarray(reconstruct_jit(self.ar, *pad_prompts(prompts), cfg=self.ar_cfg)))
        self._took("AR", started)
        return np.concatenate(out)

    def score(self, predicted: np.ndarray) -> float:
        """fve_nrm, in float64 on the host."""
        started = time.process_time()
        errors = metrics.mse_nrm(predicted, self.data["vectors"], self.ar_cfg.d_model**0.5)
        value = metrics.fve_nrm(errors, self.shapes["variance"])
        self._took("fve", started)
        return value

    def _took(self, name: str, started: float) -> None:
        self.times[name] = self.times.get(name, 0.0) + time.process_time() - started


if __name__ == "__main__":
    serve({"eval": Eval})
