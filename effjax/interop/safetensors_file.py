"""Safetensors files, written one tensor at a time.

The format is a header of JSON and the bytes of the tensors; the library's own writer
wants all of them in memory at once.
"""

import json
import math
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effjax.interop.assemble import Foreign

# Names of dtypes in a header.
DTYPES = {
  "float64": "F64",
  "float32": "F32",
  "float16": "F16",
  "bfloat16": "BF16",
  "int64": "I64",
  "int32": "I32",
  "int16": "I16",
  "int8": "I8",
  "uint64": "U64",
  "uint32": "U32",
  "uint16": "U16",
  "uint8": "U8",
  "bool": "BOOL",
}


def write(
  path: pathlib.Path,
  tensors: Sequence[Foreign],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a file; each tensor is made when its turn comes.

  Args:
    path: of the file.
    tensors: of dtypes in DTYPES, in the order of the file.
    metadata: text that the header holds beside them.
  """
  header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
  start = 0
  for tensor in tensors:
    stop = start + num_bytes(tensor)
    header[tensor.name] = {
      "dtype": DTYPES[tensor.dtype.name],
      "shape": list(tensor.shape),
      "data_offsets": [start, stop],
    }
    start = stop
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
      flat = np.ascontiguousarray(tensor.make()).reshape(-1)
      file.write(flat.view(np.uint8).data)


def num_bytes(tensor: Foreign) -> int:
  """Bytes of a tensor in a file."""
  return math.prod(tensor.shape) * tensor.dtype.itemsize
