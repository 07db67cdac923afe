"""Attention of new tokens over a key/value cache.

The cache is [B, G, S, K] for keys and for values: the scores contract its last axis and
the result its second to last, so each group is one matrix as it lies in memory and no
product copies or transposes it. Slot s of the cache holds position s, unless positions
of the slots are given.

Local letters: R query heads a group, W size of a value head.
"""

import jax
import jax.numpy as jnp

from effjax.core.config import require
from effjax.ops.attention import blockwise, masks, patterns, xla

# A prompt with so many pairs of query and slot does not hold its scores in memory.
_MANY_PAIRS = 2**20


def decode_attention(
  q_BHK: jax.Array,
  k_BGSK: jax.Array,
  v_BGSW: jax.Array,
  length_B: jax.Array,
  *,
  pattern: patterns.Pattern = patterns.CAUSAL,
  slopes_H: jax.Array | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
) -> jax.Array:
  """One query a sequence over the first `length` slots of its cache.

  Args:
    q_BHK: the query of the newest token, whose key is in slot `length_B - 1`.
    k_BGSK, v_BGSW: the cache; slots from `length_B` on may hold anything finite.
    length_B: int32, valid slots of each sequence, the new token included.
    pattern, slopes_H, logit_cap, scale: as for `cached_attention`.

  Returns:
    y_BHW in the dtype of q, computed in float32; zero where the length is 0.
  """
  y_BLHW = cached_attention(
    q_BHK[:, None],
    k_BGSK,
    v_BGSW,
    length_B[:, None] - 1,
    length_B,
    pattern=pattern,
    slopes_H=slopes_H,
    logit_cap=logit_cap,
    scale=scale,
  )
  return y_BLHW[:, 0]


def cached_attention(
  q_BLHK: jax.Array,
  k_BGSK: jax.Array,
  v_BGSW: jax.Array,
  q_positions_BL: jax.Array,
  length_B: jax.Array,
  *,
  kv_positions_BS: jax.Array | None = None,
  pattern: patterns.Pattern = patterns.CAUSAL,
  slopes_H: jax.Array | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Several queries a sequence over its cache: a prompt, or a part of one.

  A long prompt goes through `blockwise`, which skips what follows it in the cache if
  all rows start with it. Otherwise every slot is multiplied, used or not.

  Args:
    q_BLHK: queries; their own keys and values are in the cache already.
    k_BGSK, v_BGSW: the cache; slots that are not valid may hold anything finite.
    q_positions_BL: int32, position of each query in its sequence.
    length_B: int32, tokens of each sequence; positions from there on are not valid.
    kv_positions_BS: int32, position that each slot holds, by default its index;
      negative where it holds nothing.
    pattern: who sees whom; causal.
    slopes_H: m of the bias -m |q_pos - k_pos| on the scores, without gradient.
    logit_cap: c of `c * tanh(scores / c)`, before bias and mask.
    scale: factor of the scores, default K ** -0.5.

  Returns:
    y_BLHW in the dtype of q, computed in float32; zero where no slot is seen.

  Raises:
    InputError: H not a multiple of G; a pattern that looks ahead.
  """
  num_rows, q_len, num_heads, head_dim = q_BLHK.shape
  num_groups, kv_len = k_BGSK.shape[1:3]
  require(
    num_heads % num_groups == 0,
    f"{num_heads} query heads over a cache of {num_groups} kv heads; the number of "
    "query heads must be a multiple of the number of kv heads",
  )
  require(pattern.causal, f"{pattern} looks ahead: it cannot decode step by step")
  scale = head_dim**-0.5 if scale is None else scale
  slots_BS = jnp.arange(kv_len)[None] if kv_positions_BS is None else kv_positions_BS
  if is_blockwise(q_len, kv_len):
    held_BS = (slots_BS >= 0) & (slots_BS < length_B[:, None])
    return blockwise.attention(
      q_BLHK.astype(k_BGSK.dtype),
      k_BGSK.transpose(0, 2, 1, 3),
      v_BGSW.transpose(0, 2, 1, 3),
      pattern=pattern,
      q_positions_BL=q_positions_BL,
      kv_positions_BS=slots_BS,
      q_segments_BL=jnp.ones((num_rows, q_len), jnp.int32),
      kv_segments_BS=held_BS.astype(jnp.int32),
      slopes_H=slopes_H,
      logit_cap=logit_cap,
      scale=scale,
    ).astype(q_BLHK.dtype)
  q_BLGRK = q_BLHK.reshape(num_rows, q_len, num_groups, -1, head_dim)
  q_BGRLK = (q_BLGRK * scale).astype(k_BGSK.dtype).transpose(0, 2, 3, 1, 4)
  bias_BLS = masks.bias_BCS(
    pattern, masks.Tokens(q_positions_BL), masks.Tokens(slots_BS), lengths_B=length_B
  )
  if kv_positions_BS is not None:
    empty_B1S = kv_positions_BS[:, None, :] < 0
    bias_BLS = jnp.where(empty_B1S, masks.MASKED, bias_BLS)
  bias_BGRLS = xla.slope_bias(slopes_H, q_positions_BL, slots_BS, num_groups)
  single = q_BGRLK.shape[2] * q_len == 1 and k_BGSK.dtype != jnp.float32
  if single:
    # XLA's CPU backend copies a whole bfloat16 cache to float32 for the product with
    # one row, and not for two.
    q_BGRLK = jnp.concatenate([q_BGRLK, q_BGRLK], axis=3)
  y_BGRLW = xla.attend(
    q_BGRLK, k_BGSK, v_BGSW, bias_BLS, bias_BGRLS, logit_cap=logit_cap
  )
  y_BLGRW = y_BGRLW[:, :, :, :q_len].transpose(0, 3, 1, 2, 4)
  return y_BLGRW.reshape(num_rows, q_len, num_heads, -1).astype(q_BLHK.dtype)


def is_blockwise(q_len: int, kv_len: int) -> bool:
  """Whether so many queries and slots go through `blockwise`, and not in one block."""
  return q_len > 1 and q_len * kv_len >= _MANY_PAIRS
