"""The linear probe: the one minimum of what it says it minimizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.measure import probe

ANSWERS = ("down", "up", "sideways")


def _points(num=300, width=5, seed=0):
  """Three clouds that overlap."""
  rng = np.random.default_rng(seed)
  labels_N = rng.integers(0, 3, num)
  centres_AD = rng.normal(size=(3, width))
  x_ND = centres_AD[labels_N] + 0.8 * rng.normal(size=(num, width))
  return x_ND, labels_N, [f"text {i}" for i in range(num)]


def _objective(w_DA, b_A, x_ND, labels_N):
  """Of the docstring, in the words of JAX."""
  logits_NA = x_ND @ w_DA + b_A[None]
  nll_N = -jnp.take_along_axis(jax.nn.log_softmax(logits_NA), labels_N[:, None], 1)
  return nll_N.sum() + 0.5 * jnp.sum(w_DA**2)


def test_the_gradient_vanishes_at_the_fit():
  x_ND, labels_N, _ = _points()
  w_DA, b_A = probe.fit(x_ND, labels_N, 3)
  with jax.enable_x64(True):
    args = jnp.asarray(x_ND), jnp.asarray(labels_N)
    slopes = jax.grad(_objective, argnums=(0, 1))(w_DA, b_A, *args)
    start = jax.grad(_objective)(jnp.zeros_like(w_DA), jnp.zeros(3), *args)
  assert max(np.abs(s).max() for s in slopes) < 1e-3 * np.abs(start).max()
  assert np.abs(w_DA).max() > 0.1


def test_equal_to_a_search_by_hand():
  # Two answers and one input: by symmetry w = (-u, u), found on a fine grid.
  x_N1 = np.array([[-1.0], [-1.0], [1.0], [1.0], [1.0], [-1.0]])
  labels_N = np.array([0, 0, 1, 1, 0, 1])
  w_DA, b_A = probe.fit(x_N1, labels_N, 2)
  grid = np.linspace(-1, 1, 20001)
  sign_N = np.where(labels_N == 1, 1, -1) * x_N1[:, 0]
  loss = np.log1p(np.exp(-2 * grid[:, None] * sign_N)).sum(1) + grid**2
  np.testing.assert_allclose(w_DA, np.array([[-1, 1]]) * grid[loss.argmin()], atol=2e-4)
  np.testing.assert_allclose(b_A, [0, 0], atol=1e-5)


def test_texts_are_fitted_or_scored_and_never_both():
  x_ND, labels_N, texts = _points()
  found = probe.accuracy(x_ND, labels_N, texts, ANSWERS)
  assert found["num_examples"] + found["num_fitted"] == 300
  assert 30 < found["num_examples"] < 90
  assert found["accuracy"] > found["majority"] + 0.2
  # Each text again, with labels that are wrong: what is scored was not fitted.
  again = probe.accuracy(
    np.concatenate([x_ND, x_ND]), np.tile(labels_N, 2), texts * 2, ANSWERS
  )
  assert again["num_examples"] == 2 * found["num_examples"]
  # Where the answer is the text's own name, only a leak could get it right.
  rng = np.random.default_rng(1)
  marks_ND, random_N = np.eye(300), rng.integers(0, 3, 300)
  leaky = probe.accuracy(
    np.tile(marks_ND, (4, 1)), np.tile(random_N, 4), texts * 4, ANSWERS
  )
  assert leaky["accuracy"] < 0.6


def test_separable_points_are_all_right():
  labels_N = np.arange(300) % 3
  texts = [f"text {i}" for i in range(300)]
  found = probe.accuracy(np.eye(3)[labels_N], labels_N, texts, ANSWERS)
  assert found["accuracy"] == 1
  assert found["recall"] == dict.fromkeys(ANSWERS, 1.0)


def test_what_is_not_finite_has_no_accuracy():
  x_ND, labels_N, texts = _points()
  x_ND[7, 2] = np.nan
  found = probe.accuracy(x_ND, labels_N, texts, ANSWERS)
  assert found["accuracy"] is found["stderr"] is None
  assert found["num_examples"] > 0


def test_too_few_texts():
  with pytest.raises(errors.InputError, match="2 texts are too few for a probe"):
    probe.accuracy(np.ones((2, 3)), [0, 1], ["a", "a"], ANSWERS)
