"""What compiled programs multiply and move is what was written."""

import functools
import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from effjax.cli.benches import moe as bench
from effjax.measure import hlo_costs
from effjax.ops.moe import grouped
from effjax.parallel import hlo, topology


def test_every_product_is_found_once():
  def fn(a, b, c):
    y = jax.lax.fori_loop(0, 9, lambda _, y: jnp.tanh(y @ c), a @ b)
    return jnp.einsum("mn,mk->nk", y, a)

  a, b, c = jnp.zeros((8, 16)), jnp.zeros((16, 32)), jnp.zeros((32, 32))
  found = sorted(hlo_costs.dots(jax.jit(fn).lower(a, b, c).compile().as_text()))
  assert [cost for _, cost in found] == [
    2 * 8 * 16 * 32,
    2 * 8 * 32 * 32,
    2 * 8 * 16 * 32,
  ]
  assert [set(shape) for shape, _ in found] == [{8, 32}, {8, 32}, {16, 32}]


def test_a_grouped_product_executes_what_its_groups_need():
  sizes, width, hidden = [700, 0, 40, 1, 283], 5, 7
  x_TD, w_EDF = jnp.zeros((1024, width)), jnp.zeros((len(sizes), width, hidden))
  product = jax.jit(grouped.grouped_matmul)
  text = product.lower(x_TD, w_EDF, jnp.array(sizes)).compile().as_text()
  rows = (256 + 256 + 192) + 64 + 32 + (256 + 32)
  assert bench.executed(text, sizes) == 2 * rows * width * hidden


@functools.cache
def _on_tpu():
  """Products with and without batch axes, as the TPU compiler writes them."""
  pytest.importorskip("libtpu")
  where = SingleDeviceSharding(topology.devices("v5e:2x2")[0])
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=where)

  def fn(x, w, a, b, x8, w8):
    rows = jnp.einsum("bld,df->blf", x, w)
    gradient = jnp.einsum("bld,blf->df", x, rows)
    scores = jnp.einsum("bhlk,bhsk->bhls", a, b)
    codes = jax.lax.dot(x8, w8, preferred_element_type=jnp.int32)
    return rows, gradient, scores, codes

  eight = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.int8, sharding=where)
  args = (shape(3, 256, 512), shape(512, 384), shape(2, 5, 128, 64))
  args += (shape(2, 5, 256, 64), eight(256, 512), eight(512, 128))
  return hlo.read(topology.compiled(jax.jit(fn).lower(*args)).as_text())


def test_products_of_a_tpu_program():
  program = _on_tpu()
  found = [
    product
    for one in program.computations[program.entry]
    for product in hlo_costs.products(one, program)
  ]
  needed = [
    ("bf16", 2 * 3 * 256 * 512 * 384),
    ("bf16", 2 * 3 * 256 * 512 * 384),
    ("bf16", 2 * 2 * 5 * 128 * 256 * 64),
    ("s8", 2 * 256 * 512 * 128),
  ]
  assert sorted(found) == sorted(needed)


SLICES = textwrap.dedent("""
  HloModule slices

  %inner (p: bf16[10,64]) -> bf16[10,64] {
    %p = bf16[10,64]{1,0} parameter(0)
    ROOT %same = bf16[10,64]{1,0} bitcast(%p)
  }

  %one_layer (stack: bf16[10,64], i: s32[], x: bf16[10,64]) -> bf16[10,64] {
    %stack = bf16[10,64]{1,0} parameter(0)
    %i = s32[] parameter(1)
    %x = bf16[10,64]{1,0} parameter(2)
    %nested = bf16[10,64]{1,0} fusion(%x), kind=kLoop, calls=%inner
    %layer = bf16[1,64]{1,0} dynamic-slice(%nested, %i, %i), dynamic_slice_sizes={1,64}
    %twice = bf16[1,64]{1,0} add(%layer, %layer)
    ROOT %put = bf16[10,64]{1,0} dynamic-update-slice(%stack, %twice, %i, %i)
  }

  ENTRY %main (s: bf16[10,64], i: s32[], x: bf16[10,64]) -> bf16[10,64] {
    %s = bf16[10,64]{1,0} parameter(0)
    %n = s32[] parameter(1)
    %y = bf16[10,64]{1,0} parameter(2)
    %near = bf16[10,64]{1,0:S(1)} parameter(3)
    %f = bf16[10,64]{1,0} fusion(%s, %n, %y), kind=kLoop, calls=%one_layer
    %start = (bf16[10,64]{1,0:S(1)}, bf16[10,64]{1,0}, u32[]) copy-start(%y)
    %part = ((bf16[10,64]{1,0}), bf16[2,64]{1,0:S(1)}, u32[]) slice-start(%y)
    %sum = bf16[10,64]{1,0} add(%y, %near)
    %view = bf16[640]{0} bitcast(%y)
  }
""")


def test_slices_count_by_what_they_touch():
  program = hlo.read(SLICES)
  moved = {
    one.name: hlo_costs.memory_bytes(one, program) for one in program.by_name.values()
  }
  row, whole = 2 * 64, 2 * 10 * 64
  # One layer is read and one is written; its number is four bytes.
  assert moved["f"] == 2 * row + 4
  assert moved["start"] == whole and moved["part"] == 2 * row
  assert moved["sum"] == 2 * whole
  assert moved["view"] == moved["s"] == 0
