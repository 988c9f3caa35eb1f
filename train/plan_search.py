"""Looking for settings with which a stage fits on a slice: recomputation, micro-batches, meshes, in this order.

How many parts a rollout is cut into concerns the rollout alone, and follows from the rest (tools/plan_run.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, get_args

from nla_jax.errors import NLAError
from nla_jax.models.sharding import MeshSettings
from nla_jax.train.plan import Report
from nla_jax.train.settings import Remat


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings that differ from the config's: what `--search` tries."""

    remat: Remat
    accumulate: int
    mesh: MeshSettings
    rank: int = 0  # of LoRA
    rollout_parts: int = 1

    def flags(self, stage: str, given: Change) -> list[str]:
        """What to type for it beside the config."""
        out = []
        if self.remat != given.remat:
            out.append(f"--config.{stage}.remat={self.remat}")
        if self.accumulate != given.accumulate:
            out.append(f"--config.{stage}.accumulate={self.accumulate}")
        for name in ("data", "fsdp", "tensor"):
            value = getattr(self.mesh, name)
            if value != getattr(given.mesh, name):
                out.append(f"--config.{stage}.mesh.{name}={value}")
        if self.rollout_parts != given.rollout_parts:
            out.append(f"--config.{stage}.rollout_parts={self.rollout_parts}")
        if self.rank != given.rank:
            out.append(f"--config.lora.rank={self.rank}")
        return out


_REMAT: tuple[Remat, ...] = get_args(Remat)


def changes(given: Change, chips: int, rows: int, most: int = 64, ranks: tuple[int, ...] = ()) -> Iterator[Change]:
    """What to try, the least intrusive first: the config as it is; recomputing blocks; micro-batches; then the same
    with parameters split over ever more chips, and with products split too; last all of these with LoRA of `ranks`.

    `rows` are the samples of a step: micro-batches, `most` at most, and shards must divide them."""
    for rank in (given.rank, *(r for r in ranks if r != given.rank)):
        yield from _of_rank(dataclasses.replace(given, rank=rank), chips, rows, most)


def _of_rank(given: Change, chips: int, rows: int, most: int) -> Iterator[Change]:
    meshes = [given.mesh]
    for tensor in _powers(chips):
        for fsdp in _powers(chips // tensor):
            if fsdp > 1 or tensor > 1:
                meshes.append(MeshSettings(data=0, fsdp=fsdp, tensor=tensor))
    # Splitting products costs an exchange per product, splitting parameters one per matrix: tensor comes last.
    meshes[1:] = sorted(meshes[1:], key=lambda m: (m.tensor, m.fsdp))
    seen: set[Change] = set()
    for mesh in meshes:
        try:
            data, fsdp, _ = mesh.shape(chips)
        except NLAError:
            continue
        for remat in _REMAT[_REMAT.index(given.remat) :]:
            for accumulate in sorted({given.accumulate, *_powers(most)}):
                one = dataclasses.replace(given, remat=remat, accumulate=accumulate, mesh=mesh)
                divides = rows % (data * fsdp * accumulate) == 0
                worth = (
                    remat == "blocks" or accumulate == given.accumulate
                )  # recomputing costs less than a smaller batch
                if divides and worth and accumulate >= given.accumulate and one not in seen:
                    seen.add(one)
                    yield one


def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length()) if 2**i <= limit]


def search(
    given: Change,
    chips: int,
    rows: int,
    least: Callable[[Change], float],
    attempt: Callable[[Change], tuple[Change, Report]],
    hbm: float,
    tell: Callable[[Change, str], None] = lambda change, why: None,
    most: int = 64,
    ranks: tuple[int, ...] = (),
    tries: int | None = None,
) -> tuple[Change, Report] | None:
    """The first change whose programs all fit; None where none does.

    `least(change)` is a lower bound of the bytes that a chip needs, InputError where the mesh does not fit the model:
    what cannot fit is not compiled. `attempt` compiles until a program does not fit, and may itself change what one
    program alone varies with. With `tries`, those that hold the least go first, and so many meshes (each with every
    remat) are tried: to see whether any fits at all."""
    groups = []
    for group in _groups(changes(given, chips, rows, most, ranks)):
        try:
            floor = least(group[-1])
            open_ = [change for change in group if least(change) <= hbm]
        except NLAError as error:
            tell(group[0], str(error))
            continue
        if floor > hbm:
            tell(group[-1], f"holds {floor / 2**30:.1f} GiB at least, in micro-batches however small")
        else:
            groups.append((floor, open_))
    if tries is not None:
        groups = sorted(groups, key=lambda g: g[0])[:tries]
    for _, group in groups:
        found = _largest(group, attempt, tell, rather_none=tries is not None)
        if found is not None:
            return found
    return None


def _groups(every: Iterator[Change]) -> Iterator[list[Change]]:
    """Changes that differ in their micro-batches alone, which get smaller."""
    groups: dict[Any, list[Change]] = {}
    for change in every:
        groups.setdefault((change.mesh, change.remat, change.rank), []).append(change)
    yield from groups.values()


def _largest(
    group: list[Change],
    attempt: Callable[[Change], tuple[Change, Report]],
    tell: Callable[[Change, str], None],
    rather_none: bool = False,
) -> tuple[Change, Report] | None:
    """The first of `group` that fits. Smaller micro-batches need less, so that few of them have to be compiled: the
    first, the last, and then the one in the middle of those between. `rather_none`: the last before the first, for
    where most groups have none that fits."""
    fits: dict[int, tuple[Change, Report]] = {}

    def tried(i: int) -> bool:
        if i in fits:
            return True
        change, found = attempt(group[i])
        if found.fits:
            fits[i] = change, found
        else:
            tell(change, f"{found.worst.name} needs {found.worst.total / 2**30:.1f} GiB")
        return found.fits

    low, high = 0, len(group) - 1
    if rather_none and not tried(high):
        return None
    if tried(low):
        return fits[low]
    if high == low or not (rather_none or tried(high)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tried(middle) else (middle, high)
    return fits[high]
