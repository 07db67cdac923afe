"""Cache of multi-head latent attention: one latent and one rotated key a token.

Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.3: the boxed vectors of its
equations are all that a step has to keep. Nothing in it depends on the heads.

B batch, S capacity, R entries of the latent, J entries of the shared rotated key.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.nn.caches import kv


@flax.struct.dataclass
class LatentCache:
  """Latents and rotated keys of the tokens seen so far.

  Attributes:
    c_BSR: latents, normalized; entries at and past `length_B` are not valid.
    k_rope_BSJ: the rotated key that all heads share.
    length_B: tokens held for each row, int32.
  """

  # Any, because pytrees are also built around shapes and other placeholders.
  c_BSR: Any
  k_rope_BSJ: Any
  length_B: Any


def init(
  batch: int, max_len: int, kv_rank: int, rope_dim: int, dtype: DTypeLike
) -> LatentCache:
  """An empty cache for `max_len` tokens a row."""
  return LatentCache(
    c_BSR=jnp.zeros((batch, max_len, kv_rank), dtype),
    k_rope_BSJ=jnp.zeros((batch, max_len, rope_dim), dtype),
    length_B=jnp.zeros((batch,), jnp.int32),
  )


def append(
  cache: LatentCache, c_BLR: jax.Array, k_rope_BLJ: jax.Array, valid_BL: jax.Array
) -> LatentCache:
  """Writes new tokens behind the old ones, as `kv.append` does, and by it.

  To that cache the latents are keys of one head and the rotated keys are its values;
  the axis of that head costs nothing.

  Args:
    cache: the cache; donate it, so that the update happens in place.
    c_BLR: new latents, normalized.
    k_rope_BLJ: new rotated keys.
    valid_BL: bool; padding, always to the right of a row's tokens, is not written. A
      token past the capacity is dropped too.
  """
  as_kv = kv.KVCache(
    k_BGSK=cache.c_BSR[:, None],
    v_BGSK=cache.k_rope_BSJ[:, None],
    length_B=cache.length_B,
  )
  grown = kv.append(as_kv, c_BLR[:, :, None], k_rope_BLJ[:, :, None], valid_BL)
  return LatentCache(
    c_BSR=grown.k_BGSK[:, 0], k_rope_BSJ=grown.v_BGSK[:, 0], length_B=grown.length_B
  )
