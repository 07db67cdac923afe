"""The GPU's grouped product, interpreted, against the form of every other platform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.moe import grouped, grouped_triton

SIZES = {
  "uneven": ([130, 0, 37, 150], 317),
  "rows_left_over": ([3, 1, 100], 140),
  "nothing": ([0, 0], 10),
}


@pytest.mark.parametrize(("sizes", "rows"), SIZES.values(), ids=SIZES)
def test_equals_windows_in_outputs_and_gradients(sizes, rows):
  keys = jax.random.split(jax.random.key(0), 3)
  x_TD = jax.random.normal(keys[0], (rows, 70))
  w_EDF = jax.random.normal(keys[1], (len(sizes), 70, 130))
  probe_TF = jax.random.normal(keys[2], (rows, 130))
  sizes_E = jnp.array(sizes, jnp.int32)

  def run(product):
    loss = lambda x, w: jnp.vdot(product(x, w), probe_TF)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x_TD, w_EDF)

  kernel = lambda x, w: grouped_triton.grouped_matmul(x, w, sizes_E, interpret=True)
  windows = lambda x, w: grouped.grouped_matmul(x, w, sizes_E, block=64)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-4),
    run(kernel),
    run(windows),
  )
  np.testing.assert_allclose(kernel(x_TD, w_EDF), windows(x_TD, w_EDF), atol=1e-4)


def test_bfloat16_is_added_up_in_float32():
  x_TD = jnp.ones((40, 256), jnp.bfloat16)
  w_EDF = jnp.ones((2, 256, 8), jnp.bfloat16).at[:, 1:].multiply(2**-9)
  y_TF = grouped_triton.grouped_matmul(x_TD, w_EDF, jnp.array([20, 20]), interpret=True)
  assert y_TF.dtype == jnp.bfloat16
  # In bfloat16, 1 + 2**-9 would be 1 again, every time.
  np.testing.assert_array_equal(y_TF, jnp.full_like(y_TF, 1 + 255 * 2**-9))


def test_what_runs_is_told_by_platform_and_dtype():
  assert grouped.choose("tpu").name == "ragged_dot"
  assert grouped.choose("cpu").name == "windows"
  assert grouped.choose("gpu", jnp.bfloat16).name == "triton"
  name, reason = grouped.choose("gpu", jnp.float64)
  assert name == "windows" and reason.endswith("the kernel takes no float64")
