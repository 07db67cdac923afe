"""Attention whose keys and values are linear maps of one latent, without those maps.

DeepSeek-AI 2024 (arXiv:2405.04434), section 2.1.2: the score of head h is
`q_h . (U_h c_s) = (U_h^T q_h) . c_s`, so the up-projection of the keys moves to the
queries; the weighted sum of values `V_h c_s` is V_h times the weighted sum of latents,
so theirs moves behind the sum. What is left is multi-query attention with one wide
head, over a cache of latents that is never expanded.

Local letters: R entries of the latent, J entries of the rotated key all heads share,
P entries of a value, M = H * C rows of one matrix product for C queries, I = H * K.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Far below any score, and its sum with a score is still finite in float32.
_MASKED = -1e30
# Queries whose scores are in memory at once.
_BLOCK = 128


def absorbed_attention(
  q_BLHK: jax.Array,
  q_rope_BLHJ: jax.Array,
  c_BSR: jax.Array,
  k_rope_BSJ: jax.Array,
  k_up_RI: jax.Array,
  v_up_RI: jax.Array,
  q_slots_BL: jax.Array,
  length_B: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """One or several queries a sequence over its cache of latents.

  Args:
    q_BLHK: the part of the queries that is not rotated.
    q_rope_BLHJ: the rotated part.
    c_BSR: the cache of latents; slots from `length_B` on may hold anything finite.
    k_rope_BSJ: the cache of rotated keys, likewise.
    k_up_RI: from latents to keys, heads merged: `[R, H * K]`.
    v_up_RI: from latents to values, `[R, H * P]`.
    q_slots_BL: int32, the slot of each query's own latent; it sees slots up to it.
    length_B: int32, valid slots of each row.
    scale: factor of the scores.

  Returns:
    y_BLHP in the dtype of the queries, zero where no slot is seen; scores, softmax and
    weighted sums are float32.
  """
  dtype, num_heads = q_BLHK.dtype, q_BLHK.shape[2]
  per_head = lambda w: w.astype(dtype).reshape(w.shape[0], num_heads, -1)
  q_c_BLHR = jnp.einsum("blhk,rhk->blhr", q_BLHK, per_head(k_up_RI))
  queries = (q_c_BLHR * scale, q_rope_BLHJ * scale, q_slots_BL)
  attend = lambda block: _attend(*block, c_BSR, k_rope_BSJ, length_B)
  y_BLHR = _in_blocks(attend, queries, q_slots_BL.shape[1]).astype(dtype)
  return jnp.einsum("blhr,rhp->blhp", y_BLHR, per_head(v_up_RI))


def _in_blocks(
  attend: Callable[[tuple[jax.Array, ...]], jax.Array],
  queries: tuple[jax.Array, ...],
  num_queries: int,
) -> jax.Array:
  """`attend` over blocks of queries, so that the scores of a long prompt fit."""
  if num_queries <= _BLOCK:
    return attend(queries)
  num_blocks = -(-num_queries // _BLOCK)

  def blocks(x: jax.Array) -> jax.Array:
    padding = [(0, 0), (0, num_blocks * _BLOCK - num_queries)]
    x = jnp.pad(x, padding + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], num_blocks, _BLOCK, *x.shape[2:]).swapaxes(0, 1)

  y_NBCHR = jax.lax.map(attend, jax.tree.map(blocks, queries))
  y_BNCHR = y_NBCHR.swapaxes(0, 1)
  y_BLHR = y_BNCHR.reshape(y_BNCHR.shape[0], -1, *y_BNCHR.shape[3:])
  return y_BLHR[:, :num_queries]


def _attend(
  q_c_BCHR: jax.Array,
  q_rope_BCHJ: jax.Array,
  q_slots_BC: jax.Array,
  c_BSR: jax.Array,
  k_rope_BSJ: jax.Array,
  length_B: jax.Array,
) -> jax.Array:
  """One block of scaled queries over the whole cache."""
  num_rows, num_queries, num_heads, _ = q_c_BCHR.shape
  # Heads before queries: a step's rows of scores then share one row of the mask.
  rows = lambda q, dtype: (
    q.swapaxes(1, 2).reshape(num_rows, num_heads * num_queries, -1).astype(dtype)
  )
  single = num_heads * num_queries == 1 and c_BSR.dtype != jnp.float32

  def score(q_BCHK: jax.Array, k_BSK: jax.Array) -> jax.Array:
    q_BMK = rows(q_BCHK, k_BSK.dtype)
    if single:
      # XLA's CPU backend copies a whole bfloat16 cache to float32 for the product
      # with one row, and not for two.
      q_BMK = jnp.concatenate([q_BMK, q_BMK], axis=1)
    return jnp.einsum("bmk,bsk->bms", q_BMK, k_BSK, preferred_element_type=jnp.float32)

  s_BMS = score(q_c_BCHR, c_BSR) + score(q_rope_BCHJ, k_rope_BSJ)
  slots_S = jnp.arange(c_BSR.shape[1])[None, None]
  seen_BCS = (slots_S <= q_slots_BC[:, :, None]) & (slots_S < length_B[:, None, None])
  bias_BCS = jnp.where(seen_BCS, 0.0, _MASKED).astype(jnp.float32)
  s_BHCS = s_BMS.reshape(num_rows, -1, num_queries, s_BMS.shape[-1])
  s_BMS = (s_BHCS + bias_BCS[:, None]).reshape(s_BMS.shape)
  max_BM1 = jax.lax.stop_gradient(s_BMS.max(-1, keepdims=True))
  e_BMS = jnp.exp(s_BMS - max_BM1)
  y_BMR = jnp.einsum(
    "bms,bsr->bmr",
    e_BMS.astype(c_BSR.dtype),
    c_BSR,
    preferred_element_type=jnp.float32,
  )
  alive_BM1 = max_BM1 > _MASKED / 2
  y_BMR = y_BMR * jnp.where(alive_BM1, 1 / e_BMS.sum(-1, keepdims=True), 0.0)
  y_BHCR = y_BMR.reshape(num_rows, -1, num_queries, c_BSR.shape[-1])
  return y_BHCR[:, :num_heads].swapaxes(1, 2)
