"""Products with matrices, as float32, 4-bit or 8-bit integers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from effjax.core import errors
from effjax.interop import assemble
from effjax.interop.onnx import codes, parameters
from effjax.interop.onnx import graph as graph_lib
from effjax.weights.leaves import adapted

TYPES = ("fp32", "int4", "int8")


class Matrices:
  """Writes products into a graph.

  Attributes:
    graph: where they go.
    params: what they multiply by.
    rounded: paths of matrices that were rounded here.
    unpacked: paths of compressed parameters that were multiplied out.
  """

  def __init__(
    self,
    graph: graph_lib.Graph,
    params: parameters.Parameters,
    type: str,
    dense: bool,
  ):
    """See `export.save` for the type and `dense`."""
    self.graph = graph
    self.params = params
    self.rounded: list[str] = []
    self.unpacked: list[str] = []
    self._type = type
    self._dense = dense
    self._quantized_inputs: dict[str, Sequence[str]] = {}

  def product(
    self,
    x: str,
    path: str,
    *,
    transpose: bool = False,
    expert: int | None = None,
    exact: bool = False,
  ) -> str:
    """`x @ w` over the last axis of x.

    Args:
      x: `[..., in]`.
      path: of a matrix `[in, out]`.
      transpose: it is held `[out, in]`, as a tied embedding is.
      expert: which of a stack of them.
      exact: float32 whatever the type, for routers.

    Raises:
      InputError: it is compressed in a way the type cannot hold; names it.
    """
    kind = "fp32" if exact else self._type
    write = {"fp32": self._float, "int4": self._int4, "int8": self._int8}[kind]
    return write(x, path, transpose, expert)

  def embedding(self, path: str, ids: str) -> str:
    """Rows of a table in float32; of a compressed one the values are the same.

    Raises:
      InputError: it is compressed, and the type is fp32.
    """
    if self._type == "fp32":
      self._require_plain(path)
    elif self.params.compressed(path):
      self.unpacked.append(path)
    table = self.array(path)
    return self.graph.op("Gather", table, ids, axis=0)

  def array(self, path: str) -> str:
    """A parameter in float32, whatever the type: tables, norms, biases."""
    shape, make = self.params.shape(path), lambda: self.params.array(path)
    return self.graph.weight(path, shape, make)

  def _require_plain(self, path: str) -> None:
    if not self.params.compressed(path):
      return
    self._refuse(path, "choose --type int4 or int8 if its codes are such")
    self.unpacked.append(path)

  def _refuse(self, path: str, why: str) -> None:
    """Raises InputError for a compressed parameter, unless it may be multiplied out."""
    leaf = self.params.leaf(path)
    if adapted.is_adapted(leaf):
      assemble.require_merged(path, "an ONNX file", self._dense)
    if not self._dense:
      raise errors.InputError(
        f"{path} is {codes.describe(leaf)}, which ONNX type "
        f"{self._type} cannot hold: {why}; or --dense to multiply it out"
      )

  def _float(self, x: str, path: str, transpose: bool, expert: int | None) -> str:
    self._require_plain(path)
    if expert is None:
      w = self.array(path)
    else:
      shape = self.params.shape(path)[1:]
      make = lambda: self.params.array(path)[expert]
      w = self.graph.weight(_name(path, expert), shape, make)
    if transpose:
      w = self.graph.op("Transpose", w, perm=[1, 0])
    return self.graph.op("MatMul", x, w)

  def _int4(self, x: str, path: str, transpose: bool, expert: int | None) -> str:
    found = self._codes(path, transpose, expert, codes.int4, codes.round_int4)
    name = _name(path, expert) + ("/transposed" if transpose else "")
    parts = {"codes": found.codes_NJP, "scale": found.scale_NJ, "zero": found.zero}
    inputs = [self._held(f"{name}.{k}", v) for k, v in parts.items() if v is not None]
    shape = self.params.shape(path)[-2:]
    num_inputs, num_outputs = shape[::-1] if transpose else shape
    return self.graph.op(
      "MatMulNBits",
      x,
      *inputs,
      domain=graph_lib.MICROSOFT,
      K=num_inputs,
      N=num_outputs,
      bits=4,
      block_size=found.block,
    )

  def _int8(self, x: str, path: str, transpose: bool, expert: int | None) -> str:
    found = self._codes(path, transpose, expert, codes.int8, codes.round_int8)
    name = _name(path, expert) + ("/transposed" if transpose else "")
    w = self._held(f"{name}.codes", found.codes_KN)
    w_scale = self._held(f"{name}.scale", found.scale_N)
    graph = self.graph
    if x not in self._quantized_inputs:
      self._quantized_inputs[x] = graph.ops_of(
        "DynamicQuantizeLinear", x, num_outputs=3
      )
    x_codes, x_scale, x_zero = self._quantized_inputs[x]
    y = graph.op("MatMulInteger", x_codes, w, x_zero)
    y = graph.op("Cast", y, to=1)  # float32
    return graph.op("Mul", y, graph.op("Mul", x_scale, w_scale))

  def _codes(
    self,
    path: str,
    transpose: bool,
    expert: int | None,
    take: Callable[[Any, bool], Any],
    round: Callable[[np.ndarray], Any],
  ) -> Any:
    """The codes of a leaf as they are, or those of a plain matrix by rounding."""
    if self.params.compressed(path):
      leaf = self.params.leaf(path)
      if expert is not None:
        leaf = jax.tree.map(lambda a: a[expert], leaf)
      try:
        return take(leaf, transpose)
      except errors.InputError as error:
        self._refuse(path, str(error))
        self.unpacked.append(path)
    self.rounded.append(path)
    w = self.params.array(path)
    w = w if expert is None else w[expert]
    return round(w.T if transpose else w)

  def _held(self, name: str, array: np.ndarray) -> str:
    return self.graph.weight(name, array.shape, lambda: array, array.dtype)


def _name(path: str, expert: int | None) -> str:
  return path if expert is None else f"{path}[{expert}]"
