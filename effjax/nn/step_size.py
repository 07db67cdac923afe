"""Initial step sizes of state-space models, spread evenly in their logarithm.

Source: Gu et al. 2022, arXiv:2206.11893, section 4.4 (log-uniform); Gu and Dao 2023,
arXiv:2312.00752, section 3.6 (through the inverse of softplus).
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.weights import weight as weight_lib

# Step sizes behind a softplus start no smaller: its slope there is the step size.
_FLOOR = 1e-4


def log_init(dt_min: float, dt_max: float) -> weight_lib.Init:
  """Initializer of log dt, uniform between the logarithms of the bounds."""

  def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, math.log(dt_min), math.log(dt_max))

  return init


def bias_init(dt_min: float, dt_max: float) -> weight_lib.Init:
  """Initializer of b with softplus(b) log-uniform between the bounds."""
  log_dt = log_init(dt_min, dt_max)

  def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    dt = jnp.maximum(jnp.exp(log_dt(key, shape, dtype)), _FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))

  return init
