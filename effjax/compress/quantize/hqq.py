"""HQQ: zero points that leave few large errors, found without calibration.

Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning
Models" (mobiusml.github.io/hqq_blog), with the authors' code. With the scale s fixed at
the range of a group, codes Q, zero points z and errors E of weights W take turns:

    Q = round(W / s + z), clipped         R = s (Q - z)
    E = sign(W - R) max(|W - R| - |W - R|^(p - 1) / beta, 0)
    z = mean(Q - (W - E) / s)             beta = kappa beta

which descends on the sum of |W - R|^p, p < 1, by half-quadratic splitting. A matrix is
done when its mean |W - R| no longer falls; the zero points before that are kept, as in
the authors' second solver. Zero points are not rounded: a leaf holds the offset -s z.

Beta has the unit of |W|^(p - 2): of errors below beta^(-1 / (2 - p)), 0.17 by default,
nothing is left in E, and z is their mean. Weights of language models are smaller than
that, and the authors' constants then minimize squares. `units="step"` is a deviation:
errors are taken in steps of the grid, so that beta means the same for all weights. With
2 bits and heavy tails a grid that holds zero, as rtn's asymmetric one, may lose less.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.compress.quantize import _matrices
from effjax.core import config, errors, select, technique
from effjax.ops.matmul import rounding
from effjax.weights.formats import base
from effjax.weights.leaves import quantized

UNITS = ("weight", "step")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HQQOptions(base.FormatOptions):
  """Options of HQQ, beside those of asymmetric integers (4 bits by default).

  Attributes:
    lp_norm: p, above 0 and at most 1.
    beta: weight of the splitting in the first step.
    kappa: what it grows by in each step.
    iters: most steps.
    units: what errors are measured in: "weight", as they are, or "step", of the grid.
  """

  lp_norm: float = 0.7
  beta: float = 10.0
  kappa: float = 1.01
  iters: int = 20
  units: str = "weight"

  def __post_init__(self):
    if self.format != "int":
      raise errors.InputError(
        f"format={self.format!r}: hqq finds zero points, which only format='int' has"
      )
    config.require(
      not self.symmetric, "symmetric=True: hqq finds zero points; leave it out"
    )
    config.require(
      not self.per_tensor,
      "per_tensor=True: hqq has a zero point for each group; leave it out",
    )
    defaults = {"bits": 4, "symmetric": False}
    for name, value in defaults.items():
      if getattr(self, name) is None:
        object.__setattr__(self, name, value)
    super().__post_init__()
    config.require(
      0 < self.lp_norm <= 1, f"lp_norm={self.lp_norm} must be above 0, at most 1"
    )
    for name in ("beta", "kappa", "iters"):
      value = getattr(self, name)
      config.require(value > 0, f"{name}={value} must be positive")
    if self.units not in UNITS:
      raise errors.unknown("units of errors", self.units, UNITS)


class Found(NamedTuple):
  """A grid for each group `[..., groups, 1, out]`, in the dtype of the weights.

  Attributes:
    scale: s, as it is stored.
    zero: z, not rounded.
    error: mean |W - R| of each matrix, `[..., 1, 1, 1]`.
  """

  scale: jax.Array
  zero: jax.Array
  error: jax.Array


def quantize(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: HQQOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by quantized leaves with offsets.

  A `Masked` parameter keeps its zeros, and of a `LowRank` one each factor is quantized.
  """
  one = lambda path, w, axis: _quantize_array(w, axis, options)
  return _matrices.replace(params, specs, paths, "hqq", one, options, stats)


def fit(x: jax.Array, options: HQQOptions) -> Found:
  """Scales and zero points of weights `[..., groups, inputs of a group, out]`."""
  top = 2**options.bits - 1
  least, most = x.min(axis=-2, keepdims=True), x.max(axis=-2, keepdims=True)
  scale = rounding.narrowed((most - least) / top, options.scale_dtype)
  # All weights of a group may be equal: that is exact with any scale.
  scale = base.divisor(scale).astype(x.dtype)
  unit = scale if options.units == "step" else jnp.ones_like(scale)

  def turn(carry: tuple[Any, ...], step: jax.Array) -> tuple[Any, None]:
    zero, (best, least_error), done = carry
    codes = jnp.clip(jnp.round(x / scale + zero), 0, top)
    off = x - (codes - zero) * scale
    error = jnp.mean(jnp.abs(off), axis=(-3, -2, -1), keepdims=True)
    done |= ~(error < least_error)
    best = jnp.where(done, best, zero)
    least_error = jnp.where(done, least_error, error)
    beta = options.beta * options.kappa ** step.astype(x.dtype)
    large = _shrunk(off / unit, beta, options.lp_norm) * unit
    zero = jnp.mean(codes - (x - large) / scale, axis=-2, keepdims=True)
    return (zero, (best, least_error), done), None

  zero = -least / scale
  shape = (*x.shape[:-3], 1, 1, 1)
  start = (jnp.full(shape, jnp.inf, x.dtype), jnp.zeros(shape, bool))
  start = (zero, (zero, start[0]), start[1])
  (_, (zero, error), _), _ = jax.lax.scan(turn, start, jnp.arange(options.iters))
  return Found(scale, zero, error)


def _shrunk(x: jax.Array, beta: jax.Array, p: float) -> jax.Array:
  """The generalized soft threshold; 0 at 0, where the power is not finite."""
  size = jnp.abs(x)
  power = jnp.where(size > 0, size, 1) ** (p - 1)
  return jnp.sign(x) * jnp.maximum(size - power / beta, 0)


@functools.partial(jax.jit, static_argnames=("axis", "options"))
def _quantize_array(
  w: jax.Array, axis: int, options: HQQOptions
) -> quantized.Quantized:
  """One array, under jit so that it keeps its sharding and needs no second copy."""
  x = base.split(w, options.build().group_of(w.shape[-2]))
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  found = fit(x, options)
  stored = rounding.narrowed(found.scale, options.scale_dtype)
  offset = rounding.narrowed(-found.zero * found.scale, options.scale_dtype)
  # The codes that are nearest with what is stored.
  places = (x - offset.astype(x.dtype)) / found.scale
  codes = jnp.clip(jnp.round(places), 0, 2**options.bits - 1).astype(jnp.uint8)
  parts = [base.merge(codes), base.held(stored, -2), base.held(offset, -2)]
  if axis == -1:
    parts = [jnp.swapaxes(part, -1, -2) for part in parts]
  codes, scale, offset = parts
  return quantized.Quantized.create(
    codes, scale, offset=offset, bits=options.bits, axis=axis, dtype=w.dtype
  )


TECHNIQUE = technique.Transform(
  fn=quantize,
  options_cls=HQQOptions,
  default_where=select.Where(kind=("matrix",)),
)
