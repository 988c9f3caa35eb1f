"""Exported AVs and ARs give what the live models give: through `nla_jax`, and through transformers (`-m parity`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import training
from training import NEW_TOKENS, World

from nla_jax.models import hf
from nla_jax.pair import NLA
from nla_jax.prompt import ar_prompt_ids
from nla_jax.sidecar import read_sidecar
from nla_jax.tokenizer import Tokenizer
from nla_jax.train.rl import rollout, step_keys

TOLERANCE = 1e-5  # float32 on both sides
TEXTS = ["", "Next: verb.", 'Last "sighed". Now: people.', "Something that no note says, (42) & more; é."]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return training.make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def live(world, tmp_path_factory) -> tuple[Any, Any, Path]:
    """(task, state, directory of exports) after a few steps of RL."""
    task = world.task("rl", eval_rows=16)
    state = task.init()
    for number in range(4):
        state, _ = task.step(state, next(task.loader()), number)
    out = tmp_path_factory.mktemp("export")
    assert [p.name for p in task.export(state, out)] == ["av", "ar"]
    return task, state, out


def relative(found: Any, expected: Any) -> float:
    expected = np.asarray(expected, np.float64)
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


def greedy(live: Any) -> Any:
    task, state, _ = live
    keys = step_keys(np.uint32(0), np.uint32(0), rows=16, samples=1)
    return jax.device_get(rollout(state.av.params, task.held.vectors, keys, cfg=task.cfg, temperature=0.0))


def test_exports_explain_as_the_live_pair_does(world, live):
    task, state, out = live
    nla = NLA.from_pretrained(av=str(out / "av"), ar=str(out / "ar"), target=str(world.target))
    expected = greedy(live)
    rows = nla.verbalize(task.held.vectors, temperature=0.0, max_new_tokens=NEW_TOKENS)
    assert len({row.token_ids for row in rows}) > 1  # the vector decides what is written
    texts = task.explain(state.av.params, task.held.vectors, 0.0, 0)
    for i, row in enumerate(rows):
        n = int(expected.lengths[i])
        assert list(row.token_ids) == expected.tokens[i, :n].tolist()
        np.testing.assert_allclose(row.logprobs, expected.logprobs[i, :n], rtol=0, atol=TOLERANCE)
        assert (row.text, row.failed) == (texts.texts[i], bool(texts.failed[i]))
    assert relative(nla.reconstruct(TEXTS), task._reader(state.ar.params)(TEXTS)) < TOLERANCE
    scores = nla.score(texts.texts, task.held.vectors)
    assert scores.fve_nrm is not None, "the variance of the training set did not travel with the AR"
    assert np.mean(scores.mse_nrm[~texts.failed]) < 2


def test_exports_are_whole_and_say_where_they_come_from(live):
    task, state, out = live
    for role, params in (("av", state.av.params), ("ar", state.ar.params)):
        sidecar = read_sidecar(out / role)
        assert (sidecar.role, sidecar.stage, sidecar.layer_index) == (role, "rl", training.LAYER)
        assert sidecar.variance_nrm == pytest.approx(task.variance)
        Tokenizer.from_dir(out / role)
        if role == "av":
            read = hf.load_model(out / role)[1]
        else:
            _, trunk, head = hf.load_ar(out / role)
            read = params.replace(trunk=trunk, head=head)
            assert np.abs(np.asarray(head) - np.eye(32)).max() > 1e-4, "an identity would hide a transposed head"
        assert training.bits(read) == training.bits(params)
    again = task.export(state, out)
    assert sorted(p.name for p in out.iterdir()) == ["ar", "av"] and all(p.is_dir() for p in again)


# -- transformers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> Any:
    pytest.importorskip("transformers", reason="needs the [parity] extra: torch and transformers")
    return pytest.importorskip("torch", reason="needs the [parity] extra: torch and transformers")


@pytest.mark.parity
def test_the_av_in_transformers(torch, live):
    """Log-probabilities of the live AV's greedy explanations, the vector put in as an embedding."""
    from transformers import AutoModelForCausalLM

    task, _, out = live
    model = AutoModelForCausalLM.from_pretrained(out / "av", dtype=torch.float32)
    sidecar = read_sidecar(out / "av")
    prompt, samples = task.av.prompt, greedy(live)
    assert prompt.ids[prompt.marker] == sidecar.marker_id
    worst = 0.0
    for vector, tokens, logprobs, n in zip(
        task.held.vectors, samples.tokens, samples.logprobs, samples.lengths, strict=True
    ):
        ids = torch.tensor([*prompt.ids, *tokens[:n].tolist()])[None]
        with torch.no_grad():
            embeds = model.get_input_embeddings()(ids)
            v = torch.from_numpy(vector.astype(np.float64))
            embeds[0, prompt.marker] = (v * sidecar.injection_scale / v.norm()).float()
            logits = model(inputs_embeds=embeds, use_cache=False).logits[0].double()
        found = torch.log_softmax(logits, -1)[len(prompt.ids) - 1 : -1]
        assert found.argmax(-1).tolist() == tokens[:n].tolist()
        worst = max(worst, float((found.gather(1, ids[0, len(prompt.ids) :, None])[:, 0] -
                                  torch.from_numpy(logprobs[:n].astype(np.float64))).abs().max()))  # fmt: skip
    assert worst < TOLERANCE


@pytest.mark.parity
def test_the_ar_in_transformers(torch, live):
    """Its blocks as a truncated model, the head from value_head.safetensors, at the last token, without a norm."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    task, state, out = live
    model = AutoModelForCausalLM.from_pretrained(out / "ar", dtype=torch.float32)
    assert model.config.num_hidden_layers == training.LAYER + 1
    head = load_file(out / "ar" / "value_head.safetensors")["weight"]
    kept: list[Any] = []
    model.model.layers[-1].register_forward_hook(lambda m, a, y: kept.append(y[0] if isinstance(y, tuple) else y))
    expected = task._reader(state.ar.params)(TEXTS)
    for text, row in zip(TEXTS, expected, strict=True):
        ids = ar_prompt_ids(task.ar.tokenizer, task.ar.sidecar, text)
        with torch.no_grad():
            model(torch.tensor(ids)[None], use_cache=False)
            found = kept.pop()[0, -1] @ head.T
        assert relative(found.numpy(), row) < TOLERANCE
