"""Slices of accelerators by name, and devices to compile for without having any."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

from nla_jax.configs.chips import CHIPS
from nla_jax.errors import InputError

# What libtpu asks of its surroundings, so that it neither looks for a TPU nor for its host's metadata.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """See configs/chips.py; `flops`, `hbm_rate` and `link_rate` are per second, `hbm` bytes."""

    name: str
    flops: float
    float32: float
    hbm: float
    hbm_rate: float
    link_rate: float

    @property
    def tpu(self) -> bool:
        return self.name.startswith("v")

    def peak(self, dtype: str) -> float:
        """FLOP/s of products in a compute dtype."""
        return self.float32 if dtype == "float32" else self.flops


@dataclasses.dataclass(frozen=True)
class Slice:
    """A chip and how many of them: "v5e:4x8" are 32, "h100:1x2x8" two nodes of 8."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)


def parse_slice(text: str) -> Slice:
    """InputError with the names that work where `text` is none of them."""
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        every = "; ".join(f"{name}:{{{','.join(facts['names'])}}}" for name, facts in CHIPS.items())  # type: ignore[arg-type]
        raise InputError("--slice", expected=f"one of {every}", got=repr(text), fix="--slice v5e:4x8")
    facts: dict[str, Any] = dict(CHIPS[kind])
    names = facts.pop("names")
    if shape not in names:
        fix = f"--slice {_nearest(kind, names, shape)}"
        raise InputError("--slice", expected=f"{kind}:{' '.join(names)}", got=repr(text), fix=fix)
    return Slice(text, Chip(kind, **facts), tuple(int(n) for n in shape.split("x")))


def _nearest(kind: str, names: tuple[str, ...], shape: str) -> str:
    """The slice of about as many chips as a name that is none asks for: v5e-32 and v5e:32 mean v5e:4x8."""
    numbers = [int(n) for n in shape.replace("-", "x").split("x") if n.isdigit() and int(n)]
    wanted = math.prod(numbers) if numbers else 8
    return f"{kind}:{min(names, key=lambda n: abs(math.log(math.prod(map(int, n.split('x'))) / wanted)))}"


def larger(one: Slice) -> list[Slice]:
    """The slices of the same chip with more of them, smallest first."""
    names = CHIPS[one.chip.name]["names"]
    every = [parse_slice(f"{one.chip.name}:{name}") for name in names]  # type: ignore[attr-defined]
    return [s for s in every if s.chips > one.chips]


def prepare(chips: int = 1) -> None:
    """Sets the environment in which libtpu compiles without a TPU; to be called before jax is imported.

    Values that the user has set are kept. `chips`: devices to count with where nothing is compiled."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(chips))
    for name, value in _NO_TPU_HERE.items():
        os.environ.setdefault(name, value)


def why_not(wanted: Slice) -> str | None:
    """One line on why programs cannot be compiled for this slice here; None where they can."""
    import jax

    if not wanted.chip.tpu:
        return (
            f"{wanted.chip.name}: arithmetic only, nothing was compiled. Memory is counted from what must be held; "
            "what a step needs beside it, and what chips send, is not known"
        )
    if importlib.util.find_spec("libtpu") is None:
        return f"libtpu is not installed, so nothing can be compiled. Try: pip install 'jax[tpu]=={jax.__version__}'"
    return None


def devices_of(wanted: Slice) -> list[Any]:
    """Devices of a TPU slice, to compile for; they hold no arrays. InputError with what to install where that fails."""
    reason = why_not(wanted)
    if reason is not None:
        raise InputError(reason)
    import jax
    from jax.experimental import topologies

    # Programs for chips that are not here cannot be read back from it, and every attempt would warn of that.
    jax.config.update("jax_enable_compilation_cache", False)
    options: dict[str, Any] = {}
    if wanted.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if wanted.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device
    topology = topologies.get_topology_desc(platform="tpu", topology_name=wanted.name, **options)
    devices = list(topology.devices)
    assert len(devices) == wanted.chips, (wanted, len(devices))
    return devices
