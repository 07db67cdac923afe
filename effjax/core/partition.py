"""Splits a tree into what is trained and what is not, and puts it back together.

Only the trained part is differentiated, given to optax, donated and checkpointed each
time; `None` stands where the other part has the array. A leaf dataclass says which of
its fields train (`trainable_fields`), so an adapter trains while the weight it adapts,
perhaps integer codes, does not.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from effjax.core import tree as tree_lib


def partition(
  params: Mapping[str, Any], paths: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits params into `(trainable, frozen)`, trees of equal structure with holes.

  Args:
    params: nested dict of parameters.
    paths: paths of the parameters that train (see core.select.select).
  """
  halves = {
    path: _split(leaf, path in paths) for path, leaf in tree_lib.flatten(params).items()
  }
  trainable, frozen = (
    tree_lib.unflatten({path: half[i] for path, half in halves.items()}) for i in (0, 1)
  )
  return trainable, frozen


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `partition`.

  Raises:
    ValueError: an array stands in both parts or in neither.
  """
  return tree_lib.map_leaves(_join, trainable, frozen)


def _split(leaf: Any, trains: bool) -> tuple[Any, Any]:
  if not trains:
    return None, leaf
  if not dataclasses.is_dataclass(leaf):
    return leaf, None
  if not leaf.trainable_fields:
    return None, leaf
  halves = {
    name: _split(getattr(leaf, name), name in leaf.trainable_fields)
    for name in leaf.data_fields
  }
  trainable = {name: half[0] for name, half in halves.items()}
  frozen = {name: half[1] for name, half in halves.items()}
  return dataclasses.replace(leaf, **trainable), dataclasses.replace(leaf, **frozen)


def _join(path: str, a: Any, b: Any) -> Any:
  if a is None or b is None:
    if a is None and b is None:
      raise ValueError(f"{path} stands in neither part")
    return b if a is None else a
  if not dataclasses.is_dataclass(a):
    raise ValueError(f"{path} stands in both parts")
  fields = {}
  for name in a.data_fields:
    x, y = getattr(a, name), getattr(b, name)
    # A field can be absent altogether, such as the zero point of a symmetric grid.
    fields[name] = None if x is None and y is None else _join(f"{path}.{name}", x, y)
  return dataclasses.replace(a, **fields)
