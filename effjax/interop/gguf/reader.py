"""Reads GGUF files of versions 2 and 3, little-endian, without trusting them.

Layout: magic "GGUF", uint32 version, uint64 number of tensors, uint64 number of keys;
the keys with their values; one description a tensor (name, sizes with the contiguous
one first, type, offset); then, from the next multiple of the alignment on, the tensors.

Nothing is allocated before the bytes that justify it were seen to be in the file.
"""

import dataclasses
import math
import mmap
import os
import pathlib
import struct
from typing import Any

import numpy as np

from effjax.core import errors
from effjax.interop.gguf import formats
from effjax.interop.gguf import values as gguf_values
from effjax.interop.gguf.values import Value

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
# Bounds on what stands before the tensors, so that a file can ask for no more than a
# few times as much memory. A vocabulary of 256,000 with its merges takes 16 MB, and a
# model of 384 experts a layer with a tensor for each expert 70,000 tensors.
MAX_HEADER_BYTES = 2**26
MAX_KEYS = 2**16
MAX_TENSORS = 2**18
MAX_NESTED = 2**16  # arrays in arrays, in the whole file

# The least that a string, an array, a key and a tensor's description take.
_STRING_BYTES = 8
_ARRAY_BYTES = 4 + 8
_KEY_BYTES = _STRING_BYTES + 4 + 1
_TENSOR_BYTES = _STRING_BYTES + 4 + 4 + 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorInfo:
  """What a file says of one tensor.

  Attributes:
    name: as in the file.
    type: one of `formats.ALL_TYPES`.
    shape: in NumPy's order, the contiguous axis last.
    offset: of its first byte, from the start of the file.
    num_bytes: that it takes.
  """

  name: str
  type: str
  shape: tuple[int, ...]
  offset: int
  num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class File:
  """An open file: what stands before the tensors, and a map of the bytes.

  Attributes:
    path: of the file.
    version: 2 or 3.
    alignment: of tensor data, in bytes.
    values: key to typed value, in the file's order; what `writer.write` takes.
    tensors: name to description, in the file's order.
    data: the whole file, uint8, mapped and read-only.
  """

  path: pathlib.Path
  version: int
  alignment: int
  values: dict[str, Value]
  tensors: dict[str, TensorInfo]
  data: np.ndarray = dataclasses.field(repr=False)

  @property
  def metadata(self) -> dict[str, Any]:
    """Key to plain value: scalars, strings, NumPy vectors, lists of strings."""
    return {key: value.plain for key, value in self.values.items()}

  @property
  def metadata_types(self) -> dict[str, str]:
    """Key to the name of the value's type, such as "uint32" or "string[]"."""
    return {key: value.type for key, value in self.values.items()}

  def raw(self, name: str) -> np.ndarray:
    """A tensor's bytes, uint8 [rows..., bytes per row], a view of the map.

    Raises:
      InputError: no such tensor.
    """
    if name not in self.tensors:
      match = errors.nearest(name, self.tensors)
      hint = f"; did you mean {match!r}?" if match else ""
      raise errors.InputError(f"{self.path}: no tensor {name!r}{hint}")
    info = self.tensors[name]
    held = self.data[info.offset : info.offset + info.num_bytes]
    return held.reshape(formats.raw_shape(formats.ALL_TYPES[info.type], info.shape))

  def read(self, name: str) -> np.ndarray:
    """The same bytes, read: pages of a map count as memory of the process.

    Raises:
      InputError: no such tensor, or the file was cut or removed since it was opened.
    """
    shape = self.raw(name).shape
    info = self.tensors[name]
    try:
      held = np.fromfile(self.path, np.uint8, info.num_bytes, offset=info.offset)
    except OSError as error:
      raise errors.InputError(f"{self.path}: {name} cannot be read: {error}") from None
    if held.size != info.num_bytes:
      raise errors.InputError(f"{self.path}: {name} is not whole any more")
    return held.reshape(shape)


def open_file(path: str | os.PathLike[str]) -> File:
  """Opens a GGUF file and reads all but the tensors' data.

  Raises:
    InputError: no such file, or it is not a whole and consistent GGUF file; one line
      with the file, the key or tensor, and what is wrong.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.InputError(f"{path}: no such file")
  try:
    with path.open("rb") as file:
      size = os.fstat(file.fileno()).st_size
      if not size:
        raise errors.InputError(f"{path}: empty file")
      mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error:
    raise errors.InputError(f"{path}: {error.strerror or error}") from None
  cursor = _Cursor(path, mapped)
  version = _version(cursor)
  num_tensors = cursor.number("Q", "number of tensors")
  num_keys = cursor.number("Q", "number of keys")
  cursor.check_count(num_keys, _KEY_BYTES, "number of keys", MAX_KEYS)
  cursor.check_count(num_tensors, _TENSOR_BYTES, "number of tensors", MAX_TENSORS)
  values = _read_values(cursor, num_keys)
  try:
    alignment = gguf_values.alignment(values)
  except errors.InputError as error:
    raise cursor.error(str(error)) from None
  tensors = _read_tensors(cursor, num_tensors, alignment)
  return File(
    path=path,
    version=version,
    alignment=alignment,
    values=values,
    tensors=tensors,
    data=np.frombuffer(mapped, np.uint8),
  )


class _Cursor:
  """A place in a file from which checked reads go on."""

  def __init__(self, path: pathlib.Path, data: mmap.mmap):
    self.path = path
    self.data = data
    self.size = len(data)
    self.place = 0
    self.end = min(self.size, MAX_HEADER_BYTES)
    self.num_nested = 0

  def error(self, message: str) -> errors.InputError:
    return errors.InputError(f"{self.path}: {message}")

  def take(self, num_bytes: int, what: str) -> bytes:
    """The next bytes."""
    start, stop = self.place, self.place + num_bytes
    if stop > self.end:
      raise self.error(f"{what} takes {num_bytes} bytes from byte {start}; {self._end}")
    self.place = stop
    return self.data[start:stop]

  def number(self, letter: str, what: str) -> Any:
    """The next scalar, by its letter in `struct`."""
    layout = struct.Struct("<" + letter)
    return layout.unpack(self.take(layout.size, what))[0]

  def string(self, what: str) -> str:
    """The next length and UTF-8 text."""
    held = self.take(self.number("Q", f"length of {what}"), what)
    try:
      return held.decode("utf-8")
    except UnicodeDecodeError as error:
      raise self.error(f"{what} is not UTF-8: {error.reason}") from None

  def strings(self, count: int, what: str) -> list[str]:
    """The next `count` texts; the loop that a vocabulary spends its time in."""
    self.check_count(count, _STRING_BYTES, f"length of {what}")
    data, place, end = self.data, self.place, self.end
    length_at = struct.Struct("<Q").unpack_from
    texts = []
    for _ in range(count):
      start = place + _STRING_BYTES
      stop = start + length_at(data, place)[0] if start <= end else start
      if stop > end:
        raise self.error(
          f"string {len(texts)} of {what} ends at byte {stop}; {self._end}"
        )
      try:
        texts.append(data[start:stop].decode("utf-8"))
      except UnicodeDecodeError as error:
        raise self.error(
          f"string {len(texts)} of {what} is not UTF-8: {error.reason}"
        ) from None
      place = stop
    self.place = place
    return texts

  def check_count(
    self, count: int, least_bytes: int, what: str, most: int | None = None
  ) -> None:
    """Raises InputError if `count` entries are too many, or more than can be left."""
    left = self.end - self.place
    if most is not None and count > most:
      raise self.error(f"{what} is {count}; at most {most}")
    if count * least_bytes > left:
      raise self.error(
        f"{what} is {count}, each of at least {least_bytes} bytes, with {left} bytes "
        f"left; {self._end}"
      )

  @property
  def _end(self) -> str:
    if self.end < self.size:
      return f"what stands before the tensors may take {MAX_HEADER_BYTES} bytes"
    return f"the file ends at byte {self.size}"


def _version(cursor: _Cursor) -> int:
  """Reads magic and version."""
  magic = cursor.data[:4]
  if magic == MAGIC[::-1]:
    raise cursor.error("big-endian GGUF; only little-endian files are read")
  if magic != MAGIC:
    raise cursor.error(f"not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
  cursor.take(4, "magic")
  version = cursor.number("I", "version")
  if version and version & 0xFFFF == 0:
    raise cursor.error("big-endian GGUF; only little-endian files are read")
  if version not in VERSIONS:
    raise cursor.error(f"GGUF version {version}; available: 2, 3")
  return version


def _read_values(cursor: _Cursor, count: int) -> dict[str, Value]:
  values = {}
  for index in range(count):
    key = cursor.string(f"name of key {index}")
    what = f"key {_show(key)}"
    if key in values:
      raise cursor.error(f"{what} appears twice")
    name = _type_name(cursor, what)
    values[key] = (
      _read_array(cursor, what, 1) if name == "array" else _read_one(cursor, name, what)
    )
  return values


def _type_name(cursor: _Cursor, what: str) -> str:
  number = cursor.number("I", f"type of {what}")
  if number not in gguf_values.NAMES:
    known = f"{min(gguf_values.NAMES)} to {max(gguf_values.NAMES)}"
    raise cursor.error(f"{what} has the unknown type {number}; available: {known}")
  return gguf_values.NAMES[number]


def _read_one(cursor: _Cursor, name: str, what: str) -> Value:
  if name == "string":
    return Value(name, cursor.string(what))
  if name == "bool":
    return Value(name, bool(_bools(cursor, 1, what)[0]))
  return Value(name, cursor.number(gguf_values.SCALARS[name][1], what))


def _read_array(cursor: _Cursor, what: str, depth: int) -> Value:
  """An array: the number of the element's type, the count, the elements."""
  if depth > gguf_values.MAX_DEPTH:
    raise cursor.error(
      f"{what} nests arrays more than {gguf_values.MAX_DEPTH} deep, which is not read"
    )
  name = _type_name(cursor, f"elements of {what}")
  count = cursor.number("Q", f"length of {what}")
  if name == "array":
    cursor.num_nested += count
    what_counts = f"number of arrays up to {what}"
    cursor.check_count(cursor.num_nested, 0, what_counts, MAX_NESTED)
    cursor.check_count(count, _ARRAY_BYTES, f"length of {what}")
    return Value(
      "array[]", [_read_array(cursor, what, depth + 1) for _ in range(count)]
    )
  if name == "string":
    return Value("string[]", cursor.strings(count, what))
  if name == "bool":
    return Value("bool[]", _bools(cursor, count, what))
  dtype = gguf_values.dtype(name)
  held = cursor.take(count * dtype.itemsize, what)
  return Value(f"{name}[]", np.frombuffer(held, dtype))


def _bools(cursor: _Cursor, count: int, what: str) -> np.ndarray:
  held = np.frombuffer(cursor.take(count, what), np.uint8)
  if (held > 1).any():
    raise cursor.error(f"{what} is a bool of value {held.max()}; available: 0, 1")
  return held.view(np.bool_)


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
  """Descriptions, with offsets from the start of the file."""
  infos = {}
  for index in range(count):
    name = cursor.string(f"name of tensor {index}")
    if name in infos:
      raise cursor.error(f"tensor {_show(name)} appears twice")
    infos[name] = _read_info(cursor, name)
  start = -(-cursor.place // alignment) * alignment
  tensors = {
    name: _placed(cursor, info, start, alignment) for name, info in infos.items()
  }
  free, previous = start, None
  for info in sorted(tensors.values(), key=lambda info: info.offset):
    if info.offset < free:
      raise cursor.error(
        f"tensors {_show(previous.name)} and {_show(info.name)} overlap at byte "
        f"{info.offset}"
      )
    free, previous = info.offset + info.num_bytes, info
  return tensors


def _read_info(cursor: _Cursor, name: str) -> TensorInfo:
  """One description; its offset counts from the start of the tensors' data."""
  what = f"tensor {_show(name)}"
  num_dims = cursor.number("I", f"number of dimensions of {what}")
  if num_dims > MAX_DIMS:
    raise cursor.error(f"{what} has {num_dims} dimensions; at most {MAX_DIMS}")
  sizes = [cursor.number("Q", f"shape of {what}") for _ in range(num_dims)]
  shape = tuple(reversed(sizes))
  number = cursor.number("I", f"type of {what}")
  offset = cursor.number("Q", f"offset of {what}")
  if 0 in shape:
    raise cursor.error(f"{what} of shape {shape} has no elements")
  if number not in formats.BY_NUMBER:
    raise cursor.error(
      f"{what} has the unknown type {number}; available: "
      + ", ".join(f"{f.name} ({f.number})" for f in formats.BY_NUMBER.values())
    )
  format = formats.BY_NUMBER[number]
  try:
    num_bytes = math.prod(formats.raw_shape(format, shape))
  except errors.InputError as error:
    raise cursor.error(f"{what}: {error}") from None
  return TensorInfo(
    name=name, type=format.name, shape=shape, offset=offset, num_bytes=num_bytes
  )


def _placed(
  cursor: _Cursor, info: TensorInfo, start: int, alignment: int
) -> TensorInfo:
  """The description with its offset from the start of the file, checked."""
  what = f"tensor {_show(info.name)}"
  if info.offset % alignment:
    raise cursor.error(
      f"{what} has offset {info.offset}, which is not a multiple of the alignment, "
      f"{alignment}"
    )
  stop = start + info.offset + info.num_bytes
  if stop > cursor.size:
    raise cursor.error(
      f"{what} of shape {info.shape} ({info.type}) ends at byte {stop}; the file ends "
      f"at byte {cursor.size}"
    )
  return dataclasses.replace(info, offset=start + info.offset)


def _show(name: str) -> str:
  """A name out of a file, on one short line."""
  text = repr(name)
  return text if len(text) <= 60 else text[:57] + "..."
