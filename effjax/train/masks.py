"""Pruned weights while they train: plain arrays with exact zeros, masks beside them.

The masks move into the optimizer state (optim.masking), which keeps pruned entries at
zero; a finished stage hands on masked or compressed leaves again, as they came.
"""

from collections.abc import Collection, Mapping
from typing import Any

from effjax.core import tree as tree_lib
from effjax.weights.leaves import compressed, masked


def take_out(
  params: Mapping[str, Any], paths: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Plain parameters and their masks.

  Args:
    params: parameter tree.
    paths: the parameters that train; masks of others, and masks over other leaf kinds,
      stay where they are.

  Returns:
    Parameters, and a tree of bool arrays with `None` where nothing is masked; or `None`
    if nothing is masked at all.
  """
  masks = {
    path: leaf.mask() if path in paths and _is_open(leaf) else None
    for path, leaf in tree_lib.flatten(params).items()
  }
  if not any(mask is not None for mask in masks.values()):
    return dict(params), None
  plain = tree_lib.map_leaves(
    lambda path, leaf: leaf if masks[path] is None else leaf.dense(), params
  )
  return plain, tree_lib.unflatten(masks)


def join(
  masks: Mapping[str, Any] | None, found: Mapping[str, Any], like: Mapping[str, Any]
) -> dict[str, Any] | None:
  """Masks that parameters came with, and those that training made.

  Args:
    masks: see `take_out`.
    found: masks by path; `{}` for none.
    like: the parameter tree.

  Returns:
    A tree like that of `take_out`.
  """
  if not found:
    return masks
  flat = dict.fromkeys(tree_lib.flatten(like)) | tree_lib.flatten(masks or {})
  return tree_lib.unflatten(flat | found)


def put_back(
  params: Mapping[str, Any],
  masks: Mapping[str, Any] | None,
  before: Mapping[str, Any],
) -> dict[str, Any]:
  """The inverse of `take_out`, for parameters whose masked entries stayed zero.

  Args:
    params, masks: what `take_out` gave, trained.
    before: what it was given, for the leaf kinds.
  """
  if masks is None:
    return dict(params)

  def wrap(path: str, leaf: Any, mask: Any, old: Any) -> Any:
    if mask is None:
      return leaf
    if isinstance(old, compressed.Compressed):
      return old.refill(leaf)
    return masked.Masked.create(leaf, mask)

  return tree_lib.map_leaves(wrap, params, masks, before)


def _is_open(leaf: Any) -> bool:
  return isinstance(leaf, masked.Masked | compressed.Compressed) and leaf.is_array
