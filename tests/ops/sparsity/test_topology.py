"""Topology updates against naive ones: which weights go and come, and how many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.sparsity import topology

STACK, I, O, KEPT = 2, 6, 7, 15


def rigl(*args):
  return np.asarray(topology.rigl(*map(jnp.asarray, args)))


def naive_rigl(w, mask, gradient, num_moved):
  """Algorithm 1 of one matrix, by sorting; of equal ones the later stays or grows."""
  w, kept, gradient = w.ravel(), mask.ravel().copy(), gradient.ravel()
  there = np.flatnonzero(kept)
  order = there[np.argsort(np.abs(w[there]), kind="stable")]
  kept[order[:num_moved]] = False
  free = np.flatnonzero(~kept)
  order = free[np.argsort(np.abs(gradient[free]), kind="stable")]
  kept[order[len(order) - num_moved :]] = True
  return kept.reshape(mask.shape)


@pytest.fixture
def problem(rng):
  """Masks, weights and gradients of few values, so that there are ties."""
  mask = np.asarray(topology.random(jax.random.key(0), (STACK, I, O), KEPT))
  w = rng.integers(-3, 4, mask.shape).astype(np.float32) / 2 * mask
  gradient = rng.integers(-3, 4, mask.shape).astype(np.float32)
  return w, mask, gradient


def test_random_masks_have_exact_counts_and_differ():
  masks = topology.random(jax.random.key(1), (3, 8, 9), jnp.array([1, 20, 72]))
  assert topology.num_active(masks).tolist() == [1, 20, 72]
  others = topology.random(jax.random.key(2), (3, 8, 9), jnp.array([1, 20, 72]))
  assert (masks != others).any()
  # Each place is as likely as any other: 400 draws of 3 of 10.
  draw = lambda key: topology.random(key, (2, 5), 3)
  share = jax.vmap(draw)(jax.random.split(jax.random.key(3), 400)).mean(0)
  assert np.abs(share - 0.3).max() < 4 * np.sqrt(0.3 * 0.7 / 400)


@pytest.mark.parametrize("num_moved", [0, 1, 4, KEPT, [2, 9]])
def test_rigl_is_the_naive_one(problem, num_moved):
  w, mask, gradient = problem
  new = rigl(w, mask, gradient, num_moved)
  for i, moved in enumerate(np.broadcast_to(num_moved, STACK)):
    expected = naive_rigl(w[i], mask[i], gradient[i], moved)
    np.testing.assert_array_equal(new[i], expected)
  assert (new.sum((1, 2)) == KEPT).all()


def test_rigl_takes_back_what_it_dropped_where_gradients_say_so(problem):
  w, mask, _ = problem
  new = rigl(w, mask, mask.astype(np.float32), 5)
  np.testing.assert_array_equal(new, mask)


def test_rigl_of_a_dense_matrix_changes_nothing(rng):
  w = rng.normal(size=(4, 5)).astype(np.float32)
  mask = np.ones((4, 5), bool)
  assert rigl(w, mask, w, 6).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_set_drops_the_share_of_each_sign_and_conserves_counts(problem, share):
  w, mask, _ = problem
  update = lambda key: topology.set_update(
    key, jnp.asarray(w), jnp.asarray(mask), share
  )
  new = np.asarray(update(jax.random.key(5)))
  assert (new.sum((1, 2)) == KEPT).all()
  # What never comes back whatever the draw was dropped; what always stays was kept.
  keys = jax.random.split(jax.random.key(6), 60)
  drawn = np.asarray(jax.vmap(update)(keys))
  always = drawn.all(0)
  for i in range(STACK):
    expected = np.zeros((I, O), bool)
    for side in (mask[i] & (w[i] >= 0), mask[i] & (w[i] < 0)):
      there = np.flatnonzero(side)
      order = there[np.argsort(np.abs(w[i].ravel()[there]), kind="stable")]
      dropped = round(float(np.float32(share) * np.float32(len(there))))
      expected.ravel()[order[dropped:]] = True
    np.testing.assert_array_equal(always[i], expected)
  # Every other place is reached, so growth is among all that is free.
  assert share == 0 or drawn.any(0).all()


def test_updates_are_the_same_under_vmap(problem):
  w, mask, gradient = map(jnp.asarray, problem)
  moved = jnp.array([3, 5])
  whole = topology.rigl(w, mask, gradient, moved)
  np.testing.assert_array_equal(
    jax.vmap(topology.rigl)(w, mask, gradient, moved), whole
  )
