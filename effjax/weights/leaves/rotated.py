"""A matrix held rotated, whose inputs are rotated by a Hadamard matrix while running.

`x W = (x R) (R^T W)` for any rotation R. Held are the values `R^T W`, where what one
input channel had is spread over all; and `x R`, with outliers spread likewise, is what
integer activations are rounded from. It is the online rotation of QuaRot (Ashkboos et
al. 2024, arXiv:2404.00456, section 4), for inputs that come out of a nonlinear product,
which nothing before it can have rotated.

R is block diagonal, each block `H / sqrt(block)` (see ops.matmul.hadamard), and its
product costs `block log(block)` work a token instead of `block^2`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from effjax.ops.matmul import hadamard
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs


@leaf_lib.register
@dataclasses.dataclass(frozen=True)
class Rotated(leaf_lib.Leaf):
  """A matrix `[*stack, in, out]` whose contracted axis is held rotated.

  Attributes:
    values: `R^T W` of the logical shape, an array or any leaf.
    block: input channels that are rotated together: all, or a divisor such as a head.
  """

  static_fields = ("block",)
  trainable_fields = ("values",)

  values: Any
  block: int

  @classmethod
  def create(cls, w: jax.Array, block: int | None = None) -> "Rotated":
    """Rotates a plain matrix.

    Args:
      w: `[*stack, in, out]`.
      block: channels that are rotated together; None for all of them.

    Raises:
      InputError: no Hadamard matrix of this size is known, or it does not tile.
    """
    block = w.shape[-2] if block is None else block
    columns = hadamard.blockwise(jnp.swapaxes(w, -1, -2), block)
    return cls(jnp.swapaxes(columns, -1, -2), block)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    return tuple(self.values.shape)

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return self.values.dtype

  def rotate(self, x: jax.Array) -> jax.Array:
    """`x R`: inputs `[..., in]` as the values take them."""
    return hadamard.blockwise(x, self.block)

  def rotate_hessian(self, hessian: jax.Array) -> jax.Array:
    """`R^T H R`: the sum of `x x^T` `[*stack, in, in]`, for rotated inputs."""
    with jax.default_matmul_precision("highest"):
      half = jnp.swapaxes(self.rotate(hessian), -1, -2)
      return jnp.swapaxes(self.rotate(half), -1, -2)

  def dense(self) -> jax.Array:
    """W: the rotation undone."""
    rows = jnp.swapaxes(verbs.dense(self.values), -1, -2)
    return jnp.swapaxes(hadamard.blockwise(rows, self.block, inverse=True), -1, -2)

  def contract(self, x: jax.Array, *, transpose: bool = False) -> jax.Array:
    """`(x R) values`; transposed, `x values^T R^T`."""
    if transpose:
      y = verbs.contract(x, self.values, transpose=True)
      return hadamard.blockwise(y, self.block, inverse=True)
    return verbs.contract(self.rotate(x), self.values)

  def grouped_contract(
    self, x: jax.Array, group_sizes: jax.Array | None = None
  ) -> jax.Array:
    """All experts rotate alike: rows are rotated before they are dealt out."""
    return verbs.grouped_contract(self.rotate(x), self.values, group_sizes)

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """The values tile the dimensions as they are."""
    return {"values": tuple(axes)}
