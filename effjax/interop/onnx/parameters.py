"""A model's parameters layer by layer, read one at a time out of the stacked arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from effjax.core import layers
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs
from effjax.weights.leaves import masked


class Parameters:
  """What `core.unstack` gives, without a second copy of the model."""

  def __init__(self, model: Any, params: Mapping[str, Any]):
    """Finds where every parameter stands.

    Args:
      model: a Layered model.
      params: its parameters, leaves of any kind.
    """
    self._flat = tree_lib.flatten(params)
    self._places: dict[str, tuple[str, int | None]] = {}
    stacks = {} if model.runs is None else layers.places(model.runs)
    for path in self._flat:
      run, _, rest = path.partition("/")
      body, _, name = rest.partition("/")
      members = stacks.get((run, body))
      if members is None:
        self._places[path] = path, None
        continue
      for index, layer in enumerate(members):
        self._places[f"layer_{layer}/{name}"] = path, index

  def leaf(self, path: str) -> Any:
    """The parameter of a layer, `layer_<k>/...`, or one of the whole model.

    A mask is left out where its values can hold the zeros.
    """
    held, index = self._places[path]
    leaf = self._flat[held]
    if index is not None:
      leaf = jax.tree.map(lambda a: a[index], leaf)
    # Codes under a mask are codes of which some are 0.
    return leaf.folded() if isinstance(leaf, masked.Masked) else leaf

  def shape(self, path: str) -> tuple[int, ...]:
    """Its logical shape."""
    held, index = self._places[path]
    shape = tuple(self._flat[held].shape)
    return shape if index is None else shape[1:]

  def array(self, path: str) -> np.ndarray:
    """Its values in float32, multiplied out if it is compressed."""
    return np.asarray(verbs.dense(self.leaf(path)), np.float32)

  def compressed(self, path: str) -> bool:
    """Whether it is more than an array; the zeros of a pruned one are just values."""
    leaf = self._flat[self._places[path][0]]
    return leaf_lib.is_leaf_kind(leaf) and not leaf.is_array
