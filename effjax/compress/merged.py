"""What changes a weight itself refuses one that adapters stand beside."""

from typing import Any

from effjax.core import errors
from effjax.weights.leaves import adapted


def require(name: str, path: str, leaf: Any) -> None:
  """Checks that a parameter has no adapters.

  Args:
    name: of the transform, for the message.
    path: of the parameter.
    leaf: the parameter.

  Raises:
    InputError: it has some.
  """
  if adapted.is_adapted(leaf):
    raise errors.InputError(
      f"{path} has adapters, which {name} would have to take into the weight; merge "
      "them first (merge_lora), or start this stage before lora"
    )
