"""The state-space recurrence of Mamba-2 for one token: the form decoding runs."""

import jax
import jax.numpy as jnp


def ssd_step(
  x_BHP: jax.Array,
  dt_BH: jax.Array,
  a_H: jax.Array,
  b_BGN: jax.Array,
  c_BGN: jax.Array,
  state_BHPN: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """H = exp(dt a) h + dt x b^T, y = h c (arXiv:2405.21060, eq. 2 and section 5).

  Args:
    x_BHP: input, P channels a head.
    dt_BH: step sizes; a row with step size 0 keeps its state.
    a_H: negative decay rates.
    b_BGN, c_BGN: input and output projections; group g serves heads g H/G onwards.
    state_BHPN: state before the token.

  Returns:
    y_BHP in the dtype of x and the new state in float32.
  """
  num_rows, num_heads, head_dim = x_BHP.shape
  num_groups, state_dim = b_BGN.shape[1:]
  # J heads a group: B and C are broadcast to them, never copied.
  grouped = (num_rows, num_groups, num_heads // num_groups)
  dt_BH, a_H = dt_BH.astype(jnp.float32), a_H.astype(jnp.float32)
  decay_BGJ = jnp.exp(dt_BH * a_H[None, :]).reshape(grouped)
  input_BGJP = (x_BHP.astype(jnp.float32) * dt_BH[..., None]).reshape(
    *grouped, head_dim
  )
  b_BGN, c_BGN = b_BGN.astype(jnp.float32), c_BGN.astype(jnp.float32)
  h_BGJPN = state_BHPN.astype(jnp.float32).reshape(*grouped, head_dim, state_dim)
  h_BGJPN = decay_BGJ[..., None, None] * h_BGJPN
  h_BGJPN += input_BGJP[..., None] * b_BGN[:, :, None, None, :]
  y_BGJP = jnp.sum(h_BGJPN * c_BGN[:, :, None, None, :], axis=-1)
  return y_BGJP.reshape(x_BHP.shape).astype(x_BHP.dtype), h_BGJPN.reshape(
    state_BHPN.shape
  )
