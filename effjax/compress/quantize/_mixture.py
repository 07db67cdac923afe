"""The table behind a mixture of formats: every unit with every choice, and the totals.

Letters: U units, C choices.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from effjax.compress import allocate

log = logging.getLogger(__name__)


class Place(NamedTuple):
  """Where a unit is, and how large; see Unit."""

  name: str
  path: str
  index: int | None
  num_weights: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
  """One matrix of one layer, and what is known of it with each choice.

  Attributes:
    name: path in the per-layer view, such as "layer_3/mlp/up".
    path: of the parameter that it is a part of.
    index: place among the stacked layers of the parameter; None if it is not stacked.
    num_weights: logical weights (count).
    bytes: held with each choice.
    losses: estimated for each choice.
    choice: index of the one that is taken.
  """

  name: str
  path: str
  index: int | None
  num_weights: int
  bytes: tuple[int, ...]
  losses: tuple[float, ...]
  choice: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
  """All units together with one format, or with the mixture.

  Attributes:
    name: the choice, or "mixed".
    bytes: held by the selected weights.
    bits_per_weight: 8 x bytes / selected weights.
    loss: sum of the estimates, in the unit of the sensitivity.
    fits: whether it is within the budget.
  """

  name: str
  bytes: int
  bits_per_weight: float
  loss: float
  fits: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What mixed precision would do.

  Attributes:
    choices: names of the choices.
    units: all units, by name of their parameter.
    budget_bytes: of the selected weights.
    mixed: the mixture.
    uniform: each choice alone, whether it is within the budget or not.
  """

  choices: tuple[str, ...]
  units: tuple[Unit, ...]
  budget_bytes: int
  mixed: Total
  uniform: tuple[Total, ...]


def make(
  choices: tuple[str, ...],
  places: Sequence[Place],
  costs_UC: np.ndarray,
  losses_UC: np.ndarray,
  allocation: allocate.Allocation,
  budget_bytes: int,
) -> Plan:
  """The table of an allocation.

  Args:
    choices: names of the choices.
    places: of the units.
    costs_UC: bytes held.
    losses_UC: estimated losses.
    allocation: of these costs and losses.
    budget_bytes: that it was made for.
  """
  num_weights = sum(place.num_weights for place in places)

  def total(name: str, held_bytes: int, loss: float) -> Total:
    return Total(
      name=name,
      bytes=held_bytes,
      bits_per_weight=8 * held_bytes / num_weights,
      loss=loss,
      fits=held_bytes <= budget_bytes,
    )

  return Plan(
    choices=choices,
    units=tuple(
      Unit(
        **place._asdict(),
        bytes=tuple(map(int, costs_UC[u])),
        losses=tuple(map(float, losses_UC[u])),
        choice=allocation.choices[u],
      )
      for u, place in enumerate(places)
    ),
    budget_bytes=budget_bytes,
    mixed=total("mixed", allocation.cost, allocation.loss),
    uniform=tuple(
      total(name, int(costs_UC[:, c].sum()), float(losses_UC[:, c].sum()))
      for c, name in enumerate(choices)
    ),
  )


def tell(plan: Plan) -> None:
  """Logs a line a choice, one of the mixture, and each uniform choice beside it."""
  counts = Counter(unit.choice for unit in plan.units)
  for c, name in enumerate(plan.choices):
    log.info("mixed: %d of %d matrices with %s", counts[c], len(plan.units), name)
  for row in (plan.mixed, *plan.uniform):
    log.info(
      "mixed: %s%s: %.3f bits a weight, estimated loss %.4g%s",
      "" if row is plan.mixed else "uniform ",
      row.name,
      row.bits_per_weight,
      row.loss,
      "" if row.fits else " (over the budget)",
    )
