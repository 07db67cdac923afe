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
from jax.typing import DTypeLike

from effjax.nn.caches import recurrent
from effjax.nn.mixers import _linear_heads
from effjax.ops.attention import rope as rope_lib
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


class LinearAttention(nn.Module):
  """Linear attention, causal or over whole documents.

  Attributes:
    options: see LinearAttentionOptions.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    causal: whether a position sees only itself and the past.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options_cls = LinearAttentionOptions

  options: LinearAttentionOptions
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
    _linear_heads.check_call("linear_attention", self, state, shared)
    opts = self.options
    q_BLHK, k_BLHK, v_BLHK = (
      _linear_heads.project(self, x_BLD, name, opts.num_heads, opts.head_dim)
      for name in ("q", "k", "v")
    )
    q_BLHK = feature_maps.elu_plus_one(q_BLHK)
    k_BLHK = feature_maps.elu_plus_one(k_BLHK)
    rotated = None
    if opts.position == "rope":
      cos_sin = rope_lib.angles(positions, opts.head_dim, opts.rope_theta)
      rotated = tuple(rope_lib.rotate(z, *cos_sin) for z in (q_BLHK, k_BLHK))
    y_BLHK, state = _linear_heads.mix(
      self, q_BLHK, k_BLHK, v_BLHK, state, segments, rotated=rotated, eps=_EPS
    )
    return _linear_heads.output(self, y_BLHK), state

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> recurrent.RecurrentState:
    """An empty float32 state; its size does not depend on `max_len`."""
    del max_len, dtype
    opts = self.options
    return _linear_heads.init_state(
      batch, opts.num_heads, opts.head_dim + 1, opts.head_dim
    )


TECHNIQUE = LinearAttention
