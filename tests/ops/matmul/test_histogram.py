"""Where activations are cut, from a histogram, against the samples themselves."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.matmul import histogram

counted = jax.jit(histogram.counts)


def _heavy(seed, size=40_000):
  """Values with the heavy tail that activations have."""
  rng = np.random.default_rng(seed)
  return np.float32(rng.standard_t(3, size))


def _of(x):
  """The histogram of values, and the largest magnitude."""
  return counted(jnp.asarray(x)[:, None], jnp.ones(len(x))), jnp.abs(x).max()


def test_counts_equal_numpys():
  x = np.concatenate([_heavy(0), np.float32([0, 1e-9, -1e-9, 2.0**-24, -(2.0**16)])])
  x = np.append(x, np.float32([1.0, -2.0, 1e6, 65535.9]))
  # The first edge is 0, and the last bin takes what is above it.
  edges = np.append(histogram.edges()[:-1], np.inf)
  expected = np.histogram(np.abs(x), edges)[0]
  np.testing.assert_array_equal(_of(x)[0], expected)


def test_edges_are_as_documented():
  edges = histogram.edges()
  assert len(edges) == histogram.BINS + 1 == 40 * 64 + 1
  assert edges[0] == 0 and edges[-1] == 2.0**16
  ratio = edges[2:] / edges[1:-1]
  assert np.all(ratio > 1) and np.all(ratio <= 1 + 1 / 64)
  np.testing.assert_array_equal(edges[64::64], 2.0 ** np.arange(-23, 17))


def test_rows_weigh_what_they_are_told():
  x = np.float32([[1, 2], [3, 3], [100, 1]])
  found = np.asarray(counted(jnp.asarray(x), jnp.asarray([1.0, 0.5, 0.0])))
  at = lambda value: found[int(histogram.bins_of(jnp.float32(value)))]
  assert (at(1), at(2), at(3), at(100)) == (1, 1, 1, 0)
  assert found.sum() == 3


def test_many_equal_values_are_all_counted():
  # One sum of ones in float32 would stop at 2^24.
  rows = 2**19 + 2**12
  found = counted(jnp.zeros((rows, 64), jnp.bfloat16), jnp.ones(rows))
  assert float(found[0]) == rows * 64 > 2**25


@pytest.mark.parametrize("percentile", [50.0, 90.5, 99.0, 99.9, 99.99, 100.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_percentile_equals_the_sorted_samples(percentile, seed):
  x = _heavy(seed)
  options = {"method": "percentile", "kind": "int8", "percentile": percentile}
  found = float(histogram.threshold(*_of(x), **options))
  ordered = np.sort(np.abs(x))
  # The smallest sample with that share of samples at or below it.
  exact = ordered[int(np.ceil(percentile / 100 * len(x) - 1e-9)) - 1]
  assert exact <= found <= exact * (1 + 1 / 64)
  assert np.mean(ordered <= found) >= percentile / 100 - 1e-9
  assert found <= ordered[-1]


def _rounded(x, cut, kind):
  """NumPy's own rounding in float64, with a scale of float32."""
  top = {"int8": 127, "int4": 7, "fp8": 448}[kind]
  scale = np.float64(np.float32(cut)) / top
  places = np.clip(x / scale, -top, top)
  if kind == "fp8":
    codes = places.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * scale
  return np.rint(places) * scale


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("scale", [1.0, 3e-6, 300.0])
def test_least_error_equals_brute_force(kind, scale):
  x = _heavy(2) * np.float32(scale)
  counts, absmax = _of(x)
  found = float(histogram.threshold(counts, absmax, method="mse", kind=kind))
  error = lambda cut: np.mean((_rounded(np.float64(x), cut, kind) - x) ** 2)
  tried = np.abs(x).max() * 2.0 ** -(np.arange(0, 320) / 40)
  errors_ = np.array([error(cut) for cut in tried])
  # As good as the best of a finer grid on the samples themselves, and much better than
  # cutting nothing, where codes are evenly spaced.
  assert error(found) <= errors_.min() * 1.01
  if kind != "fp8":
    assert error(found) < 0.85 * errors_[0]
    best = tried[errors_.argmin()]
    assert best / 1.15 < found < best * 1.15


def test_expected_error_of_a_cut_is_that_of_the_samples():
  """The integral itself, not only where it is least."""
  x = np.float32(np.abs(_heavy(3)))
  counts, _ = _of(x)
  u = histogram.edges().astype(np.float64)
  for top, cut in ((7.0, 2.0), (127.0, 5.0), (7.0, 0.3)):
    step = cut / top
    integral = histogram._integral(jnp.asarray(u / step, jnp.float32), top)
    mean = np.diff(np.asarray(integral, np.float64)) / np.diff(u / step) * step**2
    expected = np.mean((np.clip(np.rint(x / step), 0, top) * step - x) ** 2)
    assert np.sum(np.asarray(counts) * mean) / len(x) == pytest.approx(
      expected, rel=0.01
    )


def test_stacks_are_tensors_one_by_one():
  parts = [_of(_heavy(seed) * np.float32(4**seed)) for seed in (0, 1, 2)]
  counts, absmax = (jnp.stack(part) for part in zip(*parts, strict=True))
  for method in histogram.METHODS:
    find = lambda c, m, method=method: histogram.threshold(
      c, m, method=method, kind="int4", percentile=99.0
    )
    np.testing.assert_array_equal(
      find(counts, absmax), jnp.stack([find(*part) for part in parts])
    )


def test_only_zeros_and_an_unknown_method():
  zeros = _of(np.zeros(100, np.float32))
  for method in histogram.METHODS:
    assert float(histogram.threshold(*zeros, method=method, kind="int8")) == 0
  with pytest.raises(errors.InputError, match="unknown activation_scale 'max'"):
    histogram.threshold(*zeros, method="max", kind="int8")
