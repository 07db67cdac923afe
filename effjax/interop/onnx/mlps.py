"""MLPs in ONNX; see effjax.nn.mlps."""

import math
from typing import Any

from effjax.interop.onnx import matrices as matrices_lib

ROUTERS = ("top_k", "switch")


def swiglu(
  matrices: matrices_lib.Matrices,
  x: str,
  options: Any,
  path: str,
  expert: int | None = None,
) -> str:
  """`down(silu(gate(x)) * up(x))`."""
  del options
  graph = matrices.graph
  gate, up = (
    matrices.product(x, f"{path}/{name}", expert=expert) for name in ("gate", "up")
  )
  silu = graph.op("Mul", gate, graph.op("Sigmoid", gate))
  hidden = graph.op("Mul", silu, up)
  return matrices.product(hidden, f"{path}/down", expert=expert)


def gelu(matrices: matrices_lib.Matrices, x: str, options: Any, path: str) -> str:
  """`down(gelu(up(x)))`; the operator Gelu is newer than the opset."""

  def project(x: str, name: str) -> str:
    y = matrices.product(x, f"{path}/{name}")
    if not options.bias:
      return y
    return op("Add", y, matrices.array(f"{path}/{name}_bias"))

  graph = matrices.graph
  op, constant = graph.op, graph.constant
  h = project(x, "up")
  if options.approximate:
    cube = op("Mul", op("Mul", h, h), h)
    inner = op("Add", h, op("Mul", cube, constant(0.044715)))
    share = op("Tanh", op("Mul", inner, constant(math.sqrt(2 / math.pi))))
  else:
    share = op("Erf", op("Mul", h, constant(math.sqrt(0.5))))
  half = op("Mul", h, constant(0.5))
  h = op("Mul", half, op("Add", share, constant(1.0)))
  return project(h, "down")


def moe(matrices: matrices_lib.Matrices, x: str, options: Any, path: str) -> str:
  """Every expert on every token, weighted by what the router gives it, mostly zero.

  The router is float32 whatever the type, as it is here.
  """
  graph = matrices.graph
  op, integers = graph.op, graph.integers
  logits_BLE = matrices.product(x, f"{path}/router", exact=True)
  probabilities_BLE = op("Softmax", logits_BLE, axis=-1)
  best_BLK, experts_BLK = graph.ops_of(
    "TopK", probabilities_BLE, integers(options.k), num_outputs=2, axis=-1
  )
  if options.renormalize and options.router == "top_k":
    total = op("ReduceSum", best_BLK, integers(-1), keepdims=1)
    best_BLK = op("Div", best_BLK, total)
  none_BLE = op("Mul", probabilities_BLE, graph.constant(0.0))
  weights_BLE = op("ScatterElements", none_BLE, experts_BLK, best_BLK, axis=-1)
  y = None
  for expert in range(options.num_experts):
    with graph.scope(f"expert_{expert}"):
      bounds = (integers(expert), integers(expert + 1), integers(-1))
      share = op("Slice", weights_BLE, *bounds)
      part = op("Mul", swiglu(matrices, x, options, path, expert), share)
      y = part if y is None else op("Add", y, part)
  if options.num_shared:
    with graph.scope("shared"):
      y = op("Add", y, swiglu(matrices, x, options, f"{path}/shared"))
  return y


MLPS = {"swiglu": swiglu, "gelu": gelu, "moe": moe}
