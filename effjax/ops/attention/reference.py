"""Naive softmax attention in float32: the definition the fast forms are tested with.

Vaswani et al. 2017 (arXiv:1706.03762), eq. 1, with grouped queries (Ainslie et al.
2023, arXiv:2305.13245): query head h reads key/value group h // (H / G).
"""

import jax
import jax.numpy as jnp

from effjax.core.config import require


def attention(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  *,
  causal: bool = True,
  q_positions_BL: jax.Array | None = None,
  kv_positions_BS: jax.Array | None = None,
  q_segments_BL: jax.Array | None = None,
  kv_segments_BS: jax.Array | None = None,
  kv_lengths_B: jax.Array | None = None,
  window: int | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Attention head by head, every pair of query and key, no rearrangement.

  Args:
    q_BLHK, k_BSGK, v_BSGK: queries, keys, values; H is a multiple of G.
    causal: a query sees keys whose position is not after its own.
    q_positions_BL, kv_positions_BS: int32; default 0..L-1 and 0..S-1.
    q_segments_BL, kv_segments_BS: int32; a query sees keys of its own segment, and
      segment 0 (padding) neither sees nor is seen.
    kv_lengths_B: int32; only the first so many keys of a row are valid.
    window: a query sees the `window` last positions up to its own (needs causal).
    scale: factor of the scores, default K ** -0.5.

  Returns:
    y_BLHK in the dtype of q; rows that see no key are zero.
  """
  num_rows, q_len, num_heads, head_dim = q_BLHK.shape
  kv_len, num_groups = k_BSGK.shape[1:3]
  require(num_heads % num_groups == 0, "num_heads must be a multiple of num_kv_heads")
  scale = head_dim**-0.5 if scale is None else scale
  seen_BLS = jnp.ones((num_rows, q_len, kv_len), bool)
  q_pos = jnp.arange(q_len)[None] if q_positions_BL is None else q_positions_BL
  kv_pos = jnp.arange(kv_len)[None] if kv_positions_BS is None else kv_positions_BS
  if causal:
    seen_BLS &= q_pos[:, :, None] >= kv_pos[:, None, :]
  if window is not None:
    seen_BLS &= q_pos[:, :, None] - kv_pos[:, None, :] < window
  if q_segments_BL is not None:
    kv_seg = q_segments_BL if kv_segments_BS is None else kv_segments_BS
    seen_BLS &= q_segments_BL[:, :, None] == kv_seg[:, None, :]
    seen_BLS &= kv_seg[:, None, :] > 0
  if kv_lengths_B is not None:
    seen_BLS &= jnp.arange(kv_len)[None, None, :] < kv_lengths_B[:, None, None]

  heads = []
  for h in range(num_heads):
    g = h // (num_heads // num_groups)
    q_BLK, k_BSK, v_BSK = (
      x.astype(jnp.float32) for x in (q_BLHK[:, :, h], k_BSGK[:, :, g], v_BSGK[:, :, g])
    )
    s_BLS = scale * jnp.einsum("blk,bsk->bls", q_BLK, k_BSK, precision="highest")
    # A row without any key would be 0/0: let it attend everywhere, then drop it.
    alive_BL1 = seen_BLS.any(-1, keepdims=True)
    p_BLS = jax.nn.softmax(s_BLS, where=seen_BLS | ~alive_BL1)
    y_BLK = jnp.einsum("bls,bsk->blk", p_BLS, v_BSK, precision="highest")
    heads.append(jnp.where(alive_BL1, y_BLK, 0.0))
  return jnp.stack(heads, axis=2).astype(q_BLHK.dtype)
