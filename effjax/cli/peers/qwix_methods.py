"""qwix on one matrix: what it makes of it, as a dense array, by each of its methods.

qwix holds a weight of a product `W x` with outputs first, so that matrices are turned
around on their way in and out. Each method is called as qwix's own transforms of a
parameter tree call it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from qwix._src.core import qarray
from qwix.contrib import awq_core, gptq_core

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


def rtn(w_DF: jax.Array, told: qarray.HowToQuantize, stats: Any = None) -> jax.Array:
  """Rounding to nearest; `stats` is not used."""
  del stats
  return qarray.dequantize(qarray.quantize(w_DF.T, told)).T


def gptq(
  w_DF: jax.Array, told: qarray.HowToQuantize, stats: Mapping[str, jax.Array]
) -> jax.Array:
  """GPTQ with qwix's block and damping; `stats["hessian"]` is `[D, D]`."""
  made, _ = gptq_core.quantize_weight(w_DF.T, stats["hessian"], told)
  return qarray.dequantize(made).T


def awq(
  w_DF: jax.Array, told: qarray.HowToQuantize, stats: Mapping[str, jax.Array]
) -> jax.Array:
  """AWQ with a scale of its own for each input; `stats["mean"]` is mean |x| `[D]`."""
  made, scales = awq_core.quantize_weight(w_DF.T, stats["mean"], told)
  return (qarray.dequantize(made) / scales).T


METHODS = {"rtn": rtn, "gptq": gptq, "awq": awq}
