"""What the MX formats share: a power of two for every 32 inputs."""

import dataclasses
from typing import Any

import jax

from effjax.core import config, errors
from effjax.ops.matmul import tables
from effjax.weights.formats import _tabled, base
from effjax.weights.leaves import coded

_SCALES = "e8m0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Microscaled(_tabled.Tabled):
  """Small floats times a power of two, which takes 8 bits.

  Attributes:
    group: consecutive inputs that share a power of two.
    scale_rule: how it is chosen, see ops.matmul.tables.power_of_two.
  """

  group: int = 32
  scale_rule: str = "floor"

  def __post_init__(self):
    config.require(self.group >= 0, f"group={self.group} must be 0 or positive")
    if self.scale_rule not in tables.RULES:
      raise errors.unknown("scale_rule", self.scale_rule, tables.RULES)

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """Exponents."""
    del outer
    largest = _tabled.absmax(x, shrink)
    return {"scale": tables.power_of_two(largest, self.table, self.scale_rule)}

  def scale(self, grid: base.Grid) -> jax.Array:
    """The powers of two."""
    return tables.decode(grid["scale"], _SCALES)

  def held_scale(self, grid: base.Grid, axis: int) -> coded.Coded:
    """Their exponents."""
    return coded.Coded.create(base.held(grid["scale"], axis), table=_SCALES, axis=axis)
