"""From float32 values to the bytes of a GGUF tensor, by ggml's reference quantizers.

F16, BF16, Q8_0 and the 4- and 5-bit types of one scale a block round to the nearest
code of a scale taken from the extremes; the K-quants search their scales (`k_quants`).
All give the bytes that ggml_quantize_chunk gives for the same row without an importance
matrix, except the sign of a zero scale in a block that holds -0.0 and nothing else but
zeros: there it is gguf-py's.
"""

import numpy as np

from effjax.core.config import require
from effjax.interop.gguf import blocks, formats, k_quants
from effjax.interop.gguf.blocks import Fields
from effjax.interop.gguf.formats import Format

# Elements handled at a time: the search's float32 arrays then stay in the cache.
_CHUNK = 2**18
# Beyond any value that a float16 scale can reach with any type's codes (65504 * 128 *
# 32), and small enough that its square does not overflow.
_LARGEST = 2.0**30


def encode(x: np.ndarray, type: str) -> np.ndarray:
  """Encodes rows of values.

  Args:
    x: float32 [..., n]; n is a multiple of the type's block size.
    type: one of `formats.TYPES`.

  Returns:
    uint8 [..., bytes per row].

  Raises:
    InputError: unknown type, not float32, rows that are not whole blocks, or values
      that the type cannot hold: not finite (quantized types), or too large.
  """
  format = formats.find(type)
  require(
    x.dtype == np.float32 and x.ndim > 0,
    f"{type} encodes float32 rows; got {x.dtype} of shape {x.shape}",
  )
  shape = formats.raw_shape(format, x.shape)
  x = np.ascontiguousarray(x)
  if format.is_float:
    return _encode_float(x, type)
  raw = np.empty((x.size // format.block_size, format.block_bytes), np.uint8)
  rows = x.reshape(len(raw), format.block_size)
  step = _CHUNK // format.block_size
  for start in range(0, len(raw), step):
    part = slice(start, start + step)
    raw[part] = _encode_blocks(rows[part], format)
  return raw.reshape(shape)


def _encode_float(x: np.ndarray, type: str) -> np.ndarray:
  if type == "F32":
    return x.view(np.uint8)
  if type == "F16":
    with np.errstate(over="ignore", under="ignore"):
      half = x.astype(np.float16)
    require(
      not (np.isinf(half) & np.isfinite(x)).any(),
      "F16 holds values up to 65504; use BF16 or F32",
    )
    return half.view(np.uint8)
  bits = x.view(np.uint32)
  is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
  # To nearest, ties to even; a NaN keeps its sign and is made quiet.
  rounded = (bits.astype(np.uint64) + (0x7FFF + (bits >> 16 & 1))) >> 16
  half = np.where(is_nan, bits >> 16 | 64, rounded).astype(np.uint16)
  return half.view(np.uint8)


def _encode_blocks(x_NS: np.ndarray, format: Format) -> np.ndarray:
  """uint8 [blocks, bytes] from float32 [blocks, block size]."""
  require(
    bool(np.isfinite(x_NS).all()),
    f"{format.name} cannot hold values that are not finite",
  )
  with np.errstate(all="ignore"):
    if format.sub_block:
      quantizer = k_quants.affine if format.has_mins else k_quants.symmetric
    else:
      quantizer = _affine if format.has_mins else _symmetric
    held = quantizer(x_NS, format)
  finite = np.isfinite(held.scales).all() and np.abs(x_NS).max() <= _LARGEST
  if held.mins is not None:
    finite = finite and np.isfinite(held.mins).all()
  require(
    bool(finite),
    f"{format.name} keeps scales in float16, which {np.abs(x_NS).max():.3g} overflows",
  )
  return blocks.from_fields(held, format.name)


def _symmetric(x_NS: np.ndarray, format: Format) -> Fields:
  """One scale a block, which gives the element of largest size the lowest code.

  Q8_0 has codes of both signs up to 127 and rounds halves away from zero.
  """
  low, high = format.code_range
  if format.offset:
    place = np.abs(x_NS).argmax(axis=-1, keepdims=True)
    scale = np.take_along_axis(x_NS, place, axis=-1) / np.float32(low)
    ratio = x_NS * _inverse(scale)
    codes = np.trunc(ratio + np.float32(0.5 - low)) + np.float32(low)
  else:
    scale = np.abs(x_NS).max(axis=-1, keepdims=True) / np.float32(high)
    ratio = x_NS * _inverse(scale)
    whole = np.floor(np.abs(ratio))
    codes = np.copysign(whole + np.floor(2 * (np.abs(ratio) - whole)), ratio)
  codes = np.clip(codes, low, high).astype(np.int8)
  return Fields(codes=codes, scales=scale.astype(np.float16))


def _affine(x_NS: np.ndarray, format: Format) -> Fields:
  """A scale and a min a block, which span it from its least to its greatest value."""
  _, high = format.code_range
  greatest = x_NS.max(axis=-1, keepdims=True)
  least = x_NS.min(axis=-1, keepdims=True)
  scale = (greatest - least) / np.float32(high)
  ratio = (x_NS - least) * _inverse(scale)
  codes = np.clip(np.trunc(ratio + np.float32(0.5)), 0, high).astype(np.uint8)
  halves = [x.astype(np.float16) for x in (scale, least)]
  return Fields(codes=codes, scales=halves[0], mins=halves[1])


def _inverse(scale: np.ndarray) -> np.ndarray:
  """1 / scale, and 0 where that is not finite: a float16 scale is zero there."""
  inverse = 1 / scale
  return np.where(np.isfinite(inverse), inverse, np.float32(0))
