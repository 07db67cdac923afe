"""How large activations are: a histogram, and where to cut them.

Bins follow the floats themselves: an octave [2^e, 2^(e+1)) has 64 bins of equal width,
so an edge is within 1/64 of any value in its bin, and bins are exact, being the leading
bits of a float. The 40 octaves from 2^-24 to 2^16 are covered; what is
below, zeros too, falls into the first bin, what is above into the last.

Letters: T tokens, I inputs, K bins, S tensors of a stack.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import errors
from effjax.ops.matmul import activations, fp8

PER_OCTAVE = 64
LOWEST, HIGHEST = -24, 16  # exponents of the first edge and of the last one
BINS = (HIGHEST - LOWEST) * PER_OCTAVE
METHODS = ("absmax", "percentile", "mse")

_SHIFT = 23 - 6  # mantissa bits that do not count
_FIRST = (127 + LOWEST) * PER_OCTAVE
# A sum of ones in float32 stops at 2^24: rows are counted in as many parts.
_PARTS = 64
# Thresholds that are tried, as shares of the largest magnitude: over 16 octaves.
_STEPS = 32
_SHARES = 2.0 ** -(np.arange(16 * _STEPS) / _STEPS)


def bins_of(x: jax.Array) -> jax.Array:
  """The bin of |x|, int32; of a NaN the last one."""
  bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
  return jnp.clip((bits >> _SHIFT) - _FIRST, 0, BINS - 1)


def counts(x_TI: jax.Array, weights_T: jax.Array) -> jax.Array:
  """How many values lie in each bin, float32 `[K]`, each as much as its row weighs.

  Args:
    x_TI: floating.
    weights_T: of the rows, 0 for padding.
  """
  part_T = jnp.arange(x_TI.shape[0]) % _PARTS
  weights_TI = jnp.broadcast_to(weights_T[:, None], x_TI.shape).astype(jnp.float32)
  sums = jnp.zeros((_PARTS, BINS)).at[part_T[:, None], bins_of(x_TI)].add(weights_TI)
  return jnp.sum(sums, axis=0)


def edges() -> np.ndarray:
  """Where bins begin, the first at 0, and the last one ends: float32 `[K + 1]`."""
  found = ((np.arange(BINS + 1) + _FIRST) << _SHIFT).astype(np.int32).view(np.float32)
  found[0] = 0
  return found


def threshold(
  counts: jax.Array | None,
  absmax: jax.Array,
  *,
  method: str,
  kind: str,
  percentile: float = 99.99,
) -> jax.Array:
  """The magnitude at which activations are cut.

  Args:
    counts: `[*stack, K]`; for "absmax" it may be None.
    absmax: the largest magnitude, float32 `[*stack]`.
    method: "absmax"; "percentile", see `quantile`; or "mse", see `least_error`.
    kind: of the activations, of ops.matmul.activations.
    percentile: from 0 to 100.

  Returns:
    float32 `[*stack]`, not above absmax.

  Raises:
    InputError: there is no such method.
  """
  if method not in METHODS:
    raise errors.unknown("activation_scale", method, METHODS)
  if method == "absmax":
    return absmax.astype(jnp.float32)
  if method == "percentile":
    return quantile(counts, absmax, percentile)
  return least_error(counts, absmax, kind)


def quantile(counts: jax.Array, absmax: jax.Array, percentile: float) -> jax.Array:
  """The smallest edge with that share of values below it, or absmax where it is less.

  Args:
    counts: `[*stack, K]`.
    absmax: `[*stack]`.
    percentile: from 0 to 100, of the magnitudes.
  """
  # Summed from the top, the few that are cut are exact beside the many that are not.
  above = jnp.flip(jnp.cumsum(jnp.flip(counts, -1), axis=-1), -1)
  allowed = (1 - percentile / 100) * above[..., :1] * (1 + 1e-6)
  beyond = jnp.concatenate([above[..., 1:], jnp.zeros_like(above[..., :1])], axis=-1)
  first = jnp.argmax(beyond <= allowed, axis=-1)
  # The last bin has no end.
  ends = jnp.asarray(np.append(edges()[1:-1], np.inf).astype(np.float32))
  return jnp.minimum(ends[first], absmax)


def least_error(counts: jax.Array, absmax: jax.Array, kind: str) -> jax.Array:
  """The threshold with the least expected squared error of rounding and cutting.

  Of 512 thresholds, 32 an octave from absmax down. Evenly spaced codes: the integral of
  the squared error over each bin, as if its values were evenly spread there. Floats:
  the error of the middle of each bin, which is narrow beside their steps.

  Args:
    counts: `[*stack, K]`.
    absmax: `[*stack]`.
    kind: of the activations.
  """
  stack = absmax.shape
  counts_SK, absmax_S1 = counts.reshape(-1, BINS), absmax.reshape(-1, 1)
  bins_1K = jnp.asarray(edges())[None]
  middles_1K = (bins_1K[:, 1:] + bins_1K[:, :-1]) / 2
  top = activations.LARGEST[kind]

  def error(share: jax.Array) -> jax.Array:
    """Of each tensor, in squares of its absmax, so that nothing is too small."""
    cut_S1 = absmax_S1 * share
    step_S1 = jnp.where(cut_S1 > 0, cut_S1, 1) / top
    if kind == "fp8":
      places_SK = middles_1K / step_S1
      each_SK = jnp.square(fp8.encode(places_SK).astype(jnp.float32) - places_SK)
    else:
      places_SK = bins_1K / step_S1
      integral_SK = _integral(places_SK, top)
      each_SK = jnp.diff(integral_SK, axis=-1) / jnp.diff(places_SK, axis=-1)
    # The error of a bin far above may be infinite.
    sums_S = jnp.sum(jnp.where(counts_SK > 0, counts_SK * each_SK, 0), axis=-1)
    return sums_S * (share / top) ** 2

  shares = jnp.asarray(_SHARES, jnp.float32)
  best_S = jnp.argmin(jax.lax.map(error, shares), axis=0)
  return absmax * shares[best_S].reshape(stack)


def _integral(u: Any, top: float) -> jax.Array:
  """The squared error of rounding to 0, 1, ..., top, integrated from 0 to u >= 0."""
  inside = jnp.minimum(u, top)
  whole = jnp.round(inside)
  return whole / 12 + (inside - whole) ** 3 / 3 + (u - inside) ** 3 / 3
