"""Softmax attention in memory linear in the length, which skips what nobody sees.

Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4 (online softmax; a backward pass
that computes the weights again from their logarithmic sums), in plain XLA: one scan
over the pairs of a block of queries and a block of keys that `pattern.layout` names, in
the forward and in the backward pass. So sliding windows, Longformer, BigBird and any
block mask leave out whole blocks, the trip counts are static and FLOPs can be counted.
Deviation: the pairs of one block of queries follow each other, their sums are held in
an array that is updated in place.

Packed rows. `Full`, `Causal` and `Window` depend on differences of positions only, so
their layout also holds where documents are packed, and segments are masked inside the
blocks. The layouts of `Longformer`, `BigBird` and `BlockMask` hold for rows of one
document that starts the row (padding on the right). With segments, a condition at run
time takes that layout if all rows of the batch are such, and otherwise all pairs
(causal: the lower half), with the exact mask: results never depend on it. Explicit
positions are treated alike: the layout is used if they are the indices.
Without segments and positions there is no condition.

Local letters: R query heads a group, C queries of one block, J keys of one block, W
size of a value head, I and N numbers of blocks, P pairs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.core import shard
from effjax.core.config import require
from effjax.ops.attention import blocks, masks, patterns, xla

# The layout that one_document holds; `ops.flops` counts this branch.
ONE_DOCUMENT = "one_document_a_row"

# Time of a pair of tokens in blocks of so many, measured on a CPU (AMD EPYC, 2 cores,
# forward and backward, heads of 64): small blocks compute fewer pairs that nobody sees,
# large ones take less for each. Blocks of 128 are slower there than any of these.
_CPU_COSTS = {64: 1.6, 256: 1.0, 512: 0.88}


@dataclasses.dataclass(frozen=True)
class _Static:
  """What is known when tracing."""

  pattern: patterns.Pattern
  block: int
  q_len: int
  kv_len: int
  logit_cap: float | None
  in_order: bool
  conditional: bool

  @property
  def scoring(self) -> blocks.Scoring:
    """What the score of a pair depends on."""
    return blocks.Scoring(self.pattern, self.block, self.logit_cap)


def attention(
  q_BLHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGW: jax.Array,
  *,
  pattern: patterns.Pattern = patterns.CAUSAL,
  q_positions_BL: jax.Array | None = None,
  kv_positions_BS: jax.Array | None = None,
  q_segments_BL: jax.Array | None = None,
  kv_segments_BS: jax.Array | None = None,
  slopes_H: jax.Array | None = None,
  logit_cap: float | None = None,
  scale: float | None = None,
  block: int | None = None,
) -> jax.Array:
  """Attention of every query over the keys it may see; see `api.attention`.

  Args:
    block: queries and keys of one block (tokens), by default `block_size`; does not
      change results.

  Raises:
    InputError: H not a multiple of G, segments or positions of one side only with
      L != S, a block under 1.
  """
  xla.check_heads(q_BLHK, k_BSGK)
  q_len = q_BLHK.shape[1]
  kv_len, num_groups = k_BSGK.shape[1:3]
  if block is None:
    block = block_size(pattern, q_len, kv_len, shard.platform())
  require(block >= 1, f"block={block} must be at least 1")
  explicit = q_positions_BL is not None or kv_positions_BS is not None
  q_tokens, kv_tokens = masks.tokens(
    pattern,
    q_len,
    kv_len,
    q_positions_BL,
    kv_positions_BS,
    q_segments_BL,
    kv_segments_BS,
  )
  static = _Static(
    pattern=pattern,
    block=block,
    q_len=q_len,
    kv_len=kv_len,
    logit_cap=logit_cap,
    in_order=not explicit and q_len == kv_len,
    conditional=explicit or (q_tokens.segments is not None and not pattern.relative),
  )
  y_NBGRCW = _attend(
    static,
    blocks.queries([q_BLHK], num_groups, block, scale),
    blocks.keys([k_BSGK], block),
    blocks.keys([v_BSGW], block),
    *blocks.padded(q_tokens, kv_tokens, block),
    blocks.slopes(slopes_H, num_groups),
  )
  return blocks.heads(y_NBGRCW)[:, :q_len]


@functools.lru_cache(maxsize=256)
def block_size(
  pattern: patterns.Pattern, q_len: int, kv_len: int, platform: str
) -> int:
  """The default block (tokens), for a platform as JAX names it.

  On a CPU the one that costs least for what the pattern computes in it; elsewhere, not
  measured, 512.
  """
  longest = max(q_len, kv_len)
  if platform != "cpu":
    return min(512, longest)
  sizes = {min(size, longest): cost for size, cost in _CPU_COSTS.items()}
  cost = lambda size: sizes[size] * computed_pairs(q_len, kv_len, pattern, size)
  return min(sizes, key=cost)


def block_pairs(
  pattern: patterns.Pattern, q_len: int, kv_len: int, block: int
) -> np.ndarray:
  """The pairs of blocks that are computed, int32 [P, 2], by blocks of queries."""
  num_q, num_kv = -(-q_len // block), -(-kv_len // block)
  layout = pattern.layout(num_q, num_kv, block, kv_len)
  return np.argwhere(layout).astype(np.int32)


def computed_pairs(
  q_len: int, kv_len: int, pattern: patterns.Pattern, block: int
) -> int:
  """Pairs of query and key that are multiplied, masked ones included.

  The dots of a forward pass take 4 * pairs * K FLOPs a row and query head.
  """
  return block**2 * len(block_pairs(pattern, q_len, kv_len, block))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  static: _Static,
  q_NBGRCK: jax.Array,
  k_IBGJK: jax.Array,
  v_IBGJW: jax.Array,
  q_tokens: masks.Tokens,
  kv_tokens: masks.Tokens,
  slopes_GR: jax.Array | None,
) -> jax.Array:
  """Blocks of scaled queries over blocks of keys; y_NBGRCW in the dtype of q."""
  return _forward(static, q_NBGRCK, k_IBGJK, v_IBGJW, q_tokens, kv_tokens, slopes_GR)[0]


def _forward(static: _Static, *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
  y_NBGRCW, log_sum_NBGRC = _choose_pairs(static, _forward_pairs, args)
  return y_NBGRCW, (args, y_NBGRCW, log_sum_NBGRC)


def _backward(
  static: _Static, residuals: tuple[Any, ...], dy_NBGRCW: jax.Array
) -> tuple[Any, ...]:
  args, y_NBGRCW, log_sum_NBGRC = residuals
  kept = blocks.Kept(log_sum_NBGRC, dy_NBGRCW, blocks.delta_NBGRC(y_NBGRCW, dy_NBGRCW))
  grads = _choose_pairs(static, _backward_pairs, (*args, *kept))
  grads = [d.astype(x.dtype) for d, x in zip(grads, args[:3], strict=True)]
  slopes_GR = args[-1]
  dslopes = None if slopes_GR is None else jnp.zeros_like(slopes_GR)
  return (*grads, None, None, dslopes)


_attend.defvjp(_forward, _backward)


def _choose_pairs(static: _Static, run: Any, args: tuple[Any, ...]) -> Any:
  """`run` over the pairs of the layout, or over all if it does not hold."""
  pattern, sizes = static.pattern, (static.q_len, static.kv_len, static.block)
  few = functools.partial(run, static, block_pairs(pattern, *sizes))
  if not static.conditional:
    return few(*args)
  causal = pattern.causal and static.in_order
  every = block_pairs(patterns.Causal() if causal else patterns.Full(), *sizes)
  named = lambda *args: few(*args)
  named.__name__ = ONE_DOCUMENT
  return lax.cond(
    _layout_holds(static, args[3], args[4]),
    jax.jit(named),
    functools.partial(run, static, every),
    *args,
  )


def _layout_holds(
  static: _Static, q_tokens: masks.Tokens, kv_tokens: masks.Tokens
) -> jax.Array:
  """Whether every token that is not padding has its index as its position."""
  holds = jnp.bool_(True)
  for side, length in ((q_tokens, static.q_len), (kv_tokens, static.kv_len)):
    side = side.cut(slice(0, length))
    right = side.positions == jnp.arange(length)[None]
    if side.lengths is not None:
      # The end of the document has to be in the block that the layout assumes.
      size = static.pattern.block
      right &= -(-side.lengths // size) == -(-static.kv_len // size)
    if side.segments is not None:
      right |= side.segments == 0
    holds &= jnp.all(right)
  return holds


def _forward_pairs(
  static: _Static, pairs_P2: np.ndarray, *args: Any
) -> tuple[jax.Array, jax.Array]:
  """Outputs and the logarithms of the sums of exponentials, over given pairs."""
  operands = blocks.Operands(*args)
  sums = blocks.no_sums(operands.q_NBGRCK, operands.v_IBGJW)
  sums = blocks.add(static.scoring, pairs_P2, sums, operands)
  return blocks.finished(sums, operands.q_NBGRCK.dtype)


def _backward_pairs(
  static: _Static, pairs_P2: np.ndarray, *args: Any
) -> tuple[jax.Array, ...]:
  """Float32 gradients of queries, keys and values, over given pairs."""
  operands, kept = blocks.Operands(*args[:-3]), blocks.Kept(*args[-3:])
  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in operands[:3])
  return blocks.add_gradients(static.scoring, pairs_P2, start, operands, kept)
