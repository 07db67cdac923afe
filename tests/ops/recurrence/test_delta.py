"""The delta rules by chunks against their recurrence, outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.recurrence import api, delta, halving, reference_delta

LENGTH, HEADS, KEY, VALUE = 21, 4, 5, 3
SEGMENTS = np.zeros((2, LENGTH), np.int32)
SEGMENTS[0] = [3] * 5 + [1] * 4 + [0] * 2 + [3] * 7 + [2] * 1 + [0] * 2
SEGMENTS[1] = [0] * 2 + [1] * 6 + [0] * 3 + [1] * 8 + [0] * 2  # one document

jit_delta = jax.jit(delta.delta_rule, static_argnames="chunk")


def _inputs(gated=False, keys=HEADS, state=False, length=LENGTH, beta=1.0, seed=0):
  """Random arguments to differentiate; corrections of up to `beta`."""
  rng = np.random.default_rng(seed)
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  arrays = dict(
    q_BLGK=delta.unit(normal(2, length, keys, KEY)),
    k_BLGK=delta.unit(normal(2, length, keys, KEY)),
    v_BLHV=normal(2, length, HEADS, VALUE),
    beta_BLH=beta * jax.nn.sigmoid(normal(2, length, HEADS)),
  )
  if gated:
    arrays["g_BLH"] = -jax.nn.softplus(normal(2, length, HEADS))
  if state:
    arrays["initial_state_BHKV"] = normal(2, HEADS, KEY, VALUE)
  return arrays


def _close(got, wanted, tolerance=1e-4):
  def leaf(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())

  jax.tree.map(leaf, got, wanted)


def _results(fn, arrays, **fixed):
  """Outputs at real tokens, final state, and gradients of a random function of both."""
  rng = np.random.default_rng(1)
  naive = functools.partial(reference_delta.delta_rule, **fixed)
  shapes = jax.eval_shape(naive, **arrays)
  weights = [jnp.asarray(rng.standard_normal(s.shape), jnp.float32) for s in shapes]

  @jax.jit
  def run(arrays):
    def loss(arrays):
      o_BLHV, state = fn(**arrays, **fixed)
      if "segments_BL" in fixed:
        o_BLHV = jnp.where(fixed["segments_BL"][:, :, None, None] != 0, o_BLHV, 0)
      return jnp.sum(o_BLHV * weights[0]) + jnp.sum(state * weights[1]), (o_BLHV, state)

    return jax.grad(loss, has_aux=True)(arrays)

  return run(arrays)


CASES = {
  "plain": (dict(), dict(), (1,)),
  "negative_eigenvalues": (dict(beta=2.0), dict(), (8,)),
  "segments_state": (dict(state=True), dict(segments_BL=jnp.asarray(SEGMENTS)), (16,)),
  "gated_grouped": (dict(gated=True, keys=2), dict(), (64,)),
  "gated_segments_state": (
    dict(gated=True, keys=2, state=True),
    dict(segments_BL=jnp.asarray(SEGMENTS)),
    (3, 16),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_recurrence_for_any_chunk(case):
  inputs, fixed, chunks = CASES[case]
  arrays = _inputs(**inputs)
  wanted = _results(reference_delta.delta_rule, arrays, **fixed)
  for chunk in chunks:
    fast = functools.partial(delta.delta_rule, chunk=chunk)
    _close(_results(fast, arrays, **fixed), wanted)


@pytest.mark.parametrize("gated", [False, True])
def test_both_are_the_equation(gated):
  """A float64 loop in NumPy, which shares no code with either form."""
  arrays = _inputs(gated=gated, state=True)
  wide = {name: np.asarray(z, np.float64) for name, z in arrays.items()}
  q, k, v, beta = (wide[n] for n in ("q_BLGK", "k_BLGK", "v_BLHV", "beta_BLH"))
  g, s = wide.get("g_BLH", np.zeros_like(beta)), wide["initial_state_BHKV"]
  outputs = []
  for t in range(LENGTH):
    keys, unit = k[:, t], np.eye(KEY)
    turn = unit - beta[:, t, :, None, None] * keys[..., :, None] * keys[..., None, :]
    write = beta[:, t, :, None, None] * keys[..., :, None] * v[:, t, :, None, :]
    s = turn @ (np.exp(g[:, t])[..., None, None] * s) + write
    outputs.append((q[:, t, :, None, :] @ s)[:, :, 0] / np.sqrt(KEY))
  wanted = np.stack(outputs, 1), s
  _close(jax.jit(reference_delta.delta_rule)(**arrays), wanted, 1e-5)
  _close(jit_delta(**arrays, chunk=8), wanted)


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_equal_keys(beta):
  """One key again and again, always corrected in full, or overshot.

  The powers of the matrix to invert then reach 1e17 in a chunk of 64, its inverse 2.
  """
  arrays = _inputs(length=70)
  arrays["k_BLGK"] = jnp.broadcast_to(arrays["k_BLGK"][:, :1], (2, 70, HEADS, KEY))
  arrays["beta_BLH"] = jnp.full((2, 70, HEADS), beta)
  wanted = _results(reference_delta.delta_rule, arrays)
  fast = functools.partial(delta.delta_rule, chunk=64)
  _close(_results(fast, arrays), wanted)


def test_inverse():
  rng = np.random.default_rng(2)
  lower = rng.standard_normal((3, 32, 32)) / 4
  wanted = np.linalg.inv(np.eye(32) + np.tril(lower, -1))
  got = jax.jit(halving.unit_inverse)(jnp.asarray(lower, jnp.float32))
  _close(got, wanted, 1e-5)


def test_decays_are_products_over_the_tokens_between():
  """Against a product over s < t <= l in float64, token by token."""
  rng = np.random.default_rng(3)
  log = np.float32(np.log(rng.random((3, 8)) ** 4))
  factor = np.exp(np.float64(log))
  results = jax.jit(halving.decay_matrix)(jnp.asarray(log))
  within, start, end, across = (np.asarray(z) for z in results)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  for l in range(8):
    for s in range(8):
      wanted = factor[:, s + 1 : l + 1].prod(axis=1) if s <= l else np.zeros(3)
      close(within[:, l, s], wanted)
    close(start[:, l], factor[:, : l + 1].prod(axis=1))
    close(end[:, l], factor[:, l + 1 :].prod(axis=1))
  close(across, factor.prod(axis=1))


@pytest.mark.parametrize("mixed", [False, True])
def test_strong_decay(mixed):
  """Log decays down to -50 a token, alone or among tokens that hardly decay."""
  rng = np.random.default_rng(3)
  arrays = _inputs(gated=True, length=70)
  shape = arrays["g_BLH"].shape
  strong = rng.random(shape) < 0.3 if mixed else np.ones(shape, bool)
  g = np.where(strong, -50 * rng.random(shape), -1e-2 * rng.random(shape))
  arrays["g_BLH"] = jnp.asarray(g, jnp.float32)
  wanted = _results(reference_delta.delta_rule, arrays)
  fast = functools.partial(delta.delta_rule, chunk=64)
  _close(_results(fast, arrays), wanted, 1e-5)


def test_second_derivative():
  """Optimizers that use curvature differentiate the written gradient."""
  arrays = _inputs(gated=True, length=4)

  def product(fn):
    loss = lambda arrays: jnp.sum(jnp.tanh(fn(**arrays)[0]) ** 2)
    direction = jax.tree.map(jnp.ones_like, arrays)
    return jax.jit(lambda z: jax.jvp(jax.grad(loss), (z,), (direction,)))(arrays)

  fast = functools.partial(delta.delta_rule, chunk=2)
  _close(product(fast), product(reference_delta.delta_rule))


def test_prefill_then_steps_equal_parallel():
  arrays = _inputs(gated=True, keys=2, state=True)
  wanted = jit_delta(**arrays, chunk=8)
  state = arrays.pop("initial_state_BHKV")
  run = jax.jit(functools.partial(api.delta_rule, chunk=8))
  prefix = {name: z[:, :18] for name, z in arrays.items()}
  head, state = run(**prefix, initial_state_BHKV=state)
  outputs = [head]
  for t in range(18, LENGTH):
    token = {name: z[:, t : t + 1] for name, z in arrays.items()}
    o_BLHV, state = run(**token, initial_state_BHKV=state)
    outputs.append(o_BLHV)
  _close((jnp.concatenate(outputs, axis=1), state), wanted, 1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_padding_changes_nothing(gated):
  """A right-padded row ends in the state of the row without padding."""
  arrays = _inputs(gated=gated, state=True)
  segments = jnp.asarray(np.arange(LENGTH) < np.array([[11], [LENGTH]]), jnp.int32)
  o_BLHV, state = jit_delta(**arrays, segments_BL=segments, chunk=8)
  assert np.isfinite(np.asarray(o_BLHV)).all()
  alone = {name: z[:1, :11] for name, z in arrays.items()}
  alone["initial_state_BHKV"] = arrays["initial_state_BHKV"][:1]
  o_alone, state_alone = jit_delta(**alone, chunk=8)
  _close((o_BLHV[:1, :11], state[:1]), (o_alone, state_alone), 1e-5)
  token = {name: z[:, :1] for name, z in arrays.items()}
  token["initial_state_BHKV"] = arrays["initial_state_BHKV"]
  _, state = jit_delta(**token, segments_BL=jnp.asarray([[1], [0]]))
  np.testing.assert_array_equal(state[1], token["initial_state_BHKV"][1])


def test_documents_are_isolated():
  """No gradient flows between documents, nor from the state into later ones."""
  arrays = _inputs(gated=True, state=True)

  def row0_tail(arrays):
    o_BLHV, _ = delta.delta_rule(**arrays, segments_BL=jnp.asarray(SEGMENTS), chunk=4)
    return jnp.sum(o_BLHV[0, 11:18] ** 2)

  grads = jax.jit(jax.grad(row0_tail))(arrays)
  for name in ("k_BLGK", "v_BLHV"):
    touched = np.abs(np.asarray(grads[name][0])).sum((1, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(touched), np.arange(11, 18))
  assert not np.asarray(grads["initial_state_BHKV"]).any()


def test_bfloat16():
  """Products in bfloat16, inverse and state in float32; near float32 all the same."""
  arrays = _inputs(gated=True, keys=2, state=True)
  low = {
    name: z.astype(jnp.bfloat16) if name[:2] in ("q_", "k_", "v_") else z
    for name, z in arrays.items()
  }
  fixed = dict(segments_BL=jnp.asarray(SEGMENTS))
  wanted = _results(reference_delta.delta_rule, arrays, **fixed)
  fast = functools.partial(delta.delta_rule, chunk=8)
  grads, (o_BLHV, state) = _results(fast, low, **fixed)
  assert o_BLHV.dtype == jnp.bfloat16 and state.dtype == jnp.float32
  assert grads["k_BLGK"].dtype == jnp.bfloat16
  _close((grads, (o_BLHV, state)), wanted, 5e-2)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(chunk=0), "chunk must be at least 1 token, not 0"),
    (dict(beta_BLH=jnp.zeros((2, LENGTH, 2))), "beta has shape"),
    (dict(v_BLHV=jnp.zeros((2, LENGTH, 3, 3))), "4 key heads must divide its 3"),
    (dict(initial_state_BHKV=jnp.zeros((2, 4, 3, 5))), "initial_state has shape"),
  ],
)
def test_errors_name_the_argument(change, message):
  with pytest.raises(errors.InputError, match=message):
    delta.delta_rule(**(_inputs() | change))
