"""Learned step size quantization: the grid of integers is trained with the weights.

Source: LSQ (Esser et al. 2020, arXiv:1902.08153) for symmetric grids, LSQ+ (Bhalgat et
al. 2020, arXiv:2004.09576) for those with an offset; gradients as in
ops.matmul.learned_step. Steps start at `2 mean|v| / sqrt(Qp)` (LSQ, section 2.1). A
grid with an offset starts where LSQ+ starts one between a least and a largest value
(section 3.2: step = (max - min) / (2^bits - 1), offset = min), here mean -+ 3 standard
deviations, which is the paper's range of weights, or the weights' own range where that
is narrower. Steps of activations start from calibration, by default with the least
squared error (LSQ+, section 3.3). Deviations: a step may serve an output or a group,
not only a matrix; a group of zeros starts with a step of 1; activations, whose leaf has
no offset, are symmetric. Train with a stage "train" after this one,
then `harden`: the leaf that is served holds exactly the trained steps.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.compress.quantize import _fake
from effjax.core import config, select, technique
from effjax.weights.formats import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSQOptions(base.FormatOptions):
  """Options of learned step sizes: those of integers.

  With symmetric=False codes start at 0 and an offset is learned. The grid is "wide"
  unless told otherwise: codes from -2^(bits-1) to 2^(bits-1) - 1, as in the paper.
  Rounded activations have a learned step too, unless activation_scale="dynamic".
  """

  def __post_init__(self):
    config.require(
      self.format == "int",
      f"format={self.format!r}: lsq trains the steps of integers; use format='int', "
      "or qat for other formats",
    )
    if self.grid is None:
      object.__setattr__(self, "grid", "wide")
    if self.activation_scale is None and self.activations not in (None, "none"):
      object.__setattr__(self, "activation_scale", "mse")
    super().__post_init__()

  def held(self) -> base.FormatOptions:
    """The format of the leaves, whose grid is around zero or an offset."""
    names = (field.name for field in dataclasses.fields(base.FormatOptions))
    values = {name: getattr(self, name) for name in names}
    return base.FormatOptions(**(values | {"symmetric": True}))


def prepare(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: LSQOptions,
) -> dict[str, Any]:
  """Wraps the selected parameters, with the steps that training starts from.

  A `Masked` parameter keeps its mask, and each factor of a `LowRank` one is wrapped.
  """
  grid = lambda path, w: _first_grid(w, options)
  return _fake.wrap(params, specs, paths, "lsq", options.held(), stats, grid)


@functools.partial(jax.jit, static_argnames=("options",))
def _first_grid(w: jax.Array, options: LSQOptions) -> dict[str, jax.Array]:
  """Steps, and offsets of an asymmetric grid, of a matrix `[*stack, in, out]`."""
  fmt = options.held().build()
  x = base.split(w, fmt.group_of(w.shape[-2])).astype(jnp.float32)
  axes = (-1, -2, -3) if options.per_tensor else (-2,)
  reduce = functools.partial(_reduced, x, axes)
  if options.symmetric:
    high = fmt.code_range[1]
    step = 2 * _reduced(jnp.abs(x), axes, jnp.mean) / math.sqrt(high)
    parts = {"scale": step}
  else:
    mean, spread = reduce(jnp.mean), 3 * reduce(jnp.std)
    least = jnp.maximum(reduce(jnp.min), mean - spread)
    most = jnp.minimum(reduce(jnp.max), mean + spread)
    parts = {"scale": (most - least) / (2**options.bits - 1), "offset": least}
  parts["scale"] = jnp.where(parts["scale"] > 0, parts["scale"], 1.0)
  return {name: part[..., 0, :] for name, part in parts.items()}


def _reduced(x: jax.Array, axes: tuple[int, ...], fn: Any) -> jax.Array:
  return fn(x, axis=axes, keepdims=True)


TECHNIQUE = technique.Transform(
  fn=prepare,
  options_cls=LSQOptions,
  default_where=select.Where(kind=("matrix",)),
)
