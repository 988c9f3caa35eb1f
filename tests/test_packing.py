"""Packed rows compute what each sample computes alone: logits, losses, gradients, predicted vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CONFIGS, hf_weights, to_params
from loading import sidecar, store, tokenizer
from reference import relative_error

from nla_jax.loader import make_loader
from nla_jax.models import attention
from nla_jax.models.attention import visible
from nla_jax.models.config import ModelConfig
from nla_jax.models.layers import embed, unembed
from nla_jax.models.transformer import prefix_of, run_blocks
from nla_jax.packing import attention_mask, inject_packed, pack
from nla_jax.verbalizer import inject

SCALE = 20.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("packing")
    tok = tokenizer(root / "tokenizer")
    return store(root / "store", n_docs=12), tok, sidecar(tok)


def batches(world, kind, packed):
    """One batch with every example of the store."""
    data, tok, side = world
    settings = {"batch_size": 28 if packed else 64, "buckets": (192,), "pack": packed, "epochs": 1}
    rows = np.arange(data.n_rows)
    loader = make_loader(data, rows, kind=kind, tokenizer=tok, sidecar=side, **settings)
    (batch,) = loader
    return batch, loader.prompt


def model(case, tok):
    config = {**CONFIGS[case], "vocab_size": tok.vocab_size}
    return ModelConfig.from_hf(config), to_params(hf_weights(config))


def av_logits(params, cfg, batch, prompt, *, segments=True):
    """Logits [b, T, V] of what follows the prompt's constant part, the vectors injected."""
    prefix = prefix_of(params, np.asarray(prompt.ids[: prompt.marker]), cfg)
    x = embed(params, batch["tokens"], cfg)
    if "markers" not in batch:
        x = inject(x, batch["vectors"], marker=0, injection_scale=SCALE)
        return unembed(params, run_blocks(params, x, cfg, prefix=prefix)[0], cfg)
    x = inject_packed(x, batch["vectors"], batch["markers"], injection_scale=SCALE)
    seg = batch["segments"] if segments else jnp.ones_like(batch["segments"])
    x = run_blocks(params, x, cfg, prefix=prefix, positions=batch["positions"], segments=seg)[0]
    return unembed(params, x, cfg)


def loss(params, cfg, batch, prompt):
    """Summed cross-entropy of the scored tokens."""
    logp = jax.nn.log_softmax(av_logits(params, cfg, batch, prompt)[:, :-1])
    picked = jnp.take_along_axis(logp, batch["tokens"][:, 1:, None], axis=2)[:, :, 0]
    return -jnp.sum(jnp.where(batch["loss_mask"][:, 1:], picked, 0.0))


def by_row(batch, values, packed):
    """Store row -> values [n, ...] at the tokens of its example."""
    out = {}
    for where in zip(*np.nonzero(batch["valid"]), strict=True):
        b = where[0]
        at = np.flatnonzero(batch["segments"][b] == where[1] + 1) if packed else np.arange(batch["lengths"][b])
        out[int(batch["row"][where])] = np.asarray(values[b])[at]
    return out


@pytest.mark.parametrize(("case", "block"), [("qwen2", 256), ("gemma3_text", 256), ("gemma3_text", 40)])
def test_av_packed_equals_unpacked(world, monkeypatch, case, block):
    """Every logit to 1e-5, the loss and all gradients to 1e-4, in both attention kernels; windows and local
    rotary tables included. Without segments it would not hold."""
    monkeypatch.setattr(attention, "_MIN_BLOCK", block)
    monkeypatch.setattr(attention, "_MAX_BLOCK", block)
    cfg, params = model(case, world[1])
    alone, prompt = batches(world, "av_sft", False)
    together, _ = batches(world, "av_sft", True)
    assert together["valid"].sum(axis=1).max() > 2 and together["tokens"].size < alone["tokens"].size
    run = jax.jit(av_logits, static_argnames=("cfg", "prompt", "segments"))
    expected = by_row(alone, run(params, cfg, alone, prompt), False)
    found = by_row(together, run(params, cfg, together, prompt), True)
    assert found.keys() == expected.keys() and len(found) == alone["valid"].sum()
    assert max(relative_error(found[row], expected[row]) for row in expected) < 1e-5
    if case == "qwen2":
        leaking = by_row(together, run(params, cfg, together, prompt, segments=False), True)
        assert max(relative_error(leaking[row], expected[row]) for row in expected) > 1e-2
    if case == "qwen2":
        slope = jax.jit(jax.value_and_grad(loss), static_argnames=("cfg", "prompt"))
        (a, ga), (b, gb) = slope(params, cfg, alone, prompt), slope(params, cfg, together, prompt)
        assert b == pytest.approx(float(a), rel=1e-5)
        for x, y in zip(jax.tree.leaves(ga), jax.tree.leaves(gb), strict=True):
            assert np.abs(x - y).max() <= 1e-4 * np.abs(x).max()


def test_ar_packed_equals_unpacked(world):
    """The stream that the vector is predicted from, read at `last`."""
    cfg, params = model("gemma3_text", world[1])
    alone, _ = batches(world, "ar_sft", False)
    together, _ = batches(world, "ar_sft", True)

    @jax.jit
    def run(batch):
        packed = {k: batch[k] for k in ("positions", "segments") if k in batch}
        return run_blocks(params, embed(params, batch["tokens"], cfg), cfg, n_layers=4, **packed)[0]

    keep = ("tokens", "positions", "segments")
    whole, parts = (np.asarray(run({k: b[k] for k in keep if k in b})) for b in (alone, together))
    expected = {int(r): whole[i, alone["lengths"][i] - 1] for i, r in enumerate(alone["row"]) if r >= 0}
    n = 0
    for b, v in zip(*np.nonzero(together["valid"]), strict=True):
        got = parts[b, together["last"][b, v]]
        assert relative_error(got, expected[int(together["row"][b, v])]) < 1e-5
        n += 1
    assert n == len(expected) > 40


def test_the_written_out_mask_is_what_the_kernels_use(world):
    batch, prompt = batches(world, "av_sft", True)
    at, seg, first = batch["positions"], batch["segments"], prompt.marker
    mask = attention_mask(at, seg, first)
    np.testing.assert_array_equal(mask[:, :, first:], visible(at, at, 0, (seg, seg)))
    tokens = seg > 0
    np.testing.assert_array_equal(mask[tokens][:, :first], True)
    np.testing.assert_array_equal(visible(at, jnp.arange(first), 0)[tokens], True)
    b, t = np.nonzero(tokens)
    own = (seg[b] == seg[b, t][:, None]) & (np.arange(seg.shape[1])[None] <= t[:, None])
    np.testing.assert_array_equal(mask[b, t, first:], own)


def test_pack_is_complete_and_tight():
    rng = np.random.default_rng(0)
    for n, capacity, most in ((1, 10, 1), (200, 100, 3), (3000, 256, 9), (3000, 256, 100)):
        lengths = rng.integers(1, capacity + 1 if n < 1000 else 120, n).astype(np.int32)
        rows = pack(lengths, capacity, most)
        assert sorted(np.concatenate(rows)) == list(range(n))
        assert max(lengths[r].sum() for r in rows) <= capacity and max(map(len, rows)) <= most
    assert lengths.sum() / (capacity * len(rows)) > 0.98
