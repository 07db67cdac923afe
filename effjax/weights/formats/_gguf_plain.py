"""Scales of ggml's types that have one float16 scale, or scale and minimum, a block.

Source: quantize_row_q4_0_ref and its siblings in ggml-quants.c. ggml rounds codes under
the scale before it is stored in float16, so the scales here are float32: the format
stores them. Weights are `[..., blocks, inputs of a block, out]`.
"""

from typing import Any

import jax
import jax.numpy as jnp


def symmetric(x: jax.Array, low: int, high: int, shrink: Any) -> dict[str, jax.Array]:
  """The scale that gives the element of largest size the lowest code.

  Args:
    x: float32.
    low, high: range of codes; with as many on both sides of zero (Q8_0) the scale is
      positive and gives that element the highest one.
    shrink: factor on the range that is covered.
  """
  if -low == high:
    largest = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    return {"scale": quotient(largest * shrink, high)}
  place = jnp.argmax(jnp.abs(x), axis=-2, keepdims=True)
  return {"scale": quotient(jnp.take_along_axis(x, place, axis=-2) * shrink, low)}


def affine(x: jax.Array, high: int, shrink: Any) -> dict[str, jax.Array]:
  """Scale and minimum that span a block from its least to its greatest value.

  Shrinking keeps the middle of the range.
  """
  least, greatest = (f(x, axis=-2, keepdims=True) for f in (jnp.min, jnp.max))
  span = greatest - least
  inset = span * ((1 - jnp.asarray(shrink, jnp.float32)) / 2)
  return {"scale": quotient(span * shrink, high), "min": least + inset}


def encode(x: jax.Array, grid: dict[str, jax.Array], low: int, high: int) -> jax.Array:
  """Codes, as numbers: `trunc(x / scale - low + 0.5) + low`.

  With as many codes on both sides of zero halves go away from it.
  """
  if "min" in grid:
    x = x - grid["min"]
  # A compiler makes one quotient of the reciprocal of a quotient.
  inverse = 1 / jax.lax.optimization_barrier(grid["scale"])
  # ggml multiplies by it, and has 0 where the scale is 0.
  ratio = x * jnp.where(jnp.isfinite(inverse), inverse, 0)
  if -low == high:
    size = jnp.abs(ratio)
    whole = jnp.floor(size)
    codes = jnp.sign(ratio) * (whole + jnp.floor(2 * (size - whole)))
  else:
    codes = jnp.trunc(ratio + (0.5 - low)) + low
  return jnp.clip(codes, low, high)


def quotient(x: jax.Array, divisor: int) -> jax.Array:
  """`x / divisor`, rounded once, as ggml has it.

  By a constant or a scalar a compiler multiplies with its reciprocal, and the ulp that
  this may cost is seen in float16 and in codes.
  """
  return x / jax.lax.optimization_barrier(jnp.full(x.shape, divisor, x.dtype))
