"""What a ruler asks of a leaf: nested leaves, pruned entries, what is simulated."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import compiling
from effjax.core import tree as tree_lib
from effjax.parallel import hosts
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs
from effjax.weights.leaves import adapted, low_rank


def nested(leaf: Any) -> Iterator[leaf_lib.Leaf]:
  """The leaf dataclasses of a parameter, outermost first; none for an array."""
  if leaf_lib.is_leaf_kind(leaf):
    yield leaf
    for name in leaf.data_fields:
      yield from nested(getattr(leaf, name))


def arrays(leaf: Any, name: str) -> Iterator[tuple[str, Any]]:
  """Every array a parameter holds, as `("layer_0/mlp/up.values.codes", array)`."""
  if not leaf_lib.is_leaf_kind(leaf):
    if leaf is not None:
      yield name, leaf
    return
  for field in leaf.data_fields:
    yield from arrays(getattr(leaf, field), f"{name}.{field}")


def size(leaf: Any) -> int:
  """Weights of a parameter (count): logical ones, and those of its adapters."""
  return _logical(leaf) + sum(factor.size for factor in _factors(leaf))


def kept_fractions(flat: Mapping[str, Any]) -> dict[str, float]:
  """Share of each parameter's multiplications that its masks keep; 1 without a mask.

  Adapters beside a pruned weight, and the factors of a low-rank one, count each as much
  as they have entries.

  Args:
    flat: path to leaf.
  """
  parts = {path: list(_multiplied(leaf)) for path, leaf in flat.items()}
  masks = {path: [p for p in found if _skippable(p)] for path, found in parts.items()}
  kept = {path: iter(rows) for path, rows in _mask_rows(masks).items()}

  def fraction(path: str) -> float:
    whole = sum(map(_logical, parts[path]))
    counts = [
      _total(next(kept[path])) if _skippable(part) else _logical(part)
      for part in parts[path]
    ]
    return sum(counts) / whole if whole else 1.0

  return {path: fraction(path) for path in flat}


def num_nonzero(params: Mapping[str, Any]) -> int:
  """Entries that are not exactly zero (count), those of adapters beside the weights."""
  flat: dict[str, Any] = {}
  for path, leaf in tree_lib.flatten(params).items():
    flat[path] = _bare(leaf)
    flat |= {f"{path}.{i}": factor for i, factor in enumerate(_factors(leaf))}
  return sum(_total(rows) for rows in _nonzero_rows(flat).values())


def simulated(params: Mapping[str, Any]) -> list[str]:
  """What the leaf kinds of a tree do not really save: any of "bytes", "flops"."""
  # A tree can say so of itself (interop.linen): its leaves are plain arrays.
  found: set[str] = set(getattr(params, "simulated", ()))
  for leaf in tree_lib.flatten(params).values():
    for part in nested(leaf):
      found.update(part.simulated)
  return sorted(found)


def _skippable(part: Any) -> bool:
  """Whether it is a pruned weight whose zeros are multiplied all the same."""
  return leaf_lib.is_leaf_kind(part) and part.pruned and "flops" in part.simulated


def _logical(leaf: Any) -> int:
  return int(np.prod(leaf.shape, dtype=np.int64))


def _factors(leaf: Any) -> list[Any]:
  """The arrays of a parameter's adapters."""
  found = (part for part in nested(leaf) if isinstance(part, adapted.Adapted))
  return [factor for part in found for factor in (part.down, part.up)]


def _bare(leaf: Any) -> Any:
  """A parameter without its adapters."""
  if isinstance(leaf, adapted.Adapted):
    return _bare(leaf.base)
  if not leaf_lib.is_leaf_kind(leaf):
    return leaf
  return dataclasses.replace(
    leaf, **{name: _bare(getattr(leaf, name)) for name in leaf.data_fields}
  )


def _multiplied(leaf: Any) -> Iterator[Any]:
  """What a product with a parameter takes: parts with a mask, or anything dense.

  Of masks in each other the outermost counts.
  """
  if isinstance(leaf, adapted.Adapted):
    yield from _multiplied(leaf.base)
    yield from (leaf.down, leaf.up)
  elif isinstance(leaf, low_rank.LowRank):
    yield from _multiplied(leaf.left)
    yield from _multiplied(leaf.right)
  else:
    yield next((part for part in nested(leaf) if _skippable(part)), leaf)


def _total(rows: jax.Array) -> int:
  # Rows are counted on the device in 32 bits, and added up on the host in 64.
  return int(hosts.whole(rows).sum(dtype=np.int64))


@compiling.jit_once
def _mask_rows(masks: Mapping[str, list[leaf_lib.Leaf]]) -> dict[str, list[jax.Array]]:
  count = lambda part: jnp.sum(part.mask(), axis=-1, dtype=jnp.int32)
  return {path: [count(part) for part in parts] for path, parts in masks.items()}


@compiling.jit_once
def _nonzero_rows(flat: Mapping[str, Any]) -> dict[str, jax.Array]:
  count = lambda leaf: jnp.sum(verbs.dense(leaf) != 0, axis=-1, dtype=jnp.int32)
  return {path: count(leaf) for path, leaf in flat.items()}
