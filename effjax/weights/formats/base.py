"""What every number format says of itself, and how a config names one.

A format knows the grid of values that a group of weights may take, and the leaf that
holds them; how a weight is rounded to that grid is another matter (compress.quantize).
So every rounding works with every format:

    fmt = FormatOptions(format="nf4").build()
    x = split(w, fmt.group_of(w.shape[-2]))    # [*stack, G groups, g inputs, out]
    grid = fmt.fit(x, fmt.outer(x))            # arrays [*stack, G, 1, out]
    codes = fmt.encode(x, grid)                # the nearest; or between fmt.neighbours
    leaf = fmt.leaf(merge(codes), grid)        # a Quantized, a Coded, ...

Codes, grids and values broadcast, so a single row of inputs is encoded in the same way.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from effjax.core import errors, registry
from effjax.ops.matmul import rounding
from effjax.weights import leaf as leaf_lib

FORMATS = "effjax.weights.formats"
SCALE_DTYPES = ("float32", "float16", "bfloat16")
DYNAMIC = "dynamic"  # scales of activations that are found while running
# Arrays by name, each [*stack, groups, 1, out], or of size 1 where it is shared.
Grid = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """Base of every format: a frozen dataclass of its options.

  Attributes:
    group: consecutive inputs that share a grid; 0 for all of them, one grid an output.
    static_grids: whether groups cannot be fitted one after the other, because their
      grids depend on one another.
  """

  static_grids: ClassVar[bool] = False

  group: int = 0

  def group_of(self, in_dim: int) -> int:
    """Inputs in a group of a matrix with `in_dim` inputs.

    Raises:
      InputError: the group does not divide; the nearest that does is named.
    """
    return rounding.group_size(in_dim, self.group)

  def outer(self, x: jax.Array) -> jax.Array | None:
    """What a whole matrix decides for all its groups `[*stack, 1, 1, 1]`, or None."""
    del x
    return None

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """The grid of each group.

    Args:
      x: weights `[..., groups, inputs of a group, out]`.
      outer: of the matrix.
      shrink: factor on the range that the grid covers, an array like a grid or 1.
    """
    raise TypeError(f"{type(self).__name__} does not define fit()")

  def encode(self, x: jax.Array, grid: Grid) -> jax.Array:
    """Codes of the nearest values."""
    raise TypeError(f"{type(self).__name__} does not define encode()")

  def neighbours(self, x: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """Codes of the values around each weight: the largest at most it, the next one."""
    raise TypeError(f"{type(self).__name__} does not define neighbours()")

  def decode(self, codes: jax.Array, grid: Grid) -> jax.Array:
    """The values of codes; exactly those of the leaf."""
    raise TypeError(f"{type(self).__name__} does not define decode()")

  def leaf(
    self, codes: jax.Array, grid: Grid, *, axis: int = -2, dtype: Any = jnp.float32
  ) -> leaf_lib.Leaf:
    """The leaf that holds a matrix.

    Args:
      codes: `[*stack, in, out]`.
      grid: `[*stack, groups, 1, out]`.
      axis: -2, or -1 to hold the transpose: an embedding, whose last axis is contracted
        by a tied head.
      dtype: logical dtype.
    """
    raise TypeError(f"{type(self).__name__} does not define leaf()")


def split(w: jax.Array, group: int) -> jax.Array:
  """A matrix `[*stack, in, out]` as `[*stack, in / group, group, out]`."""
  return w.reshape(*w.shape[:-2], w.shape[-2] // group, group, w.shape[-1])


def merge(x: jax.Array) -> jax.Array:
  """The inverse of `split`."""
  return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def held(part: jax.Array, axis: int) -> jax.Array:
  """A part `[*stack, groups, 1, out]` of a grid as a leaf holds it along `axis`."""
  part = part[..., 0, :]
  return part if axis == -2 else jnp.swapaxes(part, -1, -2)


def an_output(part: jax.Array, codes: jax.Array) -> jax.Array:
  """A part of a grid as `[*stack, groups, out]`, also where all outputs share one."""
  part = part[..., 0, :]
  return jnp.broadcast_to(part, (*part.shape[:-1], codes.shape[-1]))


def divisor(scale: jax.Array) -> jax.Array:
  """A scale to divide by: 1 in place of 0."""
  return jnp.where(scale == 0, 1, scale).astype(scale.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatOptions:
  """The options that choose a format: the same in everything that quantizes.

  Fields a format does not have stay None; all others get its defaults.

  Attributes:
    format: key of `effjax list formats`.
    bits: bits of an integer code.
    group: consecutive inputs that share a scale; 0 for the whole input axis, one scale
      an output.
    symmetric: no zero points.
    grid: convention of a symmetric integer grid: "narrow", "half" or "wide".
    per_tensor: one scale for a whole matrix.
    activations: "int8" or "int4" (of integers) and "fp8" (of fp8) round activations
      too, and multiply codes; see ops.matmul.activations. Needs group=0 and symmetric.
    activation_scale: "dynamic", each token's own while running; or one number a matrix
      (an expert), from calibration: "absmax" the largest magnitude, "percentile", or
      "mse" the least squared error.
    percentile: of the magnitudes that are not cut, with activation_scale="percentile".
    scale_dtype: dtype of scales that are floats.
    scale_rule: how a power of two is chosen for a block: "floor", "rceil", "even" or
      "ceil".
    double_group: scales that share a scale of their own, of NF4; 0 to hold them whole.
    variant: of fp8 the float, "e4m3" or "e5m2"; of gguf the block, such as "q4_k".
  """

  format: str = "int"
  bits: int | None = None
  group: int | None = None
  symmetric: bool | None = None
  grid: str | None = None
  per_tensor: bool | None = None
  activations: str | None = None
  activation_scale: str | None = None
  percentile: float | None = None
  scale_dtype: str | None = None
  scale_rule: str | None = None
  double_group: int | None = None
  variant: str | None = None

  def __post_init__(self):
    known = {field.name for field in dataclasses.fields(registry_class(self.format))}
    for name in self._names():
      if getattr(self, name) is not None and name not in known:
        takes = ", ".join(sorted(known)) or "none"
        raise errors.InputError(
          f"format {self.format!r} has no option {name}; it takes {takes}"
        )
    built = self.build()
    # Defaults are filled in, so that a record says what really ran.
    for name in known:
      object.__setattr__(self, name, getattr(built, name))

  def build(self) -> Format:
    """The format with these options.

    Raises:
      InputError: an option is out of range.
    """
    given = {name: getattr(self, name) for name in self._names()}
    given = {name: value for name, value in given.items() if value is not None}
    return registry_class(self.format)(**given)

  @property
  def static_activations(self) -> bool:
    """Whether activations have scales from calibration."""
    return self.activation_scale not in (None, DYNAMIC)

  @property
  def collect(self) -> tuple[str, ...]:
    """Statistics of calibration that the options need: of weights.weight.COLLECTED."""
    if not self.static_activations:
      return ()
    return ("moments",) if self.activation_scale == "absmax" else ("histogram",)

  @staticmethod
  def _names() -> list[str]:
    """The options, without the format itself and what a subclass adds."""
    names = [field.name for field in dataclasses.fields(FormatOptions)]
    return [name for name in names if name != "format"]


def registry_class(name: str) -> type[Format]:
  """The class of a format.

  Raises:
    InputError: there is none of that name.
  """
  return registry.find(FORMATS, name, "format")
