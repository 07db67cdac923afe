"""Scales of ggml's K-quants: searched for each sub-block, then rounded themselves.

A super-block of 256 inputs has 8 or 16 sub-blocks. The scale (and minimum) of each is
the best of a few weighted least-squares fits; then those of a super-block are rounded
to 4, 6 or 8 bits against one float16. Source: make_qkx2_quants, make_qx_quants,
make_q3_quants and quantize_row_q*_K_ref of ggml-quants.c. Deviations: sums are added in
the compiler's order, which decides between trials that are equally good but for the
last bit.

Weights are float32 `[..., sub-blocks, inputs of one, out]`, found scales the same with
1 input.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.weights.formats import _gguf_plain, base

# A sub-block whose values are all smaller is stored as zero.
_TINY = 1e-15
_PASSES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trials:
  """The scales that `affine` tries: span / (codes + start + 0.1 * step).

  Attributes:
    start: of the first step.
    num_steps: after the first.
    absolute: errors are sizes weighted by that of the element, not squares weighted by
      that plus the root mean square of the sub-block.
  """

  start: float
  num_steps: int
  absolute: bool = False


def affine(x: jax.Array, high: int, trials: Trials) -> tuple[jax.Array, jax.Array]:
  """Scales and minima, which are at most 0, of least weighted error.

  Each step rounds under one trial scale and the minimum of the best fit so far, then
  solves min over (s, m) of sum w (s * code + m - x)^2, with m <= 0.
  """
  weight = jnp.abs(x)
  if not trials.absolute:
    weight += jnp.sqrt(jnp.mean(x * x, axis=-2, keepdims=True))
  sum_w, sum_x = _sum(weight), _sum(weight * x)
  greatest = jnp.max(x, axis=-2, keepdims=True)
  least = jnp.minimum(jnp.min(x, axis=-2, keepdims=True), 0)
  flat = greatest == least

  def codes_of(levels: jax.Array, minimum: jax.Array) -> jax.Array:
    span = jnp.where(flat, 1, greatest - minimum)
    return jnp.clip(jnp.round(levels / span * (x - minimum)), 0, high)

  def error_of(codes: jax.Array, scale: jax.Array, minimum: jax.Array) -> jax.Array:
    off = scale * codes + minimum - x
    return _sum(weight * (jnp.abs(off) if trials.absolute else off * off))

  def step(best: Any, levels: jax.Array) -> tuple[Any, None]:
    _, _, least_error = best
    codes = codes_of(levels, best[1])
    weighted = weight * codes
    sum_l, sum_l2, sum_xl = _sum(weighted), _sum(weighted * codes), _sum(weighted * x)
    determinant = sum_w * sum_l2 - sum_l * sum_l
    solvable = determinant > 0
    determinant = jnp.where(solvable, determinant, 1)
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = minimum > 0
    scale = jnp.where(positive, sum_xl / jnp.where(sum_l2 > 0, sum_l2, 1), scale)
    minimum = jnp.where(positive, 0, minimum)
    error = error_of(codes, scale, minimum)
    better = ~flat & solvable & (error < least_error)
    new = (scale, minimum, error)
    return tuple(jnp.where(better, n, b) for n, b in zip(new, best, strict=True)), None

  scale = jnp.where(flat, 0, (greatest - least) / high)
  start = (scale, least, error_of(codes_of(jnp.float32(high), least), scale, least))
  levels = high + trials.start + 0.1 * jnp.arange(trials.num_steps + 1)
  (scale, minimum, _), _ = jax.lax.scan(step, start, levels.astype(jnp.float32))
  return scale, minimum


def symmetric(x: jax.Array, low: int, high: int) -> jax.Array:
  """Scales of least square error, each element weighted by its square.

  Tries 19 scales around the one that gives the largest element the lowest code.
  """
  largest, zero = _largest(x, axis=-2)
  weight = x * x

  def step(best: Any, levels: jax.Array) -> tuple[Any, None]:
    codes = jnp.clip(jnp.round(levels / largest * x), low, high)
    sum_xl, sum_l2 = _sum(weight * x * codes), _sum(weight * codes * codes)
    found, loss = best
    scale = sum_xl / jnp.where(sum_l2 > 0, sum_l2, 1)
    better = (sum_l2 > 0) & (sum_xl * sum_xl > loss * sum_l2)
    return (
      jnp.where(better, scale, found),
      jnp.where(better, scale * sum_xl, loss),
    ), None

  steps = jnp.asarray((0, *range(-9, 0), *range(1, 10)), jnp.float32)
  nothing = jnp.zeros_like(largest)
  (scale, _), _ = jax.lax.scan(step, (nothing, nothing), low - 0.1 * steps)
  return jnp.where(zero, 0, scale)


def refined(x: jax.Array, low: int, high: int) -> jax.Array:
  """Scales of Q3_K: of codes that are changed one by one while that is an improvement.

  The error is as in `symmetric`; elements are taken in their order, five times.
  """
  largest, zero = _largest(x, axis=-2)
  weight = x * x
  codes = jnp.clip(jnp.round(low / largest * x), low, high)
  sums = (_sum(weight * x * codes), _sum(weight * codes * codes))

  def change(i: jax.Array, state: Any) -> Any:
    codes, sum_xl, sum_l2 = state
    own = lambda a: jax.lax.dynamic_slice_in_dim(a, i % x.shape[-2], 1, axis=-2)
    x_i, w_i, code = own(x), own(weight), own(codes)
    rest_xl = sum_xl - w_i * x_i * code
    rest_l2 = sum_l2 - w_i * code * code
    possible = rest_xl > 0
    place = x_i * rest_l2 / jnp.where(possible, rest_xl, 1)
    new = jnp.clip(jnp.round(place), low, high)
    new_xl, new_l2 = rest_xl + w_i * x_i * new, rest_l2 + w_i * new * new
    better = new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
    better &= possible & (new != code) & (new_l2 > 0)
    chosen = jnp.where(better, new, code)
    codes = jax.lax.dynamic_update_slice_in_dim(codes, chosen, i % x.shape[-2], axis=-2)
    keep = lambda new, old: jnp.where(better, new, old)
    return codes, keep(new_xl, sum_xl), keep(new_l2, sum_l2)

  _, sum_xl, sum_l2 = jax.lax.fori_loop(
    0, _PASSES * x.shape[-2], change, (codes, *sums)
  )
  return jnp.where(zero | (sum_l2 <= 0), 0, sum_xl / jnp.where(sum_l2 > 0, sum_l2, 1))


def share_positive(
  values: jax.Array, shared: int, bits: int, shrink: Any
) -> tuple[jax.Array, jax.Array]:
  """Rounds values that are not negative to integers of `bits` against the largest.

  Args:
    values: `[..., sub-blocks, 1, out]`.
    shared: sub-blocks of a super-block.
    bits: of an integer.
    shrink: factor, up to 1, on what is rounded, but not on what it is rounded against:
      so that sub-blocks do not depend on one another's.

  Returns:
    The scale of each super-block, once for each of its sub-blocks, float32 before it is
    stored; and the integers, uint8.
  """
  most = 2**bits - 1
  grouped = _super(jnp.maximum(values, 0), shared)
  largest = jnp.max(grouped, axis=-3, keepdims=True)
  factor = _factor(shrink, values, shared)
  inverse = jnp.where(largest > 0, most / base.divisor(largest), 0)
  codes = jnp.clip(jnp.round(inverse * grouped * factor), 0, most).astype(jnp.uint8)
  return _again(_gguf_plain.quotient(largest, most), grouped, values), codes.reshape(
    values.shape
  )


def share_signed(
  values: jax.Array, shared: int, bits: int, shrink: Any
) -> tuple[jax.Array, jax.Array]:
  """As `share_positive`; the value of largest size becomes the lowest integer."""
  low = -(2 ** (bits - 1))
  grouped = _super(values, shared)
  largest, zero = _largest(grouped, axis=-3)
  factor = _factor(shrink, values, shared)
  inverse = low / largest
  codes = jnp.clip(jnp.round(inverse * grouped * factor), low, -low - 1)
  codes = jnp.where(zero, 0, codes).astype(jnp.int8)
  scale = jnp.where(zero, 0, 1 / inverse)
  return _again(scale, grouped, values), codes.reshape(values.shape)


def _largest(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
  """The element of largest size with its sign, 1 where there is none; and where."""
  place = jnp.argmax(jnp.abs(x), axis=axis, keepdims=True)
  largest = jnp.take_along_axis(x, place, axis=axis)
  zero = jnp.abs(largest) < _TINY
  return jnp.where(zero, 1, largest), zero


def _super(values: jax.Array, shared: int) -> jax.Array:
  """`[..., super-blocks, sub-blocks of one, 1, out]`."""
  lead, out = values.shape[:-3], values.shape[-1]
  return values.reshape(*lead, -1, shared, 1, out)


def _factor(shrink: Any, values: jax.Array, shared: int) -> jax.Array:
  """`shrink`, a number or like `values`, as `_super` has those."""
  return _super(jnp.broadcast_to(jnp.asarray(shrink), values.shape), shared)


def _again(scale: jax.Array, grouped: jax.Array, values: jax.Array) -> jax.Array:
  return jnp.broadcast_to(scale, grouped.shape).reshape(values.shape)


def _sum(x: jax.Array) -> jax.Array:
  return jnp.sum(x, axis=-2, keepdims=True)
