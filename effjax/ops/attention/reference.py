"""Naive softmax attention in float32: the definition the fast forms are tested with.

Vaswani et al. 2017 (arXiv:1706.03762), eq. 1, with grouped queries (Ainslie et al.
2023, arXiv:2305.13245): query head h reads key/value group h // (H / G). Linear biases
as in Press et al. 2021 (arXiv:2108.12409), section 3; scores capped as in Gemma 2
(arXiv:2408.00118), section 2.

Local letter: W size of a value head.
"""

import jax
import jax.numpy as jnp

from effjax.core.config import require
from effjax.ops.attention import patterns


def attention(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGW: jax.Array,
  *,
  pattern: patterns.Pattern = patterns.CAUSAL,
  q_positions_BL: jax.Array | None = None,
  kv_positions_BS: jax.Array | None = None,
  q_segments_BL: jax.Array | None = None,
  kv_segments_BS: jax.Array | None = None,
  kv_lengths_B: jax.Array | None = None,
  slopes_H: jax.Array | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
) -> jax.Array:
  """Attention head by head, every pair of query and key, no rearrangement.

  Args:
    q_BLHK, k_BSGK, v_BSGW: queries, keys, values; H is a multiple of G.
    pattern: who sees whom inside a document.
    q_positions_BL, kv_positions_BS: int32; default: the index of a token among those of
      its segment.
    q_segments_BL, kv_segments_BS: int32; a query sees keys of its own segment, and
      segment 0 (padding) neither sees nor is seen.
    kv_lengths_B: int32; only the first so many keys of a row are valid.
    slopes_H: m of the bias -m |q_pos - k_pos|, without gradient.
    logit_cap: c of `c * tanh(scores / c)`, before the bias.
    scale: factor of the scores, default K ** -0.5.

  Returns:
    y_BLHW in the dtype of q; rows that see no key are zero.
  """
  num_rows, q_len, num_heads, head_dim = q_BLHK.shape
  kv_len, num_groups = k_BSGK.shape[1:3]
  require(num_heads % num_groups == 0, "num_heads must be a multiple of num_kv_heads")
  scale = head_dim**-0.5 if scale is None else scale
  kv_segments_BS = q_segments_BL if kv_segments_BS is None else kv_segments_BS
  q_places, lengths_BL = _places(q_segments_BL, num_rows, q_len)
  kv_places, _ = _places(kv_segments_BS, num_rows, kv_len)
  q_pos = q_places if q_positions_BL is None else q_positions_BL
  kv_pos = kv_places if kv_positions_BS is None else kv_positions_BS
  q_pos, kv_pos = q_pos[:, :, None], kv_pos[:, None, :]
  seen_BLS = pattern.seen(q_pos, kv_pos, lengths_BL[:, :, None])
  seen_BLS = jnp.broadcast_to(seen_BLS, (num_rows, q_len, kv_len))
  if q_segments_BL is not None:
    seen_BLS &= q_segments_BL[:, :, None] == kv_segments_BS[:, None, :]
    seen_BLS &= kv_segments_BS[:, None, :] > 0
  if kv_lengths_B is not None:
    seen_BLS &= jnp.arange(kv_len)[None, None, :] < kv_lengths_B[:, None, None]

  heads = []
  for h in range(num_heads):
    g = h // (num_heads // num_groups)
    q_BLK, k_BSK, v_BSW = (
      x.astype(jnp.float32) for x in (q_BLHK[:, :, h], k_BSGK[:, :, g], v_BSGW[:, :, g])
    )
    s_BLS = scale * jnp.einsum("blk,bsk->bls", q_BLK, k_BSK, precision="highest")
    if logit_cap is not None:
      s_BLS = logit_cap * jnp.tanh(s_BLS / logit_cap)
    if slopes_H is not None:
      s_BLS -= jax.lax.stop_gradient(slopes_H[h]) * jnp.abs(q_pos - kv_pos)
    # A row without any key would be 0/0: let it attend everywhere, then drop it.
    alive_BL1 = seen_BLS.any(-1, keepdims=True)
    p_BLS = jax.nn.softmax(s_BLS, where=seen_BLS | ~alive_BL1)
    y_BLW = jnp.einsum("bls,bsw->blw", p_BLS, v_BSW, precision="highest")
    heads.append(jnp.where(alive_BL1, y_BLW, 0.0))
  return jnp.stack(heads, axis=2).astype(q_BLHK.dtype)


def _places(
  segments_BL: jax.Array | None, num_rows: int, length: int
) -> tuple[jax.Array, jax.Array]:
  """How many tokens of its segment a token has before it, and how many there are."""
  if segments_BL is None:
    segments_BL = jnp.ones((num_rows, length), jnp.int32)
  same_BLS = segments_BL[:, :, None] == segments_BL[:, None, :]
  before_LS = jnp.tril(jnp.ones((length, length), bool), -1)
  return (same_BLS & before_LS[None]).sum(-1), same_BLS.sum(-1)
