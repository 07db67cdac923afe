"""Longformer: a sliding window, and global tokens with projections of their own.

Source: Beltagy et al. 2020, arXiv:2004.05150, section 3.1: window and global pattern,
and "linear projections for global attention": the queries of global tokens meet keys
and values of all tokens under a second set of projections, all other queries meet keys
and values under the first one, those of the global tokens included. Default window of
its released models (512).
Deviations: the global tokens are the first ones of every document; no dilation; the two
sets are initialized independently (the paper starts the second as a copy of the first);
in a causal model, which the paper trains without global tokens, they see only what was
before them, so the second set works on the global tokens alone; grouped queries, rotary
positions and linear biases are optional, as in attention.

Local letters: N global tokens of a document, M queries of the second set.
"""

import dataclasses
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config, errors
from effjax.core.shard import split_over
from effjax.nn.caches import kv
from effjax.nn.mixers import attention
from effjax.ops.attention import alibi, blockwise, masks, patterns
from effjax.ops.attention import api as attention_ops
from effjax.weights import weight as weight_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongformerOptions(attention.AttentionOptions):
  """Options of Longformer attention: those of attention, and two.

  Attributes:
    window: tokens; an encoder sees `window // 2` to either side and itself, a causal
      model the last `window`, itself included.
    num_global: N, global tokens at the start of a document.
  """

  num_kv_heads: int = 4
  window: int | None = 512
  num_global: int = 1

  def __post_init__(self):
    super().__post_init__()
    config.require(
      self.window is not None, "window=None: longformer needs one, of at least 1"
    )
    config.require(
      self.num_global >= 1,
      f"num_global={self.num_global} must be at least 1; without global tokens it is "
      "attention with a window",
    )
    config.require(
      self.kv_cache == "float",
      f"longformer keeps its two caches as floats: kv_cache={self.kv_cache!r} must be "
      "'float'; attention with a window can round them",
    )

  def pattern(self, causal: bool) -> patterns.Longformer:
    """Who sees whom."""
    return patterns.Longformer(self.window, self.num_global, causal)


@flax.struct.dataclass
class LongformerState:
  """Keys and values of both sets of projections.

  Every token's under the first set, `max_len` of them; under the second only those of
  the N global tokens, which no later query needs: N / max_len more than attention.

  Attributes:
    local: of all tokens so far.
    far: of the global ones.
  """

  # Any, because pytrees are also built around shapes and other placeholders.
  local: Any
  far: Any

  @property
  def length_B(self) -> Any:
    """Tokens seen by each row, int32."""
    return self.local.length_B


class Longformer(attention.Attention):
  """Sliding-window attention with global tokens.

  Attributes:
    options: see LongformerOptions.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    causal: whether a position sees only itself and the past.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options_cls = LongformerOptions
  lends_keys = False

  options: LongformerOptions

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    state: LongformerState | None = None,
    *,
    positions: jax.Array,
    segments: jax.Array,
    shared: tuple[jax.Array, jax.Array] | None = None,
  ) -> tuple[jax.Array, LongformerState | None]:
    """Mixes positions; see the mixer contract in effjax.models.decoder.

    Where every row is one document, the second set's queries (and keys, if causal) are
    only projected for the first N tokens; a condition at run time takes all tokens, and
    drops what is not global, where documents are packed. So it is, without a condition,
    where rules split the length between devices: that costs a second attention.

    Raises:
      InputError: `shared` is given, or a state to a bidirectional module.
    """
    if shared is not None:
      raise errors.InputError(
        "longformer has two sets of keys and values, which cannot be shared; use "
        "attention"
      )
    if state is not None and not self.causal:
      raise errors.InputError("bidirectional longformer cannot decode step by step")
    q_BLHK = self._heads(x_BLD, "q", self.options.num_heads, "heads")
    q_BLHK = self._placed(q_BLHK, "q_norm", positions)
    cache = None if state is None else state.local
    keys = self._keys(x_BLD, cache, positions, segments)
    y_BLHK, local = self._attend(q_BLHK, keys, segments)
    if state is None:
      places_BL, _ = masks.documents(segments)
      far_BLHK = self._far(x_BLD, positions, segments, places_BL)
    else:
      places_BL = state.length_B[:, None] + jnp.arange(x_BLD.shape[1])[None]
      far_BLHK, far = self._far_step(state.far, x_BLD, positions, segments, places_BL)
      state = LongformerState(local=local, far=far)
    far_BL11 = (places_BL < self.options.num_global)[:, :, None, None]
    y_BLHK = jnp.where(far_BL11, far_BLHK, y_BLHK)
    # `o` contracts the values of both sets, so it reads no one weight.
    return self._output(y_BLHK, None), state

  def _far(
    self,
    x_BLD: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    places_BL: jax.Array,
  ) -> jax.Array:
    """Attention of the global tokens, `[B, L, H, K]`; anything at other tokens."""
    length, count = x_BLD.shape[1], self.options.num_global

    def everywhere(self: "Longformer", x_BLD: jax.Array) -> jax.Array:
      # The window reaches back to the first token from every global one.
      pattern = patterns.Window(count) if self.causal else patterns.Full()
      return self._far_attention(x_BLD, x_BLD, positions, segments, places_BL, pattern)

    def in_front(self: "Longformer", x_BLD: jax.Array) -> jax.Array:
      pattern = patterns.Causal() if self.causal else patterns.Full()
      keys_BSD = x_BLD[:, :count] if self.causal else x_BLD
      y_BNHK = self._far_attention(
        x_BLD[:, :count], keys_BSD, positions, segments, places_BL, pattern
      )
      pad = lambda y: jnp.pad(y, ((0, 0), (0, length - count), (0, 0), (0, 0)))
      # By this name FLOPs are counted as of this branch.
      pad.__name__ = blockwise.ONE_DOCUMENT
      return jax.jit(pad)(y_BNHK)

    creates = self.is_initializing() or self.is_mutable_collection("stats")
    # Of a length that is split, the first tokens are no part that a device has.
    if length <= count or creates or split_over("length"):
      return everywhere(self, x_BLD)
    one_document = (places_BL == jnp.arange(length)[None]) | (segments == 0)
    return nn.cond(jnp.all(one_document), in_front, everywhere, self, x_BLD)

  def _far_attention(
    self,
    x_BMD: jax.Array,
    x_BSD: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    places_BL: jax.Array,
    pattern: patterns.Pattern,
  ) -> jax.Array:
    """The first M tokens over the first S under the second set of projections."""
    opts = self.options
    queries, keys = x_BMD.shape[1], x_BSD.shape[1]
    used_BL = (places_BL < opts.num_global) & (segments > 0)
    q_BMHK, k_BSGK, v_BSGK = self._far_heads(x_BMD, x_BSD, positions, used_BL)
    return attention_ops.attention(
      q_BMHK,
      k_BSGK,
      v_BSGK,
      pattern=pattern,
      q_segments_BL=segments[:, :queries],
      kv_segments_BS=segments[:, :keys],
      slopes_H=alibi.slopes(opts.num_heads) if opts.position == "alibi" else None,
      logit_cap=opts.logit_cap,
    )

  def _far_heads(
    self,
    x_BMD: jax.Array,
    x_BSD: jax.Array,
    positions: jax.Array,
    used_BL: jax.Array,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of the second set.

    Calibration is told to look at the global queries' inputs only, `used_BL`.
    """
    opts = self.options
    queries, keys = x_BMD.shape[1], x_BSD.shape[1]
    with weight_lib.token_weights(used_BL[:, :queries].astype(jnp.float32)):
      q_BMHK = self._heads(x_BMD, "q_global", opts.num_heads, "heads")
    q_BMHK = self._placed(q_BMHK, "q_global_norm", positions[:, :queries])
    k_BSGK = self._heads(x_BSD, "k_global", opts.num_kv_heads, "kv")
    k_BSGK = self._placed(k_BSGK, "k_global_norm", positions[:, :keys])
    return q_BMHK, k_BSGK, self._heads(x_BSD, "v_global", opts.num_kv_heads, "kv")

  def _far_step(
    self,
    cache: kv.KVCache,
    x_BLD: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    places_BL: jax.Array,
  ) -> tuple[jax.Array, kv.KVCache]:
    """The same with a state, over the cache of the global tokens and the new ones."""
    opts = self.options
    length = x_BLD.shape[1]
    # Whatever was before, no token from the N-th new one on is global.
    count = min(length, opts.num_global)
    x_BMD, valid_BM = x_BLD[:, :count], segments[:, :count] > 0
    used_BL = (places_BL < opts.num_global) & (segments > 0)

    def some(self: "Longformer", cache: kv.KVCache) -> tuple[jax.Array, kv.KVCache]:
      q_BMHK, k_BMGK, v_BMGK = self._far_heads(x_BMD, x_BMD, positions, used_BL)
      cache = kv.append(cache, k_BMGK, v_BMGK, valid_BM)
      y_BMHK = attention_ops.cached_attention(
        q_BMHK,
        cache.k_BGSK,
        cache.v_BGSK,
        places_BL[:, :count],
        cache.length_B,
        slopes_H=alibi.slopes(opts.num_heads) if opts.position == "alibi" else None,
        logit_cap=opts.logit_cap,
      )
      return y_BMHK, cache

    def none(self: "Longformer", cache: kv.KVCache) -> tuple[jax.Array, kv.KVCache]:
      shape = (*x_BMD.shape[:2], opts.num_heads, opts.head_dim)
      return jnp.zeros(shape, x_BMD.dtype), cache

    if self.is_initializing() or self.is_mutable_collection("stats"):
      y_BMHK, cache = some(self, cache)
    else:
      y_BMHK, cache = nn.cond(jnp.any(used_BL), some, none, self, cache)
    pad = ((0, 0), (0, length - count), (0, 0), (0, 0))
    return jnp.pad(y_BMHK, pad), cache

  @nn.nowrap
  def init_state(self, batch: int, max_len: int, dtype: DTypeLike) -> LongformerState:
    """Empty caches for `max_len` tokens, and for the global ones."""
    opts = self.options
    sizes = (opts.head_dim, jnp.dtype(dtype))
    return LongformerState(
      local=kv.init(batch, opts.num_kv_heads, max_len, *sizes),
      far=kv.init(batch, opts.num_kv_heads, min(opts.num_global, max_len), *sizes),
    )


TECHNIQUE = Longformer
