"""What a ruler asks of a leaf: nested leaves, pruned entries, what is simulated."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import compiling
from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs
from effjax.weights.leaves import block_sparse, compressed, masked, n_of_m

# Leaf kinds with a mask of what stays.
_SPARSE = (
  masked.Masked,
  n_of_m.NOfM,
  block_sparse.BlockSparse,
  compressed.Compressed,
)


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
  """Logical weights of a parameter (count)."""
  return int(np.prod(leaf.shape, dtype=np.int64))


def kept_fractions(flat: Mapping[str, Any]) -> dict[str, float]:
  """Share of each parameter's entries that its masks keep; 1 without a mask.

  Args:
    flat: path to leaf.
  """
  masks = {
    path: [part for part in nested(leaf) if isinstance(part, _SPARSE)]
    for path, leaf in flat.items()
  }
  kept = _mask_rows(masks)
  return {
    path: math.prod(
      (_total(rows) / size(part) for rows, part in zip(kept[path], parts, strict=True)),
      start=1.0,
    )
    for path, parts in masks.items()
  }


def num_nonzero(params: Mapping[str, Any]) -> int:
  """Entries of the dense weights that are not exactly zero (count)."""
  flat = tree_lib.flatten(params)
  return sum(_total(rows) for rows in _nonzero_rows(flat).values())


def simulated(params: Mapping[str, Any]) -> list[str]:
  """What the leaf kinds of a tree do not really save: any of "bytes", "flops"."""
  # A tree can say so of itself (interop.linen): its leaves are plain arrays.
  found: set[str] = set(getattr(params, "simulated", ()))
  for leaf in tree_lib.flatten(params).values():
    for part in nested(leaf):
      found.update(part.simulated)
  return sorted(found)


def _total(rows: jax.Array) -> int:
  # Rows are counted on the device in 32 bits, and added up on the host in 64.
  return int(np.asarray(rows).sum(dtype=np.int64))


@compiling.jit_once
def _mask_rows(masks: Mapping[str, list[leaf_lib.Leaf]]) -> dict[str, list[jax.Array]]:
  count = lambda part: jnp.sum(part.mask(), axis=-1, dtype=jnp.int32)
  return {path: [count(part) for part in parts] for path, parts in masks.items()}


@compiling.jit_once
def _nonzero_rows(flat: Mapping[str, Any]) -> dict[str, jax.Array]:
  count = lambda leaf: jnp.sum(verbs.dense(leaf) != 0, axis=-1, dtype=jnp.int32)
  return {path: count(leaf) for path, leaf in flat.items()}
