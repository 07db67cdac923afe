"""Parameter trees are nested dicts; whatever is not a dict is one parameter.

A parameter is an array or a leaf dataclass (see effjax.weights), so these functions
never look inside one, unlike `jax.tree`.
"""

from collections.abc import Callable, Mapping
from typing import Any


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict as `{"run_0/layer_1/mixer/q": leaf}`, in sorted key order."""
  flat: dict[str, Any] = {}
  _flatten_into(tree, "", flat)
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def map_leaves(
  fn: Callable[..., Any], tree: Mapping[str, Any], *others: Mapping[str, Any]
) -> dict[str, Any]:
  """Applies `fn(path, leaf, *other_leaves)` to every parameter of equal trees.

  Raises:
    ValueError: the trees do not have the same paths.
  """
  flats = [flatten(other) for other in others]
  first = flatten(tree)
  for flat in flats:
    if flat.keys() != first.keys():
      odd = sorted(flat.keys() ^ first.keys())
      raise ValueError(f"trees differ in structure at {odd[:3]}")
  return unflatten(
    {path: fn(path, leaf, *(f[path] for f in flats)) for path, leaf in first.items()}
  )


def _flatten_into(tree: Mapping[str, Any], prefix: str, flat: dict[str, Any]) -> None:
  for name in sorted(tree):
    value = tree[name]
    if isinstance(value, Mapping):
      _flatten_into(value, f"{prefix}{name}/", flat)
    else:
      flat[prefix + name] = value
