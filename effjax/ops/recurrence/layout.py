"""Tokens cut into chunks, head by head, and what document boundaries mask in them.

For recurrences whose products are per head: `[B, L, H, X]` becomes `[B, H, Z, C, X]`,
Z chunks of C tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Boundaries(NamedTuple):
  """Which tokens of a chunk are of one document with what; all bool.

  Attributes:
    same_BZCC: two tokens of the chunk.
    carried_BZC: the token and the last one of the chunk before, so that the state
      before the chunk is its own.
    kept_BZC: the token and the last one of its chunk.
    crossed_BZ: the chunk lies in one document with the one before.
  """

  same_BZCC: jax.Array
  carried_BZC: jax.Array
  kept_BZC: jax.Array
  crossed_BZ: jax.Array


def chunk_tokens(chunk: int, length: int) -> int:
  """C: the power of two not below `chunk`, nor above what `length` tokens need."""
  return 1 << (min(chunk, length) - 1).bit_length()


def split(z_BLHX: jax.Array, tokens: int) -> jax.Array:
  """[B, L, H, X] -> [B, H, Z, C, X], zeros at the end to fill the last chunk."""
  return jnp.moveaxis(_cut(z_BLHX, tokens), 3, 1)


def join(z_BHZCX: jax.Array, length: int) -> jax.Array:
  """[B, H, Z, C, X] -> [B, L, H, X], the inverse of `split`."""
  num_rows, num_heads, _, _, size = z_BHZCX.shape
  z_BZCHX = jnp.moveaxis(z_BHZCX, 1, 3)
  return z_BZCHX.reshape(num_rows, -1, num_heads, size)[:, :length]


def boundaries(document_BL: jax.Array, tokens: int) -> Boundaries:
  """Masks of the documents that `segments.documents` numbers."""
  document_BZC = _cut(document_BL, tokens, mode="edge")
  last_BZ = document_BZC[..., -1]
  before_BZ = jnp.pad(last_BZ[:, :-1], ((0, 0), (1, 0)))  # a row starts in document 0
  return Boundaries(
    same_BZCC=document_BZC[..., :, None] == document_BZC[..., None, :],
    carried_BZC=document_BZC == before_BZ[..., None],
    kept_BZC=document_BZC == last_BZ[..., None],
    crossed_BZ=last_BZ == before_BZ,
  )


def product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """Contracts an axis of a with one of b, in float32.

  All axes but the last two are batch. Operands of unequal dtype are cast to the lower.
  """
  if a.dtype != b.dtype:
    dtype = min(a.dtype, b.dtype, key=lambda d: jnp.finfo(d).bits)
    a, b = a.astype(dtype), b.astype(dtype)
  batch = tuple(range(a.ndim - 2))
  contracted = ((a.ndim + axis_a,), (b.ndim + axis_b,))
  return jax.lax.dot_general(
    a, b, (contracted, (batch, batch)), preferred_element_type=jnp.float32
  )


def _cut(z_BLs: jax.Array, tokens: int, mode: str = "constant") -> jax.Array:
  num_rows, length, *rest = z_BLs.shape
  missing = -length % tokens
  if missing:
    widths = [(0, 0), (0, missing)] + [(0, 0)] * len(rest)
    z_BLs = jnp.pad(z_BLs, widths, mode=mode)
  return z_BLs.reshape(num_rows, -1, tokens, *rest)
