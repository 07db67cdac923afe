"""Round-to-nearest quantization: each weight to the closest point of its grid.

Source: the baseline of every quantization paper, for example Dettmers and Zettlemoyer
2022, arXiv:2212.09720, section 3. Grid: symmetric scale absmax / (2^(bits-1) - 1), or
asymmetric between minimum and maximum; per output channel or per group of inputs.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import config, errors, select, technique
from effjax.core import tree as tree_lib
from effjax.ops.matmul import rounding
from effjax.weights import leaf as leaf_lib
from effjax.weights.leaves import low_rank, masked, quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class RTNOptions:
  """Options of round-to-nearest quantization.

  Attributes:
    bits: bits a code: 2, 3, 4, 5, 6 or 8.
    group: consecutive inputs that share a scale; 0 for the whole input axis (one scale
      per output channel).
    symmetric: no zero points.
    activations: "int8" quantizes activations too, per token while running, and executes
      int8 products; needs group=0 and symmetric.
    grid: convention of a symmetric grid: "narrow" absmax / (2^(bits-1) - 1), "half"
      absmax / (2^(bits-1) - 0.5), "wide" absmax / 2^(bits-1).
    scale_dtype: dtype of the scales.
  """

  bits: int = 8
  group: int = 0
  symmetric: bool = True
  activations: str = "none"
  grid: str = "narrow"
  scale_dtype: str = "float32"

  def __post_init__(self):
    config.require(
      self.bits in quantized.BITS, f"bits={self.bits} must be one of {quantized.BITS}"
    )
    config.require(self.group >= 0, f"group={self.group} must be 0 or positive")
    if self.activations not in quantized.ACTIVATIONS:
      raise errors.unknown("activations", self.activations, quantized.ACTIVATIONS)
    config.require(
      self.activations == "none" or (self.group == 0 and self.symmetric),
      "activations='int8' needs group=0 and symmetric=True: an int8 product has one "
      "scale per output channel",
    )
    if self.grid not in rounding.GRIDS:
      raise errors.unknown("grid", self.grid, rounding.GRIDS)
    allowed = ("float32", "float16", "bfloat16")
    if self.scale_dtype not in allowed:
      raise errors.unknown("scale_dtype", self.scale_dtype, allowed)


def quantize(
  params: Mapping[str, Any],
  specs: Mapping[str, Any],
  stats: Any,
  paths: Collection[str],
  options: RTNOptions,
) -> dict[str, Any]:
  """Replaces the selected parameters by `Quantized` leaves, one at a time.

  A `Masked` parameter stays masked: its values are quantized, and a symmetric grid has
  an exact zero. Of a `LowRank` one each factor is quantized.
  """
  del stats

  def one(path: str, leaf: Any, spec: Any) -> Any:
    if path not in paths:
      return leaf
    if spec.kind not in ("matrix", "embedding"):
      raise errors.InputError(
        f"rtn cannot quantize {path} of kind {spec.kind!r}; it takes matrix, embedding"
      )
    if isinstance(leaf, masked.Masked):
      values = _quantize(path, leaf.dense(), spec, options)
      return dataclasses.replace(leaf, values=values)
    if isinstance(leaf, low_rank.LowRank) and not any(
      map(leaf_lib.is_leaf_kind, (leaf.left, leaf.right))
    ):
      left, right = (
        _quantize(f"{path}.{name}", getattr(leaf, name), spec, options)
        for name in ("left", "right")
      )
      return low_rank.LowRank.create(left, right)
    if leaf_lib.is_leaf_kind(leaf):
      raise errors.InputError(
        f"{path} is already a {leaf.kind} leaf; start this stage after a plain one"
      )
    return _quantize(path, leaf, spec, options)

  return tree_lib.map_leaves(one, params, specs)


def _quantize(path: str, w: jax.Array, spec: Any, options: RTNOptions) -> Any:
  try:
    return _quantize_array(w, -1 if spec.kind == "embedding" else -2, options)
  except errors.InputError as error:
    raise errors.InputError(f"{path}: {error}") from None


@functools.partial(jax.jit, static_argnames=("axis", "options"))
def _quantize_array(w: jax.Array, axis: int, options: RTNOptions) -> Any:
  """One array, under jit so that it keeps its sharding and needs no second copy."""
  columns = w if axis == -2 else jnp.swapaxes(w, -1, -2)
  codes, scale, zero = rounding.quantize_groups(
    columns,
    options.bits,
    options.group,
    options.symmetric,
    grid=options.grid,
    scale_dtype=jnp.dtype(options.scale_dtype),
  )
  parts = [codes, scale, zero]
  if axis == -1:
    parts = [None if p is None else jnp.swapaxes(p, -1, -2) for p in parts]
  return quantized.Quantized.create(
    *parts,
    bits=options.bits,
    axis=axis,
    activations=options.activations,
    dtype=w.dtype,
  )


TECHNIQUE = technique.Transform(
  fn=quantize,
  options_cls=RTNOptions,
  default_where=select.Where(kind=("matrix",)),
)
