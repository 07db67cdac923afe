"""Grouped-query softmax attention: full, or over a sliding window.

Source: Ainslie et al. 2023, arXiv:2305.13245 (grouped queries); Su et al. 2021,
arXiv:2104.09864, eq. 34 (rotary embedding, halves rotated as in Llama); Press et al.
2021, arXiv:2108.12409, section 3 (linear biases); Jiang et al. 2023, arXiv:2310.06825,
section 2 (sliding window, rolling cache); Gemma 2, arXiv:2408.00118, section 2 (capped
scores); Qwen3, arXiv:2505.09388, section 2 (normalized queries and keys).
Multi-head attention is num_kv_heads == num_heads, multi-query is num_kv_heads == 1.
Keys and values of an earlier layer in place of own ones (`shared`) are cross-layer
attention, Brandon et al. 2024, arXiv:2405.12981, section 2.2.
Deviations: in a bidirectional model a window is symmetric, `window // 2` to each side,
and linear biases fall with the absolute distance; all options are off by default.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config, errors
from effjax.core.shard import shard
from effjax.nn import norm
from effjax.nn.caches import kv, quantized
from effjax.nn.caches import window as window_cache
from effjax.nn.mixers import _attention_options
from effjax.ops.attention import alibi
from effjax.ops.attention import api as attention_ops
from effjax.ops.attention import rope as rope_lib
from effjax.weights import verbs
from effjax.weights import weight as weight_lib

AttentionOptions = _attention_options.AttentionOptions
Cache = kv.KVCache | window_cache.WindowCache | quantized.QuantizedCache


class Keys(NamedTuple):
  """What a layer lends to those that have no keys and values of their own.

  Attributes:
    k_BLGK: keys of the tokens at hand, rotated; without a cache also rounded, if one
      would hold them so.
    v_BLGK: their values.
    cache: None without a state; of full attention the cache with these tokens in it, of
      a window the one without them.
  """

  k_BLGK: jax.Array
  v_BLGK: jax.Array
  cache: Cache | None


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
  lends_keys = True

  options: AttentionOptions
  embed_dim: int
  reads: str = "mixer_norm"
  causal: bool = True
  out_scale: float = 1.0

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    state: Cache | tuple[()] | None = None,
    *,
    positions: jax.Array,
    segments: jax.Array,
    shared: Keys | None = None,
    lend: bool = False,
  ) -> tuple[jax.Array, Any] | tuple[jax.Array, Any, Keys]:
    """Mixes positions; see the mixer contract in effjax.models.decoder.

    Args:
      x_BLD: normalized activations.
      state: cache of the tokens before these, or None to attend within x alone; empty
        with `shared`.
      positions: int32 `[B, L]`, restarting with each segment.
      segments: int32 `[B, L]`; tokens of different segments do not see each other,
        segment 0 is padding (right of the tokens).
      shared: what an earlier layer of the same options lends: this layer then has no
        keys, values and cache, and hands back the state as it came.
      lend: whether to return what later layers need as `shared`.

    Returns:
      Mixed activations `[B, L, D]` and the updated cache (None without state); with
      `lend` its keys, too.
    """
    if state is not None and not self.causal:
      raise errors.InputError("bidirectional attention cannot decode step by step")
    opts = self.options
    config.require(
      self.causal or opts.kv_cache == "float",
      f"bidirectional attention keeps no cache: kv_cache={opts.kv_cache!r} must be "
      "'float'",
    )
    q_BLHK = self._heads(x_BLD, "q", opts.num_heads, "heads")
    q_BLHK = self._placed(q_BLHK, "q_norm", positions)
    if shared is not None:
      y_BLHK, _ = self._attend(q_BLHK, shared, segments)
      return self._output(y_BLHK, None), state
    keys = self._keys(x_BLD, state, positions, segments)
    y_BLHK, state = self._attend(q_BLHK, keys, segments)
    # Values that are lent have readers in other layers, too, and rounding is not linear
    # in the scale of a channel.
    own = not lend and self.options.held is None
    y_BLD = self._output(y_BLHK, "v" if own else None)
    return (y_BLD, state, keys) if lend else (y_BLD, state)

  def _attend(
    self, q_BLHK: jax.Array, keys: Keys, segments: jax.Array
  ) -> tuple[jax.Array, Cache | None]:
    """Attention within the tokens, or over the cache and the tokens; and the cache."""
    opts = self.options
    k_BLGK, v_BLGK, cache = keys
    slopes = alibi.slopes(opts.num_heads) if opts.position == "alibi" else None
    extras = {"slopes_H": slopes, "logit_cap": opts.logit_cap}
    pattern = opts.pattern(self.causal)
    if cache is None:
      y_BLHK = attention_ops.attention(
        q_BLHK,
        k_BLGK,
        v_BLGK,
        pattern=pattern,
        implementation=opts.implementation,
        q_segments_BL=segments,
        kv_segments_BS=segments,
        **extras,
      )
      return y_BLHK, None
    if isinstance(cache, window_cache.WindowCache):
      return window_cache.attend(
        cache, q_BLHK, k_BLGK, v_BLGK, segments > 0, pattern=pattern, **extras
      )
    if isinstance(cache, quantized.QuantizedCache) and cache.rolling:
      args = (q_BLHK, k_BLGK, v_BLGK, segments > 0, opts.held)
      return quantized.attend_window(cache, *args, pattern=pattern, **extras)
    before_B = cache.length_B - jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
    places_BL = before_B[:, None] + jnp.arange(q_BLHK.shape[1])[None, :]
    if isinstance(cache, quantized.QuantizedCache):
      y_BLHK = quantized.attend(
        cache, q_BLHK, places_BL, opts.held, pattern=pattern, **extras
      )
      return y_BLHK, cache
    y_BLHK = attention_ops.cached_attention(
      q_BLHK,
      cache.k_BGSK,
      cache.v_BGSK,
      places_BL,
      cache.length_B,
      pattern=pattern,
      **extras,
    )
    return y_BLHK, cache

  def _keys(
    self,
    x_BLD: jax.Array,
    cache: Cache | None,
    positions: jax.Array,
    segments: jax.Array,
  ) -> Keys:
    """This layer's own keys and values, in the cache if it holds all of them."""
    held = self.options.held
    k_BLGK = self._heads(x_BLD, "k", self.options.num_kv_heads, "kv")
    k_BLGK = self._placed(k_BLGK, "k_norm", positions)
    v_BLGK = self._heads(x_BLD, "v", self.options.num_kv_heads, "kv")
    if isinstance(cache, kv.KVCache):
      cache = kv.append(cache, k_BLGK, v_BLGK, segments > 0)
    elif isinstance(cache, quantized.QuantizedCache) and not cache.rolling:
      cache = quantized.append(cache, k_BLGK, v_BLGK, segments > 0, held)
    elif cache is None and held is not None:
      k_BLGK, v_BLGK = held.rounded(k_BLGK), held.rounded(v_BLGK)
    return Keys(k_BLGK, v_BLGK, cache)

  def _placed(self, x_BLHK: jax.Array, name: str, positions: jax.Array) -> jax.Array:
    """Queries or keys, normalized and rotated as the options say."""
    opts = self.options
    if opts.qk_norm:
      x_BLHK = norm.RMSNorm("head", opts.qk_norm_eps, name=name)(x_BLHK)
    if opts.position == "rope":
      x_BLHK = rope_lib.rope(x_BLHK, positions, opts.rope_theta, opts.rope_scaling)
    return x_BLHK

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
      **self._grouping(axis),
    )
    y = self._biased(verbs.contract(x_BLD, w), name, axis, head_dim)
    y = y.reshape(*x_BLD.shape[:2], num_heads, head_dim)
    return shard(y, ("batch", "length", axis, None))

  def _output(self, y_BLHK: jax.Array, reads: str | None) -> jax.Array:
    """Projects heads back to the width of the model; `reads` names own values."""
    opts = self.options
    y_BLHK = shard(y_BLHK, ("batch", "length", "heads", None))
    out = weight_lib.weight(
      self,
      "o",
      nn.initializers.variance_scaling(self.out_scale**2, "fan_in", "normal"),
      (opts.num_heads * opts.head_dim, self.embed_dim),
      axes=("heads", "embed"),
      head_dim=opts.head_dim,
      reads=reads,
      **self._grouping("heads"),
    )
    y_BLD = verbs.contract(y_BLHK.reshape(*y_BLHK.shape[:2], -1), out)
    return self._biased(y_BLD, "o", "embed")

  @nn.nowrap
  def _grouping(self, axis: str) -> dict[str, Any]:
    """That every key head serves as many consecutive query heads."""
    if axis != "heads":
      return {}
    return {"parts": self.options.num_kv_heads, "within": "kv"}

  def _biased(
    self, y_BLF: jax.Array, name: str, axis: str, head_dim: int | None = None
  ) -> jax.Array:
    """Adds the bias of a projection, if there are biases."""
    if not self.options.has_bias(name):
      return y_BLF
    w = weight_lib.weight(
      self,
      f"{name}_bias",
      nn.initializers.zeros,
      y_BLF.shape[-1:],
      axes=(axis,),
      kind="bias",
      head_dim=head_dim,
    )
    return y_BLF + verbs.dense(w).astype(y_BLF.dtype)[None, None]

  @nn.nowrap
  def init_state(self, batch: int, max_len: int, dtype: DTypeLike) -> Cache:
    """An empty cache for `max_len` tokens, or for a window of them."""
    opts = self.options
    if not self.causal or opts.window is None:
      return self._full_cache(batch, max_len, dtype)
    slots = min(opts.window, max_len)
    if opts.held is not None:
      return quantized.init(batch, opts.num_kv_heads, slots, opts.held, rolling=True)
    return window_cache.init(batch, opts.num_kv_heads, slots, opts.head_dim, dtype)

  @nn.nowrap
  def _full_cache(
    self, batch: int, max_len: int, dtype: DTypeLike
  ) -> kv.KVCache | quantized.QuantizedCache:
    """An empty cache of every token."""
    opts = self.options
    if opts.held is not None:
      return quantized.init(batch, opts.num_kv_heads, max_len, opts.held)
    return kv.init(batch, opts.num_kv_heads, max_len, opts.head_dim, dtype)

  @nn.nowrap
  def attention_problem(
    self, batch: int, length: int, dtype: DTypeLike
  ) -> attention_ops.Problem:
    """What attention over a batch of whole sequences is, on the device at hand."""
    opts = self.options
    kv_shape = (batch, length, opts.num_kv_heads, opts.head_dim)
    return attention_ops.Problem(
      **attention_ops.device_facts(),
      q_shape=(batch, length, opts.num_heads, opts.head_dim),
      k_shape=kv_shape,
      v_shape=kv_shape,
      dtype=dtype,
      pattern=opts.pattern(self.causal),
      segments=True,
      slopes=opts.position == "alibi",
      logit_cap=opts.logit_cap is not None,
    )


TECHNIQUE = Attention
