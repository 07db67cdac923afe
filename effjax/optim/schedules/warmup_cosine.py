"""Linear warm-up, then half a cosine down to a fraction of the peak.

Source: Loshchilov and Hutter 2017 (arXiv 1608.03983), one cycle. The first update
already has a rate above zero, and the final rate would be that of update `num_steps`,
the first after the run, so no update is lost to a rate of zero.
"""

import dataclasses

import jax.numpy as jnp

from effjax.optim import base, checks
from effjax.optim.schedules import _warmup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of `warmup_cosine`.

  Attributes:
    warmup_steps: updates until the peak; None for 5 % of the run.
    final_fraction: rate after the last update, as a fraction of the peak.
  """

  warmup_steps: int | None = None
  final_fraction: float = 0.0

  def __post_init__(self):
    checks.check_not_negative(self, "warmup_steps")
    checks.check_fractions(self, "final_fraction")


def make(peak: float, num_steps: int, options: Options) -> base.Schedule:
  """The rate as a function of the step; see the module."""
  warmup_steps = _warmup.num_warmup_steps(options.warmup_steps, num_steps)
  final = options.final_fraction

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - warmup_steps) / (num_steps - warmup_steps), 0.0, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return peak * _warmup.factor(step, warmup_steps) * (final + (1.0 - final) * cosine)

  return rate


TECHNIQUE = base.ScheduleTechnique(make, Options)
