"""S4D: a diagonal state-space model, the same at every position.

Source: Gu et al. 2022, arXiv:2206.11893, S4D-Lin (A_n = -1/2 + i pi n) with the
zero-order hold, and the block of its published code: the state space on every channel
of the input, a skip D, GELU (exact), and a linear map with GLU.
Deviations: no dropout (that code's default is none); the two halves in front of the GLU
are separate weights, which is the same function as one fused weight; C and D are not
decayed either; the two-sided form is left out. `effjax/ops/ssm/s4d.py` says how the
convolution is computed, and when which form runs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config
from effjax.core.shard import shard
from effjax.nn import step_size
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _recurrent
from effjax.ops.ssm import api as ssm_ops
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class S4DOptions:
  """Options of S4D.

  Attributes:
    state_dim: real size of the state of a channel, in conjugate pairs (even).
    chunk: tokens processed by matrix products at a time; does not change results.
    dt_min: smallest initial step size.
    dt_max: largest initial step size.
  """

  state_dim: int = 64
  chunk: int = 32
  dt_min: float = 1e-3
  dt_max: float = 1e-1

  def __post_init__(self):
    config.require(
      self.state_dim > 0 and self.state_dim % 2 == 0,
      f"s4d state_dim={self.state_dim} must be positive and even",
    )
    config.require(self.chunk > 0, f"s4d chunk={self.chunk} must be positive")
    config.require(
      0 < self.dt_min < self.dt_max,
      f"s4d dt_min={self.dt_min} must be positive and below dt_max={self.dt_max}",
    )


class S4D(_recurrent.RecurrentMixer):
  """S4D mixer; causal by construction.

  Its channels are those of the model: nothing is projected before the state space.
  """

  options_cls = S4DOptions

  def _mix(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None,
    positions: jax.Array,
    segments: jax.Array,
  ) -> _recurrent.Mixed:
    del positions  # the recurrence knows order
    y_BLD, memory = self._state_space(x_BLD, state, segments)
    y_BLD = nn.gelu(y_BLD, approximate=False)
    value_BLD = self._linear(y_BLD, "out", self.out_scale)
    y_BLD = value_BLD * nn.sigmoid(self._linear(y_BLD, "gate", 1.0))
    return y_BLD, memory, {}

  def _state_space(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None,
    segments: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """The state space and its skip connection, and the new memory."""
    opts, width = self.options, self.embed_dim
    pairs = opts.state_dim // 2
    normal = nn.initializers.normal
    log_dt = step_size.log_init(opts.dt_min, opts.dt_max)
    dt_D = jnp.exp(self._ssm("log_dt", log_dt, (width,)))
    a_log_real_ND = self._ssm(
      "a_log_real", nn.initializers.constant(np.log(0.5)), (pairs, width)
    )
    a_imag_ND = self._ssm("a_imag", _a_imag_init, (pairs, width))
    # Standard complex normal numbers: variance 1/2 in each part.
    c_real_ND = self._ssm("c_real", normal(0.5**0.5), (pairs, width))
    c_imag_ND = self._ssm("c_imag", normal(0.5**0.5), (pairs, width))
    skip_D = self._ssm("d", normal(1.0), (width,)).astype(x_BLD.dtype)
    y_BLD, memory_B2ND = ssm_ops.s4d(
      x_BLD,
      dt_D,
      jnp.stack([-jnp.exp(a_log_real_ND), a_imag_ND]),
      jnp.stack([c_real_ND, c_imag_ND]),
      segments_BL=segments,
      initial_state_B2NI=_recurrent.memory(state),
      chunk=opts.chunk,
    )
    return y_BLD + x_BLD * skip_D[None, None, :], memory_B2ND

  def _linear(self, x_BLD: jax.Array, name: str, scale: float) -> jax.Array:
    w = weight_lib.weight(
      self,
      name,
      nn.initializers.variance_scaling(scale**2, "fan_in", "normal"),
      (self.embed_dim, self.embed_dim),
      axes=("embed", "embed"),
    )
    bias = weight_lib.weight(
      self,
      f"{name}_bias",
      nn.initializers.zeros,
      (self.embed_dim,),
      axes=("embed",),
      kind="bias",
    )
    y_BLD = verbs.contract(x_BLD, w)
    y_BLD = y_BLD + verbs.dense(bias).astype(y_BLD.dtype)[None, None, :]
    return shard(y_BLD, ("batch", "length", "embed_act"))

  def _ssm(self, name: str, init: weight_lib.Init, shape: tuple[int, ...]) -> jax.Array:
    axes = ("state", "embed")[-len(shape) :]
    return verbs.dense(
      weight_lib.weight(self, name, init, shape, axes=axes, kind="ssm")
    )

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty state; its size does not depend on `max_len`."""
    del max_len
    shape = (2, self.options.state_dim // 2, self.embed_dim)
    return recurrent.init(batch, shape, 1, {}, jnp.dtype(dtype))


def _a_imag_init(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike) -> jax.Array:
  """The n-th pair of every channel starts at pi n."""
  del key
  n = jnp.arange(shape[0], dtype=dtype)
  return jnp.broadcast_to(np.pi * n[:, None], shape)


TECHNIQUE = S4D
