"""NormalFloat4: 16 quantiles of a normal distribution, in blocks of 64.

Source: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), section 3: values normalized by
the largest magnitude of a block; and double quantization, which holds the scales, less
their mean, as 8-bit codes with one float32 scale for 256 of them: 4.127 bits a weight
in place of 4.5. Deviations: blocks are consecutive inputs of one output, and blocks of
scales consecutive outputs of one group, so that both can be sharded; the 8 bits are a
float8_e4m3fn, where bitsandbytes has a dynamic table of as many values.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from effjax.core import config, errors
from effjax.ops.matmul import rounding, tables
from effjax.weights.formats import _tabled, base
from effjax.weights.leaves import coded

_SCALES = "e4m3"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(_tabled.Tabled):
  """Quantiles times a scale.

  Attributes:
    group: consecutive inputs that share a scale; 0 for all of them.
    double_group: consecutive outputs whose scales share a scale, or fewer: the most
      that divide the outputs; 0 for no double quantization.
    scale_dtype: of scales that are not quantized themselves.
  """

  TABLE: ClassVar[str] = "nf4"

  group: int = 64
  double_group: int = 0
  scale_dtype: str = "float32"

  def __post_init__(self):
    for name in ("group", "double_group"):
      value = getattr(self, name)
      config.require(value >= 0, f"{name}={value} must be 0 or positive")
    if self.scale_dtype not in base.SCALE_DTYPES:
      raise errors.unknown("scale_dtype", self.scale_dtype, base.SCALE_DTYPES)

  @property
  def static_grids(self) -> bool:
    """Scales that share a scale are fitted together."""
    return self.double_group > 0

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """Scales, or codes of theirs with scale and mean."""
    del outer
    scale = _tabled.absmax(x, shrink)
    if not self.double_group:
      return {"scale": rounding.stored(scale, self.scale_dtype)}
    mean = rounding.ordered_mean(scale, (-1, -2, -3))
    rest = scale - mean
    size = _most(scale.shape[-1], self.double_group)
    blocks = rest.reshape(*rest.shape[:-1], -1, size)
    second = jnp.max(jnp.abs(blocks), axis=-1) / tables.LARGEST[_SCALES]
    scaled = rest / base.divisor(jnp.repeat(second, size, axis=-1))
    return {"codes": tables.encode(scaled, _SCALES), "second": second, "mean": mean}

  def scale(self, grid: base.Grid) -> jax.Array:
    """Scales as the leaf computes them."""
    if "codes" not in grid:
      return super().scale(grid)
    codes = grid["codes"]
    second = coded.spread(grid["second"], codes.shape)
    return tables.decode(codes, _SCALES) * second + grid["mean"]

  def held_scale(self, grid: base.Grid, axis: int) -> Any:
    """An array, or codes with a scale and an offset."""
    if "codes" not in grid:
      return super().held_scale(grid, axis)
    parts = (base.held(grid[name], axis) for name in ("codes", "second", "mean"))
    return coded.Coded.create(*parts, table=_SCALES, axis=axis)


def _most(size: int, limit: int) -> int:
  """The largest divisor of `size` that is not above `limit`."""
  return max(n for n in range(1, min(size, limit) + 1) if size % n == 0)


TECHNIQUE = NF4
