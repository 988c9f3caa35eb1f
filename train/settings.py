"""Settings of training: frozen, hashable dataclasses, one self-contained object for each stage.

A run config (an ml_collections `ConfigDict`, see nla_jax.configs) is parsed into them by `from_config` and goes no
further: steps and tasks take these objects, which can be static arguments of a jitted function. A field that is
wrong raises InputError with its name, what is expected and what was got.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from nla_jax.errors import ConfigError, InputError
from nla_jax.models.lora import TARGETS, LoRAConfig
from nla_jax.models.sharding import MeshSettings
from nla_jax.train.fields import (
    Frozen,
    check_choices,
    convert,
    hints,
    not_negative,
    plain,
    positive,
    require,
    unknown_key,
)
from nla_jax.transforms import TRANSFORMS

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "dots", "blocks"]  # ever less memory; "blocks" is about a third more work
STAGES = ("lm", "ar", "av", "rl")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """An optimizer, its learning-rate schedule, and the guard around it."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 2e-5  # peak learning rate
    schedule: Literal["constant", "cosine", "linear"] = "cosine"  # after the warm-up, which is linear
    end: float = 0.1  # final learning rate / peak; unused by "constant"
    warmup: float = 0.05  # below 1 a fraction of all steps, else a number of steps
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # decoupled, multiplied by the learning rate
    clip: float = 1.0  # global L2 norm that gradients are scaled down to; 0 for none
    skip_above: float = 1e4  # global gradient norm from which a step is skipped; a non-finite one always is
    adam_lr: float = 0.0  # with "muon": peak of what is no matrix of a block; 0 for lr / 4
    steps: int = 0  # length of the schedule; 0 for the stage's steps, filled in there

    def __post_init__(self) -> None:
        check_choices(self)
        positive(self, "lr", "eps", "skip_above")
        not_negative(self, "warmup", "weight_decay", "clip", "adam_lr", "steps")
        require(0 <= self.end <= 1, "end", "a number from 0 to 1", self.end)
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, name, "a number from 0, below 1", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Low-rank adapters in the place of full fine-tuning (models/lora.py)."""

    rank: int = 0  # of the adapters; 0 for none: all parameters are trained
    alpha: float = 32.0  # the change of a weight is scaled by alpha / rank
    targets: tuple[str, ...] = tuple(TARGETS)  # projections that are adapted, by their Hugging Face names
    rslora: bool = False  # scaled by alpha / sqrt(rank) instead
    int8: bool = False  # the frozen matrices in 8 bits, half of bfloat16's memory (pip install 'nla_jax[int8]')

    def __post_init__(self) -> None:
        not_negative(self, "rank")
        require(self.rank > 0 or not self.int8, "int8", "False where lora.rank is 0: nothing is frozen", self.int8)
        try:
            LoRAConfig(max(self.rank, 1), self.alpha, self.targets, self.rslora)
        except ConfigError as error:
            raise InputError(error.what.removeprefix("lora."), expected=error.expected, got=error.got) from None

    @property
    def config(self) -> LoRAConfig | None:
        """None where all parameters are trained."""
        return LoRAConfig(self.rank, self.alpha, self.targets, self.rslora) if self.rank else None


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What every stage has."""

    out: str = ""  # directory of the run; the stage writes into its subdirectory of the stage's name
    steps: int = 0  # optimizer steps
    batch_size: int = 256  # examples per step over all devices and hosts (rl: activations)
    accumulate: int = 1  # micro-batches that a step is cut into; gradients are those of the whole batch
    seed: int = 0  # of everything random; step i draws from (seed, i)
    param_dtype: Dtype = "float32"  # of the parameters that are updated
    compute_dtype: Dtype = "float32"  # of matrix products; losses and norms are float32 always
    remat: Remat = "none"  # computed again in the backward pass: nothing, all but weights' products, or whole blocks
    logit_chunk: int = 1024  # tokens whose logits exist at a time on a device
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 0  # steps between held-out evaluations beside the first and the last; 0 for none
    save_every: int = 0  # steps between checkpoints beside the last; 0 for none
    keep_last: int = 2  # checkpoints kept beside the best one
    mesh: MeshSettings = MeshSettings()  # how the devices share the work (models/sharding.py); alike in result

    def __post_init__(self) -> None:
        check_choices(self)
        positive(self, "batch_size", "accumulate", "logit_chunk", "log_every", "keep_last")
        not_negative(self, "steps", "eval_every", "save_every")
        require(0 <= self.seed < 2**32, "seed", "0 to 4294967295", self.seed)
        rows = self._rows
        require(
            rows % self.accumulate == 0, "accumulate", f"a divisor of the {rows} samples of a step", self.accumulate
        )
        for name in self.optimizers():
            optim = getattr(self, name)
            if self.steps and not optim.steps:
                object.__setattr__(self, name, dataclasses.replace(optim, steps=self.steps))

    @property
    def _rows(self) -> int:
        return self.batch_size * int(getattr(self, "samples", 1))

    @property
    def micro_batch(self) -> int:
        """Samples that are held at a time over all devices: of a step, and of what is read to evaluate."""
        return self._rows // self.accumulate

    @classmethod
    def optimizers(cls) -> tuple[str, ...]:
        """Names of the fields that are OptimizerSettings."""
        return tuple(f.name for f in dataclasses.fields(cls) if f.name.endswith("optim"))

    def with_steps(self, steps: int) -> Self:
        """The same with another number of steps, which schedules follow unless they were given their own."""
        changes: dict[str, Any] = {"steps": steps}
        for name in self.optimizers():
            optim = getattr(self, name)
            if optim.steps in (0, self.steps):
                changes[name] = dataclasses.replace(optim, steps=steps)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as what JSON can hold, for provenance: tuples are lists, nested settings dictionaries."""
        return plain(self)


@dataclass(frozen=True, kw_only=True)
class LMSettings(StageSettings):
    """Training a language model on texts, from scratch (`model`) or from a checkpoint (`init`)."""

    corpus: tuple[str, ...]  # files, directories or hub:ORG/NAME of texts, as `nla extract` reads them
    tokenizer: str  # directory of the tokenizer
    length: int = 512  # tokens per row
    model: Mapping[str, Any] | None = None  # config.json fields of a model from scratch; vocab_size: the tokenizer's
    init: str | None = None  # directory of a model to go on from
    optim: OptimizerSettings = OptimizerSettings(lr=3e-4)

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "steps")
        require(self.length >= 2, "length", "at least 2 tokens", self.length)
        require(bool(self.corpus), "corpus", "at least one file or directory", "none")
        require((self.model is None) != (self.init is None), "model, init", "one of the two", _which(self))
        if self.model is not None:
            object.__setattr__(self, "model", Frozen(self.model, "model"))


@dataclass(frozen=True, kw_only=True)
class SFTSettings(StageSettings):
    """Supervised training of the AR or the AV on (activation, explanation) pairs of a store."""

    stage: Literal["ar", "av"]  # which of the two
    target: str  # directory or hub id of the target model, from which the AV or AR is made
    store: str  # activation store with training sets (`nla build`)
    init: str | None = None  # directory of an AV or AR to go on from; None: made from the target
    buckets: tuple[int, ...] = (96, 128, 160, 192, 256, 384)  # tokens that batches are padded to
    epochs: int | None = 1  # passes over the data; with `steps` above 0 too, what comes first ends training
    pack: bool = False  # several samples in rows of the last bucket's length
    optim: OptimizerSettings = OptimizerSettings()
    lora: LoRASettings = LoRASettings()  # adapters on the frozen target, which `init` may hold already
    max_norm_ratio: float = 100.0  # a vector longer than this many injection scales is left out and counted
    transforms: tuple[tuple[str, float], ...] = ()  # (name, probability) of nla_jax.transforms, for what the AR reads
    eval_rows: int = 512  # held-out activations per evaluation; 0 for none
    eval_store: str | None = None  # store that they come from; None: rows of `store` that no stage trains on

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.steps > 0 or self.epochs is not None, "steps", "1 or more where epochs is None", self.steps)
        require(self.epochs is None or self.epochs > 0, "epochs", "1 or more, or None", self.epochs)
        require(bool(self.buckets), "buckets", "at least one length", self.buckets)
        ascending = sorted(set(self.buckets))
        require(list(self.buckets) == ascending and self.buckets[0] > 0, "buckets", "ascending lengths", self.buckets)
        not_negative(self, "eval_rows")
        require(1 < self.max_norm_ratio < math.inf, "max_norm_ratio", "a number above 1", self.max_norm_ratio)
        _check_adapted(self)
        _check_transforms(self.transforms)
        require(not self.transforms or self.stage == "ar", "transforms", "none: the AV reads no texts", self.transforms)


@dataclass(frozen=True, kw_only=True)
class RLSettings(StageSettings):
    """Joint training: the AV by GRPO on what the AR makes of its explanations, the AR by regression on them."""

    target: str  # directory or hub id of the target model
    store: str  # activation store with training sets (`nla build`)
    av: str  # directory of the warm-started AV, which is also the KL reference
    ar: str  # directory of the warm-started AR
    batch_size: int = 128  # activations per step, N; N * samples explanations are drawn
    samples: int = 8  # explanations per activation, G
    max_new_tokens: int = 150  # tokens at which an explanation is cut; a cut one has failed
    rollout_parts: int = 1  # activations are explained in so many parts, one after another: less cache, more time
    av_optim: OptimizerSettings = OptimizerSettings(lr=1.41e-5, schedule="constant", warmup=0.0)
    ar_optim: OptimizerSettings = OptimizerSettings(lr=1.41e-5, schedule="constant", warmup=0.0)
    lora: LoRASettings = LoRASettings()  # any rank above 0: the warm starts' adapters are trained on, as they are
    train_av: bool = True  # False: the AV stays as it is
    train_ar: bool = True  # False: the AR stays as it is
    reward: Literal["neg_mse", "neg_log_mse"] = "neg_mse"  # a failed sample gets that of an orthogonal guess
    advantage: Literal["group_std", "group_mean", "batch_std"] = "group_std"  # reward less the group's mean, over what
    aggregate: Literal["sample", "token"] = "sample"  # mean over a sample's tokens, then samples; or over all tokens
    clip_ratio: float = 0.2  # the policy's ratio to the sampling policy is clipped to 1 -+ this
    kl_coef: float = 0.01  # weight of the KL to the warm-started AV; 0 for none
    kl: Literal["k2", "k3"] = "k2"  # its estimator per token
    on_policy_ratio: Literal["self", "sampled"] = "self"  # log-probs under the ratio: recomputed, or the sampler's
    max_norm_ratio: float = 100.0  # a vector longer than this many injection scales is left out and counted
    transforms: tuple[tuple[str, float], ...] = ()  # (name, probability) of nla_jax.transforms, for what the AR reads
    paraphrase: float = 0.0  # share of explanations that the AR reads in a provider's other words, before `transforms`
    paraphraser: str | None = None  # that provider: openai:MODEL or anthropic:MODEL, as `nla teach` names them
    paraphraser_url: str | None = None  # its address, where it is not the provider's own
    replay_ar: float = 0.0  # share of teacher pairs in the AR's batch
    replay_av: float = 0.0  # weight of the cross-entropy of teacher pairs in the AV's loss
    claim_penalty: float = 0.0  # reward taken off times the share of claims that add nothing
    claim_threshold: float = 0.0  # rise of mse_nrm without a claim below which it adds nothing
    eval_rows: int = 512  # held-out activations per evaluation; 0 for none
    eval_store: str | None = None  # store that they come from; None: rows of `store` that no stage trains on
    eval_samples: int = 1  # explanations of each of them

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "steps", "max_new_tokens", "clip_ratio", "eval_samples", "rollout_parts")
        not_negative(self, "kl_coef", "replay_av", "claim_penalty", "claim_threshold", "eval_rows")
        wanted = f"a divisor of the {self.batch_size} activations of a step"
        require(self.batch_size % self.rollout_parts == 0, "rollout_parts", wanted, self.rollout_parts)
        require(self.samples >= 2, "samples", "2 or more: the reward is compared inside a group", self.samples)
        require(1 < self.max_norm_ratio < math.inf, "max_norm_ratio", "a number above 1", self.max_norm_ratio)
        require(0 <= self.replay_ar < 1, "replay_ar", "a share from 0, below 1", self.replay_ar)
        _check_adapted(self)
        require(self.train_av or self.train_ar, "train_av, train_ar", "at least one of them True", "neither")
        _check_transforms(self.transforms)
        require(0 <= self.paraphrase <= 1, "paraphrase", "a share from 0 to 1", self.paraphrase)
        need = "openai:MODEL or anthropic:MODEL where paraphrase is above 0"
        require(not self.paraphrase or self.paraphraser is not None, "paraphraser", need, self.paraphraser)


Settings = LMSettings | SFTSettings | RLSettings


def _check_adapted(settings: SFTSettings | RLSettings) -> None:
    for name in settings.optimizers() if settings.lora.rank else ():
        rule = getattr(settings, name).name
        require(rule == "adamw", f"{name}.name", "adamw where lora.rank is above 0: muon is for whole matrices", rule)


def _which(settings: LMSettings) -> str:
    return "neither" if settings.init is None else "both"


def _check_transforms(transforms: tuple[tuple[str, float], ...]) -> None:
    for name, probability in transforms:
        require(name in TRANSFORMS, "transforms", " or ".join(TRANSFORMS), repr(name))
        require(0 <= probability <= 1, f"transforms: {name}", "a probability from 0 to 1", probability)
    names = [name for name, _ in transforms]
    require(len(set(names)) == len(names), "transforms", "each name once", names)


def _needed(cls: type) -> list[str]:
    """The fields that have no default."""
    return [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]


SECTIONS: dict[str, type[Settings]] = {"lm": LMSettings, "ar": SFTSettings, "av": SFTSettings, "rl": RLSettings}
# Written once at the top level of a config for every stage that has the field; a stage's section goes before it.
SHARED = (
    *("out", "target", "store", "eval_store", "eval_rows", "tokenizer", "seed", "param_dtype", "compute_dtype"),
    *("remat", "logit_chunk", "log_every", "eval_every", "save_every", "keep_last", "mesh", "lora"),
)
_NESTED: dict[str, Any] = {"mesh": MeshSettings, "lora": LoRASettings}  # sections that a stage's own adds to
_NEEDED = frozenset(name for cls in SECTIONS.values() for name in _needed(cls))
LR = "lr"  # in a stage's section: the learning rate of all its optimizers


def keys_of(cls: Any) -> dict[str, Any]:
    """The keys of a section that is read into `cls`, with their types."""
    keys = {name: hint for name, hint in hints(cls).items() if name not in ("out", "stage")}
    return {**keys, LR: float} if issubclass(cls, StageSettings) else keys


def top_level_keys() -> dict[str, Any]:
    """The keys of a whole config with their types; a stage's is the class of its settings."""
    shared: dict[str, Any] = {}
    for cls in SECTIONS.values():
        shared.update({name: hint for name, hint in hints(cls).items() if name in SHARED})
    return {**shared, **SECTIONS}


def from_config(config: Any, stage: str) -> Settings:
    """The settings of one stage of a run config, an ml_collections ConfigDict (or a dictionary like one).

    Fields come from `config.<stage>`, then from the top level, then from the defaults here. `lr` in a stage's section
    sets every optimizer of the stage. RL's `av` and `ar` default to what the warm starts of the same run export.
    All sections are checked for unknown keys and wrong types, so that a later stage's typo shows before the first.
    InputError names the key (as `config.rl.lr`), what is expected and what was got.
    """
    if stage not in SECTIONS:
        raise InputError("stage", expected=" or ".join(SECTIONS), got=repr(stage))
    given = plain(config.to_dict() if hasattr(config, "to_dict") else config)
    top = _read(given, top_level_keys(), "config")
    for name, inner in _NESTED.items():
        if name in top:
            top[name] = _read(top[name], keys_of(inner), f"config.{name}")
    sections = {name: _section(top.pop(name), SECTIONS[name], name) for name in STAGES if top.get(name) is not None}
    if stage not in sections:
        fix = f"--config.{stage}.KEY=VALUE, or nla train {' or '.join(sections)}" if sections else None
        raise InputError(f"config.{stage}", expected=f"a section of settings for {stage}", got="none", fix=fix)
    cls = SECTIONS[stage]
    fields = hints(cls)
    values = {name: value for name, value in top.items() if name in fields}
    values.update(sections[stage])
    for name, inner in _NESTED.items():
        if name in fields:
            values[name] = _nested(inner, top.get(name), sections[stage].get(name), stage)
    if cls is SFTSettings:
        values["stage"] = stage
    if cls is RLSettings and values.get("out"):
        for role in ("av", "ar"):
            values.setdefault(role, f"{str(values['out']).rstrip('/')}/{role}/export/{role}")
    for name in _needed(cls):
        if values.get(name) in (None, ()):
            key = f"config.{name}" if name in SHARED else f"config.{stage}.{name}"
            raise InputError(f"{key} is not set", fix=f"--{key}={name.upper()}")
    try:
        return cls(**values)
    except InputError as error:
        shared = error.what in top and error.what not in sections[stage]
        raise _placed(error, "config" if shared else f"config.{stage}") from None


def _nested(cls: Any, shared: Any, own: Any, stage: str) -> Any:
    """A stage's mesh or adapters: its section's keys before the top level's."""
    try:
        return cls(**{**(shared or {}), **(own or {})})
    except InputError as error:
        key = error.what.rpartition(".")[2]
        name = next(name for name, inner in _NESTED.items() if inner is cls)
        error = InputError(f"{name}.{key}", expected=error.expected, got=error.got, fix=error.fix)
        raise _placed(error, f"config.{stage}" if key in (own or {}) else "config") from None


def _section(given: Any, cls: type[Settings], name: str) -> dict[str, Any]:
    """A stage's section with `lr` taken apart and optimizers made; only what was given."""
    where = f"config.{name}"
    values = _read(given, keys_of(cls), where)
    for key, inner in _NESTED.items():
        if key in values:
            values[key] = _read(values[key], keys_of(inner), f"{where}.{key}")
    lr = values.pop(LR, None)
    for optim in cls.optimizers():
        if optim in values or lr is not None:
            default: OptimizerSettings = getattr(cls, optim)
            changes = _read(values.get(optim) or {}, keys_of(OptimizerSettings), f"{where}.{optim}")
            changes.update({} if lr is None else {LR: lr})
            try:
                values[optim] = dataclasses.replace(default, **changes)
            except InputError as error:
                raise _placed(error, f"{where}.{optim}") from None
    return values


def _read(given: Any, known: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a section as the types in `known` say; sections inside are left as they are."""
    if not isinstance(given, Mapping):
        raise InputError(where, expected="a section of settings", got=repr(given))
    values = {}
    for key, value in given.items():
        if key not in known:
            raise unknown_key(where, str(key), paths(known))
        hint = known[key]
        # None at the top level and in place of a section says that a value is still to be given.
        nested = dataclasses.is_dataclass(hint)
        if value is None and (nested or key in _NEEDED):
            continue
        values[key] = value if nested else convert(value, hint, f"{where}.{key}")
    return values


def paths(known: dict[str, Any]) -> list[str]:
    """The keys and, dotted, those of the sections below."""
    below = {key: keys_of(hint) for key, hint in known.items() if dataclasses.is_dataclass(hint)}
    return [*known, *(f"{key}.{path}" for key, keys in below.items() for path in paths(keys))]


def _placed(error: InputError, where: str) -> InputError:
    """The same error with the field's place in the config."""
    return InputError(f"{where}.{error.what}", expected=error.expected, got=error.got, fix=error.fix)
