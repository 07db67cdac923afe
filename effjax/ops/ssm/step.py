"""State-space models with diagonal states for one token: the form decoding runs."""

import jax
import jax.numpy as jnp

from effjax.ops.ssm import s4d


def selective_step(
  x_BI: jax.Array,
  dt_BI: jax.Array,
  a_NI: jax.Array,
  b_BN: jax.Array,
  c_BN: jax.Array,
  state_BNI: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One step of the selective scan (arXiv:2312.00752, eq. 2a and 2b).

  h = exp(dt A) h + dt B x and y = C . h.

  Args:
    x_BI: input.
    dt_BI: step sizes; a row with step size 0 keeps its state.
    a_NI: negative decay rates.
    b_BN, c_BN: input and output projections.
    state_BNI: state before the token.

  Returns:
    y_BI in the dtype of x and the new state in float32.
  """
  dt_BI, b_BN, c_BN = (z.astype(jnp.float32) for z in (dt_BI, b_BN, c_BN))
  decay_BNI = jnp.exp(dt_BI[:, None, :] * a_NI.astype(jnp.float32)[None])
  input_BI = dt_BI * x_BI.astype(jnp.float32)
  h_BNI = decay_BNI * state_BNI.astype(jnp.float32)
  h_BNI += b_BN[:, :, None] * input_BI[:, None, :]
  y_BI = jnp.sum(c_BN[:, :, None] * h_BNI, axis=1)
  return y_BI.astype(x_BI.dtype), h_BNI


def s4d_step(
  x_BI: jax.Array,
  dt_I: jax.Array,
  a_2NI: jax.Array,
  c_2NI: jax.Array,
  state_B2NI: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One step of S4D (arXiv:2206.11893, the recurrent view).

  h = Ab h + Bb x and y = 2 Re(C . h).

  Args:
    x_BI: input.
    dt_I: step sizes.
    a_2NI, c_2NI: complex rates and output weights, real parts first.
    state_B2NI: state before the token.

  Returns:
    y_BI in the dtype of x and the new state in float32.
  """
  dt_I, a_2NI, c_2NI = (z.astype(jnp.float32) for z in (dt_I, a_2NI, c_2NI))
  ab, bb = s4d.discretize(dt_I, a_2NI)
  real_BNI, imag_BNI = state_B2NI[:, 0], state_B2NI[:, 1]
  x_B1I = x_BI.astype(jnp.float32)[:, None, :]
  h_B2NI = jnp.stack(
    [
      ab[0][None] * real_BNI - ab[1][None] * imag_BNI + bb[0][None] * x_B1I,
      ab[0][None] * imag_BNI + ab[1][None] * real_BNI + bb[1][None] * x_B1I,
    ],
    axis=1,
  )
  signed_2NI = jnp.stack([2 * c_2NI[0], -2 * c_2NI[1]])
  y_BI = jnp.sum(signed_2NI[None] * h_B2NI, axis=(1, 2))
  return y_BI.astype(x_BI.dtype), h_B2NI
