"""Between the bytes of a quantized GGUF tensor and a `Quantized` leaf, without loss.

| type      | bits | group | scales                    | offsets                      |
|-----------|------|-------|---------------------------|------------------------------|
| Q8_0      | 8    | 32    | float16                   |                              |
| Q4_0 Q5_0 | 4, 5 | 32    | float16                   |                              |
| Q4_1 Q5_1 | 4, 5 | 32    | float16                   | float16                      |
| Q4_K Q5_K | 4, 5 | 32    | 6 bits, float16 for 8     | 6 bits, float16 for 8        |
| Q2_K      | 2    | 16    | 4 bits, float16 for 16    | 4 bits, float16 for 16       |
| Q3_K      | 3    | 16    | 6 bits, float16 for 16    |                              |
| Q6_K      | 6    | 16    | int8, float16 for 16      |                              |

Codes are signed where there is no offset. A leaf takes exactly the bytes of the file.
The minima that K-quants subtract are held as offsets that are added, their float16
scales with the sign turned; turning it is exact, whatever the bits are.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from effjax.core import errors
from effjax.core.config import require
from effjax.interop.gguf import blocks, formats
from effjax.interop.gguf.formats import Format
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import quantized, two_level


class _Structure(NamedTuple):
  """What tells the types apart, of a format and of a leaf."""

  bits: int
  group: int
  has_offset: bool
  # Bits and sign of scales and offsets, and how many share a float16; or _FLOAT16.
  scales: tuple[int, bool, int]


# Scales that are float16 themselves.
_FLOAT16 = (16, True, 1)


def to_leaf(
  raw: np.ndarray, type: str, shape: Sequence[int], *, embedding: bool
) -> quantized.Quantized:
  """The leaf that holds a tensor as it is in the file.

  Args:
    raw: uint8, the bytes of the tensor in any shape.
    type: a quantized type of `formats.TYPES`.
    shape: of the tensor in NumPy's order, the contiguous axis last: `[*stack, out, in]`
      of a matrix, `[V, D]` of an embedding.
    embedding: keep the logical shape `[V, D]`. Otherwise the leaf is a matrix
      `[*stack, in, out]`, held swapped: as the tensor lies.

  Raises:
    InputError: a type that is unknown or not quantized, less than two dimensions, or
      bytes that are not those of such a tensor.
  """
  format = _find(type)
  shape = tuple(shape)
  require(len(shape) >= 2, f"a {type} tensor of shape {shape} is no matrix")
  wanted = formats.raw_shape(format, shape)
  require(
    raw.dtype == np.uint8 and raw.size == math.prod(wanted),
    f"a {type} tensor of shape {shape} takes {math.prod(wanted)} bytes in uint8; got "
    f"{raw.size} of {raw.dtype}",
  )
  held = blocks.fields(raw.reshape(wanted), type)
  mins = held.mins if held.sub_mins is None else np.negative(held.mins)
  return quantized.Quantized.create(
    jnp.asarray(held.codes),
    _part(held.scales, held.sub_scales, format),
    offset=_part(mins, held.sub_mins, format),
    bits=format.code_bits,
    axis=-1,
    swapped=not embedding,
  )


def to_raw(leaf: quantized.Quantized, type: str) -> np.ndarray:
  """The exact inverse of `to_leaf`, and of how any other leaf of `type` is held.

  Args:
    leaf: concrete arrays; a matrix `[*stack, in, out]`, however it is held, or an
      embedding `[V, D]`.
    type: what `type_of` says of it.

  Returns:
    uint8 `[*stack, out, bytes per row]`, or `[V, bytes per row]`.

  Raises:
    InputError: the leaf is not one that `type` holds exactly.
  """
  _find(type)
  found = type_of(leaf)
  require(
    found == type,
    f"{type} does not hold this leaf exactly; "
    + (f"it is {found}" if found else "no GGUF type does"),
  )
  as_rows = np.asarray
  if leaf.axis == -2:
    as_rows = lambda part: np.swapaxes(np.asarray(part), -1, -2)
  scales, sub_scales = _levels(leaf.scale)
  mins, sub_mins = _levels(leaf.offset)
  held = {
    "codes": leaf.unpacked(),
    "scales": scales,
    "mins": mins,
    "sub_scales": sub_scales,
    "sub_mins": sub_mins,
  }
  held = {name: as_rows(part) for name, part in held.items() if part is not None}
  if sub_mins is not None:
    held["mins"] = np.negative(held["mins"])
  return blocks.from_fields(blocks.Fields(**held), type)


def type_of(leaf: Any) -> str | None:
  """The GGUF type that holds every code, scale and offset of a leaf as they are.

  That needs the bits, the group and the kinds of scales of the table above, scales and
  offsets in float16, no zero points, and rows of whole blocks. int8 codes may be -128,
  which ggml reads though it does not write it. Codes of a narrow symmetric grid fit as
  well. The dtype that `dense()` rounds to is not kept.

  Args:
    leaf: any parameter, also one of jax.ShapeDtypeStruct.

  Returns:
    The name, or None if there is no such type.
  """
  if not isinstance(leaf, quantized.Quantized) or leaf.zero is not None:
    return None
  if not leaf.num_groups or leaf.size % leaf.num_groups:
    return None
  has_offset = leaf.offset is not None
  scales = _kind_of(leaf.scale)
  if scales is None or (has_offset and _kind_of(leaf.offset) != scales):
    return None
  group = leaf.size // leaf.num_groups
  return _TYPES.get(_Structure(leaf.bits, group, has_offset, scales))


def _kind_of(part: Any) -> tuple[int, bool, int] | None:
  """`_Structure.scales` of a leaf's scales or offsets; None for any other kind."""
  if isinstance(part, two_level.TwoLevel):
    kind = (part.bits, bool(part.signed), part.group)
    return kind if part.scale.dtype == jnp.float16 else None
  is_plain = not leaf_lib.is_leaf_kind(part) and part.dtype == jnp.float16
  return _FLOAT16 if is_plain else None


def _structure(format: Format) -> _Structure:
  scales = _FLOAT16
  if format.sub_block:
    shared = format.block_size // format.sub_block
    scales = (format.sub_bits, format.signed, shared)
  group = format.sub_block or format.block_size
  return _Structure(format.code_bits, group, format.has_mins, scales)


QUANTIZED = tuple(name for name, f in formats.TYPES.items() if not f.is_float)
_TYPES = {_structure(formats.TYPES[name]): name for name in QUANTIZED}


def _find(type: str) -> Format:
  if type not in QUANTIZED:
    raise errors.unknown("quantized GGUF tensor type", type, QUANTIZED)
  return formats.TYPES[type]


def _part(halves: np.ndarray | None, codes: np.ndarray | None, format: Format) -> Any:
  """Scales or offsets of a leaf: plain, in two levels, or None."""
  if halves is None:
    return None
  if codes is None:
    return jnp.asarray(halves)
  return two_level.TwoLevel.create(
    jnp.asarray(codes),
    jnp.asarray(halves),
    bits=_structure(format).scales[0],
    signed=format.signed,
    axis=-1,
  )


def _levels(part: Any) -> tuple[Any, Any]:
  """The inverse of `_part`: float16 scales, and their codes or None."""
  if isinstance(part, two_level.TwoLevel):
    return part.scale, part.unpacked()
  return part, None
