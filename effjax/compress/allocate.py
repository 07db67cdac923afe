"""One choice for each unit, so that the sum of losses is least within a budget.

The multiple-choice knapsack problem: unit u with choice c takes `cost[u, c]` and loses
`loss[u, c]`. Mixed precision is one: units are matrices, choices are formats.

"exact" is the hybrid of dynamic programming and branch-and-bound of Dyer, Riha and
Walker 1995 (J. Comput. Appl. Math. 58): unit after unit, it keeps the partial sums that
no other one beats in both cost and loss, without those whose linear relaxation over the
rest is already above an allocation that is known. HAWQ-V3 (Yao et al. 2021,
arXiv:2011.10680) gives the same problem to an integer program; here no solver's
tolerances stand between small losses.

"greedy" starts from the cheapest choices and takes, as long as they fit, the steps that
lower the loss most for what they cost, along each unit's lower convex hull.

Letters: U units, C choices.
"""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from effjax.core import config, errors

METHODS = ("exact", "greedy")
# Partial sums that are kept at once: beyond it the search would take gigabytes.
_MOST_STATES = 2**24
# What rounding may do to a sum of losses, as a share of the largest losses' sum.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
  """What each unit gets.

  Attributes:
    choices: index of the choice of each unit.
    cost: sum of their costs, in the units of the budget.
    loss: sum of their losses.
  """

  choices: tuple[int, ...]
  cost: int
  loss: float


class _Step(NamedTuple):
  """From one choice on a unit's hull to the next: `loss` falls, `cost` rises."""

  rate: float
  unit: int
  place: int
  cost: int
  loss: float


class _States(NamedTuple):
  """Partial sums over the first units, by rising cost and falling loss."""

  cost: np.ndarray
  loss: np.ndarray
  parent: np.ndarray
  choice: np.ndarray


def allocate(
  costs: ArrayLike, losses: ArrayLike, budget: int, method: str = "exact"
) -> Allocation:
  """Chooses for every unit.

  Of allocations with the same loss "exact" takes one of the least cost. Equal inputs
  give equal choices.

  Args:
    costs: integers `[U, C]`, not negative.
    losses: floats `[U, C]`; infinity where a unit cannot have a choice.
    budget: most that the costs may sum to.
    method: one of METHODS.

  Raises:
    InputError: the arrays do not fit, a unit has no choice, the budget is below the
      cheapest allocation (which is named), or "exact" would need too much memory.
  """
  if method not in METHODS:
    raise errors.unknown("allocation", method, METHODS)
  costs_UC, losses_UC = _checked(np.asarray(costs), np.asarray(losses))
  hulls = [_hull(c, l) for c, l in zip(costs_UC, losses_UC, strict=True)]
  least = sum(int(costs_UC[u, hull[0]]) for u, hull in enumerate(hulls))
  config.require(
    least <= budget,
    f"a budget of {budget} is too small: the cheapest choices take {least}, which is "
    "the smallest possible",
  )
  steps = _steps(costs_UC, losses_UC, hulls)
  choices = _greedy(costs_UC, hulls, steps, budget)
  if method == "exact":
    known = _sum(losses_UC, choices)
    choices = _exact(costs_UC, losses_UC, hulls, steps, budget, known)
  cost = sum(int(costs_UC[u, c]) for u, c in enumerate(choices))
  return Allocation(choices=choices, cost=cost, loss=_sum(losses_UC, choices))


def _checked(costs: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Costs in int64 and losses in float64."""
  config.require(
    costs.ndim == 2 and costs.shape == losses.shape and costs.size > 0,
    f"costs of shape {costs.shape} and losses of shape {losses.shape} must be two "
    "equal tables [units, choices]",
  )
  config.require(
    np.issubdtype(costs.dtype, np.integer) and bool((costs >= 0).all()),
    "costs must be integers that are not negative",
  )
  losses = losses.astype(np.float64)
  bad = np.isnan(losses) | (losses == -np.inf)
  config.require(not bad.any(), "losses must be numbers, or infinity for no choice")
  closed = np.flatnonzero(np.isinf(losses).all(axis=1))
  config.require(closed.size == 0, f"units {closed.tolist()} have no choice at all")
  return costs.astype(np.int64), losses


def _sum(losses_UC: np.ndarray, choices: tuple[int, ...]) -> float:
  return float(sum(losses_UC[u, c] for u, c in enumerate(choices)))


def _hull(cost_C: np.ndarray, loss_C: np.ndarray) -> list[int]:
  """The choices on a unit's lower convex hull, from the cheapest to the best."""
  hull: list[int] = []
  for c in map(int, np.lexsort((loss_C, cost_C))):
    if np.isinf(loss_C[c]) or (hull and loss_C[c] >= loss_C[hull[-1]]):
      continue
    while len(hull) > 1:
      a, b = hull[-2:]
      first = (loss_C[a] - loss_C[b]) * (cost_C[c] - cost_C[b])
      second = (loss_C[b] - loss_C[c]) * (cost_C[b] - cost_C[a])
      if first > second:
        break
      hull.pop()
    hull.append(c)
  return hull


def _steps(
  costs_UC: np.ndarray, losses_UC: np.ndarray, hulls: list[list[int]]
) -> list[_Step]:
  """All steps, those that lower the loss most for their cost first."""
  steps = []
  for u, hull in enumerate(hulls):
    rate = np.inf
    for place, (a, b) in enumerate(itertools.pairwise(hull)):
      cost = int(costs_UC[u, b] - costs_UC[u, a])
      loss = float(losses_UC[u, a] - losses_UC[u, b])
      # On a hull rates fall; rounding must not put a step before the one it goes on.
      rate = min(rate, loss / cost)
      steps.append(_Step(rate, u, place, cost, loss))
  return sorted(steps, key=lambda step: (-step.rate, step.unit, step.place))


def _greedy(
  costs_UC: np.ndarray, hulls: list[list[int]], steps: list[_Step], budget: int
) -> tuple[int, ...]:
  left = budget - sum(int(costs_UC[u, hull[0]]) for u, hull in enumerate(hulls))
  places = [0] * len(hulls)
  for step in steps:
    # What comes after a step that did not fit is reached only through it.
    if step.place == places[step.unit] and step.cost <= left:
      left -= step.cost
      places[step.unit] += 1
  return tuple(hull[place] for hull, place in zip(hulls, places, strict=True))


def _exact(
  costs_UC: np.ndarray,
  losses_UC: np.ndarray,
  hulls: list[list[int]],
  steps: list[_Step],
  budget: int,
  known: float,
) -> tuple[int, ...]:
  """Unit after unit; `known` is the loss of an allocation that fits."""
  finite = np.where(np.isinf(losses_UC), 0.0, np.abs(losses_UC))
  enough = known + _ROUNDING * finite.max(axis=1).sum()
  none = np.zeros(1, np.int64)
  history = [_States(none, np.zeros(1), none, none)]
  for u in range(len(hulls)):
    states = _extended(history[-1], costs_UC[u], losses_UC[u])
    rest_costs, rest_losses = _relaxed(costs_UC, losses_UC, hulls, steps, u + 1)
    left = budget - states.cost
    bound = states.loss + np.interp(left, rest_costs, rest_losses)
    states = _undominated(states, (left >= rest_costs[0]) & (bound <= enough))
    config.require(
      len(states.cost) <= _MOST_STATES,
      f"an exact allocation of {len(hulls)} units needs over {_MOST_STATES} partial "
      "sums; use the greedy one",
    )
    history.append(states)
  # By falling loss: the last state has the least, at the least cost.
  at = len(history[-1].cost) - 1
  choices = []
  for states in reversed(history[1:]):
    choices.append(int(states.choice[at]))
    at = int(states.parent[at])
  return tuple(reversed(choices))


def _extended(states: _States, cost_C: np.ndarray, loss_C: np.ndarray) -> _States:
  """Every state with every choice of one more unit."""
  parent, choice = np.indices((len(states.cost), len(cost_C)))
  return _States(
    (states.cost[:, None] + cost_C).ravel(),
    (states.loss[:, None] + loss_C).ravel(),
    parent.ravel(),
    choice.ravel(),
  )


def _undominated(states: _States, chosen: np.ndarray) -> _States:
  """Of the chosen states, those that none of at most their cost equals in loss."""
  states = _States(*(part[chosen] for part in states))
  order = np.lexsort((states.loss, states.cost))
  least = np.minimum.accumulate(states.loss[order])
  better = np.ones(len(order), bool)
  better[1:] = states.loss[order][1:] < least[:-1]
  return _States(*(part[order[better]] for part in states))


def _relaxed(
  costs_UC: np.ndarray,
  losses_UC: np.ndarray,
  hulls: list[list[int]],
  steps: list[_Step],
  start: int,
) -> tuple[np.ndarray, np.ndarray]:
  """The least loss of the units from `start` on if steps could be taken in part.

  Returns:
    The corners of a falling convex function of what may be spent: costs and losses.
  """
  cost = sum(int(costs_UC[u, hulls[u][0]]) for u in range(start, len(hulls)))
  loss = sum(losses_UC[u, hulls[u][0]] for u in range(start, len(hulls)))
  own = [step for step in steps if step.unit >= start]
  spent = np.cumsum([cost, *(step.cost for step in own)])
  lost = loss - np.cumsum([0.0, *(step.loss for step in own)])
  return spent, lost
