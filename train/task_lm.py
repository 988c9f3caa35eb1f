"""Pre-training a language model on texts, or going on with one: target models for tests and for the demo."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nla_jax import hub
from nla_jax.errors import ConfigError
from nla_jax.export import copy_companions
from nla_jax.models import hf
from nla_jax.models.atomic import atomic_dir
from nla_jax.models.config import ModelConfig, read_hf_config
from nla_jax.models.params import init_params, param_specs
from nla_jax.models.sharding import on_its_mesh, replicated
from nla_jax.packing import pack
from nla_jax.tokenizer import Tokenizer
from nla_jax.train.layout import make_layout
from nla_jax.train.lm_data import LMLoader, documents_of, token_pieces
from nla_jax.train.settings import LMSettings
from nla_jax.train.state import Metrics, TrainState, cast, create
from nla_jax.train.steps import StepConfig, lm_logprobs, lm_step

_HELD_OUT = 50  # one piece of a document in this many is kept for evaluation
_EVAL_ROWS = 8


class LMTask:
    """The stage "lm" (see `train.loop.Task`)."""

    name = "lm"
    best = ("eval/loss", "min")

    def __init__(self, settings: LMSettings):
        self.settings = settings
        self.layout = make_layout(settings.mesh)
        self.layout.spread(settings.batch_size, settings.accumulate, "config.lm.batch_size")
        self.source = hub.resolve(settings.init) if settings.init else Path(settings.tokenizer)
        self.tokenizer = Tokenizer.from_dir(settings.tokenizer)
        self.hf_config = read_hf_config(self.source) if settings.init else self._new_config()
        cfg = ModelConfig.from_hf(self.hf_config, source=f"{self.source} (model)")
        if cfg.vocab_size < self.tokenizer.vocab_size:
            raise ConfigError(
                "model.vocab_size", expected=f"at least the tokenizer's {self.tokenizer.vocab_size}", got=cfg.vocab_size
            )
        self.cfg = StepConfig(
            model=cfg,
            optim=settings.optim,
            accumulate=settings.accumulate,
            compute_dtype=settings.compute_dtype,
            remat=settings.remat,
            chunk=settings.logit_chunk,
        )
        pieces = token_pieces(documents_of(settings.corpus), self.tokenizer, settings.length)
        common: dict[str, Any] = {"length": settings.length, "batch_size": settings.batch_size}
        kept = [p for i, p in enumerate(pieces) if i % _HELD_OUT == _HELD_OUT - 1]
        rest = [p for i, p in enumerate(pieces) if i % _HELD_OUT != _HELD_OUT - 1]
        self._loader = LMLoader(rest, **common, seed=settings.seed, share=self.layout.rows(settings.batch_size))
        self._held = kept
        room = settings.length
        self._held_rows = len(pack(np.asarray([len(p) for p in kept]), room, room)) if kept else 0

    def _new_config(self) -> dict[str, Any]:
        """config.json of a model from scratch; ids and vocabulary are the tokenizer's unless given."""
        tok = self.tokenizer
        given = dict(self.settings.model or {})
        ids = {"bos_token_id": tok.bos_id, "eos_token_id": tok.eos_id, "pad_token_id": tok.pad_id}
        return {**ids, "vocab_size": -(-tok.vocab_size // 64) * 64, "torch_dtype": "float32", **given}

    def init(self) -> TrainState:
        model, dtype = self.cfg.model, self.settings.param_dtype
        to = self.layout.shardings(param_specs(model), model)
        if self.settings.init:
            params = hf.load_model(self.source, dtype, shardings=to)[1]
        else:
            make = functools.partial(init_params, model, dtype=jnp.dtype(dtype))
            params = jax.jit(lambda seed: make(jax.random.key(seed)), out_shardings=to)(np.uint32(self.settings.seed))
        return create(params, self.settings.optim)

    def loader(self) -> LMLoader:
        return self._loader

    def step(self, state: TrainState, batch: dict[str, np.ndarray], number: int) -> tuple[TrainState, Metrics]:
        return lm_step(state, self.layout.put(batch, self.settings.batch_size), cfg=self.cfg)

    def evaluate(self, state: TrainState, number: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Loss in nats per token of held-out documents."""
        if not self._held:
            return {}, []
        loader = LMLoader(self._held, length=self.settings.length, batch_size=min(_EVAL_ROWS, self._held_rows), seed=0)
        total = np.zeros(2)
        for _ in range(min(loader.batches_per_epoch, 16)):
            total += np.asarray(_loss(state.params, self.layout.put_whole(next(loader)), cfg=self.cfg))
        return {"eval/loss": float(total[0] / total[1])}, []

    def export(self, state: TrainState, directory: Path) -> list[Path]:
        out = directory / "target"
        if jax.process_index() != 0:
            hf.give_tensors(state.params, self.cfg.model)
            return [out]
        with atomic_dir(out, overwrite=True) as temporary:
            hf.write_checkpoint(state.params, self.cfg.model, self.hf_config, temporary)
            copy_companions(Path(self.settings.tokenizer), temporary)
        return [out]

    def describe(self) -> dict[str, Any]:
        return {"settings": self.settings.to_dict(), "data": self._loader.report, "from": self.settings.init}


@on_its_mesh
@functools.partial(jax.jit, static_argnames=("cfg",))
def _loss(params: Any, batch: dict[str, jax.Array], *, cfg: StepConfig) -> jax.Array:
    segments = batch["segments"]
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    logprobs = lm_logprobs(cast(params, cfg.compute_dtype), batch, cfg)
    return replicated(jnp.stack([-jnp.sum(jnp.where(mask, logprobs, 0.0)), jnp.sum(mask).astype(jnp.float32)]))
