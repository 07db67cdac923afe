"""Blocks decode as gguf-py decodes them, and unpack and pack without loss."""

import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from effjax.core import errors
from effjax.interop.gguf import blocks, formats

QUANTIZED = [name for name, format in formats.TYPES.items() if not format.is_float]
PROFILE = hypothesis.settings(max_examples=15, deadline=None, derandomize=True)


def random_raw(type: str, *rows: int, num_blocks: int = 3, seed: int = 0) -> np.ndarray:
  """Any bytes: scales that are infinite or NaN too."""
  size = num_blocks * formats.TYPES[type].block_bytes
  return np.random.default_rng(seed).integers(0, 256, (*rows, size), np.uint8)


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
  """Equal bit for bit, but for which NaN it is: that is the processor's choice."""
  is_nan = np.isnan(ours)
  bits = [np.where(is_nan, 0, x.view(np.uint32)) for x in (ours, theirs)]
  return np.array_equal(is_nan, np.isnan(theirs)) and np.array_equal(*bits)


@pytest.mark.oracle
@pytest.mark.parametrize("type", formats.TYPES)
def test_decode_equals_gguf(type):
  gguf = pytest.importorskip("gguf")
  raw = random_raw(type, 5, 40)
  ours = blocks.decode(raw, type)
  with np.errstate(all="ignore"):
    theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[type])
  assert ours.dtype == np.float32
  assert ours.shape == (5, 40, 3 * formats.TYPES[type].block_size)
  assert same_bits(ours, theirs)
  assert np.isfinite(ours).mean() > 0.5


@pytest.mark.oracle
def test_sizes_equal_gguf():
  gguf = pytest.importorskip("gguf")
  for name, format in formats.ALL_TYPES.items():
    theirs = gguf.GGMLQuantizationType[name]
    assert theirs.value == format.number
    assert gguf.GGML_QUANT_SIZES[theirs] == (format.block_size, format.block_bytes)
  assert {t.name for t in gguf.GGML_QUANT_SIZES} == formats.ALL_TYPES.keys()


@pytest.mark.parametrize("type", formats.TYPES)
def test_fields_round_trip_on_any_bytes(type):
  num_bytes = formats.TYPES[type].block_bytes

  @PROFILE
  @hypothesis.given(
    st.integers(0, 3).flatmap(
      lambda n: hnp.arrays(np.uint8, (2, n * num_bytes), elements=st.integers(0, 255))
    )
  )
  def check(raw):
    back = blocks.from_fields(blocks.fields(raw, type), type)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, raw)

  check()
  raw = random_raw(type, 2, 3, num_blocks=50)
  back = blocks.from_fields(blocks.fields(raw, type), type)
  np.testing.assert_array_equal(back, raw)


@pytest.mark.parametrize("type", QUANTIZED)
def test_fields_are_what_the_value_is_made_of(type):
  format = formats.TYPES[type]
  raw = random_raw(type, 4, seed=1)
  held = blocks.fields(raw, type)
  low, high = format.code_range
  assert held.codes.min() == low and held.codes.max() == high
  assert held.codes.shape == (4, 3 * format.block_size)
  assert held.scales.shape == (4, 3) and held.scales.dtype == np.float16
  spread = lambda x: np.repeat(
    x.astype(np.float64), held.codes.shape[1] // x.shape[1], 1
  )
  with np.errstate(all="ignore"):
    value = spread(held.scales) * held.codes
    if held.sub_scales is not None:
      assert held.sub_scales.shape == (4, held.codes.shape[1] // format.sub_block)
      value = value * spread(held.sub_scales)
    if held.sub_mins is not None:
      value = value - spread(held.mins) * spread(held.sub_mins)
    elif held.mins is not None:
      value = value + spread(held.mins)
  decoded = blocks.decode(raw, type)
  finite = np.isfinite(decoded)
  bound = 1e-5 * max(1, np.abs(value[finite]).max())
  assert finite.any() and np.abs(decoded - value)[finite].max() <= bound


def test_layout_of_a_q4_0_block():
  nibbles = np.arange(16, dtype=np.uint8)
  raw = np.concatenate(
    [np.float16([0.5]).view(np.uint8), nibbles | (15 - nibbles) << 4]
  )
  held = blocks.fields(raw, "Q4_0")
  codes = [*range(-8, 8), *range(7, -9, -1)]
  assert held.scales.tolist() == [0.5] and held.codes.tolist() == codes
  assert blocks.decode(raw, "Q4_0").tolist() == [code / 2 for code in codes]


def test_layout_of_6_bit_pairs():
  subs = np.arange(8, dtype=np.uint8)
  held = blocks.Fields(
    codes=np.zeros(256, np.uint8),
    scales=np.float16([1]),
    mins=np.float16([1]),
    sub_scales=subs + 40,
    sub_mins=63 - subs,
  )
  raw = blocks.from_fields(held, "Q4_K")
  pairs = raw[4:16]
  for j in range(4):
    assert pairs[j] & 63 == 40 + j and pairs[j + 4] & 63 == 63 - j
    assert (pairs[j + 8] & 15) | pairs[j] >> 6 << 4 == 44 + j
    assert pairs[j + 8] >> 4 | pairs[j + 4] >> 6 << 4 == 59 - j


def test_layout_of_6_bit_sub_scales():
  subs = np.random.default_rng(0).integers(-32, 32, 16).astype(np.int8)
  held = blocks.Fields(
    codes=np.full(256, -4, np.int8), scales=np.float16([1]), sub_scales=subs
  )
  raw = blocks.from_fields(held, "Q3_K")
  assert not raw[:96].any()
  for j, byte in enumerate(raw[96:104]):
    assert byte & 15 == subs[j] + 32 & 15 and byte >> 4 == subs[j + 8] + 32 & 15
  for j in range(16):
    assert raw[104 + j % 4] >> 2 * (j // 4) & 3 == subs[j] + 32 >> 4


@pytest.mark.parametrize("type", formats.TYPES)
def test_rows_do_not_depend_on_each_other(type):
  raw = random_raw(type, 2, 3, seed=2)
  whole = blocks.decode(raw, type)
  assert same_bits(whole[1, 2].copy(), blocks.decode(raw[1, 2], type))
  assert same_bits(whole[:, 1].copy(), blocks.decode(raw[:, 1], type))
  # Bytes of a map need not start where a float may.
  odd = np.empty(raw.size + 1, np.uint8)[1:].reshape(raw.shape)
  odd[...] = raw
  assert same_bits(whole, blocks.decode(odd, type))


def test_bits_per_weight():
  bits = {name: format.bits_per_weight for name, format in formats.TYPES.items()}
  assert bits == {
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "Q4_0": 4.5,
    "Q4_1": 5,
    "Q5_0": 5.5,
    "Q5_1": 6,
    "Q8_0": 8.5,
    "Q2_K": 2.625,
    "Q3_K": 3.4375,
    "Q4_K": 4.5,
    "Q5_K": 5.5,
    "Q6_K": 6.5625,
  }


def test_refuses_bytes_with_one_line():
  with pytest.raises(errors.InputError, match="'Q4_k'; did you mean 'Q4_K'.*Q8_0"):
    blocks.decode(np.zeros(18, np.uint8), "Q4_k")
  with pytest.raises(errors.InputError, match=r"blocks of 18 bytes .* shape \(2, 20\)"):
    blocks.decode(np.zeros((2, 20), np.uint8), "Q4_0")
  with pytest.raises(errors.InputError, match="in uint8; got int8"):
    blocks.decode(np.zeros(18, np.int8), "Q4_0")


def test_refuses_fields_with_one_line():
  def refused(type, message, **changes):
    held = dataclasses.replace(blocks.fields(random_raw(type, 2), type), **changes)
    with pytest.raises(errors.InputError, match=message) as caught:
      blocks.from_fields(held, type)
    return "\n" not in str(caught.value)

  codes = lambda value, dtype, size=96: np.full((2, size), value, dtype)
  assert refused("Q4_0", "codes must be in -8 to 7; got 8", codes=codes(8, np.int8))
  assert refused("Q5_1", "codes must be in 0 to 31", codes=codes(32, np.uint8))
  assert refused("Q4_0", "codes must be int8 .* got uint8", codes=codes(1, np.uint8))
  assert refused("Q4_0", "not whole blocks of 32", codes=codes(1, np.int8, 40))
  assert refused("Q4_1", "mins must be float16 .* they are missing", mins=None)
  assert refused("Q8_0", "has no mins", mins=np.zeros((2, 3), np.float16))
  assert refused("Q8_0", r"shape \(2, 3\); got", scales=np.zeros((2, 1), np.float16))
  assert refused("Q8_0", "got float32", scales=np.zeros((2, 3), np.float32))
  assert refused(
    "Q4_K", "sub_scales must be in 0 to 63", sub_scales=np.full((2, 24), 64, np.uint8)
  )
  assert refused("F32", "codes must be float32", codes=np.zeros(3))
