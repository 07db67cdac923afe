"""BigBird: blocks that see their window, a few global blocks and a few random ones.

Source: Zaheer et al. 2020, arXiv:2007.14062, section 2 and appendix D, in the
construction whose global tokens are part of the sequence (ITC); defaults of its code
(blocks of 64, a window of 3, the first and the last block global, 3 random ones).
Deviations: see effjax.ops.attention.patterns.BigBird, above all that the heads of a
layer share one draw of random blocks, that a draw depends on the seed and the place in
the document only, and that there is a causal form, with all global blocks at the start;
grouped queries, rotary positions and linear biases are optional, as in attention.
"""

import dataclasses

from flax import linen as nn
from jax.typing import DTypeLike

from effjax.core import config
from effjax.nn.mixers import attention
from effjax.ops.attention import patterns


@dataclasses.dataclass(frozen=True, kw_only=True)
class BigBirdOptions(attention.AttentionOptions):
  """Options of BigBird attention: those of attention, and five.

  Attributes:
    block: tokens of a block.
    window: tokens of the blocks around its own that a block sees, its own included: an
      odd number of blocks, in a causal model any number of its own and those before;
      None for three blocks.
    num_global_blocks: blocks that see and are seen by all: the first half of them
      starts the document and the rest ends it; in a causal model all start it.
    num_random: random blocks that a block sees besides.
    seed: of the random blocks; layers with equal seeds see the same ones.
  """

  num_kv_heads: int = 4
  block: int = 64
  window: int | None = None
  num_global_blocks: int = 2
  num_random: int = 3
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    config.require(self.block >= 1, f"block={self.block} must be at least 1")
    config.require(
      self.window is None or self.window % self.block == 0,
      f"window={self.window} must be a multiple of block={self.block}, or None for "
      "three blocks",
    )
    self.pattern(causal=True)

  def pattern(self, causal: bool) -> patterns.BigBird:
    """Who sees whom."""
    return patterns.BigBird(
      block=self.block,
      num_window_blocks=3 if self.window is None else self.window // self.block,
      num_global_blocks=self.num_global_blocks,
      num_random=self.num_random,
      seed=self.seed,
      causal=causal,
    )


class BigBird(attention.Attention):
  """Attention over BigBird's pattern.

  Decoding keeps every key and value, since any block may turn out to be random or
  global for a later one, and multiplies them all: the pattern saves work where whole
  sequences are computed, not in a step.

  Attributes:
    options: see BigBirdOptions.
    embed_dim: D, width of the model.
    reads: name of the norm whose output it is given.
    causal: whether a position sees only itself and the past.
    out_scale: factor on the initial standard deviation of the output projection.
  """

  options_cls = BigBirdOptions

  options: BigBirdOptions

  @nn.nowrap
  def init_state(self, batch: int, max_len: int, dtype: DTypeLike) -> attention.Cache:
    """An empty cache for `max_len` tokens."""
    return self._full_cache(batch, max_len, dtype)


TECHNIQUE = BigBird
