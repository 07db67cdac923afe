"""Codes of less than a byte, packed into uint8, and masks packed into bits.

Layout: along the packed axis, code i of b bits takes bits i * b to i * b + b - 1 of a
stream that is cut into bytes, lowest bit first. So a byte of 4-bit codes holds entry
2i in its low half and 2i + 1 in its high half, and 3-bit codes are really three bits:
eight in three bytes, as are eight of 5 bits in five bytes. Neighbours stay together: a
shard of whole blocks unpacks alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.config import require

BITS = (1, 2, 3, 4, 5, 6, 8)


def block_size(bits: int) -> int:
  """The least number of codes that fill whole bytes: 2 for 4 bits, 8 for 3."""
  require(bits in BITS, f"codes of {bits} bits cannot be packed; available: {BITS}")
  return 8 // math.gcd(8, bits)


def packed_size(size: int, bits: int) -> int:
  """Bytes that `size` codes take, the last block filled up."""
  block = block_size(bits)
  return -(-size // block) * block * bits // 8


def pack_bits(codes: jax.Array, bits: int, axis: int = -2) -> jax.Array:
  """Packs integer codes along one axis; exact for every code that fits in `bits`.

  Args:
    codes: any integer dtype; signed codes as two's complement. Higher bits are dropped.
    bits: 1 to 6, or 8.
    axis: the axis that shrinks, filled up with zeros to a whole block.

  Returns:
    uint8 with `packed_size(codes.shape[axis], bits)` entries along `axis`.
  """
  block = block_size(bits)
  codes = jnp.moveaxis(codes, axis, -1)
  size = codes.shape[-1]
  fill = [(0, 0)] * (codes.ndim - 1) + [(0, -size % block)]
  codes = jnp.pad(codes, fill).astype(jnp.uint8) & np.uint8(2**bits - 1)
  codes = codes.reshape(*codes.shape[:-1], -1, block)
  # In bytes, not in words: a block has up to 40 bits, and whole embeddings are packed
  # outside jit, where wider numbers would be held.
  packed = [jnp.zeros(codes.shape[:-1], jnp.uint8)] * (block * bits // 8)
  for i in range(block):
    byte, place = divmod(i * bits, 8)
    packed[byte] |= codes[..., i] << place
    if place + bits > 8:
      packed[byte + 1] |= codes[..., i] >> (8 - place)
  packed = jnp.stack(packed, axis=-1)
  packed = packed.reshape(*packed.shape[:-2], -1)
  return jnp.moveaxis(packed, -1, axis)


def unpack_bits(
  packed: jax.Array, bits: int, size: int, *, signed: bool, axis: int = -2
) -> jax.Array:
  """The inverse of `pack_bits`.

  Args:
    packed: uint8.
    bits: as packed.
    size: number of codes along `axis`.
    signed: two's complement codes in int8, else codes from 0 in uint8.
    axis: as packed.

  Raises:
    InputError: `packed` is not what `size` codes pack into.
  """
  require(
    packed.dtype == jnp.uint8 and packed.shape[axis] == packed_size(size, bits),
    f"{size} codes of {bits} bits take {packed_size(size, bits)} uint8 entries; got "
    f"{packed.shape[axis]} of {packed.dtype}",
  )
  block = block_size(bits)
  packed = jnp.moveaxis(packed, axis, -1)
  packed = packed.reshape(*packed.shape[:-1], -1, block * bits // 8)
  # The 40 bits of a block of 5-bit codes do not fit a word, but each half does: from
  # bytes 0 to 2, and from bytes 2 to 4, where four bits belong to the first half.
  halves = 2 if bits == 5 else 1
  num_bytes, count = -(-packed.shape[-1] // halves), block // halves
  dtype = jnp.uint8 if num_bytes == 1 else jnp.uint32
  parts = [packed[..., i : i + 2 * halves - 1 : 2] for i in range(num_bytes)]
  words = sum(part.astype(dtype) << 8 * i for i, part in enumerate(parts))
  # Shifts by an array: a concatenated list of codes is a branch for every element once
  # XLA's CPU backend fuses it into a product, and several times as slow.
  places = np.arange(count) * bits + np.arange(halves)[:, None] * 4
  places = places.reshape((1,) * (words.ndim - 1) + places.shape).astype(dtype)
  codes = ((words[..., None] >> places) & 2**bits - 1).astype(jnp.uint8)
  codes = codes.reshape(*packed.shape[:-2], -1)[..., :size]
  if signed:
    sign = np.uint8(2 ** (bits - 1))
    codes = ((codes ^ sign) - sign).astype(jnp.int8)
  return jnp.moveaxis(codes, -1, axis)


def pack_int4(codes: jax.Array) -> jax.Array:
  """[..., in, out] codes of 4 bits as uint8 [..., ceil(in / 2), out].

  Row i of the result holds row 2i in its low half and row 2i + 1 in its high half.
  """
  return pack_bits(codes, 4)


def unpack_int4(packed: jax.Array, in_dim: int, *, signed: bool) -> jax.Array:
  """The inverse of `pack_int4`: int8 if `signed`, else uint8, [..., in_dim, out]."""
  return unpack_bits(packed, 4, in_dim, signed=signed)


def pack_mask(mask: jax.Array) -> jax.Array:
  """Bool [..., in, out] as uint8 [..., in, ceil(out / 8)], lowest bit first."""
  return jnp.packbits(mask, axis=-1, bitorder="little")


def unpack_mask(packed: jax.Array, out_dim: int) -> jax.Array:
  """The inverse of `pack_mask`."""
  require(
    packed.dtype == jnp.uint8 and packed.shape[-1] == -(-out_dim // 8),
    f"a mask of {out_dim} columns takes {-(-out_dim // 8)} uint8 entries a row; got "
    f"{packed.shape[-1]} of {packed.dtype}",
  )
  bits = jnp.unpackbits(packed, axis=-1, count=out_dim, bitorder="little")
  return bits.astype(bool)
