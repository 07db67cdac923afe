"""Attention of new tokens over a cache that is made block by block while it is read.

For caches that hold something smaller than keys and values, such as codes: the floats
of one block of slots exist at a time, and those of slots that no row has filled yet
never. Softmax goes along with the blocks: Dao et al. 2022, arXiv:2205.14135, algorithm
1, its inner loop alone, in plain XLA.
Deviation: a slot that is read twice, because the last block is moved back to end with
the cache, is masked once.

Local letters: R query heads a group, M the R * L rows of a product, C slots of a block,
W size of a value head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from effjax.core import counting, shard
from effjax.core.config import require
from effjax.ops.attention import masks, patterns, xla

# `read(start, size)`: keys [B, G, size, K] and values [B, G, size, W] of these slots.
Read = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]

# Below every score, above what is masked: exp(MASKED - _LOWEST) is 0.
_LOWEST = masks.MASKED / 2


def attention(
  q_BLHK: jax.Array,
  read: Read,
  num_groups: int,
  num_slots: int,
  q_positions_BL: jax.Array,
  length_B: jax.Array,
  *,
  kv_positions_BS: jax.Array | None = None,
  pattern: patterns.Pattern = patterns.CAUSAL,
  slopes_H: jax.Array | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
  block: int | None = None,
) -> jax.Array:
  """The same function as `decode.cached_attention`; it has no gradient.

  Args:
    q_BLHK: queries; their own keys and values are in the cache already.
    read: the cache; slots that are not valid may hold anything finite.
    num_groups, num_slots: G and S of the cache. Slots are filled from the first on.
    q_positions_BL: int32, position of each query in its sequence.
    length_B: int32, tokens of each sequence; positions from there on are not valid.
    kv_positions_BS: int32, position that each slot holds, by default its index;
      negative where it holds nothing.
    pattern, slopes_H, logit_cap, scale: as for `cached_attention`.
    block: slots read at a time, by default `block_size`; does not change results.

  Returns:
    y_BLHW in the dtype of q, computed in float32; zero where no slot is seen.

  Raises:
    InputError: H not a multiple of G; a pattern that looks ahead.
  """
  num_rows, q_len, num_heads, head_dim = q_BLHK.shape
  require(
    num_heads % num_groups == 0,
    f"{num_heads} query heads over a cache of {num_groups} kv heads; the number of "
    "query heads must be a multiple of the number of kv heads",
  )
  require(pattern.causal, f"{pattern} looks ahead: it cannot decode step by step")
  scale = head_dim**-0.5 if scale is None else scale
  block = min(block or block_size(shard.platform()), num_slots)
  q_BLGRK = (q_BLHK * scale).reshape(num_rows, q_len, num_groups, -1, head_dim)
  q_BGRLK = q_BLGRK.astype(q_BLHK.dtype).transpose(0, 2, 3, 1, 4)
  q_BGMK = q_BGRLK.reshape(num_rows, num_groups, -1, head_dim)
  rows = q_BGRLK.shape[:4]
  q_tokens = masks.Tokens(q_positions_BL)

  def scores(k_BGCK: jax.Array, start: jax.Array, first: jax.Array) -> jax.Array:
    """Those of slots from `start` on, of which the ones before `first` are hidden."""
    s_BGMC = jnp.einsum(
      "bgmk,bgck->bgmc", q_BGMK, k_BGCK, preferred_element_type=jnp.float32
    )
    if logit_cap is not None:
      s_BGMC = logit_cap * jnp.tanh(s_BGMC / logit_cap)
    slots_1C = (start + jnp.arange(block))[None]
    positions_BC = slots_1C
    if kv_positions_BS is not None:
      positions_BC = jax.lax.dynamic_slice_in_dim(kv_positions_BS, start, block, axis=1)
    bias_BLC = masks.bias_BCS(
      pattern, q_tokens, masks.Tokens(positions_BC), lengths_B=length_B
    )
    hidden_BC = (positions_BC < 0) | (slots_1C < first)
    bias_BLC = jnp.where(hidden_BC[:, None], masks.MASKED, bias_BLC)
    s_BGRLC = s_BGMC.reshape(*rows, block) + bias_BLC[:, None, None]
    slope = xla.slope_bias(slopes_H, q_positions_BL, positions_BC, num_groups)
    return s_BGRLC if slope is None else s_BGRLC + slope

  def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    max_BGRL, sum_BGRL, y_BGRLW = carry
    start = jnp.minimum(i * block, num_slots - block)
    k_BGCK, v_BGCW = read(start, block)
    s_BGRLC = scores(k_BGCK, start, i * block)
    new_BGRL = jnp.maximum(max_BGRL, jnp.max(s_BGRLC, axis=-1))
    e_BGRLC = jnp.exp(s_BGRLC - new_BGRL[..., None])
    shrink_BGRL = jnp.exp(max_BGRL - new_BGRL)
    y_BGMW = jnp.einsum(
      "bgmc,bgcw->bgmw",
      e_BGRLC.reshape(*q_BGMK.shape[:3], block).astype(v_BGCW.dtype),
      v_BGCW,
      preferred_element_type=jnp.float32,
    )
    y_BGRLW = y_BGRLW * shrink_BGRL[..., None] + y_BGMW.reshape(y_BGRLW.shape)
    return new_BGRL, sum_BGRL * shrink_BGRL + jnp.sum(e_BGRLC, axis=-1), y_BGRLW

  value_dim = jax.eval_shape(lambda i: read(i, block), jnp.int32(0))[1].shape[-1]
  start = (
    jnp.full(rows, _LOWEST, jnp.float32),
    jnp.zeros(rows, jnp.float32),
    jnp.zeros((*rows, value_dim), jnp.float32),
  )
  num_blocks = -(-num_slots // block)
  if not counting.active():
    used = jnp.minimum(jnp.max(length_B), num_slots)
    num_blocks = (used + block - 1) // block
  _, sum_BGRL, y_BGRLW = jax.lax.fori_loop(0, num_blocks, step, start)
  y_BGRLW *= jnp.where(sum_BGRL > 0, 1 / sum_BGRL, 0.0)[..., None]
  y_BLGRW = y_BGRLW.transpose(0, 3, 1, 2, 4)
  return y_BLGRW.reshape(num_rows, q_len, num_heads, -1).astype(q_BLHK.dtype)


def block_size(platform: str) -> int:
  """The default block (slots), for a platform as JAX names it.

  On a CPU blocks of 256 to 1024 take equally long, and small ones least memory;
  elsewhere, not measured, blocks are larger, since every one is a few kernels.
  """
  return 256 if platform == "cpu" else 2048
