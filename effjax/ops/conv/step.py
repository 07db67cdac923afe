"""Depthwise causal convolution for one token: the form decoding runs."""

import jax
import jax.numpy as jnp


def causal_conv_step(
  x_BD: jax.Array,
  w_KD: jax.Array,
  bias_D: jax.Array | None,
  state_BKD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The taps times the last K - 1 inputs and this one, summed, plus the bias.

  Args:
    x_BD: the token's input.
    w_KD: taps, the last one for the token itself.
    bias_D: optional bias.
    state_BKD: the K - 1 inputs before, oldest first.

  Returns:
    y_BD in the dtype of x and the state with x in place of the oldest input.
  """
  state_dtype = state_BKD.dtype
  seen_BKD = jnp.concatenate([state_BKD.astype(x_BD.dtype), x_BD[:, None]], axis=1)
  y_BD = jnp.sum(seen_BKD.astype(jnp.float32) * w_KD.astype(jnp.float32)[None], axis=1)
  if bias_D is not None:
    y_BD += bias_D.astype(jnp.float32)[None, :]
  return y_BD.astype(x_BD.dtype), seen_BKD[:, 1:].astype(state_dtype)
