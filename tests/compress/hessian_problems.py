"""Matrices with Hessians of their inputs, as calibration gives them."""

import jax.numpy as jnp
import numpy as np

from effjax.compress import calibrate


def stats_of(hessian, count=100.0):
  """Statistics with a Hessian, of `count` tokens."""
  diagonal = jnp.diagonal(hessian, axis1=-2, axis2=-1)
  counts = jnp.full(hessian.shape[:-2], count)
  return calibrate.InputStats(diagonal, jnp.sqrt(diagonal), counts, hessian)


def problem(seed=0, in_dim=64, out_dim=32, stack=()):
  """A matrix and the Hessians of correlated inputs, float64."""
  rng = np.random.default_rng(seed)
  mix = rng.standard_normal((*stack, in_dim // 4, in_dim))
  x = rng.standard_normal((*stack, 512, in_dim // 4)) @ mix
  x += 0.5 * rng.standard_normal(x.shape)
  w = rng.standard_normal((*stack, in_dim, out_dim))
  return w, np.swapaxes(x, -1, -2) @ x
