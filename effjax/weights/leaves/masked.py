"""A weight with some entries pruned to zero, kept dense beside a bit mask.

Nothing is saved by it: the values are held whole and multiplied whole. It marks what a
sparse format could save, and keeps zeros zero when values are quantized or trained;
`pack` makes it one (leaf compressed).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import packing
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import quantized


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class Masked(leaf_lib.Leaf):
  """Values `[*stack, in, out]` (an array or any leaf) under a packed bit mask.

  Attributes:
    values: the weight; what it holds where the mask is 0 does not matter.
    mask_bits: uint8 `[*stack, in, ceil(out / 8)]`, bit 1 keeps the entry.
  """

  pruned = True
  static_fields = ()
  trainable_fields = ("values",)
  simulated = ("bytes", "flops")

  values: Any
  mask_bits: Any

  @classmethod
  def create(cls, values: Any, mask: jax.Array) -> "Masked":
    """Packs a boolean mask of the shape of `values`.

    Raises:
      InputError: the shapes differ.
    """
    config.require(
      tuple(mask.shape) == tuple(values.shape),
      f"mask of shape {tuple(mask.shape)} for a weight of shape {tuple(values.shape)}",
    )
    return cls(values, packing.pack_mask(mask))

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    return tuple(self.values.shape)

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return self.values.dtype

  @property
  def is_array(self) -> bool:
    """Unless the values are a leaf."""
    return not leaf_lib.is_leaf_kind(self.values)

  def mask(self) -> jax.Array:
    """The mask, bool, of the logical shape."""
    return packing.unpack_mask(self.mask_bits, self.shape[-1])

  def dense(self) -> jax.Array:
    """Values with exact zeros where the mask is 0."""
    values = self.values
    dense = values.dense() if leaf_lib.is_leaf_kind(values) else values
    return jnp.where(self.mask(), dense, jnp.zeros((), dense.dtype))

  def folded(self) -> Any:
    """What holds the same weight without a mask, or itself where nothing does.

    An array has its zeros, and symmetric integer codes have the code 0 for them.
    """
    values = self.values
    if not leaf_lib.is_leaf_kind(values):
      return self.dense()
    if not isinstance(values, quantized.Quantized) or not values.symmetric:
      return self
    mask = jnp.swapaxes(self.mask(), -1, -2) if values.swapped else self.mask()
    codes = values.unpacked()
    return quantized.Quantized.create(
      jnp.where(mask, codes, jnp.zeros((), codes.dtype)),
      values.scale,
      bits=values.bits,
      axis=values.axis,
      swapped=bool(values.swapped),
      activations=values.activations,
      x_scale=values.x_scale,
      dtype=values.dtype,
    )

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """The mask tiles the same dimensions as the values."""
    return {"values": tuple(axes), "mask_bits": tuple(axes)}
