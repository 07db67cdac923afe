"""Minus one, zero and one: two bits a code, with the mean magnitude as the scale.

Source: BitNet b1.58 (Ma et al. 2024, arXiv:2402.17764), eq. 1 to 3: the scale is the
mean magnitude of the matrix, codes are rounded and clipped. Deviation: a scale may also
serve a group or an output, which their kernels do not allow. Codes take two bits each,
not 1.58.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core import config, errors
from effjax.ops.matmul import rounding
from effjax.weights.formats import _uniform, base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ternary(_uniform.Uniform):
  """Codes from -1 to 1 times a scale.

  Attributes:
    group: consecutive inputs that share a scale; 0 for all of them.
    per_tensor: one scale for a whole matrix, as in the paper; needs group=0.
    scale_dtype: of the scales.
  """

  per_tensor: bool = True
  scale_dtype: str = "float32"

  def __post_init__(self):
    config.require(self.group >= 0, f"group={self.group} must be 0 or positive")
    config.require(
      not self.per_tensor or self.group == 0,
      f"group={self.group} needs per_tensor=False: ternary has one scale a matrix "
      "unless told otherwise",
    )
    if self.scale_dtype not in base.SCALE_DTYPES:
      raise errors.unknown("scale_dtype", self.scale_dtype, base.SCALE_DTYPES)

  def outer(self, x: jax.Array) -> jax.Array | None:
    """The mean magnitude of a whole matrix, where it has one scale."""
    if not self.per_tensor:
      return None
    return rounding.ordered_mean(jnp.abs(x.astype(jnp.float32)), (-1, -2, -3))

  def fit(
    self, x: jax.Array, outer: jax.Array | None = None, shrink: Any = 1.0
  ) -> dict[str, jax.Array]:
    """Scales."""
    if outer is None:
      outer = rounding.ordered_mean(jnp.abs(x.astype(jnp.float32)), (-2,))
    return {"scale": rounding.stored(outer * shrink, self.scale_dtype)}

  @property
  def code_bits(self) -> int:
    """Two."""
    return 2

  @property
  def code_range(self) -> tuple[int, int, DTypeLike]:
    """From -1 to 1."""
    return -1, 1, jnp.int8


TECHNIQUE = Ternary
