"""The five verbs through which modules use a weight, the same for every leaf kind.

Each takes a `Weight` handle (see weights.weight), a leaf dataclass or a plain array.
Products run in the dtype of the activation; weights are cast to it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.ops.conv import api as conv_ops
from effjax.weights import leaf as leaf_lib
from effjax.weights import weight as weight_lib


def contract(x: jax.Array, w: Any, *, transpose: bool = False) -> jax.Array:
  """The last axis of x with axis -2 of w: `[..., in] x [in, out] -> [..., out]`.

  Args:
    x: activations, any leading dimensions.
    w: a matrix `[in, out]`, or with `transpose` an embedding `[V, D]` contracted on
      its last axis (a tied head).
    transpose: contract axis -1 of w instead.
  """
  leaf = _observed(x, w)
  if leaf_lib.is_leaf_kind(leaf):
    return leaf.contract(x, transpose=transpose)
  return leaf_lib.contract_dense(x, leaf, transpose=transpose)


def lookup(w: Any, ids: jax.Array) -> jax.Array:
  """Rows of an embedding: `[V, D], [...] -> [..., D]` (ids int32)."""
  leaf = _leaf(w)
  if leaf_lib.is_leaf_kind(leaf):
    return leaf.lookup(ids)
  return jnp.take(leaf, ids, axis=0)


def grouped_contract(
  x: jax.Array, w: Any, group_sizes: jax.Array | None = None
) -> jax.Array:
  """Rows of x, each with its expert's matrix: `[T, D] -> [T, F]` or `[E, C, D] -> ...`.

  Args:
    x: activations of all experts, one after the other, `[T, D]`; without group sizes
      as many rows for each, `[E, C, D]`.
    w: stacked expert matrices `[E, D, F]`.
    group_sizes: rows of each expert, `[E]` int32; rows past their sum give zeros.
  """
  leaf = _observed(x, w, group_sizes)
  if leaf_lib.is_leaf_kind(leaf):
    return leaf.grouped_contract(x, group_sizes)
  return leaf_lib.grouped_contract_dense(x, leaf, group_sizes)


def conv(x: jax.Array, w: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
  """Depthwise causal convolution with a kernel `[K, D]`; see ops.conv.api."""
  leaf = _leaf(w)
  if leaf_lib.is_leaf_kind(leaf):
    return leaf.conv(x, **kwargs)
  return conv_ops.causal_conv(x, leaf.astype(x.dtype), **kwargs)


def dense(w: Any) -> jax.Array:
  """The weight as a plain array of its logical shape and dtype."""
  leaf = _leaf(w)
  return leaf.dense() if leaf_lib.is_leaf_kind(leaf) else leaf


def _leaf(w: Any) -> Any:
  return w.leaf if isinstance(w, weight_lib.Weight) else w


def _observed(x: jax.Array, w: Any, group_sizes: jax.Array | None = None) -> Any:
  if isinstance(w, weight_lib.Weight) and w.observe is not None:
    w.observe(x, group_sizes)
  return _leaf(w)
