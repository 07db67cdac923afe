"""Key-value cache of full attention: every past key and value, in place.

Laid out `[B, G, S, K]` so that neither the scores nor the weighted sum of a decoding
step has to transpose it. B batch, G kv heads, S capacity, K head size, L new tokens.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@flax.struct.dataclass
class KVCache:
  """Keys and values of the tokens seen so far.

  Attributes:
    k_BGSK: keys, rotated; entries at and past `length_B` are not valid.
    v_BGSK: values.
    length_B: tokens held for each row, int32.
  """

  # Any, because pytrees are also built around shapes and other placeholders.
  k_BGSK: Any
  v_BGSK: Any
  length_B: Any


def init(
  batch: int, num_kv_heads: int, max_len: int, head_dim: int, dtype: DTypeLike
) -> KVCache:
  """An empty cache for `max_len` tokens a row."""
  shape = (batch, num_kv_heads, max_len, head_dim)
  return KVCache(
    k_BGSK=jnp.zeros(shape, dtype),
    v_BGSK=jnp.zeros(shape, dtype),
    length_B=jnp.zeros((batch,), jnp.int32),
  )


def append(
  cache: KVCache, k_BLGK: jax.Array, v_BLGK: jax.Array, valid_BL: jax.Array
) -> KVCache:
  """Writes new tokens behind the old ones.

  Args:
    cache: the cache; donate it, so that the update happens in place.
    k_BLGK: new keys.
    v_BLGK: new values.
    valid_BL: bool; padding, always to the right of a row's tokens, is not written. A
      token past the capacity is dropped too.
  """
  batch, length = valid_BL.shape
  if batch == 1 and length == 1:
    return _append_one(cache, k_BLGK, v_BLGK, valid_BL)
  capacity = cache.k_BGSK.shape[2]
  slots_BL = cache.length_B[:, None] + jnp.arange(length)[None, :]
  slots_BL = jnp.where(valid_BL, slots_BL, capacity)
  rows_B1 = jnp.arange(batch)[:, None]

  def write(old_BGSK: jax.Array, new_BLGK: jax.Array) -> jax.Array:
    new_BLGK = new_BLGK.astype(old_BGSK.dtype)
    return old_BGSK.at[rows_B1, :, slots_BL].set(new_BLGK, mode="drop")

  return KVCache(
    k_BGSK=write(cache.k_BGSK, k_BLGK),
    v_BGSK=write(cache.v_BGSK, v_BLGK),
    length_B=cache.length_B + jnp.sum(valid_BL, axis=1, dtype=jnp.int32),
  )


def _append_one(
  cache: KVCache, k_BLGK: jax.Array, v_BLGK: jax.Array, valid_BL: jax.Array
) -> KVCache:
  """One token of one row: a slice update, which every backend does in place.

  An invalid token lands in the slot the next valid one will overwrite.
  """
  start = (0, 0, cache.length_B[0], 0)

  def write(old_BGSK: jax.Array, new_BLGK: jax.Array) -> jax.Array:
    new_BGLK = jnp.swapaxes(new_BLGK, 1, 2).astype(old_BGSK.dtype)
    return jax.lax.dynamic_update_slice(old_BGSK, new_BGLK, start)

  return KVCache(
    k_BGSK=write(cache.k_BGSK, k_BLGK),
    v_BGSK=write(cache.v_BGSK, v_BLGK),
    length_B=cache.length_B + valid_BL[:, 0].astype(jnp.int32),
  )
