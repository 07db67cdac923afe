"""Softmax attention for training, written so that XLA runs it fast.

The same function as `reference.attention`. What makes it faster, by measurement of
forward and backward on a CPU (B 16, L 256, H 4, G 2, K 64: 1.9 times the speed of
`jax.nn.dot_product_attention`, 1.5 times that of one plain block):

- the R = H / G query heads of a group are rows of one matrix product, so keys and
  values are never repeated, and the scores are laid out [B, G, R, L, S];
- the causal form without explicit positions goes through a few blocks of queries and
  never computes the keys after (or, with a window, before) a block;
- weights are normalised after the product with the values: K divisions a row, not S;
- the mask is a term of the sum; rows of padding are zeroed by their maximum.

Local letters: R query heads a group, C queries of one block.
"""

import jax
import jax.numpy as jnp

from effjax.core.config import require
from effjax.ops.attention import masks


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
  window: int | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Attention of every query over the keys it may see.

  Packed documents need segments only: inside a segment the order of the positions is
  the order of the indices. Explicit positions are for sequences in another order, and
  cost the blocks their saving.

  Args:
    q_BLHK, k_BSGK, v_BSGK: float32 or bfloat16; H is a multiple of G.
    causal: a query sees keys whose position is not after its own.
    q_positions_BL, kv_positions_BS: int32; default 0..L-1 and 0..S-1; one of them alone
      serves both if L == S.
    q_segments_BL, kv_segments_BS: int32; a query sees keys of its own segment, and
      segment 0 (padding) neither sees nor is seen; q's serves both if L == S.
    window: a query sees the `window` last positions up to its own (needs causal).
    scale: factor of the scores, default K ** -0.5.

  Returns:
    y_BLHK in the dtype of q. Scores, softmax and sums are float32. Rows that see no key
    are zero and have zero gradients.

  Raises:
    InputError: H not a multiple of G, a window without causal, segments of one side
      only with L != S.
  """
  _check(q_BLHK, k_BSGK, causal, window)
  num_rows, q_len, _, head_dim = q_BLHK.shape
  kv_len, num_groups = k_BSGK.shape[1:3]
  in_order = causal and q_len == kv_len
  in_order = in_order and q_positions_BL is None and kv_positions_BS is None
  q_pos, kv_pos = _both(q_positions_BL, kv_positions_BS, q_len, kv_len, "positions")
  q_seg, kv_seg = _both(q_segments_BL, kv_segments_BS, q_len, kv_len, "segments")
  q_pos = jnp.arange(q_len)[None] if q_pos is None else q_pos
  kv_pos = jnp.arange(kv_len)[None] if kv_pos is None else kv_pos

  scale = head_dim**-0.5 if scale is None else scale
  q_BLGRK = q_BLHK.reshape(num_rows, q_len, num_groups, -1, head_dim)
  q_BGRLK = (q_BLGRK * scale).astype(q_BLHK.dtype).transpose(0, 2, 3, 1, 4)
  k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)

  blocks = []
  for rows, keys in _blocks(q_len, kv_len, in_order, window):
    bias_BCS = masks.bias_BCS(
      q_pos[:, rows],
      kv_pos[:, keys],
      causal=causal,
      window=window,
      q_segments=None if q_seg is None else q_seg[:, rows],
      kv_segments=None if kv_seg is None else kv_seg[:, keys],
    )
    blocks.append(
      attend(q_BGRLK[:, :, :, rows], k_BGSK[:, :, keys], v_BGSK[:, :, keys], bias_BCS)
    )
  y_BGRLK = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
  y_BLGRK = y_BGRLK.transpose(0, 3, 1, 2, 4)
  return y_BLGRK.reshape(q_BLHK.shape).astype(q_BLHK.dtype)


def attend(
  q_BGRCK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, bias_BCS: jax.Array
) -> jax.Array:
  """One dense block: scaled queries against keys, with a mask added to the scores.

  Returns y_BGRCK in float32; a row whose bias is `MASKED` everywhere is zero.
  """
  num_rows, num_groups, num_repeats, num_queries, head_dim = q_BGRCK.shape
  flat = (num_rows, num_groups, num_repeats * num_queries)
  s_BGMS = jnp.einsum(
    "bgmk,bgsk->bgms",
    q_BGRCK.reshape(*flat, head_dim),
    k_BGSK,
    preferred_element_type=jnp.float32,
  )
  s_BGRCS = s_BGMS.reshape(*q_BGRCK.shape[:4], -1) + bias_BCS[:, None, None]
  # The maximum only guards the exponential; the result does not depend on it.
  max_BGRC1 = jax.lax.stop_gradient(s_BGRCS.max(-1, keepdims=True))
  e_BGRCS = jnp.exp(s_BGRCS - max_BGRC1)
  sum_BGRC1 = e_BGRCS.sum(-1, keepdims=True)
  y_BGMK = jnp.einsum(
    "bgms,bgsk->bgmk",
    e_BGRCS.reshape(*flat, -1).astype(v_BGSK.dtype),
    v_BGSK,
    preferred_element_type=jnp.float32,
  )
  alive_BGRC1 = max_BGRC1 > masks.MASKED / 2
  return y_BGMK.reshape(q_BGRCK.shape) * jnp.where(alive_BGRC1, 1 / sum_BGRC1, 0.0)


def computed_pairs(
  q_len: int, kv_len: int, *, in_order: bool = True, window: int | None = None
) -> int:
  """Pairs of query and key that `attention` multiplies, masked ones included.

  The dots it executes take 4 * pairs * K FLOPs a row and query head. `in_order` is
  causal with no explicit positions and L == S.
  """
  blocks = _blocks(q_len, kv_len, in_order, window)
  return sum((q.stop - q.start) * (k.stop - k.start) for q, k in blocks)


def _blocks(
  q_len: int, kv_len: int, in_order: bool, window: int | None
) -> list[tuple[slice, slice]]:
  """Slices of queries, each with the slice of keys that any of them can see."""
  if not in_order:
    return [(slice(0, q_len), slice(0, kv_len))]
  # Four blocks spare 3/8 of the pairs; more of them pay for long sequences only, and
  # under 32 queries a block the products become too small.
  size = max(32, -(-q_len // (4 if q_len < 1024 else 8)))
  blocks = []
  for start in range(0, q_len, size):
    stop = min(start + size, q_len)
    first = 0 if window is None else max(0, start - window + 1)
    blocks.append((slice(start, stop), slice(first, stop)))
  return blocks


def _check(
  q_BLHK: jax.Array, k_BSGK: jax.Array, causal: bool, window: int | None
) -> None:
  num_heads, num_groups = q_BLHK.shape[2], k_BSGK.shape[2]
  require(
    num_heads % num_groups == 0,
    f"{num_heads} query heads over {num_groups} kv heads; the number of query heads "
    "must be a multiple of the number of kv heads",
  )
  require(
    window is None or (causal and window >= 1),
    f"attention window {window}: needs causal=True and a window of at least 1",
  )


def _both(
  q_side: jax.Array | None,
  kv_side: jax.Array | None,
  q_len: int,
  kv_len: int,
  name: str,
) -> tuple[jax.Array | None, jax.Array | None]:
  """Both sides of a pair of arrays of which one may stand for the other."""
  if (q_side is None) != (kv_side is None):
    require(
      q_len == kv_len,
      f"attention {name} given for one side of {q_len} queries and {kv_len} keys; "
      "give both",
    )
    q_side = kv_side = kv_side if q_side is None else q_side
  return q_side, kv_side
