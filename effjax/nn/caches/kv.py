"""Key-value cache of full attention: every past key and value, in place.

Laid out `[B, G, S, K]` so that neither the scores nor the weighted sum of a decoding
step has to transpose it. B batch, G kv heads, S capacity, K head size, L new tokens;
values may have a head size of their own.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Arrays [B, G, S, ...] in any pytree; for some of new tokens [B, L, G, ...].
Held = Any


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
  batch: int,
  num_kv_heads: int,
  max_len: int,
  head_dim: int,
  dtype: DTypeLike,
  value_dim: int | None = None,
) -> KVCache:
  """An empty cache for `max_len` tokens a row; values are of `head_dim` by default."""
  shape = (batch, num_kv_heads, max_len)
  return KVCache(
    k_BGSK=jnp.zeros((*shape, head_dim), dtype),
    v_BGSK=jnp.zeros((*shape, value_dim or head_dim), dtype),
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
  capacity = cache.k_BGSK.shape[2]
  slots_BL = cache.length_B[:, None] + jnp.arange(valid_BL.shape[1])[None, :]
  k_BGSK, v_BGSK = write(
    (cache.k_BGSK, cache.v_BGSK),
    (k_BLGK, v_BLGK),
    slots_BL,
    valid_BL & (slots_BL < capacity),
  )
  seen_B = jnp.sum(valid_BL, axis=1, dtype=jnp.int32)
  return KVCache(k_BGSK=k_BGSK, v_BGSK=v_BGSK, length_B=cache.length_B + seen_B)


def write(held: Held, new: Held, slots_BL: jax.Array, kept_BL: jax.Array) -> Held:
  """New entries in the given slots of the old ones.

  Args:
    held: arrays `[B, G, S, ...]`, in any pytree.
    new: `[B, L, G, ...]`, one for each that is held.
    slots_BL: int32, where; different for every kept token of a row.
    kept_BL: bool; the others are not written.
  """
  args = (held, new, slots_BL, kept_BL)
  if kept_BL.shape[1] > 1:
    return _write_scattered(*args)
  return jax.lax.platform_dependent(*args, cpu=_write_rows, default=_write_scattered)


def _write_scattered(
  held: Held, new: Held, slots_BL: jax.Array, kept_BL: jax.Array
) -> Held:
  """One scatter for all rows and tokens."""
  capacity = jax.tree.leaves(held)[0].shape[2]
  slots_BL = jnp.where(kept_BL, slots_BL, capacity)
  rows_B1 = jnp.arange(len(slots_BL))[:, None]

  def put(old_BGSK: jax.Array, new_BLGK: jax.Array) -> jax.Array:
    new_BLGK = new_BLGK.astype(old_BGSK.dtype)
    return old_BGSK.at[rows_B1, :, slots_BL].set(new_BLGK, mode="drop")

  return jax.tree.map(put, held, new)


def _write_rows(held: Held, new: Held, slots_B1: jax.Array, kept_B1: jax.Array) -> Held:
  """One token a row, row by row, in place on XLA's CPU backend.

  That backend fuses a scatter or slice update into each of its consumers, the new cache
  and the scores, and copies the whole cache for every one. It cannot fuse a loop, whose
  bound it does not know: no rows if nothing is kept.
  """

  def write_row(row: jax.Array, held: Held) -> Held:
    start = (row, 0, slots_B1[row, 0], 0)

    def put(old_BGSK: jax.Array, new_B1GK: jax.Array) -> jax.Array:
      shape = (1, old_BGSK.shape[1], 1, old_BGSK.shape[3])
      new = new_B1GK[row].reshape(shape).astype(old_BGSK.dtype)
      old = jax.lax.dynamic_slice(old_BGSK, start, shape)
      new = jnp.where(kept_B1[row, 0], new, old)
      return jax.lax.dynamic_update_slice(old_BGSK, new, start)

    return jax.tree.map(put, held, new)

  num_rows = jnp.where(jnp.any(kept_B1), len(kept_B1), 0)
  return jax.lax.fori_loop(0, num_rows, write_row, held)
