"""Products of rounded activations, and their gradients, against NumPy and LSQ."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.matmul import activations

TOP = {"int8": 127, "int4": 7, "fp8": 448}
KINDS = tuple(TOP)
E4M3 = ml_dtypes.float8_e4m3fn


def _weight(rng, kind, *shape):
  """Codes as leaves hold them, their values, and scales `[*stack, 1, out]`."""
  if kind == "fp8":
    values = rng.standard_normal(shape).astype(np.float32).astype(E4M3)
    codes = values.view(np.uint8)
  else:
    codes = values = rng.integers(-7 if kind == "int4" else -127, 8, shape, np.int8)
  scale = np.float32(0.01 + rng.random((*shape[:-2], 1, shape[-1])))
  return codes, values.astype(np.float64), scale


def _codes(x, kind, scale):
  """NumPy's own rounding, of float32 quotients."""
  places = np.clip(np.float32(x) / np.float32(scale), -TOP[kind], TOP[kind])
  if kind == "fp8":
    return places.astype(E4M3).astype(np.float64)
  return np.rint(places).astype(np.float64)


def _row_scale(x, kind):
  return np.abs(x).max(axis=-1, keepdims=True) / np.float32(TOP[kind])


def _close(got, expected, tolerance=1e-5):
  limit = tolerance * max(1.0, np.abs(expected).max())
  assert np.abs(np.asarray(got, np.float64) - expected).max() <= limit


def _contract(*args, **kwargs):
  return activations.contract(*jax.tree.map(jnp.asarray, args), **kwargs)


def _run(x, codes, w_scale, x_scale=None, sizes=None, *, kind, out_first):
  held = np.swapaxes(codes, -1, -2) if out_first else codes
  fn = jax.jit(lambda *args: _contract(*args, kind=kind, out_first=out_first))
  return fn(x, np.ascontiguousarray(held), w_scale, x_scale, sizes)


@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_scales_equal_numpy(rng, kind, out_first):
  codes, values, w_scale = _weight(rng, kind, 48, 10)
  x = np.float32(rng.standard_normal((2, 3, 48)))
  x[0, 1] = 0
  scale = _row_scale(x, kind)
  places = _codes(x, kind, np.where(scale > 0, scale, 1))
  expected = (places @ values) * scale * w_scale
  _close(_run(x, codes, w_scale, kind=kind, out_first=out_first), expected)


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize("kind", KINDS)
def test_static_scales_equal_numpy(rng, kind, stack):
  codes, values, w_scale = _weight(rng, kind, *stack, 48, 10)
  x = np.float32(rng.standard_normal((*stack, 5, 48)))
  # Some values are cut, and each tensor of a stack has a scale of its own.
  x_scale = np.full((*stack, 1, 1), 1.5 / TOP[kind], np.float32)
  x_scale *= np.arange(1, 1 + (stack or (1,))[0], dtype=np.float32).reshape(
    *stack, 1, 1
  )
  expected = (_codes(x, kind, x_scale) @ values) * x_scale * w_scale
  _close(_run(x, codes, w_scale, x_scale, kind=kind, out_first=True), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_static_scale_that_is_the_rows_own_changes_nothing(rng, kind):
  codes, _, w_scale = _weight(rng, kind, 32, 6)
  x = np.float32(rng.standard_normal((1, 32)))
  dynamic = _run(x, codes, w_scale, kind=kind, out_first=False)
  scale = activations.quantize(jnp.asarray(x), kind)[1]
  static = _run(x, codes, w_scale, np.asarray(scale), kind=kind, out_first=False)
  # An ulp of the scale: divided by a constant or times its reciprocal.
  np.testing.assert_allclose(dynamic, static, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_groups_equal_one_by_one(rng, kind, static):
  sizes = np.int32([4, 0, 6])
  codes, _, w_scale = _weight(rng, kind, 3, 16, 8)
  x = np.float32(rng.standard_normal((12, 16)))
  x_scale = np.float32([[[2.0]], [[1.0]], [[0.5]]]) / TOP[kind] if static else None
  got = _run(x, codes, w_scale, x_scale, sizes, kind=kind, out_first=True)
  assert np.all(np.asarray(got[10:]) == 0)
  for expert, (first, end) in enumerate([(0, 4), (4, 4), (4, 10)]):
    own = None if x_scale is None else x_scale[expert]
    one = _run(
      x[first:end], codes[expert], w_scale[expert], own, kind=kind, out_first=True
    )
    np.testing.assert_allclose(got[first:end], one, rtol=1e-5, atol=1e-5)


def _products(jaxpr):
  """Every product of a program: dtypes of what is multiplied, and of the sums."""
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ("dot_general", "int8_dot"):
      avals = [v.aval.dtype.name for v in (*eqn.invars, eqn.outvars[0])]
      found.append(tuple(avals))
    for value in eqn.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found += _products(inner)
  return found


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_program_multiplies_codes(rng, kind, grouped):
  stack = (2,) if grouped else ()
  codes, _, w_scale = _weight(rng, kind, *stack, 32, 6)
  x = jnp.ones((40, 32), jnp.bfloat16)
  sizes = jnp.asarray([30, 10]) if grouped else None
  fn = lambda *args: _contract(*args, kind=kind)
  jaxpr = jax.make_jaxpr(fn)(x, codes, w_scale, None, sizes).jaxpr
  expected = ("int8", "int8", "int32")
  if kind == "fp8":
    expected = ("float8_e4m3fn", "float8_e4m3fn", "float32")
  assert set(_products(jaxpr)) == {expected}


@pytest.mark.parametrize("kind", KINDS)
def test_dynamic_scales_let_gradients_straight_through(rng, kind):
  codes, values, w_scale = _weight(rng, kind, 16, 5)
  x = jnp.asarray(rng.standard_normal((3, 2, 16)), jnp.float32)
  dy = np.float32(rng.standard_normal((3, 2, 5)))
  loss = lambda x, s: jnp.sum(_contract(x, codes, s, kind=kind) * dy)
  dx, dscale = jax.jit(jax.grad(loss, (0, 1)))(x, jnp.asarray(w_scale))
  _close(dx, (dy * w_scale) @ values.T)
  rounded, scale = (np.asarray(a, np.float64) for a in activations.quantize(x, kind))
  expected = np.sum(dy * ((rounded * scale) @ values), axis=(0, 1))
  _close(dscale, expected[None])


def _surrogate(x, s, at, kind):
  """LSQ's function of x and s whose derivatives are eq. 3 and 5, around `at`.

  Eq. 1 and 2 with the rounding as a constant added: s (clip(x / s) + r), where r is
  what rounding added at the point of the derivative.
  """
  x0, s0 = at
  top = TOP[kind]
  place = np.clip(x0 / s0, -top, top)
  return s * (np.clip(x / s, -top, top) + (_codes(x0, kind, s0) - place))


@pytest.mark.parametrize("form", ["one", "stack", "groups"])
@pytest.mark.parametrize("kind", KINDS)
def test_static_gradients_equal_finite_differences_of_lsq(rng, kind, form):
  stack = () if form == "one" else (2,)
  codes, values, w_scale = _weight(rng, kind, *stack, 12, 5)
  rows = (6,) if form == "groups" else (*stack, 6)
  sizes = jnp.asarray([2, 4]) if form == "groups" else None
  experts = np.int32([0, 0, 1, 1, 1, 1])
  x = np.float32(rng.standard_normal((*rows, 12)))
  x_scale = np.float32(0.9 / TOP[kind] * (1 + np.arange(len(stack) + 1)))
  x_scale = x_scale.reshape(*stack, 1, 1)
  dy = rng.standard_normal((*rows, 5))

  def loss(x, s):
    y = _contract(x, codes, w_scale, s, sizes, kind=kind)
    return jnp.sum(y * jnp.float32(dy))

  dx, ds = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(x), jnp.asarray(x_scale))
  w = values * w_scale
  wide, s0 = x.astype(np.float64), x_scale.astype(np.float64)

  def paper(x, s):
    of_rows = lambda part: part[experts, 0] if form == "groups" else part
    rounded = _surrogate(x, of_rows(s), (wide, of_rows(s0)), kind)
    if form == "groups":
      return np.einsum("ti,tio,to->", rounded, w[experts], dy)
    return np.sum((rounded @ w) * dy)

  assert np.any(np.abs(wide) > 0.9) and np.any(np.abs(wide) < 0.9)
  for place in np.ndindex(s0.shape):
    step = np.zeros_like(s0)
    step[place] = 1e-7 * s0[place]
    slope = (paper(wide, s0 + step) - paper(wide, s0 - step)) / (2 * step[place])
    assert float(ds[place]) == pytest.approx(slope, rel=1e-3, abs=1e-3 * TOP[kind])
  for place in list(np.ndindex(wide.shape))[::5]:
    step = np.zeros_like(wide)
    step[place] = 1e-6
    slope = (paper(wide + step, s0) - paper(wide - step, s0)) / 2e-6
    assert float(dx[place]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_has_no_gradient(rng, kind):
  codes, _, w_scale = _weight(rng, kind, 4, 5)
  x = jnp.asarray([[0.5, -0.5, 2.0, -2.0]])
  scale = jnp.full((1, 1), 1 / TOP[kind])
  loss = lambda x: jnp.sum(_contract(x, codes, w_scale, scale, kind=kind))
  dx = np.asarray(jax.grad(loss)(x))[0]
  assert np.all(dx[:2] != 0) and np.all(dx[2:] == 0)


def test_not_finite_shows_with_dynamic_scales(rng):
  for kind in KINDS:
    codes, _, w_scale = _weight(rng, kind, 8, 4)
    x = jnp.ones((3, 8)).at[0, 1].set(jnp.nan).at[1, 2].set(jnp.inf)
    y = np.asarray(_contract(x, codes, w_scale, kind=kind))
    assert not np.isfinite(y[:2]).any() and np.isfinite(y[2]).all()


def test_mistakes_are_one_line(rng):
  codes, _, w_scale = _weight(rng, "fp8", 8, 4)
  x = jnp.ones((2, 8))
  with pytest.raises(errors.InputError, match="unknown kind of activations 'int5'"):
    _contract(x, codes, w_scale, kind="int5")
  with pytest.raises(errors.InputError, match=r"x must be \[\*stack, ..., 8\]"):
    _contract(x[:, :4], codes, w_scale, kind="fp8")
