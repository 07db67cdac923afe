"""What the linear attentions share: projections to heads and back, and their state.

P is the size of a value head, N the number of features of a head.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import config, errors
from effjax.core.shard import shard
from effjax.nn.caches import recurrent
from effjax.ops.linear_attention import api as linear_ops
from effjax.weights import verbs
from effjax.weights import weight as weight_lib

POSITIONS = ("none", "rope")


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


def check_call(name: str, module: Any, state: Any, shared: Any) -> None:
  """Raises InputError for what no mixer of this kind can do."""
  if shared is not None:
    raise errors.InputError(f"{name} has no keys and values to share; use attention")
  if state is not None and not module.causal:
    raise errors.InputError(f"bidirectional {name} cannot decode step by step")


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


def mix(
  module: Any,
  q_BLHN: jax.Array,
  k_BLHN: jax.Array,
  v_BLHP: jax.Array,
  state: recurrent.RecurrentState | None,
  segments: jax.Array,
  *,
  rotated: tuple[jax.Array, jax.Array] | None = None,
  eps: float,
) -> tuple[jax.Array, recurrent.RecurrentState | None]:
  """Linear attention of features and values, from a state and to the next one."""
  y_BLHP, memory_BHPN = linear_ops.linear_attention(
    q_BLHN,
    k_BLHN,
    v_BLHP,
    is_causal=module.causal,
    rotated=rotated,
    segments_BL=segments if state is None else (segments > 0).astype(jnp.int32),
    initial_state_BHPN=None if state is None else state.memory,
    chunk=module.options.chunk,
    eps=eps,
  )
  if state is not None:
    state = recurrent.grown(state, memory_BHPN, {}, segments > 0)
  return y_BLHP, state


def init_state(
  batch: int, num_heads: int, num_values: int, num_features: int
) -> recurrent.RecurrentState:
  """An empty state: a matrix `[num_values, num_features]` a row and head."""
  shape = (num_heads, num_values, num_features)
  return recurrent.init(batch, shape, 1, {}, jnp.float32)
