"""Attention of new tokens over a key/value cache.

The cache is [B, G, S, K] for keys and for values: the scores contract its last axis and
the result its second to last, so each group is one matrix as it lies in memory and no
product copies or transposes it. Slot s of the cache holds position s.

Local letter: R query heads a group.
"""

import jax
import jax.numpy as jnp

from effjax.core.config import require
from effjax.ops.attention import masks, xla


def decode_attention(
  q_BHK: jax.Array,
  k_BGSK: jax.Array,
  v_BGSK: jax.Array,
  length_B: jax.Array,
  *,
  scale: float | None = None,
  window: int | None = None,
) -> jax.Array:
  """One query a sequence over the first `length` slots of its cache.

  Args:
    q_BHK: the query of the newest token, whose key is in slot `length_B - 1`.
    k_BGSK, v_BGSK: the cache; slots from `length_B` on may hold anything finite.
    length_B: int32, valid slots of each sequence, the new token included.
    scale: factor of the scores, default K ** -0.5.
    window: only the last so many valid slots are seen.

  Returns:
    y_BHK in the dtype of q, computed in float32; zero where the length is 0.
  """
  y_BLHK = cached_attention(
    q_BHK[:, None],
    k_BGSK,
    v_BGSK,
    length_B[:, None] - 1,
    length_B,
    scale=scale,
    window=window,
  )
  return y_BLHK[:, 0]


def cached_attention(
  q_BLHK: jax.Array,
  k_BGSK: jax.Array,
  v_BGSK: jax.Array,
  q_positions_BL: jax.Array,
  length_B: jax.Array,
  *,
  scale: float | None = None,
  window: int | None = None,
) -> jax.Array:
  """Several queries a sequence over its cache: a prompt, or a part of one.

  Every slot of the cache is multiplied, used or not; a prompt that starts an empty
  cache is cheaper through `xla.attention` over its own keys.

  Args:
    q_BLHK: queries; their own keys and values are in the cache already.
    k_BGSK, v_BGSK: the cache; slots from `length_B` on may hold anything finite.
    q_positions_BL: int32, position of each query; it sees the slots up to its own.
    length_B: int32, valid slots of each sequence.
    scale: factor of the scores, default K ** -0.5.
    window: a query sees the `window` last positions up to its own.

  Returns:
    y_BLHK in the dtype of q, computed in float32; zero where no slot is seen.
  """
  num_rows, q_len, num_heads, head_dim = q_BLHK.shape
  num_groups, kv_len = k_BGSK.shape[1:3]
  require(
    num_heads % num_groups == 0,
    f"{num_heads} query heads over a cache of {num_groups} kv heads; the number of "
    "query heads must be a multiple of the number of kv heads",
  )
  scale = head_dim**-0.5 if scale is None else scale
  q_BLGRK = q_BLHK.reshape(num_rows, q_len, num_groups, -1, head_dim)
  q_BGRLK = (q_BLGRK * scale).astype(k_BGSK.dtype).transpose(0, 2, 3, 1, 4)
  bias_BLS = masks.bias_BCS(
    q_positions_BL, jnp.arange(kv_len)[None], window=window, lengths_B=length_B
  )
  single = q_BGRLK.shape[2] * q_len == 1 and k_BGSK.dtype != jnp.float32
  if single:
    # XLA's CPU backend copies a whole bfloat16 cache to float32 for the product with
    # one row, and not for two.
    q_BGRLK = jnp.concatenate([q_BGRLK, q_BGRLK], axis=3)
  y_BGRLK = xla.attend(q_BGRLK, k_BGSK, v_BGSK, bias_BLS)[:, :, :, :q_len]
  y_BLGRK = y_BGRLK.transpose(0, 3, 1, 2, 4)
  return y_BLGRK.reshape(q_BLHK.shape).astype(q_BLHK.dtype)
