"""A factored second moment and no momentum: state of a row and a column per matrix.

Source: Shazeer and Stern 2018 (arXiv 1804.04235), Algorithms 4 and 5. Deviations: the
step size is the schedule's (the paper's relative one is min(1e-2, 1 / sqrt(t))), times
max(eps2, rms(theta)) unless `scale_by_param` is off; weight decay, which the paper
lacks, is decoupled. Means over a parameter are those of one layer's matrix or vector,
also where layers are stacked in one array.

State: see `effjax.optim.factored.FactoredState`; a factored `[*stack, in, out]` keeps
`[*stack, in]` and `[*stack, out]`, anything else an array of its own shape.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from effjax.optim import base, blocks, checks, factored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of `adafactor`; the defaults are the paper's and optax's.

  Attributes:
    decay_exponent: the second moment decays by 1 - t^-decay_exponent.
    min_dim: both sides of a matrix must be this long for it to be factored.
    eps: added to the squared gradients.
    clip_rms: largest root mean square of a block's update.
    scale_by_param: whether steps are relative to the size of the parameter; a learning
      rate is then near 1e-2 where AdamW's is near 1e-3.
    param_rms_min: smallest size of a parameter in that (eps2 in the paper).
    weight_decay: per unit of learning rate.
    decay_embedding: whether embeddings decay like matrices.
  """

  decay_exponent: float = 0.8
  min_dim: int = 128
  eps: float = 1e-30
  clip_rms: float = 1.0
  scale_by_param: bool = True
  param_rms_min: float = 1e-3
  weight_decay: float = 0.0
  decay_embedding: bool = True

  def __post_init__(self):
    checks.check_positive(self, "decay_exponent", "min_dim", "eps", "clip_rms")
    checks.check_not_negative(self, "param_rms_min", "weight_decay")


def make(
  learning_rate: base.Schedule, specs: Mapping[str, Any], options: Options
) -> optax.GradientTransformation:
  """Adafactor; see the module for the layout of its state."""
  chain = [
    factored.scale_by_factored_rms(
      specs,
      decay_exponent=options.decay_exponent,
      min_dim=options.min_dim,
      epsilon=options.eps,
    ),
    blocks.clip_by_rms(specs, options.clip_rms),
  ]
  if options.scale_by_param:
    chain.append(blocks.scale_by_param_rms(specs, options.param_rms_min))
  mask = base.decay_mask(specs, options.decay_embedding)
  chain += [
    optax.add_decayed_weights(options.weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  ]
  return optax.chain(*chain)


TECHNIQUE = base.OptimizerTechnique(make, Options)
