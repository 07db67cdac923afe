"""Gated linear attention by chunks against its recurrence, outputs and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.recurrence import api, gla, reference_gla

LENGTH, HEADS, KEY, VALUE = 21, 2, 5, 3
SEGMENTS = np.zeros((2, LENGTH), np.int32)
SEGMENTS[0] = [3] * 5 + [1] * 4 + [0] * 2 + [3] * 7 + [2] * 1 + [0] * 2
SEGMENTS[1] = [0] * 2 + [1] * 6 + [0] * 3 + [1] * 8 + [0] * 2  # one document

jit_gla = jax.jit(gla.gla, static_argnames="chunk")


def _inputs(state=False, length=LENGTH, strength=1.0, seed=0):
  """Random arguments to differentiate; log decays are -0.8 `strength` on average."""
  rng = np.random.default_rng(seed)
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  arrays = dict(
    q_BLHK=normal(2, length, HEADS, KEY),
    k_BLHK=normal(2, length, HEADS, KEY),
    v_BLHV=normal(2, length, HEADS, VALUE),
    g_BLHK=strength * jax.nn.log_sigmoid(normal(2, length, HEADS, KEY)),
  )
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
  shapes = jax.eval_shape(functools.partial(reference_gla.gla, **fixed), **arrays)
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
  "plain": (dict(), dict(), (1, 8)),
  "segments_state": (
    dict(state=True),
    dict(segments_BL=jnp.asarray(SEGMENTS)),
    (3, 64),
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_recurrence_for_any_chunk(case):
  inputs, fixed, chunks = CASES[case]
  arrays = _inputs(**inputs)
  wanted = _results(reference_gla.gla, arrays, **fixed)
  for chunk in chunks:
    _close(_results(functools.partial(gla.gla, chunk=chunk), arrays, **fixed), wanted)


def test_both_are_the_equation():
  """A float64 loop in NumPy, which shares no code with either form."""
  arrays = _inputs(state=True)
  q, k, v, g, s = (np.asarray(z, np.float64) for z in arrays.values())
  outputs = []
  for t in range(LENGTH):
    s = np.exp(g[:, t])[..., None] * s + np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
    outputs.append(np.einsum("bhkv,bhk->bhv", s, q[:, t]) / np.sqrt(KEY))
  wanted = np.stack(outputs, 1), s
  _close(jax.jit(reference_gla.gla)(**arrays), wanted, 1e-5)
  _close(jit_gla(**arrays, chunk=8), wanted)


@pytest.mark.parametrize("mixed", [False, True])
def test_strong_decay(mixed):
  """Log decays down to -20 a token, alone or among tokens that hardly decay.

  Mixed, running sums reach hundreds where differences of a hundredth matter.
  """
  rng = np.random.default_rng(2)
  arrays = _inputs(length=70)
  shape = arrays["g_BLHK"].shape
  strong = rng.random(shape) < 0.5 if mixed else np.ones(shape, bool)
  g = np.where(strong, -20 * rng.random(shape), -1e-2 * rng.random(shape))
  arrays["g_BLHK"] = jnp.asarray(g, jnp.float32)
  wanted = _results(reference_gla.gla, arrays)
  _close(_results(functools.partial(gla.gla, chunk=32), arrays), wanted, 1e-5)


def test_a_memory_that_forgets_everything_is_finite():
  arrays = _inputs(length=70, strength=1e30)
  wanted = _results(reference_gla.gla, arrays)
  _close(_results(functools.partial(gla.gla, chunk=32), arrays), wanted)


def test_second_derivative():
  """Optimizers that use curvature differentiate the written gradient."""
  arrays = _inputs(length=4)

  def product(fn):
    loss = lambda arrays: jnp.sum(jnp.tanh(fn(**arrays)[0]) ** 2)
    direction = jax.tree.map(jnp.ones_like, arrays)
    return jax.jit(lambda z: jax.jvp(jax.grad(loss), (z,), (direction,)))(arrays)

  _close(product(functools.partial(gla.gla, chunk=2)), product(reference_gla.gla))


def test_prefill_then_steps_equal_parallel():
  arrays = _inputs(state=True)
  wanted = jit_gla(**arrays, chunk=8)
  state = arrays.pop("initial_state_BHKV")
  run = jax.jit(functools.partial(api.gla, chunk=8))
  prefix = {name: z[:, :18] for name, z in arrays.items()}
  head, state = run(**prefix, initial_state_BHKV=state)
  outputs = [head]
  for t in range(18, LENGTH):
    token = {name: z[:, t : t + 1] for name, z in arrays.items()}
    o_BLHV, state = run(**token, initial_state_BHKV=state)
    outputs.append(o_BLHV)
  _close((jnp.concatenate(outputs, axis=1), state), wanted, 1e-5)


def test_padding_changes_nothing():
  """A right-padded row ends in the state of the row without padding."""
  arrays = _inputs(state=True)
  segments = jnp.asarray(np.arange(LENGTH) < np.array([[11], [LENGTH]]), jnp.int32)
  o_BLHV, state = jit_gla(**arrays, segments_BL=segments, chunk=8)
  assert np.isfinite(np.asarray(o_BLHV)).all()
  alone = {name: z[:1, :11] for name, z in arrays.items()}
  alone["initial_state_BHKV"] = arrays["initial_state_BHKV"][:1]
  o_alone, state_alone = jit_gla(**alone, chunk=8)
  _close((o_BLHV[:1, :11], state[:1]), (o_alone, state_alone), 1e-5)
  token = {name: z[:, :1] for name, z in arrays.items()}
  token["initial_state_BHKV"] = arrays["initial_state_BHKV"]
  _, state = jit_gla(**token, segments_BL=jnp.asarray([[1], [0]]))
  np.testing.assert_array_equal(state[1], token["initial_state_BHKV"][1])


def test_documents_are_isolated():
  """No gradient flows between documents, nor from the state into later ones."""
  arrays = _inputs(state=True)

  def row0_tail(arrays):
    o_BLHV, _ = gla.gla(**arrays, segments_BL=jnp.asarray(SEGMENTS), chunk=4)
    return jnp.sum(o_BLHV[0, 11:18] ** 2)

  grads = jax.jit(jax.grad(row0_tail))(arrays)
  for name in ("k_BLHK", "v_BLHV"):
    touched = np.abs(np.asarray(grads[name][0])).sum((1, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(touched), np.arange(11, 18))
  assert not np.asarray(grads["initial_state_BHKV"]).any()


def test_bfloat16():
  """Products in bfloat16, decays and state in float32; gradients near those in fp32."""
  arrays = _inputs(state=True)
  low = {
    name: z.astype(jnp.bfloat16) if name[0] in "qkv" else z
    for name, z in arrays.items()
  }
  fixed = dict(segments_BL=jnp.asarray(SEGMENTS))
  wanted = _results(reference_gla.gla, arrays, **fixed)
  grads, (o_BLHV, state) = _results(functools.partial(gla.gla, chunk=8), low, **fixed)
  assert o_BLHV.dtype == jnp.bfloat16 and state.dtype == jnp.float32
  assert grads["k_BLHK"].dtype == jnp.bfloat16
  _close((grads, (o_BLHV, state)), wanted, 3e-2)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(chunk=0), "chunk must be at least 1 token, not 0"),
    (dict(k_BLHK=jnp.zeros((2, 3, 2, 5))), "k has shape"),
    (dict(initial_state_BHKV=jnp.zeros((2, 2, 3, 5))), "initial_state has shape"),
  ],
)
def test_errors_name_the_argument(change, message):
  with pytest.raises(errors.InputError, match=message):
    gla.gla(**(_inputs() | change))
