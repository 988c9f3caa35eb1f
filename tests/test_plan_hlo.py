"""Collectives read from compiled programs: known ones of simulated devices, and lines as each compiler writes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nla_jax.train.plan_hlo import Collective, _collective, collectives, sent


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()[:4]), ("b",))


def text(fn, mesh, arguments, out):
    def at(spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at(spec)) for shape, spec in arguments]
    return jax.jit(fn, out_shardings=at(out)).lower(*given).compile().as_text()


def test_contraction_that_is_split_is_an_all_reduce(mesh):
    # x [64, 32 / 4] @ w [32 / 4, 16]: each of the 4 sends its partial sums [64, 16] twice, less its own share.
    hlo = text(jnp.matmul, mesh, [((64, 32), (None, "b")), ((32, 16), ("b", None))], ())
    (found,) = collectives(hlo)
    assert (found.kind, found.group, found.times) == ("all-reduce", 4, 1)
    assert found.bytes == 2 * 64 * 16 * 4 * 3 / 4


def test_weights_split_over_their_rows_are_gathered(mesh):
    hlo = text(jnp.matmul, mesh, [((64, 32), ("b", None)), ((32, 16), (None, "b"))], ("b", None))
    (found,) = collectives(hlo)
    assert (found.kind, found.group) == ("all-gather", 4)
    assert found.bytes == 32 * 16 * 4 * 3 / 4


def test_collective_in_a_loop_counts_once_per_iteration(mesh):
    def fn(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    hlo = text(fn, mesh, [((64, 32), (None, "b")), ((7, 32, 32), (None, "b", None))], (None, "b"))
    found = [c for c in collectives(hlo) if c.times == 7]
    assert found, collectives(hlo)
    assert sum(c.total for c in found) >= 7 * 64 * 32 * 4 * 3 / 4
    assert sum(sent(found).values()) == sum(c.total for c in found)


def test_loops_in_loops_multiply(mesh):
    def fn(x, w):
        def outer(x, _):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], None

        return jax.lax.scan(outer, x, None, length=3)[0]

    hlo = text(fn, mesh, [((64, 32), (None, "b")), ((5, 32, 32), (None, "b", None))], (None, "b"))
    assert 15 in {c.times for c in collectives(hlo)}


def test_loop_that_may_end_early_counts_in_full(mesh):
    def fn(x, w):
        def more(state):
            return (state[0] < 9) & (jnp.max(state[1]) < 10)

        return jax.lax.while_loop(more, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]

    hlo = text(fn, mesh, [((64, 32), (None, "b")), ((32, 32), ("b", None))], (None, "b"))
    # The body's product; the condition is looked at once more.
    assert {9, 10} <= {c.times for c in collectives(hlo)}


def test_one_device_sends_nothing():
    one = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32)).compile().as_text()
    assert collectives(one) == []


LINES = {  # as the TPU and GPU compilers write them
    "%g = bf16[28,3584,128]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=12, replica_groups="
    "mesh['axis_0'=1,'axis_1'=8,'axis_2'=4] {'axis_1'}, dimensions={1}": ("all-gather", 8, 28 * 3584 * 128 * 2 * 7 / 8),
    "%r = (bf16[4,2]{1,0}, /*index=1*/f32[3]{0}) all-reduce(%a, %b), replica_groups=[4,8]<=[8,4]T(1,0), to_apply=%s": (
        "all-reduce",
        8,
        2 * (16 + 12) * 7 / 8,
    ),
    "%s = f32[128]{0:T(128)S(1)} all-reduce(%a), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%s": (
        "all-reduce",
        2,
        128 * 4.0,
    ),
    "ROOT %c = f32[2,4]{1,0} reduce-scatter(%a), replica_groups=[2,4]<=[8], dimensions={1}": (
        "reduce-scatter",
        4,
        96.0,
    ),
    "%t = bf16[8,8]{1,0} all-to-all(%a), replica_groups=[2,4]<=[8], dimensions={0}": ("all-to-all", 4, 128 * 3 / 4),
    "%p = s8[10]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}": ("collective-permute", 8, 10.0),
    "%q = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}": (
        "all-gather",
        4,
        64 * 3 / 4,
    ),
    "%u = f32[16]{0} all-reduce(%a), replica_groups={}, to_apply=%s": ("all-reduce", 8, 2 * 64 * 7 / 8),
    "%v = f32[4]{0} all-reduce(%a), replica_groups=mesh['x'=8] {'x':(1)2}, to_apply=%s": ("all-reduce", 2, 16.0),
}


@pytest.mark.parametrize("line", LINES)
def test_line(line):
    kind, group, size = LINES[line]
    found = _collective(f"  {line}", 8, 3)
    assert found == Collective(kind, group, size, 3)
    assert found.total == 3 * size


def test_ends_of_collectives_are_not_counted_again():
    assert _collective("  %d = f32[16]{0} all-gather-done(%q)", 8, 1) is None
    assert _collective("  %f = f32[16]{0} fusion(%all-gather.3), calls=%c", 8, 1) is None


TPU = """HloModule jit_f, num_partitions=4

%piece.1 (p: f32[4]) -> f32[16] {
  %g.1 = f32[16]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%async_collective_fusion.2 (p: f32[4]) -> f32[16] {
  %g.2 = f32[16]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%done.3 (p: f32[4]) -> f32[16] {
  %g.3 = f32[16]{0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[16]{0} fusion(%a), kind=kLoop, calls=%async_collective_fusion.2
  %r = f32[4]{0} all-reduce(%b), channel_id=8, replica_groups=[1,4]<=[4], to_apply=%add
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[16] {
  %async-collective-start = (f32[4], f32[16]) fusion(%a), kind=kCustom, calls=%piece.1
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  ROOT %async-collective-done = f32[16]{0} fusion(%w), kind=kCustom, calls=%done.3
}
"""


def test_tpu_collective_in_pieces_counts_where_it_starts():
    assert sent(collectives(TPU))["all-gather"] == 64 * 3 / 4
    assert sent(collectives(TPU))["all-reduce"] == 28 * 2 * 16 * 3 / 4


def test_text_that_is_no_module():
    with pytest.raises(ValueError, match="ENTRY"):
        collectives("HloModule nothing")
