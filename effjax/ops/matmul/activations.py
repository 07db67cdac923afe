"""Products whose activations are rounded too, and the gradients of that rounding.

| kind   | values of x            | product                        | largest code |
|--------|------------------------|--------------------------------|--------------|
| "int8" | evenly spaced          | int8 x int8 -> int32           | 127          |
| "int4" | evenly spaced          | the same, codes held in int8   | 7            |
| "fp8"  | float8_e4m3fn          | float8 x float8 -> float32     | 448          |

No hardware's int4 product is used: "int4" has the error of four bits and the speed of
eight. What executes a product of 8-bit floats: `fp8.py`.

A dynamic scale is each token's own, its largest magnitude / the largest code, as in
LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339, eq. 2, without the outlier columns)
and ZeroQuant (Yao et al. 2022, arXiv:2206.01861, section 4.1). A static scale is one
number for all tokens, known before: nothing is searched while running, values beyond
scale * largest code are cut, and a NaN need not show (as an integer it is any code).

Gradients pass straight through the rounding. With a static scale they follow LSQ (Esser
et al. 2020, arXiv:1902.08153, eq. 2, 3 and 5, without the factor of section 2.2): that
of x is zero where it is cut, that of the scale is

    d x^ / d scale = code - x / scale     where |x / scale| < Q
                     -Q or Q              where x is cut,  Q the largest code

Letters: T tokens, D inputs, F outputs, E experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import errors
from effjax.ops.matmul import fp8, int8
from effjax.ops.moe import grouped

KINDS = ("none", "int8", "int4", "fp8")
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": fp8.LARGEST}


def quantize(
  x: jax.Array, kind: str, x_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Activations as codes and scales.

  Args:
    x: [..., D], floating.
    kind: "int8", "int4" or "fp8".
    x_scale: static scales that broadcast against x; None for a scale of each row.

  Returns:
    codes like x, int8 or float8_e4m3fn, and scales in float32, [..., 1] or as given.

  Raises:
    InputError: there is no such kind.
  """
  if kind not in LARGEST:
    raise errors.unknown("kind of activations", kind, LARGEST)
  if x_scale is None:
    if kind == "fp8":
      return fp8.quantize_rows(x)
    return int8.quantize_rows(x, int(LARGEST[kind]))
  places, x_scale = _places(x, x_scale)
  if kind == "fp8":
    return fp8.encode(places), x_scale
  top = LARGEST[kind]
  return jnp.clip(jnp.round(places), -top, top).astype(jnp.int8), x_scale


def contract(
  x: jax.Array,
  w_codes: jax.Array,
  w_scale: jax.Array,
  x_scale: jax.Array | None = None,
  group_sizes: jax.Array | None = None,
  *,
  kind: str = "int8",
  out_first: bool = False,
) -> jax.Array:
  """X @ (w_codes * w_scale), by a product of codes with rounded x.

  Args:
    x: floating [..., D]; for a stacked weight [*stack, ..., D].
    w_codes: int8 [*stack, D, F], or [*stack, F, D] if `out_first`; with kind "fp8"
      uint8, the bits of float8_e4m3fn.
    w_scale: floating [*stack, 1, F], one scale an output channel.
    x_scale: static scales float32 [*stack, 1, 1], or None for dynamic ones.
    group_sizes: rows of each expert, int32 [E]: x is [T, D], rows of expert 0 before
      those of expert 1, and the stack is (E,). Rows past the sum give zeros.
    kind: of the activations.
    out_first: how the weight is held; see `int8.int8_dot`.

  Returns:
    [..., F] in the dtype of x; scaled in float32.

  Raises:
    InputError: there is no such kind, or axes do not match.
  """
  return _contract(kind, out_first, x, w_codes, w_scale, x_scale, group_sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(kind, out_first, x, w_codes, w_scale, x_scale, group_sizes):
  if kind == "fp8" or group_sizes is not None:
    return _forward(kind, out_first, x, w_codes, w_scale, x_scale, group_sizes)[0]
  # The same numbers; no gradient asks for the product before it is scaled.
  rows = lambda part: _rows_of(part, x.ndim, None)
  codes, scale = quantize(x, kind, None if x_scale is None else rows(x_scale))
  scales = (scale, rows(w_scale))
  return int8.int8_dot(codes, w_codes, scales, out_first=out_first).astype(x.dtype)


def _forward(kind, out_first, x, w_codes, w_scale, x_scale, group_sizes):
  experts = _experts(x, w_codes, group_sizes)
  rows = lambda part: _rows_of(part, x.ndim, experts)
  codes, scale = quantize(x, kind, None if x_scale is None else rows(x_scale))
  y = _product(kind, out_first, codes, w_codes, group_sizes)
  y = y.astype(jnp.float32) * scale
  scaled = (y * rows(w_scale)).astype(x.dtype)
  # With dynamic scales no gradient asks what x was.
  kept = None if x_scale is None else x
  return scaled, (kept, y, w_codes, w_scale, x_scale, group_sizes)


def _backward(kind, out_first, residuals, dy):
  x, y, w_codes, w_scale, x_scale, group_sizes = residuals
  dtype, dy = dy.dtype, dy.astype(jnp.float32)
  experts = _experts(dy, w_codes, group_sizes)
  rows = lambda part: _rows_of(part, dy.ndim, experts)
  summed = lambda part, like: _sum_rows(part, like, experts)
  w = _floats(kind, w_codes)
  if group_sizes is None:
    stack = w.ndim - 2
    batch = tuple(range(stack))
    axes = ((dy.ndim - 1,), (stack if out_first else stack + 1,))
    dx = jax.lax.dot_general(dy * rows(w_scale), w, (axes, (batch, batch)))
  else:
    w_EFD = w if out_first else jnp.swapaxes(w, -1, -2)
    dx = grouped.grouped_matmul(dy * rows(w_scale), w_EFD, group_sizes)
  dw_scale = summed(dy * y, w_scale)
  if x_scale is None:
    return dx.astype(dtype), None, dw_scale, None, None
  places, _ = _places(x, rows(x_scale))
  codes, _ = quantize(x, kind, rows(x_scale))
  inside = jnp.abs(places) < LARGEST[kind]
  of_scale = codes.astype(jnp.float32) - jnp.where(inside, places, 0)
  dx_scale = summed(jnp.sum(dx * of_scale, axis=-1, keepdims=True), x_scale)
  return jnp.where(inside, dx, 0).astype(dtype), None, dw_scale, dx_scale, None


_contract.defvjp(_forward, _backward)


def _product(
  kind: str,
  out_first: bool,
  codes: jax.Array,
  w_codes: jax.Array,
  group_sizes: jax.Array | None,
) -> jax.Array:
  """The product of codes, in int32 or float32."""
  if kind == "fp8":
    w_codes = jax.lax.bitcast_convert_type(w_codes, fp8.DTYPE)
  if group_sizes is not None:
    dtype = jnp.float32 if kind == "fp8" else jnp.int32
    return grouped.grouped_codes(
      codes, w_codes, group_sizes, out_first=out_first, dtype=dtype
    )
  dot = fp8.fp8_dot if kind == "fp8" else int8.int8_dot
  return dot(codes, w_codes, out_first=out_first)


def _floats(kind: str, w_codes: jax.Array) -> jax.Array:
  """Weight codes as float32 values."""
  if kind == "fp8":
    w_codes = jax.lax.bitcast_convert_type(w_codes, fp8.DTYPE)
  return w_codes.astype(jnp.float32)


def _places(x: jax.Array, x_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
  """`x / x_scale` and the scale, in float32; 1 divides in place of 0."""
  x_scale = x_scale.astype(jnp.float32)
  return x.astype(jnp.float32) / jnp.where(x_scale > 0, x_scale, 1.0), x_scale


def _experts(
  x: jax.Array, w_codes: jax.Array, group_sizes: jax.Array | None
) -> jax.Array | None:
  """The expert of each row, [T], of the last one past the sum; None without groups."""
  if group_sizes is None:
    return None
  ends_E = jnp.cumsum(group_sizes)
  expert_T = jnp.searchsorted(ends_E, jnp.arange(len(x)), side="right")
  return jnp.minimum(expert_T, w_codes.shape[0] - 1)


def _rows_of(part: jax.Array, ndim: int, experts: Any) -> jax.Array:
  """Scales [*stack, 1, n] so that they broadcast against rows, in float32."""
  part = part.astype(jnp.float32)
  if experts is not None:
    return part[experts, 0]
  stack, size = part.shape[:-2], part.shape[-1]
  return part.reshape(*stack, *(1,) * (ndim - len(stack) - 1), size)


def _sum_rows(part: jax.Array, like: jax.Array, experts: Any) -> jax.Array:
  """Sums over the rows that share a scale, in the shape and dtype of the scales."""
  if experts is not None:
    total = jax.ops.segment_sum(part, experts, like.shape[0])
  else:
    total = jnp.sum(part, axis=tuple(range(like.ndim - 2, part.ndim - 1)))
  return total.reshape(like.shape).astype(like.dtype)
