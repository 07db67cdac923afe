"""Round to nearest on uniform grids, one grid a group of inputs and output channel.

A grid convention changes the error as much as an algorithm does (at 4 bits and groups
of 128 Gaussian weights, relative error 0.117 for absmax / 7, 0.105 for absmax / 8), so
it is an argument. Symmetric, b bits, q = 2 ** (b - 1):

| grid     | scale              | codes        | largest error of a value            |
|----------|--------------------|--------------|-------------------------------------|
| "narrow" | absmax / (q - 1)   | -(q-1) .. q-1| scale / 2                           |
| "half"   | absmax / (q - 1/2) | -q .. q-1    | scale / 2                           |
| "wide"   | absmax / q         | -q .. q-1    | scale (positive extremes are cut)   |

On a "half" grid the most negative value of a group may lie halfway between its two
lowest codes, where an ulp of the scale decides; both are equally far.

Asymmetric: scale = (max - min) / (2 ** b - 1) over the group and zero, so that 0 is on
the grid; error at most scale / 2. Uniform affine grids as in Jacob et al. 2018
(arXiv:1712.05877), eq. 1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core import errors
from effjax.core.config import require

GRIDS = {"narrow": 1.0, "half": 0.5, "wide": 0.0}  # what is taken from 2 ** (bits - 1)


def nearest_group(in_dim: int, group: int) -> int:
  """The divisor of `in_dim` closest to `group`, the smaller of two."""
  divisors = [n for n in range(1, in_dim + 1) if in_dim % n == 0]
  return min(divisors, key=lambda n: (abs(n - group), n))


def group_size(in_dim: int, group: int) -> int:
  """`group`, or `in_dim` for 0.

  Raises:
    InputError: `group` does not divide `in_dim`; names the nearest that does.
  """
  if group == 0:
    return in_dim
  if group < 0 or in_dim % group:
    raise errors.InputError(
      f"group {group} does not divide the input axis of {in_dim}; the nearest legal "
      f"group is {nearest_group(in_dim, group)} (0: the whole axis)"
    )
  return group


def quantize_groups(
  w: jax.Array,
  bits: int,
  group: int,
  symmetric: bool,
  *,
  grid: str = "narrow",
  scale_dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """The nearest grid point of every weight, rounded half to even.

  The codes are computed with the scale as it is stored. A 16-bit scale that rounds down
  cuts the largest value of its group by up to `code * ulp(scale)` more than the table
  above says. Everything is computed in float32, or float64 for a float64 weight.

  Args:
    w: floating [..., in, out].
    bits: 2 to 8.
    group: consecutive entries of the in axis that share a grid; 0: all of them.
    symmetric: a grid around zero, else one with a zero point.
    grid: symmetric convention: "narrow", "half" or "wide".
    scale_dtype: float32, float16 or bfloat16.

  Returns:
    codes [..., in, out], int8 if symmetric, else uint8 from 0 to 2 ** bits - 1;
    scale [..., in / group, out]; zero uint8 like scale, or None if symmetric.
    A group of zeros has scale 0 and dequantizes to zeros.

  Raises:
    InputError: bits or grid out of range, a group that does not divide.
  """
  size = group_size(w.shape[-2], group)
  w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
  grouped = _split(w, size)  # [..., in / group, group, out]
  least, most = (f(grouped, axis=-2, keepdims=True) for f in (jnp.min, jnp.max))
  scale, zero = fit_range(
    least, most, bits, symmetric, grid=grid, scale_dtype=scale_dtype
  )
  low, high, dtype = code_range(bits, symmetric, grid)
  places = grouped / jnp.where(scale == 0, 1, scale).astype(w.dtype)
  if zero is not None:
    places += zero.astype(w.dtype)
  codes = _merge(jnp.clip(jnp.round(places), low, high)).astype(dtype)
  return codes, scale[..., 0, :], None if zero is None else zero[..., 0, :]


def fit_range(
  least: jax.Array,
  most: jax.Array,
  bits: int,
  symmetric: bool,
  *,
  grid: str = "narrow",
  scale_dtype: DTypeLike = jnp.float32,
) -> tuple[jax.Array, jax.Array | None]:
  """The grid over a range of values.

  Args:
    least, most: the range of each group, floating.
    bits, symmetric, grid, scale_dtype: see `quantize_groups`.

  Returns:
    The scale as it is stored, and the zero point in uint8, or None if symmetric.
  """
  require(2 <= bits <= 8, f"{bits} bits a weight; available: 2 to 8")
  if grid not in GRIDS:
    raise errors.unknown("quantization grid", grid, GRIDS)
  if symmetric:
    absmax = jnp.maximum(jnp.abs(least), jnp.abs(most))
    return stored(absmax / (2 ** (bits - 1) - GRIDS[grid]), scale_dtype), None
  top = 2**bits - 1
  least, most = jnp.minimum(least, 0), jnp.maximum(most, 0)
  scale = stored((most - least) / top, scale_dtype)
  safe = jnp.where(scale == 0, 1, scale).astype(least.dtype)
  return scale, jnp.clip(jnp.round(-least / safe), 0, top).astype(jnp.uint8)


def code_range(bits: int, symmetric: bool, grid: str) -> tuple[int, int, DTypeLike]:
  """The least and the largest code, and the dtype that holds them."""
  if not symmetric:
    return 0, 2**bits - 1, jnp.uint8
  half = 2 ** (bits - 1)
  return (1 - half if grid == "narrow" else -half), half - 1, jnp.int8


def dequantize_groups(
  codes: jax.Array,
  scale: jax.Array,
  zero: jax.Array | None = None,
  *,
  dtype: DTypeLike = jnp.float32,
) -> jax.Array:
  """Scale * (codes - zero) in `dtype`, the group size read from the shapes.

  Args:
    codes: int8 or uint8 [..., in, out].
    scale: [..., in / group, out].
    zero: uint8 like scale, or None for a symmetric grid.
    dtype: of the result and of the product.
  """
  grouped = _split(codes, codes.shape[-2] // scale.shape[-2]).astype(dtype)
  if zero is not None:
    grouped -= zero[..., None, :].astype(dtype)
  return _merge(grouped * scale[..., None, :].astype(dtype))


def _split(w: jax.Array, size: int) -> jax.Array:
  return w.reshape(*w.shape[:-2], w.shape[-2] // size, size, w.shape[-1])


def _merge(grouped: jax.Array) -> jax.Array:
  return grouped.reshape(*grouped.shape[:-3], -1, grouped.shape[-1])


def stored(scale: jax.Array, dtype: DTypeLike) -> jax.Array:
  """The scale in the dtype it is stored in."""
  # A scale beyond float16 cuts the largest weights; an infinite one loses them all.
  most = float(jnp.finfo(dtype).max)
  return narrowed(
    jnp.where(jnp.isfinite(scale), jnp.minimum(scale, most), scale), dtype
  )


def narrowed(x: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Floats rounded to a narrower dtype, also if the same program widens them again.

  XLA's GPU compiler leaves out such a pair of conversions, and codes would then be
  those of scales that nobody holds. (Measured with JAX 0.11.2 on an H200: of float32
  to float8_e4m3fn or float16 and back nothing was rounded without the barrier.)
  """
  narrow = x.astype(dtype)
  return narrow if narrow.dtype == x.dtype else jax.lax.optimization_barrier(narrow)


def ordered_mean(x: jax.Array, axes: Sequence[int]) -> jax.Array:
  """The mean over axes, kept with size 1, whose terms are always added in one order.

  A compiler orders the terms of a sum as it likes, and otherwise for a stack than for
  one of its matrices: a scale that is a mean would change with it. Halves are added to
  each other until one is left, `log2(n)` passes.
  """
  axes = tuple(sorted(axis % x.ndim for axis in axes))
  last = range(x.ndim - len(axes), x.ndim)
  flat = jnp.moveaxis(x, axes, tuple(last))
  flat = flat.reshape(*flat.shape[: last[0]], -1)
  count = flat.shape[-1]
  whole = 1 << (count - 1).bit_length()
  total = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, whole - count)])
  while whole > 1:
    whole //= 2
    total = total[..., :whole] + total[..., whole:]
  return jnp.expand_dims(total[..., 0] / count, axes)
