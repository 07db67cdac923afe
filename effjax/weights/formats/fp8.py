"""Eight-bit floats e4m3 or e5m2, times a scale of each output.

Source: Micikevicius et al. 2022, arXiv:2209.05433, section 3; OCP 8-bit Floating Point
Specification 1.0. The scale maps the largest magnitude of a group to the largest value
(448 or 57344). Products run in the dtype of the activations, unless these are fp8 too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config, errors
from effjax.ops.matmul import rounding, tables
from effjax.weights.formats import _activated, _tabled, base
from effjax.weights.leaves import coded

VARIANTS = ("e4m3", "e5m2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(_activated.Activated, _tabled.Tabled):
  """Small floats times a scale.

  Attributes:
    variant: "e4m3" or "e5m2".
    group: consecutive inputs that share a scale; 0 for all of them.
    per_tensor: one scale for a whole matrix; needs group=0.
    scale_dtype: of the scales.
    activations, activation_scale, percentile: see FormatOptions.
  """

  variant: str = "e4m3"
  per_tensor: bool = False
  scale_dtype: str = "float32"

  def __post_init__(self):
    if self.variant not in VARIANTS:
      raise errors.unknown("variant", self.variant, VARIANTS)
    config.require(
      self.activations not in ("int8", "int4"),
      f"activations={self.activations!r} needs format='int'",
    )
    self.check_activations(coded.ACTIVATIONS, self.group == 0)
    config.require(
      self.activations == "none" or self.variant == "e4m3",
      "activations='fp8' needs variant='e4m3'",
    )
    config.require(self.group >= 0, f"group={self.group} must be 0 or positive")
    config.require(
      not self.per_tensor or self.group == 0, "per_tensor=True needs group=0"
    )
    if self.scale_dtype not in base.SCALE_DTYPES:
      raise errors.unknown("scale_dtype", self.scale_dtype, base.SCALE_DTYPES)

  @property
  def table(self) -> str:
    """The variant."""
    return self.variant

  def outer(self, x: jax.Array) -> jax.Array | None:
    """The largest magnitude of a whole matrix, where it has one scale."""
    if not self.per_tensor:
      return None
    return jnp.max(_tabled.absmax(x), axis=(-1, -2, -3), keepdims=True)

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """Scales."""
    largest = _tabled.absmax(x, shrink) if outer is None else outer * shrink
    scale = largest / tables.LARGEST[self.table]
    return {"scale": rounding.stored(scale, self.scale_dtype)}


TECHNIQUE = FP8
