"""S4D by chunks, by FFT and token by token: one function, in outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.ssm import api, reference, s4d

ROWS, LENGTH, CHANNELS, PAIRS = 2, 19, 2, 3
PACKED = np.array([[3] * 5 + [1] * 7 + [3] * 3 + [2] + [0] * 3, [1] * 7 + [2] * 12])
PADDED = np.array([[3] * 15 + [0] * 4, [1] * 19])
CASES = {
  "plain": (None, False),
  "state": (None, True),
  "padded_state": (PADDED, True),
  "packed_state": (PACKED, True),
}


def _inputs(state=False, length=LENGTH, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  a_real = -jnp.exp(normal(PAIRS, CHANNELS))
  arrays = dict(
    x_BLI=normal(ROWS, length, CHANNELS),
    dt_I=jnp.exp(normal(CHANNELS) - 1),
    a_2NI=jnp.stack([a_real, 3 * normal(PAIRS, CHANNELS)]),
    c_2NI=normal(2, PAIRS, CHANNELS),
  )
  if state:
    arrays["initial_state_B2NI"] = normal(ROWS, 2, PAIRS, CHANNELS)
  return arrays


def _recurrence(arrays, segments=None):
  """A complex128 loop over rows and tokens in NumPy."""
  pair = lambda z: z[0] + 1j * z[1]
  x, dt, a, c = (np.asarray(z, np.float64) for z in list(arrays.values())[:4])
  a, c = pair(a), pair(c)
  ab = np.exp(dt * a)
  bb = (ab - 1) / a
  y = np.zeros(x.shape)
  start = np.zeros((x.shape[0], 2, *a.shape))
  start = np.asarray(arrays.get("initial_state_B2NI", start), np.float64)
  h = start[:, 0] + 1j * start[:, 1]
  for row in range(x.shape[0]):
    current = 0
    for t in range(x.shape[1]):
      segment = 1 if segments is None else segments[row, t]
      if segment == 0:
        continue
      if current not in (0, segment):
        h[row] = 0
      current = segment
      h[row] = ab * h[row] + bb * x[row, t]
      y[row, t] = 2 * np.real(np.sum(c * h[row], axis=0))
  return y, np.stack([h.real, h.imag], axis=1)


def _differences(loss, arrays, step=1e-5):
  """The gradient of a float64 function by central differences, number by number."""
  arrays = {name: np.array(z, np.float64) for name, z in arrays.items()}
  gradient = {name: np.zeros(z.shape) for name, z in arrays.items()}
  for name, z in arrays.items():
    for index in np.ndindex(z.shape):
      value = z[index]
      sides = []
      for sign in (1, -1):
        z[index] = value + sign * step
        sides.append(loss(arrays))
      z[index] = value
      gradient[name][index] = (sides[0] - sides[1]) / (2 * step)
  return gradient


def _close(got, wanted, tolerance=1e-4):
  def leaf(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())

  jax.tree.map(leaf, got, wanted)


def _weights():
  rng = np.random.default_rng(1)
  shapes = (ROWS, LENGTH, CHANNELS), (ROWS, 2, PAIRS, CHANNELS)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@functools.cache
def _compiled(form, chunk):
  """Outputs at real tokens, final state, and gradients of a function of both."""
  fn = functools.partial(form, **({"chunk": chunk} if chunk else {}))
  weights = _weights()

  def loss(arrays, segments):
    y_BLI, state = fn(**arrays, segments_BL=segments)
    if segments is not None:
      y_BLI = jnp.where(segments[:, :, None] != 0, y_BLI, 0)
    total = jnp.sum(y_BLI * weights[0]) + jnp.sum(state * weights[1])
    return total, (y_BLI, state)

  return jax.jit(jax.grad(loss, has_aux=True))


def _results(form, arrays, segments=None, chunk=None):
  segments = None if segments is None else jnp.asarray(segments)
  return _compiled(form, chunk)(arrays, segments)


@functools.cache
def _wanted(case):
  segments, state = CASES[case]
  weights = _weights()

  def loss(arrays):
    outputs = _recurrence(arrays, segments)
    return sum(np.sum(o * w) for o, w in zip(outputs, weights, strict=True))

  arrays = _inputs(state)
  return _differences(loss, arrays), _recurrence(arrays, segments)


@pytest.mark.parametrize("case", CASES)
def test_equals_numpy_in_outputs_and_gradients(case):
  segments, state = CASES[case]
  _close(_results(s4d.s4d, _inputs(state), segments, 5), _wanted(case))


@pytest.mark.parametrize("chunk", [1, 64])
def test_chunks_change_nothing(chunk):
  _close(_results(s4d.s4d, _inputs(True), PACKED, chunk), _wanted("packed_state"))


def test_naive_recurrence_equals_numpy():
  got = _results(reference.s4d, _inputs(True), PACKED)
  _close(got, _wanted("packed_state"))


def test_convolution_equals_numpy():
  """The paper's own form, by spectra: the same outputs and gradients."""
  arrays = _inputs()
  weight = _weights()[0]

  def loss(arrays):
    y_BLI = reference.s4d_convolution(**arrays)
    return jnp.sum(y_BLI * weight), y_BLI

  gradients, y_BLI = jax.jit(jax.grad(loss, has_aux=True))(arrays)
  _close(y_BLI, _wanted("plain")[1][0])
  wanted = _differences(lambda z: np.sum(_recurrence(z)[0] * weight), arrays)
  _close(gradients, wanted)


def test_accuracy_of_a_long_row():
  """2048 tokens with the initial rates: phases of hundreds of turns stay exact."""
  pairs = 32
  rng = np.random.default_rng(2)
  imag = np.pi * np.arange(pairs, dtype=np.float32)[:, None]
  arrays = dict(
    x_BLI=rng.standard_normal((1, 2048, 3)).astype(np.float32),
    dt_I=np.array([1e-3, 1e-2, 1e-1], np.float32),
    a_2NI=np.stack([np.full((pairs, 3), -0.5), np.broadcast_to(imag, (pairs, 3))]),
    c_2NI=rng.standard_normal((2, pairs, 3)).astype(np.float32),
  )
  arrays["a_2NI"] = arrays["a_2NI"].astype(np.float32)
  wanted, _ = _recurrence(arrays)
  given = jax.tree.map(jnp.asarray, arrays)
  _close(jax.jit(s4d.s4d)(**given)[0], wanted)
  _close(jax.jit(reference.s4d_convolution)(**given), wanted)


def test_step_sizes_that_are_tiny():
  """(exp(dt A) - 1) / A keeps its digits, where the difference would lose them."""
  a_2NI = jnp.stack([jnp.full((2, 1), -0.5), jnp.array([[0.0], [3.0]])])
  _, bb = jax.jit(s4d.discretize)(jnp.array([1e-6]), a_2NI)
  a = np.asarray(a_2NI[0] + 1j * a_2NI[1], np.complex128)
  wanted = np.expm1(np.float64(np.float32(1e-6)) * a) / a
  np.testing.assert_allclose(np.asarray(bb[0]), wanted.real, rtol=1e-6)
  np.testing.assert_allclose(np.asarray(bb[1]), wanted.imag, atol=1e-6 * 1e-6)


def test_prefill_then_steps_equal_parallel():
  arrays = _inputs(True)
  run = jax.jit(functools.partial(api.s4d, chunk=4))
  wanted = run(**arrays)
  x_BLI, state = arrays.pop("x_BLI"), arrays.pop("initial_state_B2NI")
  parts = []
  for start, stop in [(0, 13), *((t, t + 1) for t in range(13, LENGTH))]:
    y_BLI, state = run(x_BLI[:, start:stop], **arrays, initial_state_B2NI=state)
    parts.append(y_BLI)
  _close((jnp.concatenate(parts, axis=1), state), wanted, 1e-5)


def test_a_step_of_padding_keeps_the_state():
  arrays = _inputs(True, length=1)
  segments = jnp.array([[1], [0]])
  _, state = jax.jit(api.s4d)(**arrays, segments_BL=segments)
  before = arrays["initial_state_B2NI"]
  np.testing.assert_array_equal(state[1], before[1])
  assert not np.array_equal(state[0], before[0])
  y_BLI, _ = jax.jit(s4d.s4d)(**arrays)
  _close(jax.jit(api.s4d)(**arrays)[0], y_BLI, 1e-5)


def test_a_row_of_padding_keeps_the_state():
  arrays = _inputs(True)
  segments = jnp.asarray(PADDED).at[1].set(0)
  _, state = jax.jit(functools.partial(s4d.s4d, chunk=4))(
    **arrays, segments_BL=segments
  )
  np.testing.assert_array_equal(state[1], arrays["initial_state_B2NI"][1])


def test_documents_are_isolated():
  """Neither gradients nor values that are not finite pass between documents."""
  arrays = _inputs(True)
  run = jax.jit(functools.partial(s4d.s4d, chunk=4))
  segments = jnp.asarray(PACKED)

  def third_document(x_BLI, state):
    values = arrays | {"x_BLI": x_BLI, "initial_state_B2NI": state}
    return jnp.sum(run(**values, segments_BL=segments)[0][0, 12:15] ** 2)

  grads = jax.jit(jax.grad(third_document, (0, 1)))
  dx_BLI, dstate = grads(arrays["x_BLI"], arrays["initial_state_B2NI"])
  touched = np.abs(np.asarray(dx_BLI[0])).sum(1) > 0
  np.testing.assert_array_equal(np.flatnonzero(touched), np.arange(12, 15))
  assert not np.asarray(dstate).any()

  clean, _ = run(**arrays, segments_BL=segments)
  arrays["x_BLI"] = arrays["x_BLI"].at[0, 6].set(jnp.nan)
  dirty, _ = run(**arrays, segments_BL=segments)
  outside = np.r_[0:6, 12:16]
  np.testing.assert_array_equal(dirty[0, outside], clean[0, outside])


def test_bfloat16_inputs():
  arrays = _inputs()
  wanted = jax.jit(s4d.s4d)(**arrays)
  arrays["x_BLI"] = arrays["x_BLI"].astype(jnp.bfloat16)
  y_BLI, state = jax.jit(s4d.s4d)(**arrays)
  assert y_BLI.dtype == jnp.bfloat16
  assert state.dtype == jnp.float32
  _close((y_BLI.astype(jnp.float32), state), wanted, 2e-2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dt_I=(3,)), "dt has shape"),
    (dict(a_2NI=(2, 3, 5), c_2NI=(2, 3, 5)), "a has shape"),
    (dict(c_2NI=(2, 4, 2)), "c has shape"),
    (dict(initial_state_B2NI=(2, 2, 4, 2)), "initial_state has shape"),
  ],
)
def test_wrong_shapes(change, message):
  wrong = {name: jnp.zeros(shape) for name, shape in change.items()}
  with pytest.raises(errors.InputError, match=message):
    api.s4d(**(_inputs() | wrong))


def test_wrong_chunk():
  with pytest.raises(errors.InputError, match="chunk must be at least 1 token, not 0"):
    api.s4d(**_inputs(), chunk=0)
