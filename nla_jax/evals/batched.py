"""The AV and the AR over whole batches, split over this process's devices where there are several.

Every batch of a run has one size, and texts go with others of their padded length, so that what a row gets depends
neither on the other rows nor on what was asked for before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from nla_jax.models.sampler import row_keys
from nla_jax.prompt import ar_prompt_ids, parse_explanation
from nla_jax.reconstructor import LENGTH_STEP, pad_prompts, reconstruct_jit
from nla_jax.roles import AR, AV
from nla_jax.verbalizer import sample_explanations

Drawn = tuple[int, int, str, bool, int]  # row, sample, text, failed, length in tokens


def local_mesh() -> Mesh | None:
    """This process's devices along one axis; None if there is only one."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Parameters on every device of the mesh."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def divided(array: Any, mesh: Mesh | None) -> jax.Array:
    """A batch, its first axis split over the mesh; that must divide by the number of devices."""
    return jnp.asarray(array) if mesh is None else jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))


def batch_size(mesh: Mesh | None, given: int | None = None) -> int:
    """Rows per batch: as given or by the kind of device, rounded up to a multiple of the mesh's devices."""
    size = given or (32 if jax.default_backend() == "cpu" else 256)
    devices = 1 if mesh is None else mesh.size
    return -(-size // devices) * devices


def draw(
    av: AV,
    placed: Any,
    vectors: np.ndarray,
    ids: np.ndarray,
    wanted: Sequence[tuple[int, int]],
    *,
    seed: int,
    temperature: float,
    max_new_tokens: int,
    size: int,
    mesh: Mesh | None,
    progress: bool,
) -> Iterator[list[Drawn]]:
    """Samples `wanted` as (row, sample), a batch at a time. Keyed by (seed, the row's id, sample), as everywhere.

    `placed`: the AV's parameters and prefix, on every device of the mesh."""
    params, prefix = placed
    most = 1 + max(g for _, g in wanted)
    bar = tqdm(total=len(wanted), desc="explaining", unit="text", disable=not progress)
    for first in range(0, len(wanted), size):
        chunk = list(wanted[first : first + size])
        full = chunk + [chunk[-1]] * (size - len(chunk))
        rows, samples = (np.array(column) for column in zip(*full, strict=True))
        keys = row_keys(seed, jnp.asarray(ids[rows]), most)[np.arange(size) * most + samples]
        result = jax.device_get(
            sample_explanations(
                params,
                prefix,
                divided(vectors[rows], mesh),
                divided(keys, mesh),
                prompt=av.prompt,
                cfg=av.cfg,
                injection_scale=av.sidecar.need_injection_scale(),
                mode=av.sidecar.injection_mode,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                stop_ids=av.stop_ids,
            )
        )
        out = []
        for i, (row, sample) in enumerate(chunk):
            length, stopped = int(result.lengths[i]), bool(result.stopped[i])
            tokens = result.tokens[i, : length - 1 if stopped else length].tolist()
            text, failed = parse_explanation(av.tokenizer.decode(tokens), stopped)
            out.append((row, sample, text, failed, length))
        bar.update(len(chunk))
        yield out
    bar.close()


def read(ar: AR, placed: Any, texts: Sequence[str], *, size: int, mesh: Mesh | None, progress: bool) -> np.ndarray:
    """The AR's vectors of the texts: float32 [m, D], the raw output of its head. `placed`: its parameters."""
    prompts = [ar_prompt_ids(ar.tokenizer, ar.sidecar, text) for text in texts]
    out = np.zeros((len(prompts), ar.cfg.d_model), np.float32)
    by_width: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_width.setdefault(-(-len(prompt) // LENGTH_STEP), []).append(i)
    bar = tqdm(total=len(prompts), desc="reconstructing", unit="text", disable=not progress)
    for _, members in sorted(by_width.items()):
        for first in range(0, len(members), size):
            rows = members[first : first + size]
            chunk = [prompts[i] for i in rows]
            tokens, lengths = pad_prompts(chunk + [chunk[-1]] * (size - len(chunk)))
            found = reconstruct_jit(placed, divided(tokens, mesh), divided(lengths, mesh), cfg=ar.cfg)
            out[rows] = np.asarray(found)[: len(rows)]
            bar.update(len(rows))
    bar.close()
    return out
