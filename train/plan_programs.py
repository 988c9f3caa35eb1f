"""The programs that each stage runs, ready to be lowered from shapes alone: training's own, on their shardings.

Nothing is allocated: parameters, states and batches are `jax.ShapeDtypeStruct`s with the shardings that training gives
them. A program whose arguments are another one's results takes their shapes and shardings from that one's compilation.
"""

from __future__ import annotations

from typing import Any

import jax

from nla_jax import extract
from nla_jax.models.config import ModelConfig
from nla_jax.models.lora import LoRAConfig, n_adapter_params
from nla_jax.models.params import n_params, param_specs
from nla_jax.models.sampler import Samples
from nla_jax.models.sharding import on_its_mesh
from nla_jax.prompt import AVPrompt
from nla_jax.train import rl, steps
from nla_jax.train.adapted import trained_specs, whole
from nla_jax.train.plan_stage import UPDATE, Call, Model, Outputs, Place, Program, Stage
from nla_jax.train.plan_work import Split, Work, cache_bytes, decoding, kept_bytes, products, reading, training
from nla_jax.train.settings import OptimizerSettings, RLSettings, SFTSettings

_STOP_IDS = (0, 1)  # which ids they are changes no program
_AR_STEP = 8  # AR prompts are padded to a multiple of this (train/texts.py)
_WIDTHS = {"float32": 4, "bfloat16": 2}


def av_config(settings: RLSettings | SFTSettings, model: Model, optim: OptimizerSettings) -> steps.AVConfig:
    lengths = model.lengths
    prompt = AVPrompt(tuple(range(1, lengths.prompt + 1)), lengths.marker)
    return steps.AVConfig(
        **_common(settings, optim), model=model.cfg, prompt=prompt, injection_scale=model.injection_scale
    )


def ar_config(settings: RLSettings | SFTSettings, model: Model, optim: OptimizerSettings) -> steps.ARConfig:
    return steps.ARConfig(**_common(settings, optim), model=model.trunk, mse_scale=model.cfg.d_model**0.5)


def _common(settings: RLSettings | SFTSettings, optim: OptimizerSettings) -> dict[str, Any]:
    return {
        "optim": optim,
        "accumulate": settings.accumulate,
        "compute_dtype": settings.compute_dtype,
        "remat": settings.remat,
        "chunk": settings.logit_chunk,
        "norms": (0.01, 1e6),
        "lora": settings.lora.config,
    }


def n_ar_params(trunk: ModelConfig) -> int:
    return n_params(trunk, head=False) + trunk.d_model**2


def n_trained(role: str, cfg: ModelConfig, lora: LoRAConfig | None) -> int:
    """Scalars that are updated."""
    if lora is not None:
        return n_adapter_params(cfg, lora) + (cfg.d_model**2 if role == "ar" else 0)
    return n_params(cfg) if role == "av" else n_ar_params(cfg)


def joint_rl(settings: RLSettings, model: Model, place: Place) -> Stage:
    """One step of joint training: rollout, reference, reward, both updates."""
    s, lengths, split = settings, model.lengths, place.split
    N, S, R, D = s.batch_size, s.batch_size * s.samples, s.max_new_tokens, model.cfg.d_model
    width = -(-(lengths.ar_prompt + R) // _AR_STEP) * _AR_STEP
    bytes_ = _WIDTHS[s.compute_dtype]
    av, ar = av_config(s, model, s.av_optim), ar_config(s, model, s.ar_optim)
    cfg = rl.RLConfig.of(s, av, ar, _STOP_IDS)
    lora = s.lora.config
    base = place.base(param_specs(model.cfg), model.cfg, s) if lora else None
    of_av, of_ar = trained_specs("av", model.cfg, lora), trained_specs("ar", model.trunk, lora)
    av_state = place.state(place.params(of_av, model.cfg, s.param_dtype), s.av_optim)
    ar_state = place.state(place.params(of_ar, model.trunk, s.param_dtype), s.ar_optim)
    av_params, ar_params = av_state.params, ar_state.params
    reference = place.params(of_av, model.cfg, s.compute_dtype)
    # Whether the sampler needs the weights laid out otherwise: without LoRA it always has a copy in its own dtype.
    apart = base is None or (place.mesh is not None and place.mesh.shape["fsdp"] > 1)
    decoders = () if apart else (base,)
    vectors = place.rows((N, D), "float32")
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), S))
    keys = place.rows(keys.shape, keys.dtype)
    ids, reals = place.rows((S, R), "int32"), place.rows((S, R), "float32")
    counts, flags, scores = (place.rows((S,), d) for d in ("int32", "bool", "float32"))
    held: Any = Samples  # of shapes instead of arrays
    samples = held(tokens=ids, logprobs=reals, lengths=counts, stopped=flags)

    def sampler(out: Outputs) -> tuple[Any, Any]:
        own, shared, prefix = out["re-layout"]
        return whole(own, base if shared is None else shared, lora), prefix

    def read_reference(out: Outputs) -> Call:
        own, prefix = out["KL reference"]
        return Call(rl.reference_logprobs, (whole(own, base, lora), prefix, samples, vectors), {"cfg": cfg})

    def sample(out: Outputs) -> Call:
        return Call(rl.sample, (*sampler(out), vectors, keys, place.array((), "float32")), {"cfg": cfg})

    texts = {"tokens": place.rows((S, width), "int32"), "lengths": counts, "failed": flags}
    of_rows = {"vectors": vectors, "valid": place.rows((N,), "bool")}
    policy_rows = {
        "tokens": ids,
        "lengths": counts,
        "sampled": reals,
        "reference": reals,
        "advantages": scores,
        "weight": scores,
        "vectors": place.rows((S, D), "float32"),
    }
    # Replayed teacher pairs, in the longest row that the task gives them.
    longest = (lengths.ar_prompt + R + 63) // 64 * 64 + 64
    replay = sft_batch("av", s.batch_size, longest, D, place) if s.replay_av else None
    pairs = max(round(S * s.replay_ar / (1 - s.replay_ar) / s.accumulate), 1) * s.accumulate if s.replay_ar else 0
    multiple = split.rows * s.accumulate if split.rows > 1 else 1
    n_regression = -(-(S + pairs) // multiple) * multiple
    ar_width = max(width, longest) if pairs else width
    regression = {**sft_batch("ar", n_regression, ar_width, D, place)}
    regression["weight"] = place.rows((n_regression,), "float32")

    # What a sample costs, forward: its tail and response but for the last token, after the shared prefix.
    mean, cap = lengths.tail + lengths.response - 1, lengths.tail + R - 1
    kv_split = split.tensor if model.cfg.n_kv_heads % split.tensor == 0 else 1
    logits: dict[str, Any] = {"useful_logits": lengths.response, "padded_logits": R}
    of_policy = reading(model.cfg, S, mean, cap, split, bytes_, before=lengths.marker, parts=s.accumulate, **logits)
    of_prefix = reading(model.cfg, 0, 0, 0, split, bytes_, shared=lengths.marker)
    weights_av = products(model.cfg, S, mean, cap, shared=lengths.marker, **logits)
    weights_ar = products(model.trunk, S, lengths.ar_text, width)
    of_texts = _with_head(reading(model.trunk, S, lengths.ar_text, width, split, bytes_, parts=s.accumulate), D, S)
    trained = _sum(of_policy, of_prefix)
    wide = _WIDTHS[s.param_dtype]
    narrow = bytes_ * n_params(model.cfg) / split.tensor
    n_av, n_ar = n_trained("av", model.cfg, lora), n_trained("ar", model.trunk, lora)
    narrow = narrow if apart else 0.0
    copied = Work(of_prefix.useful, of_prefix.computed, wide * n_av / split.chips + narrow)
    cache = cache_bytes(model.cfg, S // s.rollout_parts, lengths.tail + R, split, kv_split, bytes_)
    tokens = S * (lengths.tail + R - 1) / s.accumulate
    prefilled = reading(
        model.cfg, N, lengths.tail, lengths.tail, split, bytes_, before=lengths.marker, useful_logits=1, padded_logits=1
    )
    update: dict[str, Any] = {"remat": s.remat, "frozen": lora is not None}
    chunks = _chunks(s, S * R, split)
    programs = (
        Program(
            "KL reference",
            lambda out: Call(rl.freeze, (av_params, base), {"cfg": av}),
            copied,
            given=(base,),
            beside=(av_params,),  # it is given a copy, before the other states are made
            once=True,
        ),
        Program(
            "re-layout",
            lambda out: Call(rl.lay_out_to_decode, (av_params, base), {"cfg": av}),
            copied,
            given=(av_params, base),
            least=narrow,
        ),
        Program(
            "rollout",
            sample,
            _sum(prefilled, decoding(model.cfg, S, lengths, R, split, kv_split, bytes_, s.rollout_parts)),
            after=("re-layout",),
            given=decoders,
            least=narrow + cache,
            varies=("rollout_parts",),
        ),
        Program(
            "reference log-probs",
            read_reference,
            of_policy,
            after=("KL reference",),
            given=(reference, base),
            varies=("accumulate",),
        ),
        Program(
            "reward",
            lambda out: Call(rl.read_errors, (whole(ar_params, base, lora), {**texts, **of_rows}), {"cfg": cfg}),
            of_texts,
            given=(ar_params, base),
            varies=("accumulate",),
        ),
        Program(
            "AR update",
            lambda out: Call(rl.regression_step, (ar_state, regression, base), {"cfg": ar}, carries=0),
            training(of_texts, weights_ar, model.trunk, n_ar, split, logits=0.0, **update),
            given=(ar_state, base),
            varies=UPDATE,
            least=kept_bytes(model.trunk, n_ar, S * width / s.accumulate, split, bytes_, remat=s.remat),
        ),
        Program(
            "AV update",
            lambda out: Call(rl.policy_step, (av_state, policy_rows, replay, base), {"cfg": cfg}, carries=0),
            training(trained, weights_av, model.cfg, n_av, split, logits=float(S * R), chunks=chunks, **update),
            given=(av_state, base),
            varies=UPDATE,
            least=kept_bytes(model.cfg, n_av, tokens, split, bytes_, remat=s.remat),
        ),
    )
    residents = {"AV state": av_state, "AR state": ar_state, "KL reference": reference}
    if base is not None:
        residents["base"] = base
    # What the AR learns from tells its errors too; only one that does not learn is read for them.
    left_out = {"reward" if s.train_ar else "AR update", *(() if s.train_av else ("AV update",))}
    kept = [p for p in programs if p.name not in left_out]
    return Stage("rl", tuple(kept), residents, S, s.compute_dtype)


def _chunks(settings: RLSettings | SFTSettings, tokens: int, split: Split) -> int:
    """Pieces that a micro-batch's logits are computed in, of a step of so many `tokens`."""
    return -(-tokens // (settings.accumulate * settings.logit_chunk * split.rows))


def warm_start(settings: SFTSettings, model: Model, place: Place) -> Stage:
    """One supervised step of the AV or the AR, at the length that holds an average sample and at the longest."""
    s, lengths, split = settings, model.lengths, place.split
    B, D, bytes_ = s.batch_size, model.cfg.d_model, _WIDTHS[s.compute_dtype]
    of_av = s.stage == "av"
    cfg: Any = (av_config if of_av else ar_config)(s, model, s.optim)
    own = model.cfg if of_av else model.trunk
    lora = s.lora.config
    base = place.base(param_specs(own, head=of_av), own, s) if lora else None
    state = place.state(place.params(trained_specs(s.stage, own, lora), own, s.param_dtype), s.optim)
    size = n_trained(s.stage, own, lora)
    mean = lengths.tail + lengths.response if of_av else lengths.ar_text
    typical = next((n for n in s.buckets if n >= mean), s.buckets[-1])
    step = steps.av_step if of_av else steps.ar_step

    def program(name: str, width: int, once: bool) -> Program:
        if of_av:
            of_logits: dict[str, Any] = {"useful_logits": lengths.response, "padded_logits": width - lengths.tail}
            shared = {"shared": lengths.marker, **of_logits}
            before = {"before": lengths.marker, "parts": s.accumulate}
            read = reading(own, B, mean - 1, width - 1, split, bytes_, **before, **shared)
            of_weights = products(own, B, mean - 1, width - 1, **shared)
        else:
            read = _with_head(reading(own, B, mean, width, split, bytes_, parts=s.accumulate), D, B)
            of_weights = products(own, B, mean, width)
        logits = B * (width - lengths.tail) if of_av else 0
        update: dict[str, Any] = {"remat": s.remat, "frozen": lora is not None, "chunks": _chunks(s, logits, split)}
        work = training(read, of_weights, own, size, split, logits=float(logits), **update)
        batch = sft_batch(s.stage, B, width, D, place)
        least = kept_bytes(own, size, B * width / s.accumulate, split, bytes_, remat=s.remat)
        call = Call(step, (state, batch, base), {"cfg": cfg}, carries=0)
        return Program(name, lambda out: call, work, (), (state, base), least, once=once, varies=UPDATE)

    label = s.stage.upper()
    programs = [program(f"{label} step, rows of {typical}", typical, False)]
    if s.buckets[-1] != typical:
        programs.append(program(f"{label} step, longest rows ({s.buckets[-1]})", s.buckets[-1], True))
    residents = {"state": state} if base is None else {"state": state, "base": base}
    return Stage(s.stage, tuple(programs), residents, B, s.compute_dtype)


def extraction(model: Model, place: Place, *, dtype: str, batch_tokens: int, length: int, per_document: int) -> Stage:
    """One batch of `nla extract`: documents of `length` tokens, `batch_tokens` on each shard of the rows."""
    trunk, split = model.trunk, place.split
    rows = max(batch_tokens // length, 1) * split.rows
    params = place.params(param_specs(trunk, head=False), trunk, dtype)
    tokens, positions = place.rows((rows, length), "int32"), place.rows((rows, per_document), "int32")
    gather = on_its_mesh(extract.gather)
    program = Program(
        f"extraction, documents of {length}",
        lambda out: Call(gather, (params, tokens, positions), {"cfg": trunk, "layers": (model.layer,)}),
        reading(trunk, rows, length, length, split, _WIDTHS[dtype]),
        given=(params,),
    )
    return Stage("extract", (program,), {"target": params}, rows * length, dtype)


def sft_batch(kind: str, rows: int, width: int, d_model: int, place: Place) -> dict[str, Any]:
    """A batch of `nla_jax.loader`, plain rows."""
    batch = {
        "tokens": place.rows((rows, width), "int32"),
        "lengths": place.rows((rows,), "int32"),
        "vectors": place.rows((rows, d_model), "float32"),
        "valid": place.rows((rows,), "bool"),
    }
    return {**batch, "loss_mask": place.rows((rows, width), "bool")} if kind == "av" else batch


def _with_head(work: Work, d_model: int, rows: int) -> Work:
    """The AR's D x D map on top."""
    flops = 2.0 * rows * d_model**2
    return Work(work.useful + flops, work.computed + flops, work.moved)


def _sum(a: Work, b: Work) -> Work:
    return Work(a.useful + b.useful, a.computed + b.computed, a.moved + b.moved)
