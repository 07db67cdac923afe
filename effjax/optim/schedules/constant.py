"""The same rate for every update, after an optional linear warm-up."""

import dataclasses

import jax.numpy as jnp

from effjax.optim import base, checks
from effjax.optim.schedules import _warmup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of `constant`.

  Attributes:
    warmup_steps: updates until the full rate.
  """

  warmup_steps: int = 0

  def __post_init__(self):
    checks.check_not_negative(self, "warmup_steps")


def make(peak: float, num_steps: int, options: Options) -> base.Schedule:
  """The rate as a function of the step; see the module."""
  warmup_steps = _warmup.num_warmup_steps(options.warmup_steps, num_steps)

  def rate(step):
    return peak * _warmup.factor(jnp.asarray(step, jnp.float32), warmup_steps)

  return rate


TECHNIQUE = base.ScheduleTechnique(make, Options)
