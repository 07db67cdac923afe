"""A weight of which N of any M inputs in a row stay, held as those and their places.

Really smaller: of 2:4 half of the values and two bits for each of them, as much as for
NVIDIA's sparse tensor cores (Mishra et al. 2021, arXiv:2104.08378, section 3), in an
order of our own. Products take the whole weight, put together while running: nothing
is saved in time.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import packing
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class NOfM(leaf_lib.Leaf):
  """A matrix `[*stack, in, out]` or embedding `[V, D]`, sparse along its inputs.

  Attributes:
    values: what stays, an array or any leaf of the weight's shape with N / M of the
      entries along `axis`.
    place_bits: uint8, places of the values in their groups, 0 to M - 1 and rising,
      packed along `axis` with just the bits that M places take.
    keep: N.
    of: M.
    axis: the axis of the groups, -2, or -1 for an embedding.
  """

  pruned = True
  static_fields = ("keep", "of", "axis")
  trainable_fields = ("values",)
  simulated = ("flops",)

  values: Any
  place_bits: Any
  keep: int
  of: int
  axis: int = -2

  @classmethod
  def create(
    cls, w: jax.Array, mask: jax.Array, *, keep: int, of: int, axis: int = -2
  ) -> "NOfM":
    """Takes out of w what a mask keeps: N in each group of M along `axis`.

    The mask's groups are not counted: where more are kept the last are lost, where
    fewer are, what is pruned comes back (see compress.prune, which makes such masks).

    Raises:
      InputError: shapes differ, or groups of M do not divide the axis.
    """
    config.require(axis in (-1, -2), f"axis={axis} must be -2 or -1")
    config.require(0 < keep < of, f"{keep} of {of}: N of M needs 0 < N < M")
    config.require(
      tuple(mask.shape) == tuple(w.shape),
      f"mask of shape {tuple(mask.shape)} for a weight of shape {tuple(w.shape)}",
    )
    size = w.shape[axis]
    config.require(
      size % of == 0, f"groups of {of} do not divide an axis of {size} inputs"
    )
    groups, kept = (_grouped(a, of, axis) for a in (w, mask))
    # A stable sort puts what is kept first, in its order.
    places = jnp.argsort(~kept, axis=-1, stable=True)[..., :keep]
    values = jnp.take_along_axis(groups, places, axis=-1)
    codes = _merged(places, axis).astype(jnp.uint8)
    packed = packing.pack_bits(codes, _place_bits(of), axis=axis)
    return cls(_merged(values, axis), packed, keep=keep, of=of, axis=axis)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    shape = list(self.values.shape)
    shape[self.axis] = shape[self.axis] // self.keep * self.of
    return tuple(shape)

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return self.values.dtype

  def places(self) -> jax.Array:
    """Places of the values in their groups, uint8, one a value."""
    size = self.values.shape[self.axis]
    return packing.unpack_bits(
      self.place_bits, _place_bits(self.of), size, signed=False, axis=self.axis
    )

  def mask(self) -> jax.Array:
    """Where values are, bool, of the logical shape."""
    return self._spread(jnp.ones(self.values.shape, jnp.bool_))

  def dense(self) -> jax.Array:
    """Values at their places, zeros elsewhere."""
    return self._spread(verbs.dense(self.values))

  def _spread(self, values: jax.Array) -> jax.Array:
    """One array like the values at their places, zeros elsewhere."""
    axis = self.axis % values.ndim
    cut = lambda a, group: a.reshape(*a.shape[:axis], -1, group, *a.shape[axis + 1 :])
    values, places = cut(values, self.keep), cut(self.places(), self.keep)
    shape = list(values.shape)
    shape[axis + 1] = self.of
    every = jax.lax.broadcasted_iota(jnp.uint8, shape, axis + 1)
    dense = jnp.zeros(shape, values.dtype)
    # One after the other: each pass is elementwise, where a sum over a group is not.
    for n in range(self.keep):
      one = lambda a, n=n: jax.lax.slice_in_dim(a, n, n + 1, axis=axis + 1)
      dense = jnp.where(one(places) == every, one(values), dense)
    return dense.reshape(self.shape)

  def lookup(self, ids: jax.Array) -> jax.Array:
    """Gathers rows of values and places, then puts together only those."""
    if self.axis != -1 or leaf_lib.is_leaf_kind(self.values):
      return super().lookup(ids)
    taken = jax.tree.map(lambda part: jnp.take(part, ids.reshape(-1), axis=0), self)
    return taken.dense().reshape(*ids.shape, self.shape[-1])

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Both parts tile the same dimensions as the weight."""
    return {"values": tuple(axes), "place_bits": tuple(axes)}


def _place_bits(of: int) -> int:
  """Bits that a place among `of` takes, of the widths that can be packed."""
  needed = (of - 1).bit_length()
  return next(bits for bits in packing.BITS if bits >= needed)


def _grouped(a: jax.Array, group: int, axis: int) -> jax.Array:
  """`axis` cut into groups and last: `[..., groups, group]`."""
  a = jnp.moveaxis(a, axis, -1)
  return a.reshape(*a.shape[:-1], -1, group)


def _merged(a: jax.Array, axis: int) -> jax.Array:
  """The inverse of `_grouped`."""
  return jnp.moveaxis(a.reshape(*a.shape[:-2], -1), -1, axis)
