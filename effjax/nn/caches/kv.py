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
  if valid_BL.shape[1] > 1:
    return _append_scattered(cache, k_BLGK, v_BLGK, valid_BL)
  return jax.lax.platform_dependent(
    cache, k_BLGK, v_BLGK, valid_BL, cpu=_append_rows, default=_append_scattered
  )


def _append_scattered(
  cache: KVCache, k_BLGK: jax.Array, v_BLGK: jax.Array, valid_BL: jax.Array
) -> KVCache:
  """One scatter for all rows and tokens."""
  batch, length = valid_BL.shape
  capacity = cache.k_BGSK.shape[2]
  slots_BL = cache.length_B[:, None] + jnp.arange(length)[None, :]
  slots_BL = jnp.where(valid_BL, slots_BL, capacity)
  rows_B1 = jnp.arange(batch)[:, None]

  def write(old_BGSK: jax.Array, new_BLGK: jax.Array) -> jax.Array:
    new_BLGK = new_BLGK.astype(old_BGSK.dtype)
    return old_BGSK.at[rows_B1, :, slots_BL].set(new_BLGK, mode="drop")

  return _grown(
    cache, write(cache.k_BGSK, k_BLGK), write(cache.v_BGSK, v_BLGK), valid_BL
  )


def _append_rows(
  cache: KVCache, k_B1GK: jax.Array, v_B1GK: jax.Array, valid_B1: jax.Array
) -> KVCache:
  """One token a row, row by row, in place on XLA's CPU backend.

  That backend fuses a scatter or slice update into each of its consumers, the new cache
  and the scores, and copies the whole cache for every one. It cannot fuse a loop, whose
  bound it does not know: no rows if nothing is valid.
  """
  batch, _, capacity, _ = cache.k_BGSK.shape
  fits_B = valid_B1[:, 0] & (cache.length_B < capacity)

  def write_row(row: jax.Array, caches: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    start = (row, 0, cache.length_B[row], 0)

    def write(old_BGSK: jax.Array, new_B1GK: jax.Array) -> jax.Array:
      shape = (1, old_BGSK.shape[1], 1, old_BGSK.shape[3])
      new = new_B1GK[row].reshape(shape).astype(old_BGSK.dtype)
      old = jax.lax.dynamic_slice(old_BGSK, start, shape)
      new = jnp.where(fits_B[row], new, old)
      return jax.lax.dynamic_update_slice(old_BGSK, new, start)

    return write(caches[0], k_B1GK), write(caches[1], v_B1GK)

  num_rows = jnp.where(jnp.any(fits_B), batch, 0)
  k_BGSK, v_BGSK = jax.lax.fori_loop(
    0, num_rows, write_row, (cache.k_BGSK, cache.v_BGSK)
  )
  return _grown(cache, k_BGSK, v_BGSK, valid_B1)


def _grown(
  cache: KVCache, k_BGSK: jax.Array, v_BGSK: jax.Array, valid_BL: jax.Array
) -> KVCache:
  seen_B = jnp.sum(valid_BL, axis=1, dtype=jnp.int32)
  return KVCache(k_BGSK=k_BGSK, v_BGSK=v_BGSK, length_B=cache.length_B + seen_B)
