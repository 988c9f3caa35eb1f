"""Our half of the training benchmark: the jitted steps of `nla_jax.train`, as `nla train` calls them, on given arrays."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax.models import hf
from nla_jax.prompt import AVPrompt
from nla_jax.reconstructor import ARParams, init_head
from nla_jax.tools.bench_worker import serve
from nla_jax.train import rl
from nla_jax.train.gradients import gradients
from nla_jax.train.logprobs import token_logprobs
from nla_jax.train.settings import OptimizerSettings
from nla_jax.train.state import apply_gradients, create
from nla_jax.train.steps import ARConfig, AVConfig, ar_step, av_logprobs, av_mask, av_step, guarded, prefix_fn

Numbers = dict[str, float]


class _Program:
    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes = json.loads((folder / "shapes.json").read_text())
        self.data = dict(np.load(folder / "data.npz"))
        self.optim = OptimizerSettings(lr=self.shapes["lr"], schedule="constant", warmup=0.0)
        self.calls = 0

    def load_av(self, name: str = "model") -> Any:
        self.cfg, params = hf.load_model(self.folder / name, "float32")
        return jax.block_until_ready(params)

    def load_ar(self) -> ARParams:
        n = self.shapes["ar_layers"]
        self.ar_model, trunk = hf.load_model(self.folder / "model", "float32", n_layers=n, head=False)
        return jax.block_until_ready(ARParams(trunk=trunk, head=init_head(self.ar_model.d_model)))

    def av_config(self) -> AVConfig:
        prompt = AVPrompt(tuple(int(i) for i in self.data["prompt"]), int(self.data["marker"]))
        scale = self.shapes["injection_scale"]
        return AVConfig(self.cfg, self.optim, prompt=prompt, injection_scale=scale, chunk=self.shapes["logit_chunk"])

    def ar_config(self) -> ARConfig:
        return ARConfig(self.ar_model, self.optim, mse_scale=self.ar_model.d_model**0.5)

    def versions(self) -> str:
        return f"jax {jax.__version__}"

    def check(self) -> list[Numbers]:
        """Loss and gradient norm of two steps on the same batch."""
        return [self.step(), self.step()]

    def step(self) -> Numbers:
        raise NotImplementedError


def padded(tokens: np.ndarray, width: int) -> np.ndarray:
    return np.pad(tokens[:, :width], ((0, 0), (0, max(width - tokens.shape[1], 0)))).astype(np.int32)


def fetched(metrics: dict[str, jax.Array], *names: str) -> Numbers:
    return {name: float(metrics[name]) for name in names or ("loss", "grad_norm")}


class AV(_Program):
    def __init__(self, folder: Path):
        super().__init__(folder)
        params = self.load_av()
        self.params, self.state = params, None
        d, s = self.data, self.shapes
        tail = d["prompt"][int(d["marker"]) :]
        B = len(d["responses"])
        tokens = np.concatenate([np.broadcast_to(tail, (B, len(tail))), d["responses"]], axis=1)
        at = np.arange(s["av_width"])[None]
        mask = (at >= len(tail)) & (at < len(tail) + d["response_lengths"][:, None])
        self.batch = {
            "tokens": padded(tokens, s["av_width"]) * (mask | (at < len(tail))),
            "loss_mask": mask,
            "valid": np.ones(B, bool),
            "vectors": d["vectors"],
        }

    def step(self) -> Numbers:
        self._begin()
        self.state, metrics = av_step(self.state, jax.device_put(self.batch), cfg=self.av_config())
        return fetched(metrics)

    def _begin(self) -> None:
        if self.state is None:  # after the resident weights were counted: moments are part of what training adds
            self.state, self.params = create(self.params, self.optim), None

    def parts(self) -> Numbers:
        """Seconds of the update alone, of the vocabulary's part (forward and backward) alone, and of a whole step."""
        self._begin()
        cfg, batch = self.av_config(), jax.device_put(self.batch)
        width = batch["tokens"].shape[1] - cfg.tail
        x = jax.random.normal(jax.random.key(0), (len(batch["tokens"]), width, self.cfg.d_model))

        @functools.partial(jax.jit, static_argnames="cfg")
        def grads(params: Any, batch: Any, *, cfg: AVConfig) -> Any:
            def loss(params: Any, prefix: Any, micro: Any) -> Any:
                logprobs = av_logprobs(params, prefix, micro, cfg)
                return -jnp.mean(jnp.where(av_mask(micro), logprobs, 0.0)), {}

            return gradients(loss, params, guarded(batch, cfg.norms), prefix=prefix_fn(cfg))

        @functools.partial(jax.jit, static_argnames="cfg")
        def logits(params: Any, x: jax.Array, targets: jax.Array, *, cfg: AVConfig) -> Any:
            def loss(params: Any, x: jax.Array) -> jax.Array:
                return jnp.mean(token_logprobs(params, x, targets, cfg.model, chunk=cfg.chunk))

            return jax.grad(loss, argnums=(0, 1))(params, x)

        whole = best(self.step)
        assert self.state is not None
        params = self.state.params
        of_gradients = best(lambda: jax.block_until_ready(grads(params, batch, cfg=cfg)))
        of_logits = best(lambda: jax.block_until_ready(logits(params, x, batch["tokens"][:, cfg.tail :], cfg=cfg)))
        return _sft_parts(whole, of_gradients, of_logits, self._update(params))

    def _update(self, params: Any) -> float:
        return update_seconds(self, params)


class AR(_Program):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.params: Any = self.load_ar()
        self.state: Any = None
        d = self.data
        live = np.arange(self.shapes["ar_width"])[None] < d["ar_lengths"][:, None]
        self.batch = {
            "tokens": padded(d["ar_tokens"], self.shapes["ar_width"]) * live,
            "lengths": d["ar_lengths"].astype(np.int32),
            "valid": np.ones(len(live), bool),
            "vectors": d["ar_vectors"],
        }

    def step(self) -> Numbers:
        if self.state is None:
            self.state, self.params = create(self.params, self.optim), None
        self.state, metrics = ar_step(self.state, jax.device_put(self.batch), cfg=self.ar_config())
        return fetched(metrics)

    def parts(self) -> Numbers:
        whole = best(self.step)
        update = update_seconds(self, self.state.params)
        return {"step": whole, "blocks, forward and backward": whole - update, "optimizer": update}


def update_seconds(program: Any, params: Any) -> float:
    """Seconds of clipping, guard and AdamW alone, in place, on a state of its own."""
    step = jax.jit(apply_gradients, static_argnums=2, donate_argnums=(0, 1))
    state = create(jax.tree.map(jnp.copy, params), program.optim)
    times = []
    for _ in range(4):
        grads = jax.block_until_ready(jax.tree.map(jnp.ones_like, params))
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, grads, program.optim))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _sft_parts(whole: float, grads: float, logits: float, update: float) -> Numbers:
    return {
        "step": whole,
        "blocks, forward and backward": grads - logits,
        "logits and loss, forward and backward": logits,
        "optimizer": update,
        "not in the parts": whole - grads - update,
    }


def best(run: Callable[[], Any], n: int = 3) -> float:
    """Least seconds of `n` calls after one that is not counted."""
    times = []
    for _ in range(n + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


class RL(_Program):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self.models: Any = self.load_av(), self.load_av("reference"), self.load_ar()
        self.state: Any = None
        self.rl_config()

    def rl_config(self) -> None:
        s = self.shapes
        av, ar = self.av_config(), self.ar_config()
        self.config = rl.RLConfig(av, ar, stop_ids=(), samples=s["samples"], max_new_tokens=s["cap"])

    def _begin(self) -> None:
        if self.state is None:
            av, reference, ar = self.models
            self.models = None
            self.reference = rl.decode_layout(reference, cfg=self.config.av)
            self.state = create(av, self.optim), create(ar, self.optim)

    def step(self) -> Numbers:
        self._begin()
        self.calls += 1
        return self.learn(self.sample())

    def sample(self) -> Any:
        s, vectors = self.shapes, jnp.asarray(self.data["rl_vectors"])
        keys = rl.step_keys(np.uint32(0), np.uint32(self.calls), rows=len(vectors), samples=s["samples"])
        return rl.rollout(self.state[0].params, vectors, keys, cfg=self.config)

    def save_samples(self) -> list[int]:
        """Writes one rollout's tokens for both programs' checks; their shape."""
        self._begin()
        self.samples = self.sample()
        np.save(self.folder / "samples.npy", np.asarray(self.samples.tokens))
        return list(self.samples.tokens.shape)

    def check(self) -> list[Numbers]:
        return [self.learn(self.samples), self.learn(self.samples)]

    def learn(self, samples: Any, timed: Callable[[str, Any], Any] = lambda name, value: value) -> Numbers:
        """What follows a rollout; `timed(name, results)` is told when each part was dispatched."""
        d, cfg, vectors = self.data, self.config, jnp.asarray(self.data["rl_vectors"])
        reference = timed("reference", rl.reference_logprobs(*self.reference, samples, vectors, cfg=cfg))
        batch = self._texts(np.asarray(samples.tokens), vectors)
        av, ar = self.state
        judged = timed("reward", rl.judge(ar.params, batch, jnp.zeros(len(batch["failed"])), cfg=cfg))
        rows = rl.policy_batch(samples, vectors, judged, reference, cfg.av.norms)
        av, of_av = timed("policy update", rl.policy_step(av, rows, cfg=cfg))
        G = cfg.samples
        pairs = {
            **{name: batch[name] for name in ("tokens", "lengths")},
            "vectors": jnp.repeat(vectors, G, axis=0),
            "valid": jnp.ones(len(vectors) * G, bool),
            "weight": 1.0 - batch["failed"].astype(jnp.float32),
        }
        ar, of_ar = timed("AR update", ar_step(ar, pairs, cfg=cfg.ar))
        self.state = av, ar
        assert d is self.data
        return {
            **fetched(of_av),
            "reward": float(judged.metrics["reward"]),
            **{f"ar_{k}": v for k, v in fetched(of_ar).items()},
        }

    def _texts(self, sampled: np.ndarray, vectors: jax.Array) -> dict[str, jax.Array]:
        """The AR's prompts, made on the host as in training; the tokens themselves stand for their text."""
        start, end = (np.broadcast_to(self.data[n], (len(sampled), len(self.data[n]))) for n in ("ar_start", "ar_end"))
        tokens = np.concatenate([start, sampled, end], axis=1)
        lengths = np.full(len(tokens), tokens.shape[1], np.int32)
        given = {"tokens": padded(tokens, self.shapes["rl_ar_width"]), "lengths": lengths}
        given |= {"failed": np.zeros(len(tokens), bool), "valid": np.ones(len(vectors), bool)}
        return {**jax.device_put(given), "vectors": vectors}

    def parts(self) -> Numbers:
        """Seconds of each part of one step, each waited for (in training the parts overlap with the host)."""
        self._begin()
        times: Numbers = {}
        last = [time.perf_counter()]

        def timed(name: str, value: Any) -> Any:
            jax.block_until_ready(value)
            now = time.perf_counter()
            times[name], last[0] = now - last[0], now
            return value

        self.learn(timed("rollout", self.sample()), timed)
        return times


if __name__ == "__main__":
    serve({"av": AV, "ar": AR, "rl": RL})
