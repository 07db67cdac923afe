"""What the recurrent mixers share: contract, projections, convolutions.

A subclass sets `options_cls` (and `bidirectional`, if it is), computes the recurrence
in `_mix` and says in `init_state` what it remembers. H heads, I merged channels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from effjax.core import errors
from effjax.core.shard import shard
from effjax.nn import short_conv
from effjax.nn.caches import recurrent
from effjax.weights import verbs
from effjax.weights import weight as weight_lib

# The output, the memory after the last token, and the inputs kept for convolutions.
Mixed = tuple[jax.Array, Any, Mapping[str, jax.Array]]
# How the heads of a weight hang together: `parts` and `within` of its spec.
Grouping = Mapping[str, Any]
_UNGROUPED: Grouping = {}


class RecurrentMixer(nn.Module):
  """A mixer that remembers the past in a state of fixed size.

  Attributes:
    options: an `options_cls` of the subclass.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    causal: whether a position sees only itself and the past; must be True unless the
      subclass is `bidirectional`.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options: Any
  embed_dim: int
  reads: str = "mixer_norm"
  causal: bool = True
  out_scale: float = 1.0

  bidirectional = False

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None = None,
    *,
    positions: jax.Array,
    segments: jax.Array,
    shared: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, recurrent.RecurrentState | None]:
    """Mixes positions; see the mixer contract in effjax.models.decoder.

    With a state, the tokens of all segments but 0 continue it. `shared` must be None:
    there are no keys and values of full length to share.

    Raises:
      InputError: `shared` is given, a module that cannot be is not causal, or a
        bidirectional one gets a state.
    """
    name = type(self).__module__.rpartition(".")[2]
    if shared is not None:
      raise errors.InputError(f"{name} has no keys and values to share; use attention")
    if not self.causal and not self.bidirectional:
      raise errors.InputError(f"{name} is causal; use attention in an encoder")
    if not self.causal and state is not None:
      raise errors.InputError(f"bidirectional {name} cannot decode step by step")
    if state is not None:
      segments = (segments > 0).astype(jnp.int32)
    y_BLD, memory, conv = self._mix(x_BLD, state, positions, segments)
    if state is not None:
      state = recurrent.grown(state, memory, conv, segments > 0)
    return y_BLD, state

  def _mix(
    self,
    x_BLD: jax.Array,
    state: recurrent.RecurrentState | None,
    positions: jax.Array,
    segments: jax.Array,
  ) -> Mixed:
    """The recurrence, from a state if there is one."""
    raise TypeError(f"{type(self).__name__} does not define _mix()")

  def _project(
    self,
    x_BLD: jax.Array,
    name: str,
    size: int,
    axis: str,
    head_dim: int | None = None,
    grouping: Grouping = _UNGROUPED,
  ) -> jax.Array:
    """The inputs through a weight of their own: `[B, L, D] -> [B, L, size]`."""
    w = weight_lib.weight(
      self,
      name,
      nn.initializers.lecun_normal(),
      (self.embed_dim, size),
      axes=("embed", axis),
      head_dim=head_dim,
      reads=self.reads,
      **grouping,
    )
    return shard(verbs.contract(x_BLD, w), ("batch", "length", axis))

  def _convolve(
    self,
    x_BLI: jax.Array,
    name: str,
    axis: str,
    state: recurrent.RecurrentState | None,
    segments: jax.Array,
    *,
    bias: bool,
  ) -> tuple[jax.Array, jax.Array]:
    """A stream through its short convolution, and the inputs that are kept."""
    return short_conv.short_conv(
      self,
      x_BLI,
      name,
      taps=self.options.conv_taps,
      axis=axis,
      segments=segments,
      state_BKI=None if state is None else state.conv[name],
      bias=bias,
    )

  def _per_head(self, name: str, init: weight_lib.Init, num_heads: int) -> jax.Array:
    """One number a head, not decayed: `[H]` float32."""
    w = weight_lib.weight(
      self,
      name,
      init,
      (num_heads,),
      axes=("ssm_heads",),
      kind="ssm",
      **one_each(num_heads),
    )
    return verbs.dense(w)

  def _output(
    self,
    y_BLI: jax.Array,
    name: str,
    reads: str | None,
    head_dim: int | None = None,
  ) -> jax.Array:
    """The output projection: `[B, L, I] -> [B, L, D]`."""
    out = weight_lib.weight(
      self,
      name,
      nn.initializers.variance_scaling(self.out_scale**2, "fan_in", "normal"),
      (y_BLI.shape[-1], self.embed_dim),
      axes=("inner", "embed"),
      head_dim=head_dim,
      reads=reads,
    )
    return verbs.contract(y_BLI, out)


def memory(state: recurrent.RecurrentState | None) -> Any:
  """The memory to start from, or None."""
  return None if state is None else state.memory


def one_each(num_heads: int, axis: str = "inner") -> Grouping:
  """What there is once for every head of another axis."""
  return {"parts": num_heads, "within": axis}


def split_heads(x_BLI: jax.Array, head_dim: int, axis: str) -> jax.Array:
  """`[B, L, I]` as heads `[B, L, H, head_dim]`."""
  x_BLHX = x_BLI.reshape(*x_BLI.shape[:2], -1, head_dim)
  return shard(x_BLHX, ("batch", "length", axis, None))
