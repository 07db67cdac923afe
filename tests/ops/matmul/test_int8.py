"""Integer products against numpy's int64, dynamic quantization against float64."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from effjax.core import errors
from effjax.ops.matmul import activations, int8, rounding

quantize = jax.jit(int8.quantize_rows)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _codes(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize(
  ("x_shape", "stack"),
  [
    ((1, 33), ()),
    ((33,), ()),
    ((5, 33), ()),
    ((2, 1, 33), ()),
    ((1, 1, 33), ()),
    ((3, 1, 33), (3,)),
    ((3, 33), (3,)),
    ((2, 3, 4, 2, 33), (2, 3)),
  ],
)
def test_dot_is_exact(x_shape, stack, out_first):
  x, w = _codes(*x_shape), _codes(*stack, 33, 6, seed=1)
  expected = x.astype(np.int64).reshape(*stack, -1, 33) @ w.astype(np.int64)
  expected = expected.reshape(*x_shape[:-1], 6)
  held = np.ascontiguousarray(np.swapaxes(w, -1, -2)) if out_first else w
  fn = functools.partial(int8.int8_dot, out_first=out_first)
  y = jax.jit(fn)(jnp.asarray(x), jnp.asarray(held))
  assert y.dtype == jnp.int32
  np.testing.assert_array_equal(y, expected)


def test_dot_is_exact_at_the_extremes_and_under_vmap():
  x = jnp.full((1, 4096), -128, jnp.int8)
  w = jnp.full((4096, 2), -128, jnp.int8)
  np.testing.assert_array_equal(int8.int8_dot(x, w), np.full((1, 2), 2**26))
  x, w = _codes(3, 1, 8), _codes(3, 8, 5, seed=1)
  y = jax.vmap(int8.int8_dot)(jnp.asarray(x), jnp.asarray(w))
  np.testing.assert_array_equal(y, x.astype(np.int64) @ w.astype(np.int64))


@pytest.mark.parametrize("rows", [(1,), (1, 1), (8, 1)])
def test_the_compiled_product_reads_int8_and_two_rows(rows, monkeypatch):
  monkeypatch.setenv("EFFJAX_NATIVE", "0")
  x = jax.ShapeDtypeStruct((*rows, 256), jnp.float32)
  w = jax.ShapeDtypeStruct((512, 256), jnp.int8)
  scale = jax.ShapeDtypeStruct((1, 512), jnp.float32)
  fn = lambda x, w, scale: activations.contract(x, w, scale, out_first=True)
  lowered = jax.jit(fn).lower(x, w, scale)
  (dot,) = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
  shape = "x".join(map(str, rows if max(rows) > 1 else (2,)))
  types = f"(tensor<{shape}x256xi8>, tensor<512x256xi8>) -> tensor<{shape}x512xi32>"
  assert dot.split(" : ")[1].split(" loc")[0] == types
  compiled = lowered.compile()
  assert f"s32[{max(2, *rows)},512]" in compiled.as_text()
  # Neither a float nor an int32 copy of the weight.
  assert compiled.memory_analysis().temp_size_in_bytes < 512 * 256


def test_quantize_rows_equals_float64():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((64, 96)).astype(np.float32)
  x[3] = 0
  codes, scale = quantize(jnp.asarray(x))
  absmax = np.abs(x.astype(np.float64)).max(-1, keepdims=True)
  np.testing.assert_allclose(scale, absmax / 127, rtol=1e-6)
  assert codes.dtype == jnp.int8 and scale.dtype == jnp.float32
  absmax = np.where(absmax > 0, absmax, 1.0)
  expected = np.rint(x.astype(np.float64) * 127 / absmax)
  assert (np.asarray(codes) == expected).mean() > 0.995
  assert (np.asarray(codes[3]) == 0).all() and scale[3, 0] == 0
  error = np.abs(np.asarray(codes, np.float64) * np.asarray(scale, np.float64) - x)
  assert (error <= np.asarray(scale, np.float64) * 0.5001).all()


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.lists(FINITE, min_size=8, max_size=8))
def test_quantize_rows_of_any_finite_values(values):
  codes, scale = quantize(jnp.asarray([values], jnp.float32))
  codes, scale = np.asarray(codes, np.float64), np.asarray(scale, np.float64)
  assert np.isfinite(scale).all() and np.abs(codes).max() <= 127
  error = np.abs(codes * scale - np.asarray([values], np.float64))
  # XLA flushes subnormal numbers to zero.
  assert (error <= 0.501 * scale + 2e-36).all()


def test_what_is_not_finite_is_not_hidden():
  x = jnp.ones((3, 8)).at[0, 1].set(jnp.nan).at[1, 2].set(jnp.inf)
  w = jnp.ones((8, 4), jnp.int8)
  y = np.asarray(activations.contract(x, w, jnp.ones((1, 4))))
  assert not np.isfinite(y[:2]).any() and np.isfinite(y[2]).all()


@pytest.mark.parametrize("stack", [(), (2,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_contract_is_close_to_the_dense_product(stack, dtype):
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.standard_normal((*stack, 128, 16)), jnp.float32)
  x = jnp.asarray(rng.standard_normal((*stack, 3, 128)), dtype)
  codes, scale, _ = rounding.quantize_groups(w, 8, 0, True)
  y = activations.contract(x, codes, scale)
  assert y.dtype == dtype and y.shape == (*stack, 3, 16)
  dense = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  error = np.linalg.norm(np.asarray(y, np.float64) - dense) / np.linalg.norm(dense)
  assert 1e-4 < error < 0.02
  # Against the same arithmetic in float64.
  x_codes, x_scale = (np.asarray(a, np.float64) for a in int8.quantize_rows(x))
  exact = x_codes @ np.asarray(codes, np.float64)
  exact = exact * x_scale * np.asarray(scale, np.float64)
  tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
  error = np.abs(np.asarray(y, np.float64) - exact).max()
  assert error < tolerance * np.abs(exact).max()


@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_gradients_pass_straight_through(stack, out_first):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((*stack, 3, 2, 16)), jnp.float32)
  codes = jnp.asarray(_codes(*stack, 16, 5))
  scale = jnp.asarray(rng.random((*stack, 1, 5)), jnp.float32)
  held = jnp.swapaxes(codes, -1, -2) if out_first else codes
  dy = jnp.asarray(rng.standard_normal((*stack, 3, 2, 5)), jnp.float32)

  def dense(x, scale):
    w = codes.astype(jnp.float32) * scale
    return (jnp.einsum("...ij,...jk->...ik", x, w[..., None, :, :]) * dy).sum()

  def quantized(x, scale):
    return (activations.contract(x, held, scale, out_first=out_first) * dy).sum()

  def rounded(x, scale):  # the forward pass as it is, for the gradient of the scale
    x_codes, x_scale = int8.quantize_rows(x)
    return dense(x_codes * x_scale, scale)

  dx, dscale = jax.jit(jax.grad(quantized, (0, 1)))(x, scale)
  np.testing.assert_allclose(dx, jax.grad(dense)(x, scale), rtol=1e-4, atol=1e-3)
  expected = jax.grad(rounded, 1)(x, scale)
  np.testing.assert_allclose(dscale, expected, rtol=1e-4, atol=1e-3)


def test_refuses_with_one_line():
  x, w = jnp.zeros((2, 8), jnp.int8), jnp.zeros((8, 4), jnp.int8)
  with pytest.raises(errors.InputError, match="needs int8 codes, got float32"):
    int8.int8_dot(x.astype(jnp.float32), w)
  with pytest.raises(errors.InputError, match=r"must be \[\*stack, ..., 8\]"):
    int8.int8_dot(x[:, :7], w)
  big = jnp.zeros((200_000, 1), jnp.int8)
  with pytest.raises(errors.InputError, match="can overflow int32"):
    int8.int8_dot(big.reshape(1, -1), big)
