"""A weight of which whole blocks are zero, held and multiplied without them.

Blocks of B inputs and C outputs that stay are held by columns of blocks, K in each; a
product takes, for each column, the K parts of its input that it needs. So it costs
what K says: K / (inputs / B) of a dense one. With as many blocks in each column
(pattern "BxC" with within="output") that is the density; where columns differ, all are
filled up with zeros to the longest.

Source of the layout: ELLPACK by blocks, as in cuSPARSE's Blocked-ELL, turned to the
outputs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class BlockSparse(leaf_lib.Leaf):
  """A matrix `[*stack, in, out]` of blocks, or an embedding `[V, D]` turned so.

  Attributes:
    values: `[*stack, out / C, K, B, C]`, an array, or a leaf of that shape.
    rows: int32 `[*stack, out / C, K]`, which block of inputs each is of. Of blocks that
      only fill a column up the values are zero.
    in_dim: size of the inputs.
    axis: where the weight has its inputs: -2, or -1 for an embedding.
  """

  pruned = True
  static_fields = ("in_dim", "axis")
  trainable_fields = ("values",)

  values: Any
  rows: Any
  in_dim: int
  axis: int = -2

  @classmethod
  def create(
    cls,
    w: jax.Array,
    mask: jax.Array,
    block: tuple[int, int],
    count: int | None = None,
    *,
    axis: int = -2,
  ) -> "BlockSparse":
    """Takes out of w the blocks in which a mask keeps anything.

    Args:
      w: `[*stack, in, out]`, or `[V, D]` with axis -1.
      mask: bool of the shape of w.
      block: inputs and outputs of a block.
      count: K, the most blocks that stay in a column; None to count them, of a mask
        that has values.
      axis: where w has its inputs.

    Raises:
      InputError: shapes differ, or blocks do not divide the matrix.
    """
    config.require(axis in (-1, -2), f"axis={axis} must be -2 or -1")
    config.require(
      tuple(mask.shape) == tuple(w.shape),
      f"mask of shape {tuple(mask.shape)} for a weight of shape {tuple(w.shape)}",
    )
    if axis == -1:
      w, mask = jnp.swapaxes(w, -1, -2), jnp.swapaxes(mask, -1, -2)
    *stack, in_dim, out_dim = w.shape
    height, width = block
    config.require(
      in_dim % height == 0 and out_dim % width == 0,
      f"blocks of {height}x{width} (inputs x outputs) do not divide a matrix of "
      f"{in_dim}x{out_dim}",
    )
    kept = jnp.any(_blocks(mask, height, width), axis=(-1, -2))
    if count is None:
      count = max(int(jnp.max(jnp.sum(kept, axis=-1))), 1)
    # A stable sort puts what is kept first, in its order.
    rows = jnp.argsort(~kept, axis=-1, stable=True)[..., :count].astype(jnp.int32)
    real = jnp.take_along_axis(kept, rows, axis=-1)
    blocks = _blocks(w, height, width)
    values = jnp.take_along_axis(blocks, rows[..., None, None], axis=-3)
    values = jnp.where(real[..., None, None], values, jnp.zeros((), w.dtype))
    return cls(values, rows, in_dim=in_dim, axis=axis)

  @property
  def block(self) -> tuple[int, int]:
    """Inputs and outputs of a block."""
    return tuple(self.values.shape[-2:])

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    *stack, columns, _, _, width = self.values.shape
    sizes = (self.in_dim, columns * width)
    return (*stack, *(sizes if self.axis == -2 else sizes[::-1]))

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return self.values.dtype

  def mask(self) -> jax.Array:
    """Which weights are held, bool, of the logical shape."""
    height, width = self.block
    here = jnp.any(self._here(jnp.bool_), axis=-2)
    mask = jnp.repeat(jnp.repeat(here, height, axis=-1), width, axis=-2)
    return jnp.swapaxes(mask, -1, -2) if self.axis == -2 else mask

  def dense(self) -> jax.Array:
    """Blocks at their places, zeros elsewhere."""
    height, _ = self.block
    # Added, not set: what fills a column up is zero, wherever it lies.
    blocks = jnp.einsum(
      "...nkr,...nkbc->...rbnc",
      self._here(self.dtype),
      verbs.dense(self.values),
      precision=jax.lax.Precision.HIGHEST,
    )
    *stack, rows, _, columns, width = blocks.shape
    w = blocks.reshape(*stack, rows * height, columns * width)
    return w if self.axis == -2 else jnp.swapaxes(w, -1, -2)

  def _here(self, dtype: Any) -> jax.Array:
    """Which block of inputs each one is of, `[*stack, columns, K, in / B]`."""
    return jax.nn.one_hot(self.rows, self.in_dim // self.block[0], dtype=dtype)

  def contract(self, x: jax.Array, *, transpose: bool = False) -> jax.Array:
    """See weights.verbs.contract."""
    if (self.axis == -1) != transpose:
      return super().contract(x, transpose=transpose)
    return _contract(x, verbs.dense(self.values), self.rows)

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Columns of blocks are split like outputs, the rows of a block like inputs."""
    *stack, inputs, outputs = axes
    if self.axis == -1:
      inputs, outputs = outputs, inputs
    return {
      "values": (*stack, outputs, None, inputs, None),
      "rows": (*stack, outputs, None),
    }


def _contract(x: jax.Array, values: jax.Array, rows: jax.Array) -> jax.Array:
  """`[..., in] x [columns, K, B, C] -> [..., columns * C]`."""
  columns, count, height, width = values.shape
  lead = x.shape[:-1]
  x_TRB = x.reshape(-1, x.shape[-1] // height, height)
  # For each column of blocks the inputs it needs, side by side.
  needed_NTK = jnp.take(x_TRB, rows, axis=1).swapaxes(0, 1)
  needed_NTK = needed_NTK.reshape(columns, len(x_TRB), count * height)
  w_NKC = values.reshape(columns, count * height, width).astype(x.dtype)
  y_NTC = jax.lax.dot_general(needed_NTK, w_NKC, (((2,), (1,)), ((0,), (0,))))
  return y_NTC.swapaxes(0, 1).reshape(*lead, columns * width)


def _blocks(w: jax.Array, height: int, width: int) -> jax.Array:
  """`[*stack, in, out]` as `[*stack, out / width, in / height, height, width]`."""
  *stack, in_dim, out_dim = w.shape
  split = w.reshape(*stack, in_dim // height, height, out_dim // width, width)
  return jnp.moveaxis(split, -2, -4)
