"""Rounding to a grid whose step is trained: learned step size quantization.

Source: LSQ (Esser et al. 2020, arXiv:1902.08153). With a step s and codes from -Qn to
Qp, `v_hat = s * round(clip(v / s, -Qn, Qp))` (eq. 1 and 2), and the gradients are those
of the formula with the rounding held as it is:

|                   | d v_hat / d v (eq. 5) | d v_hat / d s (eq. 3)   |
|-------------------|-----------------------|-------------------------|
| -Qn < v / s < Qp  | 1                     | round(v / s) - v / s    |
| v / s <= -Qn      | 0                     | -Qn                     |
| v / s >= Qp       | 0                     | Qp                      |

The gradient of a step is multiplied by 1 / sqrt(N Qp), N the weights that share it
(section 2.2): a step collects the gradients of many weights, and without the factor it
would move faster, against its size, than they do. An optimizer that divides gradients
by their size, such as Adam, undoes it.

With an offset b it is LSQ+ (Bhalgat et al. 2020, arXiv:2004.09576, eq. 2 to 5): v - b
in place of v, b added in the end, and d v_hat / d b is 0 inside and 1 outside.
Deviation: the offset's gradient gets the step's factor, of which the paper says
nothing. Of activations N counts features (section 2.2), not tokens. G groups of inputs,
I inputs of a group, F outputs.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def places(x: jax.Array, step: jax.Array, offset: jax.Array | None = None) -> jax.Array:
  """Where on the grid each value lies, as a number of steps, in float32 at least."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  x = x if offset is None else x - offset.astype(x.dtype)
  # What has no step lies on the grid's zero.
  return x / jnp.where(step == 0, 1, step).astype(x.dtype)


def fake_quantize(
  x: jax.Array,
  step: jax.Array,
  offset: jax.Array | None,
  low: int | float,
  high: int | float,
  count: int | None = None,
  nearest: Callable[[jax.Array], jax.Array] = jnp.round,
) -> jax.Array:
  """Values on the grid, with the gradients above to x, step and offset.

  Args:
    x: floating `[..., G, I, F]`, or any shape that the other two broadcast to.
    step: floating `[..., G, 1, F]`, sizes of 1 where it is shared.
    offset: like `step`, or None.
    low: the least code, -Qn.
    high: the largest, Qp.
    count: N, what shares a step; None for all of x.
    nearest: the rounding of what lies between `low` and `high`.

  Returns:
    Of the shape and dtype of x.
  """
  count = x.size // max(step.size, 1) if count is None else count
  grid = (low, high, 1 / math.sqrt(max(count, 1) * high), nearest)
  return _fake_quantize(x, step, offset, grid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fake_quantize(x, step, offset, grid):
  codes = _codes(places(x, step, offset), grid)
  values = codes * step.astype(codes.dtype)
  values = values if offset is None else values + offset.astype(codes.dtype)
  return values.astype(x.dtype)


def _forward(x, step, offset, grid):
  return _fake_quantize(x, step, offset, grid), (x, step, offset)


def _backward(grid, residuals, dy):
  x, step, offset = residuals
  low, high, factor, _ = grid
  at = places(x, step, offset)
  inside = (low < at) & (at < high)
  codes = _codes(at, grid)
  wide = dy.astype(at.dtype)
  dx = jnp.where(inside, wide, 0).astype(x.dtype)
  dstep = _sum_to(wide * jnp.where(inside, codes - at, codes), step, factor)
  if offset is None:
    return dx, dstep, None
  return dx, dstep, _sum_to(jnp.where(inside, 0, wide), offset, factor)


_fake_quantize.defvjp(_forward, _backward)


def _codes(at: jax.Array, grid: tuple) -> jax.Array:
  low, high, _, nearest = grid
  return nearest(jnp.clip(at, low, high))


def _sum_to(gradients: jax.Array, part: jax.Array, factor: float) -> jax.Array:
  shared = tuple(
    axis for axis, size in enumerate(part.shape) if size != gradients.shape[axis]
  )
  total = jnp.sum(gradients, axis=shared, keepdims=True) * factor
  return total.astype(part.dtype)
