"""Exact counts of the largest scores."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.ops.sparsity import selection


def test_ties_are_broken_in_order_and_exactly():
  scores = [jnp.array([3, 1, 1], jnp.uint32), jnp.array([[1, 0], [1, 5]], jnp.uint32)]
  masks = selection.keep_largest(scores, 3)
  assert masks[0].tolist() == [True, False, False]
  assert masks[1].tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("lost", [0, 1, 7, 24])
def test_the_smallest_go_of_any_floats(rng, lost):
  values = rng.standard_normal(24).astype(np.float32).round(1)
  values[:3] = [0.0, -0.0, -np.inf]
  (mask,) = selection.keep_largest([jnp.asarray(values)], lost)
  order = np.argsort(values, kind="stable")
  assert sorted(np.flatnonzero(~np.asarray(mask))) == sorted(order[:lost])


def test_each_row_by_itself(rng):
  scores = rng.standard_normal((2, 3, 8)).astype(np.float32)
  lost = jnp.array([[0, 3, 8], [1, 2, 5]])
  mask = np.asarray(selection.keep_largest_of_each(jnp.asarray(scores), lost))
  for row, kept, k in zip(
    scores.reshape(6, 8), mask.reshape(6, 8), lost.ravel().tolist(), strict=True
  ):
    assert set(np.flatnonzero(~kept)) == set(np.argsort(row)[:k])


@pytest.mark.parametrize("lost", [0, 1, 5, 12, [3, 11]])
def test_each_matrix_by_itself_and_ties_in_order(rng, lost):
  scores = rng.integers(0, 4, (2, 3, 4)).astype(np.float32)
  mask = selection.keep_largest_of_matrices(jnp.asarray(scores), jnp.asarray(lost))
  counts = np.broadcast_to(lost, 2)
  for matrix, kept, k in zip(scores, np.asarray(mask), counts, strict=True):
    order = np.argsort(matrix.ravel(), kind="stable")
    assert set(np.flatnonzero(~kept.ravel())) == set(order[:k])
