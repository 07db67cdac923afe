"""Which dtypes a model computes and keeps its parameters in."""

import dataclasses

import jax
import jax.numpy as jnp

from effjax.core import config

_COMPUTE = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
  """Mixed-precision policy; parameters and optimizer state are always float32.

  Attributes:
    compute: dtype of activations and of the products' operands.
    matmul: precision of float32 products: "default", "high" or "highest".
  """

  compute: str = "float32"
  matmul: str = "default"

  def __post_init__(self):
    config.require(
      self.compute in _COMPUTE,
      f"compute={self.compute!r} is not a compute dtype; available: {_COMPUTE}",
    )
    config.require(
      self.matmul in ("default", "high", "highest"),
      f"matmul={self.matmul!r} must be default, high or highest",
    )

  @property
  def dtype(self) -> jnp.dtype:
    """The compute dtype."""
    return jnp.dtype(self.compute)

  def context(self):
    """Context manager under which float32 products use the policy's precision."""
    name = None if self.matmul == "default" else self.matmul
    return jax.default_matmul_precision(name)
