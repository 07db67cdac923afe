"""Choosing the next token from logits.

Sources: top-k, Fan et al. 2018, arXiv:1805.04833; nucleus (top-p), Holtzman et al.
2020, arXiv:1904.09751, eq. 2. Filters act after the temperature, top-k before top-p.
"""

import dataclasses

import jax
import jax.numpy as jnp

from effjax.core import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
  """How a token is chosen.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep only the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches p.
  """

  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    config.require(
      self.temperature >= 0, f"temperature={self.temperature} must not be negative"
    )
    config.require(self.top_k >= 0, f"top_k={self.top_k} must not be negative")
    config.require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")


def filter_logits(logits_BV: jax.Array, options: SamplingOptions) -> jax.Array:
  """Logits after temperature, top-k and top-p; dropped tokens get -inf.

  Needs a positive temperature.
  """
  logits_BV = logits_BV.astype(jnp.float32) / options.temperature
  if 0 < options.top_k < logits_BV.shape[-1]:
    kth_B1 = jax.lax.top_k(logits_BV, options.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if options.top_p < 1:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays while the probability of those before it is below p.
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    smallest_B1 = jnp.min(
      jnp.where(before_BV < options.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
    )
    logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
  return logits_BV


def sample(key: jax.Array, logits_BV: jax.Array, options: SamplingOptions) -> jax.Array:
  """One token for each row, int32 `[B]`.

  Args:
    key: random key; not used at temperature 0.
    logits_BV: logits.
    options: see SamplingOptions.
  """
  if options.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  filtered_BV = filter_logits(logits_BV, options)
  return jax.random.categorical(key, filtered_BV, axis=-1).astype(jnp.int32)
