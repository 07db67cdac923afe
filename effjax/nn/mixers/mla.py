"""Multi-head latent attention: keys and values are projections of one small latent.

Source: DeepSeek-AI 2024, arXiv:2405.04434 (DeepSeek-V2), section 2.1 and eq. 37 to 47,
with the RMS norms of its section 3.1.2; YaRN and its scale of the scores as in the
released code of DeepSeek-V3 (arXiv:2412.19437).
A decoding state keeps the normalized latent and one rotated key that all heads share,
`kv_rank + rope_dim` numbers a token however many heads there are, and a step works on
them as they are (section 2.1.2): the up-projection of the keys is absorbed into the
query, that of the values follows the weighted sum.
Deviations: the down-projections to the latent and to the rotated key, and the
up-projections to keys and to values, are separate weights, which is the same function
as one fused weight each.

Local letters: R latent, J rotated entries, K other entries, P entries of a value.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config, errors
from effjax.core.shard import shard
from effjax.nn import norm
from effjax.nn.caches import latent as latent_cache
from effjax.ops.attention import api as attention_ops
from effjax.ops.attention import latent as latent_ops
from effjax.ops.attention import patterns
from effjax.ops.attention import rope as rope_lib
from effjax.ops.attention import rope_scaling as rope_scaling_lib
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAOptions:
  """Options of multi-head latent attention.

  The defaults keep DeepSeek's proportions (kv_rank four times head_dim, rope_dim half
  of it, value_dim equal to it) at a quarter of its head size. Its largest models also
  have queries of low rank, three times kv_rank; that saves activations and weights only
  where it is well below the width of the model, and DeepSeek-V2-Lite goes without.

  Attributes:
    num_heads: H.
    head_dim: K, entries of a query or key that are not rotated.
    rope_dim: J, entries that are rotated (even); the key's are shared by all heads.
    value_dim: P, entries of a value.
    kv_rank: R, entries of the latent of keys and values.
    q_rank: entries of the latent of queries; None for one full projection.
    rope_theta: base of the rotary wavelengths, over 1.
    rope_scaling: for sequences longer than the trained ones, or None.
    rope_interleaved: neighbours turn together, as in DeepSeek's weights; False turns
      halves.
    norm_eps: added to the mean squares of both latents.
    implementation: of the expanded form: "auto", or one of effjax.ops.attention.api;
      does not change results.
  """

  num_heads: int = 8
  head_dim: int = 32
  rope_dim: int = 16
  value_dim: int = 32
  kv_rank: int = 128
  q_rank: int | None = None
  rope_theta: float = 10_000.0
  rope_scaling: rope_scaling_lib.RopeScaling | None = None
  rope_interleaved: bool = True
  norm_eps: float = 1e-6
  implementation: str = "auto"

  def __post_init__(self):
    for name in ("num_heads", "head_dim", "rope_dim", "value_dim", "kv_rank"):
      value = getattr(self, name)
      config.require(value > 0, f"mla {name}={value} must be positive")
    rank = self.q_rank
    config.require(
      rank is None or rank > 0, f"mla q_rank={rank} must be positive, or None"
    )
    config.require(self.rope_dim % 2 == 0, f"mla rope_dim={self.rope_dim} must be even")
    config.require(
      self.rope_theta > 1, f"mla rope_theta={self.rope_theta} must be over 1"
    )
    config.require(self.norm_eps > 0, f"mla norm_eps={self.norm_eps} must be positive")
    if self.implementation not in attention_ops.NAMES:
      raise errors.unknown(
        "attention implementation", self.implementation, attention_ops.NAMES
      )

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "MLAOptions":
    """The options with `count` heads."""
    del axis, embed_dim
    return dataclasses.replace(self, num_heads=count)

  @property
  def score_scale(self) -> float:
    """Factor of the scores: of the head size, and of YaRN as DeepSeek has it."""
    factor = rope_scaling_lib.score_factor(self.rope_scaling)
    return factor * (self.head_dim + self.rope_dim) ** -0.5


class MultiHeadLatentAttention(nn.Module):
  """Multi-head latent attention.

  Attributes:
    options: see MLAOptions.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    causal: whether a position sees only itself and the past.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options_cls = MLAOptions

  options: MLAOptions
  embed_dim: int
  reads: str = "mixer_norm"
  causal: bool = True
  out_scale: float = 1.0

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    state: latent_cache.LatentCache | None = None,
    *,
    positions: jax.Array,
    segments: jax.Array,
    shared: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, latent_cache.LatentCache | None]:
    """Mixes positions; see the mixer contract in effjax.models.decoder.

    Without a state, and for a prompt that starts an empty one, keys and values of all
    heads are expanded, which takes fewer products; otherwise the cache is read as it
    is. That needs the up-projections as plain arrays, split by head: of a compressed
    leaf `verbs.dense` makes them in every step (the cache is never expanded).

    Args:
      x_BLD: normalized activations.
      state: cache of the tokens before these, or None to attend within x alone.
      positions: int32 `[B, L]`, restarting with each segment.
      segments: int32 `[B, L]`; tokens of different segments do not see each other,
        segment 0 is padding (right of the tokens). With a state, all but 0 continue it.
      shared: must be None: keys and values exist only as a latent.

    Returns:
      Mixed activations `[B, L, D]` and the updated cache (None without state).

    Raises:
      InputError: `shared` is given, or a state to a bidirectional module.
    """
    if shared is not None:
      raise errors.InputError("mla has no keys and values to share; use attention")
    if state is not None and not self.causal:
      raise errors.InputError("bidirectional mla cannot decode step by step")
    opts = self.options
    rotation = rope_lib.angles(
      positions, opts.rope_dim, opts.rope_theta, opts.rope_scaling
    )
    q_BLHK, q_rope_BLHJ = self._queries(x_BLD, rotation)
    c_BLR, k_rope_BLJ = self._latents(x_BLD, rotation)
    k_up, v_up = self._up("k_up", opts.head_dim), self._up("v_up", opts.value_dim)
    pattern = patterns.Causal() if self.causal else patterns.Full()
    ids_BL = segments
    if state is not None:
      slots_BL = state.length_B[:, None] + jnp.arange(x_BLD.shape[1])[None, :]
      starts = jnp.all(state.length_B == 0)
      state = latent_cache.append(state, c_BLR, k_rope_BLJ, segments > 0)
      ids_BL = (segments > 0).astype(jnp.int32)

    def expanded(k_BLHK: jax.Array, v_BLHP: jax.Array) -> jax.Array:
      k_rope_BLHJ = jnp.broadcast_to(k_rope_BLJ[:, :, None], q_rope_BLHJ.shape)
      return attention_ops.attention(
        jnp.concatenate([q_BLHK, q_rope_BLHJ], axis=-1),
        jnp.concatenate([k_BLHK, k_rope_BLHJ], axis=-1),
        v_BLHP,
        pattern=pattern,
        implementation=opts.implementation,
        q_segments_BL=ids_BL,
        kv_segments_BS=ids_BL,
        scale=opts.score_scale,
      )

    def absorbed(*_: jax.Array) -> jax.Array:
      return latent_ops.absorbed_attention(
        q_BLHK,
        q_rope_BLHJ,
        state.c_BSR,
        state.k_rope_BSJ,
        verbs.dense(k_up),
        verbs.dense(v_up),
        slots_BL,
        state.length_B,
        scale=opts.score_scale,
      )

    if state is not None and x_BLD.shape[1] == 1:
      y_BLHP = absorbed()
    else:
      # Not inside a branch, because a contraction that is observed writes a variable.
      k_BLHK = _split(verbs.contract(c_BLR, k_up), opts.num_heads)
      v_BLHP = _split(verbs.contract(c_BLR, v_up), opts.num_heads)
      if state is None:
        y_BLHP = expanded(k_BLHK, v_BLHP)
      else:
        y_BLHP = jax.lax.cond(starts, expanded, absorbed, k_BLHK, v_BLHP)
    return self._output(y_BLHP), state

  def _queries(
    self, x_BLD: jax.Array, rotation: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    """Both parts of the queries, the second one rotated."""
    opts = self.options
    head_dim = opts.head_dim + opts.rope_dim
    size = opts.num_heads * head_dim
    if opts.q_rank is None:
      q = self._project(x_BLD, "q", size, ("embed", "heads"), self.reads, head_dim)
    else:
      c = self._project(x_BLD, "q_down", opts.q_rank, ("embed", "q_latent"), self.reads)
      c = norm.RMSNorm(axis="q_latent", eps=opts.norm_eps, name="q_norm")(c)
      q = self._project(c, "q_up", size, ("q_latent", "heads"), "q_norm", head_dim)
    q_BLHK, q_rope_BLHJ = jnp.split(_split(q, opts.num_heads), [opts.head_dim], axis=-1)
    return q_BLHK, rope_lib.rotate(q_rope_BLHJ, *rotation, opts.rope_interleaved)

  def _latents(
    self, x_BLD: jax.Array, rotation: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    """What the cache keeps: normalized latents and rotated keys."""
    opts = self.options
    c_BLR = self._project(
      x_BLD, "kv_down", opts.kv_rank, ("embed", "kv_latent"), self.reads
    )
    c_BLR = norm.RMSNorm(axis="kv_latent", eps=opts.norm_eps, name="kv_norm")(c_BLR)
    k_BLJ = self._project(x_BLD, "k_rope", opts.rope_dim, ("embed", "rope"), self.reads)
    k_BL1J = rope_lib.rotate(k_BLJ[:, :, None], *rotation, opts.rope_interleaved)
    return c_BLR, k_BL1J[:, :, 0]

  def _project(
    self,
    x: jax.Array,
    name: str,
    size: int,
    axes: tuple[str, str],
    reads: str,
    head_dim: int | None = None,
  ) -> jax.Array:
    w = weight_lib.weight(
      self,
      name,
      nn.initializers.lecun_normal(),
      (x.shape[-1], size),
      axes=axes,
      reads=reads,
      head_dim=head_dim,
    )
    return shard(verbs.contract(x, w), ("batch", "length", axes[1]))

  def _up(self, name: str, head_dim: int) -> weight_lib.Weight:
    opts = self.options
    return weight_lib.weight(
      self,
      name,
      nn.initializers.lecun_normal(),
      (opts.kv_rank, opts.num_heads * head_dim),
      axes=("kv_latent", "heads"),
      reads="kv_norm",
      head_dim=head_dim,
    )

  def _output(self, y_BLHP: jax.Array) -> jax.Array:
    opts = self.options
    y_BLHP = shard(y_BLHP, ("batch", "length", "heads", None))
    out = weight_lib.weight(
      self,
      "o",
      nn.initializers.variance_scaling(self.out_scale**2, "fan_in", "normal"),
      (opts.num_heads * opts.value_dim, self.embed_dim),
      axes=("heads", "embed"),
      reads="v_up",
      head_dim=opts.value_dim,
    )
    return verbs.contract(y_BLHP.reshape(*y_BLHP.shape[:2], -1), out)

  @nn.nowrap
  def init_state(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> latent_cache.LatentCache:
    """An empty cache for `max_len` tokens."""
    opts = self.options
    return latent_cache.init(
      batch, max_len, opts.kv_rank, opts.rope_dim, jnp.dtype(dtype)
    )

  @nn.nowrap
  def attention_problem(
    self, batch: int, length: int, dtype: DTypeLike
  ) -> attention_ops.Problem:
    """What attention over a batch of whole sequences is, on the device at hand."""
    opts = self.options
    qk_shape = (batch, length, opts.num_heads, opts.head_dim + opts.rope_dim)
    return attention_ops.Problem(
      **attention_ops.device_facts(),
      q_shape=qk_shape,
      k_shape=qk_shape,
      v_shape=(batch, length, opts.num_heads, opts.value_dim),
      dtype=dtype,
      pattern=patterns.Causal() if self.causal else patterns.Full(),
      segments=True,
    )


def _split(x_BLI: jax.Array, num_heads: int) -> jax.Array:
  """Merged heads `[B, L, H * K]` apart: `[B, L, H, K]`."""
  x_BLHK = x_BLI.reshape(*x_BLI.shape[:2], num_heads, -1)
  return shard(x_BLHK, ("batch", "length", "heads", None))


TECHNIQUE = MultiHeadLatentAttention
