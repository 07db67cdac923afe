"""Between the bytes of a GGUF tensor, its unpacked fields and its values.

`fields` and `from_fields` are exact inverses on every byte pattern, so a tensor can be
held unpacked and be written back as it was. `decode` computes in float32 in the order
of gguf-py (ggml's order too), so that all three agree bit for bit.
"""

import dataclasses

import numpy as np

from effjax.core.config import require
from effjax.interop.gguf import formats
from effjax.interop.gguf.formats import Format, Part

# BF16 has no NumPy type: its bits stand in uint16.
_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
  """A tensor unpacked, elements in order along the last axis of n.

  Attributes:
    codes: [..., n]; int8 with the offset taken off (Q4_0, Q5_0, Q8_0, Q3_K, Q6_K),
      uint8 (Q4_1, Q5_1, Q2_K, Q4_K, Q5_K), the floats themselves (F32, F16) or bits in
      uint16 (BF16).
    scales: float16 [..., n / block_size]; None for floats.
    mins: float16 [..., n / block_size], or None.
    sub_scales: [..., n / sub_block], uint8 (Q2_K, Q4_K, Q5_K) or int8 (Q3_K, Q6_K) in
      the format's `sub_range`, else None.
    sub_mins: uint8 [..., n / sub_block] (Q2_K, Q4_K, Q5_K), else None.
  """

  codes: np.ndarray
  scales: np.ndarray | None = None
  mins: np.ndarray | None = None
  sub_scales: np.ndarray | None = None
  sub_mins: np.ndarray | None = None


def fields(raw: np.ndarray, type: str) -> Fields:
  """Unpacks blocks.

  Args:
    raw: uint8 [..., bytes per row].
    type: one of `formats.TYPES`.

  Raises:
    InputError: unknown type, or rows that are not whole blocks of bytes.
  """
  format = formats.find(type)
  require(
    raw.dtype == np.uint8 and raw.ndim > 0 and raw.shape[-1] % format.block_bytes == 0,
    f"{type} rows are whole blocks of {format.block_bytes} bytes in uint8; got "
    f"{raw.dtype} of shape {raw.shape}",
  )
  raw = np.ascontiguousarray(raw)
  if format.is_float:
    return Fields(codes=raw.view(_FLOATS[type]))
  blocks = raw.reshape(raw.size // format.block_bytes, format.block_bytes)
  unpacked = {}
  start = 0
  for part in format.parts:
    held = np.ascontiguousarray(blocks[:, start : start + part.num_bytes])
    start += part.num_bytes
    for name, values in _unpack(part, held).items():
      unpacked[name] = unpacked[name] | values if name in unpacked else values
  if format.signed:
    unpacked["codes"] = unpacked["codes"].view(np.int8)
    if format.offset:
      unpacked["codes"] -= np.int8(format.offset)
  *rows, num_bytes = raw.shape
  num_blocks = num_bytes // format.block_bytes
  return Fields(
    **{k: v.reshape(*rows, num_blocks * v.shape[-1]) for k, v in unpacked.items()}
  )


def from_fields(held: Fields, type: str) -> np.ndarray:
  """The exact inverse of `fields`: uint8 [..., bytes per row].

  Raises:
    InputError: unknown type, a field that is missing, of another dtype or shape, or
      outside the type's range.
  """
  format = formats.find(type)
  if format.is_float:
    _check(held.codes, "codes", type, _FLOATS[type], held.codes.shape)
    return np.ascontiguousarray(held.codes).view(np.uint8)
  _check_fields(held, format)
  num_blocks = held.codes.size // format.block_size
  unpacked = {
    name: np.ascontiguousarray(getattr(held, name)).reshape(num_blocks, per_block)
    for name, per_block in _per_block(format).items()
  }
  if format.signed:
    codes = unpacked["codes"] + np.int8(format.offset)
    unpacked["codes"] = codes.view(np.uint8)
  blocks = np.concatenate([_pack(part, unpacked) for part in format.parts], axis=-1)
  return blocks.reshape(formats.raw_shape(format, held.codes.shape))


def decode(raw: np.ndarray, type: str) -> np.ndarray:
  """The values of a tensor: float32 [..., n] from uint8 [..., bytes per row].

  Scales that are not finite give values that are not, without a warning.

  Raises:
    InputError: as `fields`.
  """
  return values(fields(raw, type), type)


def values(held: Fields, type: str) -> np.ndarray:
  """The values of an unpacked tensor: float32 [..., n]."""
  format = formats.find(type)
  if type == "BF16":
    return (held.codes.astype(np.uint32) << 16).view(np.float32)
  if format.is_float:
    return held.codes.astype(np.float32)
  step = format.sub_block or format.block_size
  with np.errstate(all="ignore"):
    scales = _scaled(held.scales, held.sub_scales)
    grouped = held.codes.reshape(*scales.shape, step).astype(np.float32)
    grouped *= scales[..., None]
    if held.mins is not None:
      mins = _scaled(held.mins, held.sub_mins)[..., None]
      grouped = grouped - mins if format.sub_block else grouped + mins
  return grouped.reshape(held.codes.shape)


def _scaled(halves: np.ndarray, sub: np.ndarray | None) -> np.ndarray:
  """float32 scales, one for each integer of `sub` if there are some."""
  scales = halves.astype(np.float32)
  if sub is None:
    return scales
  per_block = sub.size // max(1, scales.size)
  split = sub.reshape(*scales.shape, per_block).astype(np.float32)
  return (scales[..., None] * split).reshape(sub.shape)


def _unpack(part: Part, held: np.ndarray) -> dict[str, np.ndarray]:
  """The fields of one part, [blocks, entries]."""
  if part.field in ("scales", "mins"):
    return {part.field: held.view(np.float16)}
  if part.field == "sub_scales":
    sub = held if part.bits == 8 else _sixes(held)
    return {"sub_scales": sub.view(np.int8)}
  if part.field == "sub_pairs" and part.bits == 4:
    return {"sub_scales": held & 0x0F, "sub_mins": held >> 4}
  if part.field == "sub_pairs":
    # Bytes 0-3 and 4-7: scales and mins of the first four sub-blocks, and above them
    # the two high bits of the last four, whose low bits share bytes 8-11.
    scale, low, shared = (held[:, i : i + 4] for i in (0, 4, 8))
    return {
      "sub_scales": np.concatenate(
        [scale & 0x3F, (shared & 0x0F) | (scale >> 6 << 4)], -1
      ),
      "sub_mins": np.concatenate([low & 0x3F, (shared >> 4) | (low >> 6 << 4)], -1),
    }
  if part.bits == 8:
    return {"codes": held}
  places = np.arange(0, 8, part.bits, dtype=np.uint8)[:, None]
  groups = part.num_bytes // part.run
  bits = held.reshape(len(held), groups, 1, part.run) >> places
  bits &= np.uint8(2**part.bits - 1)
  codes = bits.reshape(len(held), part.num_bytes * len(places))
  return {"codes": codes << np.uint8(part.shift)}


def _pack(part: Part, unpacked: dict[str, np.ndarray]) -> np.ndarray:
  """The inverse of `_unpack`: uint8 [blocks, bytes]."""
  if part.field == "sub_pairs" and part.bits == 4:
    return unpacked["sub_scales"] | unpacked["sub_mins"] << 4
  if part.field == "sub_pairs":
    scale, low = unpacked["sub_scales"], unpacked["sub_mins"]
    first = [x[:, :4] | (x[:, 4:] >> 4 << 6) for x in (scale, low)]
    shared = (scale[:, 4:] & 0x0F) | ((low[:, 4:] & 0x0F) << 4)
    return np.concatenate([*first, shared], -1)
  held = unpacked[part.field]
  if part.field == "sub_scales" and part.bits == 6:
    return _from_sixes(held.view(np.uint8))
  if part.field != "codes" or part.bits == 8:
    return held.view(np.uint8)
  bits = (held >> np.uint8(part.shift)) & np.uint8(2**part.bits - 1)
  places = np.arange(0, 8, part.bits, dtype=np.uint8)[:, None]
  groups = part.num_bytes // part.run
  bits = bits.reshape(len(held), groups, len(places), part.run) << places
  return np.bitwise_or.reduce(bits, axis=2).reshape(len(held), part.num_bytes)


def _sixes(held: np.ndarray) -> np.ndarray:
  """The 16 sub-scales of Q3_K: bytes as int8 has them, from 12 bytes.

  Bytes 0-7 hold the low halves of the first eight and above them of the last eight,
  bytes 8-11 the two high bits of every fourth; 32 is stored for 0.
  """
  low = np.concatenate([held[:, :8] & 0x0F, held[:, :8] >> 4], -1)
  high = [held[:, 8:] >> np.uint8(2 * i) & 0x03 for i in range(4)]
  return (low | np.concatenate(high, -1) << 4) - np.uint8(32)


def _from_sixes(sub: np.ndarray) -> np.ndarray:
  """The inverse of `_sixes`."""
  sub = sub + np.uint8(32)
  low, high = sub & 0x0F, (sub >> 4).reshape(len(sub), 4, 4)
  places = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
  high = np.bitwise_or.reduce(high << places, axis=1)
  return np.concatenate([low[:, :8] | low[:, 8:] << 4, high], -1)


def _per_block(format: Format) -> dict[str, int]:
  """The fields of a quantized format, and how many entries a block has of each."""
  per_block = {"codes": format.block_size, "scales": 1}
  subs = format.block_size // format.sub_block if format.sub_block else 0
  if format.has_mins:
    per_block["mins"] = 1
  if subs:
    per_block["sub_scales"] = subs
  if subs and format.has_mins:
    per_block["sub_mins"] = subs
  return per_block


def _check_fields(held: Fields, format: Format) -> None:
  """Raises InputError unless `held` is what `fields` gives for this format."""
  name, integer = format.name, np.int8 if format.signed else np.uint8
  *rows, size = held.codes.shape
  formats.row_bytes(format, size)
  num_blocks = size // format.block_size
  per_block = _per_block(format)
  for field in (f.name for f in dataclasses.fields(Fields)):
    value = getattr(held, field)
    if field not in per_block:
      require(value is None, f"{name} has no {field}; leave them out")
      continue
    shape = (*rows, num_blocks * per_block[field])
    if field in ("scales", "mins"):
      _check(value, field, name, np.float16, shape)
    else:
      span = format.code_range if field == "codes" else format.sub_range
      _check(value, field, name, integer, shape, span)


def _check(
  value: np.ndarray | None,
  field: str,
  type: str,
  dtype: object,
  shape: tuple[int, ...],
  span: tuple[int, int] | None = None,
) -> None:
  """Raises InputError unless `value` has this dtype, shape and range."""
  wanted = f"{type} {field} must be {np.dtype(dtype)} of shape {shape}"
  require(value is not None, f"{wanted}; they are missing")
  require(
    value.dtype == dtype and value.shape == shape,
    f"{wanted}; got {value.dtype} of shape {value.shape}",
  )
  if span is not None and value.size:
    low, high = int(value.min()), int(value.max())
    require(
      span[0] <= low and high <= span[1],
      f"{type} {field} must be in {span[0]} to {span[1]}; got {low} to {high}",
    )
