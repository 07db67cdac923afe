"""Stochastic gradient descent with momentum.

With the weight decay as an L2 penalty, inside the momentum, as in PyTorch:

    g <- g + weight_decay * theta;  m <- momentum * m + g
    theta <- theta - lr * (g + momentum * m if nesterov else m)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from effjax.optim import base, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of `sgd`.

  Attributes:
    momentum: decay of the sum of the gradients; 0 holds no state.
    nesterov: whether the update looks one step ahead.
    weight_decay: factor of the parameter in its gradient.
    decay_embedding: whether embeddings decay like matrices.
  """

  momentum: float = 0.9
  nesterov: bool = False
  weight_decay: float = 0.0
  decay_embedding: bool = True

  def __post_init__(self):
    checks.check_decay_rates(self, "momentum")
    checks.check_not_negative(self, "weight_decay")


def make(
  learning_rate: base.Schedule, specs: Mapping[str, Any], options: Options
) -> optax.GradientTransformation:
  """SGD; with momentum its state holds one array of each parameter's shape."""
  mask = base.decay_mask(specs, options.decay_embedding)
  return optax.chain(
    optax.add_decayed_weights(options.weight_decay, mask),
    optax.sgd(learning_rate, options.momentum or None, options.nesterov),
  )


TECHNIQUE = base.OptimizerTechnique(make, Options)
