"""Mamba-2: a selective state-space model with one decay per head (SSD).

Source: Dao and Gu 2024, arXiv:2405.21060, sections 5 to 7; defaults of mamba_ssm's
`Mamba2` (expand 2, 4 taps, A ~ U(1, 16), dt log-uniform in [1e-3, 1e-1]).
Deviations: the projections of z, x, B, C and dt, and the convolutions of x, B and C,
are separate weights, which is the same function as one fused weight each.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config
from effjax.core.shard import shard
from effjax.nn import norm, step_size
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _recurrent
from effjax.ops.recurrence import api as recurrence_ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Options:
  """Options of Mamba-2.

  Attributes:
    inner_dim: inner channels; None for `expand` times the model width.
    expand: inner channels over model width.
    head_dim: P, channels of a head; divides the inner channels.
    state_dim: N, size of the state per channel.
    num_groups: groups of heads that share B and C; divides the heads.
    conv_taps: length of the short causal convolution (tokens).
    norm_eps: added to the mean squares of each group's channels.
    chunk: tokens processed by matrix products at a time; does not change results.
    dt_min: smallest initial step size.
    dt_max: largest initial step size.
  """

  inner_dim: int | None = None
  expand: int = 2
  head_dim: int = 64
  state_dim: int = 128
  num_groups: int = 1
  conv_taps: int = 4
  norm_eps: float = 1e-5
  chunk: int = 256
  dt_min: float = 1e-3
  dt_max: float = 1e-1

  def __post_init__(self):
    for name in ("expand", "head_dim", "state_dim", "num_groups", "chunk"):
      config.require(getattr(self, name) > 0, f"{name} must be positive")
    config.require(self.conv_taps > 1, "conv_taps must be at least 2")
    config.require(self.norm_eps > 0, f"norm_eps={self.norm_eps} must be positive")
    config.require(
      0 < self.dt_min < self.dt_max, "dt_min must be positive and below dt_max"
    )

  def width(self, embed_dim: int) -> int:
    """Inner channels in a model of width `embed_dim`; checks the divisions."""
    inner = self.inner_dim or self.expand * embed_dim
    config.require(
      inner % self.head_dim == 0,
      f"mamba2 head_dim={self.head_dim} must divide its {inner} inner channels",
    )
    heads = inner // self.head_dim
    config.require(
      heads % self.num_groups == 0,
      f"mamba2 num_groups={self.num_groups} must divide its {heads} heads",
    )
    return inner

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "Mamba2Options":
    """The options with `count` heads, or groups of them.

    A head that is zero counts in the mean square of its group's norm, one that is gone
    does not: `norm_eps` grows by what the mean does, and so has to the norm's scale.
    """
    heads, groups = self.width(embed_dim) // self.head_dim, self.num_groups
    if axis == "state":
      inner = heads // groups * count * self.head_dim
      return dataclasses.replace(self, inner_dim=inner, num_groups=count)
    return dataclasses.replace(
      self, inner_dim=count * self.head_dim, norm_eps=self.norm_eps * heads / count
    )


class Mamba2(_recurrent.RecurrentMixer):
  """Mamba-2 mixer; causal by construction."""

  options_cls = Mamba2Options

  def _mix(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None,
    positions: jax.Array,
    segments: jax.Array,
  ) -> _recurrent.Mixed:
    del positions  # the recurrence knows order
    opts = self.options
    inner = opts.width(self.embed_dim)
    heads, groups = inner // opts.head_dim, opts.num_groups
    lead = x_BLD.shape[:2]

    # Each group of heads has one B and C.
    grouped = {"parts": groups, "within": "state"}
    z_BLI = self._project(x_BLD, "z", inner, "inner", opts.head_dim, grouped)
    streams, conv = {}, {}
    for name, (size, axis) in self._conv_channels().items():
      inside = axis == "inner"
      head = (opts.head_dim, grouped) if inside else (opts.state_dim,)
      stream = self._project(x_BLD, name, size, axis, *head)
      streams[name], conv[name] = self._convolve(
        stream, name, axis, state, segments, bias=True
      )
    dt_bias = self._per_head(
      "dt_bias", step_size.bias_init(opts.dt_min, opts.dt_max), heads
    )
    a_log = self._per_head("a_log", _a_log_init, heads)
    skip = self._per_head("d", nn.initializers.ones, heads)
    dt_BLH = self._project(
      x_BLD, "dt", heads, "ssm_heads", grouping=_recurrent.one_each(heads)
    ).astype(jnp.float32)
    dt_BLH = nn.softplus(dt_BLH + dt_bias[None, None, :])

    x_BLHP = streams["x"].reshape(*lead, heads, opts.head_dim)
    x_BLHP = shard(x_BLHP, ("batch", "length", "inner", None))
    y_BLHP, memory_BHPN = recurrence_ops.ssd(
      x_BLHP,
      dt_BLH,
      -jnp.exp(a_log),
      streams["b"].reshape(*lead, groups, opts.state_dim),
      streams["c"].reshape(*lead, groups, opts.state_dim),
      segments_BL=segments,
      initial_state_BHPN=_recurrent.memory(state),
      chunk=opts.chunk,
    )
    y_BLHP = y_BLHP.astype(x_BLHP.dtype)
    y_BLHP = y_BLHP + x_BLHP * skip.astype(x_BLHP.dtype)[None, None, :, None]
    y_BLI = y_BLHP.reshape(*lead, inner) * nn.silu(z_BLI)
    y_BLI = norm.RMSNorm("inner", opts.norm_eps, groups, name="norm")(y_BLI)
    return self._output(y_BLI, "out", "norm", opts.head_dim), memory_BHPN, conv

  @nn.nowrap
  def _conv_channels(self) -> dict[str, tuple[int, str]]:
    state_channels = self.options.num_groups * self.options.state_dim
    return {
      "x": (self.options.width(self.embed_dim), "inner"),
      "b": (state_channels, "state"),
      "c": (state_channels, "state"),
    }

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty state; its size does not depend on `max_len`."""
    del max_len
    opts = self.options
    heads = opts.width(self.embed_dim) // opts.head_dim
    return recurrent.init(
      batch,
      (heads, opts.head_dim, opts.state_dim),
      opts.conv_taps,
      {name: size for name, (size, _) in self._conv_channels().items()},
      jnp.dtype(dtype),
    )


def _a_log_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
  """Log of decay rates drawn from U(1, 16)."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


TECHNIQUE = Mamba2
