"""Gated linear attention: a memory that forgets each key channel as the input says.

Source: Yang et al. 2023, arXiv:2312.06635, section 4.4 (a decay of low rank, 16th root
of a sigmoid; a norm per head, then a SiLU gate); defaults of flash-linear-attention's
`GatedLinearAttention` (4 heads, keys half as wide as the model, no short convolution).
No deviations. K and V are the sizes of a key and of a value head.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config
from effjax.nn import norm
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _recurrent
from effjax.ops.recurrence import api as recurrence_ops
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAOptions:
  """Options of gated linear attention.

  Attributes:
    num_heads: H, heads.
    head_dim: K, size of a query and key head; None for `expand_k` times the model width
      over all heads.
    value_dim: V, size of a value head; None likewise by `expand_v`.
    expand_k: width of all keys over that of the model.
    expand_v: width of all values over that of the model.
    rank: of the projection to the decays.
    decay_root: r, a decay is the r-th root of a sigmoid, so that most begin near 1.
    chunk: tokens processed by matrix products at a time, rounded up to a power of two;
      does not change results.
  """

  num_heads: int = 4
  head_dim: int | None = None
  value_dim: int | None = None
  expand_k: float = 0.5
  expand_v: float = 1.0
  rank: int = 16
  decay_root: float = 16.0
  chunk: int = 64

  def __post_init__(self):
    fields = ("num_heads", "head_dim", "value_dim", "expand_k", "expand_v", "rank")
    for name in (*fields, "decay_root", "chunk"):
      value = getattr(self, name)
      config.require(value is None or value > 0, f"{name}={value} must be positive")

  def sizes(self, embed_dim: int) -> tuple[int, int]:
    """K and V in a model of width `embed_dim`; checks the divisions."""
    key = self.head_dim or _per_head("expand_k", self.expand_k, embed_dim, self)
    value = self.value_dim or _per_head("expand_v", self.expand_v, embed_dim, self)
    return key, value

  def width(self, embed_dim: int) -> int:
    """Channels of all values in a model of width `embed_dim`; checks the divisions."""
    return self.num_heads * self.sizes(embed_dim)[1]


def _per_head(name: str, expand: float, embed_dim: int, opts: GLAOptions) -> int:
  size = expand * embed_dim / opts.num_heads
  config.require(
    size == int(size),
    f"gla {name}={expand} of width {embed_dim} must be a multiple of its"
    f" num_heads={opts.num_heads}",
  )
  return int(size)


class GLA(_recurrent.RecurrentMixer):
  """Gated linear attention mixer; causal by construction."""

  options_cls = GLAOptions

  def _mix(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None,
    positions: jax.Array,
    segments: jax.Array,
  ) -> _recurrent.Mixed:
    del positions  # the recurrence knows order
    key_dim, value_dim = self.options.sizes(self.embed_dim)
    q_BLHK = self._heads(x_BLD, "q", key_dim, "heads")
    k_BLHK = self._heads(x_BLD, "k", key_dim, "heads")
    v_BLHV = self._heads(x_BLD, "v", value_dim, "inner")
    gate_BLHV = self._heads(x_BLD, "gate", value_dim, "inner")
    o_BLHV, memory_BHKV = recurrence_ops.gla(
      q_BLHK,
      k_BLHK,
      v_BLHV,
      self._log_decays(x_BLD, key_dim),
      segments_BL=segments,
      initial_state_BHKV=_recurrent.memory(state),
      chunk=self.options.chunk,
    )
    o_BLHV = norm.RMSNorm(axis="head", name="norm")(o_BLHV) * nn.silu(gate_BLHV)
    o_BLI = o_BLHV.reshape(*x_BLD.shape[:2], -1)
    return self._output(o_BLI, "o", "norm", value_dim), memory_BHKV, {}

  def _log_decays(self, x_BLD: jax.Array, key_dim: int) -> jax.Array:
    """g_BLHK = logsigmoid(x W1 W2 + b) / r, float32."""
    opts = self.options
    size = opts.num_heads * key_dim
    down = weight_lib.weight(
      self,
      "decay_down",
      nn.initializers.lecun_normal(),
      (self.embed_dim, opts.rank),
      axes=("embed", "rank"),
      reads=self.reads,
    )
    up = weight_lib.weight(
      self,
      "decay_up",
      nn.initializers.lecun_normal(),
      (opts.rank, size),
      axes=("rank", "heads"),
      reads="decay_down",
      head_dim=key_dim,
    )
    bias = weight_lib.weight(
      self, "decay_bias", nn.initializers.zeros, (size,), axes=("heads",), kind="bias"
    )
    g_BLI = verbs.contract(verbs.contract(x_BLD, down), up).astype(jnp.float32)
    g_BLI = nn.log_sigmoid(g_BLI + verbs.dense(bias)[None, None, :]) / opts.decay_root
    return g_BLI.reshape(*x_BLD.shape[:2], opts.num_heads, key_dim)

  def _heads(self, x_BLD: jax.Array, name: str, size: int, axis: str) -> jax.Array:
    """Projects to heads `[B, L, H, size]`."""
    width = self.options.num_heads * size
    y_BLI = self._project(x_BLD, name, width, axis, size)
    return _recurrent.split_heads(y_BLI, size, axis)

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty state; its size does not depend on `max_len`."""
    del max_len
    shape = (self.options.num_heads, *self.options.sizes(self.embed_dim))
    return recurrent.init(batch, shape, 1, {}, jnp.dtype(dtype))


TECHNIQUE = GLA
