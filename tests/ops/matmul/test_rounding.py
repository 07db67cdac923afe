"""Grids against an independent float64 computation, error bounds, and edge cases."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from effjax.core import errors
from effjax.ops.matmul import rounding

STATIC = ("bits", "group", "symmetric", "grid", "scale_dtype")
quantize = jax.jit(rounding.quantize_groups, static_argnames=STATIC)
dequantize = jax.jit(rounding.dequantize_groups, static_argnames="dtype")
TAKEN = {"narrow": 1, "half": 0.5, "wide": 0}


def _expected(w, bits, group, symmetric, grid, scale_dtype):
  """Group by group in float64; returns codes, scale and the dequantized weight."""
  in_dim, out_dim = w.shape
  group = group or in_dim
  codes, values = np.zeros((in_dim, out_dim)), np.zeros((in_dim, out_dim))
  scales = np.zeros((in_dim // group, out_dim))
  for i in range(0, in_dim, group):
    for j in range(out_dim):
      part = w[i : i + group, j].astype(np.float64)
      if symmetric:
        scale = np.abs(part).max() / (2 ** (bits - 1) - TAKEN[grid])
        least, most, zero = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0
        least += grid == "narrow"
      else:
        bottom, top = min(part.min(), 0), max(part.max(), 0)
        scale = (top - bottom) / (2**bits - 1)
        least, most = 0, 2**bits - 1
      scale = np.float64(jnp.asarray(scale, jnp.float32).astype(scale_dtype))
      if not symmetric:
        zero = np.rint(-bottom / scale)
      code = np.clip(np.rint(part / scale + zero), least, most)
      codes[i : i + group, j], scales[i // group, j] = code, scale
      values[i : i + group, j] = (code - zero) * scale
  return codes, scales, values


def _weight(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
  ("bits", "group", "symmetric", "grid", "scale_dtype"),
  [
    (8, 0, True, "narrow", "float32"),
    (4, 16, True, "narrow", "float32"),
    (4, 16, True, "half", "float32"),
    (4, 16, True, "wide", "float16"),
    (3, 32, True, "half", "bfloat16"),
    (4, 16, False, "narrow", "float32"),
    (8, 0, False, "narrow", "float32"),
    (2, 8, False, "narrow", "float16"),
  ],
)
def test_equals_float64(bits, group, symmetric, grid, scale_dtype):
  w = _weight(64, 24)
  fn = functools.partial(
    quantize,
    bits=bits,
    group=group,
    symmetric=symmetric,
    grid=grid,
    scale_dtype=scale_dtype,
  )
  with jax.enable_x64(True):
    codes, scale, zero = fn(jnp.asarray(w))
    back = dequantize(codes, scale, zero, dtype=jnp.float64)
    codes, scale, back = (np.asarray(a) for a in (codes, scale, back))
  assert scale.dtype == scale_dtype and (zero is None) == symmetric
  assert codes.dtype == (np.int8 if symmetric else np.uint8)
  expected, scales, values = _expected(w, bits, group, symmetric, grid, scale_dtype)
  np.testing.assert_array_equal(codes, expected)
  np.testing.assert_array_equal(scale.astype(np.float64), scales)
  np.testing.assert_allclose(back, values, atol=1e-12)

  low = jnp.asarray(w, jnp.float32)
  codes, scale, zero = fn(low)
  # The largest value of a group of a "half" grid lies halfway between two codes.
  per_row = np.repeat(scales, 64 // len(scales), axis=0)
  clear = np.abs(w / per_row % 1 - 0.5) > 1e-6
  assert (~clear).sum() <= scales.size
  assert (np.asarray(codes) == expected)[clear].mean() >= 0.995
  back = np.asarray(dequantize(codes, scale, zero))
  assert (np.abs(back - values) <= 1e-5)[clear].mean() >= 0.995


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  seed=st.integers(0, 1000),
  bits=st.integers(2, 8),
  group=st.sampled_from([0, 1, 4, 12]),
  mode=st.sampled_from(["narrow", "half", "wide", "asymmetric"]),
  offset=st.sampled_from([0.0, 3.0, -50.0]),
  magnitude=st.sampled_from([1e-20, 1.0, 1e20]),
)
def test_error_bound(seed, bits, group, mode, offset, magnitude):
  w = ((_weight(12, 3, seed=seed) + offset) * magnitude).astype(np.float32)
  symmetric = mode != "asymmetric"
  grid = mode if symmetric else "narrow"
  codes, scale, zero = quantize(jnp.asarray(w), bits, group, symmetric, grid=grid)
  if symmetric:
    half = 2 ** (bits - 1)
    assert codes.min() >= -half + (grid == "narrow") and codes.max() <= half - 1
  else:
    assert codes.max() <= 2**bits - 1
  back = dequantize(codes, scale, zero)
  step = np.repeat(np.asarray(scale, np.float64), group or 12, axis=0)
  bound = step * (1.0 if mode == "wide" else 0.5)
  # Half a step exactly, plus the rounding of float32.
  slack = 1e-5 * step + 1e-6 * np.abs(w)
  assert (np.abs(np.asarray(back, np.float64) - w) <= bound + slack).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.float16])
def test_groups_of_zeros_are_safe(symmetric, scale_dtype):
  w = jnp.asarray(_weight(8, 2), jnp.float32).at[:4].set(0.0).at[4:, 1].set(1e-12)
  codes, scale, zero = quantize(w, 4, 4, symmetric, scale_dtype=scale_dtype)
  back = np.asarray(dequantize(codes, scale, zero))
  assert np.isfinite(back).all() and (back[:4] == 0).all()
  assert np.abs(back[4:, 0] - np.asarray(w)[4:, 0]).max() < 0.5
  assert (np.asarray(scale[0]) == 0).all()


def test_zero_is_on_every_grid():
  w = jnp.asarray(np.abs(_weight(16, 4)) + 5.0, jnp.float32).at[3].set(0.0)
  for symmetric in (True, False):
    parts = quantize(w, 3, 8, symmetric)
    assert (np.asarray(dequantize(*parts))[3] == 0).all()


def test_a_float16_scale_never_overflows():
  w = jnp.full((4, 1), 1e7, jnp.float32)
  codes, scale, _ = quantize(w, 4, 0, True, scale_dtype=jnp.float16)
  assert np.isfinite(np.asarray(scale, np.float32)).all() and (codes == 7).all()


def test_infinite_weights_are_not_hidden():
  w = jnp.ones((4, 2)).at[1, 0].set(jnp.inf)
  parts = quantize(w, 4, 0, True)
  back = np.asarray(dequantize(*parts))
  assert not np.isfinite(back[1, 0]) and np.isfinite(back[:, 1]).all()


def test_stacked_equals_one_by_one():
  w = jnp.asarray(_weight(3, 8, 4), jnp.float32)
  for symmetric in (True, False):
    fn = functools.partial(quantize, bits=4, group=4, symmetric=symmetric)
    whole, parts = fn(w), [fn(w[i]) for i in range(3)]
    for i, part in enumerate(parts):
      for a, b in zip(whole, part, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
          np.testing.assert_array_equal(a[i], b)
    back = dequantize(*whole)
    assert back.shape == w.shape


def test_refuses_with_one_line():
  w = jnp.ones((96, 2))
  with pytest.raises(errors.InputError, match="nearest legal group is 48"):
    rounding.quantize_groups(w, 4, 64 - 15, True)
  with pytest.raises(errors.InputError, match="group -1 does not divide"):
    rounding.quantize_groups(w, 4, -1, True)
  with pytest.raises(errors.InputError, match="1 bits a weight"):
    rounding.quantize_groups(w, 1, 0, True)
  with pytest.raises(errors.InputError, match="unknown quantization grid 'narow'"):
    rounding.quantize_groups(w, 4, 0, True, grid="narow")
