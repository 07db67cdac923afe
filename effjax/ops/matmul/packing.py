"""Codes of less than a byte, packed into uint8, and masks packed into bits.

Layout: along the packed axis, code i of b bits takes bits i * b to i * b + b - 1 of a
stream that is cut into bytes, lowest bit first. So a byte of 4-bit codes holds entry
2i in its low half and 2i + 1 in its high half, and 3-bit codes are really three bits:
eight in three bytes. Neighbours stay together: a shard of whole blocks unpacks alone.
"""

import math

import jax
import jax.numpy as jnp

from effjax.core.config import require

BITS = (1, 2, 3, 4, 6, 8)


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
    bits: 1, 2, 3, 4, 6 or 8.
    axis: the axis that shrinks, filled up with zeros to a whole block.

  Returns:
    uint8 with `packed_size(codes.shape[axis], bits)` entries along `axis`.
  """
  block = block_size(bits)
  codes = jnp.moveaxis(codes, axis, -1)
  size = codes.shape[-1]
  fill = [(0, 0)] * (codes.ndim - 1) + [(0, -size % block)]
  codes = jnp.pad(codes, fill).astype(jnp.int32) & (2**bits - 1)
  codes = codes.reshape(*codes.shape[:-1], -1, block)
  word = sum(codes[..., i] << (i * bits) for i in range(block))
  packed = [(word >> (8 * i)) & 0xFF for i in range(block * bits // 8)]
  packed = jnp.stack(packed, axis=-1).astype(jnp.uint8)
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
  packed = jnp.moveaxis(packed, axis, -1).astype(jnp.int32)
  packed = packed.reshape(*packed.shape[:-1], -1, block * bits // 8)
  word = sum(packed[..., i] << (8 * i) for i in range(packed.shape[-1]))
  codes = [(word >> (i * bits)) & (2**bits - 1) for i in range(block)]
  codes = jnp.stack(codes, axis=-1)
  codes = codes.reshape(*codes.shape[:-2], -1)[..., :size]
  if signed:
    sign = 2 ** (bits - 1)
    codes = ((codes ^ sign) - sign).astype(jnp.int8)
  return jnp.moveaxis(codes.astype(jnp.int8 if signed else jnp.uint8), -1, axis)


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
