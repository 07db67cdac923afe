"""The RetNet mixer against a float64 recurrence and the naive layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.nn.mixers import retnet
from effjax.ops.attention import rope
from effjax.ops.linear_attention import reference

ROWS, LENGTH, WIDTH, HEADS, HEAD_DIM = 2, 11, 12, 2, 6
OPTIONS = retnet.RetNetOptions(num_heads=HEADS, head_dim=HEAD_DIM, chunk=4)
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 6, [3] * 9 + [0] * 2], jnp.int32)
POSITIONS = jnp.asarray([[*range(5), *range(6)], [*range(9), 0, 0]], jnp.int32)
MORE = dict(positions=POSITIONS, segments=SEGMENTS)


def _module(causal=True, **changes):
  options = dataclasses.replace(OPTIONS, **changes)
  return retnet.RetNet(options, WIDTH, causal=causal)


@pytest.fixture(scope="module")
def inputs():
  x_BLD = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, WIDTH))
  init = jax.jit(_module().init)
  return init(jax.random.key(1), x_BLD, **MORE)["params"], x_BLD


def _close(a, b, tolerance=1e-4):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape
  assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def test_equals_a_recurrence_in_numpy(inputs):
  """Rotation, decay, norm and gate of arXiv:2307.08621 for one document, float64."""
  params, x_BLD = inputs
  p = {name: np.asarray(w, np.float64) for name, w in params.items()}
  x = np.asarray(x_BLD, np.float64)
  frequency = 10_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
  gamma = 1 - 2.0 ** (-5 - np.arange(HEADS))

  def turned(name, t):
    a, b = np.split((x[:, t] @ p[name]).reshape(ROWS, HEADS, HEAD_DIM), 2, axis=-1)
    z = (a + 1j * b) * np.exp(1j * t * frequency)
    return np.concatenate([z.real, z.imag], axis=-1)

  s = np.zeros((ROWS, HEADS, HEAD_DIM, 2 * HEAD_DIM))
  wanted = []
  for t in range(LENGTH):
    v = (x[:, t] @ p["v"]).reshape(ROWS, HEADS, 2 * HEAD_DIM)
    s = gamma[:, None, None] * s + turned("k", t)[..., None] * v[..., None, :]
    y = np.einsum("bhk,bhkp->bhp", turned("q", t) * HEAD_DIM**-0.5, s)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    gate = x[:, t] @ p["gate"]
    wanted.append((gate / (1 + np.exp(-gate)) * y.reshape(ROWS, -1)) @ p["o"])
  positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
  ones = jnp.ones((ROWS, LENGTH), jnp.int32)
  got = jax.jit(_module().apply)(
    {"params": params}, x_BLD, positions=positions, segments=ones
  )[0]
  _close(got, np.stack(wanted, axis=1))


def test_gradients_equal_the_naive_layer(inputs):
  _, x_BLD = inputs
  module = _module(value_dim=4)
  params = jax.jit(module.init)(jax.random.key(1), x_BLD, **MORE)["params"]
  real = (SEGMENTS > 0)[..., None]
  probe = jax.random.normal(jax.random.key(2), x_BLD.shape) * real

  def grads(fn):
    loss = lambda params, x: (lambda y: (jnp.sum(y * probe), y * real))(fn(params, x))
    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x_BLD)

  def naive(params, x_BLD):
    heads = lambda name: (x_BLD @ params[name]).reshape(ROWS, LENGTH, HEADS, -1)
    q, k = rope.rope(heads("q"), POSITIONS), rope.rope(heads("k"), POSITIONS)
    y = reference.retention(q, k, heads("v"), segments_BL=SEGMENTS)
    y = y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    y = (jax.nn.silu(heads("gate")) * y).reshape(ROWS, LENGTH, -1)
    return y @ params["o"]

  fast = lambda params, x_BLD: module.apply({"params": params}, x_BLD, **MORE)[0]
  jax.tree.map(_close, grads(fast), grads(naive))


def test_the_state_is_a_float32_matrix_a_head(inputs):
  params, x_BLD = inputs
  state = _module().init_state(ROWS, 10**9, jnp.bfloat16)
  assert state.memory.shape == (ROWS, HEADS, 2 * HEAD_DIM, HEAD_DIM)
  half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
  step = lambda params, x_BLD, state: _module().apply(
    {"params": params},
    x_BLD,
    state,
    positions=POSITIONS[:, :1],
    segments=SEGMENTS[:, :1],
  )
  y, new = jax.eval_shape(step, half, x_BLD[:, :1].astype(jnp.bfloat16), state)
  assert y.dtype == jnp.bfloat16 and new.memory.dtype == jnp.float32
  assert new.memory.shape == state.memory.shape


def test_bad_input(inputs):
  params, x_BLD = inputs
  with pytest.raises(errors.InputError, match="retnet is causal"):
    _module(causal=False).apply({"params": params}, x_BLD, **MORE)
  with pytest.raises(errors.InputError, match="no keys and values to share"):
    _module().apply({"params": params}, x_BLD, shared=(x_BLD, x_BLD), **MORE)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(value_dim=0), "value_dim=0 must be positive"),
    (dict(head_dim=7), "head_dim=7 must be even"),
  ],
)
def test_bad_options(changes, message):
  with pytest.raises(errors.InputError, match=message):
    _module(**changes)
