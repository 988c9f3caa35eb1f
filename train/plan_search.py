"""Looking for settings with which a stage fits on a slice: recomputation, micro-batches, meshes, in this order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from nla_jax.errors import NLAError
from nla_jax.models.sharding import MeshSettings
from nla_jax.train.plan import Report


@dataclasses.dataclass(frozen=True)
class Change:
    """Settings that differ from the config's: what `--search` tries."""

    remat: bool
    accumulate: int
    mesh: MeshSettings
    rank: int = 0  # of LoRA

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
        if self.rank != given.rank:
            out.append(f"--config.lora.rank={self.rank}")
        return out


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
        for remat in sorted({given.remat, True}):
            for accumulate in sorted({given.accumulate, *_powers(most)}):
                one = Change(remat, accumulate, mesh, given.rank)
                divides = rows % (data * fsdp * accumulate) == 0
                worth = remat or accumulate == given.accumulate  # recomputing costs less than a smaller batch
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
    attempt: Callable[[Change], Report],
    hbm: float,
    tell: Callable[[Change, str], None] = lambda change, why: None,
    most: int = 64,
    ranks: tuple[int, ...] = (),
) -> tuple[Change, Report] | None:
    """The first change whose programs all fit; None where none does.

    `least(change)` is a lower bound of the bytes that a chip needs, InputError where the mesh does not fit the model:
    what cannot fit is not compiled. `attempt` compiles until a program does not fit."""
    every = list(changes(given, chips, rows, most, ranks))
    smallest: dict[tuple[MeshSettings, bool, int], Change] = {}
    for change in every:
        known = smallest.setdefault((change.mesh, change.remat, change.rank), change)
        if change.accumulate > known.accumulate:
            smallest[change.mesh, change.remat, change.rank] = change
    ruled_out: set[tuple[MeshSettings, bool, int]] = set()
    for change in every:
        kind = change.mesh, change.remat, change.rank
        if kind in ruled_out:
            continue
        try:
            floor = least(smallest[kind])
            needs = least(change)
        except NLAError as error:
            tell(change, str(error))
            ruled_out |= {(change.mesh, remat, change.rank) for remat in (False, True)}
            continue
        if floor > hbm:
            tell(change, f"holds {floor / 2**30:.1f} GiB at least, in micro-batches however small")
            ruled_out.add(kind)
        elif needs > hbm:
            tell(change, f"holds {needs / 2**30:.1f} GiB at least")
        else:
            found = attempt(change)
            if found.fits:
                return change, found
            tell(change, f"{found.worst.name} needs {found.worst.total / 2**30:.1f} GiB")
    return None
