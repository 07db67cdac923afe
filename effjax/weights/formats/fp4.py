"""Four-bit floats e2m1, from 0.5 to 6, times a scale of each group.

Source: the E2M1 element of the OCP Microscaling Formats Specification 1.0, section
5.3.3, here with an ordinary scale: the group's largest magnitude over 6. (With powers
of two as scales it is mxfp4, with float8 ones nvfp4. The "fp4" of bitsandbytes is
another set of values.)
"""

import dataclasses
from typing import Any, ClassVar

import jax

from effjax.core import config, errors
from effjax.ops.matmul import rounding, tables
from effjax.weights.formats import _tabled, base


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP4(_tabled.Tabled):
  """Small floats times a scale.

  Attributes:
    group: consecutive inputs that share a scale; 0 for all of them.
    scale_dtype: of the scales.
  """

  TABLE: ClassVar[str] = "e2m1"

  group: int = 64
  scale_dtype: str = "float32"

  def __post_init__(self):
    config.require(self.group >= 0, f"group={self.group} must be 0 or positive")
    if self.scale_dtype not in base.SCALE_DTYPES:
      raise errors.unknown("scale_dtype", self.scale_dtype, base.SCALE_DTYPES)

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """Scales."""
    del outer
    scale = _tabled.absmax(x, shrink) / tables.LARGEST[self.table]
    return {"scale": rounding.stored(scale, self.scale_dtype)}


TECHNIQUE = FP4
