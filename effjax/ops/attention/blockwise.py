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

Local letters: R query heads a group, C queries of one block, J keys of one block, M the
R * C rows of a product, W size of a value head, I and N numbers of blocks, P pairs.
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
from effjax.ops.attention import masks, patterns, xla

# Below every score, above what is masked: exp(MASKED - _LOWEST) is 0.
_LOWEST = masks.MASKED / 2

# The layout that one_document holds; `ops.flops` counts this branch.
ONE_DOCUMENT = "one_document_a_row"

# Time of a pair of tokens in blocks of so many, measured on a CPU (AMD EPYC, 2 cores,
# forward and backward, heads of 64): small blocks compute fewer pairs that nobody sees,
# large ones take less for each. Blocks of 128 are slower there than any of these.
_CPU_COSTS = {64: 1.6, 256: 1.0, 512: 0.88}

_Pair = tuple[jax.Array, jax.Array]


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
  num_rows, q_len, num_heads, head_dim = q_BLHK.shape
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
  scale = head_dim**-0.5 if scale is None else scale
  q_BLGRK = q_BLHK.reshape(num_rows, q_len, num_groups, -1, head_dim)
  q_BLGRK = (q_BLGRK * scale).astype(q_BLHK.dtype)
  q_NBGRCK = _split(q_BLGRK, block).transpose(1, 0, 3, 4, 2, 5)
  slopes_GR = None
  if slopes_H is not None:
    slopes_GR = lax.stop_gradient(jnp.asarray(slopes_H)).reshape(num_groups, -1)
  y_NBGRCW = _attend(
    static,
    q_NBGRCK,
    _split(k_BSGK, block).transpose(1, 0, 3, 2, 4),
    _split(v_BSGW, block).transpose(1, 0, 3, 2, 4),
    *_pad(q_tokens, kv_tokens, block),
    slopes_GR,
  )
  y_BLHW = y_NBGRCW.transpose(1, 0, 4, 2, 3, 5).reshape(
    num_rows, -1, num_heads, v_BSGW.shape[-1]
  )
  return y_BLHW[:, :q_len]


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
  wide = jnp.float32
  delta_NBGRC = jnp.sum(dy_NBGRCW.astype(wide) * y_NBGRCW.astype(wide), axis=-1)
  kept = (log_sum_NBGRC, dy_NBGRCW, delta_NBGRC)
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
  q_NBGRCK, _, v_IBGJW = args[:3]
  rows = q_NBGRCK.shape[:-1]

  def step(
    carry: tuple[jax.Array, ...], pair: tuple[jax.Array, jax.Array]
  ) -> tuple[Any, None]:
    i, j = pair
    max_BGRC, sum_BGRC, y_BGRCW = (_at(x, i) for x in carry)
    s_BGRCJ, _ = _scores(static, i, j, *args)
    new_BGRC = jnp.maximum(max_BGRC, jnp.max(s_BGRCJ, axis=-1))
    e_BGRCJ = jnp.exp(s_BGRCJ - new_BGRC[..., None])
    shrink_BGRC = jnp.exp(max_BGRC - new_BGRC)
    sum_BGRC = sum_BGRC * shrink_BGRC + jnp.sum(e_BGRCJ, axis=-1)
    v_BGJW = _at(v_IBGJW, j)
    y_BGRCW = y_BGRCW * shrink_BGRC[..., None] + _product(
      e_BGRCJ.astype(v_BGJW.dtype), v_BGJW, -1, -2
    )
    new = (new_BGRC, sum_BGRC, y_BGRCW)
    return tuple(_put(x, i, u) for x, u in zip(carry, new, strict=True)), None

  start = (
    jnp.full(rows, _LOWEST, jnp.float32),
    jnp.zeros(rows, jnp.float32),
    jnp.zeros((*rows, v_IBGJW.shape[-1]), jnp.float32),
  )
  (max_NBGRC, sum_NBGRC, y_NBGRCW), _ = lax.scan(step, start, tuple(pairs_P2.T))
  alive = sum_NBGRC > 0
  y_NBGRCW *= jnp.where(alive, 1 / sum_NBGRC, 0.0)[..., None]
  # Where nothing is seen: so high that every weight computed from it is 0.
  log_sum_NBGRC = jnp.where(alive, max_NBGRC + jnp.log(sum_NBGRC), -masks.MASKED)
  return y_NBGRCW.astype(q_NBGRCK.dtype), log_sum_NBGRC


def _backward_pairs(
  static: _Static, pairs_P2: np.ndarray, *args: Any
) -> tuple[jax.Array, ...]:
  """Float32 gradients of queries, keys and values, over given pairs."""
  *args, log_sum_NBGRC, dy_NBGRCW, delta_NBGRC = args
  q_NBGRCK, k_IBGJK, v_IBGJW = args[:3]

  def step(
    carry: tuple[jax.Array, ...], pair: tuple[jax.Array, jax.Array]
  ) -> tuple[Any, None]:
    i, j = pair
    dq_NBGRCK, dk_IBGJK, dv_IBGJW = carry
    q_BGMK, dy_BGMW = _rows(_at(q_NBGRCK, i)), _rows(_at(dy_NBGRCW, i))
    s_BGRCJ, slope_BGRCJ = _scores(static, i, j, *args)
    p_BGRCJ = jnp.exp(s_BGRCJ - _at(log_sum_NBGRC, i)[..., None])
    dp_BGRCJ = _product(_at(dy_NBGRCW, i), _at(v_IBGJW, j), -1, -1)
    ds_BGRCJ = p_BGRCJ * (dp_BGRCJ - _at(delta_NBGRC, i)[..., None])
    if slope_BGRCJ is not None:
      ds_BGRCJ *= slope_BGRCJ
    p_BGMJ = _rows(p_BGRCJ).astype(dy_BGMW.dtype)
    ds_BGMJ = _rows(ds_BGRCJ).astype(q_BGMK.dtype)
    dq_BGRCK = _product(ds_BGMJ, _at(k_IBGJK, j), -1, -2).reshape(q_NBGRCK.shape[1:])
    return (
      _put(dq_NBGRCK, i, _at(dq_NBGRCK, i) + dq_BGRCK),
      _put(dk_IBGJK, j, _at(dk_IBGJK, j) + _product(ds_BGMJ, q_BGMK, -2, -2)),
      _put(dv_IBGJW, j, _at(dv_IBGJW, j) + _product(p_BGMJ, dy_BGMW, -2, -2)),
    ), None

  start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q_NBGRCK, k_IBGJK, v_IBGJW))
  return lax.scan(step, start, tuple(pairs_P2.T))[0]


def _scores(
  static: _Static,
  i: jax.Array,
  j: jax.Array,
  q_NBGRCK: jax.Array,
  k_IBGJK: jax.Array,
  v_IBGJW: jax.Array,
  q_tokens: masks.Tokens,
  kv_tokens: masks.Tokens,
  slopes_GR: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
  """Scores of one pair with mask and bias, and the derivative of the cap, or None."""
  del v_IBGJW
  s_BGRCJ = _product(_at(q_NBGRCK, i), _at(k_IBGJK, j), -1, -1)
  slope_BGRCJ = None
  if static.logit_cap is not None:
    tanh_BGRCJ = jnp.tanh(s_BGRCJ / static.logit_cap)
    s_BGRCJ = static.logit_cap * tanh_BGRCJ
    slope_BGRCJ = 1 - jnp.square(tanh_BGRCJ)
  q_part, kv_part = _tokens_at(q_tokens, i, static), _tokens_at(kv_tokens, j, static)
  bias_BCJ = masks.bias_BCS(static.pattern, q_part, kv_part)
  s_BGRCJ += bias_BCJ[:, None, None]
  if slopes_GR is not None:
    s_BGRCJ += xla.slope_bias(
      slopes_GR, q_part.positions, kv_part.positions, len(slopes_GR)
    )
  return s_BGRCJ, slope_BGRCJ


def _product(a: jax.Array, b_BGYZ: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """Contracts an axis of a with one of b in float32; a is [B, G, M, .] or has R, C."""
  shape = a.shape
  a = _rows(a) if a.ndim == 5 else a
  contracted = ((a.ndim + axis_a,), (b_BGYZ.ndim + axis_b,))
  dims = (contracted, ((0, 1), (0, 1)))
  y = lax.dot_general(a, b_BGYZ, dims, preferred_element_type=jnp.float32)
  return y.reshape(*shape[:4], -1) if len(shape) == 5 else y


def _rows(x_BGRCX: jax.Array) -> jax.Array:
  """Heads of a group and queries as the rows of one matrix."""
  return x_BGRCX.reshape(*x_BGRCX.shape[:2], -1, x_BGRCX.shape[-1])


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _put(x: jax.Array, index: jax.Array, update: jax.Array) -> jax.Array:
  return lax.dynamic_update_index_in_dim(x, update, index, 0)


def _tokens_at(tokens: masks.Tokens, index: jax.Array, static: _Static) -> masks.Tokens:
  """The tokens of a block."""
  size = static.block
  cut = lambda x: lax.dynamic_slice_in_dim(x, index * size, size, axis=1)
  return masks.Tokens(*(None if x is None else cut(x) for x in tokens))


def _split(x_BL: jax.Array, block: int) -> jax.Array:
  """[B, L, ...] as [B, N, block, ...], padded with zeros."""
  extra = -x_BL.shape[1] % block
  if extra:
    x_BL = jnp.pad(x_BL, ((0, 0), (0, extra), *[(0, 0)] * (x_BL.ndim - 2)))
  return x_BL.reshape(x_BL.shape[0], -1, block, *x_BL.shape[2:])


def _pad(
  q_tokens: masks.Tokens, kv_tokens: masks.Tokens, block: int
) -> list[masks.Tokens]:
  """Both sides up to a multiple of the block; what is added is segment 0."""
  sides = [q_tokens, kv_tokens]
  extras = [-side.positions.shape[1] % block for side in sides]
  if any(extras) and q_tokens.segments is None:
    sides = [side._replace(segments=jnp.ones_like(side.positions)) for side in sides]
  return [
    masks.Tokens(*(None if x is None else jnp.pad(x, ((0, 0), (0, n))) for x in side))
    for side, n in zip(sides, extras, strict=True)
  ]
