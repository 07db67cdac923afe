"""Linear attention: softmax replaced by products of the features elu(x) + 1.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, eq. 5 to 12; heads of 64 as there.
The normalizer gets 1e-10, as in flash-linear-attention (the authors' code: 1e-6).
Deviations: no biases in the projections; `position="rope"` (off by default) rotates the
features in the numerator and not in the normalizer, after Su et al. 2021,
arXiv:2104.09864, eq. 19, and takes one more pass.

The paper's models add positions to the embeddings. The decoder here does not: without
rotation only the causal mask tells order, and without a mask nothing does.
"""

import dataclasses

import jax
from flax import linen as nn

from effjax.nn.mixers import _linear_heads
from effjax.ops.linear_attention import feature_maps

_EPS = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionOptions:
  """Options of linear attention.

  Attributes:
    num_heads: H.
    head_dim: K, size of a head, and of its features (even for rotary positions).
    position: "none", or "rope" to rotate the features of the numerator.
    rope_theta: base of the rotary wavelengths.
    chunk: tokens processed by matrix products at a time; does not change results.
  """

  num_heads: int = 4
  head_dim: int = 64
  position: str = "none"
  rope_theta: float = 10_000.0
  chunk: int = 64

  def __post_init__(self):
    _linear_heads.check_options(self)

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "LinearAttentionOptions":
    """The options with `count` heads."""
    del axis, embed_dim
    return dataclasses.replace(self, num_heads=count)


class LinearAttention(_linear_heads.LinearMixer):
  """Linear attention, causal or over whole documents."""

  options_cls = LinearAttentionOptions
  eps = _EPS

  def _features(
    self, q_BLHK: jax.Array, k_BLHK: jax.Array, positions: jax.Array, decoding: bool
  ) -> _linear_heads.Features:
    del decoding
    q_BLHK = feature_maps.elu_plus_one(q_BLHK)
    k_BLHK = feature_maps.elu_plus_one(k_BLHK)
    rotated = None
    if self.options.position == "rope":
      rotated = self._rotated(q_BLHK, k_BLHK, positions)
    return _linear_heads.Features(q_BLHK, k_BLHK, rotated)

  @nn.nowrap
  def num_features(self) -> int:
    """Features of a head."""
    return self.options.head_dim


TECHNIQUE = LinearAttention
