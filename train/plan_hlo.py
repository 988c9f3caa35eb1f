"""What a compiled program sends between chips, read from its HLO text: bytes per chip by kind of collective.

An instruction in the body of a loop counts once per iteration. Its trip count is what the compiler wrote beside the
loop ("known_trip_count", CPU and GPU), or the constant that the loop's condition compares its counter with (TPU). A
loop that may end early, as decoding does, counts in full. The TPU compiler cuts a collective into a start, pieces that
run beside other work, and an end; each names the whole of it under one channel, and the start is what counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}  # others end in their number of bits

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_COLLECTIVE = re.compile(rf" = (.*?) (?:ragged-)?({'|'.join(KINDS)})(-start)?\(")
_WHILE = re.compile(r" while\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BODY, _CONDITION = re.compile(r"\bbody=%?([\w.\-]+)"), re.compile(r"\bcondition=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?\s*:\s*\{"?n"?\s*:\s*"?(\d+)')
_CONSTANT = re.compile(r" = s32\[\](?:\{[^}]*\})? constant\((\d+)\)")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_START = re.compile(r"^\s*(?:ROOT )?%?async-collective-start[\w.\-]* = .*\bcalls=%?([\w.\-]+)", re.MULTILINE)
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective: its kind, how many chips take part in each group, the bytes that a chip sends each time it runs,
    how often it runs, and the operation of the program that it comes from."""

    kind: str
    group: int
    bytes: float
    times: int
    source: str = ""

    @property
    def total(self) -> float:
        return self.bytes * self.times


def collectives(hlo: str) -> list[Collective]:
    """The collectives of a compiled program's text (`compiled.as_text()`), those of one chip alone left out."""
    lines = _computations(hlo)
    times = _times(hlo, lines)
    found = _PARTITIONS.search(hlo)
    chips = int(found[1]) if found else 1
    starts = set(_START.findall(hlo))
    cut = {channel for name in starts for line in lines.get(name, []) for channel in _CHANNEL.findall(line)}
    out = []
    for name, body in lines.items():
        for line in body:
            one = _collective(line, chips, times.get(name, 0))
            if one is None or one.group == 1 or not one.times:
                continue
            channel = _CHANNEL.search(line)
            if name in starts or channel is None or channel[1] not in cut:
                out.append(one)
    return out


def sent(found: list[Collective]) -> dict[str, float]:
    """Bytes that one chip sends in a run of the program, by kind."""
    out = dict.fromkeys(KINDS, 0.0)
    for one in found:
        out[one.kind] += one.total
    return out


def _computations(hlo: str) -> dict[str, list[str]]:
    """Name -> the lines of every computation."""
    out: dict[str, list[str]] = {}
    inside: list[str] | None = None
    for line in hlo.splitlines():
        if inside is None:
            head = _HEAD.match(line)
            if head:
                inside = out[head[1]] = []
        elif line.startswith("}"):
            inside = None
        else:
            inside.append(line)
    return out


def _times(hlo: str, lines: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs, over all the places that it is called from."""
    entry = re.search(r"^ENTRY %?([\w.\-]+) ", hlo, re.MULTILINE)
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    edges = {name: list(_calls(body, lines)) for name, body in lines.items()}
    callers: dict[str, int] = dict.fromkeys(lines, 0)
    reached, waiting = {entry[1]}, [entry[1]]
    while waiting:
        for callee, _ in edges[waiting.pop()]:
            callers[callee] += 1
            if callee not in reached:
                reached.add(callee)
                waiting.append(callee)
    # Callers before callees: computations call each other without cycles.
    out = dict.fromkeys(lines, 0)
    out[entry[1]] = 1
    ready = [entry[1]]
    while ready:
        name = ready.pop()
        for callee, trips in edges[name]:
            out[callee] += out[name] * trips
            callers[callee] -= 1
            if not callers[callee]:
                ready.append(callee)
    return out


def _calls(body: list[str], lines: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """(computation, how often) of every call in a computation."""
    for line in body:
        loop = _BODY.search(line) if _WHILE.search(line) else None
        if loop is not None:
            condition = _CONDITION.search(line)
            trips = _trips(line, condition[1] if condition else "", lines)
            yield loop[1], trips
            if condition and condition[1] in lines:
                yield condition[1], trips + 1
        else:
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [name.strip().lstrip("%") for name in branches.split(",")]
            yield from ((name, 1) for name in called if name in lines)


def _trips(line: str, condition: str, lines: dict[str, list[str]]) -> int:
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    return max(_bounds(condition, lines), default=1)


def _bounds(condition: str, lines: dict[str, list[str]]) -> Iterator[int]:
    """The constants that a condition, or what it calls, compares with."""
    body = lines.get(condition, [])
    if any(" compare(" in line for line in body):
        yield from (int(n) for line in body for n in _CONSTANT.findall(line))
    for line in body:
        for called in _CALLED.findall(line):
            yield from _bounds(called, lines)


def _collective(line: str, chips: int, times: int) -> Collective | None:
    found = _COLLECTIVE.search(line)
    if found is None:
        return None
    shapes, kind, start = found.groups()
    sizes = [_size(*shape) for shape in _SHAPE.findall(shapes)]
    if start and kind in ("all-gather", "collective-permute"):
        sizes = sizes[len(sizes) // 2 :] if kind == "all-gather" else sizes[1:2]  # (operands, results)
    size, n = sum(sizes), _group(line, kind, chips)
    share = (n - 1) / n
    moved = {
        "all-gather": size * share,
        "reduce-scatter": size * (n - 1),  # the result is one chip's part
        "all-reduce": 2 * size * share,
        "all-to-all": size * share,
        "collective-permute": size,
    }[kind]
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, n, moved, times, source[1] if source else "")


def _size(dtype: str, dims: str) -> float:
    bits = _BITS.get(dtype)
    if bits is None:
        number = re.match(r"[a-z]+(\d+)", dtype)
        bits = int(number[1]) if number else 0
    return bits / 8 * math.prod(int(d) for d in dims.split(",") if d)


def _group(line: str, kind: str, chips: int) -> int:
    """How many chips exchange with each other."""
    if kind == "collective-permute":
        return chips if "source_target_pairs={{" in line else 1
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if iota:
        return int(iota[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # A part of an axis is written 'axis':(stride)size.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return len(listed[1].split(",")) if listed else chips
