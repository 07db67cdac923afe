"""Patterns: which weights go together, and exactly how many of them stay."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.prune import _pattern
from effjax.core import errors


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (4, 8), (1, 4)])
def test_n_of_m_inputs_stay_for_each_output(rng, keep, of):
  scores = rng.standard_normal((2, 16, 3)).astype(np.float32)
  pattern = _pattern.parse(f"{keep}:{of}")
  mask = np.asarray(_pattern.keep_n_of_m(jnp.asarray(scores), pattern))
  groups, kept = (a.reshape(2, 16 // of, of, 3) for a in (scores, mask))
  assert (kept.sum(axis=2) == keep).all()
  least_kept = np.where(kept, groups, np.inf).min(axis=2)
  assert (least_kept > np.where(kept, -np.inf, groups).max(axis=2)).all()
  assert pattern.fixed_sparsity == 1 - keep / of


def test_equal_scores_of_a_group_go_in_order():
  mask = _pattern.keep_n_of_m(jnp.ones((4, 1)), _pattern.parse("1:4"))
  assert mask[:, 0].tolist() == [False, False, False, True]


@pytest.mark.parametrize(
  ("name", "units"), [("unstructured", (6, 8)), ("3x4", (2, 2)), ("rows", (6, 1))]
)
def test_units_are_means_and_masks_spread_over_them(rng, name, units):
  scores = rng.random((2, 6, 8))
  pattern = _pattern.parse(name)
  got = np.asarray(_pattern.unit_scores(jnp.asarray(scores, jnp.float32), pattern))
  assert got.shape == (2, *units)
  rows, cols = 6 // units[0], 8 // units[1]
  expected = [
    [
      scores[:, i * rows : (i + 1) * rows, j * cols : (j + 1) * cols].mean(axis=(1, 2))
      for j in range(units[1])
    ]
    for i in range(units[0])
  ]
  np.testing.assert_allclose(got, np.moveaxis(expected, -1, 0), rtol=1e-6)
  mask = rng.random((2, *units)) > 0.5
  wide = np.asarray(_pattern.spread(jnp.asarray(mask), (2, 6, 8)))
  np.testing.assert_array_equal(wide, np.kron(mask, np.ones((1, rows, cols), bool)))


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("4:4", "N:M keeps N of M, with 0 < N < M"),
    ("5:4", "N:M keeps N of M, with 0 < N < M"),
    ("0x4", "has no weights"),
    ("row", "did you mean 'rows'"),
  ],
)
def test_no_such_pattern(name, message):
  with pytest.raises(errors.InputError, match=message):
    _pattern.parse(name)


@pytest.mark.parametrize(
  ("name", "message"),
  [("2:4", "whole groups of 4, not 6"), ("4x4", "4x4 .* do not divide .* 6x8")],
)
def test_a_pattern_that_does_not_divide(name, message):
  with pytest.raises(errors.InputError, match=message):
    _pattern.parse(name).unit(6, 8)
