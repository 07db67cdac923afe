"""NVFP4: floats e2m1 with an e4m3 scale for every 16 inputs and one of the matrix.

Source: NVIDIA's description of the format (Transformer Engine; TensorRT Model
Optimizer), in two levels: the matrix's scale is its largest magnitude over 448 * 6, so
that the scales of blocks use the whole range of e4m3; without it small weights lose
their scales, and with those everything. 4.5 bits a weight. A block's scale is not below
2^-9, the smallest number of e4m3.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from effjax.core import config
from effjax.ops.matmul import tables
from effjax.weights.formats import _tabled, base
from effjax.weights.leaves import coded

_SCALES = "e4m3"
_LEAST = 2.0**-9


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4(_tabled.Tabled):
  """Small floats times two scales.

  Attributes:
    group: consecutive inputs that share a scale of e4m3.
  """

  TABLE: ClassVar[str] = "e2m1"

  group: int = 16

  def __post_init__(self):
    config.require(self.group >= 0, f"group={self.group} must be 0 or positive")

  def outer(self, x: jax.Array) -> jax.Array:
    """The matrix's scale."""
    largest = jnp.max(_tabled.absmax(x), axis=(-1, -2, -3), keepdims=True)
    most = tables.LARGEST[_SCALES] * tables.LARGEST[self.table]
    return (largest / most).astype(jnp.float32)

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """Codes of the blocks' scales, and the matrix's."""
    whole = self.outer(x) if outer is None else outer
    largest = _tabled.absmax(x, shrink) / tables.LARGEST[self.table]
    relative = jnp.clip(largest / base.divisor(whole), _LEAST, tables.LARGEST[_SCALES])
    return {"codes": tables.encode(relative, _SCALES), "whole": whole}

  def scale(self, grid: base.Grid) -> jax.Array:
    """Both scales multiplied."""
    return tables.decode(grid["codes"], _SCALES) * grid["whole"]

  def held_scale(self, grid: base.Grid, axis: int) -> coded.Coded:
    """The blocks' scales, with the matrix's."""
    parts = (base.held(grid[name], axis) for name in ("codes", "whole"))
    return coded.Coded.create(*parts, table=_SCALES, axis=axis)


TECHNIQUE = NVFP4
