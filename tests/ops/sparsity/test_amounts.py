"""Budgets and schedules, by hand and by their formulas."""

import math

import numpy as np
import pytest

from effjax.ops.sparsity import amounts


def test_erk_by_hand():
  # Raw densities (I + O) / (I O): 0.05, 0.25 and 1; 5,450 weights, 545 stay. The last
  # two would be denser than dense at first, and then the second is not any more.
  shapes = {"a": (40, 40), "b": (2, 8, 8), "c": (2, 2)}
  sparsity = 0.9
  got = amounts.erk_densities(shapes, sparsity)
  sizes = {"a": 1600, "b": 128, "c": 4}
  raw = {"a": 0.05, "b": 0.25, "c": 1.0}
  left = 0.1 * sum(sizes.values()) - 4
  scale = left / (raw["a"] * 1600 + raw["b"] * 128)
  assert scale * raw["b"] < 1 < left / (raw["a"] * 1600 + raw["b"] * 128) * raw["c"]
  assert got["c"] == 1.0
  np.testing.assert_allclose([got["a"], got["b"]], [scale * 0.05, scale * 0.25])
  kept = sum(got[name] * sizes[name] for name in sizes)
  np.testing.assert_allclose(kept, 0.1 * sum(sizes.values()))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.99])
def test_erk_keeps_what_is_asked_for(rng, sparsity):
  shapes = {str(i): tuple(map(int, rng.integers(2, 60, 2))) for i in range(12)}
  got = amounts.erk_densities(shapes, sparsity)
  sizes = {name: np.prod(shape) for name, shape in shapes.items()}
  kept = sum(got[name] * sizes[name] for name in shapes)
  np.testing.assert_allclose(kept, (1 - sparsity) * sum(sizes.values()))
  assert all(0 < density <= 1 for density in got.values())
  # Where both are below 1, densities are in proportion.
  free = [name for name in shapes if got[name] < 1]
  ratios = [got[n] * sizes[n] / sum(shapes[n]) for n in free]
  np.testing.assert_allclose(ratios, ratios[:1] * len(ratios))


def test_shares_of_budgets():
  shapes = {"a": (40, 40), "b": (2, 8, 8), "c": (2, 2)}
  assert amounts.shares(shapes, 0.9, "uniform") == dict.fromkeys("abc", 0.9)
  shares = amounts.shares(shapes, 0.9, "erk")
  density = amounts.erk_densities(shapes, 0.9)
  assert shares["c"] == 0.0 and shares["b"] == 1 - density["b"]


@pytest.mark.parametrize(
  ("size", "share", "kept"), [(4, 0.9, 0), (64, 0.9, 6), (5, 0.5, 3), (7, 0.5, 3)]
)
def test_what_is_pruned_is_rounded_to_even(size, share, kept):
  assert amounts.number_kept(size, share) == kept


def test_cubic_is_the_formula():
  s_i, s_f, n = 0.1, 0.9, 7
  got = amounts.cubic(s_i, s_f, n)
  t0, dt = 30, 5
  expected = [
    s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt)) ** 3
    for t in range(t0, t0 + n * dt + 1, dt)
  ]
  np.testing.assert_allclose(got, expected, rtol=1e-14)
  assert len(got) == n + 1 and got[-1] == s_f


def test_cosine_is_the_formula():
  assert amounts.cosine(0.3, 0, 900.0) == 0.3
  assert amounts.cosine(0.3, 450, 900.0) == pytest.approx(0.15)
  expected = 0.3 / 2 * (1 + math.cos(math.pi * 700 / 900))
  assert amounts.cosine(0.3, 700, 900.0) == pytest.approx(expected, rel=1e-15)
