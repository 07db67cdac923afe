"""The tensor types of GGUF as data: sizes, and how the bytes of a block are laid out.

A row is cut into blocks of `block_size` elements, each stored in `block_bytes` bytes.
The value of an element is, in the fields' names,

    scales * codes                                  Q4_0, Q5_0, Q8_0
    scales * codes + mins                           Q4_1, Q5_1
    scales * sub_scales * codes - mins * sub_mins   Q2_K, Q4_K, Q5_K
    scales * sub_scales * codes                     Q3_K, Q6_K

with one float16 scale (and min) a block, and in the K-quants one integer sub-scale
(and sub-min) for every `sub_block` elements. Source: ggml-common.h of llama.cpp.
"""

import dataclasses
from collections.abc import Sequence

from effjax.core import errors
from effjax.core.config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
  """A run of bytes in a block, and the field it holds.

  Attributes:
    field: "scales" or "mins" (one float16), "codes" (some bits of every code),
      "sub_scales" (signed) or "sub_pairs" (sub-scales and sub-mins).
    num_bytes: size in the block.
    bits: of each code, sub-scale or sub-min.
    run: how many bytes on the bits of one byte move before the next group of bytes
      starts: element `run * p + b` has place p of byte b.
    shift: where these bits stand in the code.
  """

  field: str
  num_bytes: int = 2
  bits: int = 16
  run: int = 1
  shift: int = 0


_SUBS = ("sub_scales", "sub_pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """One tensor type.

  Attributes:
    name: as llama.cpp writes it.
    number: in the file.
    block_size: elements a block.
    block_bytes: bytes a block.
    parts: layout of a block, in order; empty if effjax only carries the bytes.
    is_float: whether an element is a plain float.
    signed: whether codes are read as int8 (minus `offset`), else as uint8.
    offset: what is stored for code 0 of a signed type with an offset.
    sub_block: elements that share a sub-scale; 0 without sub-scales.
  """

  name: str
  number: int
  block_size: int
  block_bytes: int
  parts: tuple[Part, ...] = ()
  is_float: bool = False
  signed: bool = False
  offset: int = 0
  sub_block: int = 0

  @property
  def bits_per_weight(self) -> float:
    return 8 * self.block_bytes / self.block_size

  @property
  def code_bits(self) -> int:
    """Bits of a code, all parts together."""
    return sum(part.bits for part in self.parts if part.field == "codes")

  @property
  def code_range(self) -> tuple[int, int]:
    """The least and the greatest code."""
    size = 2**self.code_bits
    if not self.signed:
      return 0, size - 1
    low = -(self.offset or size // 2)
    return low, low + size - 1

  @property
  def has_mins(self) -> bool:
    return any(part.field == "mins" for part in self.parts)

  @property
  def sub_bits(self) -> int:
    """Bits of a sub-scale; 0 without."""
    return next((part.bits for part in self.parts if part.field in _SUBS), 0)

  @property
  def sub_range(self) -> tuple[int, int]:
    """The least and the greatest sub-scale, and sub-min if there are some."""
    size = 2**self.sub_bits
    return (-(size // 2), size // 2 - 1) if self.signed else (0, size - 1)


def _codes(num_bytes: int, bits: int, run: int, shift: int = 0) -> Part:
  return Part(field="codes", num_bytes=num_bytes, bits=bits, run=run, shift=shift)


def _float(name: str, number: int, num_bytes: int) -> Format:
  return Format(
    name=name, number=number, block_size=1, block_bytes=num_bytes, is_float=True
  )


def _quantized(name: str, number: int, parts: tuple[Part, ...], **more: int) -> Format:
  """A format whose sizes follow from its parts: each code has one lowest bit."""
  lowest = next(p for p in parts if p.field == "codes" and p.shift == 0)
  return Format(
    name=name,
    number=number,
    block_size=lowest.num_bytes * 8 // lowest.bits,
    block_bytes=sum(part.num_bytes for part in parts),
    parts=parts,
    **more,
  )


_SCALE = Part(field="scales")
_MIN = Part(field="mins")
_PAIRS = Part(field="sub_pairs", num_bytes=12, bits=6)
_SMALL_PAIRS = Part(field="sub_pairs", num_bytes=16, bits=4)
_SUB_SCALES = Part(field="sub_scales", num_bytes=16, bits=8)
_SMALL_SUB_SCALES = Part(field="sub_scales", num_bytes=12, bits=6)
_FOUR = _codes(16, 4, run=16)
_FIFTH = _codes(4, 1, run=1, shift=4)
_K_TWO = _codes(64, 2, run=32)
_K_THIRD = _codes(32, 1, run=32, shift=2)
_K_FOUR = _codes(128, 4, run=32)
_K_FIFTH = _codes(32, 1, run=32, shift=4)
_K_SIX = (_codes(128, 4, run=64), _codes(64, 2, run=32, shift=4))

_KNOWN = (
  _float("F32", 0, 4),
  _float("F16", 1, 2),
  _float("BF16", 30, 2),
  _quantized("Q4_0", 2, (_SCALE, _FOUR), signed=True, offset=8),
  _quantized("Q4_1", 3, (_SCALE, _MIN, _FOUR)),
  _quantized("Q5_0", 6, (_SCALE, _FIFTH, _FOUR), signed=True, offset=16),
  _quantized("Q5_1", 7, (_SCALE, _MIN, _FIFTH, _FOUR)),
  _quantized("Q8_0", 8, (_SCALE, _codes(32, 8, run=32)), signed=True),
  _quantized("Q2_K", 10, (_SMALL_PAIRS, _K_TWO, _SCALE, _MIN), sub_block=16),
  _quantized(
    "Q3_K",
    11,
    (_K_THIRD, _K_TWO, _SMALL_SUB_SCALES, _SCALE),
    signed=True,
    offset=4,
    sub_block=16,
  ),
  _quantized("Q4_K", 12, (_SCALE, _MIN, _PAIRS, _K_FOUR), sub_block=32),
  _quantized("Q5_K", 13, (_SCALE, _MIN, _PAIRS, _K_FIFTH, _K_FOUR), sub_block=32),
  _quantized(
    "Q6_K", 14, (*_K_SIX, _SUB_SCALES, _SCALE), signed=True, offset=32, sub_block=16
  ),
)
# Types whose bytes are carried but not understood: number, block size, block bytes.
_CARRIED = {
  "Q8_1": (9, 32, 40),
  "Q8_K": (15, 256, 292),
  "IQ2_XXS": (16, 256, 66),
  "IQ2_XS": (17, 256, 74),
  "IQ3_XXS": (18, 256, 98),
  "IQ1_S": (19, 256, 50),
  "IQ4_NL": (20, 32, 18),
  "IQ3_S": (21, 256, 110),
  "IQ2_S": (22, 256, 82),
  "IQ4_XS": (23, 256, 136),
  "I8": (24, 1, 1),
  "I16": (25, 1, 2),
  "I32": (26, 1, 4),
  "I64": (27, 1, 8),
  "F64": (28, 1, 8),
  "IQ1_M": (29, 256, 56),
  "TQ1_0": (34, 256, 54),
  "TQ2_0": (35, 256, 66),
  "MXFP4": (39, 32, 17),
  "NVFP4": (40, 64, 36),
  "Q1_0": (41, 128, 18),
}

# What effjax encodes and decodes.
TYPES = {format.name: format for format in _KNOWN}
# What a file may hold.
ALL_TYPES = TYPES | {
  name: Format(name=name, number=number, block_size=size, block_bytes=num_bytes)
  for name, (number, size, num_bytes) in _CARRIED.items()
}
BY_NUMBER = {format.number: format for format in ALL_TYPES.values()}


def find(name: str) -> Format:
  """The format that effjax encodes and decodes under `name`."""
  if name not in TYPES:
    raise errors.unknown("GGUF tensor type", name, TYPES)
  return TYPES[name]


def row_bytes(format: Format, size: int) -> int:
  """Bytes that a row of `size` elements takes.

  Raises:
    InputError: a row is whole blocks only.
  """
  require(
    size % format.block_size == 0,
    f"a row of {size} elements is not whole blocks of {format.block_size} "
    f"({format.name})",
  )
  return size // format.block_size * format.block_bytes


def raw_shape(format: Format, shape: Sequence[int]) -> tuple[int, ...]:
  """Shape of a tensor's bytes, `[rows..., bytes per row]`; a scalar is one row."""
  return (*shape[:-1], row_bytes(format, shape[-1] if shape else 1))
