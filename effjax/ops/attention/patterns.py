"""Who sees whom: patterns of attention as functions of two positions.

A position counts from 0 at the start of its document. Every pattern is a small frozen
value that can be hashed, so that it may be a static argument or a module's field, and
answers two questions:

- `seen(q_pos, k_pos)`: may the query see the key? Exact, on traced integers.
- `layout(num_q_blocks, num_kv_blocks, block)`: which blocks of queries see anything in
  which blocks of keys? A NumPy matrix for kernels that skip the other pairs.

`causal` says that no key after its query is seen; `relative`, that `seen` depends on
the difference of the positions only, so that documents packed behind each other need
no positions of their own; `needs_length`, that it also depends on the length of the
document.

Local letters: I and J blocks of queries and of keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.config import require

Positions = jax.Array | np.ndarray | int


@dataclasses.dataclass(frozen=True)
class Full:
  """Every query sees every key."""

  causal = False
  relative = True
  needs_length = False

  def seen(
    self, q_pos: Positions, k_pos: Positions, length: Positions | None = None
  ) -> jax.Array:
    """True everywhere; arguments broadcast."""
    del length
    shape = jnp.broadcast_shapes(jnp.shape(q_pos), jnp.shape(k_pos))
    return jnp.ones(shape, bool)

  def layout(
    self, num_q_blocks: int, num_kv_blocks: int, block: int, length: int | None = None
  ) -> np.ndarray:
    """Bool [I, J]."""
    del block, length
    return np.ones((num_q_blocks, num_kv_blocks), bool)


@dataclasses.dataclass(frozen=True)
class Causal:
  """A query sees the keys up to its own position."""

  causal = True
  relative = True
  needs_length = False

  def seen(
    self, q_pos: Positions, k_pos: Positions, length: Positions | None = None
  ) -> jax.Array:
    """`q_pos >= k_pos`; arguments broadcast."""
    del length
    return jnp.asarray(q_pos) >= jnp.asarray(k_pos)

  def layout(
    self, num_q_blocks: int, num_kv_blocks: int, block: int, length: int | None = None
  ) -> np.ndarray:
    """Bool [I, J]."""
    del block, length
    i_I1, j_1J = _block_indices(num_q_blocks, num_kv_blocks)
    return i_I1 >= j_1J


@dataclasses.dataclass(frozen=True)
class Window:
  """A query sees its neighbourhood.

  Causal as in Mistral (Jiang et al. 2023, arXiv:2310.06825, section 2): the `window`
  last positions up to its own. Not causal as the w of Longformer: `window // 2` on
  either side, and itself.

  Attributes:
    window: tokens.
    causal: whether the window ends at the query.
  """

  window: int
  causal: bool = True

  relative = True
  needs_length = False

  def __post_init__(self):
    require(self.window >= 1, f"window={self.window} must be at least 1")

  def seen(
    self, q_pos: Positions, k_pos: Positions, length: Positions | None = None
  ) -> jax.Array:
    """Whether the distance is inside the window; arguments broadcast."""
    del length
    behind = jnp.asarray(q_pos) - jnp.asarray(k_pos)
    if self.causal:
      return (behind >= 0) & (behind < self.window)
    return jnp.abs(behind) <= self.window // 2

  def layout(
    self, num_q_blocks: int, num_kv_blocks: int, block: int, length: int | None = None
  ) -> np.ndarray:
    """Bool [I, J]."""
    del length
    i_I1, j_1J = _block_indices(num_q_blocks, num_kv_blocks)
    # The closest pair of two different blocks is a block's length less one apart.
    closest = np.maximum(np.abs(i_I1 - j_1J) * block - (block - 1), 0)
    if self.causal:
      return (i_I1 >= j_1J) & (closest < self.window)
    return closest <= self.window // 2


@dataclasses.dataclass(frozen=True)
class Longformer:
  """A window, and some global positions that see all and are seen by all.

  Beltagy et al. 2020, arXiv:2004.05150, section 3. Deviations: the global positions are
  the first ones of a document; no dilation; the causal form (which the paper trains
  without globals) keeps the globals a causal query may see. One set of projections:
  the separate ones for global positions belong to the module around this.

  Attributes:
    window: tokens; see Window.
    num_global: global positions.
    causal: whether keys after the query are hidden from all, globals included.
  """

  window: int
  num_global: int = 1
  causal: bool = False

  relative = False
  needs_length = False

  def __post_init__(self):
    require(self.window >= 1, f"window={self.window} must be at least 1")
    require(self.num_global >= 0, f"num_global={self.num_global} must not be negative")

  def seen(
    self, q_pos: Positions, k_pos: Positions, length: Positions | None = None
  ) -> jax.Array:
    """Window or global, on either side; arguments broadcast."""
    del length
    q_pos, k_pos = jnp.asarray(q_pos), jnp.asarray(k_pos)
    near = Window(self.window, self.causal).seen(q_pos, k_pos)
    seen = near | (q_pos < self.num_global) | (k_pos < self.num_global)
    return seen & (q_pos >= k_pos) if self.causal else seen

  def layout(
    self, num_q_blocks: int, num_kv_blocks: int, block: int, length: int | None = None
  ) -> np.ndarray:
    """Bool [I, J]."""
    del length
    i_I1, j_1J = _block_indices(num_q_blocks, num_kv_blocks)
    near = Window(self.window, self.causal).layout(num_q_blocks, num_kv_blocks, block)
    seen = near | (i_I1 * block < self.num_global) | (j_1J * block < self.num_global)
    return seen & (i_I1 >= j_1J) if self.causal else seen


@dataclasses.dataclass(frozen=True)
class BigBird:
  """Blocks of positions that see a window of blocks, global blocks and random blocks.

  Zaheer et al. 2020, arXiv:2007.14062, section 2 and appendix D (the "internal"
  construction, ITC). A block sees

  - the `num_window_blocks` around its own (causal: its own and those before it);
  - the global blocks: half of `num_global_blocks`, rounded up, at the start of the
    document and the rest at its end (causal: all at the start). They see everything;
  - `num_random` of the other blocks (causal: of those before it), or all of them where
    there are no more. They are drawn by a hash of `seed` and the number of the query's
    block, one from each of `num_random` equal parts of the candidates, which is why
    the first tokens of a causal document see the same whatever follows.

  Deviations from the paper and from Hugging Face: all heads share one draw (give layers
  different seeds); draws are spread over the parts instead of uniform over all; the
  last block is that of the document, not that of the padded row; documents need not be
  a multiple of the block, nor longer than some minimum; the causal form is not theirs.

  Attributes:
    block: tokens of a block.
    num_window_blocks: blocks of the window; odd unless causal.
    num_global_blocks: global blocks.
    num_random: random blocks of each block.
    seed: of the draw.
    causal: whether keys after the query are hidden.
  """

  block: int = 64
  num_window_blocks: int = 3
  num_global_blocks: int = 2
  num_random: int = 3
  seed: int = 0
  causal: bool = False

  relative = False

  def __post_init__(self):
    require(self.block >= 1, f"block={self.block} must be at least 1")
    window = self.num_window_blocks
    require(
      window >= 1 and (self.causal or window % 2 == 1),
      f"num_window_blocks={window} must be positive, and odd unless causal",
    )
    for name in ("num_global_blocks", "num_random", "seed"):
      value = getattr(self, name)
      require(value >= 0, f"{name}={value} must not be negative")

  @property
  def needs_length(self) -> bool:
    """The end of a document matters where one may look ahead."""
    return not self.causal

  def seen(
    self, q_pos: Positions, k_pos: Positions, length: Positions | None = None
  ) -> jax.Array:
    """Exact for tokens; arguments broadcast.

    Args:
      q_pos, k_pos: positions.
      length: tokens of the query's document; only the causal form does without.
    """
    q_pos, k_pos = jnp.asarray(q_pos), jnp.asarray(k_pos)
    num_blocks = None
    if not self.causal:
      require(length is not None, "BigBird that is not causal needs the length")
      num_blocks = -(-jnp.asarray(length) // self.block)
    seen = self._blocks_seen(q_pos // self.block, k_pos // self.block, num_blocks)
    return seen & (q_pos >= k_pos) if self.causal else seen

  def layout(
    self, num_q_blocks: int, num_kv_blocks: int, block: int, length: int | None = None
  ) -> np.ndarray:
    """Bool [I, J], for documents of `length` tokens (default: all of the blocks)."""
    length = num_kv_blocks * block if length is None else length
    size = -(-max(num_q_blocks, num_kv_blocks) * block // self.block)
    i_I1, j_1J = _block_indices(size, size)
    num_blocks = np.asarray(-(-length // self.block))
    own = self._blocks_seen(i_I1, j_1J, num_blocks)
    seen = _regrid(own, self.block, num_q_blocks, num_kv_blocks, block)
    causal = CAUSAL.layout(num_q_blocks, num_kv_blocks, block)
    return seen & causal if self.causal else seen

  def _blocks_seen(self, q_blk, k_blk, num_blocks):
    """For numbers of blocks, in NumPy or traced."""
    glob, window = self.num_global_blocks, self.num_window_blocks
    first, last = (glob, 0) if self.causal else (-(-glob // 2), glob // 2)
    behind = q_blk - k_blk
    if self.causal:
      seen = (behind >= 0) & (behind < window)
    else:
      seen = abs(behind) <= window // 2
    seen = seen | (k_blk < first) | (q_blk < first)
    if last:
      seen = seen | (k_blk >= num_blocks - last) | (q_blk >= num_blocks - last)
    # Candidates: what lies between the globals, left and right of the window.
    if self.causal:
      left, right, start = (q_blk - window + 1 - first).clip(0), q_blk * 0, q_blk
    else:
      end = num_blocks - last
      start = (q_blk + window // 2 + 1).clip(first)
      left = (q_blk - window // 2 - first).clip(0)
      right = (end - start).clip(0)
    count = left + right
    for r in range(self.num_random):
      low = r * count // self.num_random
      size = (r + 1) * count // self.num_random - low
      hashed = _hash(q_blk, (self.seed * self.num_random + r) % 2**32)
      # Halved, so that the hash is a positive int32.
      draw = low + (hashed >> 1).astype(np.int32) % size.clip(1)
      jumped = (draw >= left).astype(np.int32)
      drawn = draw + first + jumped * (start - left - first)
      seen = seen | ((size > 0) & (k_blk == drawn))
    return seen


@dataclasses.dataclass(frozen=True)
class BlockMask:
  """Any matrix of blocks, repeated for every document.

  The block-sparse attention of Child et al. 2019 (arXiv:1904.10509) and of every
  hand-made pattern.

  Attributes:
    blocks: rows of queries, columns of keys: whether the blocks see each other.
      Positions outside of it see nothing and are not seen.
    block: tokens of a block.
    causal: whether keys after the query are hidden as well.
  """

  blocks: tuple[tuple[bool, ...], ...]
  block: int
  causal: bool = False

  relative = False
  needs_length = False

  def __post_init__(self):
    require(self.block >= 1, f"block={self.block} must be at least 1")
    widths = {len(row) for row in self.blocks}
    require(
      len(widths) == 1 and 0 not in widths,
      f"blocks must be rows of one length, got lengths {sorted(widths)}",
    )

  def seen(
    self, q_pos: Positions, k_pos: Positions, length: Positions | None = None
  ) -> jax.Array:
    """Looked up; arguments broadcast."""
    del length
    q_pos, k_pos = jnp.asarray(q_pos), jnp.asarray(k_pos)
    table = jnp.asarray(np.array(self.blocks, bool))
    q_blk, k_blk = jnp.broadcast_arrays(q_pos // self.block, k_pos // self.block)
    seen = table.at[q_blk, k_blk].get(mode="fill", fill_value=False)
    return seen & (q_pos >= k_pos) if self.causal else seen

  def layout(
    self, num_q_blocks: int, num_kv_blocks: int, block: int, length: int | None = None
  ) -> np.ndarray:
    """Bool [I, J]."""
    del length
    own = np.array(self.blocks, bool)
    size = -(-max(num_q_blocks, num_kv_blocks) * block // self.block)
    grown = np.zeros((size, size), bool)
    own = own[:size, :size]
    grown[: own.shape[0], : own.shape[1]] = own
    seen = _regrid(grown, self.block, num_q_blocks, num_kv_blocks, block)
    causal = CAUSAL.layout(num_q_blocks, num_kv_blocks, block)
    return seen & causal if self.causal else seen


Pattern = Full | Causal | Window | Longformer | BigBird | BlockMask

FULL, CAUSAL = Full(), Causal()


def _block_indices(num_q_blocks: int, num_kv_blocks: int):
  return np.arange(num_q_blocks)[:, None], np.arange(num_kv_blocks)[None, :]


def _regrid(
  own: np.ndarray, size: int, num_q_blocks: int, num_kv_blocks: int, block: int
) -> np.ndarray:
  """A matrix over blocks of `size` tokens as one over blocks of `block` tokens.

  True where any of the overlapping blocks is: by differences of running sums.
  """
  sums = np.pad(np.cumsum(np.cumsum(own, 0), 1), ((1, 0), (1, 0)))

  def edges(count: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.arange(count) * block
    return starts // size, np.minimum((starts + block - 1) // size + 1, len(own))

  (q0, q1), (k0, k1) = edges(num_q_blocks), edges(num_kv_blocks)
  at = lambda q, k: sums[np.minimum(q, len(own))[:, None], np.minimum(k, len(own))]
  return at(q1, k1) - at(q0, k1) - at(q1, k0) + at(q0, k0) > 0


def _hash(x, salt: int):
  """Random looking uint32 of integers, in NumPy or traced: the "lowbias32" mixer."""
  x = x.astype(np.uint32) * np.uint32(0x9E3779B1) + np.uint32(salt)
  x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
  return x ^ (x >> 16)
