"""Depthwise causal convolution, token by token, in float32: the definition."""

import jax
import jax.numpy as jnp
from jax import lax


def causal_conv(
  x_BLD: jax.Array,
  w_KD: jax.Array,
  bias_D: jax.Array | None = None,
  *,
  segments_BL: jax.Array | None = None,
  state_BKD: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """y_t = bias + sum_k w_k x_{t - (K - 1) + k}, with a window of inputs carried along.

  Args and returns are those of `parallel.causal_conv`, all in float32.
  """
  num_rows, length, channels = x_BLD.shape
  taps = w_KD.shape[0]
  x_BLD, w_KD = x_BLD.astype(jnp.float32), w_KD.astype(jnp.float32)
  if segments_BL is None:
    segments_BL = jnp.ones((num_rows, length), jnp.int32)
  if state_BKD is None:
    state_BKD = jnp.zeros((num_rows, taps - 1, channels), jnp.float32)

  def token(carry, inputs):
    window_BKD, segment_B = carry
    x_BD, next_B = inputs
    real_B = next_B != 0
    reset_B = real_B & (segment_B != 0) & (segment_B != next_B)
    window_BKD = jnp.where(reset_B[:, None, None], 0.0, window_BKD)
    seen_BKD = jnp.concatenate([window_BKD, x_BD[:, None]], axis=1)
    y_BD = jnp.sum(seen_BKD * w_KD[None], axis=1)
    window_BKD = jnp.where(real_B[:, None, None], seen_BKD[:, 1:], window_BKD)
    return (window_BKD, jnp.where(real_B, next_B, segment_B)), y_BD

  carry = (state_BKD.astype(jnp.float32), jnp.zeros((num_rows,), segments_BL.dtype))
  over_time = (jnp.moveaxis(x_BLD, 1, 0), jnp.moveaxis(segments_BL, 1, 0))
  (state_BKD, _), y_LBD = lax.scan(token, carry, over_time)
  y_BLD = jnp.moveaxis(y_LBD, 0, 1)
  if bias_D is not None:
    y_BLD += bias_D.astype(jnp.float32)[None, None, :]
  return y_BLD, state_BKD
