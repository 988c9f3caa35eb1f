"""The checks of one directory by itself that read no weights: sidecar, tokenizer, prompts, layer and scales."""

from __future__ import annotations

import math

from nla_jax import doctor_weights
from nla_jax.configs.released import published
from nla_jax.doctor import Report
from nla_jax.doctor_files import Found
from nla_jax.errors import NLAError
from nla_jax.models.config import ModelConfig
from nla_jax.prompt import ar_prompt_ids, av_prompt_ids, find_marker
from nla_jax.sidecar import Sidecar
from nla_jax.tokenizer import Tokenizer

# Families whose tokenizers put BOS before every text. Left out of the AR prompt it costs most of the score: the
# reference measured fve_nrm .77 -> .31.
BOS_FAMILIES = ("llama", "mistral", "gemma2", "gemma3")
_SAMPLE = "A sample explanation, of 2 parts: the end."


def check_alone(found: Found, report: Report, layer: int | None) -> None:
    """Everything that one directory shows; `layer` is K where any sidecar of the set names it."""
    if not found.is_model:
        return
    cfg, tok, sidecar = found.cfg, found.tokenizer, found.sidecar
    if found.tensors is not None:
        if cfg is not None:
            doctor_weights.key_set(found, cfg, report)
        doctor_weights.gemma_by_another_name(found, report)
        doctor_weights.dtypes(found, report)
    if cfg is not None:
        doctor_weights.memory(found, cfg, report, layer)
    if tok is not None:
        if cfg is not None:
            doctor_weights.vocabulary(found, cfg, tok, report)
        _chat_bos(found, tok, report)
        if found.kind != "AR":
            _stops(found, tok, report)
    if found.kind == "target":
        return
    _role(found, report)
    if found.kind == "AR":
        doctor_weights.value_head(found, report)
    if sidecar is None:
        return
    if cfg is not None:
        _layer(found, cfg, sidecar, report)
        if sidecar.d_model != cfg.d_model:
            got = f"nla_meta.yaml says d_model {sidecar.d_model}, config.json hidden_size {cfg.d_model}"
            report.problem(found.path, "width", got, "the sidecar that was saved with this checkpoint")
    _scales(found, sidecar, report)
    if tok is not None:
        _prompts(found, tok, sidecar, report)
    if found.kind == "AV" and cfg is not None:
        doctor_weights.embedding_scale(found, cfg, sidecar, report)


def _chat_bos(found: Found, tok: Tokenizer, report: Report) -> None:
    """What becomes of BOS in a rendered chat, and whether the tokenizer's own files agree on it."""
    if isinstance(tok.declared_bos, bool) and tok.bos_id is not None and tok.declared_bos != tok.adds_bos:
        report.warning(
            found.path,
            "BOS",
            f"tokenizer_config.json says add_bos_token {str(tok.declared_bos).lower()}, but tokenizer.json "
            f"{'adds' if tok.adds_bos else 'does not add'} BOS, which is what counts here; other clients may differ",
            "tokenizer files of one release",
        )
    if tok.chat_template is None:
        if found.kind == "AV":
            report.problem(
                found.path,
                "chat template",
                "no chat template: the AV prompt cannot be rendered",
                "chat_template.jinja of the instruct model",
            )
        return
    try:
        ids = tok.encode_chat([{"role": "user", "content": "a"}], add_generation_prompt=True)
    except NLAError as error:
        if tok.bos_id is not None and "BOS twice" in str(error):
            report.problem(found.path, "double BOS", "the chat template itself writes BOS twice", error.fix)
        else:
            report.error(found.path, "chat template", error)
        return
    if tok.bos_id is None:
        report.ok(found.path, "BOS", "this tokenizer has no BOS; chats and texts start without one")
        return
    if ids[0] == tok.bos_id and tok.adds_bos:
        report.note(
            found.path,
            "double BOS",
            f"the chat template writes BOS ({tok.bos_id}) and the tokenizer adds one to texts: here a chat gets "
            "exactly one; a client that renders the chat and then tokenizes it with special tokens gets two, "
            "which shifts the marker by one and changes what the AV writes",
        )
    elif ids[0] != tok.bos_id and found.kind == "AV" and found.cfg is not None and found.cfg.family in BOS_FAMILIES:
        report.warning(
            found.path,
            "BOS",
            f"the chat template writes no BOS, though {found.cfg.family} models are trained with one: the AV prompt "
            "starts without it",
            "the chat template that this AV was trained with",
        )
    else:
        report.ok(found.path, "BOS", f"chats {'start' if ids[0] == tok.bos_id else 'do not start'} with BOS")


def _stops(found: Found, tok: Tokenizer, report: Report) -> None:
    stops = set(found.stop_ids) | ({tok.eos_id} if tok.eos_id is not None else set())
    if not stops:
        report.problem(
            found.path,
            "stop ids",
            "no end-of-sequence id in generation_config.json, config.json or the tokenizer: sampling never stops",
            "generation_config.json of the instruct model",
        )
        return
    if tok.bos_id is not None and tok.bos_id == tok.eos_id:
        report.warning(
            found.path,
            "stop ids",
            f"BOS and end of sequence are one token ({tok.bos_id}): a base model's tokenizer; every text would start "
            "with a stop token",
            "the instruct model's tokenizer files",
        )
    end = _turn_end(tok)
    named = ", ".join(f"{i} {tok.token_str(i)!r}" for i in sorted(stops))
    if end is not None and end not in stops:
        level = report.problem if found.kind == "AV" else report.warning
        level(
            found.path,
            "stop ids",
            f"answers end with {end} {tok.token_str(end)!r}, but generation stops only at {named}: every explanation "
            "would run to the length cap",
            f"adding {end} to eos_token_id in generation_config.json",
        )
        return
    eos = (found.config or {}).get("eos_token_id")
    alone = {i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)}
    extra = f"; config.json alone names only {sorted(alone)}" if alone and alone != stops else ""
    report.ok(found.path, "stop ids", f"generation stops at {named}{extra}")


def _turn_end(tok: Tokenizer) -> int | None:
    """The special token that the chat template writes after an assistant's answer, if it writes one."""
    if tok.chat_template is None:
        return None
    try:
        ids = tok.encode_chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except NLAError:
        return None
    answer = max((i for i, t in enumerate(ids) if t not in tok.special_ids and "b" in tok.token_str(t)), default=None)
    if answer is None:
        return None
    return next((t for t in ids[answer + 1 : answer + 3] if t in tok.special_ids), None)


def _role(found: Found, report: Report) -> None:
    said = found.raw.get("role")
    if not found.raw:
        return
    where = found.path
    if found.raw.get("kind") == "nla_dataset":
        report.problem(
            where,
            "sidecar kind",
            f"the sidecar is a dataset's (kind nla_dataset), not this {found.kind}'s own: its scale and templates may "
            "be others than those the checkpoint was trained with",
            "the nla_meta.yaml that was released with the checkpoint",
        )
    elif said not in (("av", "actor") if found.kind == "AV" else ("ar", "critic")):
        holds = "a value head" if found.kind == "AR" else "a whole model and no value head"
        report.problem(
            where,
            "role",
            f"the sidecar says role {said!r}, but the directory holds {holds}, which makes it the {found.kind}",
            "the sidecar that was saved with this checkpoint",
        )
    else:
        stage = f", stage {found.raw['stage']}" if found.raw.get("stage") else ""
        report.ok(where, "role", f"the sidecar and the files say {found.kind}{stage}")


def _layer(found: Found, cfg: ModelConfig, sidecar: Sidecar, report: Report) -> None:
    k, where, blocks = sidecar.layer_index, found.path, cfg.n_layers
    old = found.section("critic").get("num_hidden_layers")
    if found.kind == "AR" and old is not None and old == blocks:
        report.problem(
            where,
            "layer",
            f"critic.num_hidden_layers is {old}, the number of blocks: despite its name this old field holds K = "
            f"{blocks - 1}, so everything would be read one block too late",
            f"critic.num_hidden_layers: {blocks - 1}, or rather extraction_layer_index: {blocks - 1}",
        )
        return
    if k is None:
        level = report.warning if found.kind == "AR" else report.problem
        hint = f" (its {blocks} blocks say K = {blocks - 1})" if found.kind == "AR" else ""
        level(where, "layer", f"the sidecar names no layer{hint}", "extraction_layer_index: K in nla_meta.yaml")
        return
    aliases = f"K = {k}: output of block {k} = model.layers[{k}] = blocks.{k}.hook_resid_post = hidden_states[{k + 1}]"
    if found.kind == "AR" and blocks != k + 1:
        causes = {
            k: f"one block too few: cut at K instead of K + 1, or K was taken from hidden_states[{k}] and is "
            f"really {k - 1}",
            k + 2: f"one block too many: the sidecar's K is one too low, or hidden_states[{k + 1}] was cut off by one",
        }
        cause = causes.get(blocks, "another layer or another checkpoint")
        report.problem(
            where,
            "layer",
            f"{aliases}. The AR must have K + 1 = {k + 1} blocks and has {blocks}: {cause}",
            "config.json, weights and nla_meta.yaml of one save",
        )
    elif found.kind == "AV" and k >= blocks:
        report.problem(
            where, "layer", f"K = {k}, but the model has only {blocks} blocks (0..{blocks - 1})", "the AV's own sidecar"
        )
    else:
        report.ok(where, "layer", aliases + (f"; {blocks} blocks" if found.kind == "AR" else f", of {blocks} blocks"))


def _scales(found: Found, sidecar: Sidecar, report: Report) -> None:
    where, root = found.path, math.sqrt(sidecar.d_model)
    if found.kind == "AV" and sidecar.injection_mode == "replace":
        if sidecar.injection_scale is None:
            report.problem(
                where,
                "injection scale",
                "extraction.injection_scale is missing: the norm to inject vectors at",
                "the AV's own sidecar (not the base model's or a dataset's)",
            )
        elif math.isclose(sidecar.injection_scale, root, rel_tol=1e-6):
            report.warning(
                where,
                "injection scale",
                f"injection_scale is sqrt(D) = {root:.4g}, which is the usual mse_scale: one may have been copied over "
                "the other",
                "the value that the AV was trained with",
            )
        else:
            pair = published(sidecar.d_model, sidecar.layer_index, sidecar.marker_id)
            if pair is not None and not math.isclose(sidecar.injection_scale, pair["injection_scale"], rel_tol=1e-3):
                report.warning(
                    where,
                    "injection scale",
                    f"injection_scale is {sidecar.injection_scale:g}; {pair['name']} was released with "
                    f"{pair['injection_scale']:g}",
                    "the released value, unless this AV was trained with another",
                )
    if sidecar.mse_scale is None:
        level = report.problem if found.kind == "AR" else report.warning
        level(
            where,
            "mse scale",
            "extraction.mse_scale is null (raw error): scores here compare directions at one norm",
            "an AR trained with mse_scale, such as the released ones",
        )
    elif "mse_scale" not in found.section("extraction"):
        report.note(where, "mse scale", f"mse_scale is not written; sqrt(D) = {root:.4g} is taken")
    elif not math.isclose(sidecar.mse_scale, root, rel_tol=1e-3):
        report.warning(
            where,
            "mse scale",
            f"mse_scale is {sidecar.mse_scale:.6g}, not sqrt(D) = {root:.4g}: mse_nrm is then not 2 (1 - cosine)",
            "the value that the AR was trained with",
        )
    else:
        report.ok(where, "mse scale", f"mse_scale is sqrt(D) = {root:.4g}")


def _prompts(found: Found, tok: Tokenizer, sidecar: Sidecar, report: Report) -> None:
    """The live tokenizer against the ids that the sidecar records."""
    where, fix = found.path, "the tokenizer that this checkpoint was trained with"
    alone = tok.encode(sidecar.marker, parse_special=True)
    if len(alone) == 2 and tok.token_str(alone[0]) == " ":
        alone = alone[1:]
    if alone != [sidecar.marker_id]:
        report.problem(
            where,
            "marker",
            f"the marker {sidecar.marker!r} is {alone} for this tokenizer, the sidecar says [{sidecar.marker_id}]",
            fix,
        )
    elif sidecar.av_template is not None and tok.chat_template is not None:
        try:
            ids = av_prompt_ids(tok, sidecar)
            at = find_marker(ids, sidecar)
            left, right = (f"{i} {tok.token_str(i)!r}" for i in (sidecar.left_id, sidecar.right_id))
            report.ok(
                where,
                "marker",
                f"{sidecar.marker!r} is token {sidecar.marker_id} between {left} and {right}, at index {at} of "
                f"{len(ids)} prompt tokens",
            )
        except NLAError as error:
            report.error(where, "neighbours" if "beside the marker" in str(error) else "marker", error)
    if sidecar.ar_template is None:
        return
    try:
        ids = ar_prompt_ids(tok, sidecar, _SAMPLE)
    except NLAError as error:
        report.error(where, "AR suffix", error)
        return
    if found.kind != "AR":
        return
    if sidecar.ar_suffix_ids is None:
        report.warning(where, "AR suffix", "tokens.critic_suffix_ids is missing: nothing checks where the AR is read")
    else:
        report.ok(where, "AR suffix", f"the AR prompt ends with {list(sidecar.ar_suffix_ids)}")
    family = found.cfg.family if found.cfg is not None else None
    if tok.bos_id is not None and ids[:2] == [tok.bos_id] * 2:
        report.problem(
            where, "double BOS", "the AR prompt starts with BOS twice", "an AR template without the BOS string"
        )
    elif family in BOS_FAMILIES and (tok.bos_id is None or ids[0] != tok.bos_id):
        report.problem(
            where,
            "BOS",
            f"the AR prompt starts without BOS, which {family} models need (the reference measured fve_nrm .77 with "
            "and .31 without)",
            "the base model's tokenizer files (the post-processor in tokenizer.json adds BOS)",
        )
    elif tok.bos_id is not None and ids[0] == tok.bos_id:
        report.ok(where, "BOS", f"the AR prompt starts with BOS ({tok.bos_id}), once")
