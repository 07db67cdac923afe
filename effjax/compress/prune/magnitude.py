"""Global magnitude pruning: the smallest weights of all selected parameters go.

Source: Han et al. 2015, arXiv:1506.02626, with one threshold for the whole model as in
Frankle and Carbin 2019, arXiv:1803.03635, appendix. The number pruned is exact: of
weights as large as the threshold, the first in tree order go.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors, technique
from effjax.core import tree as tree_lib
from effjax.weights import verbs
from effjax.weights.leaves import masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudeOptions:
  """Options of global magnitude pruning.

  Attributes:
    sparsity: fraction of the selected weights to prune, in [0, 1).
  """

  sparsity: float = 0.5

  def __post_init__(self):
    config.require(
      0.0 <= self.sparsity < 1.0,
      f"sparsity={self.sparsity} must be at least 0 and below 1",
    )


def prune(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: MagnitudeOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by `Masked` leaves over their values.

  Raises:
    InputError: a selected parameter is masked already.
  """
  del stats, specs
  flat = tree_lib.flatten(params)
  chosen = sorted(paths)
  for path in chosen:
    if isinstance(flat[path], masked.Masked):
      raise errors.InputError(f"{path} is already masked; start after an earlier stage")
  total = sum(int(np.prod(flat[path].shape, dtype=np.int64)) for path in chosen)
  num_pruned = round(options.sparsity * total)
  magnitudes = [_bits(verbs.dense(flat[path])) for path in chosen]
  masks = keep_largest(magnitudes, num_pruned)
  for path, mask in zip(chosen, masks, strict=True):
    flat[path] = masked.Masked.create(flat[path], mask)
  return tree_lib.unflatten(flat)


@jax.jit
def _bits(w: jax.Array) -> jax.Array:
  """Magnitudes as uint32 that order like the float32 they are the bits of."""
  magnitude = jnp.abs(w).astype(jnp.float32)
  return jax.lax.bitcast_convert_type(magnitude, jnp.uint32)


def keep_largest(scores: Sequence[jax.Array], num_pruned: int) -> list[jax.Array]:
  """Masks that drop exactly the `num_pruned` smallest entries of several arrays.

  The threshold is found by bisection over the bits of the scores, which only counts:
  nothing is sorted, gathered or copied, whatever the size and sharding.

  Args:
    scores: uint32 arrays.
    num_pruned: entries to drop in all (count).

  Returns:
    A boolean array for each of `scores`, True where the entry stays.
  """
  if num_pruned == 0:
    return [jnp.ones(s.shape, bool) for s in scores]
  threshold = _kth_smallest(list(scores), num_pruned)
  below = sum(_count(s < threshold) for s in scores)
  ties_left = num_pruned - below
  masks = []
  for s in scores:
    mask, ties_left = _mask(s, threshold, ties_left)
    masks.append(mask)
  return masks


@functools.partial(jax.jit, static_argnames="k")
def _kth_smallest(scores: list[jax.Array], k: int) -> jax.Array:
  """The k-th smallest score (k >= 1), bit by bit from the highest."""

  def body(i: jax.Array, prefix: jax.Array) -> jax.Array:
    bit = jnp.uint32(1) << (31 - i).astype(jnp.uint32)
    # If at most k - 1 scores are below prefix + bit, the answer has that bit set.
    below = sum(_count(s < (prefix | bit)) for s in scores)
    return jnp.where(below < k, prefix | bit, prefix)

  return jax.lax.fori_loop(0, 32, body, jnp.uint32(0))


def _count(condition: jax.Array) -> jax.Array:
  """Number of true entries, int32: exact below 2^31 weights a parameter."""
  return jnp.sum(condition, dtype=jnp.int32)


@jax.jit
def _mask(
  s: jax.Array, threshold: jax.Array, ties_left: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Keeps what is above the threshold, and ties once `ties_left` are dropped."""
  tie = s == threshold
  rank = jnp.cumsum(tie.reshape(-1), dtype=jnp.int32).reshape(s.shape)
  dropped = (s < threshold) | (tie & (rank <= ties_left))
  left = jnp.maximum(ties_left - _count(tie), 0)
  return ~dropped, left


TECHNIQUE = technique.Transform(fn=prune, options_cls=MagnitudeOptions)
