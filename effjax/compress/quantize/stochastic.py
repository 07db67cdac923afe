"""Stochastic rounding: up or down by chance, so that the mean is the weight itself.

Source: Gupta et al. 2015, arXiv:1502.02551, section 3.2: a value between two of the
grid goes to the upper one with the probability of its distance from the lower one.
Unbiased, with a larger error than rounding to nearest; what is beyond the grid is cut.
"""

import dataclasses
import functools
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress.quantize import _matrices
from effjax.core import config, select, technique
from effjax.weights.formats import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class StochasticOptions(base.FormatOptions):
  """Options of stochastic rounding, beside those of the format.

  Attributes:
    seed: of the random choices; each parameter has its own stream.
  """

  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    config.require(self.seed >= 0, f"seed={self.seed} must not be negative")


def quantize(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: StochasticOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by leaves of the format, one at a time."""

  def one(path: str, w: jax.Array, axis: int) -> Any:
    stream = zlib.crc32(path.encode())  # The same whatever else is selected.
    key = jax.random.fold_in(jax.random.key(options.seed), stream)
    return _quantize_array(w, key, axis, options)

  return _matrices.replace(params, specs, paths, "stochastic", one, options, stats)


@functools.partial(jax.jit, static_argnames=("axis", "options"))
def _quantize_array(
  w: jax.Array, key: jax.Array, axis: int, options: StochasticOptions
) -> Any:
  fmt = options.build()
  x = base.split(w, fmt.group_of(w.shape[-2]))
  grid = fmt.fit(x, fmt.outer(x))
  codes = choose(fmt, x, grid, key)
  return fmt.leaf(base.merge(codes), grid, axis=axis, dtype=w.dtype)


def choose(
  fmt: base.Format, x: jax.Array, grid: base.Grid, key: jax.Array
) -> jax.Array:
  """Codes of one of the two values around each weight."""
  low, high = fmt.neighbours(x, grid)
  below, above = fmt.decode(low, grid), fmt.decode(high, grid)
  gap = above - below
  share = (x.astype(jnp.float32) - below) / jnp.where(gap > 0, gap, 1)
  return jnp.where(jax.random.uniform(key, x.shape) < share, high, low)


TECHNIQUE = technique.Transform(
  fn=quantize,
  options_cls=StochasticOptions,
  default_where=select.Where(kind=("matrix",)),
)
