"""Learned steps against the papers' formulas in NumPy, and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.matmul import learned_step

# Symmetric codes as LSQ has them, and LSQ+'s with an offset.
CASES = {"lsq": (-4, 3, False), "lsq_plus": (0, 7, True)}


def _inputs(rng, offset):
  x = rng.normal(size=(3, 5, 2)).astype(np.float32)
  step = rng.uniform(0.2, 0.4, (3, 1, 2)).astype(np.float32)
  beta = rng.normal(-0.8, 0.1, (3, 1, 2)).astype(np.float32) if offset else None
  return x, step, beta, rng.normal(size=x.shape).astype(np.float32)


def _on_device(*parts):
  return tuple(None if part is None else jnp.asarray(part) for part in parts)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_the_papers(rng, case):
  low, high, with_offset = CASES[case]
  x, step, beta, dy = _inputs(rng, with_offset)
  fn = lambda *args: learned_step.fake_quantize(*args, low, high)
  value, vjp = jax.vjp(fn, *_on_device(x, step, beta))
  dx, dstep, dbeta = vjp(jnp.asarray(dy))

  shift = 0 if beta is None else beta
  at = (x.astype(np.float64) - shift) / step
  inside = (low < at) & (at < high)
  codes = np.rint(np.clip(at, low, high))
  assert 0.2 < inside.mean() < 0.99
  np.testing.assert_allclose(value, codes * step + shift, rtol=1e-6, atol=1e-7)
  np.testing.assert_array_equal(dx, np.where(inside, dy, 0))
  # Eq. 3 with N = 5 weights a step, times 1 / sqrt(N Qp).
  of_step = np.where(inside, codes - at, np.where(at <= low, low, high))
  factor = 1 / np.sqrt(5 * high)
  expected = factor * (dy * of_step).sum(1, keepdims=True)
  np.testing.assert_allclose(dstep, expected, rtol=1e-4, atol=1e-5)
  if beta is not None:
    outside = factor * (dy * ~inside).sum(1, keepdims=True)
    np.testing.assert_allclose(dbeta, outside, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_slopes_where_the_rounding_is_held(rng, case):
  low, high, with_offset = CASES[case]
  x, step, beta, dy = _inputs(rng, with_offset)
  shift = 0.0 if beta is None else beta.astype(np.float64)
  step64 = step.astype(np.float64)
  rest = np.clip((x - shift) / step64, low, high)
  rest = np.rint(rest) - rest

  def smooth(step, shift):
    return np.sum(dy * (step * (np.clip((x - shift) / step, low, high) + rest) + shift))

  fn = lambda *args: jnp.sum(learned_step.fake_quantize(*args, low, high) * dy)
  arguments = _on_device(x, step, beta)
  found = jax.grad(fn, (1, 2) if with_offset else (1,))(*arguments)
  factor, eps = np.sqrt(5 * high), 1e-6
  for i, gradient in enumerate(found):
    for at in np.ndindex(step.shape):
      nudge = np.zeros(step.shape)
      nudge[at] = eps
      moved = [(step64 + s * nudge, shift) for s in (1, -1)]
      if i == 1:
        moved = [(step64, shift + s * nudge) for s in (1, -1)]
      slope = (smooth(*moved[0]) - smooth(*moved[1])) / (2 * eps)
      assert float(gradient[at]) * factor == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_a_step_that_is_shared_and_one_of_zero(rng):
  x = jnp.asarray(_inputs(rng, False)[0])
  fn = lambda step: jnp.sum(learned_step.fake_quantize(x, step, None, -4, 3))
  shared = jnp.full((3, 1, 1), 0.3)
  apart = jax.grad(fn)(jnp.broadcast_to(shared, (3, 1, 2)))
  # Twice the weights for a step: its factor is smaller by the root of two.
  np.testing.assert_allclose(
    jax.grad(fn)(shared), apart.sum(-1, keepdims=True) / np.sqrt(2), rtol=1e-5
  )
  zero = jnp.zeros((3, 1, 1))
  assert float(fn(zero)) == 0 and bool(jnp.all(jnp.isfinite(jax.grad(fn)(zero))))
