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
from effjax.weights.leaves import _activated

ACTIVATIONS = ("none", "fp8")


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
    activations: "fp8" also rounds the activations, to float8_e4m3fn, and executes a
      product of such floats (ops.matmul.activations); "none" multiplies in the
      activations' dtype.
    x_scale: the activations' static scale, float32 `[*stack, 1, 1]`; None if each token
      has its own.
  """

  static_fields = ("table", "size", "axis", "logical_dtype", "activations")

  codes: Any
  scale: Any
  offset: Any
  table: str
  size: int
  axis: int = -2
  logical_dtype: str = "float32"
  activations: str = "none"
  x_scale: Any = None

  @classmethod
  def create(
    cls,
    codes: jax.Array,
    scale: Any = None,
    offset: jax.Array | None = None,
    *,
    table: str,
    axis: int = -2,
    activations: str = "none",
    x_scale: jax.Array | None = None,
    dtype: Any = jnp.float32,
  ) -> "Coded":
    """Packs codes, one an element, and checks that everything fits.

    Args:
      codes: uint8 of the logical shape.
      scale: of as many axes, each size dividing that of the codes; or None.
      offset: the same, an array, or None.
      table: a key of tables.BITS.
      axis: the axis to pack along.
      activations: one of ACTIVATIONS; "fp8" needs the table "e4m3", no offsets and one
        scale for all inputs.
      x_scale: their static scale `[*stack, 1, 1]`, or None for dynamic ones.
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
    config.require(
      activations in ACTIVATIONS,
      f"activations={activations!r} must be one of {', '.join(ACTIVATIONS)}",
    )
    plain = table == "e4m3" and offset is None
    per_output = plain and scale is not None and scale.shape[axis] == 1
    config.require(
      activations == "none" or per_output,
      "fp8 activations need e4m3 codes with one scale per output channel or matrix "
      "(group=0)",
    )
    _activated.check_x_scale(x_scale, codes.shape, activations)
    size, bits = codes.shape[axis], tables.BITS[table]
    if bits < 8:
      codes = packing.pack_bits(codes, bits, axis=axis)
    return cls(
      codes,
      scale,
      offset,
      table=table,
      size=size,
      axis=axis,
      logical_dtype=jnp.dtype(dtype).name,
      activations=activations,
      x_scale=x_scale,
    )

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

  def contract(self, x: jax.Array, *, transpose: bool = False) -> jax.Array:
    """See weights.verbs.contract."""
    if self.activations == "none":
      return super().contract(x, transpose=transpose)
    return _activated.contract(self, x, axis=-1 if transpose else -2)

  def grouped_contract(
    self, x: jax.Array, group_sizes: jax.Array | None = None
  ) -> jax.Array:
    """See weights.verbs.grouped_contract."""
    if self.activations == "none":
      return super().grouped_contract(x, group_sizes)
    return _activated.contract(self, x, group_sizes, axis=-2)

  def lookup(self, ids: jax.Array) -> jax.Array:
    """Gathers rows of codes and scales, then decodes only those."""
    rows = self.shape[0]
    parts = jax.tree.leaves((self.scale, self.offset))
    if self.axis != -1 or any(part.shape[0] != rows for part in parts):
      return super().lookup(ids)
    own = dataclasses.replace(self, x_scale=None)
    taken = jax.tree.map(lambda part: jnp.take(part, ids.reshape(-1), axis=0), own)
    return taken.dense().reshape(*ids.shape, self.size)

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Everything inherits the axes it tiles; what has size one is replicated."""
    inner = {"codes": tuple(axes)}
    for name in ("scale", "offset"):
      part = getattr(self, name)
      inner[name] = part if part is None else _tiled(axes, part.shape)
    inner["x_scale"] = _activated.scale_axes(self, axes)
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
