"""Packing is exact, laid out as said, and takes the bytes it says."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effjax.core import errors
from effjax.ops.matmul import packing

SHAPES = st.sampled_from([(1, 1), (7, 5), (2, 9, 16)])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
  ("bits", "shape", "axis"),
  [
    (1, (9, 3), -2),
    (2, (8, 3), -2),
    (3, (2, 9, 3), -2),
    (4, (7, 5), -1),
    (5, (2, 11, 3), -2),
    (6, (8, 2), 0),
    (8, (1, 1), -2),
  ],
)
def test_round_trip(bits, shape, axis, signed):
  low = -(2 ** (bits - 1)) if signed else 0
  dtype, size = np.int8 if signed else np.uint8, shape[axis]
  pack = jax.jit(lambda codes: packing.pack_bits(codes, bits, axis))
  unpack = jax.jit(
    lambda packed: packing.unpack_bits(packed, bits, size, signed=signed, axis=axis)
  )
  elements = st.integers(low, low + 2**bits - 1)

  @hypothesis.settings(max_examples=20, deadline=None)
  @hypothesis.given(hnp.arrays(dtype, shape, elements=elements))
  def check(codes):
    packed = pack(jnp.asarray(codes))
    assert packed.dtype == jnp.uint8
    assert packed.shape[axis] == packing.packed_size(size, bits)
    back = unpack(packed)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, codes)

  check()


def test_layout_of_four_bits():
  codes = jnp.asarray([[1, -1], [2, -8], [7, 0], [-3, 5]], jnp.int8)
  expected = [[0x21, 0x8F], [0xD7, 0x50]]
  np.testing.assert_array_equal(packing.pack_int4(codes), np.array(expected))
  back = packing.unpack_int4(packing.pack_int4(codes), 4, signed=True)
  np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", packing.BITS)
def test_layout_is_numpy_bit_stream(bits):
  codes = np.random.default_rng(0).integers(0, 2**bits, 24).astype(np.uint8)
  stream = (codes[:, None] >> np.arange(bits)) & 1
  expected = np.packbits(stream.reshape(-1), bitorder="little")
  ours = packing.pack_bits(jnp.asarray(codes)[None], bits, axis=-1)
  np.testing.assert_array_equal(ours[0], expected)


@pytest.mark.parametrize(
  ("bits", "size", "num_bytes"),
  [(4, 5, 3), (3, 8, 3), (3, 9, 6), (5, 9, 10), (2, 5, 2), (8, 5, 5)],
)
def test_packed_size(bits, size, num_bytes):
  assert packing.packed_size(size, bits) == num_bytes


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(hnp.arrays(bool, SHAPES))
def test_masks_round_trip(mask):
  packed = packing.pack_mask(jnp.asarray(mask))
  assert packed.dtype == jnp.uint8
  assert packed.shape == (*mask.shape[:-1], -(-mask.shape[-1] // 8))
  np.testing.assert_array_equal(packed, np.packbits(mask, -1, bitorder="little"))
  np.testing.assert_array_equal(packing.unpack_mask(packed, mask.shape[-1]), mask)


def test_traceable_and_under_vmap():
  codes = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (3, 6, 4)), jnp.int8)
  trip = lambda c: packing.unpack_int4(packing.pack_int4(c), 6, signed=True)
  np.testing.assert_array_equal(jax.jit(jax.vmap(trip))(codes), codes)


def test_refuses_with_one_line():
  packed = jnp.zeros((3, 2), jnp.uint8)
  with pytest.raises(errors.InputError, match="7 bits cannot be packed"):
    packing.pack_bits(packed, 7)
  with pytest.raises(errors.InputError, match="8 codes of 4 bits take 4 uint8 entries"):
    packing.unpack_int4(packed, 8, signed=True)
  with pytest.raises(errors.InputError, match="mask of 20 columns takes 3"):
    packing.unpack_mask(packed, 20)
