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
from nla_jax.models.sharding import under
from nla_jax.paraphrase import Paraphraser
from nla_jax.processes import of_all
from nla_jax.providers import open_provider
from nla_jax.reconstructor import ARParams
from nla_jax.train import evaluate, roles
from nla_jax.train.adapted import whole
from nla_jax.train.fields import plain
from nla_jax.train.joint_loader import JointLoader
from nla_jax.train.layout import make_layout
from nla_jax.train.rl import (
    RLConfig,
    frozen,
    judge,
    policy_batch,
    policy_step,
    read_errors,
    reference_logprobs,
    regression_batch,
    regression_step,
    rollout,
    step_keys,
)
from nla_jax.train.settings import RLSettings
from nla_jax.train.state import Metrics, TrainState, create
from nla_jax.train.task_sft import step_config
from nla_jax.train.texts import Texts, ar_prompts, ar_width, decode_texts, make_reader, widened
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
        self.layout = make_layout(settings.mesh)
        n = settings.batch_size * settings.samples
        self.layout.spread(n, settings.accumulate, "config.rl.batch_size x samples")
        # The samples that this process decodes, tokenizes and parses.
        self.rows = self.layout.rows(n)
        self.build = open_build(settings.store)
        self.av = roles.from_checkpoint("av", settings.av, self.build)
        self.ar = roles.from_checkpoint("ar", settings.ar, self.build)
        if settings.lora.rank:
            self.av, self.ar = (role.on_base(settings.target) for role in (self.av, self.ar))
        if self.av.sidecar.marker in (self.ar.sidecar.ar_template or ""):
            raise SidecarError(f"{settings.ar}: its template holds the marker of the AV", fix="the AR of this AV")
        self.cfg = RLConfig.of(
            settings,
            step_config(settings, self.av, self.build, settings.av_optim),
            step_config(settings, self.ar, self.build, settings.ar_optim),
            roles.stop_ids(self.av),
        )
        self.variance = self.build.variance_nrm
        self.width = ar_width(self.ar.tokenizer, self.ar.sidecar, settings.max_new_tokens)
        self.held = self._held_out()
        self._teachers: dict[str, int] = {}  # rows of the replayed batches
        self._loader = self._loaders()
        self._reference: Any = None
        self._base: Any = None  # with LoRA: the target's frozen weights, which AV, AR and KL reference share
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
        share = self.layout.rows(s.batch_size)
        loaders = {"rl": make_loader(self.build.store, rows, kind="rl", batch_size=s.batch_size, share=share, **common)}
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
        size = self._teachers[role] = max(min(round(n / parts), len(rows) // parts), 1) * parts
        who = self.ar if role == "ar" else self.av
        return make_loader(
            self.build.store,
            rows,
            kind=f"{role}_sft",
            batch_size=size,
            share=self.layout.rows(size),
            tokenizer=who.tokenizer,
            sidecar=who.sidecar,
            buckets=(longest,),
            **common,
        )

    def init(self) -> JointState:
        s = self.settings
        if s.lora.rank:
            self._base = self.av.base(s.compute_dtype, self.layout, int8=s.lora.int8)
        av = self.av.load(s.param_dtype, self.layout)
        # A copy: the policy's buffers are donated at every update, the reference's must stay.
        self._reference = frozen(roles.copy_of(av), self._base, cfg=self.cfg.av)
        ar = self.ar.load(s.param_dtype, self.layout)
        return JointState(av=create(av, s.av_optim), ar=create(ar, s.ar_optim))

    def loader(self) -> JointLoader:
        return self._loader

    def step(self, state: JointState, batch: dict[str, Any], number: int) -> tuple[JointState, Metrics]:
        with under(self.layout.mesh):
            return self._step(state, batch, number)

    def _step(self, state: JointState, batch: dict[str, Any], number: int) -> tuple[JointState, Metrics]:
        s, cfg, base = self.settings, self.cfg, self._base
        of_rows = self.layout.put({name: batch["rl"][name] for name in ("vectors", "valid")}, s.batch_size)
        vectors = of_rows["vectors"]
        keys = step_keys(np.uint32(s.seed), np.uint32(number), rows=s.batch_size, samples=s.samples)
        samples = rollout(state.av.params, vectors, keys, base, cfg=cfg)
        reference = reference_logprobs(*self._reference, samples, vectors, cfg=cfg)  # runs while the host parses
        found = decode_texts(samples, self.av.tokenizer, self.layout.local)
        texts = self._transformed(found.texts, number)
        ar_batch = {**self._ar_batch(texts, found), **of_rows}
        reads = whole(state.ar.params, base, cfg.ar.lora)
        penalty, claim_metrics = self._penalties(reads, texts, found, batch["rl"]["vectors"])
        av, ar = state.av, state.ar
        of_ar: Metrics = {}
        if s.train_ar:
            ar, of_ar = regression_step(ar, self._regression_rows(ar_batch, batch), base, cfg=cfg.ar)
            errors = of_ar.pop("errors")
        else:
            errors = read_errors(reads, ar_batch, cfg=cfg)
        judged = judge(errors, ar_batch, self.layout.put(penalty, len(samples.tokens)), cfg=cfg)
        lengths = of_all({"sum": found.lengths.sum(), "n": len(found.lengths)})
        metrics: Metrics = {
            **judged.metrics,
            **claim_metrics,
            "fve_nrm": 1.0 - judged.metrics["mse_nrm"] / self.variance,
            "length": jnp.asarray(lengths["sum"].sum() / lengths["n"].sum(), jnp.float32),
        }
        if s.train_av:
            replay = self._on_devices("av", batch["av"]) if "av" in batch else None
            rows = policy_batch(samples, vectors, judged, reference, cfg.av.norms)
            av, of_av = policy_step(av, rows, replay, base, cfg=cfg)
            skipped = of_av.pop("skipped")
            metrics |= {name if name in _PLAIN else f"av/{name}": value for name, value in of_av.items()}
            metrics["skipped"] = skipped
        if s.train_ar:
            of_ar.pop("bad_vectors")
            metrics["skipped"] = metrics.get("skipped", 0) + of_ar.pop("skipped")
            metrics |= {f"ar/{name}": value for name, value in of_ar.items()}
        return JointState(av=av, ar=ar), metrics

    def _regression_rows(self, ar_batch: dict[str, jax.Array], batch: dict[str, Any]) -> dict[str, jax.Array]:
        pairs = self._on_devices("ar", batch["ar"]) if "ar" in batch else None
        multiple = self.layout.shards * self.settings.accumulate if self.layout.shards > 1 else 1
        return regression_batch(ar_batch, pairs, samples=self.settings.samples, multiple=multiple)

    def _transformed(self, texts: list[str], number: int) -> list[str]:
        """What the AR reads in the place of the explanations.

        The samples of one activation share every draw: whether one of them lost its quotes must not decide which of
        them was the best."""
        s, group = self.settings, self.rows // self.settings.samples
        if self._paraphraser is not None:
            share = np.random.default_rng([s.seed, number]).random(s.batch_size)
            chosen = np.flatnonzero(share[group] < s.paraphrase)
            texts = list(texts)
            for i, text in zip(chosen, self._paraphraser.apply_many([texts[i] for i in chosen]), strict=True):
                texts[i] = text
        if not s.transforms:
            return texts
        draws = (np.random.default_rng([s.seed, number, int(i)]) for i in group)
        return [apply(text, s.transforms, rng) for text, rng in zip(texts, draws, strict=True)]

    def _ar_batch(self, texts: list[str], found: Texts) -> dict[str, jax.Array]:
        readable = ["" if bad else text for text, bad in zip(texts, found.failed, strict=True)]
        tokens, lengths = ar_prompts(readable, self.ar.tokenizer, self.ar.sidecar, self.width)
        if jax.process_count() > 1:
            tokens = widened(tokens, self.ar.tokenizer.pad_id or 0, of_all({"": tokens.shape[1]})[""].max())
        given = {"tokens": tokens, "lengths": lengths, "failed": found.failed}
        return self.layout.put(given, self.settings.batch_size * self.settings.samples)

    def _on_devices(self, role: str, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A replayed batch."""
        given = {name: value for name, value in batch.items() if name not in ("row", "doc")}
        return self.layout.put(given, self._teachers[role])

    def _penalties(
        self, ar: ARParams, texts: list[str], found: Texts, vectors: np.ndarray
    ) -> tuple[np.ndarray, Metrics]:
        """What is taken off each sample's reward for claims that the AR could do without."""
        s = self.settings
        none = np.zeros(len(texts), np.float32)
        if not s.claim_penalty:
            return none, {}
        called = []
        read_own = self._reader(ar, own=True)

        def read(texts: list[str]) -> np.ndarray:
            called.append(True)
            return read_own(texts)

        # The vectors here are those of this process's activations, of which its samples may need a part.
        held = np.searchsorted(self.layout.rows(s.batch_size), self.rows // s.samples)
        shares = claims.idle_shares(texts, found.failed, vectors[held], read, self.ar.mse_scale, s.claim_threshold)
        if not called:  # the other processes may have claims to read
            read_own([])
        good = shares[~found.failed]
        told = of_all({"sum": good.mean() * len(good) if len(good) else 0.0, "n": len(good)})
        idle = told["sum"].sum() / max(told["n"].sum(), 1)
        return (s.claim_penalty * shares).astype(np.float32), {"idle_claims": jnp.asarray(idle, jnp.float32)}

    def _reader(self, ar: ARParams, own: bool = False) -> evaluate.Read:
        return make_reader(
            ar,
            self.ar.cfg,
            self.ar.tokenizer,
            self.ar.sidecar,
            batch_size=self.settings.micro_batch,
            width=self.width,
            compute_dtype=self.settings.compute_dtype,
            layout=self.layout,
            own=own,
        )

    def evaluate(self, state: JointState, number: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Sampled and greedy explanations of the held-out rows, and the controls of `train.evaluate`."""
        held = self.held
        if held is None:
            return {}, []
        read, scale = self._reader(whole(state.ar.params, self._base, self.ar.lora)), self.ar.mse_scale
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
            with under(self.layout.mesh):
                keys = step_keys(np.uint32(_EVAL_SEED), number, rows=size, samples=1)
                given = self.layout.put_whole(full)
                drawn = rollout(av, given, keys, self._base, cfg=self.cfg, temperature=temperature)
            found = decode_texts(drawn, self.av.tokenizer, self.layout.whole)
            n = len(some)
            parts.append(Texts(found.texts[:n], found.failed[:n], found.lengths[:n]))
        return Texts(
            [text for p in parts for text in p.texts],
            np.concatenate([p.failed for p in parts]),
            np.concatenate([p.lengths for p in parts]),
        )

    def export(self, state: JointState, directory: Path) -> list[Path]:
        return [
            self.av.export(state.av.params, directory, base=self._base, stage="rl"),
            self.ar.export(state.ar.params, directory, base=self._base, stage="rl"),
        ]

    def describe(self) -> dict[str, Any]:
        # Among the settings, because a resumed run must have them too: the KL reference is read anew from its place.
        return {
            "settings": {**self.settings.to_dict(), "av_weights": weights_fingerprint(self.av.path)},
            "store": self.build.store.manifest["hash"],
            "from": [str(self.av.path), str(self.ar.path)],
            "layer_index": self.build.layer,
            "variance_nrm": self.variance,
            "adapters": plain([self.av.lora, self.ar.lora]),
        }


_PLAIN = ("kl", "entropy", "clipped", "ratio_error", "length")
