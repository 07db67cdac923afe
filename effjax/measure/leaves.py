"""What a ruler asks of a leaf: nested leaves, pruned entries, what is simulated."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import tree as tree_lib
from effjax.weights import leaf as leaf_lib
from effjax.weights import verbs
from effjax.weights.leaves import masked


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


def kept_fraction(leaf: Any) -> float:
  """Share of a parameter's entries that its masks keep; 1 without a mask."""
  fraction = 1.0
  for part in nested(leaf):
    if isinstance(part, masked.Masked):
      fraction *= _count(_mask_rows(part)) / size(part)
  return fraction


def num_nonzero(leaf: Any) -> int:
  """Entries of the dense weight that are not exactly zero (count)."""
  return _count(_nonzero_rows(leaf))


def simulated(params: Mapping[str, Any]) -> list[str]:
  """What the leaf kinds of a tree do not really save: any of "bytes", "flops"."""
  found: set[str] = set()
  for leaf in tree_lib.flatten(params).values():
    for part in nested(leaf):
      found.update(part.simulated)
  return sorted(found)


def _count(rows: jax.Array) -> int:
  # Rows are counted on the device in 32 bits, and added up on the host in 64.
  return int(np.asarray(rows).sum(dtype=np.int64))


@jax.jit
def _mask_rows(leaf: masked.Masked) -> jax.Array:
  return jnp.sum(leaf.mask(), axis=-1, dtype=jnp.int32)


@jax.jit
def _nonzero_rows(leaf: Any) -> jax.Array:
  return jnp.sum(verbs.dense(leaf) != 0, axis=-1, dtype=jnp.int32)
