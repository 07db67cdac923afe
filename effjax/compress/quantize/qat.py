"""Quantization-aware training: weights that train as floats and are used quantized.

Source: Jacob et al. 2018, arXiv:1712.05877, section 3, with gradients straight through
the rounding (Bengio et al. 2013, arXiv:1308.3432). The grid is fitted to the weights in
every use, exactly as `rtn` fits it, and products are those of the quantized leaf, so
that a model computes the same before and after `harden`. Deviation: no averages of
activations' ranges are gathered in training; they are the format's, per token or
calibrated before. Train with a stage "train" after this one, then `harden`.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from effjax.compress.quantize import _fake
from effjax.core import select, technique
from effjax.weights.formats import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class QATOptions(base.FormatOptions):
  """Options of quantization-aware training: those of the format."""


def prepare(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: QATOptions,
) -> dict[str, Any]:
  """Wraps the selected parameters; no value changes.

  A `Masked` parameter keeps its mask, and each factor of a `LowRank` one is wrapped.
  """
  return _fake.wrap(params, specs, paths, "qat", options, stats)


TECHNIQUE = technique.Transform(
  fn=prepare,
  options_cls=QATOptions,
  default_where=select.Where(kind=("matrix",)),
)
