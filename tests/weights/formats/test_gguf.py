"""Blocks of GGUF: the bytes of gguf-py, the errors of llama.cpp's own search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compress.quantize import gptq, rtn, stochastic
from effjax.core import errors
from effjax.interop.gguf import blocks, encode, formats, leaves
from effjax.weights.formats import base, gguf

IN, OUT = 512, 8
PLAIN = [name for name, own in gguf.VARIANTS.items() if not own.shared_bits]
NESTED = [name for name in gguf.VARIANTS if name not in PLAIN]
BITS = {
  "q8_0": 8.5,
  "q5_0": 5.5,
  "q4_0": 4.5,
  "q5_1": 6,
  "q4_1": 5,
  "q6_k": 6.5625,
  "q5_k": 5.5,
  "q4_k": 4.5,
  "q3_k": 3.4375,
  "q2_k": 2.625,
}


def _weights(shape=(IN, OUT), std=0.02, seed=0):
  rng = np.random.default_rng(seed)
  return (std * rng.standard_normal(shape)).astype(np.float32)


def _samples():
  """Matrices that take every branch of a fit."""
  rng = np.random.default_rng(1)
  normal = _weights(std=1)
  ramp = np.repeat(10.0 ** rng.integers(-3, 2, (IN // 16, OUT)), 16, axis=0)
  made = {
    "normal": normal,
    "small": _weights(),
    "positive": np.abs(normal),
    "negative": -np.abs(normal),
    "heavy tails": rng.standard_t(1.5, (IN, OUT)),
    "sparse": np.where(rng.random((IN, OUT)) < 0.03, normal, 0),
    "scales apart": normal * ramp,
    "zeros": np.zeros((IN, OUT)),
    "constant": np.full((IN, OUT), -0.37),
    "few values": rng.integers(-3, 4, (IN, OUT)),
  }
  return {name: x.astype(np.float32) for name, x in made.items()}


SAMPLES = _samples()


def _leaf(variant, w, axis=-2, **options):
  options = rtn.RTNOptions(format="gguf", variant=variant, **options)
  return rtn._quantize_array(jnp.asarray(w), axis, options)


def _rows(w):
  return np.ascontiguousarray(np.swapaxes(w, -1, -2))


def _error(values, w):
  return float(np.linalg.norm(np.asarray(values) - w))


@pytest.mark.parametrize("variant", gguf.VARIANTS)
def test_a_leaf_is_the_type_of_its_name(variant):
  w = _weights((2, IN, OUT))
  for leaf, logical in (
    (_leaf(variant, w), w.shape),
    (_leaf(variant, w[0], axis=-1), (OUT, IN)),
  ):
    assert leaf.shape == logical
    assert leaves.type_of(leaf) == variant.upper()
    bits = 8 * leaf.held_bytes() / leaf.size / np.prod(logical[:-2] + (OUT,))
    assert bits == BITS[variant] == formats.TYPES[variant.upper()].bits_per_weight


def test_every_quantized_type_has_a_format():
  assert {name.upper() for name in gguf.VARIANTS} == set(leaves.QUANTIZED)


@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("variant", gguf.VARIANTS)
def test_a_leaf_is_what_its_file_says(variant, case):
  leaf = _leaf(variant, SAMPLES[case])
  raw = leaves.to_raw(leaf, variant.upper())
  again = leaves.to_leaf(raw, variant.upper(), (OUT, IN), embedding=False)
  assert jax.tree.structure(again) == jax.tree.structure(leaf)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(leaf), strict=True):
    np.testing.assert_array_equal(a, b)
  decoded = blocks.decode(raw, variant.upper())
  np.testing.assert_array_equal(decoded.T, leaf.dense())


@pytest.mark.oracle
@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("variant", PLAIN)
def test_bytes_equal_gguf(variant, case):
  theirs = pytest.importorskip("gguf")
  w = SAMPLES[case]
  with np.errstate(all="ignore"):
    expected = theirs.quantize(_rows(w), theirs.GGMLQuantizationType[variant.upper()])
  raw = leaves.to_raw(_leaf(variant, w), variant.upper())
  np.testing.assert_array_equal(raw, expected.view(np.uint8))


@pytest.mark.oracle
@pytest.mark.parametrize("variant", gguf.VARIANTS)
def test_gguf_decodes_the_values_of_the_leaf(variant):
  theirs = pytest.importorskip("gguf")
  leaf = _leaf(variant, _weights())
  raw = leaves.to_raw(leaf, variant.upper())
  decoded = theirs.dequantize(raw, theirs.GGMLQuantizationType[variant.upper()])
  np.testing.assert_array_equal(decoded.T, leaf.dense())


@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("variant", NESTED)
def test_the_search_is_as_good_as_ggml(variant, case):
  # `encode` gives the bytes of llama.cpp's own quantizers.
  w = SAMPLES[case]
  expected = encode.encode(_rows(w), variant.upper())
  leaf = _leaf(variant, w)
  theirs = _error(blocks.decode(expected, variant.upper()).T, w)
  normal = case in ("normal", "small")
  # Where trials are equally good, the order of a sum chooses: most of all with one or
  # two numbers in a sub-block, which many scales fit exactly before they are rounded.
  slack = 0 if normal else 2e-4 * np.linalg.norm(w)
  factor = 1.0005 if normal else 1.07 if case == "sparse" else 1.01
  assert _error(leaf.dense(), w) <= factor * theirs + slack
  if normal:
    same = leaves.to_raw(leaf, variant.upper()) == expected
    assert same.mean() > 0.995


@pytest.mark.parametrize("variant", gguf.VARIANTS)
def test_stacks_and_embeddings_are_matrices_one_by_one(variant):
  w = _weights((3, IN, OUT))
  stacked, mapped = _leaf(variant, w), jax.vmap(lambda x: _leaf(variant, x))(w)
  for k in range(3):
    one = _leaf(variant, w[k])
    for many in (stacked, mapped):
      np.testing.assert_allclose(many.dense()[k], one.dense(), atol=1e-3 * 0.02)
  table = _leaf(variant, w[0], axis=-1)
  np.testing.assert_array_equal(table.dense(), _leaf(variant, w[0]).dense().T)


@pytest.mark.parametrize("variant", gguf.VARIANTS)
def test_neighbours_are_around_each_weight(variant):
  fmt = base.FormatOptions(format="gguf", variant=variant).build()
  x = base.split(jnp.asarray(_weights(std=1)), fmt.group_of(IN))
  grid = fmt.fit(x)
  low, high = (fmt.decode(code, grid) for code in fmt.neighbours(x, grid))
  near = np.maximum(np.abs(x), np.abs(high)) * 1e-6
  inside = (low <= x + near) & (x <= high + near)
  cut = low == high
  assert np.all(low <= high) and np.all(inside | cut) and cut.mean() < 0.2
  found = fmt.decode(fmt.encode(x, grid), grid)
  best = jnp.minimum(jnp.abs(low - x), jnp.abs(high - x))
  # ggml picks codes before scale and minimum become float16, which moves a value by
  # 2^-11 of each, here of 5 and 2.5 at most; a tie is off by twice that.
  np.testing.assert_allclose(jnp.abs(found - x), best, atol=2 * 7.5 * 2**-11)
  codes = stochastic.choose(fmt, x, grid, jax.random.key(0))
  chosen = fmt.decode(codes, grid)
  assert np.all((chosen == low) | (chosen == high))
  bias = np.where(cut, 0, chosen - x)
  assert abs(bias.mean()) < 5 * bias.std() / np.sqrt(bias.size)


@pytest.mark.parametrize("variant", gguf.VARIANTS)
def test_a_range_by_error_is_no_worse(variant):
  w = SAMPLES["heavy tails"]
  plain, found = _leaf(variant, w), _leaf(variant, w, range="mse")
  # A group's error, though scales are rounded together.
  group = gguf.VARIANTS[variant].group
  loss = lambda leaf: jnp.sum(base.split((leaf.dense() - w) ** 2, group), axis=-2)
  assert np.all(loss(found) <= loss(plain) * (1 + 1e-5))
  # At 8 bits the whole range is the best of every group.
  assert variant == "q8_0" or np.any(loss(found) < 0.99 * loss(plain))


@pytest.mark.parametrize("variant", gguf.VARIANTS)
def test_gptq_makes_up_for_errors(variant):
  rng = np.random.default_rng(0)
  inputs = rng.standard_normal((2 * 256, 256)) @ rng.standard_normal((256, 256))
  hessian = jnp.asarray(inputs.T @ inputs / len(inputs), jnp.float32)
  w = jnp.asarray(_weights((256, 8)))
  options = gptq.GPTQOptions(format="gguf", variant=variant)
  fmt = options.build()
  codes, grid, report = jax.jit(
    lambda w, h: gptq.quantize_matrix(w, None, h, jnp.bool_(True), options)
  )(w, hessian)
  off = lambda leaf: leaf.dense() - w
  loss = lambda e: float(jnp.trace(e.T @ hessian @ e))
  leaf = fmt.leaf(codes, grid)
  assert leaves.type_of(leaf) == variant.upper()
  assert loss(off(leaf)) < 0.8 * loss(off(_leaf(variant, w)))
  assert np.isfinite(report.loss)


@pytest.mark.parametrize(
  ("variant", "in_dim", "message"),
  [
    ("q4_0", 48, "blocks of 32 inputs.*input axis of 48; no variant does"),
    ("q4_k", 96, "blocks of 256 inputs.*axis of 96; take q8_0, q5_0, q4_0, q5_1, q4_1"),
    ("q6_k", 128, "gguf q6_k has blocks of 256 inputs, which do not divide"),
  ],
)
def test_rows_that_are_not_whole_blocks(variant, in_dim, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    _leaf(variant, _weights((in_dim, 4)))
  assert "\n" not in str(caught.value)


def test_bad_options_are_one_line():
  make = lambda **options: base.FormatOptions(format="gguf", **options)
  with pytest.raises(errors.InputError, match="'q4_m'; did you mean 'q4_"):
    make(variant="q4_m")
  with pytest.raises(errors.InputError, match="q3_k has groups of 16; leave group out"):
    make(variant="q3_k", group=32)
  with pytest.raises(errors.InputError, match="'gguf' has no option bits"):
    make(bits=4)
  assert make(variant="q6_k").group == 16


def test_large_scales_are_cut():
  w = np.full((256, 1), 1e30, np.float32)
  for variant in gguf.VARIANTS:
    assert np.isfinite(_leaf(variant, w).dense()).all()
