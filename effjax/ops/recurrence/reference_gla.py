"""Gated linear attention, token by token, in float32.

Yang et al. 2023, arXiv:2312.06635, eq. 3: the definition the fast form is tested with.
K and V are the sizes of a key and of a value head.
"""

import jax
import jax.numpy as jnp
from jax import lax


def gla(
  q_BLHK: jax.Array,
  k_BLHK: jax.Array,
  v_BLHV: jax.Array,
  g_BLHK: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHKV: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T and o_t = S_t^T q_t / sqrt(K).

  Args and returns are those of `gla.gla`, all in float32.
  """
  num_rows, length, num_heads, key_dim = q_BLHK.shape
  if segments_BL is None:
    segments_BL = jnp.ones((num_rows, length), jnp.int32)
  if initial_state_BHKV is None:
    shape = (num_rows, num_heads, key_dim, v_BLHV.shape[-1])
    initial_state_BHKV = jnp.zeros(shape, jnp.float32)

  def token(carry, inputs):
    s_BHKV, segment_B = carry
    q_BHK, k_BHK, v_BHV, g_BHK, next_B = inputs
    real_B = next_B != 0
    reset_B = real_B & (segment_B != 0) & (segment_B != next_B)
    s_BHKV = jnp.where(reset_B[:, None, None, None], 0.0, s_BHKV)
    new_BHKV = jnp.exp(g_BHK)[..., None] * s_BHKV + k_BHK[..., None] * v_BHV[:, :, None]
    s_BHKV = jnp.where(real_B[:, None, None, None], new_BHKV, s_BHKV)
    o_BHV = jnp.sum(s_BHKV * q_BHK[..., None], axis=-2) / key_dim**0.5
    return (s_BHKV, jnp.where(real_B, next_B, segment_B)), o_BHV

  wide = (z.astype(jnp.float32) for z in (q_BLHK, k_BLHK, v_BLHV, g_BLHK))
  over_time = tuple(jnp.moveaxis(z, 1, 0) for z in (*wide, segments_BL))
  # Segment 0 as the current one: none has begun, so the first token resets nothing.
  first_B = jnp.zeros((num_rows,), segments_BL.dtype)
  carry = (initial_state_BHKV.astype(jnp.float32), first_B)
  (s_BHKV, _), o_LBHV = lax.scan(token, carry, over_time)
  return jnp.moveaxis(o_LBHV, 0, 1), s_BHKV
