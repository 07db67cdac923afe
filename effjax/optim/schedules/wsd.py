"""Warm-up, a stable stretch at the peak, then a short decay (WSD).

Source: Hu et al. 2024 (arXiv 2404.06395) for the three phases; Hagele et al. 2024
(arXiv 2405.18392) for the decay by 1 - sqrt(progress), which they find better than a
line. A run can be prolonged from any point before its decay. The first update already
has a rate above zero, and the final rate would be that of update `num_steps`.
"""

import dataclasses

import jax.numpy as jnp

from effjax.core import config
from effjax.optim import base, checks
from effjax.optim.schedules import _warmup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """Options of `wsd`.

  Attributes:
    warmup_steps: updates until the peak; None for 5 % of the run.
    decay_fraction: part of the run spent in the decay, rounded to whole updates.
    decay_shape: "linear" or "1-sqrt".
    final_fraction: rate after the last update, as a fraction of the peak.
  """

  warmup_steps: int | None = None
  decay_fraction: float = 0.2
  decay_shape: str = "1-sqrt"
  final_fraction: float = 0.0

  def __post_init__(self):
    checks.check_not_negative(self, "warmup_steps")
    checks.check_fractions(self, "decay_fraction", "final_fraction")
    checks.check_choice(self, "decay_shape", ("linear", "1-sqrt"))


def make(peak: float, num_steps: int, options: Options) -> base.Schedule:
  """The rate as a function of the step; see the module.

  Raises:
    InputError: warm-up and decay together are longer than the run.
  """
  warmup_steps = _warmup.num_warmup_steps(options.warmup_steps, num_steps)
  decay_steps = round(options.decay_fraction * num_steps)
  config.require(
    warmup_steps + decay_steps <= num_steps,
    f"warmup_steps={warmup_steps} and a decay of {decay_steps} steps do not fit into "
    f"{num_steps} steps; lower warmup_steps or decay_fraction",
  )
  start = num_steps - decay_steps
  final = options.final_fraction

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - start) / max(decay_steps, 1), 0.0, 1.0)
    if options.decay_shape == "1-sqrt":
      progress = jnp.sqrt(progress)
    decay = final + (1.0 - final) * (1.0 - progress)
    return peak * _warmup.factor(step, warmup_steps) * decay

  return rate


TECHNIQUE = base.ScheduleTechnique(make, Options)
