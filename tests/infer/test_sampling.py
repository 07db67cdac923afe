"""Filters against a plain NumPy reading of their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.infer import sampling

LOGITS = jnp.log(jnp.array([[0.05, 0.4, 0.3, 0.2, 0.05]]))


def _kept(**options):
  options = sampling.SamplingOptions(temperature=1.0, **options)
  return np.isfinite(np.asarray(sampling.filter_logits(LOGITS, options)))[0].tolist()


def test_filters():
  assert _kept() == [True] * 5
  assert _kept(top_k=2) == [False, True, True, False, False]
  assert _kept(top_p=0.4) == [False, True, False, False, False]
  assert _kept(top_p=0.41) == [False, True, True, False, False]
  assert _kept(top_p=0.89) == [False, True, True, True, False]
  assert _kept(top_p=0.01) == [False, True, False, False, False]
  assert _kept(top_k=3, top_p=0.5) == [False, True, True, False, False]


def test_temperature_zero_is_greedy_and_seeds_repeat():
  greedy = sampling.SamplingOptions(temperature=0.0)
  assert sampling.sample(jax.random.key(0), LOGITS, greedy).tolist() == [1]
  options = sampling.SamplingOptions(temperature=1.0)
  draws = [int(sampling.sample(jax.random.key(i), LOGITS, options)[0]) for i in (3, 3)]
  assert draws[0] == draws[1]


def test_frequencies_follow_the_filtered_distribution():
  options = sampling.SamplingOptions(temperature=2.0, top_k=3)
  rows = jnp.broadcast_to(LOGITS, (20_000, 5))
  tokens = np.asarray(sampling.sample(jax.random.key(0), rows, options))
  weights = np.sqrt([0, 0.4, 0.3, 0.2, 0])
  expected = weights / weights.sum()
  observed = np.bincount(tokens, minlength=5) / len(tokens)
  np.testing.assert_allclose(observed, expected, atol=4 * np.sqrt(0.25 / 20_000))


@pytest.mark.parametrize(
  "options", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_mistakes(options):
  with pytest.raises(errors.InputError):
    sampling.SamplingOptions(**options)
