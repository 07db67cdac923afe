"""Performer: softmax attention estimated by positive random features (FAVOR+).

Source: Choromanski et al. 2020, arXiv:2009.14794; defaults of the authors' code: 256
orthogonal features shared by all heads and layers, drawn anew each training step.
Deviations, in numbers only: what keeps exponentials in range cancels exactly and never
looks at other tokens (see `ops.linear_attention.feature_maps`), where the authors
subtract the maximum over all keys, the future included, and add 1e-6 to every feature,
which pulls weights towards uniform ones. Here nothing is added to features; the
normalizer gets 1e-30, so that keys whose features all underflow (entries of more than 4
times the usual size) give 0 and not 0 / 0.

Features are drawn anew where the module gets the stream "dropout", as it does in
training; elsewhere, and wherever there is a decoding state, they are those of `seed`.
Either way the kernel estimate is unbiased.

The decoder adds no positions to embeddings: without `position="rope"` only the causal
mask tells order, and without a mask nothing does. Rotated before the features, queries
and keys keep their norms, and the kernel depends on distances alone, as in softmax
attention.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config
from effjax.nn.caches import recurrent
from effjax.nn.mixers import _linear_heads
from effjax.ops.attention import rope as rope_lib
from effjax.ops.linear_attention import feature_maps, random_features

_EPS = 1e-30


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformerOptions:
  """Options of Performer attention.

  Attributes:
    num_heads: H.
    head_dim: K, size of a head (even for rotary positions).
    num_features: M, random features; the error falls with its square root.
    redraw: draw features anew in every training step.
    seed: of the fixed features, 0 or above.
    position: "none", or "rope" to rotate queries and keys.
    rope_theta: base of the rotary wavelengths.
    chunk: tokens processed by matrix products at a time; does not change results.
  """

  num_heads: int = 4
  head_dim: int = 64
  num_features: int = 256
  redraw: bool = True
  seed: int = 0
  position: str = "none"
  rope_theta: float = 10_000.0
  chunk: int = 64

  def __post_init__(self):
    _linear_heads.check_options(self)
    config.require(self.seed >= 0, f"seed={self.seed} must be 0 or above")


class Performer(nn.Module):
  """Performer attention, causal or over whole documents.

  Attributes:
    options: see PerformerOptions.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    causal: whether a position sees only itself and the past.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options_cls = PerformerOptions

  options: PerformerOptions
  embed_dim: int
  reads: str = "mixer_norm"
  causal: bool = True
  out_scale: float = 1.0

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

    With a state, the tokens of all segments but 0 continue it. `shared` must be None,
    there are no keys to share.
    """
    _linear_heads.check_call("performer", self, state, shared)
    opts = self.options
    q_BLHK, k_BLHK, v_BLHK = (
      _linear_heads.project(self, x_BLD, name, opts.num_heads, opts.head_dim)
      for name in ("q", "k", "v")
    )
    if opts.position == "rope":
      cos_sin = rope_lib.angles(positions, opts.head_dim, opts.rope_theta)
      q_BLHK, k_BLHK = (rope_lib.rotate(z, *cos_sin) for z in (q_BLHK, k_BLHK))
    w_MK = self._random_features(decoding=state is not None)
    y_BLHK, state = _linear_heads.mix(
      self,
      feature_maps.favor_queries(q_BLHK, w_MK),
      feature_maps.favor_keys(k_BLHK, w_MK),
      v_BLHK,
      state,
      segments,
      eps=_EPS,
    )
    return _linear_heads.output(self, y_BLHK), state

  def _random_features(self, *, decoding: bool) -> jax.Array:
    """Features w_MK of this call: a state holds sums of those it was begun with."""
    opts = self.options
    if opts.redraw and not decoding and self.has_rng("dropout"):
      key = self.make_rng("dropout")
      return random_features.draw(key, opts.num_features, opts.head_dim)
    return jnp.asarray(
      random_features.fixed(opts.seed, opts.num_features, opts.head_dim)
    )

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty float32 state; its size does not depend on `max_len`."""
    del max_len, dtype
    opts = self.options
    return _linear_heads.init_state(
      batch, opts.num_heads, opts.head_dim + 1, opts.num_features
    )


TECHNIQUE = Performer
