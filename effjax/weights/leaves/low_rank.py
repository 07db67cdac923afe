"""A weight as the product of two thinner ones, multiplied one after the other.

`[in, R] [R, out]` holds and multiplies R (in + out) numbers a row instead of in * out.
Either factor may be any leaf: an array that trains, integer codes, another product.
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
class LowRank(leaf_lib.Leaf):
  """A matrix `[*stack, in, out]` or embedding `[V, D]` of rank R at most.

  Attributes:
    left: `[*stack, in, R]`, an array or any leaf.
    right: `[*stack, R, out]`, likewise.
  """

  static_fields = ()
  trainable_fields = ("left", "right")

  left: Any
  right: Any

  @classmethod
  def create(cls, left: Any, right: Any) -> "LowRank":
    """The product of two factors.

    Raises:
      InputError: the factors do not fit.
    """
    config.require(
      left.shape[:-2] == right.shape[:-2] and left.shape[-1] == right.shape[-2],
      f"factors of shapes {tuple(left.shape)} and {tuple(right.shape)} have no product",
    )
    return cls(left, right)

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    return (*self.left.shape[:-1], self.right.shape[-1])

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype."""
    return self.left.dtype

  @property
  def rank(self) -> int:
    """R."""
    return self.left.shape[-1]

  def dense(self) -> jax.Array:
    """The product."""
    return jnp.matmul(verbs.dense(self.left), verbs.dense(self.right))

  def contract(self, x: jax.Array, *, transpose: bool = False) -> jax.Array:
    """Two products through R channels; see weights.verbs.contract."""
    factors = (self.right, self.left) if transpose else (self.left, self.right)
    for factor in factors:
      x = verbs.contract(x, factor, transpose=transpose)
    return x

  def lookup(self, ids: jax.Array) -> jax.Array:
    """Rows of R numbers, then the product with the right factor."""
    return verbs.contract(verbs.lookup(self.left, ids), self.right)

  def grouped_contract(
    self, x: jax.Array, group_sizes: jax.Array | None = None
  ) -> jax.Array:
    """Two grouped products; see weights.verbs.grouped_contract."""
    x = verbs.grouped_contract(x, self.left, group_sizes)
    return verbs.grouped_contract(x, self.right, group_sizes)

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Each factor has one of the two dimensions; R is never split."""
    *stack, rows, columns = axes
    return {"left": (*stack, rows, None), "right": (*stack, None, columns)}
