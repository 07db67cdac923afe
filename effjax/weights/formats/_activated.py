"""What the formats share whose activations can be rounded too."""

import dataclasses
from collections.abc import Sequence

from effjax.core import config, errors
from effjax.ops.matmul import histogram
from effjax.weights.formats import base

SCALES = (base.DYNAMIC, *histogram.METHODS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activated(base.Format):
  """Options of rounded activations.

  Attributes:
    activations, activation_scale, percentile: see FormatOptions.
  """

  activations: str = "none"
  activation_scale: str = base.DYNAMIC
  percentile: float = 99.99

  def check_activations(self, kinds: Sequence[str], scales: bool) -> None:
    """Checks the options.

    Args:
      kinds: of activations that the format has.
      scales: whether its weights have one symmetric scale an output, or a matrix.

    Raises:
      InputError: an option is out of range or does not fit.
    """
    if self.activations not in kinds:
      raise errors.unknown("activations", self.activations, kinds)
    if self.activation_scale not in SCALES:
      raise errors.unknown("activation_scale", self.activation_scale, SCALES)
    rounded = self.activations != "none"
    config.require(
      rounded or self.activation_scale == base.DYNAMIC,
      f"activation_scale={self.activation_scale!r} needs activations other than 'none'",
    )
    config.require(
      0 < self.percentile <= 100,
      f"percentile={self.percentile} must be above 0 and at most 100",
    )
    config.require(
      not rounded or scales,
      f"activations={self.activations!r} needs group=0 and symmetric weights: the "
      "product of codes has one scale per output channel",
    )
