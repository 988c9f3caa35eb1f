"""Joint RL: what one step does between host and device, held-out evaluation, exports (see train/rl.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from nla_jax import claims
from nla_jax.build import open_build
from nla_jax.errors import InputError, SidecarError
from nla_jax.extract_run import weights_fingerprint
from nla_jax.loader import Loader, make_loader
from nla_jax.metrics import constant_floor
from nla_jax.paraphrase import Paraphraser
from nla_jax.providers import open_provider
from nla_jax.reconstructor import ARParams
from nla_jax.train import evaluate, roles
from nla_jax.train.joint_loader import JointLoader
from nla_jax.train.rl import (
    Judged,
    RLConfig,
    decode_layout,
    judge,
    policy_batch,
    policy_step,
    reference_logprobs,
    rollout,
    step_keys,
)
from nla_jax.train.settings import RLSettings
from nla_jax.train.state import Metrics, TrainState, create
from nla_jax.train.steps import ar_step
from nla_jax.train.task_sft import step_config
from nla_jax.train.texts import Texts, ar_prompts, ar_width, decode_texts, make_reader
from nla_jax.transforms import apply

_EVAL_SEED = 0x5EED  # evaluation samples are the same draws whatever the run's seed


@struct.dataclass
class JointState:
    """The AV and the AR with their optimizers. The KL reference is the AV that the stage started from."""

    av: TrainState
    ar: TrainState


class RLTask:
    """The stage "rl" (see `train.loop.Task`)."""

    name = "rl"
    best = ("eval/fve_nrm", "max")

    def __init__(self, settings: RLSettings):
        self.settings = settings
        self.build = open_build(settings.store)
        self.av = roles.from_checkpoint("av", settings.av, self.build)
        self.ar = roles.from_checkpoint("ar", settings.ar, self.build)
        if self.av.sidecar.marker in (self.ar.sidecar.ar_template or ""):
            raise SidecarError(f"{settings.ar}: its template holds the marker of the AV", fix="the AR of this AV")
        self.cfg = RLConfig(
            av=step_config(settings, self.av, self.build, settings.av_optim),
            ar=step_config(settings, self.ar, self.build, settings.ar_optim),
            stop_ids=roles.stop_ids(self.av),
            samples=settings.samples,
            max_new_tokens=settings.max_new_tokens,
            reward=settings.reward,
            advantage=settings.advantage,
            aggregate=settings.aggregate,
            clip_ratio=settings.clip_ratio,
            kl_coef=settings.kl_coef,
            kl=settings.kl,
            on_policy_ratio=settings.on_policy_ratio,
            replay_av=settings.replay_av,
        )
        self.variance = self.build.variance_nrm
        self.width = ar_width(self.ar.tokenizer, self.ar.sidecar, settings.max_new_tokens)
        self.held = self._held_out()
        self._loader = self._loaders()
        self._reference: Any = None
        self._paraphraser: Paraphraser | None = None
        if settings.paraphrase and settings.paraphraser is not None:
            provider = open_provider(
                settings.paraphraser, base_url=settings.paraphraser_url, max_tokens=2 * settings.max_new_tokens
            )
            # Every paraphrase is kept, so that a resumed run asks for none twice.
            self._paraphraser = Paraphraser(provider, Path(settings.out or ".") / "rl" / "paraphrases")

    def _held_out(self) -> evaluate.HeldOut | None:
        s = self.settings
        if not s.eval_rows:
            return None
        return evaluate.held_out(self.build, s.eval_store, s.eval_rows)

    def _loaders(self) -> JointLoader:
        """RL activations, and teacher pairs where they are replayed."""
        s = self.settings
        common: dict[str, Any] = {"seed": s.seed, "drop_remainder": True}
        rows = self.build.rows("rl")
        if len(rows) < s.batch_size:
            raise InputError(
                "config.rl.batch_size", expected=f"at most {len(rows)}, the rows of the set", got=s.batch_size
            )
        loaders = {"rl": make_loader(self.build.store, rows, kind="rl", batch_size=s.batch_size, **common)}
        longest = (self.width + 63) // 64 * 64 + 64
        if s.replay_ar:
            n = s.batch_size * s.samples * s.replay_ar / (1 - s.replay_ar)
            loaders["ar"] = self._teacher_pairs("ar", n, longest, common)
        if s.replay_av:
            loaders["av"] = self._teacher_pairs("av", s.batch_size, longest, common)
        return JointLoader(loaders)

    def _teacher_pairs(self, role: str, n: float, longest: int, common: dict[str, Any]) -> Loader:
        """About `n` pairs a step: as many as there are at most, and a multiple of the micro-batches."""
        rows, parts = self.build.rows(f"{role}_sft"), self.settings.accumulate
        size = max(min(round(n / parts), len(rows) // parts), 1) * parts
        who = self.ar if role == "ar" else self.av
        return make_loader(
            self.build.store,
            rows,
            kind=f"{role}_sft",
            batch_size=size,
            tokenizer=who.tokenizer,
            sidecar=who.sidecar,
            buckets=(longest,),
            **common,
        )

    def init(self) -> JointState:
        s = self.settings
        av = self.av.load(s.param_dtype)
        # A copy: the policy's buffers are donated at every update, the reference's must stay.
        self._reference = decode_layout(roles.copy_of(av), cfg=self.cfg.av)
        return JointState(av=create(av, s.av_optim), ar=create(self.ar.load(s.param_dtype), s.ar_optim))

    def loader(self) -> JointLoader:
        return self._loader

    def step(self, state: JointState, batch: dict[str, Any], number: int) -> tuple[JointState, Metrics]:
        s, cfg = self.settings, self.cfg
        vectors = jax.device_put(batch["rl"]["vectors"])
        keys = step_keys(np.uint32(s.seed), np.uint32(number), rows=len(batch["rl"]["vectors"]), samples=s.samples)
        samples = rollout(state.av.params, vectors, keys, cfg=cfg)
        reference = reference_logprobs(*self._reference, samples, vectors, cfg=cfg)  # runs while the host parses
        found = decode_texts(samples, self.av.tokenizer)
        texts = self._transformed(found.texts, number)
        ar_batch = self._ar_batch(texts, found, batch, vectors)
        penalty, claim_metrics = self._penalties(state.ar.params, texts, found, batch["rl"]["vectors"])
        judged = judge(state.ar.params, ar_batch, jax.device_put(penalty), cfg=cfg)
        metrics: Metrics = {
            **judged.metrics,
            **claim_metrics,
            "fve_nrm": 1.0 - judged.metrics["mse_nrm"] / self.variance,
            "length": jnp.asarray(found.lengths.mean(), jnp.float32),
        }
        av, ar = state.av, state.ar
        if s.train_av:
            replay = _on_device(batch["av"]) if "av" in batch else None
            rows = policy_batch(samples, vectors, judged, reference, cfg.av.norms)
            av, of_av = policy_step(av, rows, replay, cfg=cfg)
            skipped = of_av.pop("skipped")
            metrics |= {name if name in _PLAIN else f"av/{name}": value for name, value in of_av.items()}
            metrics["skipped"] = skipped
        if s.train_ar:
            ar, of_ar = ar_step(ar, self._regression(ar_batch, judged, batch), cfg=cfg.ar)
            of_ar.pop("bad_vectors")
            metrics["skipped"] = metrics.get("skipped", 0) + of_ar.pop("skipped")
            metrics |= {f"ar/{name}": value for name, value in of_ar.items()}
        return JointState(av=av, ar=ar), metrics

    def _transformed(self, texts: list[str], number: int) -> list[str]:
        """What the AR reads in the place of the explanations.

        The samples of one activation share every draw: whether one of them lost its quotes must not decide which of
        them was the best."""
        s = self.settings
        if self._paraphraser is not None:
            share = np.random.default_rng([s.seed, number]).random(len(texts) // s.samples)
            chosen = np.flatnonzero(np.repeat(share < s.paraphrase, s.samples))
            texts = list(texts)
            for i, text in zip(chosen, self._paraphraser.apply_many([texts[i] for i in chosen]), strict=True):
                texts[i] = text
        if not s.transforms:
            return texts
        groups = (np.random.default_rng([s.seed, number, i // s.samples]) for i in range(len(texts)))
        return [apply(text, s.transforms, rng) for text, rng in zip(texts, groups, strict=True)]

    def _ar_batch(
        self, texts: list[str], found: Texts, batch: dict[str, Any], vectors: jax.Array
    ) -> dict[str, jax.Array]:
        readable = ["" if bad else text for text, bad in zip(texts, found.failed, strict=True)]
        tokens, lengths = ar_prompts(readable, self.ar.tokenizer, self.ar.sidecar, self.width)
        given = {"tokens": tokens, "lengths": lengths, "failed": found.failed, "valid": batch["rl"]["valid"]}
        return {**jax.device_put(given), "vectors": vectors}

    def _penalties(
        self, ar: ARParams, texts: list[str], found: Texts, vectors: np.ndarray
    ) -> tuple[np.ndarray, Metrics]:
        """What is taken off each sample's reward for claims that the AR could do without."""
        s = self.settings
        none = np.zeros(len(texts), np.float32)
        if not s.claim_penalty:
            return none, {}
        read = self._reader(ar)
        shares = claims.idle_shares(
            texts, found.failed, np.repeat(vectors, s.samples, axis=0), read, self.ar.mse_scale, s.claim_threshold
        )
        idle = float(shares[~found.failed].mean()) if (~found.failed).any() else 0.0
        return (s.claim_penalty * shares).astype(np.float32), {"idle_claims": jnp.asarray(idle, jnp.float32)}

    def _regression(
        self, ar_batch: dict[str, jax.Array], judged: Judged, batch: dict[str, Any]
    ) -> dict[str, jax.Array]:
        """The AR's batch: the rollout's successful samples, and replayed teacher pairs."""
        G = self.settings.samples
        rows = {
            "tokens": ar_batch["tokens"],
            "lengths": ar_batch["lengths"],
            "vectors": jnp.repeat(ar_batch["vectors"], G, axis=0),
            "valid": jnp.repeat(ar_batch["valid"], G),
            "weight": 1.0 - ar_batch["failed"].astype(jnp.float32),
        }
        if "ar" not in batch:
            return rows
        teacher = _on_device(batch["ar"])
        teacher["weight"] = jnp.ones(teacher["valid"].shape)
        width = max(rows["tokens"].shape[1], teacher["tokens"].shape[1])
        for part in (rows, teacher):
            part["tokens"] = jnp.pad(part["tokens"], ((0, 0), (0, width - part["tokens"].shape[1])))
        return {name: jnp.concatenate([rows[name], teacher[name]]) for name in rows}

    def _reader(self, ar: ARParams) -> evaluate.Read:
        size = self.settings.batch_size * self.settings.samples
        return make_reader(
            ar,
            self.ar.cfg,
            self.ar.tokenizer,
            self.ar.sidecar,
            batch_size=size,
            width=self.width,
            compute_dtype=self.settings.compute_dtype,
        )

    def evaluate(self, state: JointState, number: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sampled and greedy explanations of the held-out rows, and the controls of `train.evaluate`."""
        held = self.held
        if held is None:
            return {}, []
        read, scale = self._reader(state.ar.params), self.ar.mse_scale
        drawn = [self.explain(state.av.params, held.vectors, 1.0, k) for k in range(self.settings.eval_samples)]
        of_each = [evaluate.text_scores(d.texts, d.failed, held, read, scale, self.variance) for d in drawn]
        scores = {name: float(np.mean([s[name] for s, _ in of_each])) for name in of_each[0][0]}
        texts, failed, errors = drawn[0].texts, drawn[0].failed, of_each[0][1]
        scores |= evaluate.changed_text_scores(texts, failed, held, read, scale, self.variance)
        if self.settings.transforms:

            def change(text: str, rng: np.random.Generator) -> str:
                return apply(text, self.settings.transforms, rng)

            scores |= evaluate.changed_text_scores(
                texts, failed, held, read, scale, self.variance, {"transformed": change}
            )
        greedy = self.explain(state.av.params, held.vectors, 0.0, 0)
        scores["eval/fve_nrm_greedy"] = evaluate.text_scores(
            greedy.texts, greedy.failed, held, read, scale, self.variance
        )[0]["eval/fve_nrm"]
        taught = np.asarray([text is not None for text in held.teacher])
        if taught.any():
            teacher = evaluate.text_scores(
                [text or "" for text in held.teacher], ~taught, held, read, scale, self.variance
            )[1]
            scores["eval/fve_nrm_teacher"] = 1 - float(teacher[taught].mean()) / self.variance
        scores["eval/failed_share"] = float(np.mean([d.failed.mean() for d in drawn]))
        scores["eval/length"] = float(np.mean([d.lengths.mean() for d in drawn]))
        scores["eval/constant_floor"] = constant_floor(self.variance)
        return scores, evaluate.sample_rows(held, texts, failed, errors, len(held))

    def explain(self, av: Any, vectors: np.ndarray, temperature: float, sample: int) -> Texts:
        """One explanation of each vector, in batches of the rollout's size; always the same draws."""
        size = self.settings.batch_size * self.settings.samples
        parts = []
        for first in range(0, len(vectors), size):
            some = vectors[first : first + size]
            full = np.concatenate([some, np.repeat(some[:1], size - len(some), axis=0)])
            number = np.uint32(first // size * 1000 + sample)
            keys = step_keys(np.uint32(_EVAL_SEED), number, rows=size, samples=1)
            found = decode_texts(
                rollout(av, jax.device_put(full), keys, cfg=self.cfg, temperature=temperature), self.av.tokenizer
            )
            n = len(some)
            parts.append(Texts(found.texts[:n], found.failed[:n], found.lengths[:n]))
        return Texts(
            [text for p in parts for text in p.texts],
            np.concatenate([p.failed for p in parts]),
            np.concatenate([p.lengths for p in parts]),
        )

    def export(self, state: JointState, directory: Path) -> list[Path]:
        return [
            self.av.export(state.av.params, directory, stage="rl"),
            self.ar.export(state.ar.params, directory, stage="rl"),
        ]

    def describe(self) -> dict[str, Any]:
        # Among the settings, because a resumed run must have them too: the KL reference is read anew from its place.
        return {
            "settings": {**self.settings.to_dict(), "av_weights": weights_fingerprint(self.av.path)},
            "store": self.build.store.manifest["hash"],
            "from": [str(self.av.path), str(self.ar.path)],
            "layer_index": self.build.layer,
            "variance_nrm": self.variance,
        }


_PLAIN = ("kl", "entropy", "clipped", "ratio_error", "length")


def _on_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.device_put({name: value for name, value in batch.items() if name not in ("row", "doc")})
