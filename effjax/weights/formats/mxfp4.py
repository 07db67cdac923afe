"""MXFP4: floats e2m1 with a power of two for every 32 inputs, 4.25 bits a weight.

Source: OCP Microscaling Formats Specification 1.0, sections 5.2 and 6.3. The
specification fixes how values are decoded; how the power is chosen is an option, since
libraries differ.
"""

import dataclasses
from typing import ClassVar

from effjax.weights.formats import _microscaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class MXFP4(_microscaled.Microscaled):
  """See Microscaled."""

  TABLE: ClassVar[str] = "e2m1"


TECHNIQUE = MXFP4
