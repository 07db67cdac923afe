"""Mamba: a selective state-space model with decays of its own for every channel.

Source: Gu and Dao 2023, arXiv:2312.00752, sections 3.2 to 3.6 and E.2 (algorithm 2,
figure 3); defaults of mamba_ssm's `Mamba` (16 states, 4 taps with bias, expand 2, rank
of dt ceil(D / 16), A = -1 ... -N, dt log-uniform in [1e-3, 1e-1], D = 1).
Deviations: the projections of x and z, and those of B, C and dt, are separate weights,
which is the same function as one fused weight each; the output projection is drawn
normal, like that of every mixer here.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config
from effjax.core.shard import shard
from effjax.nn import norm, step_size
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _recurrent
from effjax.ops.ssm import api as ssm_ops
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba1Options:
  """Options of Mamba.

  Attributes:
    inner_dim: I, inner channels; None for `expand` times the model width.
    expand: inner channels over model width.
    state_dim: N, size of the state of a channel.
    dt_rank: rank of the projection to step sizes; None for a sixteenth of the model
      width, rounded up.
    conv_taps: length of the short causal convolution (tokens).
    inner_norm: RMS-normalize dt (before it is projected up), B and C, as in Jamba
      (Lieber et al. 2024, arXiv:2403.19887, section 6.4).
    norm_eps: added to their mean squares.
    chunk: tokens that follow one another unrolled; does not change results.
    dt_min: smallest initial step size.
    dt_max: largest initial step size.
  """

  inner_dim: int | None = None
  expand: int = 2
  state_dim: int = 16
  dt_rank: int | None = None
  conv_taps: int = 4
  inner_norm: bool = False
  norm_eps: float = 1e-6
  chunk: int = 8
  dt_min: float = 1e-3
  dt_max: float = 1e-1

  def __post_init__(self):
    for name in ("inner_dim", "expand", "state_dim", "dt_rank", "chunk"):
      value = getattr(self, name)
      config.require(
        value is None or value > 0, f"mamba1 {name}={value} must be positive"
      )
    config.require(
      self.conv_taps > 1, f"mamba1 conv_taps={self.conv_taps} must be at least 2"
    )
    config.require(
      self.norm_eps > 0, f"mamba1 norm_eps={self.norm_eps} must be positive"
    )
    config.require(
      0 < self.dt_min < self.dt_max,
      f"mamba1 dt_min={self.dt_min} must be positive and below dt_max={self.dt_max}",
    )

  def width(self, embed_dim: int) -> int:
    """Inner channels in a model of width `embed_dim`."""
    return self.inner_dim or self.expand * embed_dim

  def rank(self, embed_dim: int) -> int:
    """Rank of the projection to step sizes in a model of width `embed_dim`."""
    return self.dt_rank or math.ceil(embed_dim / 16)

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "Mamba1Options":
    """The options with `count` inner channels."""
    del axis, embed_dim
    return dataclasses.replace(self, inner_dim=count)


class Mamba1(_recurrent.RecurrentMixer):
  """Mamba mixer; causal by construction."""

  options_cls = Mamba1Options

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
    z_BLI = self._project(x_BLD, "z", inner, "inner")
    x_BLI = self._project(x_BLD, "x", inner, "inner")
    x_BLI, kept_BKI = self._convolve(x_BLI, "x", "inner", state, segments, bias=True)
    y_BLI, memory_BNI = ssm_ops.selective_scan(
      x_BLI,
      self._step_sizes(x_BLI),
      -jnp.exp(self._ssm("a_log", _a_log_init, (opts.state_dim, inner))),
      self._from_inner(x_BLI, "b", opts.state_dim, "state"),
      self._from_inner(x_BLI, "c", opts.state_dim, "state"),
      segments_BL=segments,
      initial_state_BNI=_recurrent.memory(state),
      chunk=opts.chunk,
    )
    skip_I = self._ssm("d", nn.initializers.ones, (inner,)).astype(x_BLI.dtype)
    y_BLI = (y_BLI + x_BLI * skip_I[None, None, :]) * nn.silu(z_BLI)
    y_BLI = shard(y_BLI, ("batch", "length", "inner"))
    return self._output(y_BLI, "out", None), memory_BNI, {"x": kept_BKI}

  def _from_inner(self, x_BLI: jax.Array, name: str, size: int, axis: str) -> jax.Array:
    """The inner channels through a weight: `[B, L, I] -> [B, L, size]`."""
    w = weight_lib.weight(
      self,
      name,
      nn.initializers.lecun_normal(),
      (x_BLI.shape[-1], size),
      axes=("inner", axis),
    )
    y = shard(verbs.contract(x_BLI, w), ("batch", "length", axis))
    if not self.options.inner_norm:
      return y
    return norm.RMSNorm(axis, self.options.norm_eps, name=f"{name}_norm")(y)

  def _step_sizes(self, x_BLI: jax.Array) -> jax.Array:
    """A projection of low rank, its bias and softplus (section 3.6), in float32."""
    opts = self.options
    inner, rank = opts.width(self.embed_dim), opts.rank(self.embed_dim)
    low_BLR = self._from_inner(x_BLI, "dt_down", rank, "dt_rank")
    up = weight_lib.weight(
      self,
      "dt_up",
      nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # +- rank^-1/2
      (rank, inner),
      axes=("dt_rank", "inner"),
      reads="dt_down_norm" if opts.inner_norm else "dt_down",
    )
    bias = weight_lib.weight(
      self,
      "dt_bias",
      step_size.bias_init(opts.dt_min, opts.dt_max),
      (inner,),
      axes=("inner",),
      kind="ssm",
    )
    dt_BLI = verbs.contract(low_BLR, up).astype(jnp.float32)
    return nn.softplus(dt_BLI + verbs.dense(bias)[None, None, :])

  def _ssm(self, name: str, init: weight_lib.Init, shape: tuple[int, ...]) -> jax.Array:
    axes = ("state", "inner")[-len(shape) :]
    return verbs.dense(
      weight_lib.weight(self, name, init, shape, axes=axes, kind="ssm")
    )

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty state; its size does not depend on `max_len`."""
    del max_len
    opts = self.options
    inner = opts.width(self.embed_dim)
    return recurrent.init(
      batch,
      (opts.state_dim, inner),
      opts.conv_taps,
      {"x": inner},
      jnp.dtype(dtype),
    )


def _a_log_init(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike) -> jax.Array:
  """The n-th state of every channel starts at log n (S4D-Real, section 3.6)."""
  del key
  n = jnp.arange(1, shape[0] + 1, dtype=dtype)
  return jnp.broadcast_to(jnp.log(n)[:, None], shape)


TECHNIQUE = Mamba1
