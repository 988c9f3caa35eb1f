"""The training benchmark's other half: what a transformers user would write for the same three steps. Needs [parity].

AV SFT: `Qwen2ForCausalLM` from `inputs_embeds` with the vector in the marker's place, labels masked to the response,
the model's own loss (logits of all tokens at once). AR SFT: a `Qwen2Model` of the first blocks without final norm and
a linear map, mse of normalised vectors. RL: `generate` with `num_return_sequences`, rewards from the AR,
log-probabilities of policy and reference with `logits_to_keep`, and both updates. Fused AdamW, `clip_grad_norm_`,
padding to the longest.
"""

from __future__ import annotations

import abc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy, normalize

from nla_jax.tools.bench_worker import serve

Numbers = dict[str, float]


def versions() -> str:
    return f"torch {torch.__version__}, transformers {transformers.__version__}"


class _Program(abc.ABC):
    def __init__(self, folder: Path):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.shapes = json.loads((folder / "shapes.json").read_text())
        torch.set_num_threads(self.shapes["threads"])
        self.folder = folder
        self.data = {name: torch.from_numpy(value) for name, value in np.load(folder / "data.npz").items()}
        self.data = {k: v.long() if not v.is_floating_point() else v for k, v in self.data.items()}
        self.times: Numbers = {}

    def versions(self) -> str:
        return versions()

    def lm(self, name: str) -> Any:
        return transformers.Qwen2ForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32).train()

    def optimizer(self, *modules: torch.nn.Module) -> torch.optim.Optimizer:
        parameters = [p for module in modules for p in module.parameters()]
        return torch.optim.AdamW(parameters, lr=self.shapes["lr"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> Numbers:
        """Backward pass, clipping and one step of the optimizer."""
        optimizer.zero_grad(set_to_none=True)
        with self.timed("backward"):
            loss.backward()
        with self.timed("optimizer"):
            norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}

    def timed(self, name: str) -> _Timed:
        return _Timed(self.times, name)

    def check(self) -> list[Numbers]:
        """Loss and gradient norm of two steps on the same batch."""
        return [self.step(), self.step()]

    @abc.abstractmethod
    def step(self) -> Numbers:
        """One step on the given batch: loss and gradient norm, fetched."""

    def parts(self) -> Numbers:
        """Processor seconds of each part of one step."""
        self.times.clear()
        self.step()
        return dict(self.times)


class _Timed:
    def __init__(self, times: Numbers, name: str):
        self.times, self.name = times, name

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.times[self.name] = self.times.get(self.name, 0.0) + time.process_time() - self.start


def prompt_embeddings(model: Any, data: dict[str, torch.Tensor], vectors: torch.Tensor, scale: float) -> torch.Tensor:
    """[B, P, D]: the prompt's embeddings with each vector, at norm `scale`, in the marker's place."""
    embeds = model.get_input_embeddings()(data["prompt"])[None].repeat(len(vectors), 1, 1)
    embeds[:, int(data["marker"])] = normalize(vectors, dim=-1) * scale
    return embeds


class AV(_Program):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.model = self.lm("model")
        self.adam = self.optimizer(self.model)

    def step(self) -> Numbers:
        data = self.data
        lengths, prompt = data["response_lengths"], len(data["prompt"])
        responses = data["responses"][:, : int(lengths.max())]
        live = torch.arange(responses.shape[1])[None] < lengths[:, None]
        mask = torch.cat([torch.ones(len(live), prompt, dtype=torch.long), live.long()], 1)
        labels = torch.cat([torch.full((len(live), prompt), -100), responses.masked_fill(~live, -100)], 1)
        with self.timed("forward"):
            before = prompt_embeddings(self.model, data, data["vectors"], self.shapes["injection_scale"])
            embeds = torch.cat([before, self.model.get_input_embeddings()(responses)], 1)
            loss = self.model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False).loss
        return self.update(self.adam, loss)


class Reader(torch.nn.Module):
    """The AR: the first blocks without final norm, read at the last token through a linear map."""

    def __init__(self, path: Path, n_layers: int):
        super().__init__()
        self.trunk = transformers.Qwen2Model.from_pretrained(path, num_hidden_layers=n_layers, dtype=torch.float32)
        self.trunk.norm = torch.nn.Identity()
        width = self.trunk.config.hidden_size
        self.head = torch.nn.Linear(width, width, bias=False)
        torch.nn.init.eye_(self.head.weight)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None]).long()
        hidden = self.trunk(tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return self.head(hidden[torch.arange(len(tokens)), lengths - 1])


def direction_errors(predicted: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """mse_nrm [B] at mse_scale sqrt(D)."""
    return (normalize(predicted, dim=-1) - normalize(vectors, dim=-1)).square().sum(-1)


class AR(_Program):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.model = Reader(folder / "model", self.shapes["ar_layers"]).train()
        self.adam = self.optimizer(self.model)

    def step(self) -> Numbers:
        data = self.data
        tokens = data["ar_tokens"][:, : int(data["ar_lengths"].max())]
        with self.timed("forward"):
            loss = direction_errors(self.model(tokens, data["ar_lengths"]), data["ar_vectors"]).mean()
        return self.update(self.adam, loss)


class RL(_Program):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.policy, self.reference = self.lm("model"), self.lm("reference")
        self.reference.requires_grad_(False).eval()
        self.policy.generation_config.eos_token_id = None  # every sample runs to its full length, as ours does
        self.ar = Reader(folder / "model", self.shapes["ar_layers"]).train()
        self.av_adam, self.ar_adam = self.optimizer(self.policy), self.optimizer(self.ar)

    def step(self) -> Numbers:
        with self.timed("rollout"):
            sampled = self.sample()
        return self.learn(sampled)

    def check(self) -> list[Numbers]:
        sampled = torch.from_numpy(np.load(self.folder / "samples.npy")).long()
        return [self.learn(sampled), self.learn(sampled)]

    @torch.no_grad()
    def sample(self) -> torch.Tensor:
        """Sampled tokens [N * G, R]."""
        s = self.shapes
        embeds = prompt_embeddings(self.policy, self.data, self.data["rl_vectors"], s["injection_scale"])
        return self.policy.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            num_return_sequences=s["samples"],
            max_new_tokens=s["cap"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            use_cache=True,
            pad_token_id=0,
        )

    def logprobs(self, model: Any, sampled: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [N * G, R] of the samples under a model."""
        vectors = self.data["rl_vectors"].repeat_interleave(self.shapes["samples"], 0)
        before = prompt_embeddings(model, self.data, vectors, self.shapes["injection_scale"])
        embeds = torch.cat([before, model.get_input_embeddings()(sampled)], 1)
        logits = model(inputs_embeds=embeds, use_cache=False, logits_to_keep=sampled.shape[1] + 1).logits[:, :-1]
        return -cross_entropy(logits.transpose(1, 2), sampled, reduction="none")

    def learn(self, sampled: torch.Tensor) -> Numbers:
        s, data = self.shapes, self.data
        vectors = data["rl_vectors"].repeat_interleave(s["samples"], 0)
        start, end = (data[name].expand(len(sampled), -1) for name in ("ar_start", "ar_end"))
        texts = torch.cat([start, sampled, end], 1)
        lengths = torch.full((len(texts),), texts.shape[1])
        with torch.no_grad():
            with self.timed("reward"):
                errors = direction_errors(self.ar(texts, lengths), vectors)
            with self.timed("reference"):
                reference = self.logprobs(self.reference, sampled)
        reward = -errors.view(-1, s["samples"])
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True, correction=0) + 1e-6)
        with self.timed("policy, forward"):
            logprobs = self.logprobs(self.policy, sampled)
            rho = torch.exp(logprobs - logprobs.detach())
            A = advantage.reshape(-1, 1)
            terms = -torch.minimum(rho * A, rho.clamp(0.8, 1.2) * A)
            loss = (terms + 0.01 * (logprobs - reference).square() / 2).mean(1).mean()
        of_policy = self.update(self.av_adam, loss)
        with self.timed("AR, forward"):
            loss = direction_errors(self.ar(texts, lengths), vectors).mean()
        of_ar = self.update(self.ar_adam, loss)
        return {**of_policy, "reward": reward.mean().item(), **{f"ar_{k}": v for k, v in of_ar.items()}}


if __name__ == "__main__":
    serve({"av": AV, "whole": AV, "ar": AR, "rl": RL})
