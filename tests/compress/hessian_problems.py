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


class Grid:
  """A uniform grid for each of O rows of weights `[O, g]`."""

  def __init__(self, w, bits, symmetric):
    if symmetric:
      top = 2 ** (bits - 1) - 1
      self.low, self.high, span = -top, top, np.abs(w).max(axis=1) / top
    else:
      self.low, self.high = 0, 2**bits - 1
      least, most = np.minimum(w.min(axis=1), 0), np.maximum(w.max(axis=1), 0)
      span = (most - least) / self.high
    # Of a group with nothing but zeros any scale will do.
    self.scale = np.where(span == 0, 1, span).astype(np.float32)
    wide = self.scale.astype(np.float64)
    self.zero = 0 if symmetric else np.rint(-least / wide)

  def codes(self, column):
    places = column / self.scale.astype(np.float64) + self.zero
    return np.clip(np.rint(places), self.low, self.high)

  def values(self, codes):
    return ((codes - self.zero).astype(np.float32) * self.scale).astype(np.float64)
