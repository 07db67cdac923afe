"""Topologies that move: random ones at first, and how much moves when."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from effjax.core import config
from effjax.ops.sparsity import amounts, topology
from effjax.optim import checks, sparse

DECAYS = ("constant", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingOptions:
  """How much of a topology moves, and when.

  Attributes:
    every: updates between two changes of the masks.
    drop_fraction: share of a matrix's weights that moves at first.
    decay: "cosine" lets the share fall to 0 at the end of the changes; "constant".
    end_fraction: part of the run in which masks change.
  """

  every: int = 100
  drop_fraction: float = 0.3
  decay: str = "cosine"
  end_fraction: float = 0.75

  def __post_init__(self):
    checks.check_positive(self, "every", "end_fraction")
    checks.check_fractions(self, "drop_fraction", "end_fraction")
    checks.check_choice(self, "decay", DECAYS)


def last_change(options: MovingOptions, num_steps: int) -> int:
  """Number of changes of the masks: at steps every, 2 every, ... before the end.

  Raises:
    InputError: none fits into the run.
  """
  number = int(np.ceil(options.end_fraction * num_steps / options.every)) - 1
  config.require(
    number > 0,
    f"every={options.every}: no change of the masks comes before step "
    f"{options.end_fraction:g} x num_steps={num_steps}; lower every, or train longer",
  )
  return number


def due(options: MovingOptions, number: int) -> sparse.Due:
  """Whether masks change at step `count`."""
  last = number * options.every
  return lambda count: (count > 0) & (count <= last) & (count % options.every == 0)


def shares(options: MovingOptions, num_steps: int, number: int) -> np.ndarray:
  """The share that moves at changes 0 to `number` (0 is none), float64."""
  if options.decay == "constant":
    return np.full(number + 1, options.drop_fraction)
  end = options.end_fraction * num_steps
  at = lambda step: amounts.cosine(options.drop_fraction, step, end)
  return np.array([at(j * options.every) for j in range(number + 1)])


def random_masks(
  weights: Mapping[str, jax.Array], target: sparse.Target, key: jax.Array
) -> dict[str, jax.Array]:
  """Random masks with the target's counts."""
  return {
    path: topology.random(sparse.path_key(key, path), w.shape, target.num_kept(path))
    for path, w in weights.items()
  }
