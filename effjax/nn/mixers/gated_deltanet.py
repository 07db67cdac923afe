"""Gated DeltaNet: the delta rule on a memory that also forgets.

Source: Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464, section 3; defaults of
flash-linear-attention's `GatedDeltaNet` (6 heads, keys three quarters as wide as the
model, value heads twice as large as key heads, 4 taps without bias, A ~ U(0, 16), dt
log-uniform in [1e-3, 1e-1]). More value heads than key heads are those of Qwen3-Next.
Deviations: queries, keys, values and gate, and their convolutions, are separate
weights, which is the same function as one fused weight each.
Letters: G key heads, H value heads, K and V sizes of a key and of a value head.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config
from effjax.nn import norm, step_size
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _recurrent
from effjax.ops.recurrence import api as recurrence_ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetOptions:
  """Options of Gated DeltaNet.

  Attributes:
    num_heads: G, query and key heads.
    num_value_heads: H, value heads, a multiple of G; None for G.
    head_dim: K, size of a query and key head; None for `expand_k` times the model width
      over all key heads.
    value_dim: V, size of a value head; None for `expand_v` times K.
    expand_k: width of all keys over that of the model.
    expand_v: size of a value head over that of a key head.
    conv_taps: length of the short causal convolutions (tokens).
    chunk: tokens processed by matrix products at a time, rounded up to a power of two;
      does not change results.
    allow_neg_eigval: corrections of up to twice the error (beta in 0 to 2).
    dt_min: smallest initial step size.
    dt_max: largest initial step size.
  """

  num_heads: int = 6
  num_value_heads: int | None = None
  head_dim: int | None = None
  value_dim: int | None = None
  expand_k: float = 0.75
  expand_v: float = 2.0
  conv_taps: int = 4
  chunk: int = 64
  allow_neg_eigval: bool = False
  dt_min: float = 1e-3
  dt_max: float = 1e-1

  def __post_init__(self):
    sizes = ("num_heads", "num_value_heads", "head_dim", "value_dim", "chunk")
    for name in (*sizes, "expand_k", "expand_v"):
      value = getattr(self, name)
      config.require(value is None or value > 0, f"{name}={value} must be positive")
    config.require(
      self.value_heads % self.num_heads == 0,
      f"num_value_heads={self.num_value_heads} must be a multiple of"
      f" num_heads={self.num_heads}",
    )
    config.require(self.conv_taps > 1, f"conv_taps={self.conv_taps} must be at least 2")
    config.require(
      0 < self.dt_min < self.dt_max,
      f"dt_min={self.dt_min} must be positive and below dt_max={self.dt_max}",
    )

  @property
  def value_heads(self) -> int:
    """H."""
    return self.num_value_heads or self.num_heads

  def sizes(self, embed_dim: int) -> tuple[int, int]:
    """K and V in a model of width `embed_dim`; checks the divisions."""
    key = self.head_dim or self.expand_k * embed_dim / self.num_heads
    config.require(
      key == int(key),
      f"gated_deltanet expand_k={self.expand_k} of width {embed_dim} must be a"
      f" multiple of its num_heads={self.num_heads}",
    )
    value = self.value_dim or self.expand_v * key
    config.require(
      value == int(value),
      f"gated_deltanet expand_v={self.expand_v} times a key head of {int(key)} must be"
      " whole",
    )
    return int(key), int(value)

  def width(self, embed_dim: int) -> int:
    """Channels of all values in a model of width `embed_dim`; checks the divisions."""
    return self.value_heads * self.sizes(embed_dim)[1]

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "GatedDeltaNetOptions":
    """The options with `count` value heads, or key heads with their value heads."""
    key, value = self.sizes(embed_dim)
    keys, values = self.num_heads, count
    if axis == "heads":
      keys, values = count, self.value_heads // self.num_heads * count
    return dataclasses.replace(
      self, num_heads=keys, num_value_heads=values, head_dim=key, value_dim=value
    )


class GatedDeltaNet(_recurrent.RecurrentMixer):
  """Gated DeltaNet mixer; causal by construction."""

  options_cls = GatedDeltaNetOptions

  def _mix(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None,
    positions: jax.Array,
    segments: jax.Array,
  ) -> _recurrent.Mixed:
    del positions  # the recurrence knows order
    opts = self.options
    _, value_dim = opts.sizes(self.embed_dim)
    # Each key head serves as many value heads.
    served = {"inner": {"parts": opts.num_heads, "within": "heads"}}
    streams, conv = {}, {}
    for name, (num_heads, size, axis) in self._streams().items():
      stream_BLI = self._project(
        x_BLD, name, num_heads * size, axis, size, served.get(axis, {})
      )
      stream_BLI, conv[name] = self._convolve(
        stream_BLI, name, axis, state, segments, bias=False
      )
      streams[name] = _recurrent.split_heads(stream_BLI, size, axis)
    beta_BLH, g_BLH = self._rates(x_BLD)
    o_BLHV, memory_BHKV = recurrence_ops.delta_rule(
      recurrence_ops.unit(streams["q"]),
      recurrence_ops.unit(streams["k"]),
      streams["v"],
      2 * beta_BLH if opts.allow_neg_eigval else beta_BLH,
      g_BLH,
      segments_BL=segments,
      initial_state_BHKV=_recurrent.memory(state),
      chunk=opts.chunk,
    )
    width = opts.value_heads * value_dim
    gate_BLI = self._project(x_BLD, "gate", width, "inner", value_dim)
    o_BLHV = norm.RMSNorm(axis="head", name="norm")(o_BLHV)
    o_BLI = o_BLHV.reshape(gate_BLI.shape) * nn.silu(gate_BLI)
    return self._output(o_BLI, "o", "norm", value_dim), memory_BHKV, conv

  def _rates(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Corrections beta = sigmoid(x W_b) and g = -A softplus(x W_dt + bias), float32."""
    heads = self.options.value_heads
    beta_BLH, dt_BLH = (
      self._project(
        x_BLD, name, heads, "ssm_heads", grouping=_recurrent.one_each(heads)
      ).astype(jnp.float32)
      for name in ("beta", "dt")
    )
    dt_init = step_size.bias_init(self.options.dt_min, self.options.dt_max)
    dt_bias_H = self._per_head("dt_bias", dt_init, heads)
    a_log_H = self._per_head("a_log", _a_log_init, heads)
    dt_BLH = nn.softplus(dt_BLH + dt_bias_H[None, None, :])
    return nn.sigmoid(beta_BLH), -jnp.exp(a_log_H)[None, None, :] * dt_BLH

  @nn.nowrap
  def _streams(self) -> dict[str, tuple[int, int, str]]:
    """Heads, their size and the axis of each stream that is convolved."""
    key_dim, value_dim = self.options.sizes(self.embed_dim)
    keys = (self.options.num_heads, key_dim, "heads")
    return {"q": keys, "k": keys, "v": (self.options.value_heads, value_dim, "inner")}

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty state; its size does not depend on `max_len`."""
    del max_len
    return recurrent.init(
      batch,
      (self.options.value_heads, *self.options.sizes(self.embed_dim)),
      self.options.conv_taps,
      {name: heads * size for name, (heads, size, _) in self._streams().items()},
      jnp.dtype(dtype),
    )


def _a_log_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
  """Log of decay rates drawn from U(0, 16], without the 0."""
  return jnp.log(16.0) + jnp.log1p(-jax.random.uniform(key, shape, dtype))


TECHNIQUE = GatedDeltaNet
