"""`nla eval --like-reference`: one text, token by token, with the columns of the reference's worked transcripts.

Greedy explanations, one a token, special tokens too. The table goes to the terminal; `transcript` gives the lines that
programs which read the reference's own transcripts understand:

    [ 15]  PROMPT  token=' for'  ||v||=47954.2  mse_nrm=0.014  cos=0.993  fve_nrm=0.766

followed by the explanation, indented. In a chat, tokens of the last answer are REPLY and the others PROMPT; the tokens
of a text are TEXT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from nla_jax.errors import InputError
from nla_jax.tools.report import EARLY
from nla_jax.tools.tables import norm, number
from nla_jax.tools.tokens import message_spans, printable, visible

if TYPE_CHECKING:
    from nla_jax.pair import NLA, Explanation
    from nla_jax.tools.inputs import Messages

TEXT, PROMPT, REPLY = "TEXT", "PROMPT", "REPLY"


@dataclass(frozen=True)
class Places:
    """The tokens of one text with their explanations: `parts` TEXT, PROMPT or REPLY, `special` bool [n]."""

    explanations: Sequence[Explanation]
    parts: Sequence[str]
    special: np.ndarray
    variance: float | None

    @property
    def mse_nrm(self) -> np.ndarray:
        return np.asarray([e.mse_nrm for e in self.explanations], np.float64)

    @property
    def late(self) -> np.ndarray:
        """bool [n]: in the headline, as everywhere else."""
        at = np.asarray([e.position for e in self.explanations])
        return (at >= EARLY) & ~self.special


def explain_all(
    nla: NLA,
    source: str | Messages,
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    progress: bool = False,
) -> Places:
    """A greedy explanation of every token of a text or chat, read back by the AR."""
    if nla.target is None or nla.av is None or nla.ar is None:
        raise InputError("--like-reference", expected="--target, --av and --ar", got="not all of them")
    ids = nla.tokenize(source)
    found = nla.activations(source, range(len(ids)))
    rows = nla.explain(
        source,
        activations=found,
        temperature=0.0,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
    )
    special = np.asarray([i in nla.target.tokenizer.special_ids for i in ids])
    return Places(rows, _parts(nla, source, ids), special, nla.variance_nrm)


def _parts(nla: NLA, source: str | Messages, ids: Sequence[int]) -> list[str]:
    if isinstance(source, str):
        return [TEXT] * len(ids)
    assert nla.target is not None
    spans = message_spans(nla.target.tokenizer, source, ids)
    reply = spans[-1].start if spans and source[-1]["role"] == "assistant" else len(ids)
    return [PROMPT if i < reply else REPLY for i in range(len(ids))]


def table(places: Places) -> Table:
    """One row a token: position, part, token, norm of the vector, mse_nrm, cos, fve_nrm, explanation."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", expand=True)
    out.add_column("pos", justify="right", no_wrap=True)
    out.add_column("part", no_wrap=True)
    out.add_column("token", max_width=18, overflow="fold")
    for name in ("||v||", "mse_nrm", "cos", "fve_nrm"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("explanation", ratio=1, min_width=20, overflow="fold")
    for e, part in zip(places.explanations, places.parts, strict=True):
        numbers = (norm(e.norm), *(number(v) for v in (e.mse_nrm, e.cosine, e.fve_nrm)))
        text = "\n".join(line.strip() for line in printable(e.text).split("\n") if line.strip())
        body = Text.assemble(("[failed] ", "bold red"), (text, "dim")) if e.failed else Text(text)
        out.add_row(Text(str(e.position)), Text(part), Text(visible(e.token or "")), *map(Text, numbers), body)
    return out


def summary(places: Places) -> list[str]:
    """The means: over every token, and over those that count in a headline (position 50 on, not special)."""
    groups = [("all tokens", np.ones(len(places.parts), bool))]
    if places.late.any() and not places.late.all():
        groups.append((f"positions >= {EARLY}, no special tokens", places.late))
    return [line for name, chosen in groups for line in _means(name, places, chosen)]


def _means(name: str, places: Places, chosen: np.ndarray) -> list[str]:
    mse = places.mse_nrm[chosen]
    cos = np.asarray([e.cosine for e in places.explanations], np.float64)[chosen]
    n, failed = len(mse), sum(e.failed for e, c in zip(places.explanations, chosen, strict=True) if c)
    out = [
        f"mean over {name} (n {n}, failed {failed}): mse_nrm {mse.mean():.3f}, cos {cos.mean():.3f}",
        f"  mse_nrm: median {np.median(mse):.3f}, min {mse.min():.3f}, max {mse.max():.3f}",
    ]
    if places.variance is not None:
        fve = 1 - mse / places.variance
        out[0] += f", fve_nrm {fve.mean():.3f}"
        shares = ", ".join(f"{what} {int(count)}/{n}" for what, count in _shares(fve))
        out.append(f"  fve_nrm: median {np.median(fve):.3f}, {shares} (denominator {places.variance:.4g})")
    return out


def _shares(fve: np.ndarray) -> list[tuple[str, Any]]:
    return [("> 0.5", (fve > 0.5).sum()), ("> 0.8", (fve > 0.8).sum()), ("< 0", (fve < 0).sum())]


def transcript(places: Places) -> str:
    """The lines of the reference's transcripts, and the means after them."""
    out = []
    for e, part in zip(places.explanations, places.parts, strict=True):
        fve = "" if e.fve_nrm is None else f"  fve_nrm={e.fve_nrm:.3f}"
        numbers = f"||v||={e.norm:.1f}  mse_nrm={e.mse_nrm:.3f}  cos={e.cosine:.3f}{fve}"
        out.append(f"[{e.position:3d}]  {part:<6}  token={e.token!r}  {numbers}")
        out += [f"    {line}" for line in e.text.split("\n")] + [""]
    return "\n".join([*out, *summary(places), ""])


def as_json(places: Places) -> dict[str, Any]:
    """The tokens with all of their numbers."""
    rows = []
    for e, part, special in zip(places.explanations, places.parts, places.special.tolist(), strict=True):
        names = ("position", "token", "token_id", "norm", "mse_nrm", "cosine", "fve_nrm", "failed", "text")
        rows.append({"part": part, "special": special, **{name: getattr(e, name) for name in names}})
    return {"summary": summary(places), "tokens": rows}
