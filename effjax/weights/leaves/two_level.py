"""Scales that are themselves integer codes with scales, one for several of them.

`values = codes * scale`, so that a scale or an offset of every few weights takes 6 or
8 bits instead of 16: the sub-scales of GGUF's K-quants are held like this inside a
quantized matrix. Values are computed in float32, whatever the dtype of the scales.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import packing, rounding
from effjax.weights import leaf as leaf_lib


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class TwoLevel(leaf_lib.Leaf):
  """Numbers `[*stack, rows, columns]` held as integer codes, without a zero point.

  Meant for the parts of a `Quantized` leaf, whose groups then lie along `axis`.

  Attributes:
    codes: int8 or uint8; uint8 with several codes a byte along `axis` below 8 bits.
    scale: floating point, one for `group` consecutive codes along `axis`.
    bits: bits a code, one of packing.BITS.
    size: logical length of `axis`.
    signed: 1 if codes are signed.
    axis: the axis that is cut into groups, -2 or -1.
  """

  static_fields = ("bits", "size", "signed", "axis")

  codes: Any
  scale: Any
  bits: int
  size: int
  signed: int
  axis: int = -2

  @classmethod
  def create(
    cls,
    codes: jax.Array,
    scale: jax.Array,
    *,
    bits: int,
    signed: bool,
    axis: int = -2,
  ) -> "TwoLevel":
    """Packs unpacked integer codes and checks that everything fits.

    Args:
      codes: integers of the logical shape that fit in `bits`.
      scale: groups along `axis`, otherwise the shape of `codes`; kept in its dtype.
      bits: one of packing.BITS.
      signed: whether codes below zero are possible.
      axis: -2 or -1.

    Raises:
      InputError: the parts do not fit together.
    """
    config.require(bits in packing.BITS, f"bits={bits} must be one of {packing.BITS}")
    config.require(axis in (-1, -2), f"axis={axis} must be -2 or -1")
    config.require(
      jnp.issubdtype(codes.dtype, jnp.integer)
      and jnp.issubdtype(scale.dtype, jnp.floating),
      f"codes of {codes.dtype} with scales of {scale.dtype} must be integers with "
      "floating-point scales",
    )
    size = codes.shape[axis]
    config.require(
      tiles(scale.shape, codes.shape, axis),
      f"scales of shape {tuple(scale.shape)} do not tile codes of shape "
      f"{tuple(codes.shape)} along axis {axis}",
    )
    if bits < 8:
      codes = packing.pack_bits(codes, bits, axis=axis)
    else:
      codes = codes.astype(jnp.int8 if signed else jnp.uint8)
    return cls(codes, scale, bits, size, int(signed), axis)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    shape = list(self.codes.shape)
    shape[self.axis] = self.size
    return tuple(shape)

  @property
  def dtype(self) -> jnp.dtype:
    """float32 (float64 for float64 scales)."""
    return jnp.promote_types(self.scale.dtype, jnp.float32)

  @property
  def group(self) -> int:
    """Consecutive codes that share a scale (count)."""
    return self.size // self.scale.shape[self.axis]

  def unpacked(self) -> jax.Array:
    """The codes, one an element: int8 if signed, else uint8."""
    if self.bits == 8:
      return self.codes
    return packing.unpack_bits(
      self.codes, self.bits, self.size, signed=bool(self.signed), axis=self.axis
    )

  def dense(self) -> jax.Array:
    """`codes * scale`."""
    parts = [self.unpacked(), self.scale]
    if self.axis == -1:
      # A last axis of one: rows are cut into groups as columns are, nothing is moved.
      parts = [part[..., None] for part in parts]
    dense = rounding.dequantize_groups(*parts, dtype=self.dtype)
    return dense if self.axis == -2 else dense[..., 0]

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Both inherit the axes they tile; a single group is replicated."""
    tiled = list(axes)
    if self.scale.shape[self.axis] == 1:
      tiled[self.axis] = None
    return {"codes": tuple(axes), "scale": tuple(tiled)}


def tiles(part: Sequence[int], whole: Sequence[int], axis: int) -> bool:
  """Whether an array of shape `part` has one entry for every n of `whole` along `axis`.

  Args:
    part: shape of the scales.
    whole: shape of what they scale.
    axis: the only axis along which the sizes may differ, from the end.
  """
  if len(part) != len(whole) or len(whole) < 2:
    return False
  others = [p == w for p, w in zip(part, whole, strict=True)]
  others[axis] = True
  size, groups = whole[axis], part[axis]
  return all(others) and (size % groups == 0 if groups else size == 0)
