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

from effjax.core import config
from effjax.nn.mixers import _linear_heads
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

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "PerformerOptions":
    """The options with `count` heads."""
    del axis, embed_dim
    return dataclasses.replace(self, num_heads=count)


class Performer(_linear_heads.LinearMixer):
  """Performer attention, causal or over whole documents."""

  options_cls = PerformerOptions
  eps = _EPS

  def _features(
    self, q_BLHK: jax.Array, k_BLHK: jax.Array, positions: jax.Array, decoding: bool
  ) -> _linear_heads.Features:
    if self.options.position == "rope":
      q_BLHK, k_BLHK = self._rotated(q_BLHK, k_BLHK, positions)
    w_MK = self._random_features(decoding=decoding)
    return _linear_heads.Features(
      feature_maps.favor_queries(q_BLHK, w_MK), feature_maps.favor_keys(k_BLHK, w_MK)
    )

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
  def num_features(self) -> int:
    """Features of a head."""
    return self.options.num_features


TECHNIQUE = Performer
