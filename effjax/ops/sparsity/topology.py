"""Topologies of sparse matrices: random ones, and updates that conserve every count.

Sources: SET is Mocanu et al. 2018, arXiv:1707.04780, RigL is Evci et al. 2020,
arXiv:1911.11134, Algorithm 1. Both drop some weights and grow as many, among all that
then have none, those just dropped included; what is dropped and grown again at once has
not changed and keeps its value (as in the code of RigL). New weights are 0.

Masks are boolean `[*stack, I, O]`, and each matrix of a stack is by itself. Functions
are pure, of static shape, and work under `vmap`; of equal scores the earlier go.
"""

import jax
import jax.numpy as jnp

from effjax.ops.sparsity import selection


def keep(scores: jax.Array, num_kept: jax.Array | int) -> jax.Array:
  """The mask of the `num_kept` largest scores of each matrix.

  Args:
    scores: `[*stack, I, O]`, floating, or uint32 that order as scores do.
    num_kept: int32, broadcasts against `[*stack]`.
  """
  size = scores.shape[-2] * scores.shape[-1]
  return selection.keep_largest_of_matrices(scores, size - num_kept)


def random(
  key: jax.Array, shape: tuple[int, ...], num_kept: jax.Array | int
) -> jax.Array:
  """A random mask of `shape` that keeps exactly `num_kept` of each matrix."""
  return keep(jax.random.bits(key, shape, jnp.uint32), num_kept)


def num_active(mask: jax.Array) -> jax.Array:
  """Weights of each matrix, int32 `[*stack]`."""
  return jnp.sum(mask, axis=(-2, -1), dtype=jnp.int32)


def rigl(
  w: jax.Array, mask: jax.Array, gradient: jax.Array, num_moved: jax.Array | int
) -> jax.Array:
  """RigL: the smallest weights go, and the largest gradients bring new ones.

  Args:
    w: weights.
    mask: which of them are there.
    gradient: of the loss, at all of them.
    num_moved: of each matrix, at most as many as it has; broadcasts against `[*stack]`.

  Returns:
    The new mask, with as many weights in each matrix.
  """
  kept = _without_smallest(w, mask, num_moved)
  return _grown(kept, selection.order_bits(jnp.abs(gradient)), num_moved)


def set_update(
  key: jax.Array, w: jax.Array, mask: jax.Array, share: jax.Array | float
) -> jax.Array:
  """SET: a share of the smallest positive and largest negative weights moves anywhere.

  Of p positive weights (those that are still 0 among them) the round(share p) smallest
  go, and of n negative ones the round(share n) nearest to 0; halves round to even, in
  float32.

  Args:
    key: random key.
    w: weights.
    mask: which of them are there.
    share: zeta, from 0 to 1.

  Returns:
    The new mask, with as many weights in each matrix.
  """
  share = jnp.asarray(share, jnp.float32)
  kept, num_moved = jnp.zeros_like(mask), 0
  for side in (mask & (w >= 0), mask & (w < 0)):
    moved = jnp.round(share * num_active(side).astype(jnp.float32)).astype(jnp.int32)
    kept |= _without_smallest(w, side, moved)
    num_moved += moved
  return _grown(kept, jax.random.bits(key, mask.shape, jnp.uint32), num_moved)


def _without_smallest(
  w: jax.Array, mask: jax.Array, num_dropped: jax.Array | int
) -> jax.Array:
  """The mask without the weights of smallest magnitude."""
  # Bits of magnitudes have their highest set, so what is not there is below them all.
  bits = jnp.where(mask, selection.order_bits(jnp.abs(w)), 0)
  return keep(bits, num_active(mask) - num_dropped)


def _grown(kept: jax.Array, bits: jax.Array, num_grown: jax.Array | int) -> jax.Array:
  """The mask and those with the largest `bits` (uint32) of all others."""
  # With the highest bit set, what is there already is below all others.
  bits = bits | jnp.uint32(1 << 31)
  return kept | keep(jnp.where(kept, 0, bits), num_grown)
