"""What `tools/bench.py device` makes of measured seconds: MFU, shares of the hardware's limits, rates, tables, JSON.

MFU is useful FLOPs (train/plan_work.py: no padding, nothing recomputed) over seconds times the chips' peak in the
compute dtype. The limit of a program is its roofline: the larger of the FLOPs that it computes over that peak and the
bytes that one chip must move over its memory's bandwidth. What chips send each other is not in it.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from nla_jax.configs.chips import CHIPS, KINDS
from nla_jax.tools.bench_device_run import Measured, Timing
from nla_jax.train.plan import roofline
from nla_jax.train.plan_slices import Chip
from nla_jax.train.plan_work import Work

NOT_KNOWN = "–"
REFERENCE_TARGET = "Qwen/Qwen2.5-7B-Instruct"
# Samples/s per H100 of the PyTorch reference on that target, by its own notes: AV SFT in batches of 256 on 2 (44% MFU),
# AR SFT on 2 (31% MFU), joint training of 512 samples in 47 s on 16, rollouts, rewards and waiting included.
REFERENCE = {"av": 25.8, "ar": 43.0, "rl": 0.68}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of one chip: `peak` FLOP/s in the compute dtype, `rate` bytes/s of its memory; None where it is not known."""

    chip: str | None
    peak: float | None
    rate: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured program. `seconds`: the median. `limit`: roofline, and what it is `bound` by. Shares are of 1, None
    where the chip's limit is not known, or nothing was measured."""

    name: str
    once: bool
    seconds: float | None
    fastest: float | None
    slowest: float | None
    limit: float | None
    bound: str | None
    mfu: float | None
    of_bandwidth: float | None
    needs: float
    compile_seconds: float
    calls: int
    useful: float
    computed: float
    moved: float

    @property
    def of_limit(self) -> float | None:
        return _over(self.limit, self.seconds)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A stage as measured: `seconds` and `limit` of a step's programs together, rates of all chips together. `decode`:
    tokens/s drawn while sampling (its prefill counted in), of how many tokens, and what the bandwidth would allow."""

    rows: tuple[Row, ...]
    chips: int
    seconds: float | None
    limit: float | None
    mfu: float | None
    rate: float | None
    decode: dict[str, float | None] | None
    reference: float | None


def chip_of(kind: str) -> Chip | None:
    """The chip that a JAX device says it is; None where its published figures are not known here."""
    name = KINDS.get(kind.lower())
    if name is None:
        return None
    return Chip(name, **{k: v for k, v in CHIPS[name].items() if k != "names"})  # type: ignore[arg-type]


def limits_of(kind: str, dtype: str, peak_tflops: float | None, bandwidth_gbs: float | None) -> Limits:
    """A device's limits; what the user gives goes before what is published."""
    chip = chip_of(kind)
    peak = peak_tflops * 1e12 if peak_tflops is not None else chip.peak(dtype) if chip else None
    rate = bandwidth_gbs * 1e9 if bandwidth_gbs is not None else chip.hbm_rate if chip else None
    return Limits(chip.name if chip else None, peak, rate)


def row_of(timing: Timing, limits: Limits, chips: int) -> Row:
    work = _ran(timing)
    seconds = statistics.median(timing.seconds) if timing.seconds else None
    limit = bound = None
    if limits.peak is not None and limits.rate is not None:
        chip = Chip("", limits.peak, limits.peak, 0.0, limits.rate, 1.0)
        times = roofline(work, None, chip, chips, "bfloat16")
        bound = max(times, key=lambda name: times[name])
        limit = times[bound]
    peak = limits.peak * chips if limits.peak is not None else None
    return Row(
        timing.name,
        timing.once,
        seconds,
        min(timing.seconds, default=None),
        max(timing.seconds, default=None),
        limit,
        bound,
        _over(_over(work.useful, seconds), peak),
        _over(_over(work.moved, seconds), limits.rate),
        timing.needs,
        timing.compile_seconds,
        len(timing.seconds),
        work.useful,
        work.computed,
        work.moved,
    )


def _ran(timing: Timing) -> Work:
    """The work of the steps that decoding took, where every row drew a stop token before the cap."""
    if timing.longest is None or timing.cap is None or timing.longest == timing.cap:
        return timing.work
    share = max(timing.longest - 1, 0) / max(timing.cap - 1, 1)
    return Work(*(share * x for x in dataclasses.astuple(timing.work)))


def summary(measured: Measured, limits: Limits, chips: int, reference: float | None) -> Summary:
    """`reference`: samples/s per chip of the published reference, where it has the same sizes."""
    rows = tuple(row_of(t, limits, chips) for t in measured.timings)
    step = [row for row in rows if not row.once]
    whole = len(step) == sum(not p.once for p in measured.stage.programs) and all(row.seconds for row in step)
    seconds = sum(row.seconds or 0.0 for row in step) if whole else None
    known = all(row.limit is not None for row in step)
    peak = limits.peak * chips if limits.peak is not None else None
    return Summary(
        rows,
        chips,
        seconds,
        sum(row.limit or 0.0 for row in step) if whole and known else None,
        _over(_over(sum(row.useful for row in step), seconds), peak),
        _over(float(measured.stage.rows), seconds),
        next((_decode(t, row) for t, row in zip(measured.timings, rows, strict=True) if t.drawn), None),
        reference,
    )


def _decode(timing: Timing, row: Row) -> dict[str, float | None]:
    drawn = float(timing.drawn or 0)
    at_most = _over(_over(drawn, row.of_bandwidth), row.seconds)
    rate = _over(drawn, row.seconds)
    return {"tokens": drawn, "tokens_per_s": rate, "bandwidth_tokens_per_s": at_most, "of_bandwidth": row.of_bandwidth}


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def table(title: str, found: Summary) -> Table:
    """One row per program."""
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    out.add_column("program", no_wrap=True)
    for column in ("ms", "fastest", "limit", "bound by", "of limit", "MFU", "of GB/s", "GiB", "compile s"):
        out.add_column(column, justify="right", no_wrap=True)
    for row in found.rows:
        out.add_row(
            row.name + (" (once)" if row.once else ""),
            *(_ms(x) for x in (row.seconds, row.fastest, row.limit)),
            row.bound or NOT_KNOWN,
            *(_share(x) for x in (row.of_limit, row.mfu, row.of_bandwidth)),
            f"{row.needs / 2**30:.3g}",
            f"{row.compile_seconds:.1f}",
        )
    return out


def lines(measured: Measured, found: Summary, limits: Limits) -> Iterator[str]:
    """The step as a whole, beside the hardware's limit and the reference's speed."""
    stage, chips = measured.stage, found.chips
    if found.seconds is not None and found.rate is not None:
        unit = "tokens" if stage.name == "extract" else "samples"
        line = f"a step of {stage.rows:,} {unit} takes {found.seconds:.4g} s: {found.rate:.4g} {unit}/s, "
        line += f"{found.rate / chips:.4g} a chip; MFU {_share(found.mfu)}"
        if found.limit is not None:
            line += f"; its roofline is {found.limit:.4g} s, {_share(found.limit / found.seconds)} of the time"
        yield line
        if found.reference is not None:
            times = f": {found.rate / chips / found.reference:.2f}x" if limits.chip == "h100" else ""
            whole = " (its rollouts and waiting included)" if stage.name == "rl" else ""
            yield f"reference: {found.reference} {unit}/s per H100, all parameters trained{whole}{times}"
    if found.decode is not None:
        d = found.decode
        rate, limit = d["tokens_per_s"], d["bandwidth_tokens_per_s"]
        line = f"decode: {_text(rate)} tokens/s, {_text(_over(rate, chips))} a chip"
        if limit is not None:
            line += f"; the memory's bandwidth allows {limit:.4g}, {_share(d['of_bandwidth'])} of which is reached"
        yield line
        decode = next(t for t in measured.timings if t.drawn)
        if decode.longest != decode.cap:
            yield f"decode: every row ended by token {decode.longest} of {decode.cap}; its limits count those steps"
    wrong = [t.name for t in measured.timings if t.loss is not None and not math.isfinite(t.loss)]
    if wrong:
        yield f"not to be relied on: the loss is not a number in {', '.join(wrong)}"
    if stage.name == "rl" and found.seconds is not None:
        yield "Not in these times: the host's part, texts that are decoded, parsed and tokenized between the programs."


def as_json(measured: Measured, found: Summary, limits: Limits, mesh: dict[str, int]) -> dict[str, Any]:
    stage = measured.stage
    return {
        "stage": stage.name,
        "dtype": stage.compute_dtype,
        "mesh": mesh,
        "chips": found.chips,
        "limits": dataclasses.asdict(limits),
        "programs": [
            {**dataclasses.asdict(row), "of_limit": row.of_limit, "all_seconds": list(t.seconds), "loss": t.loss}
            for row, t in zip(found.rows, measured.timings, strict=True)
        ],
        "refused": measured.refused,
        "step_rows": stage.rows,
        "step_seconds": found.seconds,
        "limit_seconds": found.limit,
        "mfu": found.mfu,
        "rows_per_s": found.rate,
        "rows_per_s_per_chip": _over(found.rate, found.chips),
        "reference_per_chip": found.reference,
        "decode": found.decode,
        "peak_bytes": measured.peak,
    }


def _ms(seconds: float | None) -> str:
    return NOT_KNOWN if seconds is None else f"{1e3 * seconds:.4g}"


def _share(x: float | None) -> str:
    return NOT_KNOWN if x is None else f"{x:.0%}" if x >= 0.095 else f"{x:.1%}"


def _text(x: float | None) -> str:
    return NOT_KNOWN if x is None else f"{x:.4g}"
