"""The S4D module against its block written in float64 NumPy; defaults and bad sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.nn.mixers import s4d

WIDTH, LENGTH, PAIRS = 5, 11, 2


@pytest.fixture(scope="module")
def run():
  module = s4d.S4D(s4d.S4DOptions(state_dim=2 * PAIRS, chunk=4), WIDTH)
  place = dict(
    positions=jnp.zeros((2, LENGTH), jnp.int32),
    segments=jnp.ones((2, LENGTH), jnp.int32),
  )
  apply = lambda params, x: module.apply({"params": params}, x, **place)[0]
  x_BLD = jax.random.normal(jax.random.key(0), (2, LENGTH, WIDTH))
  params = jax.jit(module.init)(jax.random.key(1), x_BLD, **place)["params"]
  rng = np.random.default_rng(0)
  noise = lambda z: z + 0.3 * rng.standard_normal(z.shape).astype(np.float32)
  return jax.jit(apply), jax.tree.map(noise, params), x_BLD


def _block(params, x_BLD):
  """State space, skip, GELU, linear map and GLU; the kernel is summed tap by tap."""
  p = {name: np.asarray(z, np.float64) for name, z in params.items()}
  x = np.asarray(x_BLD, np.float64)
  a = -np.exp(p["a_log_real"]) + 1j * p["a_imag"]
  c = p["c_real"] + 1j * p["c_imag"]
  dt = np.exp(p["log_dt"])
  y = x * p["d"]
  for lag in range(x.shape[1]):
    tap = 2 * np.real(np.sum(c * (np.exp(dt * a) - 1) / a * np.exp(lag * dt * a), 0))
    y[:, lag:] += tap * x[:, : x.shape[1] - lag]
  y = y * (1 + np.vectorize(math.erf)(y / 2**0.5)) / 2
  gate = 1 / (1 + np.exp(-(y @ p["gate"] + p["gate_bias"])))
  return (y @ p["out"] + p["out_bias"]) * gate


def test_equals_numpy(run):
  apply, params, x_BLD = run
  wanted = _block(params, x_BLD)
  difference = np.abs(np.asarray(apply(params, x_BLD)) - wanted).max()
  assert difference <= 1e-4 * max(1.0, np.abs(wanted).max())


def test_every_gradient_equals_differences_of_numpy(run):
  apply, params, x_BLD = run
  probe = np.random.default_rng(1).standard_normal(x_BLD.shape).astype(np.float32)
  loss = lambda params: jnp.sum(apply(params, x_BLD) * probe)
  gradients = jax.jit(jax.grad(loss))(params)
  for name, value in params.items():
    wanted = np.zeros(value.shape)
    for index in np.ndindex(value.shape):
      sides = []
      for step in (1e-5, -1e-5):
        moved = np.array(value, np.float64)
        moved[index] += step
        sides.append(np.sum(_block({**params, name: moved}, x_BLD) * probe))
      wanted[index] = (sides[0] - sides[1]) / 2e-5
    limit = 1e-4 * max(1.0, np.abs(wanted).max())
    assert np.abs(np.asarray(gradients[name]) - wanted).max() <= limit, name


def test_initial_values():
  module = s4d.S4D(s4d.S4DOptions(), 64)
  place = jnp.ones((1, 2), jnp.int32)
  init = lambda key: module.init(
    key, jnp.zeros((1, 2, 64)), positions=place, segments=place
  )
  params = jax.jit(init)(jax.random.key(0))["params"]
  np.testing.assert_allclose(np.exp(params["a_log_real"]), np.full((32, 64), 0.5), 1e-6)
  turns = np.broadcast_to(np.pi * np.arange(32)[:, None], (32, 64))
  np.testing.assert_allclose(params["a_imag"], turns, rtol=1e-6)
  dt = np.exp(params["log_dt"])
  assert 9.9e-4 < dt.min() < 3e-3 and 3e-2 < dt.max() < 0.101
  size = np.mean(np.square(params["c_real"]) + np.square(params["c_imag"]))
  assert abs(size - 1) < 0.1


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"state_dim": 7}, "s4d state_dim=7 must be positive and even"),
    ({"chunk": 0}, "s4d chunk=0 must be positive"),
    ({"dt_min": 0.2}, "dt_min=0.2 must be positive and below dt_max=0.1"),
  ],
)
def test_bad_options(options, message):
  with pytest.raises(errors.InputError, match=message):
    s4d.S4DOptions(**options)


def test_not_in_an_encoder():
  module = s4d.S4D(s4d.S4DOptions(), WIDTH, causal=False)
  x_BLD, place = jnp.zeros((1, 2, WIDTH)), jnp.ones((1, 2), jnp.int32)
  with pytest.raises(errors.InputError, match="s4d is causal"):
    module.init(jax.random.key(0), x_BLD, positions=place, segments=place)
