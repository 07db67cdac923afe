"""HQQ against the authors' steps in NumPy float64, and against rounding to nearest.

Letters: G groups, I inputs of a group, O outputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress import registry
from effjax.compress.quantize import hqq
from effjax.core import errors, specs
from effjax.weights.leaves import low_rank, masked, quantized

MATRIX = specs.ParamSpec(axes=("embed", "mlp"), kind="matrix")
EMBEDDING = specs.ParamSpec(axes=("vocab", "embed"), kind="embedding")


def _apply(name, w, spec=MATRIX, **options):
  where = {"kind": (spec.kind,)}
  return registry.find(name)({"w": w}, {"w": spec}, where=where, options=options)["w"]


def _heavy(seed=0, shape=(128, 24), scale=1.0):
  return scale * np.random.default_rng(seed).standard_t(3, shape)


def _authors(w, *, bits=4, group=0, lp_norm=0.7, beta=10.0, kappa=1.01, iters=20):
  """Their loop, with the inverse of the scale; codes `[I, O]`, scales, zero points."""
  top = 2**bits - 1
  w_GIO = w.reshape(-1, group or len(w), w.shape[-1])
  least, most = w_GIO.min(axis=1, keepdims=True), w_GIO.max(axis=1, keepdims=True)
  inverse = 1 / ((most - least) / top).astype(np.float32).astype(np.float64)
  zero = -least * inverse
  best, kept = np.inf, zero
  for _ in range(iters):
    codes = np.clip(np.rint(w_GIO * inverse + zero), 0, top)
    back = (codes - zero) / inverse
    error = np.abs(w_GIO - back).mean()
    if error >= best:
      break
    best, kept = error, zero
    off = w_GIO - back
    with np.errstate(divide="ignore"):  # 0 where the largest weight is on the grid
      size = np.abs(off) - np.abs(off) ** (lp_norm - 1) / beta
    large = np.sign(off) * np.maximum(size, 0)
    zero = np.mean(codes - (w_GIO - large) * inverse, axis=1, keepdims=True)
    beta *= kappa
  codes = np.clip(np.rint(w_GIO * inverse + kept), 0, top)
  return codes.reshape(w.shape), 1 / inverse, kept


CASES = {
  "as it is": {},
  "3 bits": {"group": 32, "bits": 3},
  "2 bits": {"group": 32, "bits": 2, "iters": 5},
  "one norm": {"group": 32, "lp_norm": 1.0},
  "more of it": {"group": 64, "lp_norm": 0.5, "beta": 3.0, "kappa": 1.1},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors_steps(case):
  options, w = CASES[case], _heavy()
  codes, scale, zero = _authors(w, **options)
  with jax.enable_x64(True):
    x = jnp.asarray(w.reshape(*zero.shape[:1], -1, w.shape[-1]))
    found = hqq.fit(x, hqq.HQQOptions(**options))
    np.testing.assert_allclose(found.scale, scale, rtol=1e-12)
    np.testing.assert_allclose(found.zero, zero, rtol=1e-9, atol=1e-9)
  leaf = _apply("hqq", jnp.asarray(w, jnp.float32), **options)
  assert np.mean(np.asarray(leaf.unpacked()) == codes) >= 0.995
  dense = (codes.reshape(x.shape) - zero) * scale
  np.testing.assert_allclose(leaf.offset, (-zero * scale)[:, 0], rtol=1e-3, atol=1e-4)
  assert np.mean(np.abs(leaf.dense() - dense.reshape(w.shape)) < 1e-3) >= 0.995


def test_the_threshold_of_one_norm_is_the_exact_minimum():
  """Of |e| + beta / 2 (x - e)^2, found by trying all e."""
  x = np.linspace(-1, 1, 41)
  tried = np.linspace(-1, 1, 4001)
  for beta in (2.0, 10.0):
    cost = np.abs(tried) + beta / 2 * (x[:, None] - tried) ** 2
    best = tried[np.argmin(cost, axis=1)]
    got = hqq._shrunk(jnp.asarray(x), jnp.float32(beta), 1.0)
    np.testing.assert_allclose(got, best, atol=1e-3)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_loses_less_of_heavy_tails_than_rounding_to_nearest(bits, scale):
  for seed in range(3):
    w = jnp.asarray(_heavy(seed, (256, 32), scale), jnp.float32)
    options = {"bits": bits, "group": 64}
    ours = np.abs(_apply("hqq", w, **options).dense() - w)
    theirs = np.abs(_apply("rtn", w, symmetric=False, **options).dense() - w)
    for measure in (lambda e: np.mean(e**0.7), np.mean, np.median):
      assert measure(ours) < 0.98 * measure(theirs)


def test_the_mean_error_never_rises_from_where_it_starts():
  for seed in range(5):
    w = jnp.asarray(np.random.default_rng(seed).standard_normal((32, 4)), jnp.float32)
    made = [_apply("hqq", w, bits=2, iters=n).dense() for n in (1, 2, 5, 20)]
    steps = [np.mean(np.abs(dense - w)) for dense in made]
    assert np.all(np.diff(steps) <= 1e-6)


def test_small_weights_have_no_large_errors_until_measured_in_steps():
  """What the docstring says of the authors' constants."""
  w = jnp.asarray(_heavy(scale=0.02), jnp.float32)
  sharp, blunt = (_apply("hqq", w, group=64, lp_norm=p).dense() for p in (0.5, 0.9))
  np.testing.assert_array_equal(sharp, blunt)
  in_steps = [
    _apply("hqq", jnp.asarray(_heavy(scale=s), jnp.float32), group=64, units="step")
    for s in (1.0, 2.0**-6)
  ]
  np.testing.assert_array_equal(in_steps[0].unpacked(), in_steps[1].unpacked())
  np.testing.assert_array_equal(in_steps[0].dense() * 2.0**-6, in_steps[1].dense())
  lp = lambda dense: np.mean(np.abs(dense - w) ** 0.7)
  in_steps = _apply("hqq", w, group=64, units="step")
  assert lp(in_steps.dense()) < lp(blunt)


def test_the_leaf_and_what_it_holds():
  w = jnp.asarray(_heavy(), jnp.float32)
  leaf = _apply("hqq", w, group=32)
  assert isinstance(leaf, quantized.Quantized)
  assert leaf.bits == 4 and leaf.zero is None and leaf.codes.dtype == jnp.uint8
  assert leaf.scale.shape == leaf.offset.shape == (4, 24)
  by_hand = leaf.unpacked().reshape(4, 32, 24) * leaf.scale[:, None]
  by_hand += leaf.offset[:, None]
  np.testing.assert_allclose(leaf.dense(), by_hand.reshape(w.shape), atol=1e-6)
  x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 128)), jnp.float32)
  np.testing.assert_allclose(leaf.contract(x), x @ leaf.dense(), atol=1e-4)
  half = _apply("hqq", w, group=32, scale_dtype="float16")
  assert half.scale.dtype == half.offset.dtype == jnp.float16
  # No other code is nearer, with scales and offsets as they are stored.
  wide = (half.scale.astype(jnp.float32), half.offset.astype(jnp.float32))
  values = jnp.arange(16.0)[:, None, None] * wide[0][None] + wide[1][None]
  off = jnp.abs(values[:, :, None] - w.reshape(4, 32, 24)[None])
  least = np.asarray(jnp.min(off, axis=0)).reshape(w.shape)
  np.testing.assert_allclose(np.abs(half.dense() - w), least, atol=1e-5)


def test_groups_of_one_value_are_exact():
  w = jnp.asarray(_heavy(), jnp.float32).at[:32].set(0.3).at[32:64].set(0)
  # Exact as it is compiled for users; tests hardly optimize.
  fit = lambda w: _apply("hqq", w, group=32)
  leaf = jax.jit(fit, compiler_options={"xla_backend_optimization_level": 3})(w)
  np.testing.assert_array_equal(leaf.dense()[:64], w[:64])
  assert np.all(np.isfinite(leaf.dense()))


def test_stacked_matrices_stop_alone():
  w = np.stack([_heavy(seed, (64, 8), 10.0**-seed) for seed in range(3)])
  stacked = _apply("hqq", jnp.asarray(w, jnp.float32), group=16, bits=3)
  for got, one in zip(stacked.dense(), w, strict=True):
    alone = _apply("hqq", jnp.asarray(one, jnp.float32), group=16, bits=3)
    np.testing.assert_allclose(got, alone.dense(), rtol=1e-5, atol=1e-6)


def test_an_embedding_is_the_transpose():
  w = jnp.asarray(_heavy(), jnp.float32)
  table = _apply("hqq", w.T, EMBEDDING, group=32)
  assert table.shape == (24, 128) and table.axis == -1
  np.testing.assert_array_equal(table.dense(), _apply("hqq", w, group=32).dense().T)
  ids = jnp.asarray([3, 0, 23])
  np.testing.assert_array_equal(table.lookup(ids), table.dense()[ids])


def test_leaves_inside_leaves(rng):
  w = jnp.asarray(_heavy(), jnp.float32)
  mask = jnp.asarray(rng.random(w.shape) < 0.5)
  leaf = _apply("hqq", masked.Masked.create(w, mask), group=32)
  assert isinstance(leaf.values, quantized.Quantized)
  assert np.all(np.asarray(leaf.dense())[~np.asarray(mask)] == 0)
  thin = low_rank.LowRank.create(w[:, :8], w[:8])
  leaf = _apply("hqq", thin)
  assert isinstance(leaf.left, quantized.Quantized) and leaf.left.offset is not None
  with pytest.raises(errors.InputError, match="w is already a quantized leaf"):
    _apply("hqq", _apply("hqq", w))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"format": "nf4"}, "format='nf4': hqq finds zero points"),
    ({"symmetric": True}, "symmetric=True: hqq finds zero points"),
    ({"per_tensor": True}, "per_tensor=True: hqq has a zero point for each group"),
    ({"activations": "int8"}, "activations='int8' needs group=0 and symmetric"),
    ({"bits": 7}, "bits=7 must be one of"),
    ({"group": 48}, "w: group 48 does not divide .* nearest legal group is 32"),
    ({"lp_norm": 0.0}, "lp_norm=0.0 must be above 0, at most 1"),
    ({"lp_norm": 1.5}, "lp_norm=1.5 must be above 0, at most 1"),
    ({"beta": 0.0}, "beta=0.0 must be positive"),
    ({"iters": 0}, "iters=0 must be positive"),
    ({"units": "steps"}, "units of errors"),
  ],
)
def test_mistakes(options, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    _apply("hqq", jnp.ones((64, 8)), **options)
  assert "\n" not in str(caught.value)


def test_options_are_recorded_as_they_ran():
  options = hqq.HQQOptions()
  assert (options.bits, options.symmetric, options.group) == (4, False, 0)
  assert hqq.HQQOptions(bits=3).bits == 3
