"""What the linear attentions share: projections to heads and back, options, a state.

P is the size of a value head, N the number of features of a head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config, errors
from effjax.core.shard import shard
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _recurrent
from effjax.ops.attention import rope as rope_lib
from effjax.ops.linear_attention import api as linear_ops
from effjax.weights import verbs
from effjax.weights import weight as weight_lib

POSITIONS = ("none", "rope")


class Features(NamedTuple):
  """What linear attention works on, `[B, L, H, N]` each.

  Attributes:
    q: features of the queries.
    k: features of the keys.
    rotated: both as they enter the numerator, where that differs.
  """

  q: jax.Array
  k: jax.Array
  rotated: tuple[jax.Array, jax.Array] | None = None


class LinearMixer(_recurrent.RecurrentMixer):
  """A linear attention with a normalizer; a subclass gives the features.

  Attributes:
    options: of the subclass: num_heads, head_dim, rope_theta and chunk at least.
    eps: added to the normalizer.
  """

  bidirectional = True
  eps = 0.0

  def _mix(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None,
    positions: jax.Array,
    segments: jax.Array,
  ) -> _recurrent.Mixed:
    opts = self.options
    q_BLHK, k_BLHK, v_BLHP = (
      project(self, x_BLD, weight, opts.num_heads, opts.head_dim)
      for weight in ("q", "k", "v")
    )
    found = self._features(q_BLHK, k_BLHK, positions, state is not None)
    y_BLHP, memory_BHPN = linear_ops.linear_attention(
      found.q,
      found.k,
      v_BLHP,
      is_causal=self.causal,
      rotated=found.rotated,
      segments_BL=segments,
      initial_state_BHPN=_recurrent.memory(state),
      chunk=opts.chunk,
      eps=self.eps,
    )
    return output(self, y_BLHP), memory_BHPN, {}

  def _features(
    self, q_BLHK: jax.Array, k_BLHK: jax.Array, positions: jax.Array, decoding: bool
  ) -> Features:
    """Features of projected queries and keys `[B, L, H, K]`."""
    raise TypeError(f"{type(self).__name__} does not define _features()")

  def _rotated(
    self, q_BLHK: jax.Array, k_BLHK: jax.Array, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    opts = self.options
    angles = rope_lib.angles(positions, opts.head_dim, opts.rope_theta)
    return rope_lib.rotate(q_BLHK, *angles), rope_lib.rotate(k_BLHK, *angles)

  @nn.nowrap
  def num_features(self) -> int:
    """Features of a head."""
    raise TypeError(f"{type(self).__name__} does not define num_features()")

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty float32 state; its size does not depend on `max_len`."""
    del max_len, dtype
    opts = self.options
    return init_state(batch, opts.num_heads, opts.head_dim + 1, self.num_features())


def check_options(options: Any) -> None:
  """Raises InputError unless sizes are positive and the position is known."""
  fields = ("num_heads", "head_dim", "chunk", "num_features", "value_dim")
  for name in fields:
    value = getattr(options, name, None)
    config.require(value is None or value > 0, f"{name}={value} must be positive")
  position = getattr(options, "position", "rope")
  if position not in POSITIONS:
    raise errors.unknown("position", position, POSITIONS)
  head_dim = options.head_dim
  config.require(
    position != "rope" or head_dim % 2 == 0,
    f"head_dim={head_dim} must be even for rotary positions",
  )


def project(
  module: nn.Module,
  x_BLD: jax.Array,
  name: str,
  num_heads: int,
  head_dim: int,
  axis: str = "heads",
) -> jax.Array:
  """A weight of the module, applied: `[B, L, D] -> [B, L, H, head_dim]`."""
  w = weight_lib.weight(
    module,
    name,
    nn.initializers.lecun_normal(),
    (x_BLD.shape[-1], num_heads * head_dim),
    axes=("embed", axis),
    head_dim=head_dim,
    reads=module.reads,
  )
  y = verbs.contract(x_BLD, w).reshape(*x_BLD.shape[:2], num_heads, head_dim)
  return shard(y, ("batch", "length", axis, None))


def output(
  module: nn.Module,
  y_BLHP: jax.Array,
  axis: str = "heads",
  reads: str | None = "v",
) -> jax.Array:
  """The module's weight `o`, applied to merged heads: `[B, L, H, P] -> [B, L, D]`."""
  num_heads, head_dim = y_BLHP.shape[2:]
  y_BLHP = shard(y_BLHP, ("batch", "length", axis, None))
  o = weight_lib.weight(
    module,
    "o",
    nn.initializers.variance_scaling(module.out_scale**2, "fan_in", "normal"),
    (num_heads * head_dim, module.embed_dim),
    axes=(axis, "embed"),
    head_dim=head_dim,
    reads=reads,
  )
  return verbs.contract(y_BLHP.reshape(*y_BLHP.shape[:2], -1), o)


def init_state(
  batch: int, num_heads: int, num_values: int, num_features: int
) -> recurrent.RecurrentState:
  """An empty state: a matrix `[num_values, num_features]` a row and head."""
  shape = (num_heads, num_values, num_features)
  return recurrent.init(batch, shape, 1, {}, jnp.float32)
