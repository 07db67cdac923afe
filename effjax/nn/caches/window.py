"""Rolling key-value cache of sliding-window attention: constant size in the length.

Slot p % W of a row holds position p: a token overwrites the one that has just left its
window (Jiang et al. 2023, arXiv:2310.06825, section 2). B batch, G kv heads, W slots,
K head size, L new tokens.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.nn.caches import kv
from effjax.ops.attention import api as attention_ops
from effjax.ops.attention import patterns

# From so many new tokens a slot on, a prompt is attended to in order of positions.
_MANY = 8


@flax.struct.dataclass
class WindowCache:
  """Keys and values of the last tokens seen.

  Attributes:
    k_BGWK: keys, rotated; slots that no token has filled are not valid.
    v_BGWK: values.
    length_B: tokens seen by each row, int32.
  """

  # Any, because pytrees are also built around shapes and other placeholders.
  k_BGWK: Any
  v_BGWK: Any
  length_B: Any


def init(
  batch: int,
  num_kv_heads: int,
  window: int,
  head_dim: int,
  dtype: DTypeLike,
  value_dim: int | None = None,
) -> WindowCache:
  """An empty cache for windows of `window` tokens."""
  shape = (batch, num_kv_heads, window)
  return WindowCache(
    k_BGWK=jnp.zeros((*shape, head_dim), dtype),
    v_BGWK=jnp.zeros((*shape, value_dim or head_dim), dtype),
    length_B=jnp.zeros((batch,), jnp.int32),
  )


def positions(cache: WindowCache) -> jax.Array:
  """int32 [B, W]: the position each slot holds, negative where it holds none."""
  return positions_of(cache.length_B, cache.k_BGWK.shape[2])


def positions_of(length_B: jax.Array, window: int) -> jax.Array:
  """The same, of `window` slots a row that have seen so many tokens."""
  slots_1W = jnp.arange(window)[None]
  newest_B1 = length_B[:, None] - 1
  # The last position up to the newest that falls into the slot.
  return newest_B1 - (newest_B1 - slots_1W) % window


def attend(
  cache: WindowCache,
  q_BLHK: jax.Array,
  k_BLGK: jax.Array,
  v_BLGK: jax.Array,
  valid_BL: jax.Array,
  *,
  pattern: patterns.Window,
  slopes_H: jax.Array | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
) -> tuple[jax.Array, WindowCache]:
  """Attention of new tokens over the cache and themselves, and the new cache.

  Args:
    cache: the tokens before these; donate it.
    q_BLHK, k_BLGK, v_BLGK: the new tokens, any number.
    valid_BL: bool; padding is to the right of a row's tokens.
    pattern: causal, with a window of at least the slots of the cache.
    slopes_H, logit_cap, scale: as for `effjax.ops.attention.api.attention`.

  Returns:
    y_BLHK in the dtype of q, anything finite at padding.
  """
  length, window = q_BLHK.shape[1], cache.k_BGWK.shape[2]
  extras = {"slopes_H": slopes_H, "logit_cap": logit_cap, "scale": scale}
  offset_B1 = cache.length_B[:, None]
  positions_BL = offset_B1 + jnp.arange(length)[None, :]
  new = append(cache, k_BLGK, v_BLGK, valid_BL)
  if length == 1:
    y_BLHK = attention_ops.cached_attention(
      q_BLHK,
      new.k_BGWK,
      new.v_BGWK,
      positions_BL,
      new.length_B,
      kv_positions_BS=positions(new),
      pattern=pattern,
      **extras,
    )
    return y_BLHK, new
  if length * _MANY <= window:
    held = lambda old, x: jnp.concatenate(
      [old, x.transpose(0, 2, 1, 3).astype(old.dtype)], axis=2
    )
    y_BLHK = attention_ops.cached_attention(
      q_BLHK,
      held(cache.k_BGWK, k_BLGK),
      held(cache.v_BGWK, v_BLGK),
      positions_BL,
      new.length_B,
      kv_positions_BS=jnp.concatenate([positions(cache), positions_BL], axis=1),
      pattern=pattern,
      **extras,
    )
    return y_BLHK, new
  # The old tokens from the oldest to the newest, in front of the new ones: distances
  # are differences of indices, and a window knows nothing else.
  slots_BW = (offset_B1 + jnp.arange(window)[None, :]) % window
  filled_BW = offset_B1 + jnp.arange(window)[None, :] >= window

  def ordered(old: jax.Array, x: jax.Array) -> jax.Array:
    old = jnp.take_along_axis(old, slots_BW[:, None, :, None], axis=2)
    return jnp.concatenate([old.transpose(0, 2, 1, 3).astype(x.dtype), x], axis=1)

  segments = jnp.concatenate([filled_BW, valid_BL], axis=1).astype(jnp.int32)
  y_BLHK = attention_ops.attention(
    jnp.pad(q_BLHK, ((0, 0), (window, 0), (0, 0), (0, 0))),
    ordered(cache.k_BGWK, k_BLGK),
    ordered(cache.v_BGWK, v_BLGK),
    pattern=pattern,
    q_segments_BL=segments,
    **extras,
  )
  return y_BLHK[:, window:], new


def append(
  cache: WindowCache, k_BLGK: jax.Array, v_BLGK: jax.Array, valid_BL: jax.Array
) -> WindowCache:
  """Writes new tokens over the oldest ones.

  Args:
    cache: the cache; donate it, so that the update happens in place.
    k_BLGK: new keys, any number; of more than W a row, only the last W stay.
    v_BLGK: new values.
    valid_BL: bool; padding, always to the right of a row's tokens, is not written.
  """
  window = cache.k_BGWK.shape[2]
  grown_B = cache.length_B + jnp.sum(valid_BL, axis=1, dtype=jnp.int32)
  positions_BL = cache.length_B[:, None] + jnp.arange(valid_BL.shape[1])[None, :]
  kept_BL = valid_BL & (positions_BL >= grown_B[:, None] - window)
  k_BGWK, v_BGWK = kv.write(
    (cache.k_BGWK, cache.v_BGWK), (k_BLGK, v_BLGK), positions_BL % window, kept_BL
  )
  return WindowCache(k_BGWK=k_BGWK, v_BGWK=v_BGWK, length_B=grown_B)
