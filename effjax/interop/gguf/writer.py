"""Writes GGUF files, version 3, little-endian, one tensor in memory at a time."""

import contextlib
import dataclasses
import math
import os
import pathlib
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from effjax.core import errors
from effjax.core.config import require
from effjax.interop.gguf import formats, reader
from effjax.interop.gguf import values as gguf_values
from effjax.interop.gguf.values import Value

VERSION = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """A tensor to write.

  Attributes:
    name: at most once in a file.
    type: one of `formats.ALL_TYPES`.
    shape: in NumPy's order, one to four sizes (none: a scalar).
    raw: uint8 with the tensor's bytes in order, such as [rows..., bytes per row], or a
      function that gives them when their turn comes.
  """

  name: str
  type: str
  shape: tuple[int, ...]
  raw: np.ndarray | Callable[[], np.ndarray]


def write(
  path: str | os.PathLike[str], metadata: Mapping[str, Any], tensors: Iterable[Tensor]
) -> None:
  """Writes a file in one piece: it is there whole, or what was there before is.

  Tensors follow each other in the order given, each from a multiple of the alignment
  on (`general.alignment`, or 32) and filled up to one, as gguf-py lays them out.

  Args:
    path: of the file, replaced if it exists; its folder exists.
    metadata: key to a `Value`, or to a plain value whose type `values.infer` chooses.
    tensors: see `Tensor`.

  Raises:
    InputError: a value its type does not hold, a tensor whose type, shape and bytes do
      not fit, a name that appears twice, or a path that cannot be written.
  """
  path = pathlib.Path(path)
  tensors = list(tensors)
  values = _typed(metadata)
  alignment = gguf_values.alignment(values)
  header = _header(values, tensors, alignment)
  with _replacing(path) as file:
    file.write(header)
    _pad(file, len(header), alignment)
    for tensor in tensors:
      num_bytes = _num_bytes(tensor)
      raw = tensor.raw() if callable(tensor.raw) else tensor.raw
      require(
        isinstance(raw, np.ndarray) and raw.dtype == np.uint8 and raw.size == num_bytes,
        f"tensor {tensor.name!r} ({tensor.type}, shape {tensor.shape}) takes "
        f"{num_bytes} bytes in uint8; got {_described(raw)}",
      )
      file.write(np.ascontiguousarray(raw).data)
      _pad(file, num_bytes, alignment)


def _typed(metadata: Mapping[str, Any]) -> dict[str, Value]:
  values = {}
  for key, value in metadata.items():
    try:
      values[key] = gguf_values.infer(value)
    except errors.InputError as error:
      raise errors.InputError(f"key {key!r}: {error}") from None
  return values


def _header(
  values: Mapping[str, Value], tensors: list[Tensor], alignment: int
) -> bytes:
  """All before the padding in front of the first tensor."""
  parts = [reader.MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
  for key, value in values.items():
    try:
      parts += [gguf_values.pack_string(key), gguf_values.pack(value)]
    except errors.InputError as error:
      raise errors.InputError(f"key {key!r}: {error}") from None
  offset = 0
  seen = set()
  for tensor in tensors:
    require(tensor.name not in seen, f"tensor {tensor.name!r} is given twice")
    seen.add(tensor.name)
    num_bytes = _num_bytes(tensor)
    number = formats.ALL_TYPES[tensor.type].number
    sizes = tuple(reversed(tensor.shape))
    layout = f"<I{len(sizes)}QIQ"
    parts.append(gguf_values.pack_string(tensor.name))
    parts.append(struct.pack(layout, len(sizes), *sizes, number, offset))
    offset += -(-num_bytes // alignment) * alignment
  return b"".join(parts)


def _num_bytes(tensor: Tensor) -> int:
  """Bytes of a tensor, once its type and shape are seen to be right."""
  if tensor.type not in formats.ALL_TYPES:
    raise errors.unknown("GGUF tensor type", tensor.type, formats.ALL_TYPES)
  require(
    len(tensor.shape) <= reader.MAX_DIMS
    and all(0 < size < 2**63 for size in tensor.shape),
    f"tensor {tensor.name!r} of shape {tensor.shape}: at most {reader.MAX_DIMS} sizes, "
    "all positive",
  )
  try:
    return math.prod(formats.raw_shape(formats.ALL_TYPES[tensor.type], tensor.shape))
  except errors.InputError as error:
    raise errors.InputError(f"tensor {tensor.name!r}: {error}") from None


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A file written beside `path`, which takes its place when the block ends well."""
  require(not path.is_dir(), f"{path} is a folder; give the name of a file")
  beside = path.with_name(f".{uuid.uuid4().hex}.partial")
  try:
    file = beside.open("xb")
  except OSError as error:
    raise errors.InputError(f"{path}: {error.strerror or error}") from None
  try:
    with file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    beside.replace(path)
  except BaseException:
    beside.unlink(missing_ok=True)
    raise


def _pad(file: BinaryIO, written: int, alignment: int) -> None:
  """Zeros from `written` bytes to a multiple of the alignment."""
  file.write(bytes(-written % alignment))


def _described(raw: Any) -> str:
  if isinstance(raw, np.ndarray):
    return f"{raw.dtype} of shape {raw.shape}"
  return type(raw).__name__
