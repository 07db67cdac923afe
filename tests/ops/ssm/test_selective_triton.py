"""The GPU's selective scan, interpreted, against the form of every other platform."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors, shard
from effjax.ops.recurrence import across_devices
from effjax.ops.ssm import selective, selective_slices, selective_triton
from effjax.parallel import mesh as mesh_lib
from effjax.parallel import rules

B, L, I, N = 2, 70, 20, 5


def _inputs():
  keys = jax.random.split(jax.random.key(0), 6)
  return (
    jax.random.normal(keys[0], (B, L, I)),
    jax.nn.softplus(jax.random.normal(keys[1], (B, L, I))),
    -jnp.exp(jax.random.normal(keys[2], (N, I))),
    jax.random.normal(keys[3], (B, L, N)),
    jax.random.normal(keys[4], (B, L, N)),
    jax.random.normal(keys[5], (B, N, I)),
  )


def _segments():
  """Two documents in each row, with padding in front, between and behind."""
  segments_BL = np.ones((B, L), np.int32)
  segments_BL[0, 33:] = 2
  segments_BL[0, 30:33] = segments_BL[1, :3] = segments_BL[1, 60:] = 0
  segments_BL[1, 20:60] = 7
  return jnp.asarray(segments_BL)


@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_loops_in_outputs_and_gradients(packed):
  segments_BL = _segments() if packed else None
  probe = jax.random.normal(jax.random.key(7), (B, L, I))
  # Outputs at padding mean nothing.
  probe = jnp.where((_segments() != 0)[..., None], probe, 0)

  def run(scan, **kwargs):
    def loss(*args):
      *rest, state_BNI = args
      y_BLI, end_BNI = scan(
        *rest, segments_BL=segments_BL, initial_state_BNI=state_BNI, **kwargs
      )
      return jnp.vdot(y_BLI, probe) + jnp.sum(end_BNI)

    return jax.jit(jax.value_and_grad(loss, argnums=range(6)))(*_inputs())

  kernel = run(selective_triton.selective_scan, interpret=True)
  loops = run(selective.selective_scan)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), kernel, loops
  )


def test_starts_on_each_device_from_what_arrives():
  segments_BL = _segments()

  def run(scan):
    def loss(*args):
      names = ("x_BLI", "dt_BLI", "a_NI", "b_BLN", "c_BLN", "initial_state_BNI")
      y_BLI, end_BNI = across_devices.run(
        functools.partial(selective_slices.selective_scan, scan=scan),
        dict(zip(names, args, strict=True)) | {"segments_BL": segments_BL},
        ("BLI", "BNI"),
        {"L": "length"},
        state="initial_state_BNI",
      )
      return jnp.sum(jnp.where((segments_BL != 0)[..., None], y_BLI, 0)), end_BNI

    return jax.jit(jax.grad(loss, argnums=range(6), has_aux=True))(*_inputs())

  loops = run(selective.selective_scan)
  mesh = mesh_lib.make(mesh_lib.MeshConfig(preset="ring", num_devices=2))
  with shard.use_rules(mesh, rules.find("ring").activations):
    kernel = run(functools.partial(selective_triton.selective_scan, interpret=True))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), kernel, loops
  )


def test_keeps_the_dtype_and_starts_from_nothing():
  x_BLI, *rest, _ = _inputs()
  y_BLI, end_BNI = selective_triton.selective_scan(
    x_BLI.astype(jnp.bfloat16), *rest, interpret=True
  )
  assert (y_BLI.dtype, end_BNI.dtype) == (jnp.bfloat16, jnp.float32)
  expected, end = selective.selective_scan(x_BLI.astype(jnp.bfloat16), *rest)
  np.testing.assert_allclose(np.float32(y_BLI), np.float32(expected), rtol=0.02)
  np.testing.assert_allclose(end_BNI, end, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
  x_BLI, dt_BLI, a_NI, b_BLN, c_BLN, _ = _inputs()
  with pytest.raises(errors.InputError, match="scan's b has shape"):
    selective_triton.selective_scan(x_BLI, dt_BLI, a_NI, b_BLN[:, :3], c_BLN)
  with pytest.raises(errors.InputError, match="chunk must be at least 1"):
    selective_triton.selective_scan(x_BLI, dt_BLI, a_NI, b_BLN, c_BLN, chunk=0)
