"""Grouped-query softmax attention with rotary positions.

Source: Ainslie et al. 2023, arXiv:2305.13245 (grouped queries); Su et al. 2021,
arXiv:2104.09864, eq. 34 (rotary embedding, halves rotated as in Llama).
Multi-head attention is num_kv_heads == num_heads, multi-query is num_kv_heads == 1.
Deviations: optional RMS norm of queries and keys (`qk_norm`), off by default.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config, errors
from effjax.core.shard import shard
from effjax.nn import norm
from effjax.nn.caches import kv
from effjax.ops.attention import api as attention_ops
from effjax.ops.attention import rope as rope_lib
from effjax.weights import verbs
from effjax.weights import weight as weight_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
  """Options of grouped-query attention.

  Attributes:
    num_heads: H, query heads.
    num_kv_heads: G, key and value heads; divides H.
    head_dim: K, size of a head (even, for the rotation).
    rope_theta: base of the rotary wavelengths.
    qk_norm: RMS-normalize each query and key head before the rotation.
  """

  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 64
  rope_theta: float = 10_000.0
  qk_norm: bool = False

  def __post_init__(self):
    for name in ("num_heads", "num_kv_heads", "head_dim"):
      config.require(getattr(self, name) > 0, f"{name} must be positive")
    config.require(
      self.num_heads % self.num_kv_heads == 0,
      f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}",
    )
    config.require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even")


class Attention(nn.Module):
  """Grouped-query attention.

  Attributes:
    options: see AttentionOptions.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    causal: whether a position sees only itself and the past.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options_cls = AttentionOptions

  options: AttentionOptions
  embed_dim: int
  reads: str = "mixer_norm"
  causal: bool = True
  out_scale: float = 1.0

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    state: kv.KVCache | None = None,
    *,
    positions: jax.Array,
    segments: jax.Array,
    shared: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, kv.KVCache | None]:
    """Mixes positions; see the mixer contract in effjax.models.decoder.

    Args:
      x_BLD: normalized activations.
      state: cache of the tokens before these, or None to attend within x alone.
      positions: int32 `[B, L]`, restarting with each segment.
      segments: int32 `[B, L]`; tokens of different segments do not see each other,
        segment 0 is padding (right of the tokens).
      shared: rotated keys `[B, L, G, K]` and values of an earlier layer, used in place
        of this layer's own.

    Returns:
      Mixed activations `[B, L, D]` and the updated cache (None without state).
    """
    if state is not None and not self.causal:
      raise errors.InputError("bidirectional attention cannot decode step by step")
    opts = self.options
    q_BLHK = self._heads(x_BLD, "q", opts.num_heads, "heads")
    if opts.qk_norm:
      q_BLHK = norm.RMSNorm(axis="head", name="q_norm")(q_BLHK)
    q_BLHK = rope_lib.rope(q_BLHK, positions, opts.rope_theta)
    k_BLGK, v_BLGK = shared if shared is not None else self._keys(x_BLD, positions)
    if state is None:
      y_BLHK = attention_ops.attention(
        q_BLHK,
        k_BLGK,
        v_BLGK,
        causal=self.causal,
        q_segments_BL=segments,
        kv_segments_BS=segments,
      )
    else:
      offset_B = state.length_B
      state = kv.append(state, k_BLGK, v_BLGK, segments > 0)
      y_BLHK = attention_ops.cached_attention(
        q_BLHK,
        state.k_BGSK,
        state.v_BGSK,
        offset_B[:, None] + jnp.arange(x_BLD.shape[1])[None, :],
        state.length_B,
      )
    y_BLHK = shard(y_BLHK, ("batch", "length", "heads", None))
    out = weight_lib.weight(
      self,
      "o",
      nn.initializers.variance_scaling(self.out_scale**2, "fan_in", "normal"),
      (opts.num_heads * opts.head_dim, self.embed_dim),
      axes=("heads", "embed"),
      head_dim=opts.head_dim,
      reads="v",
    )
    return verbs.contract(y_BLHK.reshape(*x_BLD.shape[:2], -1), out), state

  def _keys(
    self, x_BLD: jax.Array, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    opts = self.options
    k_BLGK = self._heads(x_BLD, "k", opts.num_kv_heads, "kv")
    if opts.qk_norm:
      k_BLGK = norm.RMSNorm(axis="head", name="k_norm")(k_BLGK)
    k_BLGK = rope_lib.rope(k_BLGK, positions, opts.rope_theta)
    return k_BLGK, self._heads(x_BLD, "v", opts.num_kv_heads, "kv")

  def _heads(self, x_BLD: jax.Array, name: str, num_heads: int, axis: str) -> jax.Array:
    """Projects to heads `[B, L, heads, K]`."""
    head_dim = self.options.head_dim
    w = weight_lib.weight(
      self,
      name,
      nn.initializers.lecun_normal(),
      (self.embed_dim, num_heads * head_dim),
      axes=("embed", axis),
      head_dim=head_dim,
      reads=self.reads,
    )
    y = verbs.contract(x_BLD, w).reshape(*x_BLD.shape[:2], num_heads, head_dim)
    return shard(y, ("batch", "length", axis, None))

  @nn.nowrap
  def init_state(self, batch: int, max_len: int, dtype: DTypeLike) -> kv.KVCache:
    """An empty cache for `max_len` tokens."""
    opts = self.options
    return kv.init(batch, opts.num_kv_heads, max_len, opts.head_dim, jnp.dtype(dtype))


TECHNIQUE = Attention
