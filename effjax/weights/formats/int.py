"""Integers of 2 to 8 bits: evenly spaced values, around zero or with a zero point.

Source: uniform affine grids as in Jacob et al. 2018, arXiv:1712.05877, eq. 1; the
conventions of symmetric ones in ops.matmul.rounding, which also says what each costs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core import config, errors
from effjax.ops.matmul import rounding
from effjax.weights.formats import _activated, _uniform, base
from effjax.weights.leaves import quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int(_activated.Activated, _uniform.Uniform):
  """Codes times a scale.

  Attributes:
    bits: 2, 3, 4, 5, 6 or 8.
    group, symmetric, grid, per_tensor, activations, activation_scale, percentile,
      scale_dtype: see FormatOptions.
  """

  bits: int = 8
  symmetric: bool = True
  grid: str = "narrow"
  per_tensor: bool = False
  scale_dtype: str = "float32"

  def __post_init__(self):
    config.require(
      self.bits in quantized.BITS, f"bits={self.bits} must be one of {quantized.BITS}"
    )
    config.require(self.group >= 0, f"group={self.group} must be 0 or positive")
    config.require(self.activations != "fp8", "activations='fp8' needs format='fp8'")
    self.check_activations(quantized.ACTIVATIONS, self.group == 0 and self.symmetric)
    config.require(
      not self.per_tensor or self.group == 0, "per_tensor=True needs group=0"
    )
    if self.grid not in rounding.GRIDS:
      raise errors.unknown("grid", self.grid, rounding.GRIDS)
    if self.scale_dtype not in base.SCALE_DTYPES:
      raise errors.unknown("scale_dtype", self.scale_dtype, base.SCALE_DTYPES)

  def outer(self, x: jax.Array) -> jax.Array | None:
    """Least and largest weight of a whole matrix, where it has one scale."""
    if not self.per_tensor:
      return None
    axes = (-1, -2, -3)
    return jnp.stack(
      [x.min(axis=axes, keepdims=True), x.max(axis=axes, keepdims=True)], axis=0
    )

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """Scales, and zero points of an asymmetric grid."""
    if outer is None:
      least, most = x.min(axis=-2, keepdims=True), x.max(axis=-2, keepdims=True)
    else:
      least, most = outer
    scale, zero = rounding.fit_range(
      least * shrink,
      most * shrink,
      self.bits,
      self.symmetric,
      grid=self.grid,
      scale_dtype=self.scale_dtype,
    )
    return {"scale": scale} if zero is None else {"scale": scale, "zero": zero}

  @property
  def code_bits(self) -> int:
    """The option."""
    return self.bits

  @property
  def code_range(self) -> tuple[int, int, DTypeLike]:
    """As the grid's convention says."""
    return rounding.code_range(self.bits, self.symmetric, self.grid)


TECHNIQUE = Int
