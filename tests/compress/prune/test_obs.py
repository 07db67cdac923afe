"""OBS against the closed form of every choice of weights."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.prune import obs
from effjax.core import errors
from tests.compress.hessian_problems import problem
from tests.compress.prune.test_sparsegpt import prune


def _best_rest(w, h, lost):
  """What is left of w when `lost` are zero and the rest is moved to where it is least.

  The error is e^T H e with e = w' - w; its minimum over the free part is a solve.
  """
  kept = np.setdiff1d(np.arange(len(w)), lost)
  best = np.zeros(len(w))
  moved = np.linalg.solve(h[np.ix_(kept, kept)], h[np.ix_(kept, lost)] @ w[lost])
  best[kept] = w[kept] + moved
  error = best - w
  return best, error @ h @ error


def _output(w, h, lost):
  with jax.enable_x64(True):
    inverse = jnp.asarray(np.linalg.inv(h))
    found = obs.prune_output(jnp.asarray(w), inverse, jnp.asarray(lost))
    return [np.asarray(part) for part in found]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [6, 8])
def test_each_step_is_the_best_of_all(seed, size):
  w, h = problem(seed, 8, 1)
  w, h = w[:size, 0], h[:size, :size]
  gone: list[int] = []
  for lost in range(1, size):
    # Greedy, by brute force: every weight that is left, all others moved for the best.
    costs = {
      q: _best_rest(w, h, np.array([*gone, q]))[1] for q in range(size) if q not in gone
    }
    gone.append(min(costs, key=costs.get))
    values, mask, loss = _output(w, h, lost)
    expected, cost = _best_rest(w, h, np.array(gone))
    assert set(np.flatnonzero(~mask)) == set(gone)
    np.testing.assert_allclose(values, expected, atol=1e-9)
    np.testing.assert_allclose(loss, cost, rtol=1e-6)


def test_one_weight_less_is_the_best_of_all_and_more_are_close():
  ratios = []
  for seed in range(6):
    w, h = problem(seed, 8, 1)
    w = w[:, 0]
    subsets = itertools.combinations(range(8), 4)
    best = min(_best_rest(w, h, np.array(lost))[1] for lost in subsets)
    ratios.append(_output(w, h, 4)[2] / best)
  assert min(ratios) >= 1 - 1e-9  # nothing is better than the best
  assert np.mean(ratios) < 1.5


def test_a_matrix_is_its_outputs_and_loses_less_than_with_sparsegpt():
  w, h = problem(1, 32, 12)
  damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(32)
  with jax.enable_x64(True):
    leaf = prune("obs", jnp.asarray(w), jnp.asarray(h), sparsity=0.6)
    swept = prune("sparsegpt", jnp.asarray(w), jnp.asarray(h), sparsity=0.6)
    got, other = np.asarray(leaf.dense()), np.asarray(swept.dense())
    assert (np.asarray(leaf.mask()).sum(axis=0) == 32 - round(0.6 * 32)).all()
  for o in range(12):
    expected = _output(w[:, o], damped, round(0.6 * 32))[0]
    np.testing.assert_allclose(got[:, o], expected, atol=1e-8)
  loss = lambda new: np.sum((new - w) * (damped @ (new - w)))
  assert loss(got) < 0.9 * loss(other)


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"within": "matrix"}])
def test_bad_options(options):
  w, h = (jnp.asarray(a, jnp.float32) for a in problem())
  with pytest.raises(errors.InputError, match="obs prunes single weights"):
    prune("obs", w, h, **options)
