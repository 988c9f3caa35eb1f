"""Our half of the training benchmark: the jitted steps that `nla train` calls, on given arrays."""

from __future__ import annotations

import abc
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.host_memory import keep_freed_memory
from nla_jax.models import hf
from nla_jax.models.layers import embed
from nla_jax.models.transformer import run_blocks
from nla_jax.prompt import AVPrompt
from nla_jax.reconstructor import ARParams, init_head
from nla_jax.tools.bench_worker import serve, timed
from nla_jax.train import rl
from nla_jax.train.gradients import gradients
from nla_jax.train.logprobs import token_logprobs
from nla_jax.train.settings import OptimizerSettings
from nla_jax.train.state import TrainState, apply_gradients, create, train_step
from nla_jax.train.steps import ARConfig, AVConfig, ar_step, av_step
from nla_jax.verbalizer import inject

Numbers = dict[str, float]


class _Program(abc.ABC):
    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes = json.loads((folder / "shapes.json").read_text())
        self.data = dict(np.load(folder / "data.npz"))
        self.optim = OptimizerSettings(lr=self.shapes["lr"], schedule="constant", warmup=0.0)

    def versions(self) -> str:
        return f"jax {jax.__version__}"

    def load_av(self, name: str = "model") -> Any:
        self.av_model, params = hf.load_model(self.folder / name, "float32")
        return jax.block_until_ready(params)

    def load_ar(self) -> ARParams:
        n = self.shapes["ar_layers"]
        self.ar_model, trunk = hf.load_model(self.folder / "model", "float32", n_layers=n, head=False)
        return jax.block_until_ready(ARParams(trunk=trunk, head=init_head(self.ar_model.d_model)))

    def av_config(self) -> AVConfig:
        prompt = AVPrompt(tuple(int(i) for i in self.data["prompt"]), int(self.data["marker"]))
        more = {name: self.shapes[name] for name in ("injection_scale", "accumulate")}
        return AVConfig(self.av_model, self.optim, prompt=prompt, chunk=self.shapes["logit_chunk"], **more)

    def ar_config(self) -> ARConfig:
        scale = self.ar_model.d_model**0.5
        return ARConfig(self.ar_model, self.optim, mse_scale=scale, accumulate=self.shapes["accumulate"])

    def check(self) -> list[Numbers]:
        """Loss and gradient norm of two steps on the same batch."""
        return [self.step(), self.step()]

    @abc.abstractmethod
    def step(self) -> Numbers:
        """One step on the given batch: loss and gradient norm, fetched."""


class _Supervised(_Program):
    """One model, one batch. The optimizer's moments are made at the first step: they are part of what training adds
    to the memory that the weights take."""

    params: Any
    state: TrainState | None = None
    batch: dict[str, np.ndarray]
    run: Callable[[TrainState, Any], tuple[TrainState, Any]]

    def step(self) -> Numbers:
        if self.state is None:
            self.state, self.params = create(self.params, self.optim), None
        self.state, metrics = self.run(self.state, jax.device_put(self.batch))
        return fetched(metrics)

    def of_logits(self) -> Numbers:
        return {}

    def parts(self) -> Numbers:
        """Processor seconds of the update and of the vocabulary's part (forward and backward), each run alone, and
        what the blocks are left with."""
        whole = best(self.step)
        parts = {**self.of_logits(), "optimizer": self.of_update()}
        return {"blocks": whole - sum(parts.values()), **parts}

    def of_update(self) -> float:
        assert self.state is not None
        update = jax.jit(apply_gradients, static_argnums=2, donate_argnums=0)
        state = create(jax.tree.map(jnp.copy, self.state.params), self.optim)
        grads = jax.tree.map(jnp.ones_like, state.params)

        def run() -> None:
            nonlocal state
            state, _ = jax.block_until_ready(update(state, grads, self.optim))

        return best(run)


class AV(_Supervised):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.params = self.load_av()
        self.run = functools.partial(av_step, cfg=self.av_config())
        d, width = self.data, self.shapes["av_width"]
        tail = d["prompt"][int(d["marker"]) :]
        starts = np.broadcast_to(tail, (len(d["responses"]), len(tail)))
        at = np.arange(width)[None]
        mask = (at >= len(tail)) & (at < len(tail) + d["response_lengths"][:, None])
        tokens = padded(np.concatenate([starts, d["responses"]], axis=1), width)
        self.batch = {
            "tokens": tokens * (mask | (at < len(tail))),
            "loss_mask": mask,
            "valid": np.ones(len(tokens), bool),
            "vectors": d["vectors"],
        }

    def of_logits(self) -> Numbers:
        assert self.state is not None
        cfg, params = self.av_config(), self.state.params
        targets = jnp.asarray(self.batch["tokens"][:, cfg.tail :])
        x = jax.random.normal(jax.random.key(0), (*targets.shape, cfg.model.d_model))

        def loss(params: Any, x: jax.Array) -> jax.Array:
            return jnp.mean(token_logprobs(params, x, targets, cfg.model, chunk=cfg.chunk))

        run = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return {"logits": best(lambda: jax.block_until_ready(run(params, x)))}


class Whole(AV):
    """The AV's step without the shared prefix: every row holds its whole prompt, as the torch program's do."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.run = functools.partial(_whole_step, cfg=self.av_config())
        start = self.data["prompt"][: int(self.data["marker"])].astype(np.int32)
        starts = np.broadcast_to(start, (len(self.batch["tokens"]), len(start)))
        self.batch["tokens"] = np.concatenate([starts, self.batch["tokens"]], axis=1)
        self.batch["loss_mask"] = np.concatenate([starts < 0, self.batch["loss_mask"]], axis=1)

    def of_logits(self) -> Numbers:
        return {}


@train_step
def _whole_step(state: TrainState, batch: Any, *, cfg: AVConfig) -> tuple[TrainState, Any]:
    first = len(cfg.prompt.ids) - 1
    total = jnp.sum(batch["loss_mask"])

    def loss(params: Any, prefix: None, micro: Any) -> tuple[jax.Array, Any]:
        tokens = micro["tokens"]
        x = embed(params, tokens[:, :-1], cfg.model)
        x = inject(x, micro["vectors"], marker=cfg.prompt.marker, injection_scale=cfg.injection_scale)
        x = run_blocks(params, x, cfg.model)[0][:, first:]
        logprobs = token_logprobs(params, x, tokens[:, first + 1 :], cfg.model, chunk=cfg.chunk)
        return -jnp.sum(jnp.where(micro["loss_mask"][:, first + 1 :], logprobs, 0.0)) / total, {}

    value, _, grads = gradients(loss, state.params, batch, accumulate=cfg.accumulate)
    state, metrics = apply_gradients(state, grads, cfg.optim)
    return state, {"loss": value, **metrics}


class AR(_Supervised):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.params = self.load_ar()
        self.run = functools.partial(ar_step, cfg=self.ar_config())
        d, width = self.data, self.shapes["ar_width"]
        live = np.arange(width)[None] < d["ar_lengths"][:, None]
        self.batch = {
            "tokens": padded(d["ar_tokens"], width) * live,
            "lengths": d["ar_lengths"],
            "valid": np.ones(len(live), bool),
            "vectors": d["ar_vectors"],
        }


class RL(_Program):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.models: Any = self.load_av(), self.load_av("reference"), self.load_ar()
        s = self.shapes
        av, ar = self.av_config(), self.ar_config()
        self.config = rl.RLConfig(av, ar, stop_ids=(), samples=s["samples"], max_new_tokens=s["cap"])
        self.state: Any = None
        self.rollouts = 0

    def step(self) -> Numbers:
        return self.learn(self.sample())

    def sample(self) -> Any:
        if self.state is None:
            av, reference, ar = self.models
            self.models = None
            self.reference = rl.decode_layout(reference, cfg=self.config.av)
            self.state = create(av, self.optim), create(ar, self.optim)
        vectors = jnp.asarray(self.data["rl_vectors"])
        self.rollouts += 1
        keys = rl.step_keys(np.uint32(0), np.uint32(self.rollouts), rows=len(vectors), samples=self.config.samples)
        return rl.rollout(self.state[0].params, vectors, keys, cfg=self.config)

    def save_samples(self) -> list[int]:
        """Writes one rollout's tokens for both programs' checks; their shape."""
        self.samples = self.sample()
        np.save(self.folder / "samples.npy", np.asarray(self.samples.tokens))
        return list(self.samples.tokens.shape)

    def check(self) -> list[Numbers]:
        return [self.learn(self.samples), self.learn(self.samples)]

    def learn(self, samples: Any, done: Callable[[str, Any], Any] = lambda name, value: value) -> Numbers:
        """What follows a rollout (as `train.task_rl`); `done(name, results)` is told when each part was dispatched."""
        cfg, vectors = self.config, jnp.asarray(self.data["rl_vectors"])
        reference = done("reference", rl.reference_logprobs(*self.reference, samples, vectors, cfg=cfg))
        batch = self._texts(np.asarray(samples.tokens), vectors)
        av, ar = self.state
        pairs = {
            **{name: batch[name] for name in ("tokens", "lengths")},
            "vectors": jnp.repeat(vectors, cfg.samples, axis=0),
            "valid": jnp.ones(len(batch["failed"]), bool),
            "weight": 1.0 - batch["failed"].astype(jnp.float32),
        }
        ar, of_ar = done("reward and AR update", rl.regression_step(ar, pairs, cfg=cfg.ar))
        judged = rl.judge(of_ar.pop("errors"), batch, jnp.zeros(len(batch["failed"])), cfg=cfg)
        rows = rl.policy_batch(samples, vectors, judged, reference, cfg.av.norms)
        av, of_av = done("policy update", rl.policy_step(av, rows, cfg=cfg))
        self.state = av, ar
        of_both = {**fetched(of_av), **{f"ar_{k}": v for k, v in fetched(of_ar).items()}}
        return {**of_both, "reward": float(judged.metrics["reward"])}

    def _texts(self, sampled: np.ndarray, vectors: jax.Array) -> dict[str, jax.Array]:
        """The AR's prompts, made on the host as in training; the tokens themselves stand for their text."""
        start, end = (np.broadcast_to(self.data[n], (len(sampled), len(self.data[n]))) for n in ("ar_start", "ar_end"))
        tokens = np.concatenate([start, sampled, end], axis=1)
        given = {
            "tokens": padded(tokens, self.shapes["rl_ar_width"]),
            "lengths": np.full(len(tokens), tokens.shape[1], np.int32),
            "failed": np.zeros(len(tokens), bool),
            "valid": np.ones(len(vectors), bool),
        }
        return {**jax.device_put(given), "vectors": vectors}

    def parts(self) -> Numbers:
        """Processor seconds of each part of one step, each waited for (in training the parts overlap)."""
        times: Numbers = {}
        last = time.process_time()

        def done(name: str, value: Any) -> Any:
            nonlocal last
            jax.block_until_ready(value)
            now = time.process_time()
            times[name], last = now - last, now
            return value

        self.learn(done("rollout", self.sample()), done)
        return times


def padded(tokens: np.ndarray, width: int) -> np.ndarray:
    return np.pad(tokens[:, :width], ((0, 0), (0, max(width - tokens.shape[1], 0)))).astype(np.int32)


def fetched(metrics: dict[str, jax.Array]) -> Numbers:
    return {name: float(metrics[name]) for name in ("loss", "grad_norm")}


def best(run: Callable[[], Any], n: int = 3) -> float:
    """Least processor seconds of `n` calls, after one that is not counted."""
    run()
    return min(timed(run)[1] for _ in range(n))


if __name__ == "__main__":
    keep_freed_memory()  # as `nla train` does
    serve({"av": AV, "whole": Whole, "ar": AR, "rl": RL})
