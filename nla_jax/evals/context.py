"""What every suite works with: the pair, the rows, the texts the AV writes about them and the AR's reading of texts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nla_jax import metrics
from nla_jax.errors import InputError
from nla_jax.evals import batched, hosts, intervals
from nla_jax.evals.evalset import SEED, EvalSet
from nla_jax.evals.explanations import FILE, Explanations
from nla_jax.evals.provenance import computed_on, model_hashes
from nla_jax.evals.result import Row
from nla_jax.extract_run import weights_fingerprint
from nla_jax.models.sharding import MeshSettings, make_mesh, rules_for
from nla_jax.pair import NLA, check_vectors
from nla_jax.tokenizer import Tokenizer

_KEPT_BYTES = 1 << 30  # readings of texts that are kept in memory
WHOLE = MeshSettings()  # every device has all parameters


@dataclass(frozen=True)
class Samples:
    """Texts of n rows, k each: `text[i][g]`; `failed` bool [n, k] (no closing tag, or cut by the length cap; `text` is
    then the whole raw text); `length` int32 [n, k] in tokens, the stop token included."""

    text: list[list[str]]
    failed: np.ndarray
    length: np.ndarray


class Context:
    """The pair and the rows of an evaluation.

    `variance` is the denominator of fve_nrm and `variance_source` where it is from: what the checkpoint or the caller
    says, else the store's training rows, else the evaluated rows themselves. `mse_scale` is the AR's, and `orthogonal`
    the mse_nrm of an orthogonal guess (2 at the default scale), which a failed text counts as.

    `out`: a directory in which drawn texts are kept (explanations.jsonl); None keeps them in memory. Of a pair opened
    with `low_memory` one model's weights are held at a time: a suite says `use("target")` before it takes
    `nla.target.params()`; `texts` and `read` do so themselves. `notes`: what a reader must know of rows and pair.

    `mesh`: all devices, None if there is one; `split` says over how many of them each model is split. Where they belong
    to several processes (of `jax.distributed`) all of these call the same methods in the same order, and process 0
    alone writes, notes and draws progress bars.
    InputError where the rows and the models do not belong together, or a model cannot be split so.
    """

    def __init__(
        self,
        nla: NLA,
        data: EvalSet,
        *,
        out: str | Path | None = None,
        seed: int = SEED,
        resamples: int = intervals.RESAMPLES,
        batch_size: int | None = None,
        max_new_tokens: int = 150,
        temperature: float = 1.0,
        split: MeshSettings = WHOLE,
        progress: bool = False,
        note: Callable[[str], None] = lambda message: None,
    ):
        check(nla, data)
        assert nla.ar is not None
        if resamples < 100:
            raise InputError(
                "--resamples", expected="at least 100: the ends of an interval are 2.5% each", got=resamples
            )
        if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
            got = f"{max_new_tokens} tokens, temperature {temperature}"
            raise InputError("sampling", expected="at least 1 token, temperature 0 (greedy) or more", got=got)
        self.nla, self.data, self.seed, self.resamples = nla, data, seed, resamples
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.progress, self.note = progress and hosts.first(), hosts.noted(note)
        self.out = None if out is None else Path(out)
        self.mesh = make_mesh(split)
        for role in (nla.av, nla.ar, nla.target):
            if self.mesh is not None and role is not None:
                rules_for(role.cfg, self.mesh)
        self.batch_size = batched.batch_size(self.mesh, batch_size)
        self.mse_scale = nla.ar.sidecar.need_mse_scale(nla.ar.path)
        self.orthogonal = 2.0 * round(self.mse_scale**2 / nla.ar.cfg.d_model, 12)
        self.variance, self.variance_source = self._variance()
        self.notes = (*data.notes, *_doubts(nla))
        self._placed: dict[str, Any] = {}
        self._readings: dict[str, np.ndarray] = {}

    # -- the models -----------------------------------------------------------------------------------------------

    @cached_property
    def hashes(self) -> dict[str, dict[str, str]]:
        """sha256 of the models' weights and of their other files (provenance.py)."""
        return model_hashes(self.nla)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of `data.tokens`; None where no model of the pair has it."""
        roles = [role for role in (self.nla.target, self.nla.ar, self.nla.av) if role is not None]
        wanted = self.data.tokenizer
        if wanted is None:
            return self.nla.target.tokenizer if self.nla.target is not None else None
        return next((role.tokenizer for role in roles if role.tokenizer.fingerprint == wanted), None)

    def use(self, name: str) -> None:
        """Says that "av", "ar" or "target" is needed now: with `low_memory` the other models' weights are let go."""
        if self.nla.low_memory:
            for other in ("av", "ar", "target"):
                role = getattr(self.nla, other)
                if other != name and role is not None:
                    role.release()
                    self._placed.pop(other, None)

    def _params(self, name: str) -> Any:
        self.use(name)
        if name not in self._placed:
            role = getattr(self.nla, name)
            if role is None:
                raise InputError(f"this needs the {name}", got="none", fix=f"--{name} DIRECTORY_OR_HUB_ID")
            self._placed[name] = batched.load(role, self.mesh)
        return self._placed[name]

    def texts(self, k: int = 1, rows: np.ndarray | None = None) -> Samples:
        """The first k samples of `rows` (all by default, masked ones too), in their order.

        Drawn keyed by (seed, a checksum of the vector, sample), as `nla verbalize` does: sample g of a row is the same
        whatever k is and whichever other rows are drawn. What was drawn before is not drawn again."""
        at = np.arange(len(self.data)) if rows is None else np.asarray(rows, np.int64)
        kept = self._explanations
        missing = [(i, g) for i in dict.fromkeys(at.tolist()) for g in range(k) if (i, g) not in kept.samples]
        if missing:
            assert self.nla.av is not None
            ids = np.array([zlib.crc32(v.tobytes()) for v in self.data.vectors], np.uint32)
            for drawn in batched.draw(
                self.nla.av,
                self._params("av"),
                self.data.vectors,
                ids,
                missing,
                seed=self.seed,
                temperature=self.temperature,
                max_new_tokens=self.max_new_tokens,
                size=self.batch_size,
                mesh=self.mesh,
                progress=self.progress,
            ):
                kept.add(drawn)
        found = [[kept.samples[i, g] for g in range(k)] for i in at.tolist()]
        return Samples(
            [[text for text, _, _ in row] for row in found],
            np.array([[failed for _, failed, _ in row] for row in found], bool).reshape(len(at), k),
            np.array([[length for _, _, length in row] for row in found], np.int32).reshape(len(at), k),
        )

    @cached_property
    def _explanations(self) -> Explanations:
        names = list(zip(self.data.doc_ids, self.data.positions.tolist(), strict=True))
        if self.out is None:
            return Explanations(None, {}, names)
        return Explanations(self.out / FILE, self.texts_key(), names, self.note)

    def texts_key(self) -> dict[str, Any]:
        """What the drawn texts depend on."""
        return {
            "av": self.hashes["av"],
            "dtype": computed_on(self.nla)["dtype"],
            "data": self.data.hash,
            "seed": self.seed,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
        }

    def read(self, texts: Sequence[str]) -> np.ndarray:
        """The AR's vectors, float32 [m, D]; a text that was read before is not read again."""
        assert self.nla.ar is not None
        new = [text for text in dict.fromkeys(texts) if text not in self._readings]
        fresh: dict[str, np.ndarray] = {}
        if new:
            size, mesh = self.batch_size, self.mesh
            found = batched.read(self.nla.ar, self._params("ar"), new, size=size, mesh=mesh, progress=self.progress)
            fresh = dict(zip(new, found, strict=True))
        out = np.empty((len(texts), self.nla.ar.cfg.d_model), np.float32)
        for i, text in enumerate(texts):
            out[i] = fresh[text] if text in fresh else self._readings[text]
        room = _KEPT_BYTES // (4 * out.shape[1]) - len(self._readings)
        self._readings.update({text: fresh[text].copy() for text in new[: max(room, 0)]})
        return out

    # -- numbers --------------------------------------------------------------------------------------------------

    def errors(self, predicted: np.ndarray, vectors: np.ndarray, failed: np.ndarray | None = None) -> np.ndarray:
        """mse_nrm float64 [m]; that of an orthogonal guess where the text failed or the reading is no number."""
        found = metrics.mse_nrm(predicted, vectors, self.mse_scale)
        bad = ~np.isfinite(found) if failed is None else np.asarray(failed, bool) | ~np.isfinite(found)
        return np.where(bad, self.orthogonal, found)

    @property
    def denominator(self) -> str:
        """The denominator of fve_nrm as a table prints it."""
        return f"variance of v_n {self.variance:.4g} ({self.variance_source})"

    def fve(self, errors: np.ndarray, docs: np.ndarray, metric: str = "fve_nrm", **fields: Any) -> Row:
        """fve_nrm = 1 - mean(mse_nrm) / variance as a Row, with its interval; `fields` are those of Row."""
        fields.setdefault("denominator", self.denominator)
        return self.row(metric, errors, None, docs, of=self._to_fve, **fields)

    def _to_fve(self, mse: np.ndarray) -> np.ndarray:
        return 1.0 - mse / self.variance

    def row(
        self, metric: str, numerator: np.ndarray, denominator: np.ndarray | None, docs: np.ndarray, /, **fields: Any
    ) -> Row:
        """`intervals.row` with this evaluation's seed and resamples; so `sums_row` and `rows_row`."""
        return intervals.row(metric, numerator, denominator, docs, seed=self.seed, resamples=self.resamples, **fields)

    def sums_row(self, metric: str, fn: Callable, arrays: Sequence[np.ndarray], docs: np.ndarray, **fields: Any) -> Row:
        return intervals.sums_row(metric, fn, arrays, docs, seed=self.seed, resamples=self.resamples, **fields)

    def rows_row(self, metric: str, fn: Callable, arrays: Sequence[np.ndarray], docs: np.ndarray, **fields: Any) -> Row:
        return intervals.rows_row(metric, fn, arrays, docs, seed=self.seed, resamples=self.resamples, **fields)

    def _variance(self) -> tuple[float, str]:
        if self.nla.variance_nrm is not None:
            return float(self.nla.variance_nrm), str(self.nla.variance_source)
        if self.data.train_variance_nrm is not None:
            return float(self.data.train_variance_nrm), f"training rows of {self.data.source.get('path')}"
        vectors = self.data.vectors[self.data.main]
        found = metrics.variance_nrm(vectors, self.mse_scale)
        if not found > 0:
            fix = "--variance V, the variance of the training set"
            raise InputError("the evaluated rows do not vary: no denominator for fve_nrm", fix=fix)
        return found, f"the {len(vectors)} evaluated rows themselves, for want of the training set's"


def _doubts(nla: NLA) -> list[str]:
    """What speaks against AV and AR being of one pair although nothing forbids it."""
    assert nla.av is not None and nla.ar is not None
    said = {"AV": nla.av.sidecar.variance_nrm, "AR": nla.ar.sidecar.variance_nrm}
    known = [v for v in said.values() if v is not None]
    if len(known) == 2 and abs(known[0] - known[1]) > 1e-6 * known[0]:
        return [f"AV and AR were trained on different sets: variance_nrm {known[0]:.6g} and {known[1]:.6g}"]
    return []


def check(nla: NLA, data: EvalSet) -> None:
    """InputError unless rows and models belong together: width, layer, the target's tokenizer and weights."""
    for name in ("av", "ar"):
        if getattr(nla, name) is None:
            raise InputError(f"an evaluation needs the {name}", got="none", fix=f"--{name} DIRECTORY_OR_HUB_ID")
    assert nla.av is not None and nla.ar is not None
    where = data.source.get("path", "the data")
    if not len(data.main):
        raise InputError(f"{where}: nothing to evaluate", expected="at least one row that is not masked", got=0)
    if data.vectors.shape[1] != nla.ar.cfg.d_model:
        expected, got = f"width {nla.ar.cfg.d_model}, as the pair", data.vectors.shape[1]
        raise InputError(f"{where}: vectors of another model", expected=expected, got=got, fix="the pair's own target")
    layers = {"AV": nla.av.sidecar.layer_index, "AR": nla.ar.layer_index}
    if nla.target is not None:
        layers["target"] = nla.target.layer_index
    for name, layer in layers.items():
        if layer is not None and layer != data.layer:
            fix = f"--layer {layer} where the data has it, or data of that layer"
            raise InputError(f"{where}: layer {data.layer}", expected=f"{layer}, the {name}'s", got=data.layer, fix=fix)
    check_vectors(data.vectors, nla.ar.cfg.d_model)
    if nla.target is None:
        return
    if data.tokenizer is not None and data.tokenizer != nla.target.tokenizer.fingerprint:
        fix = "the model whose activations these are"
        raise InputError(f"{nla.target.path}: the target's tokenizer is not that of {where}", fix=fix)
    weights = data.model.get("weights")
    if weights is not None and weights != weights_fingerprint(Path(nla.target.path)):
        expected = f"{data.model.get('name')}, as recorded there"
        fix = "the model that the activations were extracted from"
        raise InputError(f"{where} was extracted from other weights", expected=expected, got=nla.target.path, fix=fix)
