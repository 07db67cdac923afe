"""A weight that stays as it is, and a thin product beside it that trains (LoRA).

    W = base + scale * down @ up

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1, where A is `down^T` and B `up^T`;
`scale` is alpha / R there and alpha / sqrt(R) in Kalajdzievski 2023, arXiv:2312.03732.
The base may be any leaf: codes give QLoRA (Dettmers et al. 2023, arXiv:2305.14314,
equation 5), what is pruned gives its recovery. Products take the base as it takes its
own and add two thin ones; the sum is never formed, but by `dense` and convolutions.
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
class Adapted(leaf_lib.Leaf):
  """A matrix `[*stack, in, out]` or embedding `[V, D]` with a low-rank addition.

  Only the two factors train. They multiply in the dtype of the activations, like the
  base.

  Attributes:
    base: the weight, an array or any leaf.
    down: `[*stack, in, R]`.
    up: `[*stack, R, out]`.
    scale: `[*stack, 1, 1]`, what the product is multiplied by; layers may differ.
  """

  static_fields = ()
  trainable_fields = ("down", "up")

  base: Any
  down: Any
  up: Any
  scale: Any

  @classmethod
  def create(cls, base: Any, down: jax.Array, up: jax.Array, scale: Any) -> "Adapted":
    """Puts the parts together.

    Args:
      base, down, up: see the class.
      scale: a number for the whole stack, or `[*stack, 1, 1]`.

    Raises:
      InputError: the factors do not fit the base.
    """
    *stack, rows, columns = base.shape
    rank = down.shape[-1]
    config.require(
      tuple(down.shape) == (*stack, rows, rank)
      and tuple(up.shape) == (*stack, rank, columns),
      f"factors of shapes {tuple(down.shape)} and {tuple(up.shape)} do not make a "
      f"weight of shape {tuple(base.shape)}",
    )
    scale = jnp.asarray(scale, jnp.float32)
    config.require(
      scale.shape in ((), (*stack, 1, 1)),
      f"scale of shape {scale.shape} for a weight of shape {tuple(base.shape)}; give a "
      f"number, or {(*stack, 1, 1)}",
    )
    return cls(base, down, up, jnp.broadcast_to(scale, (*stack, 1, 1)))

  @property
  def shape(self) -> tuple[int, ...]:
    """Logical shape."""
    return tuple(self.base.shape)

  @property
  def dtype(self) -> jnp.dtype:
    """Logical dtype, that of the base."""
    return jnp.dtype(self.base.dtype)

  @property
  def rank(self) -> int:
    """R."""
    return self.down.shape[-1]

  def delta(self) -> jax.Array:
    """`scale * down @ up` of the logical shape, in the factors' dtype."""
    highest = jax.lax.Precision.HIGHEST
    product = jnp.matmul(self.down, self.up, precision=highest)
    return product * self.scale.astype(product.dtype)

  def dense(self) -> jax.Array:
    """The sum, rounded once to the base's dtype."""
    base = verbs.dense(self.base)
    wide = jnp.promote_types(base.dtype, self.down.dtype)
    return (base.astype(wide) + self.delta().astype(wide)).astype(self.dtype)

  def contract(self, x: jax.Array, *, transpose: bool = False) -> jax.Array:
    """The base's product and two thin ones; see weights.verbs.contract."""
    y = verbs.contract(x, self.base, transpose=transpose)
    factors = (self.up, self.down) if transpose else (self.down, self.up)
    h = verbs.contract(x, factors[0], transpose=transpose)
    # What is narrowest is scaled: R numbers a row.
    h = h * self.scale.astype(h.dtype).reshape((1,) * h.ndim)
    return y + verbs.contract(h, factors[1], transpose=transpose)

  def lookup(self, ids: jax.Array) -> jax.Array:
    """The base's rows, and R numbers for each times the right factor."""
    rows = verbs.lookup(self.base, ids)
    h = verbs.lookup(self.down, ids)
    h = h * self.scale.astype(h.dtype).reshape((1,) * h.ndim)
    return rows + verbs.contract(h, self.up).astype(rows.dtype)

  def grouped_contract(
    self, x: jax.Array, group_sizes: jax.Array | None = None
  ) -> jax.Array:
    """Each expert's product, with factors of its own; see verbs.grouped_contract."""
    y = verbs.grouped_contract(x, self.base, group_sizes)
    h = verbs.grouped_contract(x, self.down, group_sizes)
    # Rows are not told by expert where sizes are computed; the factors are.
    up = self.up * self.scale.astype(self.up.dtype)
    return y + verbs.grouped_contract(h, up, group_sizes)

  def inner_axes(self, axes: Sequence[Any]) -> dict[str, Any]:
    """Each factor has one of the two dimensions; R is never split."""
    *stack, rows, columns = axes
    return {
      "base": tuple(axes),
      "down": (*stack, rows, None),
      "up": (*stack, None, columns),
      "scale": (*stack, None, None),
    }


def is_adapted(leaf: Any) -> bool:
  """Whether a parameter is an adapted one, or has one inside of it."""
  if isinstance(leaf, Adapted):
    return True
  return leaf_lib.is_leaf_kind(leaf) and any(
    is_adapted(getattr(leaf, name)) for name in leaf.data_fields
  )
