"""What the formats share whose codes stand for the values of a table."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from effjax.ops.matmul import tables
from effjax.weights.formats import base
from effjax.weights.leaves import coded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tabled(base.Format):
  """`table[code] * scale`; a subclass says what the scale is and how it is held."""

  TABLE: ClassVar[str] = ""

  @property
  def table(self) -> str:
    """A key of tables.BITS."""
    return self.TABLE

  def scale(self, grid: base.Grid) -> jax.Array:
    """The scales of a grid as the leaf computes them, in float32."""
    return grid["scale"].astype(jnp.float32)

  def held_scale(self, grid: base.Grid, axis: int) -> Any:
    """The scales as the leaf holds them: an array or a leaf."""
    return base.held(grid["scale"], axis)

  def encode(self, x: jax.Array, grid: base.Grid) -> jax.Array:
    """uint8, one an element."""
    return tables.encode(self._scaled(x, grid), self.table)

  def neighbours(self, x: jax.Array, grid: base.Grid) -> tuple[jax.Array, jax.Array]:
    """The two codes around each weight; both the end where it lies beyond."""
    return tables.neighbours(self._scaled(x, grid), self.table)

  def decode(self, codes: jax.Array, grid: base.Grid) -> jax.Array:
    """Values in float32."""
    return tables.decode(codes, self.table) * self.scale(grid)

  def leaf(
    self,
    codes: jax.Array,
    grid: base.Grid,
    *,
    axis: int = -2,
    dtype: Any = jnp.float32,
  ) -> coded.Coded:
    """A Coded leaf."""
    codes = codes if axis == -2 else jnp.swapaxes(codes, -1, -2)
    return coded.Coded.create(
      codes,
      self.held_scale(grid, axis),
      table=self.table,
      axis=axis,
      activations=getattr(self, "activations", "none"),
      dtype=dtype,
    )

  def _scaled(self, x: jax.Array, grid: base.Grid) -> jax.Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x / base.divisor(self.scale(grid)).astype(x.dtype)


def absmax(x: jax.Array, shrink: Any = 1.0) -> jax.Array:
  """The largest magnitude of each group, in float32 at least."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return jnp.max(jnp.abs(x), axis=-2, keepdims=True) * shrink
