"""A graph as a file; with a second one beside it for weights too large for one.

Protocol Buffers end at 2 GB, so that large weights stand in `<name>.data`, which the
graph names and runtimes open by themselves: the two files stay together.
"""

import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from effjax.core import errors
from effjax.interop.onnx import graph as graph_lib

EXTERNAL_BYTES = 1_500_000_000
# Pages, so that a runtime can map every weight where it lies.
_ALIGNMENT = 4096


def data_path(path: pathlib.Path) -> pathlib.Path:
  """Where the weights of a graph stand that do not fit in it."""
  return path.with_name(f"{path.name}.data")


def require_free(path: pathlib.Path) -> None:
  """Raises InputError if one of the files exists already."""
  for file in (path, data_path(path)):
    if file.exists():
      raise errors.InputError(f"{file} exists already; choose another --out")


def write(
  path: str | os.PathLike, graph: graph_lib.Graph, metadata: Mapping[str, str]
) -> bool:
  """Writes and checks the files; the graph appears last, whole or not at all.

  Args:
    path: of the graph; it must not exist.
    graph: what to write.
    metadata: texts by name.

  Returns:
    Whether there is a second file.
  """
  onnx = graph_lib.require_onnx()
  path = pathlib.Path(path)
  require_free(path)
  total = sum(tensor.num_bytes for tensor in graph.weights.values())
  external = total > EXTERNAL_BYTES
  # A folder, because the graph names the second file, and is checked with it.
  partial = path.with_name(f".{path.name}.partial")
  path.parent.mkdir(parents=True, exist_ok=True)
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  moved = False
  try:
    file = partial / path.name
    if external:
      weights = _write_beside(onnx, graph, data_path(file))
    else:
      weights = [
        _proto(onnx, name, tensor, raw_data=_values(name, tensor).tobytes())
        for name, tensor in graph.weights.items()
      ]
    onnx.save_model(graph.model(weights, metadata), os.fspath(file))
    onnx.checker.check_model(os.fspath(file), full_check=True)
    if external:
      data_path(file).rename(data_path(path))
      moved = True
    file.rename(path)
  except BaseException:
    if moved:
      data_path(path).unlink(missing_ok=True)
    raise
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return external


def _write_beside(onnx: Any, graph: graph_lib.Graph, file: pathlib.Path) -> list[Any]:
  """Writes every weight to one file; returns protos that say where."""
  protos = []
  with open(file, "wb") as stream:
    for name, tensor in graph.weights.items():
      stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
      proto = _proto(onnx, name, tensor)
      proto.data_location = onnx.TensorProto.EXTERNAL
      for key, value in (
        ("location", file.name),
        ("offset", stream.tell()),
        ("length", tensor.num_bytes),
      ):
        proto.external_data.add(key=key, value=str(value))
      stream.write(_values(name, tensor).reshape(-1).view(np.uint8).data)
      protos.append(proto)
  return protos


def _proto(onnx: Any, name: str, tensor: graph_lib.Tensor, **fields: Any) -> Any:
  kind = onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype)
  return onnx.TensorProto(name=name, data_type=kind, dims=tensor.shape, **fields)


def _values(name: str, tensor: graph_lib.Tensor) -> np.ndarray:
  """The values of a weight, as they lie in a file."""
  array = np.ascontiguousarray(tensor.make())
  if array.shape != tensor.shape or array.dtype != tensor.dtype:
    raise ValueError(
      f"{name} is {array.dtype}{array.shape}, declared {tensor.dtype}{tensor.shape}"
    )
  return array
