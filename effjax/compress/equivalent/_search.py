"""AWQ's two searches, in one layer: the scales of a pair, and how far to clip.

Source: Lin et al. 2023, arXiv:2306.00978, eq. 4 and 5 and section 3.2, with the
constants of the authors' code; see compress.equivalent.awq for the deviations.
Both are compiled once for all layers that are built equal.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.compress import blocks, calibrate
from effjax.compress.equivalent import _pairs
from effjax.compress.quantize import rtn
from effjax.core import tree as tree_lib
from effjax.weights.formats import base

# Scales are no smaller before they are centred.
_LEAST = 1e-4
# Clipping keeps the share 1 - i / CLIP_GRID of a group's largest magnitude, for i below
# MAX_SHRINK * CLIP_GRID.
CLIP_GRID = 20
MAX_SHRINK = 0.5


@dataclasses.dataclass(frozen=True)
class Rounding:
  """What the searches depend on of the options; equal ones share compiled programs.

  Attributes:
    fmt: the format.
    range: what a grid covers, of rtn.RANGES.
    num_grid: exponents that are tried.
  """

  fmt: base.Format
  range: str
  num_grid: int

  def rounded(self, w: jax.Array) -> jax.Array:
    """The values that round-to-nearest leaves of `[*stack, in, out]`."""
    x = base.split(w, self.fmt.group_of(w.shape[-2]))
    grid = rtn.fit(self.fmt, x, self.range)
    return base.merge(self.fmt.decode(self.fmt.encode(x, grid), grid)).astype(w.dtype)


class Found(NamedTuple):
  """What the search over a pair's scales found.

  Attributes:
    losses: squared errors of the layer's output, `[num_grid]`.
    best: number of the least.
    scales: its scales, `[*stack, C]`.
  """

  losses: Any
  best: Any
  scales: Any


def scales(magnitude: jax.Array, exponent: Any) -> jax.Array:
  """`m^exponent`, so that the smallest times the largest is 1.

  Args:
    magnitude: mean |x| of the channels, `[*stack, C]`.
    exponent: from 0, which gives ones, to 1.
  """
  s = jnp.maximum(magnitude**exponent, _LEAST)
  most, least = (f(s, axis=-1, keepdims=True) for f in (jnp.max, jnp.min))
  return s / jnp.sqrt(most * least)


@functools.partial(jax.jit, static_argnames=("layer", "pair", "chosen", "to"))
def search(
  layer: blocks.Layer,
  params: Mapping[str, Any],
  stream: blocks.Stream,
  after: blocks.Stream,
  stats: Mapping[str, calibrate.InputStats],
  pair: _pairs.Pair,
  chosen: frozenset[str],
  to: Rounding,
) -> Found:
  """The scales of a pair with the least error among the exponents k / num_grid.

  An error is the mean over tokens and channels of the squared change of the layer's
  output, when the pair's chosen readers are scaled, rounded and scaled back, which is
  the same as dividing the producer.

  Args:
    layer, params, stream: the layer and what flows into it.
    after: what flows out of it.
    stats: of the inputs of the pair's readers, with `abs_sum`.
    pair: as the layer names it.
    chosen: paths of the pair's readers that are rounded; the others are not.
    to: what they are rounded to.
  """
  flat = tree_lib.flatten(params)
  magnitude = _magnitude(pair, stats)
  wide = lambda stream: stream.x_BLD.astype(jnp.float32)
  expected_BLD = wide(after)
  valid_BL1 = stream.segments_BL[..., None] > 0
  total = jnp.maximum(jnp.sum(valid_BL1), 1) * expected_BLD.shape[-1]

  def loss(exponent: jax.Array) -> jax.Array:
    s, changed = scales(magnitude, exponent), dict(flat)
    for reader in pair.readers:
      if reader.path not in chosen:
        continue
      old = flat[reader.path]
      factor = reader.expand(s)[..., None]
      w = _pairs.dense(_pairs.scaled(old, factor))
      new = to.rounded(w) / factor
      changed[reader.path] = _pairs.with_values(old, new)
    got_BLD = wide(layer(tree_lib.unflatten(changed), stream))
    error_BLD = jnp.where(valid_BL1, got_BLD - expected_BLD, 0)
    return jnp.sum(jnp.square(error_BLD)) / total

  exponents = jnp.arange(to.num_grid, dtype=jnp.float32) / to.num_grid
  losses = jax.lax.map(loss, exponents)
  best = jnp.argmin(losses)
  return Found(losses, best, scales(magnitude, exponents[best]))


def _magnitude(
  pair: _pairs.Pair, found: Mapping[str, calibrate.InputStats]
) -> jax.Array:
  """Mean |x| of each channel, over everything its readers are given."""
  total = count = 0.0
  for reader in pair.readers:
    stats = found[reader.path]
    of_inputs = jnp.broadcast_to(stats.count[..., None], stats.abs_sum.shape)
    total += reader.gather(stats.abs_sum, jnp.sum)
    count += reader.gather(of_inputs, jnp.sum)
  return total / jnp.maximum(count, 1.0)


@functools.partial(jax.jit, static_argnames=("to",))
def clipped(w: jax.Array, hessian: jax.Array, s: jax.Array, to: Rounding) -> jax.Array:
  """A weight whose groups are clipped where that makes the rounded one fit better.

  For each output and group of inputs alone, the share that is kept minimizes the mean
  over tokens of `(x Q(clip(w)) - x w)^2` with x the inputs of the group, which takes no
  more than their second moments.

  Args:
    w: `[*stack, in, out]`.
    hessian: sum of `x x^T`, `[*stack, in, in]`, before w was scaled.
    s: what its inputs were scaled by since, `[*stack, in]`.
    to: what it will be rounded to.
  """
  fmt = to.fmt
  group = fmt.group_of(w.shape[-2])
  x = base.split(w.astype(jnp.promote_types(w.dtype, jnp.float32)), group)
  s = s.reshape(*s.shape[:-1], -1, group)
  moments = _blocks(hessian.astype(x.dtype), group)
  moments = moments / (s[..., :, None] * s[..., None, :])
  most = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
  # A scale of the whole matrix is that of the weights as they are.
  outer = fmt.outer(x)

  def better(best: Any, step: jax.Array) -> tuple[Any, None]:
    bound = most * (1 - step / CLIP_GRID)
    kept = jnp.clip(x, -bound, bound)
    grid = rtn.fit(fmt, kept, to.range, outer)
    error = fmt.decode(fmt.encode(kept, grid), grid).astype(x.dtype) - x
    moved = jnp.matmul(moments, error, precision=jax.lax.Precision.HIGHEST)
    loss = jnp.sum(error * moved, axis=-2, keepdims=True)
    least, chosen = best
    wins = loss < least
    return (jnp.where(wins, loss, least), jnp.where(wins, bound, chosen)), None

  start = (jnp.full_like(most, jnp.inf), most)
  steps = jnp.arange(int(MAX_SHRINK * CLIP_GRID), dtype=x.dtype)
  (_, bound), _ = jax.lax.scan(better, start, steps)
  return base.merge(jnp.clip(x, -bound, bound)).astype(w.dtype)


def _blocks(hessian: jax.Array, group: int) -> jax.Array:
  """The blocks on the diagonal, `[*stack, in / group, group, group]`."""
  *stack, size, _ = hessian.shape
  x = hessian.reshape(*stack, size // group, group, size // group, group)
  return jnp.moveaxis(jnp.diagonal(x, axis1=-4, axis2=-2), -1, -3)
