"""Options of grouped-query attention, which its relatives extend."""

import dataclasses

from effjax.core import config, errors
from effjax.nn.caches import quantized
from effjax.ops.attention import api as attention_ops
from effjax.ops.attention import patterns
from effjax.ops.attention import rope_scaling as rope_scaling_lib

POSITIONS = ("rope", "alibi", "none")
CACHES = ("float", *quantized.FORMATS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
  """Options of grouped-query attention.

  Attributes:
    num_heads: H, query heads.
    num_kv_heads: G, key and value heads; divides H.
    head_dim: K, size of a head (even, for the rotation).
    position: how order enters: "rope" rotates queries and keys, "alibi" adds linear
      biases to the scores, "none" leaves it to other layers.
    rope_theta: base of the rotary wavelengths.
    rope_scaling: stretches rotary positions beyond the trained length, or None.
    qk_norm: RMS-normalize each query and key head before the rotation.
    qk_norm_eps: added to their mean squares.
    bias: whether q, k, v and o have biases.
    out_bias: whether o has one, where it differs from the others (Qwen2); None: `bias`.
    logit_cap: c of `c * tanh(scores / c)`, or None.
    window: tokens a query sees, itself included, or None for all; a causal model then
      keeps a rolling cache of so many.
    implementation: "auto", or one of effjax.ops.attention.api; does not change results.
    kv_cache: how a causal model keeps keys and values: "float" in the dtype it computes
      in, or rounded to "int8" or "int4" (effjax.nn.caches.quantized). They are rounded
      without a state, too, so that quality is that of decoding; gradients go straight
      through.
    kv_group: entries of a head that share a scale there; 0 for all, None for the
      format's default.
  """

  num_heads: int = 4
  num_kv_heads: int = 2
  head_dim: int = 64
  position: str = "rope"
  rope_theta: float = 10_000.0
  rope_scaling: rope_scaling_lib.RopeScaling | None = None
  qk_norm: bool = False
  qk_norm_eps: float = 1e-5
  bias: bool = False
  out_bias: bool | None = None
  logit_cap: float | None = None
  window: int | None = None
  implementation: str = "auto"
  kv_cache: str = "float"
  kv_group: int | None = None

  def __post_init__(self):
    for name in ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "qk_norm_eps"):
      value = getattr(self, name)
      config.require(value > 0, f"{name} must be positive, got {value}")
    config.require(
      self.num_heads % self.num_kv_heads == 0,
      f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}",
    )
    for name, value, allowed in (
      ("position", self.position, POSITIONS),
      ("attention implementation", self.implementation, attention_ops.NAMES),
      ("kv_cache", self.kv_cache, CACHES),
    ):
      if value not in allowed:
        raise errors.unknown(name, value, allowed)
    rotary = self.position == "rope"
    config.require(
      not rotary or self.head_dim % 2 == 0,
      f"head_dim={self.head_dim} must be even for position='rope'",
    )
    config.require(
      rotary or self.rope_scaling is None,
      f"rope_scaling needs position='rope', got position={self.position!r}",
    )
    cap, window = self.logit_cap, self.window
    config.require(
      cap is None or cap > 0, f"logit_cap={cap} must be positive, or None for no cap"
    )
    config.require(
      window is None or window >= 1,
      f"window={window} must be at least 1, or None for no window",
    )
    config.require(
      self.kv_group is None or self.held is not None,
      f"kv_group={self.kv_group} needs kv_cache='int8' or 'int4', got 'float'",
    )

  def narrowed(self, axis: str, count: int, embed_dim: int) -> "AttentionOptions":
    """The options with `count` heads, or key heads with all that they serve.

    Raises:
      InputError: what a head computes depends on which one it is.
    """
    del embed_dim
    config.require(
      self.position != "alibi",
      "heads with position='alibi' cannot be removed: the slope of a head is that of "
      "its number",
    )
    if axis == "heads":
      return dataclasses.replace(self, num_heads=count)
    served = self.num_heads // self.num_kv_heads
    return dataclasses.replace(self, num_heads=served * count, num_kv_heads=count)

  @property
  def held(self) -> quantized.HeadFormat | None:
    """How the cache holds a head, or None as it is."""
    if self.kv_cache == "float":
      return None
    return quantized.head_format(self.kv_cache, self.head_dim, self.kv_group)

  def has_bias(self, name: str) -> bool:
    """Whether the projection `name` has a bias."""
    if name == "o" and self.out_bias is not None:
      return self.out_bias
    return self.bias

  def pattern(self, causal: bool) -> patterns.Pattern:
    """Who sees whom."""
    if self.window is not None:
      return patterns.Window(self.window, causal)
    return patterns.Causal() if causal else patterns.Full()
