"""Every selected matrix of a tree, one at a time, to a leaf of a number format."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import errors
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import low_rank, masked

_KINDS = ("matrix", "embedding")
# `one(path, w)`: the leaf of a matrix [*stack, in, out], or of an embedding turned so.
One = Callable[[str, jax.Array, int], Any]


def replace(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  paths: Collection[str],
  name: str,
  one: One,
) -> dict[str, Any]:
  """The tree with leaves in place of the selected parameters.

  A `Masked` parameter stays masked: its values are quantized, and a zero that the
  format has stays one. Of a `LowRank` one each factor is quantized.

  Args:
    params, specs: the tree.
    paths: of the selected parameters.
    name: of the transform, for messages.
    one: makes the leaf: `one(path, w, axis)`, w always `[*stack, in, out]`; with axis
      -1 it is an embedding transposed, and the leaf must hold it `[V, D]`.

  Raises:
    InputError: a parameter of another kind, one that is quantized already, or what
      `one` says of it, with its path.
  """

  def leaf_of(path: str, w: jax.Array, spec: Any) -> Any:
    axis = -1 if spec.kind == "embedding" else -2
    try:
      return one(path, w if axis == -2 else jnp.swapaxes(w, -1, -2), axis)
    except errors.InputError as error:
      raise errors.InputError(f"{path}: {error}") from None

  def change(path: str, leaf: Any, spec: Any) -> Any:
    if path not in paths:
      return leaf
    if spec.kind not in _KINDS:
      raise errors.InputError(
        f"{name} cannot quantize {path} of kind {spec.kind!r}; it takes "
        + ", ".join(_KINDS)
      )
    if isinstance(leaf, masked.Masked) and not leaf_lib.is_leaf_kind(leaf.values):
      values = leaf_of(path, leaf.dense(), spec)
      return dataclasses.replace(leaf, values=values)
    if isinstance(leaf, low_rank.LowRank) and not any(
      map(leaf_lib.is_leaf_kind, (leaf.left, leaf.right))
    ):
      left, right = (
        leaf_of(f"{path}.{part}", getattr(leaf, part), spec)
        for part in ("left", "right")
      )
      return low_rank.LowRank.create(left, right)
    if leaf_lib.is_leaf_kind(leaf):
      raise errors.InputError(
        f"{path} is already a {leaf.kind} leaf; start this stage after a plain one"
      )
    return leaf_of(path, leaf, spec)

  return tree_lib.map_leaves(change, params, specs)
