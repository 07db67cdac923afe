"""Choosing the next token from logits.

Sources: repetition penalty, Keskar et al. 2019, arXiv:1909.05858, section 4.1, with the
sign of the score taken into account as transformers does; top-k, Fan et al. 2018,
arXiv:1805.04833; nucleus (top-p), Holtzman et al. 2020, arXiv:1904.09751, eq. 2; min-p,
Nguyen et al. 2024, arXiv:2407.01082, algorithm 1. They act in this order, that of
transformers: penalty, temperature, top-k, top-p, min-p. Deviation: of equally likely
tokens at a filter's edge all stay.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
  """How a token is chosen.

  Attributes:
    temperature: divides the logits; 0 takes the most likely token.
    top_k: keep only the k most likely tokens; 0 keeps all.
    top_p: keep the smallest set of most likely tokens whose probability reaches p.
    min_p: keep tokens at least p times as likely as the most likely one.
    repetition_penalty: divides the positive scores of tokens that have occurred, in the
      prompt too, and multiplies the negative ones; 1 is no penalty.
  """

  temperature: float = 0.8
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def __post_init__(self):
    config.require(
      self.temperature >= 0, f"temperature={self.temperature} must not be negative"
    )
    config.require(
      math.isfinite(self.temperature), f"temperature={self.temperature} must be finite"
    )
    config.require(self.top_k >= 0, f"top_k={self.top_k} must not be negative")
    config.require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]")
    config.require(0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1]")
    config.require(
      0 < self.repetition_penalty < math.inf,
      f"repetition_penalty={self.repetition_penalty} must be positive (1 for none)",
    )


class _Numbers(NamedTuple):
  """The options as arrays, None where a step has nothing to do.

  A program is compiled for which steps there are, not for their numbers.
  """

  temperature: Any = None
  top_p: Any = None
  min_p: Any = None
  penalty: Any = None


def filter_logits(
  logits_BV: jax.Array, options: SamplingOptions, seen_BV: jax.Array | None = None
) -> jax.Array:
  """Logits after the penalty, temperature and filters; dropped tokens get -inf.

  Needs a positive temperature.

  Args:
    logits_BV: logits.
    options: see SamplingOptions.
    seen_BV: which tokens have occurred; needed by the repetition penalty alone.
  """
  numbers = _numbers(options)
  scores_BV = _penalized(logits_BV, numbers, seen_BV)
  return _filtered(scores_BV, numbers, options.top_k)


def sample(
  key: jax.Array,
  logits_BV: jax.Array,
  options: SamplingOptions,
  seen_BV: jax.Array | None = None,
) -> jax.Array:
  """One token for each row, int32 `[B]`.

  Args:
    key: random key; not used at temperature 0.
    logits_BV: logits.
    options: see SamplingOptions.
    seen_BV: which tokens have occurred; needed by the repetition penalty alone.
  """
  if options.repetition_penalty == 1:
    seen_BV = None
  top_k = options.top_k if options.temperature > 0 else 0
  return _sample(key, logits_BV, _numbers(options), seen_BV, top_k=top_k)


@functools.partial(jax.jit, donate_argnames="seen_BV")
def mark_seen(seen_BV: jax.Array, token_B: jax.Array) -> jax.Array:
  """`seen_BV`, which is consumed, with one more token a row."""
  return seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)


@functools.partial(jax.jit, static_argnames="top_k")
def _sample(
  key: jax.Array,
  logits_BV: jax.Array,
  numbers: _Numbers,
  seen_BV: jax.Array | None,
  *,
  top_k: int,
) -> jax.Array:
  scores_BV = _penalized(logits_BV, numbers, seen_BV)
  if numbers.temperature is None:
    return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
  filtered_BV = _filtered(scores_BV, numbers, top_k)
  return jax.random.categorical(key, filtered_BV, axis=-1).astype(jnp.int32)


def _numbers(options: SamplingOptions) -> _Numbers:
  array = lambda value, used: np.float32(value) if used else None
  random = options.temperature > 0
  return _Numbers(
    temperature=array(options.temperature, random),
    top_p=array(options.top_p, random and options.top_p < 1),
    min_p=array(options.min_p, random and options.min_p > 0),
    penalty=array(options.repetition_penalty, options.repetition_penalty != 1),
  )


def _penalized(
  logits_BV: jax.Array, numbers: _Numbers, seen_BV: jax.Array | None
) -> jax.Array:
  scores_BV = logits_BV.astype(jnp.float32)
  if numbers.penalty is None:
    return scores_BV
  config.require(
    seen_BV is not None, "repetition_penalty needs seen_BV, the tokens so far"
  )
  penalized_BV = jnp.where(
    scores_BV > 0, scores_BV / numbers.penalty, scores_BV * numbers.penalty
  )
  return jnp.where(seen_BV, penalized_BV, scores_BV)


def _filtered(scores_BV: jax.Array, numbers: _Numbers, top_k: int) -> jax.Array:
  scores_BV = scores_BV / numbers.temperature
  if 0 < top_k < scores_BV.shape[-1]:
    kth_B1 = jax.lax.top_k(scores_BV, top_k)[0][:, -1:]
    scores_BV = jnp.where(scores_BV < kth_B1, -jnp.inf, scores_BV)
  if numbers.top_p is not None:
    sorted_BV = jnp.sort(scores_BV, axis=-1, descending=True)
    probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
    # A token stays while the probability of those before it is below p.
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    smallest_B1 = jnp.min(
      jnp.where(before_BV < numbers.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
    )
    scores_BV = jnp.where(scores_BV < smallest_B1, -jnp.inf, scores_BV)
  if numbers.min_p is not None:
    probs_BV = jax.nn.softmax(scores_BV, axis=-1)
    least_B1 = numbers.min_p * jnp.max(probs_BV, axis=-1, keepdims=True)
    scores_BV = jnp.where(probs_BV < least_B1, -jnp.inf, scores_BV)
  return scores_BV
