"""Tensors in safetensors files: one, or shards with an index.

Nothing is unpickled: a folder that only has `.bin` files is refused.
"""

import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from effjax.core import errors
from effjax.interop import safetensors_file
from effjax.interop.assemble import Foreign

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Dtypes that weights have, as they are named in a header.
_DTYPES = {
  name: safetensors_file.DTYPES[name]
  for name in ("float64", "float32", "float16", "bfloat16")
}
# What PyTorch's tools look for in a header.
_METADATA = {"format": "pt"}
_NUMPY = {
  short: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
  for name, short in _DTYPES.items()
}
# Of positions and masks, which old files hold beside the weights: passed over.
_BUFFERS = ("I64", "BOOL")
_SHARD_BYTES = 5 * 10**9


class Tensors:
  """The tensors of a folder; see interop.rules.Source.

  Attributes:
    where: the folder.
  """

  def __init__(self, folder: pathlib.Path):
    """Opens the files and reads their headers.

    Raises:
      InputError: no safetensors, a damaged file, or an index that does not fit.
    """
    self.where = str(folder)
    self._entries: dict[str, _Entry] = {}
    for file, said in _file_names(folder).items():
      path = folder / file
      entries = _entries(path)
      if said is not None and entries.keys() != said:
        odd = sorted(entries.keys() ^ said)[0]
        raise errors.InputError(
          f"{path}: {odd} is in the file or in {INDEX}, but not in both"
        )
      for name, entry in entries.items():
        if name in self._entries:
          raise errors.InputError(f"{path}: {name} is also in another file")
        if entry.dtype not in (*_DTYPES.values(), *_BUFFERS):
          raise errors.InputError(
            f"{path}: {name} is {entry.dtype}; available: "
            + ", ".join(_DTYPES.values())
          )
        self._entries[name] = entry

  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Shape of every tensor; buffers of old files are none."""
    return {
      name: entry.shape
      for name, entry in self._entries.items()
      if entry.dtype not in _BUFFERS
    }

  def drop(self, name: str) -> None:
    """Forgets a tensor, which will not be read."""
    self._entries.pop(name, None)

  def rename(self, ends: Sequence[tuple[str, str]]) -> None:
    """Gives tensors whose names end as in older files the names of today.

    Args:
      ends: what such names end with, and with what instead.
    """
    for name in tuple(self._entries):
      for old, new in ends:
        today = name.removesuffix(old) + new
        if name.endswith(old) and today not in self._entries:
          self._entries[today] = self._entries.pop(name)

  def read(self, name: str) -> np.ndarray:
    """One tensor.

    It is read, not mapped: pages of a mapped file count as memory of the process.

    Raises:
      InputError: the file was cut or removed since it was opened.
    """
    entry = self._entries[name]
    count = math.prod(entry.shape)
    try:
      array = np.fromfile(
        entry.path, _NUMPY[entry.dtype], count=count, offset=entry.start
      )
    except OSError as error:
      raise errors.InputError(f"{entry.path}: {name} cannot be read: {error}") from None
    if array.size != count:
      raise errors.InputError(f"{entry.path}: {name} is not whole any more")
    return array.reshape(entry.shape)


class _Entry(NamedTuple):
  """Where a tensor lies: `start` in bytes from the begin of the file."""

  path: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  start: int


def _file_names(folder: pathlib.Path) -> dict[str, set[str] | None]:
  """Every file, and the names its index says it holds (None without an index)."""
  if (folder / INDEX).is_file():
    index = _json(folder / INDEX)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table:
      raise errors.InputError(f"{folder / INDEX} has no table weight_map")
    files: dict[str, set[str] | None] = {}
    for name, file in table.items():
      if not isinstance(file, str) or os.path.basename(file) != file:
        raise errors.InputError(
          f"{folder / INDEX}: {name} is said to be in {file!r}, which is no file name"
        )
      files.setdefault(file, set()).add(name)
    return files
  if (folder / SINGLE).is_file():
    return {SINGLE: None}
  found = sorted(path.name for path in folder.glob("*.safetensors"))
  if len(found) == 1:
    return {found[0]: None}
  pickled = next(iter(sorted(folder.glob("*.bin"))), None)
  hint = (
    f"{pickled.name} is a pickle, which may run code and is never loaded: save the "
    "model with safe_serialization=True first"
    if pickled
    else f"a Hugging Face folder has {SINGLE}, or shards and {INDEX}"
  )
  raise errors.InputError(f"{folder} has no safetensors; {hint}")


def _entries(path: pathlib.Path) -> dict[str, _Entry]:
  """What a file holds; the library checks every length and offset of its header."""
  try:
    with safe_open(path, framework="numpy"):
      pass
    with open(path, "rb") as file:
      (length,) = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(length))
  except FileNotFoundError:
    raise errors.InputError(f"{path} is missing") from None
  except (SafetensorError, OSError, ValueError) as error:
    reason = " ".join(str(error).split())[:160]
    raise errors.InputError(f"{path} is not a safetensors file: {reason}") from None
  header.pop("__metadata__", None)
  return {
    name: _Entry(
      path, info["dtype"], tuple(info["shape"]), 8 + length + info["data_offsets"][0]
    )
    for name, info in header.items()
  }


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise errors.InputError(f"{path} cannot be read: {error}") from None
  if not isinstance(value, dict):
    raise errors.InputError(f"{path} does not hold an object")
  return value


def write(
  folder: pathlib.Path, tensors: Sequence[Foreign], shard_bytes: int = _SHARD_BYTES
) -> None:
  """Writes tensors one at a time, in shards with an index where they are many.

  Args:
    folder: where the files go.
    tensors: in the order of the files.
    shard_bytes: most bytes of a file, where a tensor is not larger itself.
  """
  shards: list[list[Foreign]] = [[]]
  size = 0
  for tensor in tensors:
    if shards[-1] and size + safetensors_file.num_bytes(tensor) > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += safetensors_file.num_bytes(tensor)
  if len(shards) == 1:
    safetensors_file.write(folder / SINGLE, shards[0], _METADATA)
    return
  table = {}
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    safetensors_file.write(folder / file, shard, _METADATA)
    table |= {tensor.name: file for tensor in shard}
  total = sum(map(safetensors_file.num_bytes, tensors))
  index = {"metadata": {"total_size": total}, "weight_map": table}
  (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def dtype(name: str) -> np.dtype:
  """A dtype that these files can hold.

  Raises:
    InputError: another one.
  """
  if name not in _DTYPES:
    raise errors.unknown("dtype", name, _DTYPES)
  return _NUMPY[_DTYPES[name]]
