"""SwiGLU: a gated MLP, `down(silu(gate(x)) * up(x))`.

Source: Shazeer 2020, arXiv:2002.05202, eq. 6 (FFN_SwiGLU, no biases); no deviations.
"""

import dataclasses

import jax
from flax import linen as nn

from effjax.core import config
from effjax.core.shard import shard
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLUOptions:
  """Options of the SwiGLU MLP.

  Attributes:
    hidden_dim: F, hidden units; None for 8/3 of the model width, rounded up to a
      multiple of 32.
  """

  hidden_dim: int | None = None

  def __post_init__(self):
    config.require(
      self.hidden_dim is None or self.hidden_dim > 0,
      f"hidden_dim={self.hidden_dim} must be positive",
    )

  def width(self, embed_dim: int) -> int:
    """Hidden units in a model of width `embed_dim`."""
    return self.hidden_dim or -(-8 * embed_dim // 96) * 32

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "SwiGLUOptions":
    """The options with `count` hidden units."""
    del axis, embed_dim
    return dataclasses.replace(self, hidden_dim=count)


class SwiGLU(nn.Module):
  """Gated MLP.

  Attributes:
    options: see SwiGLUOptions.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options_cls = SwiGLUOptions

  options: SwiGLUOptions
  embed_dim: int
  reads: str = "mlp_norm"
  out_scale: float = 1.0

  @nn.compact
  def __call__(self, x_BLD: jax.Array, valid_BL: jax.Array | None = None) -> jax.Array:
    """`[B, L, D] -> [B, L, D]`; every token by itself, whether valid or not."""
    del valid_BL
    shape = (self.embed_dim, self.options.width(self.embed_dim))
    init = nn.initializers.lecun_normal()
    axes = ("embed", "mlp")
    gate, up = (
      weight_lib.weight(self, name, init, shape, axes=axes, reads=self.reads)
      for name in ("gate", "up")
    )
    down = weight_lib.weight(
      self,
      "down",
      nn.initializers.variance_scaling(self.out_scale**2, "fan_in", "normal"),
      shape[::-1],
      axes=axes[::-1],
      reads="up",
    )
    h_BLF = nn.silu(verbs.contract(x_BLD, gate)) * verbs.contract(x_BLD, up)
    h_BLF = shard(h_BLF, ("batch", "length", "mlp"))
    return verbs.contract(h_BLF, down)


TECHNIQUE = SwiGLU
