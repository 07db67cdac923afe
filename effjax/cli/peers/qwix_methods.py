"""qwix on one matrix: what product it puts in its place, by each of its methods.

qwix holds a weight of a product `W x` with outputs first, so that matrices are turned
around on their way in and out. Each method is called as qwix's own transforms of a
parameter tree call it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import qwix
from qwix._src.core import dot_general, qarray
from qwix.contrib import awq_core, gptq_core, smooth_quant

from effjax.cli import one_matrix

VERSION = qwix.__version__
# Names of a format here, and what qwix calls the type.
_TYPES = {
  "int8": jnp.int8,
  "int4": jnp.int4,
  "int3": "int3",
  "int2": "int2",
  "nf4": "nf4",
  "fp8": jnp.float8_e4m3fn,
  "mxfp8": "mxfp8",
  "mxfp4": "mxfp4",
  "nvfp4": "nvfp4",
}


def how(name: str, group: int, symmetric: bool = True) -> qarray.HowToQuantize:
  """How qwix is told to quantize a weight.

  Args:
    name: a key of the types above.
    group: inputs that share a scale; 0 for all of them.
    symmetric: no zero points.
  """
  return qarray.HowToQuantize(
    qtype=_TYPES[name],
    channelwise_axes=(0,),
    tiled_axes={1: group} if group else {},
    calibration_method="absmax" if symmetric else "minmax",
  )


def rows(name: str) -> qarray.HowToQuantize:
  """How qwix is told to quantize activations: a scale of its own for each row."""
  return qarray.HowToQuantize(
    qtype=_TYPES[name],
    channelwise_axes=(0,),
    tiled_axes={},
    calibration_method="absmax",
  )


def rtn(problem: one_matrix.Problem, told: Any, activations: Any) -> one_matrix.Made:
  """Rounding to nearest."""
  return _made(qarray.quantize(problem.w_DF.T, told), activations)


def gptq(problem: one_matrix.Problem, told: Any, activations: Any) -> one_matrix.Made:
  """GPTQ with qwix's block and damping; any multiple of a Hessian gives the same."""
  made, _ = gptq_core.quantize_weight(problem.w_DF.T, problem.own.hessian, told)
  return _made(made, activations)


def awq(problem: one_matrix.Problem, told: Any, activations: Any) -> one_matrix.Made:
  """AWQ with a scale of its own for each input."""
  mean = problem.own.abs_sum / problem.own.count
  made, scales = awq_core.quantize_weight(problem.w_DF.T, mean, told)
  return _made(made, activations, scales.reshape(-1))


def smoothquant(
  problem: one_matrix.Problem, told: Any, activations: Any
) -> one_matrix.Made:
  """SmoothQuant with alpha 0.5, of this matrix alone."""
  w_FD = problem.w_DF.T
  scales = smooth_quant.compute_scales_ratio(
    problem.own.absmax, jnp.max(jnp.abs(w_FD), axis=0), alpha=0.5
  )
  return _made(qarray.quantize(w_FD * scales[None], told), activations, scales)


def _made(
  w_FD: qarray.QArray, activations: Any, scales_D: jax.Array | None = None
) -> one_matrix.Made:
  """The product with inputs divided by scales, and quantized where that is asked."""

  def product(x_TD: jax.Array) -> jax.Array:
    x_TD = x_TD if scales_D is None else x_TD / scales_D[None]
    if activations is None:
      return x_TD @ qarray.dequantize(w_FD).T
    contract = (((1,), (1,)), ((), ()))
    return dot_general.dot_general(qarray.quantize(x_TD, activations), w_FD, contract)

  return one_matrix.Made(product, arrays=(w_FD, scales_D))


METHODS = {"rtn": rtn, "gptq": gptq, "awq": awq, "smoothquant": smoothquant}
