"""Filters against a plain reading of their definitions, and against transformers."""

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
  assert _kept(min_p=0.49) == [False, True, True, True, False]
  assert _kept(min_p=0.51) == [False, True, True, False, False]
  assert _kept(min_p=1.0) == [False, True, False, False, False]
  assert _kept(top_k=2, min_p=0.49) == [False, True, True, False, False]


def test_penalty():
  logits = jnp.array([[2.0, -1.0, 0.0, 3.0]])
  seen = jnp.array([[True, True, True, False]])
  options = sampling.SamplingOptions(temperature=1.0, repetition_penalty=2.0)
  found = sampling.filter_logits(logits, options, seen)
  assert found.tolist() == [[1.0, -2.0, 0.0, 3.0]]
  with pytest.raises(errors.InputError, match="needs seen_BV"):
    sampling.filter_logits(logits, options)


def test_greedy_comes_after_the_penalty():
  logits = jnp.array([[2.0, 1.5, -5.0], [1.0, 1.5, 2.0]])
  seen = jnp.array([[True, False, False], [False, True, False]])
  plain = sampling.SamplingOptions(temperature=0.0, top_k=1, min_p=1.0)
  penalized = sampling.SamplingOptions(temperature=0.0, repetition_penalty=1.5)
  key = jax.random.key(0)
  assert sampling.sample(key, logits, plain, seen).tolist() == [0, 2]
  assert sampling.sample(key, logits, penalized, seen).tolist() == [1, 2]


def test_seen_tokens_are_marked():
  seen = jnp.zeros((2, 4), bool).at[0, 1].set(True)
  seen = sampling.mark_seen(seen, jnp.array([3, 0]))
  assert seen.tolist() == [[False, True, False, True], [True, False, False, False]]


CASES = [
  {"temperature": 0.7},
  {"top_k": 20},
  {"top_k": 500},
  {"top_p": 0.8},
  {"top_p": 0.05},
  {"min_p": 0.1},
  {"min_p": 1.0},
  {"repetition_penalty": 1.3},
  {"repetition_penalty": 0.8},
  {
    "temperature": 1.7,
    "top_k": 50,
    "top_p": 0.9,
    "min_p": 0.05,
    "repetition_penalty": 1.2,
  },
]


@pytest.mark.oracle
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case))
def test_equals_transformers(case, rng):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  logits = rng.normal(0, 4, (8, 400)).astype(np.float32)
  ids = rng.integers(0, 400, (8, 60))
  # The steps in the order in which transformers' own generate puts them.
  steps = {
    "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
    "temperature": transformers.TemperatureLogitsWarper,
    "top_k": transformers.TopKLogitsWarper,
    "top_p": transformers.TopPLogitsWarper,
    "min_p": transformers.MinPLogitsWarper,
  }
  expected = torch.from_numpy(logits)
  for name, step in steps.items():
    if name in case:
      expected = step(case[name])(torch.from_numpy(ids), expected)
  seen = np.zeros(logits.shape, bool)
  np.put_along_axis(seen, ids, True, axis=1)
  options = sampling.SamplingOptions(**({"temperature": 1.0} | case))
  arrays = jnp.asarray(logits), options, jnp.asarray(seen)
  found = np.asarray(sampling.filter_logits(*arrays))
  expected = expected.numpy()
  assert np.array_equal(np.isfinite(found), np.isfinite(expected))
  kept = np.isfinite(expected)
  np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-6)


def test_other_numbers_need_no_compilation():
  key = jax.random.key(0)
  seen = jnp.zeros(LOGITS.shape, bool)
  values = lambda x: sampling.SamplingOptions(
    temperature=0.5 + x, top_p=0.5 + x, min_p=0.1 + x, repetition_penalty=1.1 + x
  )
  sampling.sample(key, LOGITS, values(0.0), seen)
  before = sampling._sample._cache_size()
  for x in (0.1, 0.2, 0.3):
    sampling.sample(key, LOGITS, values(x), seen)
  assert sampling._sample._cache_size() == before


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
  "options",
  [
    {"temperature": -1.0},
    {"temperature": float("inf")},
    {"temperature": float("nan")},
    {"top_k": -1},
    {"top_p": 0.0},
    {"top_p": 1.5},
    {"min_p": -0.1},
    {"min_p": 1.1},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": float("inf")},
  ],
)
def test_mistakes(options):
  (name,) = options
  with pytest.raises(errors.InputError, match=f"{name}="):
    sampling.SamplingOptions(**options)
