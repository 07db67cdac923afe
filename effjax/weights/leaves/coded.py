"""Codes that stand for the values of a fixed table, with scales: small floats, NF4.

The weight is `table[codes] * scale`. A scale serves a tile of weights, along the
contracted axis, along the other one, or both; it may be a leaf itself, such as codes of
a float8 with one scale for a whole matrix (NVFP4), or of powers of two (MX formats).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import packing, tables
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class Coded(leaf_lib.Leaf):
  """A matrix `[*stack, in, out]` or embedding `[V, D]` held as codes of a table.

  Attributes:
    codes: uint8, with two codes a byte along `axis` for a table of 4 bits.
    scale: array or leaf, each entry for a tile of codes; or None.
    offset: what is added to each tile, an array; or None.
    table: name of the values, a key of tables.BITS.
    size: logical length of `axis`.
    axis: the axis that is packed, -2, or -1 for an embedding.
    logical_dtype: dtype of `dense()`, which computes in float32 at least.
  """

  static_fields = ("table", "size", "axis", "logical_dtype")

  codes: Any
  scale: Any
  offset: Any
  table: str
  size: int
  axis: int = -2
  logical_dtype: str = "float32"

  @classmethod
  def create(
    cls,
    codes: jax.Array,
    scale: Any = None,
    offset: jax.Array | None = None,
    *,
    table: str,
    axis: int = -2,
    dtype: Any = jnp.float32,
  ) -> "Coded":
    """Packs codes, one an element, and checks that everything fits.

    Args:
      codes: uint8 of the logical shape.
      scale: of as many axes, each size dividing that of the codes; or None.
      offset: the same, an array, or None.
      table: a key of tables.BITS.
      axis: the axis to pack along.
      dtype: logical dtype.

    Raises:
      InputError: the parts do not fit together, or there is no such table.
    """
    tables.values(table)  # Refuses an unknown name.
    config.require(axis in (-1, -2), f"axis={axis} must be -2 or -1")
    config.require(
      codes.dtype == jnp.uint8 and codes.ndim >= 2,
      f"codes must be uint8 of two axes or more, got {codes.dtype} of {codes.shape}",
    )
    for name, part in (("scale", scale), ("offset", offset)):
      config.require(
        part is None or _tiles(part.shape, codes.shape),
        f"{name} of shape {part is not None and tuple(part.shape)} does not tile codes "
        f"of shape {tuple(codes.shape)}",
      )
    size, bits = codes.shape[axis], tables.BITS[table]
    if bits < 8:
      codes = packing.pack_bits(codes, bits, axis=axis)
    return cls(codes, scale, offset, table, size, axis, jnp.dtype(dtype).name)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    shape = list(self.codes.shape)
    shape[self.axis] = self.size
    return tuple(shape)

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return jnp.dtype(self.logical_dtype)

  def unpacked(self) -> jax.Array:
    """The codes, one an element, uint8."""
    bits = tables.BITS[self.table]
    if bits == 8:
      return self.codes
    return packing.unpack_bits(
      self.codes, bits, self.size, signed=False, axis=self.axis
    )

  def dense(self) -> jax.Array:
    """`table[codes] * scale + offset`."""
    wide = jnp.promote_types(self.dtype, jnp.float32)
    dense = tables.decode(self.unpacked(), self.table).astype(wide)
    if self.scale is not None:
      dense *= spread(verbs.dense(self.scale).astype(wide), dense.shape)
    if self.offset is not None:
      dense += spread(self.offset.astype(wide), dense.shape)
    return dense.astype(self.dtype)

  def lookup(self, ids: jax.Array) -> jax.Array:
    """Gathers rows of codes and scales, then decodes only those."""
    rows = self.shape[0]
    parts = jax.tree.leaves((self.scale, self.offset))
    if self.axis != -1 or any(part.shape[0] != rows for part in parts):
      return super().lookup(ids)
    taken = jax.tree.map(lambda part: jnp.take(part, ids.reshape(-1), axis=0), self)
    return taken.dense().reshape(*ids.shape, self.size)

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Everything inherits the axes it tiles; what has size one is replicated."""
    inner = {"codes": tuple(axes)}
    for name in ("scale", "offset"):
      part = getattr(self, name)
      inner[name] = part if part is None else _tiled(axes, part.shape)
    return inner


def spread(part: jax.Array, shape: Sequence[int]) -> jax.Array:
  """An array of tiles as one entry a weight; sizes of one are left to broadcast."""
  for axis, (tiles, size) in enumerate(zip(part.shape, shape, strict=True)):
    if tiles not in (1, size):
      part = jnp.repeat(part, size // tiles, axis=axis)
  return part


def _tiles(part: Sequence[int], whole: Sequence[int]) -> bool:
  return len(part) == len(whole) and all(
    size % tiles == 0 if tiles else size == 0
    for tiles, size in zip(part, whole, strict=True)
  )


def _tiled(axes: Sequence[Any], shape: Sequence[int]) -> tuple[Any, ...]:
  pairs = zip(axes, shape, strict=True)
  return tuple(None if size == 1 else axis for axis, size in pairs)
