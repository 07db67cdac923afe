"""Which keys a query may see, as a term added to its scores.

Local letters: C queries of one block, S the keys that block can see.
"""

import jax
import jax.numpy as jnp

# Far below any score, and its sum with a score is still finite in float32.
MASKED = -1e30


def bias_BCS(
  q_positions: jax.Array,
  kv_positions: jax.Array,
  *,
  causal: bool = True,
  window: int | None = None,
  q_segments: jax.Array | None = None,
  kv_segments: jax.Array | None = None,
  lengths_B: jax.Array | None = None,
) -> jax.Array:
  """Zero where a query sees a key, `MASKED` where not.

  Args:
    q_positions, kv_positions: int32 [B or 1, C] and [B or 1, S].
    causal: keys after the query are hidden.
    window: keys `window` or more positions before the query are hidden.
    q_segments, kv_segments: int32 [B, C] and [B, S], or neither; other segments and
      segment 0 are hidden.
    lengths_B: int32; keys whose *position* is not below it are hidden.

  Returns:
    float32 [B or 1, C, S].
  """
  q_BC1, kv_B1S = q_positions[:, :, None], kv_positions[:, None, :]
  seen = jnp.ones((1, q_positions.shape[1], kv_positions.shape[1]), bool)
  if causal:
    seen &= q_BC1 >= kv_B1S
  if window is not None:
    seen &= q_BC1 - kv_B1S < window
  if q_segments is not None:
    kv_seg_B1S = kv_segments[:, None, :]
    seen &= (q_segments[:, :, None] == kv_seg_B1S) & (kv_seg_B1S > 0)
  if lengths_B is not None:
    seen &= kv_B1S < lengths_B[:, None, None]
  return jnp.where(seen, 0.0, MASKED).astype(jnp.float32)
