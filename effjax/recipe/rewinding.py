"""Masks of a pruned model over the weights of an earlier stage: lottery tickets.

Source: Frankle and Carbin 2019, arXiv:1803.03635, section 1 (what stays after pruning,
back at its first values), and Frankle et al. 2020, arXiv:1912.05671, section 4 (back at
those of step k, which larger models need). Their control, other first values under the
same masks, is `to="init"` with another seed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax.core import config as config_lib
from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import masked

INIT = "init"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewindOptions:
  """Where the weights come from.

  Attributes:
    to: an earlier stage, or "init" for freshly initialized weights.
    seed: of these; None for the run's own, with which training began.
  """

  to: str = INIT
  seed: int | None = None

  def __post_init__(self):
    config_lib.require(
      self.seed is None or (self.to == INIT and self.seed >= 0),
      f"seed={self.seed} is of to='init', and not negative",
    )


def rewound(params: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """Values, under the masks that params have.

  Args:
    params: arrays and masked arrays.
    values: arrays of the same paths and shapes; or with fewer masked entries.

  Raises:
    InputError: a parameter is of another kind or shape, and there is nothing to rewind.
  """
  flat, other = tree_lib.flatten(params), tree_lib.flatten(values)
  config_lib.require(
    flat.keys() == other.keys(),
    "the stage to rewind to has other layers; rewind to one of the same model",
  )
  made = {}
  for path, leaf in flat.items():
    new = other[path]
    for one in (leaf, new):
      if leaf_lib.is_leaf_kind(one) and not (
        isinstance(one, masked.Masked) and one.is_array
      ):
        raise errors.InputError(
          f"{path} is a {one.kind} leaf; rewind takes plain and masked weights"
        )
    config_lib.require(
      tuple(leaf.shape) == tuple(new.shape),
      f"{path} has shape {tuple(leaf.shape)}, in the stage to rewind to "
      f"{tuple(new.shape)}; rewind to one of the same model",
    )
    new = new.dense() if leaf_lib.is_leaf_kind(new) else new
    made[path] = new
    if leaf_lib.is_leaf_kind(leaf):
      made[path] = masked.Masked.create(new, leaf.mask())
  config_lib.require(
    any(leaf_lib.is_leaf_kind(leaf) for leaf in made.values()),
    "nothing is pruned, so there is nothing to rewind; start after a stage that prunes",
  )
  return tree_lib.unflatten(made)
