"""Bitmaps and compressed rows: the same weight, bit for bit, in the bytes of a formula.

Letters: R rows, C columns.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import errors
from effjax.ops.matmul import places
from effjax.weights.leaves import coded, compressed, low_rank, masked, quantized


def _mask(rng, shape, density):
  mask = rng.random(shape) < density
  if shape[-2] > 2 and shape[-1] > 3:
    mask[..., 2, :] = False  # A row and a column with nothing in it.
    mask[..., 3] = False
  return jnp.asarray(mask)


def _int(rng, shape, bits, zero=False):
  low, high = (0, 2**bits) if zero else (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
  grid = (*shape[:-2], 2, shape[-1])
  zeros = jnp.asarray(rng.integers(0, 2**bits, grid), jnp.uint8) if zero else None
  scale = jnp.asarray(rng.uniform(0.1, 1, grid), jnp.float32)
  codes = jnp.asarray(rng.integers(low, high, shape))
  return quantized.Quantized.create(codes, scale, zeros, bits=bits)


def _nf4(rng, shape):
  codes = jnp.asarray(rng.integers(0, 16, shape), jnp.uint8)
  scale = jnp.asarray(rng.uniform(0.1, 1, (*shape[:-2], 1, shape[-1])), jnp.float32)
  return coded.Coded.create(codes, scale, table="nf4")


def _swapped(rng, shape):
  turned = (*shape[:-2], shape[-1], shape[-2])
  codes = jnp.asarray(rng.integers(-7, 8, turned))
  scale = jnp.ones((*turned[:-1], 1))
  return quantized.Quantized.create(codes, scale, bits=4, axis=-1, swapped=True)


VALUES = {
  "float32": lambda rng, shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
  "bfloat16": lambda rng, shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16),
  "int8": lambda rng, shape: _int(rng, shape, 8),
  "int4": lambda rng, shape: _int(rng, shape, 4),
  "int3": lambda rng, shape: _int(rng, shape, 3),
  "int8 with zero points": lambda rng, shape: _int(rng, shape, 8, zero=True),
  "nf4": _nf4,
  "int4 held swapped": _swapped,
}


@pytest.mark.parametrize("layout", places.LAYOUTS)
@pytest.mark.parametrize("name", VALUES)
def test_it_is_the_masked_weight_bit_for_bit(rng, name, layout):
  for shape, density in [((6, 20), 0.5), ((2, 3, 8, 13), 0.1)]:
    values, mask = VALUES[name](rng, shape), _mask(rng, shape, density)
    held = masked.Masked.create(values, mask)
    leaf = compressed.Compressed.create(values, mask, layout=layout)
    assert (leaf.shape, leaf.dtype, leaf.layout) == (shape, held.dtype, layout)
    np.testing.assert_array_equal(leaf.mask(), mask)
    got, expected = (np.asarray(part.dense()) for part in (leaf, held))
    assert got.dtype == expected.dtype and got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("layout", places.LAYOUTS)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.9, 1.0])
def test_any_density(rng, density, layout):
  w = jnp.asarray(rng.standard_normal((16, 300)), jnp.float32)
  mask = jnp.asarray(rng.random(w.shape) < density)
  leaf = compressed.Compressed.create(w, mask, layout=layout)
  np.testing.assert_array_equal(leaf.dense(), np.where(mask, w, 0))


def test_csr_is_that_of_the_textbook():
  w = jnp.asarray([[0, 5, 0, 6], [0, 0, 0, 0], [7, 0, 0, 8]], jnp.float32)
  leaf = compressed.Compressed.create(w, w != 0, layout="csr")
  assert leaf.row_ends.tolist() == [2, 2, 4]
  assert leaf.columns.tolist()[:4] == [1, 3, 0, 3]
  assert leaf.values.tolist() == [5, 6, 7, 8, 0, 0, 0, 0]
  bits = compressed.Compressed.create(w, w != 0, layout="bitmap").mask_bits
  assert bits.tolist() == [[0b1010], [0], [0b1001]]


def _formula(layout, shape, most):
  """Bytes of the places of one matrix of which `most` weights are kept."""
  rows, cols = shape
  size = lambda n: 1 if n < 2**8 else 2 if n < 2**16 else 4
  if layout == "bitmap":
    return rows * ((cols + 7) // 8)
  return max(8, (most + 7) // 8 * 8) * size(cols - 1) + rows * size(most)


@pytest.mark.parametrize("shape", [(40, 64), (12, 300), (2, 3, 16, 24)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.2, 0.6])
def test_bytes_are_those_of_the_formula_and_the_smaller_layout_is_taken(
  rng, shape, density
):
  w, mask = VALUES["float32"](rng, shape), jnp.asarray(rng.random(shape) < density)
  # Stacked matrices are as long as the fullest of them.
  most = int(np.asarray(mask).sum(axis=(-1, -2)).max())
  stack = int(np.prod(shape[:-2], dtype=int))
  held = {}
  for layout in places.LAYOUTS:
    leaf = compressed.Compressed.create(w, mask, layout=layout)
    kept = max(8, (most + 7) // 8 * 8)
    held[layout] = stack * (4 * kept + _formula(layout, shape[-2:], most))
    assert leaf.held_bytes() == held[layout]
  chosen = compressed.Compressed.create(w, mask)
  assert chosen.held_bytes() == min(held.values())
  assert chosen.layout == min(held, key=held.get)


@pytest.mark.parametrize(("cols", "bits"), [(256, 8), (257, 16), (65_537, 32)])
def test_where_the_layouts_cross(cols, bits):
  """A bit a weight against 8, 16 or 32 bits a kept one, but for the ends of rows."""
  rows = 64
  total = rows * cols
  choices = [
    places.smallest(rows, cols, count) for count in range(0, total, total // 97)
  ]
  csr = choices.count("csr")
  assert choices == ["csr"] * csr + ["bitmap"] * (len(choices) - csr)
  assert csr / 97 == pytest.approx(1 / bits, abs=0.02)


def test_codes_take_their_bits_and_scales_are_whole(rng):
  values, mask = VALUES["int4"](rng, (64, 32)), jnp.asarray(rng.random((64, 32)) < 0.25)
  leaf = compressed.Compressed.create(values, mask, layout="bitmap")
  kept = (int(mask.sum()) + 7) // 8 * 8
  assert leaf.held_bytes() == kept // 2 + 64 * 32 // 8 + 2 * 32 * 4


@pytest.mark.parametrize("layout", places.LAYOUTS)
def test_refill_puts_other_values_at_the_same_places(rng, layout):
  shape = (2, 8, 24)
  mask = _mask(rng, shape, 0.4)
  first, second = (VALUES["float32"](rng, shape) for _ in range(2))
  leaf = compressed.Compressed.create(first, mask, layout=layout).refill(second)
  np.testing.assert_array_equal(leaf.dense(), np.where(mask, second, 0))
  again = compressed.Compressed.create(second, mask, layout=layout)
  assert jax.tree.structure(leaf) == jax.tree.structure(again)
  np.testing.assert_array_equal(leaf.values, again.values)


def test_bad_input():
  w, mask = jnp.ones((4, 8)), jnp.ones((4, 8), bool)
  with pytest.raises(errors.InputError, match="mask of shape"):
    compressed.Compressed.create(w, mask[:2])
  with pytest.raises(errors.InputError, match=r"unknown layout 'coo'.*bitmap, csr"):
    compressed.Compressed.create(w, mask, layout="coo")
  thin = low_rank.LowRank.create(jnp.ones((4, 2)), jnp.ones((2, 8)))
  with pytest.raises(errors.InputError, match="taken out of a low_rank leaf; arrays"):
    compressed.Compressed.create(thin, mask)
  huge = jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)
  with pytest.raises(errors.InputError, match="more places than 32 bits can count"):
    places.check("csr", huge.shape)
