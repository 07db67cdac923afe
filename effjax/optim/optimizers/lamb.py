"""Adam with each layer's step scaled to the norm of its weights, for large batches.

Source: You et al. 2020 (arXiv 1904.00962), Algorithm 2, with the identity as phi:

    r = m_hat / (sqrt(v_hat) + eps) + weight_decay * theta
    theta <- theta - lr * ||theta|| / ||r|| * r

Norms are of one layer's matrix or vector, also where layers are stacked in one array.
The ratio is 1 where a norm is 0. As in optax, it is not clamped.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from effjax.optim import base, blocks, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of `lamb`; the defaults are the paper's for BERT.

  Attributes:
    b1: decay of the mean of the gradients.
    b2: decay of the mean of their squares.
    eps: added to the root.
    weight_decay: weight of the parameter in the update, before the ratio.
    decay_embedding: whether embeddings decay like matrices.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-6
  weight_decay: float = 0.01
  decay_embedding: bool = True

  def __post_init__(self):
    checks.check_decay_rates(self, "b1", "b2")
    checks.check_positive(self, "eps")
    checks.check_not_negative(self, "weight_decay")


def make(
  learning_rate: base.Schedule, specs: Mapping[str, Any], options: Options
) -> optax.GradientTransformation:
  """LAMB; its state holds two arrays of each parameter's shape."""
  mask = base.decay_mask(specs, options.decay_embedding)
  return optax.chain(
    optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps),
    optax.add_decayed_weights(options.weight_decay, mask),
    blocks.scale_by_trust_ratio(specs),
    optax.scale_by_learning_rate(learning_rate),
  )


TECHNIQUE = base.OptimizerTechnique(make, Options)
