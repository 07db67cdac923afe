"""The linear warm-up that every schedule starts with."""

import jax
import jax.numpy as jnp

from effjax.core import config


def num_warmup_steps(warmup_steps: int | None, num_steps: int) -> int:
  """The warm-up asked for, or 5 % of the run; always shorter than the run.

  Raises:
    InputError: the warm-up leaves no step to train at the full rate.
  """
  if warmup_steps is None:
    return num_steps // 20
  config.require(
    warmup_steps < num_steps,
    f"warmup_steps={warmup_steps} must be less than the number of steps, {num_steps}",
  )
  return warmup_steps


def factor(step: jax.Array, warmup_steps: int) -> jax.Array:
  """Rises by equal parts from 1 / warmup_steps at step 0 to 1 at warmup_steps - 1."""
  return jnp.minimum(1.0, (step + 1.0) / max(warmup_steps, 1))
