"""The grouped product against a loop over rows: any sizes, windows and gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import counting, errors
from effjax.ops import flops
from effjax.ops.moe import grouped

D, F = 5, 7
SIZES = {
  "even": [6, 6, 6],
  "empty": [0, 18, 0, 0],
  "one_row_each": [1, 1, 1],
  "uneven": [2, 0, 11, 5],
  "rows_left_over": [4, 0, 3],
  "nothing": [0, 0],
}


def _inputs(sizes, rows=18):
  rng = np.random.default_rng(0)
  x_TD = rng.standard_normal((rows, D)).astype(np.float32)
  w_EDF = rng.standard_normal((len(sizes), D, F)).astype(np.float32)
  return jnp.asarray(x_TD), jnp.asarray(w_EDF), jnp.asarray(sizes, jnp.int32)


def _naive(x_TD, w_EDF, sizes):
  """Row by row, without any loop of the implementation."""
  expert_T = np.repeat(np.arange(len(sizes)), sizes)
  rows = [x_TD[t] @ w_EDF[e] for t, e in enumerate(expert_T)]
  rows += [jnp.zeros(F)] * (len(x_TD) - len(rows))
  return jnp.stack(rows)


def _loss(fn, probe):
  return lambda *args: jnp.sum(fn(*args) * probe)


@pytest.mark.parametrize("block", [1, 4, 26])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_equals_a_loop_over_rows(sizes, block):
  x_TD, w_EDF, sizes_E = _inputs(sizes)
  probe = jax.random.normal(jax.random.key(1), (len(x_TD), F))
  fast = lambda x, w: grouped.grouped_matmul(x, w, sizes_E, block=block)
  naive = lambda x, w: _naive(x, w, sizes)
  both = jax.jit(jax.value_and_grad(_loss(fast, probe), argnums=(0, 1)))
  expected = jax.value_and_grad(_loss(naive, probe), argnums=(0, 1))(x_TD, w_EDF)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
    (jax.jit(fast)(x_TD, w_EDF), both(x_TD, w_EDF)),
    (naive(x_TD, w_EDF), expected),
  )


def test_the_default_equals_ragged_dot_in_bfloat16():
  x_TD, w_EDF, sizes_E = _inputs([40, 0, 30, 58], rows=128)
  x_TD, w_EDF = x_TD.astype(jnp.bfloat16), w_EDF.astype(jnp.bfloat16)
  y_TF = jax.jit(grouped.grouped_matmul)(x_TD, w_EDF, sizes_E)
  assert y_TF.dtype == jnp.bfloat16
  expected = jax.lax.ragged_dot(*map(jnp.float32, (x_TD, w_EDF)), sizes_E)
  np.testing.assert_allclose(np.float32(y_TF), expected, atol=0.05, rtol=0.02)


def test_under_vmap():
  x_TD, w_EDF, sizes_E = _inputs([2, 0, 11, 5])
  w_LEDF = jnp.stack([w_EDF, 2 * w_EDF])
  product = lambda w: grouped.grouped_matmul(x_TD, w, sizes_E, block=4)
  y_LTF = jax.vmap(product)(w_LEDF)
  np.testing.assert_allclose(y_LTF[1], 2 * y_LTF[0], rtol=1e-5)
  np.testing.assert_allclose(y_LTF[0], product(w_EDF), rtol=1e-5)


def test_little_of_16384_rows_is_wasted_on_64_random_groups(rng):
  sizes = np.bincount(rng.integers(0, 64, 16384), minlength=64).tolist()
  assert 1 < sum(grouped.window_rows(sizes)) / 16384 < 1.1


def test_groups_are_split_evenly_into_windows():
  assert grouped.window_rows([0, 1, 330, 641], block=320) == [32, 192, 160] + [224] * 3
  # A second window of one row would cost nearly as much as a full one.
  assert grouped.window_rows([9], block=8) == [5, 4]


def test_flops_are_those_of_one_expert_a_row():
  sizes_E = jnp.full(16, 4096, jnp.int32)
  x_TD, w_EDF = jnp.zeros((65536, D)), jnp.zeros((16, D, F))
  found = flops.dot_flops(grouped.grouped_matmul, x_TD, w_EDF, sizes_E)
  assert found == 2 * 65536 * D * F
  # 7 or 8 rows a group take windows of 32, and are counted as such.
  x_TD, w_EDF, sizes_E = _inputs([7, 8] * 5, rows=75)
  found = flops.dot_flops(grouped.grouped_matmul, x_TD, w_EDF, sizes_E)
  assert found == 2 * 10 * 32 * D * F


def test_no_product_of_the_program_has_an_axis_of_experts():
  x_TD, w_EDF, sizes_E = _inputs([300, 0, 212], rows=512)
  loss = lambda x, w: jnp.sum(grouped.grouped_matmul(x, w, sizes_E) ** 2)
  text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x_TD, w_EDF).as_text()
  dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
  # One of each number of rows: forward, and the two gradients.
  assert len(dots) == 3 * len(grouped.WINDOW_SIZES)
  few = jax.jit(grouped.grouped_matmul).lower(x_TD[:40], w_EDF, sizes_E).as_text()
  # No window is larger than all rows.
  assert few.count("stablehlo.dot_general") == 2
  for line in dots:
    left, right, _ = re.findall(r"tensor<([0-9x]+)xf32>", line)
    assert left.count("x") == right.count("x") == 1


def test_what_is_counted_is_the_same_function():
  x_TD, w_EDF, sizes_E = _inputs([2, 0, 11, 3])
  with counting.counting():
    counted = grouped.grouped_matmul(x_TD, w_EDF, sizes_E)
  expected = _naive(x_TD, w_EDF, [2, 0, 11, 3])
  np.testing.assert_allclose(counted, expected, atol=1e-5)


def test_a_block_under_one_is_refused():
  with pytest.raises(errors.InputError, match="block=0 must be at least 1"):
    grouped.grouped_matmul(*_inputs([18]), block=0)
