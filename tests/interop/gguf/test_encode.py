"""Encoding gives the bytes of gguf-py and of llama.cpp's own quantizers."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from effjax.core import errors
from effjax.interop.gguf import blocks, encode, formats

K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
OTHERS = [name for name in formats.TYPES if name not in K_QUANTS]
# Relative root mean square errors on N(0, 1), measured with llama.cpp.
PUBLISHED = {
  "Q8_0": 0.0053,
  "Q6_K": 0.018,
  "Q5_0": 0.043,
  "Q4_K": 0.071,
  "Q4_1": 0.078,
  "Q4_0": 0.086,
}
PROFILE = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


def samples() -> dict[str, np.ndarray]:
  """Rows of 512 that take every branch of a quantizer."""
  rng = np.random.default_rng(0)
  normal = rng.normal(size=(48, 512))
  ramp = 10.0 ** rng.integers(-9, 3, (48, 32))
  cases = {
    "normal": normal,
    "heavy tails": rng.standard_t(1.5, (48, 512)),
    "positive": np.abs(normal),
    "negative": -np.abs(normal),
    "far from zero": 5 + 0.01 * normal,
    "zeros": np.zeros((2, 512)),
    "constant": np.full((2, 512), -0.37),
    "few values": rng.integers(-3, 4, (48, 512)),
    "sparse": np.where(rng.random((48, 512)) < 0.03, normal, 0),
    "scales apart": normal * np.repeat(ramp, 16, axis=1),
    "small": normal * 1e-6,
    "tiny": normal * 1e-20,
    "large": normal * 1e4,
  }
  return {name: x.astype(np.float32) for name, x in cases.items()}


SAMPLES = samples()


def relative_error(x: np.ndarray, y: np.ndarray) -> float:
  return float(np.sqrt(np.square(x - y).mean() / np.square(x).mean()))


@pytest.mark.oracle
@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("type", OTHERS)
def test_bytes_equal_gguf(type, case):
  gguf = pytest.importorskip("gguf")
  x = SAMPLES[case]
  with np.errstate(all="ignore"):
    theirs = gguf.quantize(x, gguf.GGMLQuantizationType[type]).view(np.uint8)
  ours = encode.encode(x, type)
  assert ours.dtype == np.uint8
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("type", OTHERS)
def test_zeros_of_both_signs_equal_gguf(type):
  gguf = pytest.importorskip("gguf")
  x = np.random.default_rng(0).choice(np.float32([0.0, -0.0]), (8, 256))
  x[0], x[1] = 0.0, -0.0
  with np.errstate(all="ignore"):
    theirs = gguf.quantize(x, gguf.GGMLQuantizationType[type]).view(np.uint8)
  ours = encode.encode(x, type)
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("type", formats.TYPES)
def test_bytes_equal_llama_cpp(ggml_encode, type, case):
  x = SAMPLES[case]
  ours, theirs = encode.encode(x, type), ggml_encode(x, type)
  assert ours.shape == theirs.shape
  np.testing.assert_array_equal(ours, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("type", K_QUANTS)
def test_bytes_equal_llama_cpp_on_any_blocks(ggml_encode, type):
  # A few magnitudes and short lists make ties, flat blocks and zero sub-blocks.
  number = st.floats(-4, 4, width=16) | st.sampled_from([0.0, 1e-3, -1e-7, 1e-18, 300])

  @PROFILE
  @hypothesis.given(st.lists(number, min_size=1, max_size=40), st.integers(0, 2**16))
  def check(numbers, seed):
    x = np.random.default_rng(seed).choice(np.float32(numbers), (8, 256))
    np.testing.assert_array_equal(encode.encode(x, type), ggml_encode(x, type))

  check()


@pytest.mark.oracle
def test_a_real_matrix_over_several_pieces_equals_llama_cpp(ggml_encode):
  x = np.random.default_rng(1).normal(size=(400, 1536)).astype(np.float32)
  for type in K_QUANTS:
    np.testing.assert_array_equal(encode.encode(x, type), ggml_encode(x, type))


@pytest.mark.parametrize("type", PUBLISHED)
def test_error_is_the_published_one(type):
  x = np.random.default_rng(0).normal(size=(256, 1024)).astype(np.float32)
  error = relative_error(x, blocks.decode(encode.encode(x, type), type))
  # Half of the last digit that was published, and the sample's own spread.
  digit = 0.0001 if PUBLISHED[type] < 0.01 else 0.001
  assert abs(error - PUBLISHED[type]) <= digit / 2 + 0.003 * PUBLISHED[type]


@pytest.mark.parametrize("type", K_QUANTS)
def test_search_beats_rounding_between_the_extremes(type):
  format = formats.TYPES[type]
  x = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
  found = blocks.decode(encode.encode(x, type), type)
  sub = x.reshape(-1, format.sub_block)
  low, high = format.code_range
  if format.has_mins:
    least = np.minimum(sub.min(-1, keepdims=True), 0)
    scale = (sub.max(-1, keepdims=True) - least) / high
  else:
    least, scale = 0, np.abs(sub).max(-1, keepdims=True) / high
  plain = np.clip(np.rint((sub - least) / scale), low, high) * scale + least
  # The plain form has exact scales, the format 6 or 8 bits of them.
  assert relative_error(x, found) < relative_error(x, plain.reshape(x.shape))


@pytest.mark.parametrize("type", formats.TYPES)
def test_decoded_values_encode_to_themselves_or_near(type):
  x = SAMPLES["normal"]
  once = blocks.decode(encode.encode(x, type), type)
  twice = blocks.decode(encode.encode(once, type), type)
  assert relative_error(x, once) < {"Q2_K": 0.3, "Q3_K": 0.17}.get(type, 0.1)
  assert relative_error(once, twice) <= relative_error(x, once)


@pytest.mark.parametrize("type", formats.TYPES)
def test_shapes_and_rows(type):
  x = np.random.default_rng(2).normal(size=(2, 3, 256)).astype(np.float32)
  raw = encode.encode(x, type)
  assert raw.shape == (2, 3, formats.row_bytes(formats.TYPES[type], 256))
  np.testing.assert_array_equal(encode.encode(x[1, 2], type), raw[1, 2])
  np.testing.assert_array_equal(encode.encode(x[:, ::2], type), raw[:, ::2])
  assert encode.encode(x[:0], type).shape == (0, *raw.shape[1:])


def test_bf16_rounds_to_even_and_keeps_what_is_not_finite():
  bits = np.array([0x3F808000, 0x3F818000, 0x7F800001, 0xFF800001, 0x7F800000])
  raw = encode.encode(bits.astype(np.uint32).view(np.float32), "BF16")
  expected = [0x3F80, 0x3F82, 0x7FC0, 0xFFC0, 0x7F80]
  assert raw.view(np.uint16).tolist() == expected
  infinite = np.float32([np.inf, -np.inf])
  for type in ("F32", "F16", "BF16"):
    assert blocks.decode(encode.encode(infinite, type), type).tolist() == [
      np.inf,
      -np.inf,
    ]


@pytest.mark.parametrize("type", [t for t in formats.TYPES if t[0] == "Q"])
def test_refuses_what_a_type_cannot_hold(type):
  x = np.ones((1, 256), np.float32)
  for bad in (np.inf, np.nan):
    x[0, 7] = bad
    with pytest.raises(errors.InputError, match=f"{type} cannot hold values that are"):
      encode.encode(x, type)
  for bad in (3e38, -1e20, 2e9):
    x[0, 7] = bad
    with pytest.raises(errors.InputError, match=f"{type} keeps scales in float16"):
      encode.encode(x, type)
  with pytest.raises(errors.InputError, match="300 elements is not whole blocks of"):
    encode.encode(np.ones((2, 300), np.float32), type)


def test_refuses_with_one_line():
  with pytest.raises(errors.InputError, match="values up to 65504; use BF16 or F32"):
    encode.encode(np.float32([1, 7e4]), "F16")
  with pytest.raises(errors.InputError, match="encodes float32 rows; got float64"):
    encode.encode(np.ones(32), "Q4_0")
  with pytest.raises(
    errors.InputError, match="unknown GGUF tensor type 'IQ4_NL'.*Q4_K"
  ):
    encode.encode(np.ones(256, np.float32), "IQ4_NL")
