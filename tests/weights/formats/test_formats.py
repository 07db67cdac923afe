"""Every format x every option: what holds of all of them, and what each source says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.quantize import rtn, stochastic
from effjax.core import errors, registry
from effjax.ops.matmul import tables
from effjax.weights.formats import base
from effjax.weights.leaves import coded

IN, OUT = 128, 24
# Options of each case, and the bits a weight that its leaf takes.
CASES = {
  "int8": ({"bits": 8}, 8 + 32 / IN),
  "int8_tensor": ({"bits": 8, "per_tensor": True}, 8 + 32 / IN),
  "int4": ({"bits": 4, "group": 32}, 4 + 32 / 32),
  "int4_half": ({"bits": 4, "group": 32, "grid": "half"}, 5),
  "int4_wide_f16": (
    {"bits": 4, "group": 32, "grid": "wide", "scale_dtype": "float16"},
    4.5,
  ),
  "int3_asymmetric": ({"bits": 3, "group": 64, "symmetric": False}, 3 + 40 / 64),
  "int2": ({"bits": 2, "group": 16, "symmetric": False}, 2 + 40 / 16),
  "ternary": ({"format": "ternary"}, 2 + 32 / IN),
  "ternary_groups": ({"format": "ternary", "group": 32, "per_tensor": False}, 3),
  "nf4": ({"format": "nf4"}, 4.5),
  "nf4_double": ({"format": "nf4", "double_group": 8}, 4 + 8 / 64 + 32 / 512),
  "fp4": ({"format": "fp4", "group": 32}, 5),
  "fp8": ({"format": "fp8"}, 8 + 32 / IN),
  "fp8_e5m2": ({"format": "fp8", "variant": "e5m2", "per_tensor": True}, 8),
  "mxfp4": ({"format": "mxfp4"}, 4.25),
  "mxfp4_even": ({"format": "mxfp4", "scale_rule": "even"}, 4.25),
  "mxfp8": ({"format": "mxfp8"}, 8.25),
  "mxfp8_e5m2": ({"format": "mxfp8", "variant": "e5m2", "scale_rule": "rceil"}, 8.25),
  "nvfp4": ({"format": "nvfp4"}, 4.5),
  "gguf": ({"format": "gguf"}, 4.5),
  "gguf_q8_0": ({"format": "gguf", "variant": "q8_0"}, 8.5),
}


def _weights(shape=(IN, OUT), std=1.0, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(std * rng.standard_normal(shape), jnp.float32)


def _leaf(options, w, axis=-2):
  return rtn._quantize_array(w, axis, rtn.RTNOptions(**options))


def _error(dense, w):
  return float(jnp.linalg.norm(dense - w) / jnp.linalg.norm(w))


@pytest.fixture(params=CASES)
def case(request):
  options, bits = CASES[request.param]
  w = _weights()
  return options, bits, w, _leaf(options, w)


def test_every_format_is_here():
  tested = {options.get("format", "int") for options, _ in CASES.values()}
  assert tested == set(registry.names(base.FORMATS))


def test_bits_are_counted_with_everything(case):
  _, bits, w, leaf = case
  shared = 4 if leaf.held_bytes() * 8 % w.size else 0
  # One or two float32 for the whole matrix are in no proportion to a small one.
  assert leaf.held_bytes() * 8 / w.size == pytest.approx(bits, abs=33 * 2 / w.size)
  assert leaf.held_bytes() >= bits * w.size / 8 - shared


def test_decoding_is_what_the_leaf_holds(case):
  options, _, w, leaf = case
  fmt = rtn.RTNOptions(**options).build()

  @jax.jit
  def decoded(w):
    x = base.split(w, fmt.group_of(IN))
    grid = rtn.fit(fmt, x, "absmax")
    return base.merge(fmt.decode(fmt.encode(x, grid), grid))

  # A scale that is a product and a sum may be fused into one rounding or two.
  rtol = 1e-6 if "double_group" in options else 0
  np.testing.assert_allclose(decoded(w), leaf.dense(), rtol=rtol)


# The others' scales are made of more than the largest value of a group, or that lies
# beyond the grid.
@pytest.mark.parametrize(
  "name",
  sorted(
    set(CASES)
    - {"nf4_double", "ternary", "ternary_groups", "int4_half", "int4_wide_f16"}
  ),
)
def test_values_of_the_grid_stay(name):
  options = CASES[name][0]
  leaf = _leaf(options, _weights())
  again = _leaf(options, leaf.dense())
  np.testing.assert_allclose(again.dense(), leaf.dense(), rtol=2e-6, atol=0)


def test_rounding_is_to_the_nearest(case):
  options, _, w, _ = case
  fmt = rtn.RTNOptions(**options).build()
  x = base.split(w, fmt.group_of(IN))
  grid = rtn.fit(fmt, x, "absmax")
  low, high = (fmt.decode(code, grid) for code in fmt.neighbours(x, grid))
  found = fmt.decode(fmt.encode(x, grid), grid)
  best = jnp.minimum(jnp.abs(low - x), jnp.abs(high - x))
  # ggml rounds under a scale that is not rounded to float16 yet.
  atol = 2e-3 if options.get("format") == "gguf" else 2e-6
  np.testing.assert_allclose(jnp.abs(found - x), best, atol=atol)
  inside = (low <= x) & (x <= high)
  cut = (low == high) & (found == low)
  assert bool(jnp.all(inside | cut | (jnp.abs(high - low) < 1e-6)))


def test_a_power_of_two_scales_through(case):
  options, _, w, leaf = case
  large = _leaf(options, 64 * w)
  np.testing.assert_array_equal(large.dense(), 64 * leaf.dense())


def test_stacks_are_matrices_one_by_one(case):
  options, _, w, leaf = case
  stacked = _leaf(options, jnp.stack([w, 3 * w[::-1]]))
  assert tuple(stacked.shape) == (2, IN, OUT)
  np.testing.assert_allclose(stacked.dense()[0], leaf.dense(), rtol=1e-6)
  np.testing.assert_allclose(
    stacked.dense()[1], _leaf(options, 3 * w[::-1]).dense(), rtol=1e-6
  )


def test_an_embedding_is_held_turned(case):
  options, _, w, leaf = case
  table = _leaf(options, w, axis=-1)
  assert tuple(table.shape) == (OUT, IN)
  np.testing.assert_array_equal(table.dense(), leaf.dense().T)
  ids = jnp.asarray([3, 0, 3])
  np.testing.assert_array_equal(table.lookup(ids), leaf.dense().T[ids])


def test_zeros_and_constants(case):
  options, _, _, _ = case
  zeros = _leaf(options, jnp.zeros((IN, OUT)))
  np.testing.assert_array_equal(zeros.dense(), jnp.zeros((IN, OUT)))
  constant = _leaf(options, jnp.full((IN, OUT), 0.7)).dense()
  np.testing.assert_allclose(constant, 0.7, rtol=0.35)
  assert bool(jnp.all(constant == constant[0, 0]))


# The others have one scale for a matrix, scales that are rounded together, or a group
# that is given.
@pytest.mark.parametrize(
  "name",
  sorted(
    set(CASES)
    - {"int8_tensor", "ternary", "fp8_e5m2", "nf4_double", "gguf", "gguf_q8_0"}
  ),
)
def test_one_element_groups(name):
  options, w = CASES[name][0], _weights()
  dense = _leaf(options | {"group": 1}, w).dense()
  # A weight alone is the largest of its group; only its scale is rounded.
  np.testing.assert_allclose(dense, w, rtol=0.26)
  exact = options.get("format", "int") in ("int", "nf4", "fp4", "fp8")
  if exact and "scale_dtype" not in options and options.get("grid") != "half":
    signs = w > 0 if options.get("grid") == "wide" else jnp.ones_like(w, bool)
    np.testing.assert_allclose(dense[signs], w[signs], rtol=1e-6)


def test_nvfp4_keeps_weights_of_any_size():
  expected = _error(_leaf({"format": "nvfp4"}, _weights()).dense(), _weights())
  assert expected == pytest.approx(0.095, abs=0.004)
  for std in (0.02, 1e-3, 1e-6):
    w = _weights(std=std)
    assert _error(_leaf({"format": "nvfp4"}, w).dense(), w) == pytest.approx(
      expected, rel=0.03
    )


@pytest.mark.parametrize(
  ("options", "low", "high"),
  [
    # Gaussian weights, groups of 128, relative error, as published for each grid.
    ({"bits": 4, "group": 128, "grid": "narrow"}, 0.116, 0.119),
    ({"bits": 4, "group": 128, "grid": "half"}, 0.110, 0.113),
    ({"bits": 4, "group": 128, "grid": "wide"}, 0.103, 0.107),
    ({"bits": 4, "group": 128, "symmetric": False}, 0.099, 0.103),
    ({"format": "mxfp4", "scale_rule": "floor"}, 0.112, 0.120),
    ({"format": "mxfp4", "scale_rule": "even"}, 0.110, 0.115),
    ({"format": "mxfp4", "scale_rule": "rceil"}, 0.113, 0.121),
    ({"format": "mxfp4", "scale_rule": "ceil"}, 0.135, 0.146),
  ],
)
def test_published_errors(options, low, high):
  w = _weights((512, 256), std=0.02, seed=1)
  assert low < _error(_leaf(options, w).dense(), w) < high


def test_nf4_beats_int4_on_gaussian_weights():
  w = _weights((512, 64))
  nf4 = _error(_leaf({"format": "nf4"}, w).dense(), w)
  assert nf4 < _error(_leaf({"bits": 4, "group": 64}, w).dense(), w)


def test_double_quantization_costs_little():
  w = _weights((512, 256))
  plain = _error(_leaf({"format": "nf4"}, w).dense(), w)
  leaf = _leaf({"format": "nf4", "double_group": 256}, w)
  assert leaf.held_bytes() * 8 / w.size == pytest.approx(4.127, abs=1e-3)
  assert _error(leaf.dense(), w) < 1.02 * plain


def test_a_range_by_error_is_no_worse(case):
  options, _, w, leaf = case
  found = _leaf(options | {"range": "mse"}, w)
  group = rtn.RTNOptions(**options).build().group_of(IN)
  loss = lambda dense: jnp.sum(base.split((dense - w) ** 2, group), axis=-2)
  if "double_group" in options:
    assert float(loss(found.dense()).sum()) < 1.05 * float(loss(leaf.dense()).sum())
  else:
    assert bool(jnp.all(loss(found.dense()) <= loss(leaf.dense()) * (1 + 1e-5)))


def test_stochastic_rounding_is_unbiased(case):
  options, _, w, leaf = case
  w = w[:, :2] if "double_group" not in options else w
  make = lambda seed: stochastic._quantize_array(
    w, jax.random.key(seed), -2, stochastic.StochasticOptions(**options)
  ).dense()
  draws = jnp.stack([make(seed) for seed in range(60)])
  fmt = stochastic.StochasticOptions(**options).build()
  x = base.split(w, fmt.group_of(IN))
  grid = fmt.fit(x, fmt.outer(x))
  low, high = (base.merge(fmt.decode(c, grid)) for c in fmt.neighbours(x, grid))
  assert bool(jnp.all((draws == low[None]) | (draws == high[None])))
  gap = jnp.max(high - low)
  inside = (low <= w) & (w <= high)
  bias = jnp.abs(jnp.mean(jnp.where(inside, draws.mean(0) - w, 0)))
  assert float(bias) < 0.02 * float(gap)
  off = jnp.abs(draws.mean(0) - jnp.clip(w, low, high))
  assert float(off.max()) < 0.45 * float(gap)
  assert leaf.dense().shape == (IN, OUT)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"format": "nf5"}, "unknown format 'nf5'; did you mean 'nf4'"),
    ({"format": "nf4", "bits": 4}, "format 'nf4' has no option bits; it takes"),
    ({"format": "mxfp4", "scale_rule": "up"}, "unknown scale_rule 'up'"),
    ({"format": "fp8", "variant": "e3m4"}, "unknown variant 'e3m4'"),
    ({"format": "ternary", "group": 32}, "group=32 needs per_tensor=False"),
    ({"bits": 7}, "bits=7 must be one of"),
    ({"per_tensor": True, "group": 32}, "per_tensor=True needs group=0"),
    ({"activations": "int8", "bits": 4, "group": 32}, "activations='int8' needs group"),
    (
      {"activations": "int4", "symmetric": False},
      "activations='int4' needs group=0 and",
    ),
    ({"activations": "fp8"}, "activations='fp8' needs format='fp8'"),
    ({"format": "fp8", "activations": "int8"}, "activations='int8' needs format='int'"),
    ({"format": "fp8", "activations": "fp8", "group": 32}, "'fp8' needs group=0"),
    (
      {"format": "fp8", "activations": "fp8", "variant": "e5m2"},
      "activations='fp8' needs variant='e4m3'",
    ),
    (
      {"format": "nf4", "activations": "int8"},
      "format 'nf4' has no option activations",
    ),
    (
      {"activation_scale": "absmax"},
      "activation_scale='absmax' needs activations other",
    ),
    (
      {"activations": "int8", "activation_scale": "mean"},
      "unknown activation_scale 'mean'; .*available: absmax, dynamic, mse, percentile",
    ),
    ({"activations": "int8", "percentile": 0.0}, "percentile=0.0 must be above 0"),
    ({"range": "max"}, "unknown range 'max'"),
    ({"format": "nf4", "scale_dtype": "float64"}, "unknown scale_dtype 'float64'"),
  ],
)
def test_bad_options_are_one_line(options, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    rtn.RTNOptions(**options)
  assert "\n" not in str(caught.value)


def test_groups_that_do_not_divide():
  for options in ({"format": "nf4"}, {"format": "nvfp4"}, {"format": "mxfp8"}):
    with pytest.raises(errors.InputError, match="the nearest legal group is"):
      _leaf(options, _weights((63, 8)))


def test_double_groups_are_the_most_that_divide():
  leaf = _leaf({"format": "nf4", "double_group": 7}, _weights())
  assert leaf.scale.scale.shape == (IN // 64, OUT // 6)


def test_options_say_what_they_need():
  needs = lambda scale: (
    rtn.RTNOptions(activations="int8", activation_scale=scale).collect
  )
  assert needs("dynamic") == rtn.RTNOptions().collect == ()
  assert rtn.RTNOptions(format="nf4").collect == ()
  assert needs("absmax") == ("moments",)
  assert needs("percentile") == needs("mse") == ("histogram",)


def test_options_say_what_ran():
  options = rtn.RTNOptions(format="mxfp4")
  assert (options.group, options.scale_rule, options.bits) == (32, "floor", None)
  assert rtn.RTNOptions(**{"bits": 4}).grid == "narrow"


def test_parts_that_do_not_fit_a_coded_leaf():
  codes = jnp.zeros((8, 4), jnp.uint8)
  with pytest.raises(errors.InputError, match="does not tile codes"):
    coded.Coded.create(codes, jnp.ones((3, 4)), table="nf4")
  with pytest.raises(errors.InputError, match="codes must be uint8"):
    coded.Coded.create(codes.astype(jnp.int8), table="nf4")
  with pytest.raises(errors.InputError, match="unknown table of codes"):
    coded.Coded.create(codes, table="nf5")
  assert tables.BITS["nf4"] == 4
