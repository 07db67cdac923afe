"""The largest of many scores, exactly as many as asked for, also among equal ones.

Thresholds are found by bisection over the bits of the scores, which only counts:
nothing is sorted, gathered or copied, whatever the size and sharding. Of equal scores
the earlier go.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def order_bits(scores: jax.Array) -> jax.Array:
  """Floats as uint32 that order as they do, negative ones too."""
  # Adding 0 makes the negative zero the other one.
  scores = scores.astype(jnp.float32) + jnp.float32(0)
  bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  return jnp.where(bits & sign != 0, ~bits, bits | sign)


@jax.jit
def keep_largest(
  scores: Sequence[jax.Array], num_pruned: jax.Array | int
) -> list[jax.Array]:
  """Masks that drop exactly the `num_pruned` smallest entries of several arrays.

  Args:
    scores: floating arrays, or uint32 that order as scores do; of equal ones the
      earlier go, in the order of the arrays.
    num_pruned: entries to drop in all (count).

  Returns:
    A boolean array for each of `scores`, True where the entry stays.
  """
  bits = [_as_bits(s) for s in scores]
  below = lambda bound: sum(_count(s < bound) for s in bits)
  threshold = _kth_smallest(below, (), num_pruned)
  ties_left = num_pruned - below(threshold)
  masks = []
  for s in bits:
    tie = s == threshold
    rank = jnp.cumsum(tie.reshape(-1), dtype=jnp.int32).reshape(s.shape)
    masks.append(~((s < threshold) | (tie & (rank <= ties_left))))
    ties_left = jnp.maximum(ties_left - _count(tie), 0)
  return masks


def keep_largest_of_each(scores: jax.Array, num_pruned: jax.Array) -> jax.Array:
  """`keep_largest` of each row of its own.

  Args:
    scores: `[*rows, n]`, n entries a row.
    num_pruned: int32, broadcasts against `[*rows]`.
  """
  return keep_largest_of_matrices(scores[..., None, :], num_pruned)[..., 0, :]


@jax.jit
def keep_largest_of_matrices(
  scores: jax.Array, num_pruned: jax.Array | int
) -> jax.Array:
  """`keep_largest` of each matrix of its own, which is never flattened.

  Args:
    scores: `[*stack, I, O]`, floating, or uint32 that order as scores do.
    num_pruned: int32, broadcasts against `[*stack]`.

  Returns:
    A boolean array of that shape, True where the entry stays.
  """
  bits = _as_bits(scores)
  stack = scores.shape[:-2]
  num_pruned = jnp.broadcast_to(jnp.asarray(num_pruned, jnp.int32), stack)
  num_pruned = num_pruned[..., None, None]
  below = lambda bound: _count(bits < bound, (-2, -1))
  threshold = _kth_smallest(below, num_pruned.shape, num_pruned)
  tie = bits == threshold
  in_row = jnp.cumsum(tie, axis=-1, dtype=jnp.int32)
  rows = in_row[..., -1:]
  rank = jnp.cumsum(rows, axis=-2) - rows + in_row
  return ~((bits < threshold) | (tie & (rank <= num_pruned - below(threshold))))


def _as_bits(scores: jax.Array) -> jax.Array:
  return scores if scores.dtype == jnp.uint32 else order_bits(scores)


def _kth_smallest(
  below: Callable[[jax.Array], jax.Array],
  shape: tuple[int, ...],
  k: jax.Array | int,
) -> jax.Array:
  """The k-th smallest score (k >= 1), bit by bit from the highest; 0 for k = 0.

  Args:
    below: how many scores are below a bound, int32 of `shape`.
    shape: of the bounds.
    k: which, int32 of `shape`.
  """

  def body(i: jax.Array, prefix: jax.Array) -> jax.Array:
    bit = jnp.uint32(1) << (31 - i).astype(jnp.uint32)
    # If at most k - 1 scores are below prefix + bit, the answer has that bit set.
    return jnp.where(below(prefix | bit) < k, prefix | bit, prefix)

  return jax.lax.fori_loop(0, 32, body, jnp.zeros(shape, jnp.uint32))


def _count(condition: jax.Array, axis: tuple[int, ...] | None = None) -> jax.Array:
  """Number of true entries, int32: exact below 2^31 weights a parameter."""
  return jnp.sum(condition, axis=axis, dtype=jnp.int32, keepdims=axis is not None)
