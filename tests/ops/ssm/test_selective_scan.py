"""The selective scan against recurrences that share no code with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from effjax.core import errors
from effjax.ops.ssm import api, reference, selective

ROWS, LENGTH, CHANNELS, STATES = 2, 19, 3, 4
SEGMENTS = np.array(
  [
    [3] * 5 + [1] * 2 + [0] * 2 + [3] * 6 + [2] + [0] * 3,
    [0] * 2 + [1] * 7 + [0] * 2 + [1] * 5 + [0] * 3,  # one document
  ]
)
CASES = {
  "plain": {},
  "state": {"state": True},
  "segments_state": {"segments": True, "state": True},
}
CHUNKS = {"segments_state": (1, 5, 64)}


def _inputs(state=False, segments=False, length=LENGTH, seed=0):
  """Random arguments: arrays to differentiate, and the rest."""
  rng = np.random.default_rng(seed)
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  arrays = dict(
    x_BLI=normal(ROWS, length, CHANNELS),
    dt_BLI=jax.nn.softplus(normal(ROWS, length, CHANNELS)),
    a_NI=-jnp.exp(normal(STATES, CHANNELS)),
    b_BLN=normal(ROWS, length, STATES),
    c_BLN=normal(ROWS, length, STATES),
  )
  if state:
    arrays["initial_state_BNI"] = normal(ROWS, STATES, CHANNELS)
  return arrays, dict(segments_BL=jnp.asarray(SEGMENTS)) if segments else {}


def _recurrence(arrays, segments=None):
  """A float64 loop over rows, tokens and channels in NumPy."""
  x, dt, a, b, c = (np.asarray(z, np.float64) for z in list(arrays.values())[:5])
  y = np.zeros(x.shape)
  start = np.zeros((x.shape[0], *a.shape))
  h = np.array(arrays.get("initial_state_BNI", start), np.float64)
  for row in range(x.shape[0]):
    current = 0
    for t in range(x.shape[1]):
      segment = 1 if segments is None else segments[row, t]
      if segment == 0:
        continue
      if current not in (0, segment):
        h[row] = 0
      current = segment
      h[row] = np.exp(dt[row, t] * a) * h[row]
      h[row] += np.outer(b[row, t], dt[row, t] * x[row, t])
      y[row, t] = c[row, t] @ h[row]
  return y, h


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


def _weights(length=LENGTH, seed=1):
  rng = np.random.default_rng(seed)
  shapes = (ROWS, length, CHANNELS), (ROWS, STATES, CHANNELS)
  return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@functools.cache
def _compiled(form, chunk, length):
  """Outputs at real tokens, final state, and gradients of a function of both."""
  fn = functools.partial(form, **({"chunk": chunk} if chunk else {}))
  weights = _weights(length)

  def loss(arrays, segments):
    y_BLI, state_BNI = fn(**arrays, segments_BL=segments)
    if segments is not None:
      y_BLI = jnp.where(segments[:, :, None] != 0, y_BLI, 0)
    total = jnp.sum(y_BLI * weights[0]) + jnp.sum(state_BNI * weights[1])
    return total, (y_BLI, state_BNI)

  return jax.jit(jax.grad(loss, has_aux=True))


def _results(form, arrays, fixed, chunk=None):
  run = _compiled(form, chunk, arrays["x_BLI"].shape[1])
  return run(arrays, fixed.get("segments_BL"))


@pytest.mark.parametrize("case", CASES)
def test_equals_numpy_in_outputs_and_gradients(case):
  arrays, fixed = _inputs(**CASES[case])
  segments = SEGMENTS if fixed else None
  weights = _weights()

  def loss(arrays):
    outputs = _recurrence(arrays, segments)
    return sum(np.sum(o * w) for o, w in zip(outputs, weights, strict=True))

  wanted = _differences(loss, arrays), _recurrence(arrays, segments)
  _close(_results(reference.selective_scan, arrays, fixed), wanted)
  for chunk in CHUNKS.get(case, (8,)):
    _close(_results(selective.selective_scan, arrays, fixed, chunk), wanted)


def test_second_derivative():
  """Optimizers that use curvature differentiate the written gradient."""
  arrays, fixed = _inputs(segments=True, length=LENGTH)
  real = (SEGMENTS != 0)[:, :, None]

  def product(fn):
    def loss(arrays):
      y_BLI, _ = fn(**arrays, **fixed)
      return jnp.sum(jnp.where(real, jnp.tanh(y_BLI), 0) ** 2)

    direction = jax.tree.map(jnp.ones_like, arrays)
    return jax.jit(lambda z: jax.jvp(jax.grad(loss), (z,), (direction,)))(arrays)

  fast = functools.partial(selective.selective_scan, chunk=4)
  _close(product(fast), product(reference.selective_scan))


@pytest.mark.parametrize("rate", [-50.0, -1e6, -1e-6])
def test_extreme_decay(rate):
  arrays, _ = _inputs(length=40)
  arrays["a_NI"] = jnp.full((STATES, CHANNELS), rate)
  wanted = _results(reference.selective_scan, arrays, {})
  _close(_results(selective.selective_scan, arrays, {}, 16), wanted)


def test_prefill_then_steps_equal_parallel():
  arrays, _ = _inputs(state=True)
  run = jax.jit(functools.partial(api.selective_scan, chunk=4))
  wanted = run(**arrays)
  a_NI, state = arrays.pop("a_NI"), arrays.pop("initial_state_BNI")
  parts = []
  for start, stop in [(0, 13), *((t, t + 1) for t in range(13, LENGTH))]:
    part = {name: z[:, start:stop] for name, z in arrays.items()}
    y_BLI, state = run(**part, a_NI=a_NI, initial_state_BNI=state)
    parts.append(y_BLI)
  _close((jnp.concatenate(parts, axis=1), state), wanted, 1e-5)


def test_step_form_is_the_chunked_form():
  """With one token the entry changes form, not meaning."""
  arrays, _ = _inputs(length=1, state=True)
  fixed = dict(segments_BL=jnp.array([[1], [0]]))
  wanted = _results(selective.selective_scan, arrays, fixed)
  _close(_results(api.selective_scan, arrays, fixed), wanted, 1e-5)
  state = arrays.pop("initial_state_BNI")
  np.testing.assert_array_equal(wanted[1][1][1], state[1])
  _close(api.selective_scan(**arrays), selective.selective_scan(**arrays), 1e-5)


def test_padding_changes_nothing():
  """A right-padded row ends in the state of the row without padding."""
  arrays, _ = _inputs(state=True)
  segments = jnp.asarray(np.arange(LENGTH) < np.array([[11], [LENGTH]]), jnp.int32)
  run = jax.jit(functools.partial(selective.selective_scan, chunk=4))
  y_BLI, state = run(**arrays, segments_BL=segments)
  alone = {n: z[:, :11] if n[-3:-1] == "BL" else z for n, z in arrays.items()}
  y_alone, state_alone = run(**alone)
  _close((y_BLI[0, :11], state[0]), (y_alone[0], state_alone[0]), 1e-6)


def test_documents_are_isolated():
  """Neither gradients nor values that are not finite pass between documents."""
  arrays, fixed = _inputs(segments=True, state=True)
  run = functools.partial(selective.selective_scan, chunk=4)

  def third_document(x_BLI, state):
    values = arrays | {"x_BLI": x_BLI, "initial_state_BNI": state}
    return jnp.sum(run(**values, **fixed)[0][0, 9:15] ** 2)

  grads = jax.jit(jax.grad(third_document, (0, 1)))
  dx_BLI, dstate = grads(arrays["x_BLI"], arrays["initial_state_BNI"])
  touched = np.abs(np.asarray(dx_BLI[0])).sum(1) > 0
  np.testing.assert_array_equal(np.flatnonzero(touched), np.arange(9, 15))
  assert not np.asarray(dstate).any()


def test_no_array_of_all_states():
  """Nothing the size of every token's state is ever made, forward or backward."""
  arrays, _ = _inputs(length=64)

  def loss(arrays):
    return jnp.sum(selective.selective_scan(**arrays, chunk=4)[0])

  def sizes(jaxpr):
    for eqn in jaxpr.eqns:
      yield from (v.aval.size for v in eqn.outvars)
      for inner in jex.jaxprs_in_params(eqn.params):
        yield from sizes(inner)

  every_state = ROWS * 64 * STATES * CHANNELS
  assert max(sizes(jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr)) < every_state / 2


def test_bfloat16_inputs():
  """Everything is computed in float32; only inputs and outputs are rounded."""
  arrays, fixed = _inputs(segments=True)
  rounded = jax.tree.map(lambda z: z.astype(jnp.bfloat16), arrays)
  exact = jax.tree.map(lambda z: z.astype(jnp.float32), rounded)
  y_BLI, state = jax.jit(selective.selective_scan)(**rounded, **fixed)
  assert y_BLI.dtype == jnp.bfloat16
  assert state.dtype == jnp.float32
  wanted = jax.jit(selective.selective_scan)(**exact, **fixed)
  _close((y_BLI.astype(jnp.float32), state), wanted, 4e-3)
  np.testing.assert_array_equal(state, wanted[1])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dt_BLI=(2, 19, 4)), "dt has shape"),
    (dict(a_NI=(4, 5)), "a has shape"),
    (dict(b_BLN=(2, 19, 3)), "b has shape"),
    (dict(c_BLN=(2, 18, 4)), "c has shape"),
    (dict(initial_state_BNI=(2, 3, 4)), "initial_state has shape"),
  ],
)
def test_wrong_shapes(change, message):
  arrays, _ = _inputs()
  arrays |= {name: jnp.zeros(shape) for name, shape in change.items()}
  with pytest.raises(errors.InputError, match=message):
    api.selective_scan(**arrays)


def test_wrong_shapes_of_one_token():
  arrays, _ = _inputs(length=1)
  with pytest.raises(errors.InputError, match="b has shape"):
    api.selective_scan(**(arrays | {"b_BLN": jnp.zeros((ROWS, 1, 3))}))


def test_wrong_chunk():
  with pytest.raises(errors.InputError, match="chunk must be at least 1 token, not 0"):
    api.selective_scan(**_inputs()[0], chunk=0)
