"""The AV and the AR over whole batches, split over the devices where there are several, of this process or of all.

Every batch of a run has one size, and texts go with others of their padded length, so that what a row gets depends
neither on the other rows nor on what was asked for before it. Texts are decoded and tokenized by the processes in
shares (hosts.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from nla_jax.evals import hosts
from nla_jax.models.placing import on_host, put
from nla_jax.models.sampler import row_keys
from nla_jax.models.sharding import constrain, mesh_of, row_sharding, under
from nla_jax.prompt import ar_prompt_ids, parse_explanation
from nla_jax.reconstructor import LENGTH_STEP, pad_prompts, reconstruct_jit
from nla_jax.roles import AR, AV
from nla_jax.verbalizer import av_prefix_jit, sample_explanations

Drawn = tuple[int, int, str, bool, int]  # row, sample, text, failed, length in tokens


def load(role: AV | AR, mesh: Mesh | None) -> Any:
    """A role's parameters on the mesh; of an AV with the keys and values of its prompt, as (parameters, prefix).

    Where every device of one process has all of them, they are those that the role keeps."""
    if not in_parts(mesh):
        return everywhere((role.params(), role.prefix()) if isinstance(role, AV) else role.params(), mesh)
    params = role.load(mesh)
    if not isinstance(role, AV):
        return params
    with under(mesh):
        return params, av_prefix_jit(params, prompt=role.prompt, cfg=role.cfg)


def in_parts(mesh: Mesh | None) -> bool:
    """Whether parameters are read onto the mesh in parts: where no device has all of them, or others have devices."""
    return mesh is not None and (jax.process_count() > 1 or mesh.shape["data"] < mesh.size)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Parameters on every device of the mesh; what is on a mesh already stays as it lies there."""
    if mesh is None or mesh_of(tree) is not None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def divided(array: Any, mesh: Mesh | None) -> jax.Array:
    """A batch, which every process has in full, its rows split over the mesh."""
    return jnp.asarray(array) if mesh is None else put(np.asarray(array), row_sharding(mesh, len(array)))


def batch_size(mesh: Mesh | None, given: int | None = None) -> int:
    """Rows per batch: as given, or by the kind of device for each process; rounded up to a multiple of the mesh's
    devices."""
    size = given or (32 if jax.default_backend() == "cpu" else 256) * (1 if mesh is None else jax.process_count())
    devices = 1 if mesh is None else mesh.size
    return -(-size // devices) * devices


def meet(mesh: Mesh | None) -> None:
    """Links the devices of several processes while none is far behind: on CPUs, gloo gives up on one that comes late to
    the first exchange, as it may where one compiles for longer than another."""
    if jax.process_count() > 1:
        on_host(divided(np.zeros(1 if mesh is None else mesh.size, np.int32), mesh))


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

    `placed`: the AV's parameters and prefix, as `load` gives them."""
    params, prefix = placed
    most = 1 + max(g for _, g in wanted)
    bar = tqdm(total=len(wanted), desc="explaining", unit="text", disable=not progress)
    for first in range(0, len(wanted), size):
        chunk = list(wanted[first : first + size])
        full = chunk + [chunk[-1]] * (size - len(chunk))
        rows, samples = (np.array(column) for column in zip(*full, strict=True))
        with under(mesh):
            result = sample_explanations(
                params,
                prefix,
                divided(vectors[rows], mesh),
                _keys(ids[rows], samples.astype(np.int32), seed=seed, most=most),
                prompt=av.prompt,
                cfg=av.cfg,
                injection_scale=av.sidecar.need_injection_scale(),
                mode=av.sidecar.injection_mode,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                stop_ids=av.stop_ids,
            )
        drawn = [on_host(x)[: len(chunk)].tolist() for x in (result.tokens, result.lengths, result.stopped)]
        found = hosts.spread(lambda one: _text(av, *one), list(zip(*drawn, strict=True)))
        bar.update(len(chunk))
        yield [(*which, *text) for which, text in zip(chunk, found, strict=True)]
    bar.close()


def _text(av: AV, tokens: list[int], length: int, stopped: bool) -> tuple[str, bool, int]:
    """Text, failed and length of a row of `Samples`."""
    text, failed = parse_explanation(av.tokenizer.decode(tokens[: length - 1 if stopped else length]), stopped)
    return text, failed, length


@functools.partial(jax.jit, static_argnames=("seed", "most"))
def _keys(ids_B: jax.Array, samples_B: jax.Array, *, seed: int, most: int) -> jax.Array:
    """The key of each row's sample, of `most` samples that there may be."""
    keys = row_keys(seed, ids_B, most).reshape(-1, most)
    return constrain(keys[jnp.arange(len(keys)), samples_B], "rows")


def read(ar: AR, placed: Any, texts: Sequence[str], *, size: int, mesh: Mesh | None, progress: bool) -> np.ndarray:
    """The AR's vectors of the texts: float32 [m, D], the raw output of its head. `placed`: its parameters."""
    prompts = hosts.spread(lambda text: ar_prompt_ids(ar.tokenizer, ar.sidecar, text), texts)
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
            with under(mesh):
                found = reconstruct_jit(placed, divided(tokens, mesh), divided(lengths, mesh), cfg=ar.cfg)
            out[rows] = on_host(found)[: len(rows)]
            bar.update(len(rows))
    bar.close()
    return out
