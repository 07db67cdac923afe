"""The delta rules, token by token, in float32.

Yang et al. 2024, arXiv:2406.06484, eq. 3, and with decay Yang, Kautz and Hatamizadeh
2024, arXiv:2412.06464, eq. 10: the definition the fast form is tested with.

Letters: G key heads, H value heads, K and V sizes of a key and of a value head.
"""

import jax
import jax.numpy as jnp
from jax import lax


def delta_rule(
  q_BLGK: jax.Array,
  k_BLGK: jax.Array,
  v_BLHV: jax.Array,
  beta_BLH: jax.Array,
  g_BLH: jax.Array | None = None,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHKV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """S = e^g S, then S = S + k (beta (v - S^T k))^T and o = S^T q / sqrt(K).

  Args and returns are those of `delta.delta_rule`, all in float32.
  """
  num_rows, length, num_keys, key_dim = q_BLGK.shape
  num_heads, value_dim = v_BLHV.shape[2:]
  q_BLHK, k_BLHK = (
    jnp.repeat(z, num_heads // num_keys, axis=2) for z in (q_BLGK, k_BLGK)
  )
  if g_BLH is None:
    g_BLH = jnp.zeros_like(beta_BLH)
  if segments_BL is None:
    segments_BL = jnp.ones((num_rows, length), jnp.int32)
  if initial_state_BHKV is None:
    shape = (num_rows, num_heads, key_dim, value_dim)
    initial_state_BHKV = jnp.zeros(shape, jnp.float32)

  def token(carry, inputs):
    s_BHKV, segment_B = carry
    q_BHK, k_BHK, v_BHV, beta_BH, g_BH, next_B = inputs
    real_B = next_B != 0
    reset_B = real_B & (segment_B != 0) & (segment_B != next_B)
    s_BHKV = jnp.where(reset_B[:, None, None, None], 0.0, s_BHKV)
    new_BHKV = jnp.exp(g_BH)[..., None, None] * s_BHKV
    held_BHV = jnp.sum(new_BHKV * k_BHK[..., None], axis=-2)
    write_BHV = beta_BH[..., None] * (v_BHV - held_BHV)
    new_BHKV = new_BHKV + k_BHK[..., None] * write_BHV[:, :, None]
    s_BHKV = jnp.where(real_B[:, None, None, None], new_BHKV, s_BHKV)
    o_BHV = jnp.sum(s_BHKV * q_BHK[..., None], axis=-2) / key_dim**0.5
    return (s_BHKV, jnp.where(real_B, next_B, segment_B)), o_BHV

  arrays = (q_BLHK, k_BLHK, v_BLHV, beta_BLH, g_BLH)
  wide = (z.astype(jnp.float32) for z in arrays)
  over_time = tuple(jnp.moveaxis(z, 1, 0) for z in (*wide, segments_BL))
  # Segment 0 as the current one: none has begun, so the first token resets nothing.
  first_B = jnp.zeros((num_rows,), segments_BL.dtype)
  carry = (initial_state_BHKV.astype(jnp.float32), first_B)
  (s_BHKV, _), o_LBHV = lax.scan(token, carry, over_time)
  return jnp.moveaxis(o_LBHV, 0, 1), s_BHKV
