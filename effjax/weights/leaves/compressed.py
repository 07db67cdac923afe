"""A pruned weight of any pattern, held as what stays and where it was.

Really smaller, in memory and on disk: the kept weights in a flat list, and their places
as a bitmap or as compressed rows (ops.matmul.places), which can be chosen by size. What
stays may be codes of a number format; then the codes of the rest are gone as well, and
scales are held whole. Products take the whole weight, put together while running:
nothing is saved in time.

Source of the layout: compressed sparse rows, as in Han et al. 2015, arXiv:1510.00149,
section 2, with absolute columns in place of differences and Huffman codes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import packing, places, tables
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import coded, quantized

# Leaf kinds whose codes, one a weight, can be taken apart.
CODED = (quantized.Quantized, coded.Coded)


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class Compressed(leaf_lib.Leaf):
  """A matrix `[*stack, R, C]`, an embedding among them, of which K weights are held.

  Either values or codes with their grid are there, and one of the two layouts.

  Attributes:
    values: `[*stack, K]`, what stays, row after row; zeros fill a list up.
    codes: uint8, packed from `[*stack, K]` with just the bits of a code.
    grid: the leaf that the codes belong to, without them: scales, zero points, ...
    mask_bits: uint8 `[*stack, R, ceil(C / 8)]`, bit 1 is a kept weight.
    row_ends: unsigned `[*stack, R]`, how much of a list is in the rows up to each.
    columns: unsigned `[*stack, K]`.
    cols: C.
  """

  pruned = True
  static_fields = ("cols",)
  simulated = ("flops",)

  values: Any
  codes: Any
  grid: Any
  mask_bits: Any
  row_ends: Any
  columns: Any
  cols: int

  @classmethod
  def create(
    cls,
    w: Any,
    mask: jax.Array,
    *,
    layout: str | None = None,
    count: int | None = None,
  ) -> "Compressed":
    """Takes out of w what a mask keeps.

    Args:
      w: an array, or a leaf of CODED, of shape `[*stack, R, C]`.
      mask: bool of that shape.
      layout: one of places.LAYOUTS; None for the smaller one.
      count: the most that is kept of a matrix; None to count it, of a mask that has
        values.

    Raises:
      InputError: shapes differ, the leaf is of another kind, or no such layout.
    """
    shape = tuple(w.shape)
    config.require(
      tuple(mask.shape) == shape,
      f"mask of shape {tuple(mask.shape)} for a weight of shape {shape}",
    )
    config.require(
      not leaf_lib.is_leaf_kind(w) or isinstance(w, CODED),
      f"nothing can be taken out of a {getattr(w, 'kind', '')} leaf; arrays and codes "
      "(quantized, coded) can be compressed",
    )
    if count is None:
      count = int(jnp.max(jnp.sum(mask, axis=(-1, -2), dtype=jnp.int32)))
    layout = layout or places.smallest(*shape[-2:], count)
    places.check(layout, shape)
    mask_bits = row_ends = columns = None
    if layout == "bitmap":
      mask_bits = packing.pack_mask(mask)
    else:
      row_ends, columns = _each(lambda m: places.to_csr(m, count), 2, mask)
    at = _each(lambda m: places.find(m, count), 2, mask)
    parts = mask_bits, row_ends, columns, shape[-1]
    if not leaf_lib.is_leaf_kind(w):
      return cls(_taken(w, at), None, None, *parts)
    codes = packing.pack_bits(_taken(_codes(w), at), _bits(w), axis=-1)
    return cls(None, codes, dataclasses.replace(w, codes=None), *parts)

  @property
  def is_array(self) -> bool:
    """Unless codes stay."""
    return self.values is not None

  @property
  def layout(self) -> str:
    """One of places.LAYOUTS."""
    return "csr" if self.mask_bits is None else "bitmap"

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    if self.mask_bits is None:
      return (*self.row_ends.shape, self.cols)
    return (*self.mask_bits.shape[:-1], self.cols)

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return self.grid.dtype if self.values is None else self.values.dtype

  def mask(self) -> jax.Array:
    """Where weights are held, bool, of the logical shape."""
    if self.mask_bits is not None:
      return packing.unpack_mask(self.mask_bits, self.cols)
    size = self.shape[-2:]
    keep = lambda at: places.scatter(jnp.ones(at.shape, jnp.bool_), at, size)
    return _each(keep, 1, self._places())

  def dense(self) -> jax.Array:
    """What stays at its places, zeros elsewhere."""
    if self.values is not None:
      return self._spread(self.values)
    w = self._whole(self._spread(self._unpacked()))
    return jnp.where(self.mask(), w.dense(), jnp.zeros((), self.dtype))

  def refill(self, w: jax.Array) -> "Compressed":
    """The same places with the values that an array of the logical shape has there."""
    if self.mask_bits is None:
      at = self._places()
    else:
      # Its length is that of the list: `find` fills it up to the same.
      count = self.values.shape[-1]
      at = _each(lambda m: places.find(m, count), 2, self.mask())
    return dataclasses.replace(self, values=_taken(w, at))

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Lists are of both dimensions at once; the grid is as its own kind says."""
    *stack, rows, cols = axes
    flat = (*stack, (rows, cols))
    return {
      "values": flat,
      "codes": flat,
      "grid": tuple(axes),
      "mask_bits": tuple(axes),
      "row_ends": (*stack, rows),
      "columns": flat,
    }

  def _places(self) -> jax.Array:
    """Flat places of CSR, `[*stack, K]`."""
    one = functools.partial(places.from_csr, cols=self.cols)
    return _each(lambda parts: one(*parts), 1, (self.row_ends, self.columns))

  def _spread(self, kept: jax.Array) -> jax.Array:
    """A list `[*stack, K]` as a matrix of the logical shape."""
    if self.mask_bits is None:
      size = self.shape[-2:]
      one = lambda parts: places.scatter(*parts, size)
      return _each(one, 1, (kept, self._places()))
    spread = lambda parts: places.spread(*parts, self.cols)
    return _each(spread, 2, (kept, self.mask_bits))

  def _unpacked(self) -> jax.Array:
    """The codes, one an element, `[*stack, K]`."""
    bits = _bits(self.grid)
    size = self.codes.shape[-1] * 8 // bits
    signed = isinstance(self.grid, quantized.Quantized) and self.grid.symmetric
    return packing.unpack_bits(self.codes, bits, size, signed=signed, axis=-1)

  def _whole(self, codes: jax.Array) -> Any:
    """The leaf of the grid with codes of the logical shape."""
    leaf, bits = self.grid, _bits(self.grid)
    codes = jnp.swapaxes(codes, -1, -2) if getattr(leaf, "swapped", 0) else codes
    codes = packing.pack_bits(codes, bits, axis=leaf.axis) if bits < 8 else codes
    return dataclasses.replace(leaf, codes=codes)


def _bits(leaf: Any) -> int:
  """Bits of a code."""
  return tables.BITS[leaf.table] if isinstance(leaf, coded.Coded) else leaf.bits


def _codes(leaf: Any) -> jax.Array:
  """The codes of a leaf of CODED, one an element, of its logical shape."""
  codes = leaf.unpacked()
  return jnp.swapaxes(codes, -1, -2) if getattr(leaf, "swapped", 0) else codes


def _taken(w: jax.Array, at: jax.Array) -> jax.Array:
  """Entries `[*stack, K]` of matrices `[*stack, R, C]` at flat places `[*stack, K]`."""
  flat = w.reshape(*w.shape[:-2], w.shape[-2] * w.shape[-1])
  return _each(lambda parts: places.gather(*parts), 1, (flat, at))


def _each(one: Callable[[Any], Any], ndim: int, parts: Any) -> Any:
  """`one` of each matrix or list of what is stacked: `ndim` axes of the last array."""
  stack = jax.tree.leaves(parts)[-1].shape[:-ndim]
  flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[len(stack) :]), parts)
  made = jax.vmap(one)(flat)
  return jax.tree.map(lambda a: a.reshape(*stack, *a.shape[1:]), made)
