"""Integer codes with scales: int8, or fewer bits packed into bytes.

The weight is `(codes - zero) * scale`, scales and zero points per group of `group`
consecutive inputs and per output. Sub-byte codes are packed into uint8 along the
contracted axis, because JAX holds an int4 in a whole byte on the CPU.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import int8, packing, rounding
from effjax.weights import leaf as leaf_lib

ACTIVATIONS = ("none", "int8")
BITS = (2, 3, 4, 6, 8)


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class Quantized(leaf_lib.Leaf):
  """A matrix `[*stack, in, out]` or embedding `[V, D]` held as integer codes.

  Attributes:
    codes: int8, or uint8 with several codes a byte along `axis`.
    scale: floating point; the size of `axis` is the number of groups.
    zero: zero points like `scale`, or None for a symmetric grid.
    bits: bits a code, one of BITS.
    size: logical length of the contracted axis.
    axis: the contracted axis of the arrays as they are held: -2, or -1 for an embedding
      or for a swapped matrix.
    swapped: 1 if a matrix is held `[*stack, out, in]`, which integer products on a CPU
      read as it lies, while `[in, out]` is rearranged by every call.
    activations: "int8" also quantizes the activations, per token and while running,
      and executes an integer product; "none" multiplies in the activations' dtype.
    logical_dtype: dtype of `dense()`.
  """

  static_fields = ("bits", "size", "axis", "swapped", "activations", "logical_dtype")

  codes: Any
  scale: Any
  zero: Any
  bits: int
  size: int
  axis: int = -2
  swapped: int = 0
  activations: str = "none"
  logical_dtype: str = "float32"

  @classmethod
  def create(
    cls,
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None = None,
    *,
    bits: int,
    axis: int = -2,
    activations: str = "none",
    dtype: Any = jnp.float32,
  ) -> "Quantized":
    """Packs unpacked integer codes and checks that everything fits.

    With int8 activations a matrix is held swapped.

    Args:
      codes: integers of the logical shape: signed without zero point, else unsigned.
      scale: groups along `axis`, otherwise the shape of `codes`.
      zero: like `scale`, or None.
      bits: one of BITS.
      axis: contracted axis of the logical shape, -2 or -1.
      activations: one of ACTIVATIONS.
      dtype: logical dtype.

    Raises:
      InputError: the parts do not fit together.
    """
    size, groups = codes.shape[axis], scale.shape[axis]
    config.require(bits in BITS, f"bits={bits} must be one of {BITS}")
    config.require(axis in (-1, -2), f"axis={axis} must be -2 or -1")
    config.require(
      activations in ACTIVATIONS,
      f"activations={activations!r} must be one of {', '.join(ACTIVATIONS)}",
    )
    config.require(
      size % groups == 0, f"{groups} groups do not divide {size} input channels"
    )
    config.require(
      activations == "none" or (groups == 1 and zero is None),
      "int8 activations need one symmetric scale per output channel (group=0)",
    )
    swapped = activations == "int8" and axis == -2
    parts = [codes, scale, zero]
    if swapped:
      axis = -1
      parts = [None if p is None else jnp.swapaxes(p, -1, -2) for p in parts]
    codes, scale, zero = parts
    if bits < 8:
      codes = packing.pack_bits(codes, bits, axis=axis)
    else:
      codes = codes.astype(jnp.uint8 if zero is not None else jnp.int8)
    dtype = jnp.dtype(dtype).name
    return cls(codes, scale, zero, bits, size, axis, int(swapped), activations, dtype)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    shape = list(self.codes.shape)
    shape[self.axis] = self.size
    return tuple(self._swap(shape))

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return jnp.dtype(self.logical_dtype)

  @property
  def num_groups(self) -> int:
    """Groups along the contracted axis (count)."""
    return self.scale.shape[self.axis]

  def unpacked(self) -> jax.Array:
    """The codes as held, one an element: int8 on a symmetric grid, else uint8."""
    if self.bits == 8:
      return self.codes
    signed = self.zero is None
    return packing.unpack_bits(
      self.codes, self.bits, self.size, signed=signed, axis=self.axis
    )

  def dense(self) -> jax.Array:
    """`(codes - zero) * scale`."""
    parts = [self.unpacked(), self.scale, self.zero]
    if self.axis == -1:
      parts = [None if p is None else jnp.swapaxes(p, -1, -2) for p in parts]
    dense = rounding.dequantize_groups(*parts, dtype=self.dtype)
    return dense if self.axis == -2 or self.swapped else jnp.swapaxes(dense, -1, -2)

  def contract(self, x: jax.Array, *, transpose: bool = False) -> jax.Array:
    """Scales after the product where one scale serves a whole output channel."""
    held_axis = -1 if transpose != bool(self.swapped) else -2
    per_channel = self.num_groups == 1 and self.zero is None
    if not per_channel or self.axis != held_axis or self.codes.ndim != 2:
      return super().contract(x, transpose=transpose)
    out_first = held_axis == -1
    scale_1F = self.scale.reshape(1, -1)
    codes = self.unpacked()
    if self.activations == "int8":
      return int8.dynamic_int8_contract(x, codes, scale_1F, out_first)
    y = leaf_lib.contract_dense(x, codes, transpose=out_first)
    scale = jax.lax.expand_dims(scale_1F[0], tuple(range(y.ndim - 1)))
    return y * scale.astype(y.dtype)

  def lookup(self, ids: jax.Array) -> jax.Array:
    """Gathers rows of codes, then dequantizes only those."""
    if self.axis != -1 or self.swapped:
      return super().lookup(ids)
    rows = {
      name: None if part is None else jnp.take(part, ids.reshape(-1), axis=0)
      for name, part in (
        ("codes", self.codes),
        ("scale", self.scale),
        ("zero", self.zero),
      )
    }
    dense = dataclasses.replace(self, **rows).dense()
    return dense.reshape(*ids.shape, self.size)

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Codes and scales inherit the axes of the dimensions they tile.

    With one group, the contracted dimension of the scales has size one: replicated.
    """
    held = self._swap(list(axes))
    tiled = list(held)
    if self.num_groups == 1:
      tiled[self.axis] = None
    return {
      "codes": tuple(held),
      "scale": tuple(tiled),
      "zero": None if self.zero is None else tuple(tiled),
    }

  def _swap(self, dims: list[Any]) -> list[Any]:
    """Dimensions between the held and the logical order."""
    return [*dims[:-2], dims[-1], dims[-2]] if self.swapped else dims
