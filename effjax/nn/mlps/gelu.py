"""The plain MLP of the Transformer with GELU: `down(gelu(up(x)))`, with biases.

Sources: Vaswani et al. 2017, arXiv:1706.03762, eq. 2, with Hendrycks and Gimpel 2016,
arXiv:1606.08415, in place of ReLU, as in BERT (arXiv:1810.04805: exact GELU, four times
the width) and GPT-2 (tanh form); no deviations.
"""

import dataclasses

import jax
from flax import linen as nn

from effjax.core import config
from effjax.core.shard import shard
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeluOptions:
  """Options of the GELU MLP.

  Attributes:
    hidden_dim: F, hidden units; None for four times the model width.
    approximate: the tanh form of GELU (GPT-2, ALBERT) in place of the exact one.
    bias: whether both projections add a bias.
    init_std: standard deviation of the initial matrices; None for 1 / sqrt(inputs).
  """

  hidden_dim: int | None = None
  approximate: bool = False
  bias: bool = True
  init_std: float | None = None

  def __post_init__(self):
    config.require(
      self.hidden_dim is None or self.hidden_dim > 0,
      f"hidden_dim={self.hidden_dim} must be positive",
    )
    config.require(
      self.init_std is None or self.init_std > 0,
      f"init_std={self.init_std} must be positive",
    )

  def width(self, embed_dim: int) -> int:
    """Hidden units in a model of width `embed_dim`."""
    return self.hidden_dim or 4 * embed_dim

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "GeluOptions":
    """The options with `count` hidden units."""
    del axis, embed_dim
    return dataclasses.replace(self, hidden_dim=count)


class Gelu(nn.Module):
  """Two projections with a GELU between them.

  Attributes:
    options: see GeluOptions.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given; "" where it is not one norm's.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options_cls = GeluOptions

  options: GeluOptions
  embed_dim: int
  reads: str = "mlp_norm"
  out_scale: float = 1.0

  @nn.compact
  def __call__(self, x_BLD: jax.Array, valid_BL: jax.Array | None = None) -> jax.Array:
    """`[B, L, D] -> [B, L, D]`; every token by itself, whether valid or not."""
    del valid_BL
    hidden = self.options.width(self.embed_dim)
    h_BLF = self._project(x_BLD, "up", ("embed", "mlp"), hidden, self.reads, 1.0)
    h_BLF = shard(h_BLF, ("batch", "length", "mlp"))
    h_BLF = nn.gelu(h_BLF, approximate=self.options.approximate)
    axes = ("mlp", "embed")
    # GELU is not linear in a channel's scale: `down` reads nothing that could move.
    return self._project(h_BLF, "down", axes, self.embed_dim, "", self.out_scale)

  def _project(
    self,
    x: jax.Array,
    name: str,
    axes: tuple[str, str],
    size: int,
    reads: str,
    factor: float,
  ) -> jax.Array:
    """`x @ w + b`, with the initial standard deviation times `factor`."""
    std = self.options.init_std
    if std is None:
      init = nn.initializers.variance_scaling(factor**2, "fan_in", "normal")
    else:
      init = nn.initializers.normal(std * factor)
    w = weight_lib.weight(self, name, init, (x.shape[-1], size), axes=axes, reads=reads)
    y = verbs.contract(x, w)
    if not self.options.bias:
      return y
    b = weight_lib.weight(
      self,
      f"{name}_bias",
      nn.initializers.zeros,
      (size,),
      axes=axes[1:],
      kind="bias",
    )
    bias = verbs.dense(b).astype(y.dtype)
    return y + bias[None, None, :]


TECHNIQUE = Gelu
