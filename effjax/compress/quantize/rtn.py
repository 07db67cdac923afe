"""Round-to-nearest quantization: each weight to the closest value of its format.

Source: the baseline of every quantization paper, for example Dettmers and Zettlemoyer
2022, arXiv:2212.09720, section 3. The formats are those of `effjax list formats`; with
integers the grid is symmetric, scale absmax / (2^(bits-1) - 1), or asymmetric between
minimum and maximum, per output channel or per group of inputs.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress.quantize import _matrices
from effjax.core import errors, select, technique
from effjax.weights.formats import base

RANGES = ("absmax", "mse")
# Shares of the largest magnitude that are tried, the whole first.
_SHRINKS = tuple(1 - 0.025 * i for i in range(21))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTNOptions(base.FormatOptions):
  """Options of round-to-nearest quantization, beside those of the format.

  Attributes:
    range: what a grid covers: "absmax" the whole group, or "mse" the share of it, from
      a half on in steps of 2.5 %, that has the least squared error.
  """

  range: str = "absmax"

  def __post_init__(self):
    super().__post_init__()
    if self.range not in RANGES:
      raise errors.unknown("range", self.range, RANGES)


def quantize(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: RTNOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by leaves of the format, one at a time.

  A `Masked` parameter stays masked: its values are quantized, and a symmetric grid has
  an exact zero. Of a `LowRank` one each factor is quantized.
  """
  one = lambda path, w, axis: _quantize_array(w, axis, options)
  return _matrices.replace(params, specs, paths, "rtn", one, options, stats)


@functools.partial(jax.jit, static_argnames=("axis", "options"))
def _quantize_array(w: jax.Array, axis: int, options: RTNOptions) -> Any:
  """One array, under jit so that it keeps its sharding and needs no second copy."""
  fmt = options.build()
  x = base.split(w, fmt.group_of(w.shape[-2]))
  grid = fit(fmt, x, options.range)
  return fmt.leaf(base.merge(fmt.encode(x, grid)), grid, axis=axis, dtype=w.dtype)


def fit(
  fmt: base.Format, x: jax.Array, range: str, outer: jax.Array | None = None
) -> dict[str, jax.Array]:
  """The grids of weights `[..., groups, inputs of a group, out]`.

  Args:
    fmt: the format.
    x: the weights.
    range: one of RANGES.
    outer: what the whole matrix decides, where x is only a part of it.
  """
  outer = fmt.outer(x) if outer is None else outer
  if range == "absmax":
    return fmt.fit(x, outer)
  shape = (*x.shape[:-2], 1, x.shape[-1])

  def better(best: Any, shrink: jax.Array) -> tuple[Any, None]:
    grid = fmt.fit(x, outer, shrink)
    error = fmt.decode(fmt.encode(x, grid), grid) - x
    loss = jnp.sum(jnp.square(error), axis=-2, keepdims=True)
    least, chosen = best
    wins = loss < least
    return (jnp.where(wins, loss, least), jnp.where(wins, shrink, chosen)), None

  start = (jnp.full(shape, jnp.inf), jnp.ones(shape))
  (_, shrink), _ = jax.lax.scan(better, start, jnp.asarray(_SHRINKS))
  return fmt.fit(x, outer, shrink)


TECHNIQUE = technique.Transform(
  fn=quantize,
  options_cls=RTNOptions,
  default_where=select.Where(kind=("matrix",)),
)
