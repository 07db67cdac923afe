"""The sign of an interpolated momentum, with decoupled weight decay.

Source: Chen et al. 2023 (arXiv 2302.06675), Algorithm 2:

    theta <- theta - lr * (sign(b1 m + (1 - b1) g) + weight_decay * theta)
    m <- b2 m + (1 - b2) g

Every weight moves by the whole rate, so the paper uses rates 3 to 10 times smaller
than AdamW's and decays as many times larger.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from effjax.optim import base, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of `lion`; the betas are the paper's, the decay is optax's.

  Attributes:
    b1: share of the momentum in the update.
    b2: decay of the momentum.
    weight_decay: per unit of learning rate.
    decay_embedding: whether embeddings decay like matrices.
    momentum_dtype: "float32" or "bfloat16"; None for the parameter's.
  """

  b1: float = 0.9
  b2: float = 0.99
  weight_decay: float = 1e-3
  decay_embedding: bool = True
  momentum_dtype: str | None = None

  def __post_init__(self):
    checks.check_decay_rates(self, "b1", "b2")
    checks.check_not_negative(self, "weight_decay")
    checks.check_momentum_dtype(self)


def make(
  learning_rate: base.Schedule, specs: Mapping[str, Any], options: Options
) -> optax.GradientTransformation:
  """Lion; its state holds one array of each parameter's shape."""
  return optax.lion(
    learning_rate,
    b1=options.b1,
    b2=options.b2,
    mu_dtype=options.momentum_dtype,
    weight_decay=options.weight_decay,
    mask=base.decay_mask(specs, options.decay_embedding),
  )


TECHNIQUE = base.OptimizerTechnique(make, Options)
