"""State-space models with diagonal states, token by token, in float32: the definitions.

Selective scan (Mamba-1): Gu and Dao 2023, arXiv:2312.00752, eq. 2a and 2b, and
algorithm 2.
S4D: Gu et al. 2022, arXiv:2206.11893 with the zero-order hold, in both views:
as a recurrence and as a convolution.

Letters beside the project's: I inner channels, N state of a channel (for S4D the number
of conjugate pairs), the second axis of size 2 real and imaginary part.
"""

import jax
import jax.numpy as jnp
from jax import lax


def selective_scan(
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BNI: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = C_t . h_t, one t at a time.

  Args and returns are those of `selective.selective_scan`, all in float32.
  """
  num_rows, length, channels = x_BLI.shape
  if segments_BL is None:
    segments_BL = jnp.ones((num_rows, length), jnp.int32)
  if initial_state_BNI is None:
    initial_state_BNI = jnp.zeros((num_rows, a_NI.shape[0], channels), jnp.float32)

  def token(carry, inputs):
    h_BNI, segment_B = carry
    x_BI, dt_BI, b_BN, c_BN, next_B = inputs
    real_B, reset_B = _events(segment_B, next_B)
    before_BNI = jnp.where(reset_B[:, None, None], 0.0, h_BNI)
    decay_BNI = jnp.exp(dt_BI[:, None, :] * a_NI[None])
    input_BNI = (dt_BI * x_BI)[:, None, :] * b_BN[:, :, None]
    after_BNI = decay_BNI * before_BNI + input_BNI
    h_BNI = jnp.where(real_B[:, None, None], after_BNI, h_BNI)
    y_BI = jnp.sum(c_BN[:, :, None] * h_BNI, axis=1)
    return (h_BNI, jnp.where(real_B, next_B, segment_B)), y_BI

  over_time = (x_BLI, dt_BLI, b_BLN, c_BLN)
  over_time = tuple(jnp.moveaxis(z.astype(jnp.float32), 1, 0) for z in over_time)
  # Segment 0 as the current one: none has begun, so the first token resets nothing.
  carry = (
    initial_state_BNI.astype(jnp.float32),
    jnp.zeros((num_rows,), segments_BL.dtype),
  )
  (h_BNI, _), y_LBI = lax.scan(token, carry, (*over_time, segments_BL.T))
  return jnp.moveaxis(y_LBI, 0, 1), h_BNI


def s4d(
  x_BLI: jax.Array,
  dt_I: jax.Array,
  a_2NI: jax.Array,
  c_2NI: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_B2NI: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """h_t = Ab h_{t-1} + Bb x_t and y_t = 2 Re(C . h_t), one t at a time.

  Ab = exp(dt A), Bb = (exp(dt A) - 1) / A. Args and returns are those of `s4d.s4d`, all
  in float32.
  """
  num_rows, length, channels = x_BLI.shape
  ab_NI, bb_NI = discretize(dt_I, a_2NI)
  c_NI = lax.complex(c_2NI[0], c_2NI[1])
  if segments_BL is None:
    segments_BL = jnp.ones((num_rows, length), jnp.int32)
  if initial_state_B2NI is None:
    initial_state_B2NI = jnp.zeros((num_rows, *a_2NI.shape), jnp.float32)

  def token(carry, inputs):
    h_BNI, segment_B = carry
    x_BI, next_B = inputs
    real_B, reset_B = _events(segment_B, next_B)
    before_BNI = jnp.where(reset_B[:, None, None], 0.0, h_BNI)
    after_BNI = ab_NI[None] * before_BNI + bb_NI[None] * x_BI[:, None, :]
    h_BNI = jnp.where(real_B[:, None, None], after_BNI, h_BNI)
    y_BI = 2 * jnp.real(jnp.sum(c_NI[None] * h_BNI, axis=1))
    return (h_BNI, jnp.where(real_B, next_B, segment_B)), y_BI

  h_BNI = lax.complex(initial_state_B2NI[:, 0], initial_state_B2NI[:, 1])
  carry = (h_BNI, jnp.zeros((num_rows,), segments_BL.dtype))
  x_LBI = jnp.moveaxis(x_BLI.astype(jnp.float32), 1, 0)
  (h_BNI, _), y_LBI = lax.scan(token, carry, (x_LBI, segments_BL.T))
  return jnp.moveaxis(y_LBI, 0, 1), jnp.stack([h_BNI.real, h_BNI.imag], axis=1)


def s4d_kernel(
  dt_I: jax.Array, a_2NI: jax.Array, c_2NI: jax.Array, length: int
) -> jax.Array:
  """K_l = 2 Re sum_n C_n Bb_n exp(l dt A_n), the convolution's kernel, `[L, I]`.

  `s4d` from a zero state is the causal convolution of x with it.
  """
  _, bb_NI = discretize(dt_I, a_2NI)
  c_NI = lax.complex(c_2NI[0], c_2NI[1])
  exponent_NI = lax.complex(a_2NI[0], a_2NI[1]) * dt_I[None, :]
  steps_L = jnp.arange(length, dtype=jnp.float32)
  powers_LNI = jnp.exp(steps_L[:, None, None] * exponent_NI[None])
  return 2 * jnp.real(jnp.sum((c_NI * bb_NI)[None] * powers_LNI, axis=1))


def s4d_convolution(
  x_BLI: jax.Array, dt_I: jax.Array, a_2NI: jax.Array, c_2NI: jax.Array
) -> jax.Array:
  """What `s4d` gives from a zero state, by products of spectra padded to 2 L."""
  length = x_BLI.shape[1]
  kernel_LI = s4d_kernel(dt_I, a_2NI, c_2NI, length)
  spectrum_FI = jnp.fft.rfft(kernel_LI, n=2 * length, axis=0)
  spectrum_BFI = jnp.fft.rfft(x_BLI.astype(jnp.float32), n=2 * length, axis=1)
  y_BLI = jnp.fft.irfft(spectrum_BFI * spectrum_FI[None], n=2 * length, axis=1)
  return y_BLI[:, :length]


def discretize(dt_I: jax.Array, a_2NI: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Complex Ab and Bb of the zero-order hold."""
  a_NI = lax.complex(a_2NI[0], a_2NI[1])
  return jnp.exp(a_NI * dt_I[None, :]), jnp.expm1(a_NI * dt_I[None, :]) / a_NI


def _events(segment_B: jax.Array, next_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Whether the next token is real, and whether it starts another document."""
  real_B = next_B != 0
  return real_B, real_B & (segment_B != 0) & (segment_B != next_B)
