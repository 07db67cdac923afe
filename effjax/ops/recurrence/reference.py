"""The state-space recurrence of Mamba-2, token by token, in float32.

Dao and Gu 2024, arXiv:2405.21060, eq. 2 with the scalar decay of section 5: the
definition the fast forms are tested with. P is the size of a head, N of its state.
"""

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core.config import require


def ssd(
  x_BLHP: jax.Array,
  dt_BLH: jax.Array,
  a_H: jax.Array,
  b_BLGN: jax.Array,
  c_BLGN: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHPN: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T and y_t = h_t c_t, one t at a time.

  Args and returns are those of `chunked.ssd`, all in float32.
  """
  num_rows, length, num_heads, head_dim = x_BLHP.shape
  num_groups, state_dim = b_BLGN.shape[2:]
  require(num_heads % num_groups == 0, "SSD's groups must divide its heads")
  per_group = num_heads // num_groups
  b_BLHN = jnp.repeat(b_BLGN.astype(jnp.float32), per_group, axis=2)
  c_BLHN = jnp.repeat(c_BLGN.astype(jnp.float32), per_group, axis=2)
  if segments_BL is None:
    segments_BL = jnp.ones((num_rows, length), jnp.int32)
  if initial_state_BHPN is None:
    initial_state_BHPN = jnp.zeros(
      (num_rows, num_heads, head_dim, state_dim), jnp.float32
    )

  def token(carry, inputs):
    h_BHPN, segment_B = carry
    x_BHP, dt_BH, b_BHN, c_BHN, next_B = inputs
    real_B = next_B != 0
    reset_B = real_B & (segment_B != 0) & (segment_B != next_B)
    h_BHPN = jnp.where(reset_B[:, None, None, None], 0.0, h_BHPN)
    decay_BH = jnp.exp(dt_BH * a_H[None, :])
    input_BHPN = (dt_BH[:, :, None] * x_BHP)[..., None] * b_BHN[:, :, None, :]
    new_BHPN = decay_BH[:, :, None, None] * h_BHPN + input_BHPN
    h_BHPN = jnp.where(real_B[:, None, None, None], new_BHPN, h_BHPN)
    y_BHP = jnp.sum(h_BHPN * c_BHN[:, :, None, :], axis=-1)
    return (h_BHPN, jnp.where(real_B, next_B, segment_B)), y_BHP

  over_time = (x_BLHP.astype(jnp.float32), dt_BLH, b_BLHN, c_BLHN, segments_BL)
  # Segment 0 as the current one: none has begun, so the first token resets nothing.
  carry = (
    initial_state_BHPN.astype(jnp.float32),
    jnp.zeros((num_rows,), segments_BL.dtype),
  )
  (h_BHPN, _), y_LBHP = lax.scan(
    token, carry, tuple(jnp.moveaxis(z, 1, 0) for z in over_time)
  )
  return jnp.moveaxis(y_LBHP, 0, 1), h_BHPN
