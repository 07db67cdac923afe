"""How many groups of each module stay, and which: the best of each part.

Within a family the best stay, and of each of its parts (the query heads of one key
head, the neurons of one expert) equally many. The budget says how many.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from effjax.compress import allocate
from effjax.compress.prune import _group_costs, _removal
from effjax.core import config, errors, groups

BUDGETS = ("uniform", "global", *_group_costs.COSTS)
# Sizes of a family that are tried; each costs a trace, or a program that is timed.
_MOST_SIZES = {"params": 64, "flops": 32, "latency": 8}


def uniform(families: Sequence[groups.Family], options: Any) -> list[int]:
  """How many units of each family stay, the same share everywhere.

  Args:
    families: of the per-layer view.
    options: sparsity and multiple_of.

  Raises:
    InputError: nothing would be left of a family.
  """
  found = []
  for family in families:
    wanted = family.row_units * (1 - options.sparsity)
    config.require(
      wanted >= 0.5,
      f"nothing would be left of {family.module}: sparsity={options.sparsity} of "
      f"{family.row_units} {family.axis}"
      + (" of each part" if family.parts > 1 else "")
      + "; ask for less",
    )
    sizes = _sizes(family, options)
    # The larger one of two that are as near.
    nearest = min(reversed(sizes), key=lambda n: abs(n / family.parts - wanted))
    found.append(nearest)
  return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
  """What there is to choose between, before anything is scored.

  Attributes:
    sizes: of each family the numbers of units that may stay; of a layer 1 and 0.
    saved: what each of them saves: units, or a cost.
    needed: what has to be saved in all.
  """

  sizes: Sequence[Sequence[int]]
  saved: Sequence[Sequence[int]]
  needed: float


def choices(model: Any, families: Sequence[groups.Family], options: Any) -> Choices:
  """The sizes of families under a budget.

  Args:
    model: unrolled.
    families: of its parameters.
    options: budget, sparsity, multiple_of and tokens.

  Raises:
    InputError: so much cannot be saved.
  """
  sizes = [_possible(model, family, options) for family in families]
  saved, total = _savings(model, families, sizes, options)
  return _feasible(sizes, saved, total, options)


def budgeted(
  families: Sequence[groups.Family], scores: Sequence[np.ndarray], found: Choices
) -> list[int]:
  """How many units of each family stay, so that the scores of the rest sum to least.

  Args:
    families: see `choices`.
    scores: `[E or 1, units]` of each.
    found: the choices.
  """
  losses = [
    [_lost(family, s, n) for n in own]
    for family, s, own in zip(families, scores, found.sizes, strict=True)
  ]
  return _knapsack(found, losses)


def best(family: groups.Family, scores: np.ndarray, count: int) -> np.ndarray:
  """The numbers of the units that stay, `[count]` or `[E, count]`, in rising order.

  Args:
    family: whose units.
    scores: `[E or 1, units]`.
    count: how many stay, a multiple of the family's parts.
  """
  rows = _rows(family, scores)
  order = np.argsort(-rows, axis=-1, kind="stable")[:, : count // family.parts]
  first = family.row_units * (np.arange(family.rows) % family.parts)
  units = np.sort(order, axis=-1) + first[:, None]
  if family.num_experts is None:
    return units.reshape(-1)
  return units.reshape(family.num_experts, -1)


def layer_choices(model: Any, candidates: Sequence[int], options: Any) -> Choices:
  """Which layers may go under a budget; each counts as one, or by its cost.

  Args:
    model: unrolled.
    candidates: numbers of the layers that may go.
    options: budget, sparsity and tokens.

  Raises:
    InputError: so much cannot be saved, or no layer would be left.
  """
  number = len(model.config.layers)
  if options.budget in ("uniform", "global"):
    needed = round(options.sparsity * number)
    config.require(
      needed <= len(candidates) and needed < number,
      f"sparsity={options.sparsity} would remove {needed} of {number} layers, of which "
      f"{min(len(candidates), number - 1)} can go; ask for less",
    )
    saved = [[0, 1] for _ in candidates]
    sizes = [(1, 0)] * len(candidates)
    return Choices(sizes=sizes, saved=saved, needed=float(needed))
  costs = _group_costs.LayerCosts(model, options.budget, options.tokens)
  cost = [costs.of(k, layer) for k, layer in enumerate(model.config.layers)]
  saved = [[0, cost[k]] for k in candidates]
  sizes = [(1, 0)] * len(candidates)
  return _feasible(sizes, saved, sum(cost), options)


def layers(
  model: Any, scores: np.ndarray, candidates: Sequence[int], found: Choices
) -> list[int]:
  """The numbers of the layers that stay.

  Args:
    model, candidates: see `layer_choices`.
    scores: one a layer.
    found: the choices.

  Raises:
    InputError: no layer would be left.
  """
  number = len(model.config.layers)
  stays = _knapsack(found, [[0.0, float(scores[k])] for k in candidates])
  gone = {k for k, one in zip(candidates, stays, strict=True) if not one}
  config.require(
    len(gone) < number, "every layer would be removed; ask for less sparsity"
  )
  return sorted(set(range(number)) - gone)


def _rows(family: groups.Family, scores: np.ndarray) -> np.ndarray:
  """Scores by the parts that must stay equally large, `[rows, row_units]`."""
  return scores.reshape(family.rows, family.row_units)


def _lost(family: groups.Family, scores: np.ndarray, count: int) -> float:
  """The scores of all units but the best."""
  rising = np.sort(_rows(family, scores), axis=-1)
  return float(np.sum(rising[:, : family.row_units - count // family.parts]))


def _sizes(family: groups.Family, options: Any) -> list[int]:
  """Numbers of units that may stay, all of them last."""
  whole = range(family.parts, family.num_units, family.parts)
  return [n for n in whole if n % options.multiple_of == 0] + [family.num_units]


def _possible(model: Any, family: groups.Family, options: Any) -> list[int]:
  """Sizes to choose from, those that the module can have, evenly spread."""
  sizes = _sizes(family, options)
  most = _MOST_SIZES.get(options.budget, len(sizes))
  if len(sizes) > most:
    picked = np.unique(np.linspace(0, len(sizes) - 1, most).round().astype(int))
    sizes = [sizes[i] for i in picked]

  def fits(count: int) -> bool:
    try:
      _removal.narrowed(model, family, count)
    except errors.InputError:
      return False
    return True

  return [n for n in sizes if fits(n)]


def _savings(
  model: Any,
  families: Sequence[groups.Family],
  sizes: Sequence[Sequence[int]],
  options: Any,
) -> tuple[list[list[int]], int]:
  """What each size saves, and what there is: units, or the cost of all layers."""
  if options.budget == "global":
    per_unit = [family.num_experts or 1 for family in families]
    saved = [
      [each * (family.num_units - n) for n in own]
      for family, own, each in zip(families, sizes, per_unit, strict=True)
    ]
    total = sum(
      each * family.num_units for family, each in zip(families, per_unit, strict=True)
    )
    return saved, total
  costs = _group_costs.LayerCosts(model, options.budget, options.tokens)
  whole = [costs.of(k, layer) for k, layer in enumerate(model.config.layers)]
  saved = []
  for family, own in zip(families, sizes, strict=True):
    index = _removal.layer_of(family)
    fewer = [costs.of(index, _removal.narrowed(model, family, n)) for n in own]
    # A measured time can be above that of more units.
    saved.append([max(0, whole[index] - cost) for cost in fewer])
  return saved, sum(whole)


def _feasible(
  sizes: Sequence[Sequence[int]],
  saved: Sequence[Sequence[int]],
  total: int,
  options: Any,
) -> Choices:
  """The choices, if enough of the total can be saved."""
  most, needed = [max(row) for row in saved], options.sparsity * total
  config.require(
    sum(most) >= needed,
    f"sparsity={options.sparsity} of the {_NAMES[options.budget]} cannot be saved: "
    f"without all {'/'.join(options.groups)} that can go it is "
    f"{sum(most) / total:.3g}; ask for less, or select more",
  )
  return Choices(sizes=sizes, saved=saved, needed=needed)


def _knapsack(found: Choices, losses: Sequence[Sequence[float]]) -> list[int]:
  """One size for each row, so that enough is saved and least lost."""
  if not found.sizes:
    return []
  most = [max(row) for row in found.saved]
  width = max(len(row) for row in found.saved)
  costs_UC = np.zeros((len(most), width), np.int64)
  losses_UC = np.full((len(most), width), np.inf)
  for u, (row, lost) in enumerate(zip(found.saved, losses, strict=True)):
    costs_UC[u, : len(row)] = most[u] - np.asarray(row, np.int64)
    losses_UC[u, : len(row)] = lost
  budget = int(sum(most) - found.needed)
  chosen = allocate.allocate(costs_UC, losses_UC, budget, "greedy").choices
  return [own[c] for own, c in zip(found.sizes, chosen, strict=True)]


_NAMES = {
  "global": "groups",
  "params": "parameters of all layers",
  "flops": "FLOPs of all layers",
  "latency": "time of all layers",
}
