"""Products that execute int8 x int8 -> int32, and rows rounded to such codes.

How activations become codes and get gradients: `activations.py`.

On one CPU device a weight held `out_first` is multiplied by a kernel compiled for the
machine (`native.py`), elsewhere by XLA; the integers are the same. What decides the
speed there, measured on two AVX2 cores over the products of 8 decoder layers:

- XLA's own product packs the weight anew in every call. Held [out, in] it is faster
  than [in, out], by 1.2 to 1.5 at one token: hold decoding weights `out_first`;
- with one row XLA converts the whole weight to int32 and takes more than ten times as
  long as with two, so one row is padded to two; more padding only costs;
- the kernel reads the weight as it lies, and from 12 rows on (64 with VNNI) rearranges
  panels of it in the cache, so that no sum is added up across a vector
  (`effjax bench quantize`: with 16 rows from 2.2 to about 3 times as fast as float32,
  with 128 from 1.2 to 1.5);
- a cycle of AVX2 has two multiplications of 256 bits: 32 operations of float32 or 64 of
  int16, which codes are widened to. With many rows that is twice as fast at most,
  beside a float32 product at its peak. AVX-512 with VNNI takes four codes for a float:
  there 128 rows are a little more than 3 times as fast;
- scales multiply the sums while they are in the cache, which saves a pass over all
  outputs, in memory;
- a weight that comes from memory is waited for unless it is fetched ahead: 145 against
  70 microseconds for [1, 512] x [512, 1376] on one busy core.

A whole decoding step of random models, two AVX2 cores, two runs: 1.9 to 2.3 times as
fast as float32 at width 512 and batch 1, 2.2 times at batch 8; 2.7 to 2.8 and 2.9 to
3.7 times at width 1024. With XLA's product it was 1.3 and 1.7 times, and 1.6 and 2.4
times. (Of a real model: `effjax bench decode`.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core
from jax.interpreters import batching, mlir

from effjax.core.config import require
from effjax.ops.matmul import native

CODE_MAX = 127  # -128 is not used for activations: their grid is symmetric
# The longest sum of products of two codes, -128 included, that int32 holds for certain.
MAX_IN_DIM = (2**31 - 1) // 128**2


def quantize_rows(
  x_TD: jax.Array, code_max: int = CODE_MAX
) -> tuple[jax.Array, jax.Array]:
  """Each row on a symmetric grid of its own.

  Args:
    x_TD: [..., D], floating.
    code_max: the largest code, 127 at most.

  Returns:
    codes int8 [..., D] in [-code_max, code_max], rounded half to even, and scale
    float32 [..., 1] = absmax / code_max, so that x is about codes * scale. A row of
    zeros has scale 0; a row with a value that is not finite has a scale that is not
    finite.
  """
  x_TD = x_TD.astype(jnp.float32)
  scale_T1 = jnp.max(jnp.abs(x_TD), axis=-1, keepdims=True) / code_max
  codes_TD = jnp.round(x_TD / jnp.where(scale_T1 > 0, scale_T1, 1.0))
  # Only a subnormal scale, itself rounded, can put a quotient outside.
  codes_TD = jnp.clip(codes_TD, -code_max, code_max)
  return codes_TD.astype(jnp.int8), scale_T1


def int8_dot(
  x_codes_TD: jax.Array,
  w_codes_DF: jax.Array,
  scales: tuple[jax.Array, jax.Array] | None = None,
  *,
  out_first: bool = False,
) -> jax.Array:
  """The exact integer product of two arrays of codes.

  Args:
    x_codes_TD: int8 [..., D]; for a stacked weight [*stack, ..., D].
    w_codes_DF: int8 [*stack, D, F], or [*stack, F, D] if `out_first`.
    scales: of the rows of x, [..., 1] or one for all, and of outputs, [*stack, 1...,
      F], both float32; the product is multiplied by the first, then by the second.
    out_first: the weight is held with its output axis first, the faster way on a CPU.

  Returns:
    int32 [..., F] or [*stack, ..., F], float32 if there are scales.

  Raises:
    InputError: not int8, axes that do not match, or D so large that int32 could
      overflow (over 131 071).
  """
  w_in = -1 if out_first else -2
  in_dim, stack = w_codes_DF.shape[w_in], w_codes_DF.shape[:-2]
  require(
    x_codes_TD.dtype == jnp.int8 and w_codes_DF.dtype == jnp.int8,
    f"int8_dot needs int8 codes, got {x_codes_TD.dtype} and {w_codes_DF.dtype}",
  )
  require(
    x_codes_TD.shape[-1] == in_dim and x_codes_TD.shape[: len(stack)] == stack,
    f"int8_dot of x {x_codes_TD.shape} with a weight of input dim {in_dim} and stack "
    f"{stack}; x must be [*stack, ..., {in_dim}]",
  )
  require(
    in_dim <= MAX_IN_DIM,
    f"int8_dot over {in_dim} inputs can overflow int32; the most is {MAX_IN_DIM}",
  )
  # Only without a mesh: under one, XLA's product is split like every other, while a
  # foreign call is opaque to the partitioner.
  if out_first and not stack and jax.sharding.get_abstract_mesh().empty:
    if scales is None:
      return _dot_p.bind(x_codes_TD, w_codes_DF)
    of_x, of_w = scales
    return _dot_p.bind(
      x_codes_TD,
      w_codes_DF,
      jnp.broadcast_to(of_x, (*x_codes_TD.shape[:-1], 1)),
      of_w.reshape(len(w_codes_DF)),
    )
  return _xla_dot(x_codes_TD, w_codes_DF, *(scales or ()), out_first=out_first)


def _xla_dot(
  x_codes_TD: jax.Array,
  w_codes_DF: jax.Array,
  of_x: jax.Array | None = None,
  of_w: jax.Array | None = None,
  *,
  out_first: bool,
) -> jax.Array:
  """`int8_dot` by XLA's own product."""
  if of_x is not None:
    y_TF = _xla_dot(x_codes_TD, w_codes_DF, out_first=out_first)
    stack = w_codes_DF.shape[:-2]
    between = (1,) * (y_TF.ndim - len(stack) - 1)
    of_w = of_w.reshape(*stack, *between, y_TF.shape[-1])
    return y_TF.astype(jnp.float32) * of_x * of_w
  w_in, w_out = (-1, -2) if out_first else (-2, -1)
  stack = w_codes_DF.shape[:-2]
  in_dim, out_dim = w_codes_DF.shape[w_in], w_codes_DF.shape[w_out]
  free = x_codes_TD.shape[len(stack) : -1]
  single = all(n == 1 for n in free)
  if single:
    x_codes_TD = jnp.broadcast_to(
      x_codes_TD.reshape(*stack, 1, in_dim), (*stack, 2, in_dim)
    )
  batch = tuple(range(len(stack)))
  contract = ((x_codes_TD.ndim - 1,), (w_codes_DF.ndim + w_in,))
  y_TF = jax.lax.dot_general(
    x_codes_TD,
    w_codes_DF,
    (contract, (batch, batch)),
    preferred_element_type=jnp.int32,
  )
  return y_TF[..., :1, :].reshape(*stack, *free, out_dim) if single else y_TF


# x [..., D] with w [F, D]; with scales [..., 1] and [F] or without. A primitive of its
# own, because which product runs can only be said when the program is lowered: for
# which platform, over how many devices, and whether to be exported. It has no
# derivative: `activations.contract` says what that of rounded numbers is.
_dot_p = jex_core.Primitive("int8_dot")


@_dot_p.def_abstract_eval
def _dot_abstract(x_codes_TD, w_codes_FD, *scales):
  shape = (*x_codes_TD.shape[:-1], w_codes_FD.shape[0])
  return jax.core.ShapedArray(shape, np.dtype(np.float32 if scales else np.int32))


@_dot_p.def_impl
@jax.jit
def _dot_eagerly(*operands):
  return _dot_p.bind(*operands)


def _dot_batched(operands, axes):
  size = next(
    part.shape[axis]
    for part, axis in zip(operands, axes, strict=True)
    if axis is not None
  )
  x_codes, w_codes, *scales = (
    jnp.broadcast_to(part, (size, *part.shape))
    if axis is None
    else jnp.moveaxis(part, axis, 0)
    for part, axis in zip(operands, axes, strict=True)
  )
  # One weight serves every row; its codes are operand 1, its scales operand 3.
  if axes[1] is None and all(axis is None for axis in axes[3:]):
    return _dot_p.bind(x_codes, operands[1], *scales[:1], *operands[3:]), 0
  return _xla_dot(x_codes, w_codes, *scales, out_first=True), 0


_lower_to_xla = mlir.lower_fun(
  functools.partial(_xla_dot, out_first=True), multiple_results=False
)


def _lower_for_cpu(context, *operands):
  """The native kernel where one device of this machine runs the program."""
  module = context.module_context
  one_device = (
    isinstance(module.axis_context, mlir.ShardingContext)
    and module.axis_context.num_devices == 1
  )
  exported = module.lowering_parameters.for_export
  if one_device and not exported and native.status().available:
    target = native.TARGET if len(operands) == 2 else native.SCALED_TARGET
    return jax.ffi.ffi_lowering(target)(context, *operands)
  return _lower_to_xla(context, *operands)


batching.primitive_batchers[_dot_p] = _dot_batched
mlir.register_lowering(_dot_p, _lower_to_xla)
mlir.register_lowering(_dot_p, _lower_for_cpu, platform="cpu")
