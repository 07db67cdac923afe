"""MXFP8: floats e4m3 or e5m2 with a power of two for every 32 inputs.

Source: OCP Microscaling Formats Specification 1.0, sections 5.2 and 6.3; 8.25 bits a
weight.
"""

import dataclasses

from effjax.core import errors
from effjax.weights.formats import _microscaled, fp8


@dataclasses.dataclass(frozen=True, kw_only=True)
class MXFP8(_microscaled.Microscaled):
  """See Microscaled.

  Attributes:
    variant: "e4m3" or "e5m2".
  """

  variant: str = "e4m3"

  def __post_init__(self):
    super().__post_init__()
    if self.variant not in fp8.VARIANTS:
      raise errors.unknown("variant", self.variant, fp8.VARIANTS)

  @property
  def table(self) -> str:
    """The variant."""
    return self.variant


TECHNIQUE = MXFP8
