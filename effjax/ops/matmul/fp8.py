"""Products that execute float8_e4m3fn x float8_e4m3fn, summed in float32.

The format and its largest value, 448: Micikevicius et al. 2022, arXiv:2209.05433,
section 3. The scale of a row maps its largest magnitude to that value.

The program asks for a product of 8-bit floats; what executes it is the platform's
choice. GPUs from compute capability 8.9 on have such products. XLA's CPU backend has
none: it converts both operands to float32, so there numbers are right and nothing is
faster.
"""

import jax
import jax.numpy as jnp

from effjax.core.config import require
from effjax.ops.matmul import rounding

LARGEST = 448.0
DTYPE = jnp.float8_e4m3fn


def quantize_rows(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Each row times a factor that brings its largest magnitude to 448.

  Args:
    x_TD: [..., D], floating.

  Returns:
    values float8_e4m3fn [..., D], rounded half to even, and scale float32 [..., 1] =
    absmax / 448, so that x is about values * scale. A row of zeros has scale 0; a row
    with a value that is not finite has a scale that is not finite.
  """
  x_TD = x_TD.astype(jnp.float32)
  scale_T1 = jnp.max(jnp.abs(x_TD), axis=-1, keepdims=True) / LARGEST
  return encode(x_TD / jnp.where(scale_T1 > 0, scale_T1, 1.0)), scale_T1


def encode(x: jax.Array) -> jax.Array:
  """The nearest values of float8_e4m3fn; what is beyond the largest becomes it."""
  return rounding.narrowed(jnp.clip(x, -LARGEST, LARGEST), DTYPE)


def fp8_dot(x_TD: jax.Array, w_DF: jax.Array, *, out_first: bool = False) -> jax.Array:
  """The product of two arrays of float8_e4m3fn.

  Args:
    x_TD: [..., D]; for a stacked weight [*stack, ..., D].
    w_DF: [*stack, D, F], or [*stack, F, D] if `out_first`.
    out_first: the weight is held with its output axis first.

  Returns:
    float32 [..., F] or [*stack, ..., F].

  Raises:
    InputError: another dtype, or axes that do not match.
  """
  w_in = -1 if out_first else -2
  in_dim, stack = w_DF.shape[w_in], w_DF.shape[:-2]
  require(
    x_TD.dtype == DTYPE and w_DF.dtype == DTYPE,
    f"fp8_dot needs float8_e4m3fn, got {x_TD.dtype} and {w_DF.dtype}",
  )
  require(
    x_TD.shape[-1] == in_dim and x_TD.shape[: len(stack)] == stack,
    f"fp8_dot of x {x_TD.shape} with a weight of input dim {in_dim} and stack {stack}; "
    f"x must be [*stack, ..., {in_dim}]",
  )
  batch = tuple(range(len(stack)))
  contract = ((x_TD.ndim - 1,), (w_DF.ndim + w_in,))
  return jax.lax.dot_general(
    x_TD, w_DF, (contract, (batch, batch)), preferred_element_type=jnp.float32
  )
