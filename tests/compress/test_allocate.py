"""Allocations against exhaustive search over all choices of all units."""

import itertools

import numpy as np
import pytest

from effjax.compress import allocate
from effjax.core import errors


def _exhaustive(costs, losses, budget):
  """The least loss within the budget, and the least cost that has it."""
  units = range(len(costs))
  found = [
    (sum(losses[u][c] for u, c in zip(units, choices, strict=True)), cost)
    for choices in itertools.product(range(len(costs[0])), repeat=len(costs))
    if (cost := sum(costs[u][c] for u, c in zip(units, choices, strict=True))) <= budget
  ]
  return min(found)


def _problem(rng, kind):
  """Integer losses, so that sums are exact and ties are common, unless "smooth"."""
  num_units, num_choices = rng.integers(1, 7), rng.integers(1, 5)
  shape = (num_units, num_choices)
  if kind == "ties":
    return rng.integers(0, 4, shape), rng.integers(0, 4, shape).astype(float)
  if kind == "negative":
    return rng.integers(0, 50, shape), rng.integers(-50, 50, shape).astype(float)
  if kind == "closed":
    losses = rng.integers(0, 50, shape).astype(float)
    losses[rng.random(shape) < 0.3] = np.inf
    losses[:, rng.integers(num_choices)] = 7
    return rng.integers(0, 50, shape), losses
  # As of formats: costs and losses of a unit grow with its size, powers of two.
  size = 2 ** rng.integers(4, 8, (num_units, 1))
  bits = np.array([2, 3, 4, 8])[None]
  return size * bits, rng.random((num_units, 1)) * size * 4.0**-bits


@pytest.mark.parametrize("kind", ["ties", "negative", "closed", "smooth"])
def test_exact_equals_exhaustive_search(rng, kind):
  tried = 0
  for _ in range(150):
    costs, losses = _problem(rng, kind)
    least = np.where(np.isinf(losses), 10**6, costs).min(axis=1).sum()
    budget = int(rng.integers(least, costs.max(axis=1).sum() + 2))
    got = allocate.allocate(costs, losses, budget)
    loss, cost = _exhaustive(costs.tolist(), losses.tolist(), budget)
    units = np.arange(len(costs))
    assert got.cost == costs[units, got.choices].sum() <= budget
    if kind == "smooth":
      np.testing.assert_allclose(got.loss, loss, rtol=1e-12)
    else:
      assert (got.loss, got.cost) == (loss, cost)
    tried += loss < losses[units, [0] * len(units)].sum()
  assert tried > 30  # of the problems many have something to gain


def test_losses_of_very_different_sizes_are_told_apart():
  costs = np.tile([1, 2], (4, 1))
  losses = np.array([[1e3, 1e2], [3e-9, 1e-9], [2e-9, 1e-9], [1e-9, 0]])
  got = allocate.allocate(costs, losses, 6)
  assert got.choices == (1, 1, 0, 0)


def test_greedy_is_the_linear_relaxation_where_steps_just_fit(rng):
  for _ in range(50):
    costs, losses = _problem(rng, "smooth")
    exact = allocate.allocate(costs, losses, int(costs.max(axis=1).sum() * 0.7))
    # At what greedy spends, nothing is better: its steps end on a corner of the hull.
    greedy = allocate.allocate(costs, losses, exact.cost, "greedy")
    again = allocate.allocate(costs, losses, greedy.cost)
    assert exact.loss <= greedy.loss * (1 + 1e-12)
    assert again.loss <= greedy.loss * (1 + 1e-12)
  # One corner exactly: the first step of unit 0 is worth most, then that of unit 1.
  costs = [[1, 2, 3], [1, 2, 3]]
  losses = [[9.0, 3.0, 2.0], [8.0, 4.0, 3.0]]
  greedy = lambda budget: allocate.allocate(costs, losses, budget, "greedy")
  assert greedy(2).choices == (0, 0)
  assert greedy(3).choices == (1, 0)
  assert greedy(4).choices == (1, 1)
  assert greedy(6).choices == (2, 2)


def test_greedy_jumps_over_what_is_above_the_hull():
  # The middle choice is worth less a cost than going on to the last.
  costs, losses = [[0, 1, 2]], [[10.0, 9.0, 0.0]]
  assert allocate.allocate(costs, losses, 2, "greedy").choices == (2,)
  assert allocate.allocate(costs, losses, 1, "greedy").choices == (0,)
  assert allocate.allocate(costs, losses, 1).choices == (1,)


def test_a_step_that_does_not_fit_leaves_room_for_others():
  costs, losses = [[0, 10], [0, 1]], [[100.0, 0.0], [1.0, 0.0]]
  assert allocate.allocate(costs, losses, 9, "greedy").choices == (0, 1)


def test_many_equal_layers_are_quick_and_exact(rng):
  # 300 units of three sizes; the relaxation bounds what any allocation can reach.
  size = rng.choice([1, 4, 11], 300)[:, None] * 2**16
  costs = size * np.array([[2, 3, 4, 8]])
  losses = rng.lognormal(0, 1, (300, 1)) * size * 4.0 ** -np.array([[2, 3, 4, 8]])
  budget = int(size.sum() * 3.3)
  exact = allocate.allocate(costs, losses, budget)
  greedy = allocate.allocate(costs, losses, budget, "greedy")
  assert exact.cost <= budget
  assert greedy.loss * 0.99 < exact.loss <= greedy.loss
  assert allocate.allocate(costs, losses, budget) == exact


def test_an_infeasible_budget_names_the_smallest():
  costs, losses = [[3, 5], [4, 2]], np.zeros((2, 2))
  with pytest.raises(errors.InputError, match="take 5, which is the smallest"):
    allocate.allocate(costs, losses, 4)
  assert allocate.allocate(costs, losses, 5).choices == (0, 1)
  # A choice that is closed does not count.
  with pytest.raises(errors.InputError, match="take 7, which"):
    allocate.allocate(costs, [[0.0, 0.0], [0.0, np.inf]], 6)


@pytest.mark.parametrize(
  ("costs", "losses", "message"),
  [
    ([[1.5]], [[0.0]], "integers"),
    ([[-1]], [[0.0]], "not negative"),
    ([[1]], [[np.nan]], "must be numbers"),
    ([[1]], [[np.inf]], r"units \[0\] have no choice"),
    ([[1]], [[0.0, 1.0]], "equal tables"),
    ([], [], "equal tables"),
  ],
)
def test_bad_tables_are_refused(costs, losses, message):
  with pytest.raises(errors.InputError, match=message):
    allocate.allocate(costs, losses, 10)


def test_unknown_method():
  with pytest.raises(errors.InputError, match="did you mean 'exact'"):
    allocate.allocate([[1]], [[0.0]], 1, "exat")
