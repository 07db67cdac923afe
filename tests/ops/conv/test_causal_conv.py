"""The fast causal convolution against the naive one: outputs, gradients, state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.conv import api, parallel, reference

SEGMENTS = np.zeros((3, 13), np.int32)
SEGMENTS[0] = [2] * 5 + [1] * 1 + [2] * 2 + [5] * 5
SEGMENTS[1] = [1] * 6 + [0] * 3 + [2] * 2 + [0] * 2
SEGMENTS[2, 0] = 1  # one token, then padding

CASES = {
  "plain": dict(),
  "no_bias": dict(bias=False),
  "state": dict(state=True),
  "segments": dict(segments=True),
  "segments_state": dict(segments=True, state=True),
  "one_tap": dict(taps=1, segments=True, state=True),
  "shorter_than_the_taps": dict(length=2),
  "shorter_than_the_taps_state": dict(length=2, state=True, segments=True),
}

jit_conv = jax.jit(parallel.causal_conv)


def _inputs(bias=True, state=False, segments=False, taps=4, length=13):
  rng = np.random.default_rng(0)
  normal = lambda *dims: jnp.asarray(rng.standard_normal(dims), jnp.float32)
  arrays = dict(x_BLD=normal(3, length, 5), w_KD=normal(taps, 5))
  if bias:
    arrays["bias_D"] = normal(5)
  if state:
    arrays["state_BKD"] = normal(3, taps - 1, 5)
  fixed = dict(segments_BL=jnp.asarray(SEGMENTS[:, :length])) if segments else {}
  return arrays, fixed


def _close(got, wanted, tolerance=1e-5):
  def leaf(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    if a.size:
      assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())

  jax.tree.map(leaf, got, wanted)


def _results(fn, arrays, fixed):
  """Outputs at real tokens, new state, and gradients of a random function of both."""
  shapes = jax.eval_shape(functools.partial(reference.causal_conv, **fixed), **arrays)
  rng = np.random.default_rng(1)
  weights = [jnp.asarray(rng.standard_normal(s.shape), jnp.float32) for s in shapes]

  def loss(arrays):
    y_BLD, state_BKD = fn(**arrays, **fixed)
    if fixed:
      y_BLD = jnp.where(fixed["segments_BL"][..., None] != 0, y_BLD, 0)
    total = jnp.sum(y_BLD * weights[0]) + jnp.sum(state_BKD * weights[1])
    return total, (y_BLD, state_BKD)

  return jax.jit(jax.grad(loss, has_aux=True))(arrays)


@pytest.mark.parametrize("case", CASES)
def test_equals_definition(case):
  arrays, fixed = _inputs(**CASES[case])
  wanted = _results(reference.causal_conv, arrays, fixed)
  _close(_results(parallel.causal_conv, arrays, fixed), wanted)


def test_equals_numpy():
  arrays, _ = _inputs()
  x, w, bias = (np.asarray(z, np.float64) for z in arrays.values())
  wanted = np.stack(
    [
      [np.convolve(x[i, :, d], w[::-1, d])[:13] + bias[d] for d in range(5)]
      for i in range(3)
    ]
  ).swapaxes(1, 2)
  y_BLD, state_BKD = jit_conv(**arrays)
  _close((y_BLD, state_BKD), (wanted, x[:, -3:]))


def test_gradient_equals_finite_differences():
  arrays, fixed = _inputs(state=True, segments=True, length=5)

  @jax.jit
  def loss(*values):
    y, state = parallel.causal_conv(**dict(zip(arrays, values, strict=True)), **fixed)
    return jnp.sum(jnp.tanh(y)) + jnp.sum(state**2)

  chex.assert_numerical_grads(
    loss, tuple(arrays.values()), order=1, atol=2e-2, modes=("rev",)
  )


def test_state_of_padded_rows():
  """The last valid inputs of each row's last segment, whatever the padding holds."""
  arrays, fixed = _inputs(state=True, segments=True)
  x, before = np.asarray(arrays["x_BLD"]), np.asarray(arrays["state_BKD"])
  _, state = jit_conv(**arrays, **fixed)
  np.testing.assert_array_equal(state[0], x[0, 10:13])
  np.testing.assert_array_equal(state[1], [np.zeros(5), *x[1, 9:11]])
  np.testing.assert_array_equal(state[2], [*before[2, 1:], x[2, 0]])
  nothing = dict(segments_BL=jnp.zeros((3, 13), jnp.int32))
  np.testing.assert_array_equal(jit_conv(**arrays, **nothing)[1], before)


@pytest.mark.parametrize("split", [1, 2, 7])
def test_prefill_then_steps_equal_parallel(split):
  arrays, _ = _inputs(state=True)
  wanted = jit_conv(**arrays)
  x_BLD, state = arrays.pop("x_BLD"), arrays.pop("state_BKD")
  run = jax.jit(functools.partial(api.causal_conv, **arrays))
  head, state = run(x_BLD[:, :split], state_BKD=state)
  outputs = [head]
  for t in range(split, 13):
    y_BLD, state = run(x_BLD[:, t : t + 1], state_BKD=state)
    outputs.append(y_BLD)
  _close((jnp.concatenate(outputs, axis=1), state), wanted)


def test_step_leaves_padded_rows_alone():
  arrays, _ = _inputs(state=True, length=1)
  segments = jnp.asarray([[1], [0], [4]], jnp.int32)
  y_BLD, state = api.causal_conv(**arrays, segments_BL=segments)
  wanted = jit_conv(**arrays, segments_BL=segments)
  _close((y_BLD[::2], state), (wanted[0][::2], wanted[1]))
  np.testing.assert_array_equal(state[1], arrays["state_BKD"][1])


def test_jit_and_vmap():
  arrays, fixed = _inputs(segments=True, state=True)
  plain = parallel.causal_conv(**arrays, **fixed)
  _close(jit_conv(**arrays, **fixed), plain)
  stacked = jax.tree.map(lambda z: jnp.stack([z, 0.5 * z]), arrays)
  loss = lambda z: jnp.sum(jnp.tanh(parallel.causal_conv(**z, **fixed)[0]))
  batched = jax.jit(jax.vmap(jax.grad(loss)))(stacked)
  alone = jax.jit(jax.grad(loss))(arrays)
  _close(jax.tree.map(lambda z: z[0], batched), alone)


def test_bfloat16():
  arrays, fixed = _inputs(segments=True, state=True)
  wanted = _results(reference.causal_conv, arrays, fixed)
  low = jax.tree.map(lambda z: z.astype(jnp.bfloat16), arrays)
  y_BLD, state_BKD = jax.eval_shape(parallel.causal_conv, **low, **fixed)
  assert y_BLD.dtype == state_BKD.dtype == jnp.bfloat16
  got = _results(parallel.causal_conv, low, fixed)
  _close(jax.tree.map(lambda z: z.astype(jnp.float32), got), wanted, 3e-2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(w_KD=(4, 6)), "w has shape"),
    (dict(bias_D=(4,)), "bias has shape"),
    (dict(state_BKD=(3, 4, 5)), "state has shape"),
  ],
)
def test_wrong_shapes(change, message):
  arrays, _ = _inputs()
  arrays |= {name: jnp.zeros(shape) for name, shape in change.items()}
  with pytest.raises(errors.InputError, match=message):
    api.causal_conv(**arrays)


@pytest.mark.oracle
def test_equals_torch():
  torch = pytest.importorskip("torch")
  arrays, _ = _inputs()
  x, w, bias = (
    torch.tensor(np.asarray(z), requires_grad=True) for z in arrays.values()
  )
  y = torch.nn.functional.conv1d(
    x.transpose(1, 2), w.T[:, None], bias, padding=3, groups=5
  )[..., :13].transpose(1, 2)
  torch.tanh(y).sum().backward()
  loss = lambda z: jnp.sum(jnp.tanh(parallel.causal_conv(**z)[0]))
  wanted = dict(zip(arrays, (t.grad.numpy() for t in (x, w, bias)), strict=True))
  _close(jit_conv(**arrays)[0], y.detach().numpy())
  _close(jax.jit(jax.grad(loss))(arrays), wanted)
