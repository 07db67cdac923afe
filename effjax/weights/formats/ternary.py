"""Minus one, zero and one: two bits a code, with the mean magnitude as the scale.

Source: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764), eq. 1 to 3: the scale is the
mean magnitude of the matrix, codes are rounded and clipped. Deviation: a scale may also
serve a group or an output, which their kernels do not allow. Codes take two bits each,
not 1.58.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config, errors
from effjax.weights.formats import _tabled, base
from effjax.weights.leaves import quantized

_BITS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(base.Format):
  """Codes from -1 to 1 times a scale.

  Attributes:
    group: consecutive inputs that share a scale; 0 for all of them.
    per_tensor: one scale for a whole matrix, as in the paper; needs group=0.
    scale_dtype: of the scales.
  """

  per_tensor: bool = True
  scale_dtype: str = "float32"

  def __post_init__(self):
    config.require(self.group >= 0, f"group={self.group} must be 0 or positive")
    config.require(
      not self.per_tensor or self.group == 0,
      f"group={self.group} needs per_tensor=False: ternary has one scale a matrix "
      "unless told otherwise",
    )
    if self.scale_dtype not in base.SCALE_DTYPES:
      raise errors.unknown("scale_dtype", self.scale_dtype, base.SCALE_DTYPES)

  def outer(self, x: jax.Array) -> jax.Array | None:
    """The mean magnitude of a whole matrix, where it has one scale."""
    if not self.per_tensor:
      return None
    return jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=(-1, -2, -3), keepdims=True)

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """Scales."""
    if outer is None:
      outer = jnp.mean(jnp.abs(x.astype(jnp.float32)), axis=-2, keepdims=True)
    return {"scale": _tabled.stored(outer * shrink, self.scale_dtype)}

  def encode(self, x: jax.Array, grid: base.Grid) -> jax.Array:
    """int8."""
    return _clipped(jnp.round(_places(x, grid)))

  def neighbours(self, x: jax.Array, grid: base.Grid) -> tuple[jax.Array, jax.Array]:
    """The two codes around each weight; both the end where it lies beyond."""
    places = _places(x, grid)
    return _clipped(jnp.floor(places)), _clipped(jnp.ceil(places))

  def decode(self, codes: jax.Array, grid: base.Grid) -> jax.Array:
    """Values in float32."""
    return codes.astype(jnp.float32) * grid["scale"].astype(jnp.float32)

  def leaf(
    self,
    codes: jax.Array,
    grid: base.Grid,
    *,
    axis: int = -2,
    dtype: Any = jnp.float32,
  ) -> quantized.Quantized:
    """A Quantized leaf of two bits."""
    parts = [codes, base.an_output(grid["scale"], codes)]
    if axis == -1:
      parts = [jnp.swapaxes(part, -1, -2) for part in parts]
    return quantized.Quantized.create(*parts, bits=_BITS, axis=axis, dtype=dtype)


def _places(x: jax.Array, grid: base.Grid) -> jax.Array:
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x / base.divisor(grid["scale"]).astype(x.dtype)


def _clipped(places: jax.Array) -> jax.Array:
  return jnp.clip(places, -1, 1).astype(jnp.int8)


TECHNIQUE = Ternary
