"""Products read off a compiled program are those that were written."""

import jax
import jax.numpy as jnp

from effjax.cli.benches import moe as bench
from effjax.measure import hlo_costs
from effjax.ops.moe import grouped


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
