"""Which parameters a training changes: the adapters alone, where there are any."""

from collections.abc import Mapping
from typing import Any

from effjax.core import select as select_lib
from effjax.core import tree as tree_lib
from effjax.weights.leaves import adapted


def trained(
  params: Mapping[str, Any], specs: Mapping[str, Any], where: select_lib.Where
) -> frozenset[str]:
  """Paths of the parameters that train.

  A selection of everything means all parameters of a model without adapters, and of one
  with adapters those that have them; of these no more than the adapters trains (see
  core.partition). What else is to train beside them is selected by kind or path: kinds
  ("matrix", "norm"), or the path "." for all that there is.

  Args:
    params: parameter tree, arrays or shapes.
    specs: tree of ParamSpecs of the same structure.
    where: the selection.

  Raises:
    InputError: the selection is empty.
  """
  paths = select_lib.select(specs, where)
  if where != select_lib.Where():
    return paths
  flat = tree_lib.flatten(params)
  return frozenset(p for p in paths if adapted.is_adapted(flat[p])) or paths
