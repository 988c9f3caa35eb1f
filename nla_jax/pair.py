"""`NLA`: a target, an AV and an AR behind one object; the face that people use."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from nla_jax import hub, metrics
from nla_jax.configs.released import published
from nla_jax.errors import InputError, VectorError
from nla_jax.models import hf
from nla_jax.models.sampler import row_keys
from nla_jax.models.transformer import residual
from nla_jax.prompt import ar_prompt_ids, parse_explanation
from nla_jax.reconstructor import pad_prompts, reconstruct_jit
from nla_jax.roles import AR, AV, Target, check_pair
from nla_jax.verbalizer import sample_explanations

Messages = Sequence[dict[str, Any]]
_LENGTH_STEP = 64  # target texts are padded to a multiple of this, so that few shapes are compiled
_residual = jax.jit(residual, static_argnames=("cfg", "layer"))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One sampled explanation of one activation vector.

    `text` is what stands between the tags, or the whole raw text where the sample `failed` (no closing tag, or cut
    by the length cap). `logprobs` are the model's own, one per entry of `token_ids`, the stop token included.
    `cosine`, `mse_nrm` and `fve_nrm` compare the AR's reading of `text` with the vector (None without an AR;
    `fve_nrm` also where the training set's variance is not known). `row` counts the vectors given to `verbalize`;
    `position`, `token`, `token_id` are set by `explain`. `norm` is the vector's L2 norm |h|.
    """

    text: str
    raw: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    failed: bool
    finish_reason: str
    sample: int = 0
    cosine: float | None = None
    mse_nrm: float | None = None
    fve_nrm: float | None = None
    position: int | None = None
    token: str | None = None
    token_id: int | None = None
    norm: float | None = None
    row: int | None = None


@dataclasses.dataclass(frozen=True)
class Scores:
    """Per-row agreement of reconstructions with vectors, float64 [N]; `fve_nrm` is None without a known variance."""

    mse_nrm: np.ndarray
    cosine: np.ndarray
    fve_nrm: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Activations:
    """Residual-stream vectors float32 [N, D] of one text, at `positions` of its `token_ids`."""

    vectors: np.ndarray
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]


class NLA:
    """A natural language autoencoder: explains activation vectors in words and reads the words back.

    Build it with `NLA.from_pretrained`. Sampling is reproducible: an explanation depends on the seed, the vector
    (in `explain`, its position) and the sample number, not on the batch it was decoded in.
    """

    def __init__(
        self,
        *,
        av: AV | None = None,
        ar: AR | None = None,
        target: Target | None = None,
        variance_nrm: float | None = None,
        low_memory: bool = False,
    ):
        check_pair(av, ar, target)
        self.av, self.ar, self.target, self.low_memory = av, ar, target, low_memory
        self.variance_nrm, self.variance_source = _variance(av, ar, variance_nrm)

    @classmethod
    def from_pretrained(
        cls,
        av: str | None = None,
        ar: str | None = None,
        target: str | None = None,
        *,
        dtype: str | None = None,
        layer: int | None = None,
        variance_nrm: float | None = None,
        low_memory: bool = False,
    ) -> NLA:
        """Opens a pair from directories or hub ids; weights are read on first use.

        `dtype` defaults to the stored one on GPU and TPU and to float32 on CPU. `layer` is needed only where no
        sidecar names the layer. `variance_nrm` overrides the fve_nrm denominator. `low_memory` keeps one model's
        weights at a time (target, then AV, then AR). Raises an `NLAError` where the files do not fit together.
        """
        dtype = None if dtype is None else str(hf.as_dtype(dtype))
        av_role = AV(hub.resolve(av, role="av"), dtype) if av else None
        ar_role = AR(hub.resolve(ar, role="ar"), dtype) if ar else None
        target_role = None
        if target:
            known = [r.sidecar.layer_index for r in (av_role, ar_role) if r and r.sidecar.layer_index is not None]
            index = layer if layer is not None else (known[0] if known else None)
            if index is None:
                raise InputError("the layer of the target is not known", fix="--layer K (0-based, output of block K)")
            target_role = Target(hub.resolve(target, role="target"), index, dtype)
        return cls(av=av_role, ar=ar_role, target=target_role, variance_nrm=variance_nrm, low_memory=low_memory)

    # -- the target ---------------------------------------------------------------------------------------------

    def tokenize(self, text_or_messages: str | Messages) -> list[int]:
        """Target token ids: plain text with the tokenizer's special tokens, chats through its template."""
        target = _need(self.target, "target", "explain")
        if isinstance(text_or_messages, str):
            ids = target.tokenizer.encode(text_or_messages, add_special=True)
        else:
            ids = target.tokenizer.encode_chat(list(text_or_messages))
        if not any(i not in target.tokenizer.special_ids for i in ids):
            raise InputError("the text has no tokens", expected="at least one that is not special", fix="a longer text")
        return ids

    def activations(self, text_or_messages: str | Messages, positions: Sequence[int] | None = None) -> Activations:
        """The residual stream after block layer_index at `positions` (negative ones count from the end).

        By default every position whose token is not special. Only the tokens up to the last position are read.
        """
        target = _need(self.target, "target", "explain")
        ids = self.tokenize(text_or_messages)
        special = target.tokenizer.special_ids
        if positions is None:
            chosen = [i for i, t in enumerate(ids) if t not in special]
        else:
            chosen = [_position(p, len(ids)) for p in positions]
            if not chosen:
                raise InputError(
                    "no positions given", expected="at least one", fix="leave positions out for all tokens"
                )
        read = ids[: max(chosen) + 1]
        padded = np.zeros((1, -(-len(read) // _LENGTH_STEP) * _LENGTH_STEP), np.int32)
        padded[0, : len(read)] = read
        stream = _residual(target.params(), padded, cfg=target.cfg, layer=target.layer_index)
        vectors = np.asarray(stream[0].astype(jnp.float32))[np.asarray(chosen)]
        if self.low_memory:
            target.release()
        tokens = tuple(target.tokenizer.token_str(i) for i in ids)
        return Activations(vectors, tuple(chosen), tuple(ids), tokens)

    def explain(
        self,
        text_or_messages: str | Messages,
        positions: Sequence[int] | None = None,
        samples: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 150,
        seed: int = 0,
        *,
        best_of: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        activations: Activations | None = None,
    ) -> list[Explanation]:
        """Explains tokens of a text or a chat; ordered by position, then sample.

        `best_of=k` draws k samples per position and keeps the one the AR ranks first. `temperature=0` is greedy.
        `activations` reuses what `activations()` returned for the same text.
        """
        found = activations if activations is not None else self.activations(text_or_messages, positions)
        rows = self.verbalize(
            found.vectors,
            samples=samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
            best_of=best_of,
            batch_size=batch_size,
            progress=progress,
            row_ids=found.positions,
        )
        out = []
        for e in rows:
            assert e.row is not None
            at = found.positions[e.row]
            out.append(dataclasses.replace(e, position=at, token=found.tokens[at], token_id=found.token_ids[at]))
        return out

    # -- the AV ---------------------------------------------------------------------------------------------------

    def verbalize(
        self,
        vectors: np.ndarray,
        samples: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 150,
        seed: int = 0,
        *,
        best_of: int | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        row_ids: Sequence[int] | None = None,
    ) -> list[Explanation]:
        """Explanations of raw activation vectors [N, D]; ordered by row, then sample.

        Draws are keyed by (seed, row id, sample); a row's id is a checksum of its vector unless `row_ids` gives one,
        so a vector's explanation is the same alone and in any batch. Rows decode together, `batch_size` at a time.
        """
        av = _need(self.av, "av", "verbalize")
        vectors = check_vectors(vectors, av.cfg.d_model)
        _check_sampling(samples, temperature, max_new_tokens, best_of)
        if best_of:
            _need(self.ar, "ar", "best_of")
            samples = best_of
        ids = np.asarray([zlib.crc32(v.tobytes()) for v in vectors] if row_ids is None else row_ids, np.uint32)
        rows = self._decode(vectors, ids, samples, temperature, max_new_tokens, seed, batch_size, progress)
        if self.low_memory:
            av.release()
        if self.ar is not None:
            rows = self._scored(rows, vectors, progress)
        if best_of:
            rows = [max(rows[i : i + samples], key=_rank) for i in range(0, len(rows), samples)]
        return rows

    def _decode(self, vectors, ids, samples, temperature, max_new_tokens, seed, batch_size, progress):
        av = _need(self.av, "av", "verbalize")
        params, prefix = av.params(), av.prefix()
        per_batch = max(1, (batch_size or _default_batch()) // samples)
        per_batch = min(per_batch, len(vectors))
        norms = np.linalg.norm(vectors.astype(np.float64), axis=-1)
        out: list[Explanation] = []
        bar = tqdm(total=len(vectors), desc="explaining", unit="vector", disable=not progress)
        for first in range(0, len(vectors), per_batch):
            batch, batch_ids = vectors[first : first + per_batch], ids[first : first + per_batch]
            n = len(batch)
            if n < per_batch:  # the last batch keeps the compiled shape
                batch = np.concatenate([batch, np.repeat(batch[:1], per_batch - n, axis=0)])
                batch_ids = np.concatenate([batch_ids, np.repeat(batch_ids[:1], per_batch - n)])
            result = jax.device_get(
                sample_explanations(
                    params,
                    prefix,
                    jnp.asarray(batch),
                    row_keys(seed, jnp.asarray(batch_ids), samples),
                    prompt=av.prompt,
                    cfg=av.cfg,
                    injection_scale=av.sidecar.injection_scale,
                    mode=av.sidecar.injection_mode,
                    samples=samples,
                    temperature=temperature,
                    max_new_tokens=max_new_tokens,
                    stop_ids=av.stop_ids,
                )
            )
            for i in range(n * samples):
                row = first + i // samples
                length, stopped = int(result.lengths[i]), bool(result.stopped[i])
                token_ids = tuple(int(t) for t in result.tokens[i, :length])
                raw = av.tokenizer.decode(list(token_ids[:-1] if stopped else token_ids))
                text, failed = parse_explanation(raw, stopped)
                out.append(
                    Explanation(
                        text=text,
                        raw=raw,
                        token_ids=token_ids,
                        logprobs=tuple(float(p) for p in result.logprobs[i, :length]),
                        failed=failed,
                        finish_reason="stop" if stopped else "length",
                        sample=i % samples,
                        norm=float(norms[row]),
                        row=row,
                    )
                )
            bar.update(n)
        bar.close()
        return out

    # -- the AR ---------------------------------------------------------------------------------------------------

    def reconstruct(self, texts: Sequence[str], *, batch_size: int | None = None, progress: bool = False) -> np.ndarray:
        """The AR's vectors for explanation texts: float32 [N, D], the raw output of its head."""
        ar = _need(self.ar, "ar", "reconstruct")
        if isinstance(texts, str):
            raise InputError("texts", expected="a list of strings", got="one string", fix="[text]")
        params, batch_size = ar.params(), batch_size or _default_batch()
        prompts = [ar_prompt_ids(ar.tokenizer, ar.sidecar, text) for text in texts]
        out = np.zeros((len(prompts), ar.cfg.d_model), np.float32)
        # Similar lengths together: padding is computed like any other token.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        bar = tqdm(total=len(order), desc="reconstructing", unit="text", disable=not progress)
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            chunk = [prompts[i] for i in rows]
            if len(order) > batch_size:
                chunk += [chunk[-1]] * (batch_size - len(chunk))
            tokens, lengths = pad_prompts(chunk)
            out[rows] = np.asarray(reconstruct_jit(params, tokens, lengths, cfg=ar.cfg))[: len(rows)]
            bar.update(len(rows))
        bar.close()
        if self.low_memory:
            ar.release()
        return out

    def score(self, texts: Sequence[str], vectors: np.ndarray, *, batch_size: int | None = None) -> Scores:
        """How well each text reconstructs the vector in the same row. `fve_nrm` per row is 1 - mse_nrm / variance."""
        ar = _need(self.ar, "ar", "score")
        vectors = check_vectors(vectors, ar.cfg.d_model)
        if len(texts) != len(vectors):
            raise InputError("score", expected=f"one text per vector ({len(vectors)})", got=f"{len(texts)} texts")
        return self._compare(self.reconstruct(texts, batch_size=batch_size), vectors)

    def _compare(self, predicted: np.ndarray, vectors: np.ndarray) -> Scores:
        scale = _need(self.ar, "ar", "score").sidecar.mse_scale
        assert scale is not None  # AR() rejects a raw-error sidecar
        error = metrics.mse_nrm(predicted, vectors, scale)
        fve = None if self.variance_nrm is None else 1.0 - error / self.variance_nrm
        return Scores(mse_nrm=error, cosine=metrics.cosine(predicted, vectors), fve_nrm=fve)

    def _scored(self, rows: list[Explanation], vectors: np.ndarray, progress: bool) -> list[Explanation]:
        predicted = self.reconstruct([e.text for e in rows], progress=progress)
        scores = self._compare(predicted, vectors[np.asarray([e.row for e in rows])])
        return [
            dataclasses.replace(
                e,
                cosine=float(scores.cosine[i]),
                mse_nrm=float(scores.mse_nrm[i]),
                fve_nrm=None if scores.fve_nrm is None else float(scores.fve_nrm[i]),
            )
            for i, e in enumerate(rows)
        ]


def check_vectors(vectors: Any, d_model: int) -> np.ndarray:
    """`vectors` as float32 [N, D]; VectorError for another width, no rows, NaN or infinity, or a zero vector."""
    try:
        array = np.asarray(vectors)
        array = np.ascontiguousarray(array, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise VectorError("vectors", expected=f"numbers of shape [N, {d_model}]", got=str(error)) from None
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[1] != d_model:
        raise VectorError(
            "vectors", expected=f"shape [N, {d_model}]", got=list(array.shape), fix="vectors of the pair's own target"
        )
    if not len(array):
        raise VectorError("vectors", expected="at least one row", got=0)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise VectorError(
            f"vector {bad[0]} has NaN or infinite entries ({len(bad)} such rows)",
            fix="extract it again in float32 or bfloat16, or drop the rows",
        )
    zero = np.flatnonzero(~array.any(axis=1))
    if len(zero):
        raise VectorError(
            f"vector {zero[0]} is all zero ({len(zero)} such rows): it has no direction", fix="drop the rows"
        )
    return array


def _check_sampling(samples: int, temperature: float, max_new_tokens: int, best_of: int | None) -> None:
    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens), ("best_of", best_of)):
        if value is not None and value < 1:
            raise InputError(name, expected="at least 1", got=value)
    if not 0 <= temperature < float("inf"):
        raise InputError("temperature", expected="0 (greedy) or more", got=temperature)


def _position(position: int, length: int) -> int:
    at = position + length if position < 0 else position
    if not 0 <= at < length:
        raise InputError(f"position {position} is out of range", expected=f"{-length}..{length - 1} ({length} tokens)")
    return at


def _rank(e: Explanation) -> tuple[bool, float]:
    return (not e.failed, e.cosine if e.cosine is not None else -2.0)


def _need(role: Any, name: str, use: str) -> Any:
    if role is None:
        raise InputError(f"{use} needs the {name}", got="none", fix=f"{name}=DIRECTORY_OR_HUB_ID")
    return role


def _default_batch() -> int:
    return 32 if jax.default_backend() == "cpu" else 256


def _variance(av: AV | None, ar: AR | None, given: float | None) -> tuple[float | None, str | None]:
    """The fve_nrm denominator and where it came from: given, the AR's or AV's sidecar, or a published pair's."""
    if given is not None:
        if not given > 0:
            raise InputError("variance_nrm", expected="a positive number", got=given)
        return float(given), "given"
    for name, role in (("AR sidecar", ar), ("AV sidecar", av)):
        if role is not None and role.sidecar.variance_nrm is not None:
            return float(role.sidecar.variance_nrm), name
    for role in (ar, av):
        if role is None:
            continue
        pair = published(role.cfg.d_model, role.sidecar.layer_index, role.sidecar.marker_id)
        if pair is not None:
            return pair["variance_nrm"], f"published for {pair['name']}"
    return None, None
