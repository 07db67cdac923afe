"""An ONNX graph under construction: nodes in order, and the arrays they read.

A value is the name of a tensor. Names are paths like those of the parameters, so that a
graph in a viewer reads as the model does: "layer_0/mixer/MatMul". An array of a weight
is made only when the file is written, one at a time.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from effjax.core import errors

# What TensorRT 10 parses from its first release on (9 to 20), and the first with
# LayerNormalization; IR version 8 came with it.
OPSET = 17
IR_VERSION = 8
MICROSOFT = "com.microsoft"


def require_onnx() -> Any:
  """The package `onnx`, which effjax does not need elsewhere.

  Raises:
    InputError: it is not installed.
  """
  try:
    import onnx
  except ImportError:
    raise errors.InputError(
      "an export to ONNX needs the package onnx: pip install 'effjax[onnx]'"
    ) from None
  return onnx


@dataclasses.dataclass(frozen=True)
class Tensor:
  """An array that nodes read.

  Attributes:
    shape: its shape.
    dtype: of its values.
    make: computes its values.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    """Bytes of its values."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Graph:
  """Nodes, weights, constants, inputs and outputs.

  Attributes:
    weights: large arrays by name, which a file may hold beside the graph.
    constants: small ones, which stand in the graph: shapes depend on them.
    ops: every operator used, with its domain in front where it is not ONNX's own.
  """

  def __init__(self):
    """An empty graph."""
    self.weights: dict[str, Tensor] = {}
    self.constants: dict[str, np.ndarray] = {}
    self.ops: set[str] = set()
    self._onnx = require_onnx()
    self._nodes: list[Any] = []
    self._inputs: list[Any] = []
    self._outputs: list[Any] = []
    self._scopes: list[str] = []
    self._taken: set[str] = set()
    self._known: dict[tuple[Any, ...], str] = {}

  @contextlib.contextmanager
  def scope(self, name: str) -> Iterator[None]:
    """Puts a name in front of those of all values made inside."""
    self._scopes.append(name)
    try:
      yield
    finally:
      self._scopes.pop()

  def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
    """Adds a node; returns its output."""
    return self.ops_of(op_type, *inputs, num_outputs=1, domain=domain, **attributes)[0]

  def ops_of(
    self,
    op_type: str,
    *inputs: str,
    num_outputs: int,
    domain: str = "",
    **attributes: Any,
  ) -> tuple[str, ...]:
    """Adds a node with several outputs; returns them."""
    name = self._fresh(op_type)
    outputs = [f"{name}:{k}" for k in range(num_outputs)] if num_outputs > 1 else [name]
    node = self._onnx.helper.make_node(
      op_type, list(inputs), outputs, name=name, domain=domain, **attributes
    )
    self._nodes.append(node)
    self.ops.add(f"{domain}.{op_type}" if domain else op_type)
    return tuple(outputs)

  def constant(self, values: Any, dtype: Any = np.float32) -> str:
    """A small array in the graph; equal ones are held once."""
    array = np.asarray(values, dtype)
    key = (array.dtype.name, array.shape, array.tobytes())
    if key not in self._known:
      self._known[key] = name = f"constant_{len(self._known)}"
      self.constants[name] = array
    return self._known[key]

  def integers(self, *values: int) -> str:
    """A constant vector of int64, as shapes and axes are given."""
    return self.constant(values, np.int64)

  def weight(
    self,
    name: str,
    shape: Sequence[int],
    make: Callable[[], np.ndarray],
    dtype: Any = np.float32,
  ) -> str:
    """A large array, by a name of its own; the same name is the same array."""
    if name not in self.weights:
      self.weights[name] = Tensor(tuple(shape), np.dtype(dtype), make)
    return name

  def input(self, name: str, dtype: Any, dims: Sequence[int | str]) -> str:
    """Declares an input; a dimension with a name is found when running."""
    self._inputs.append(self._info(name, dtype, dims))
    return name

  def output(
    self, name: str, value: str, dtype: Any, dims: Sequence[int | str]
  ) -> None:
    """Declares a value as an output of the graph."""
    node = self._onnx.helper.make_node("Identity", [value], [name], name=f"to {name}")
    self._nodes.append(node)
    self.ops.add("Identity")
    self._outputs.append(self._info(name, dtype, dims))

  def model(self, weights: Sequence[Any], metadata: Mapping[str, str]) -> Any:
    """The ModelProto.

    Args:
      weights: TensorProtos of `self.weights`.
      metadata: texts by name that runtimes show.
    """
    onnx = self._onnx
    small = [
      onnx.numpy_helper.from_array(array, name)
      for name, array in self.constants.items()
    ]
    graph = onnx.helper.make_graph(
      self._nodes, "decoder", self._inputs, self._outputs, [*small, *weights]
    )
    domains = {"": OPSET}
    if any(op.startswith(MICROSOFT) for op in self.ops):
      domains[MICROSOFT] = 1
    made = onnx.helper.make_model(
      graph,
      opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in domains.items()],
      ir_version=IR_VERSION,
      producer_name="effjax",
    )
    onnx.helper.set_model_props(made, dict(metadata))
    return made

  def _info(self, name: str, dtype: Any, dims: Sequence[int | str]) -> Any:
    kind = self._onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return self._onnx.helper.make_tensor_value_info(name, kind, list(dims))

  def _fresh(self, op_type: str) -> str:
    base = "/".join([*self._scopes, op_type])
    name, number = base, 1
    while name in self._taken:
      number += 1
      name = f"{base}_{number}"
    self._taken.add(name)
    return name
