"""Does an edited explanation steer the target where the edit says?

The edit of a row is made without anyone's help: its explanation becomes that of a row of another document, the donor.
With delta = AR(edited) - AR(original), the AR's raw outputs, the output of block K at the row's position becomes
h + alpha |h| delta / |delta|. Success is how far the next token's distribution goes towards the donor's own:
    steering_success = 1 - KL(donor || steered) / KL(donor || unsteered)     (sums over rows; 0 at alpha 0)
    steering_top     = how often the donor's most likely token becomes the most likely one, where it was not before
Coherence is the mean log-probability, under the untouched target, of the tokens that the steered one writes greedily.
Controls: a random direction of the same length, and the donor's own vector in place of h (the most that one vector can
do). Nothing is measured with the AV's words about the steered vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from nla_jax.errors import InputError
from nla_jax.evals.context import Context
from nla_jax.evals.continuing import continuations, read_text, stop_ids
from nla_jax.evals.controls import other_documents
from nla_jax.evals.downstream import curve, direction
from nla_jax.evals.patching import Patcher, documents, load_target
from nla_jax.evals.result import Row, SuiteResult
from nla_jax.metrics import normalize
from nla_jax.models.sampler import row_keys

NAME = "steering"
needs: frozenset[str] = frozenset({"target", "tokens"})

ALPHAS = (0.0, 0.5, 1.0, 2.0, 4.0)
KINDS = {"steered": "", "random": "random direction"}  # and the control's name
SWAP = "the donor's own vector"


@dataclass
class _Found:
    """By kind, [n, A] for A alphas: KL from the donor's distribution (nats) and the most likely token; the same [n] for
    the swap; the donor's most likely token [n]; sums of log-probabilities, counts and texts of continuations."""

    kl: dict[str, np.ndarray]
    top: dict[str, np.ndarray]
    kl_swap: np.ndarray
    top_swap: np.ndarray
    top_donor: np.ndarray
    logprob: dict[str, np.ndarray]
    written: dict[str, np.ndarray]
    texts: dict[str, list[list[str | None]]]


def run(
    ctx: Context, *, alphas: Sequence[float] = ALPHAS, continued: int = 100, max_new_tokens: int = 16
) -> SuiteResult:
    """The suite. `alphas`: strengths, 0 is always among them. `continued`: of so many rows continuations of
    `max_new_tokens` are written."""
    alphas = checked(alphas)
    if continued < 0 or max_new_tokens < 1:
        got = f"{continued} rows, {max_new_tokens} tokens"
        raise InputError("continuations", expected="0 rows or more, at least 1 token", got=got)
    data, notes = ctx.data, []
    settings = {"alphas": alphas, "continued": continued, "max_new_tokens": max_new_tokens, "layer": data.layer}
    m = data.main
    partner = m[other_documents(data.docs[m])]
    apart = data.docs[partner] != data.docs[m]
    rows, donors = m[apart], partner[apart]
    if not len(rows):
        note = "the rows are of one document: no donor of another one, nothing measured"
        return SuiteResult(NAME, (), (note,), settings=settings)
    if not apart.all():
        notes.append(f"{(~apart).sum()} of {len(m)} rows have no donor of another document")
    drawn, of_donors = ctx.texts(1, rows), ctx.texts(1, donors)
    own, edited = ([t[0] for t in d.text] for d in (drawn, of_donors))
    failed = drawn.failed[:, 0] | of_donors.failed[:, 0]
    delta = ctx.read(edited).astype(np.float64) - ctx.read(own)
    moves = np.isfinite(delta).all(axis=1) & (np.linalg.norm(delta, axis=1) > 0)
    if not moves.all():
        notes.append(f"{(~moves).sum()} rows left out: both texts have the same reading, or one that is no number")
    if failed.any():
        notes.append(f"{failed.sum()} of {len(rows)} pairs have a failed explanation: the AR read its raw text")
    rows, donors, delta, failed = rows[moves], donors[moves], delta[moves], failed[moves]
    own, edited = ([t for t, ok in zip(texts, moves, strict=True) if ok] for texts in (own, edited))
    if not len(rows):
        return SuiteResult(NAME, (), (*notes, "nothing measured"), settings=settings)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(continued, len(rows))).astype(np.int64))
    if len(chosen) < len(rows):
        notes.append(f"coherence: {len(chosen)} of {len(rows)} rows, evenly among them")
    pushes = {
        "steered": normalize(delta, 1.0),
        "random": np.stack([direction(ctx.seed, int(r), delta.shape[1], use=1) for r in data.rows[rows]]),
    }
    found = _measure(ctx, rows, donors, pushes, alphas, chosen, max_new_tokens)
    table, series = _table(ctx, found, data.docs[rows], alphas, chosen)
    columns = {
        "row": data.rows[rows],
        "doc": data.docs[rows],
        "doc_id": [data.doc_ids[i] for i in rows.tolist()],
        "position": data.positions[rows],
        "donor": data.rows[donors],
        "text": own,
        "text_donor": edited,
        "failed": failed,
        **_columns(found, alphas),
        "vector": data.vectors[rows],
        "vector_donor": data.vectors[donors],
        "delta": delta.astype(np.float32),
    }
    return SuiteResult(NAME, tuple(table), tuple(notes), columns, settings, series)


def checked(alphas: Sequence[float]) -> list[float]:
    """Strengths in order, each once, 0 among them; InputError for one that is no finite number."""
    for alpha in alphas:
        if not math.isfinite(alpha):
            raise InputError("alphas", expected="finite numbers such as 0,0.5,1,2,4", got=alpha)
    return sorted({0.0, *(float(a) for a in alphas)})


def steered(h_NxD: np.ndarray, push_NxD: np.ndarray, alpha: float) -> np.ndarray:
    """h + alpha |h| push, float32 [N, D]; the same bits at alpha 0."""
    h = np.asarray(h_NxD, np.float64)
    return (h + alpha * np.linalg.norm(h, axis=-1, keepdims=True) * push_NxD).astype(np.float32)


def _measure(
    ctx: Context,
    rows: np.ndarray,
    donors: np.ndarray,
    pushes: dict[str, np.ndarray],
    alphas: list[float],
    chosen: np.ndarray,
    max_new_tokens: int,
) -> _Found:
    data, target = ctx.data, ctx.nla.target
    assert target is not None
    ctx.use("target")
    patcher = Patcher(*load_target(target, ctx.mesh), data.layer, mesh=ctx.mesh)
    bar = tqdm(total=len(rows) + len(np.unique(donors)), desc="steering", unit="vector", disable=not ctx.progress)
    final: dict[int, np.ndarray] = {}  # the target's last stream at each donor: what its distribution follows from
    for tokens, members in documents(data, np.unique(donors), 1):
        ends = patcher.final(patcher.read(tokens), data.positions[members])
        final |= dict(zip(members.tolist(), ends, strict=True))
        bar.update(len(members))
    n, a = len(rows), len(alphas)
    place = {int(row): i for i, row in enumerate(rows)}
    variants = [("steered", alphas.index(0.0), 0.0)]  # both kinds start from the same: nothing is pushed
    variants += [(kind, j, alpha) for kind in KINDS for j, alpha in enumerate(alphas) if alpha]
    out = _Found(
        {kind: np.zeros((n, a)) for kind in KINDS},
        {kind: np.zeros((n, a), np.int32) for kind in KINDS},
        np.zeros(n),
        np.zeros(n, np.int32),
        np.zeros(n, np.int32),
        {kind: np.full((n, a), np.nan) for kind in KINDS},
        {kind: np.zeros((n, a), np.int32) for kind in KINDS},
        {kind: [[None] * a for _ in range(n)] for kind in KINDS},
    )
    for tokens, members in documents(data, rows, 1):
        at = np.array([place[int(row)] for row in members])
        h = data.vectors[rows[at]]
        given = [steered(h, pushes[kind][at], alpha) for kind, _, alpha in variants] + [data.vectors[donors[at]]]
        index = np.tile(at, len(given))
        ends = np.stack([final[int(donors[i])] for i in index])
        position = data.positions[rows[index]]
        none = np.zeros((len(index), 1), np.int32)
        effects = patcher.effects(patcher.read(tokens), position, np.concatenate(given), none, ends)
        kl, top = (x[:, 0].reshape(len(given), len(at)) for x in (effects.kl, effects.top))
        for (kind, j, _), row_kl, row_top in zip(variants, kl, top, strict=False):
            out.kl[kind][at, j], out.top[kind][at, j] = row_kl, row_top
        out.kl_swap[at], out.top_swap[at] = kl[-1], top[-1]
        out.top_donor[at] = effects.top_reference[: len(at), 0]
        _continue(ctx, patcher, tokens, at[np.isin(at, chosen)], rows, pushes, variants, max_new_tokens, out)
        bar.update(len(members))
    bar.close()
    zero = alphas.index(0.0)
    for part in (out.kl, out.top, out.logprob, out.written):
        part["random"][:, zero] = part["steered"][:, zero]
    for mine, other in zip(out.texts["random"], out.texts["steered"], strict=True):
        mine[zero] = other[zero]
    return out


def _continue(
    ctx: Context,
    patcher: Patcher,
    tokens: np.ndarray,
    at: np.ndarray,
    rows: np.ndarray,
    pushes: dict[str, np.ndarray],
    variants: list[tuple[str, int, float]],
    max_new_tokens: int,
    out: _Found,
) -> None:
    """Greedy continuations of the rows `at` of one document under every variant."""
    if not len(at):
        return
    data, target = ctx.data, ctx.nla.target
    assert target is not None
    jobs = [(i, kind, j, alpha) for i in at.tolist() for kind, j, alpha in variants]
    position = np.array([data.positions[rows[i]] for i, *_ in jobs])
    found = continuations(
        patcher,
        read_text(patcher, tokens),
        np.asarray(tokens)[position][:, None],
        position,
        np.stack([alpha * pushes[kind][i] for i, kind, _, alpha in jobs]),
        row_keys(ctx.seed, jnp.zeros(len(jobs), jnp.uint32), 1),
        temperature=0.0,
        max_new_tokens=max_new_tokens,
        stops=stop_ids(target),
    )
    for k, (i, kind, j, _) in enumerate(jobs):
        out.logprob[kind][i, j], out.written[kind][i, j] = found.logprob[k], len(found.tokens[k])
        kept = found.tokens[k][:-1] if found.stopped[k] else found.tokens[k]
        out.texts[kind][i][j] = target.tokenizer.decode(kept.tolist())


# -- the table ----------------------------------------------------------------------------------------------------


def _table(
    ctx: Context, found: _Found, docs: np.ndarray, alphas: list[float], chosen: np.ndarray
) -> tuple[list[Row], dict[str, Any]]:
    zero = alphas.index(0.0)
    base, other = found.kl["steered"][:, zero], found.top["steered"][:, zero] != found.top_donor
    rows: list[Row] = []
    points: dict[tuple[str, str], list[tuple[float, Row]]] = {}

    def success(kl: np.ndarray, top: np.ndarray, **fields: Any) -> list[Row]:
        below = f"KL(donor || unsteered), {base.mean():.4g} nats"
        out = [ctx.row("steering_success", kl, base, docs, of=_one_minus, denominator=below, **fields)]
        if other.any():
            note = "of the rows where it is not the most likely token before"
            hits = (top == found.top_donor)[other].astype(np.float64)
            out.append(ctx.row("steering_top", hits, None, docs[other], note=note, **fields))
        return out

    for kind, control in KINDS.items():
        for j, alpha in enumerate(alphas):
            fields = {"group": f"alpha {alpha:g}", "control": control}
            some = success(found.kl[kind][:, j], found.top[kind][:, j], **fields)
            if len(chosen):
                sums, counts = found.logprob[kind][chosen, j], found.written[kind][chosen, j]
                note = "log-probability per token of a greedy continuation under the untouched target"
                some.append(ctx.row("coherence", sums, counts, docs[chosen], note=note, **fields))
            rows += some
            for row in some:
                points.setdefault((row.metric, control or "edited explanation"), []).append((alpha, row))
    swap = success(found.kl_swap, found.top_swap, control=SWAP)
    for row in swap:
        points[row.metric, SWAP] = [(alpha, row) for alpha in alphas]
    titles = {"steering_success": "success", "steering_top": "donor's token on top", "coherence": "coherence"}
    series = {
        f"{metric}, {label}": curve(line, label, "alpha", titles[metric], f"Steering: {titles[metric]}")
        for (metric, label), line in points.items()
    }
    return rows + swap, series


def _one_minus(x: np.ndarray) -> np.ndarray:
    return 1.0 - x


def _columns(found: _Found, alphas: list[float]) -> dict[str, Any]:
    """[n, A] for the alphas in the settings' order; log-probabilities NaN and texts null where nothing was written."""
    out: dict[str, Any] = {"top_donor": found.top_donor, "kl_swap": found.kl_swap, "top_swap": found.top_swap}
    for kind in KINDS:
        out |= {f"kl_{kind}": found.kl[kind], f"top_{kind}": found.top[kind]}
        out |= {f"logprob_{kind}": found.logprob[kind], f"written_{kind}": found.written[kind]}
        for j, alpha in enumerate(alphas):
            out[f"continuation_{kind}_{alpha:g}"] = [texts[j] for texts in found.texts[kind]]
    return out
