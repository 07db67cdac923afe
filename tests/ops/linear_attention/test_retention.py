"""Retention against its recurrence and its parallel form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from effjax.ops.linear_attention import api, causal, reference

ROWS, LENGTH, HEADS, KEYS, VALUES = 2, 21, 3, 4, 6
SEGMENTS = np.array([[2] * 9 + [0] * 3 + [1] * 9, [1] * 16 + [0] * 5], np.int32)


def _arrays():
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.standard_normal((ROWS, LENGTH, HEADS, size)), jnp.float32)
    for size in (KEYS, KEYS, VALUES)
  ]


def _close(a, b, tolerance=1e-4):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  assert a.shape == b.shape
  assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def _recurrence(q, k, v, segments=None):
  """arXiv:2307.08621, eq. 6, in float64 NumPy; outputs and the last state."""
  q, k, v = (np.asarray(z, np.float64) for z in (q, k, v))
  gamma = 1 - 2.0 ** (-5 - np.arange(q.shape[2]))
  ys = np.zeros_like(v)
  states = np.zeros((q.shape[0], q.shape[2], v.shape[3], q.shape[3]))
  for row, s in enumerate(states):
    document = 0
    for t in range(q.shape[1]):
      segment = 1 if segments is None else segments[row, t]
      if segment == 0:
        continue
      s *= 0 if document not in (0, segment) else gamma[:, None, None]
      document = segment
      s += v[row, t, :, :, None] * k[row, t, :, None]
      ys[row, t] = (s @ q[row, t, :, :, None])[..., 0] / q.shape[3] ** 0.5
  return ys, states


def test_equals_the_recurrence():
  arrays = _arrays()
  ys, states = _recurrence(*arrays)
  _close(jax.jit(reference.retention)(*arrays), ys)
  for chunk in (4, 64):
    fn = jax.jit(functools.partial(api.retention, chunk=chunk))
    y_BLHP, state = fn(*arrays)
    _close(y_BLHP, ys)
    _close(state, states)
  packed, states = _recurrence(*arrays, SEGMENTS)
  real = (SEGMENTS != 0)[:, :, None, None]
  y_BLHP, state = jax.jit(functools.partial(api.retention, chunk=4))(
    *arrays, segments_BL=jnp.asarray(SEGMENTS)
  )
  _close(y_BLHP * real, packed)
  _close(state, states)
  _close(reference.retention(*arrays, segments_BL=jnp.asarray(SEGMENTS)) * real, packed)


def test_gradients_equal_the_parallel_form():
  arrays = _arrays()
  probe = np.random.default_rng(1).standard_normal(arrays[2].shape).astype("f4")
  probe = probe * (SEGMENTS != 0)[:, :, None, None]

  def grads(fn):
    loss = lambda *arrays: jnp.sum(
      fn(*arrays, segments_BL=jnp.asarray(SEGMENTS)) * probe
    )
    return jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

  fast = grads(lambda *arrays, **kwargs: api.retention(*arrays, **kwargs, chunk=4)[0])
  for a, b in zip(fast, grads(reference.retention), strict=True):
    _close(a, b)


def test_prefill_then_steps():
  arrays = _arrays()
  run = jax.jit(functools.partial(api.retention, chunk=4))
  wanted, final = run(*arrays)
  y, state = run(*(z[:, :17] for z in arrays))
  outputs = [y]
  for t in range(17, LENGTH):
    y, state = run(*(z[:, t : t + 1] for z in arrays), initial_state_BHPN=state)
    outputs.append(y)
  _close(jnp.concatenate(outputs, axis=1), wanted)
  _close(state, final)


def test_decays_of_many_heads_stay_below_one():
  """1 - 2^-29 is 1 in float32; its logarithm is not 0."""
  got = causal.log_decays(25)
  np.testing.assert_allclose(np.exp(np.float64(got[:5])), 1 - 0.5 ** np.arange(5, 10))
  np.testing.assert_allclose(got[24], -(2.0**-29), rtol=1e-6)
