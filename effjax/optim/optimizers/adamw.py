"""Adam with decoupled weight decay.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), Algorithm 2, with the decay
multiplied by the learning rate as in PyTorch and optax:

    theta <- theta - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * theta)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

from effjax.optim import base, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of `adamw`; the defaults are PyTorch's.

  Attributes:
    b1: decay of the mean of the gradients.
    b2: decay of the mean of their squares (0.95 is usual for language models).
    eps: added to the root.
    weight_decay: per unit of learning rate.
    decay_embedding: whether embeddings decay like matrices.
    momentum_dtype: "float32" or "bfloat16"; None for the parameter's.
  """

  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01
  decay_embedding: bool = True
  momentum_dtype: str | None = None

  def __post_init__(self):
    checks.check_decay_rates(self, "b1", "b2")
    checks.check_positive(self, "eps")
    checks.check_not_negative(self, "weight_decay")
    checks.check_momentum_dtype(self)


def make(
  learning_rate: base.Schedule, specs: Mapping[str, Any], options: Options
) -> optax.GradientTransformation:
  """AdamW; its state holds two arrays of each parameter's shape."""
  return optax.adamw(
    learning_rate,
    b1=options.b1,
    b2=options.b2,
    eps=options.eps,
    mu_dtype=options.momentum_dtype,
    weight_decay=options.weight_decay,
    mask=base.decay_mask(specs, options.decay_embedding),
  )


TECHNIQUE = base.OptimizerTechnique(make, Options)
