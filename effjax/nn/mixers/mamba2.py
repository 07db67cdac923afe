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

from effjax.core import config, errors
from effjax.core.shard import shard
from effjax.nn import norm
from effjax.nn.caches import ssm
from effjax.ops.recurrence import api as recurrence_ops
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


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
  chunk: int = 256
  dt_min: float = 1e-3
  dt_max: float = 1e-1

  def __post_init__(self):
    for name in ("expand", "head_dim", "state_dim", "num_groups", "chunk"):
      config.require(getattr(self, name) > 0, f"{name} must be positive")
    config.require(self.conv_taps > 1, "conv_taps must be at least 2")
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


class Mamba2(nn.Module):
  """Mamba-2 mixer; causal by construction.

  Attributes:
    options: see Mamba2Options.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    causal: must be True.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options_cls = Mamba2Options

  options: Mamba2Options
  embed_dim: int
  reads: str = "mixer_norm"
  causal: bool = True
  out_scale: float = 1.0

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    state: ssm.SSMState | None = None,
    *,
    positions: jax.Array,
    segments: jax.Array,
    shared: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, ssm.SSMState | None]:
    """Mixes positions; see the mixer contract in effjax.models.decoder.

    Positions are not used: the recurrence knows order. With a state, the tokens of all
    segments but 0 continue it. `shared` must be None, there are no keys to share.
    """
    del positions
    if shared is not None:
      raise errors.InputError("mamba2 has no keys and values to share; use attention")
    if not self.causal:
      raise errors.InputError("mamba2 is causal; use attention in an encoder")
    opts = self.options
    inner = opts.width(self.embed_dim)
    heads, groups = inner // opts.head_dim, opts.num_groups
    lead = x_BLD.shape[:2]

    z_BLI = self._project(x_BLD, "z", inner, "inner")
    streams, conv_state = {}, {}
    for name, (size, axis) in self._conv_channels().items():
      stream = self._project(x_BLD, name, size, axis)
      streams[name], conv_state[name] = self._conv(
        stream, name, axis, segments, None if state is None else state.conv[name]
      )
    dt_bias = self._per_head("dt_bias", _dt_bias_init(opts), heads)
    a_log = self._per_head("a_log", _a_log_init, heads)
    skip = self._per_head("d", nn.initializers.ones, heads)
    dt_BLH = self._project(x_BLD, "dt", heads, "ssm_heads").astype(jnp.float32)
    dt_BLH = nn.softplus(dt_BLH + dt_bias[None, None, :])

    x_BLHP = streams["x"].reshape(*lead, heads, opts.head_dim)
    x_BLHP = shard(x_BLHP, ("batch", "length", "inner", None))
    y_BLHP, ssm_BHPN = recurrence_ops.ssd(
      x_BLHP,
      dt_BLH,
      -jnp.exp(a_log),
      streams["b"].reshape(*lead, groups, opts.state_dim),
      streams["c"].reshape(*lead, groups, opts.state_dim),
      segments_BL=segments if state is None else (segments > 0).astype(jnp.int32),
      initial_state_BHPN=None if state is None else state.ssm_BHPN,
      chunk=opts.chunk,
    )
    y_BLHP = y_BLHP.astype(x_BLHP.dtype)
    y_BLHP = y_BLHP + x_BLHP * skip.astype(x_BLHP.dtype)[None, None, :, None]
    y_BLI = y_BLHP.reshape(*lead, inner) * nn.silu(z_BLI)
    y_BLI = norm.RMSNorm(axis="inner", num_groups=groups, name="norm")(y_BLI)
    out = weight_lib.weight(
      self,
      "out",
      nn.initializers.variance_scaling(self.out_scale**2, "fan_in", "normal"),
      (inner, self.embed_dim),
      axes=("inner", "embed"),
      head_dim=opts.head_dim,
      reads="norm",
    )
    if state is not None:
      seen_B = jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
      state = ssm.SSMState(
        ssm_BHPN=ssm_BHPN, conv=conv_state, length_B=state.length_B + seen_B
      )
    return verbs.contract(y_BLI, out), state

  def _project(self, x_BLD: jax.Array, name: str, size: int, axis: str) -> jax.Array:
    w = weight_lib.weight(
      self,
      name,
      nn.initializers.lecun_normal(),
      (self.embed_dim, size),
      axes=("embed", axis),
      reads=self.reads,
      head_dim=self.options.head_dim if axis == "inner" else None,
    )
    return shard(verbs.contract(x_BLD, w), ("batch", "length", axis))

  def _conv(
    self,
    x_BLI: jax.Array,
    name: str,
    axis: str,
    segments: jax.Array,
    state_BKI: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array]:
    """Short causal depthwise convolution and SiLU."""
    taps, size = self.options.conv_taps, x_BLI.shape[-1]
    # The initialization of a depthwise convolution with K taps in PyTorch.
    init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", 0, 1)
    kernel = weight_lib.weight(
      self,
      f"conv_{name}",
      lambda key, shape, dtype: init(key, (shape[0], 1, *shape[1:]), dtype)[:, 0],
      (taps, size),
      axes=("taps", axis),
      kind="conv",
    )
    bias = weight_lib.weight(
      self,
      f"conv_{name}_bias",
      nn.initializers.zeros,
      (size,),
      axes=(axis,),
      kind="bias",
    )
    if state_BKI is not None:
      segments = (segments > 0).astype(jnp.int32)
    y_BLI, new_state = verbs.conv(
      x_BLI,
      kernel,
      bias_D=verbs.dense(bias).astype(x_BLI.dtype),
      segments_BL=segments,
      state_BKD=state_BKI,
    )
    return nn.silu(y_BLI), new_state

  def _per_head(self, name: str, init: weight_lib.Init, heads: int) -> jax.Array:
    w = weight_lib.weight(self, name, init, (heads,), axes=("ssm_heads",), kind="ssm")
    return verbs.dense(w)

  @nn.nowrap
  def _conv_channels(self) -> dict[str, tuple[int, str]]:
    state_channels = self.options.num_groups * self.options.state_dim
    return {
      "x": (self.options.width(self.embed_dim), "inner"),
      "b": (state_channels, "state"),
      "c": (state_channels, "state"),
    }

  @nn.nowrap
  def init_state(self, batch: int, max_len: int, dtype: DTypeLike) -> ssm.SSMState:
    """An empty state; its size does not depend on `max_len`."""
    del max_len
    opts = self.options
    heads = opts.width(self.embed_dim) // opts.head_dim
    return ssm.init(
      batch,
      (heads, opts.head_dim, opts.state_dim),
      opts.conv_taps,
      {name: size for name, (size, _) in self._conv_channels().items()},
      jnp.dtype(dtype),
    )


def _a_log_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
  """Log of decay rates drawn from U(1, 16)."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))


def _dt_bias_init(opts: Mamba2Options) -> weight_lib.Init:
  """Inverse softplus of log-uniform step sizes in [dt_min, dt_max], at least 1e-4."""

  def init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    low, high = jnp.log(opts.dt_min), jnp.log(opts.dt_max)
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    dt = jnp.maximum(dt, 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))

  return init


TECHNIQUE = Mamba2
