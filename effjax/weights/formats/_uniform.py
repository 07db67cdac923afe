"""What the formats share whose values are evenly spaced: codes times a scale."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.weights.formats import base
from effjax.weights.leaves import quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform(base.Format):
  """`(code - zero) * scale`; a subclass says how wide a grid is, and its codes."""

  @property
  def code_bits(self) -> int:
    """Bits that a code takes."""
    raise TypeError(f"{type(self).__name__} does not define code_bits")

  @property
  def code_range(self) -> tuple[int, int, DTypeLike]:
    """The least and the largest code, and the dtype that holds them."""
    raise TypeError(f"{type(self).__name__} does not define code_range")

  def encode(self, x: jax.Array, grid: base.Grid) -> jax.Array:
    """int8, or uint8 with zero points."""
    return self._clipped(jnp.round(_places(x, grid)))

  def neighbours(self, x: jax.Array, grid: base.Grid) -> tuple[jax.Array, jax.Array]:
    """The two codes around each weight; both the end where it lies beyond."""
    places = _places(x, grid)
    return self._clipped(jnp.floor(places)), self._clipped(jnp.ceil(places))

  def decode(self, codes: jax.Array, grid: base.Grid) -> jax.Array:
    """`(codes - zero) * scale`, in float32."""
    centred = codes.astype(jnp.float32)
    if "zero" in grid:
      centred -= grid["zero"].astype(jnp.float32)
    return centred * grid["scale"].astype(jnp.float32)

  def leaf(
    self,
    codes: jax.Array,
    grid: base.Grid,
    *,
    axis: int = -2,
    dtype: Any = jnp.float32,
  ) -> quantized.Quantized:
    """A Quantized leaf; it holds a scale for each output, also where all are one."""
    names = [name for name in ("scale", "zero") if name in grid]
    parts = [codes, *(base.an_output(grid[name], codes) for name in names)]
    if axis == -1:
      parts = [jnp.swapaxes(part, -1, -2) for part in parts]
    return quantized.Quantized.create(
      *parts,
      bits=self.code_bits,
      axis=axis,
      activations=getattr(self, "activations", "none"),
      dtype=dtype,
    )

  def _clipped(self, places: jax.Array) -> jax.Array:
    low, high, dtype = self.code_range
    return jnp.clip(places, low, high).astype(dtype)


def _places(x: jax.Array, grid: base.Grid) -> jax.Array:
  """Where on the grid each weight lies, as a number of steps."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  places = x / base.divisor(grid["scale"]).astype(x.dtype)
  return places + grid["zero"].astype(x.dtype) if "zero" in grid else places
