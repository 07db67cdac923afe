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

from effjax.nn import norm
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _head_sizes, _recurrent
from effjax.ops.recurrence import api as recurrence_ops
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAOptions(_head_sizes.HeadSizes):
  """Options of gated linear attention: the sizes of its heads, and these.

  Attributes:
    rank: of the projection to the decays.
    decay_root: r, a decay is the r-th root of a sigmoid, so that most begin near 1.
    chunk: tokens processed by matrix products at a time, rounded up to a power of two;
      does not change results.
  """

  mixer = "gla"

  expand_k: float = 0.5
  rank: int = 16
  decay_root: float = 16.0
  chunk: int = 64

  def __post_init__(self):
    self.check_positive("rank", "decay_root", "chunk")


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
    own = _recurrent.one_each(self.options.num_heads, "heads")
    y_BLI = self._project(
      x_BLD, name, width, axis, size, own if axis == "inner" else {}
    )
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
