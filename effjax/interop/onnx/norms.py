"""Normalization in ONNX; see effjax.nn.norm."""

from effjax.interop.onnx import matrices as matrices_lib


def rms(matrices: matrices_lib.Matrices, x: str, path: str, eps: float) -> str:
  """By the root mean square of the last axis.

  From plain operators: ONNX has RMSNormalization since opset 23 only.
  """
  graph = matrices.graph
  op = graph.op
  mean = op("ReduceMean", op("Mul", x, x), axes=[-1], keepdims=1)
  root = op("Sqrt", op("Add", mean, graph.constant(eps)))
  return op("Mul", op("Div", x, root), matrices.array(f"{path}/scale"))


def layer(matrices: matrices_lib.Matrices, x: str, path: str, eps: float) -> str:
  """By mean and variance of the last axis."""
  scale, bias = (matrices.array(f"{path}/{name}") for name in ("scale", "bias"))
  return matrices.graph.op(
    "LayerNormalization", x, scale, bias, axis=-1, epsilon=float(eps)
  )


NORMS = {"rms": rms, "layer": layer}
