"""Softmax along pairs of blocks: what blockwise attention and the ring are made of.

Dao et al. 2022, arXiv:2205.14135, algorithms 1 and 4 (online softmax; a backward pass
that computes the weights again from their logarithmic sums). Sums and gradients are
arrays of all blocks that pairs of a block of queries and a block of keys are added to,
in one scan over the pairs; what the pairs are, in which order they come and whether all
keys are there at once is up to the caller.

Local letters: R query heads a group, C queries of one block, J keys of one block, M the
R * C rows of a product, W size of a value head, I and N numbers of blocks, P pairs.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.ops.attention import masks, patterns, xla

# Below every score, above what is masked: exp(MASKED - _LOWEST) is 0.
_LOWEST = masks.MASKED / 2


@dataclasses.dataclass(frozen=True)
class Scoring:
  """What the score of a pair of tokens depends on besides the operands.

  Attributes:
    pattern: who sees whom.
    block: queries and keys of a block.
    logit_cap: c of `c * tanh(scores / c)`, or None.
  """

  pattern: patterns.Pattern
  block: int
  logit_cap: float | None = None


class Operands(NamedTuple):
  """Queries and keys in blocks, and what the mask has to know of both.

  Attributes:
    q_NBGRCK: scaled queries.
    k_IBGJK: keys.
    v_IBGJW: values.
    q_tokens: `[., N * C]`; see masks.Tokens.
    kv_tokens: `[., I * J]`.
    slopes_GR: m of the linear biases, or None.
  """

  q_NBGRCK: jax.Array
  k_IBGJK: jax.Array
  v_IBGJW: jax.Array
  q_tokens: masks.Tokens
  kv_tokens: masks.Tokens
  slopes_GR: jax.Array | None = None


class Sums(NamedTuple):
  """A softmax on its way, float32.

  Attributes:
    max_NBGRC: largest score of a query so far.
    sum_NBGRC: sum of the exponentials of the scores less that one.
    y_NBGRCW: sum of the values times these exponentials.
  """

  max_NBGRC: jax.Array
  sum_NBGRC: jax.Array
  y_NBGRCW: jax.Array


class Kept(NamedTuple):
  """What a backward pass knows of the queries.

  Attributes:
    log_sum_NBGRC: see `finished`.
    dy_NBGRCW: gradient of the output.
    delta_NBGRC: see `delta_NBGRC`.
  """

  log_sum_NBGRC: jax.Array
  dy_NBGRCW: jax.Array
  delta_NBGRC: jax.Array


# Float32 gradients of the queries, keys and values of `Operands`.
Gradients = tuple[jax.Array, jax.Array, jax.Array]


def queries(
  parts_BLHK: Sequence[jax.Array], num_groups: int, block: int, scale: float | None
) -> jax.Array:
  """Parts of a sequence, scaled and in blocks behind each other: q_NBGRCK."""

  def scaled(q_BLHK: jax.Array) -> jax.Array:
    num_rows, length, _, head_dim = q_BLHK.shape
    factor = head_dim**-0.5 if scale is None else scale
    q_BLGRK = q_BLHK.reshape(num_rows, length, num_groups, -1, head_dim)
    return (q_BLGRK * factor).astype(q_BLHK.dtype)

  q_BNCGRK = _split([scaled(part) for part in parts_BLHK], block)
  return q_BNCGRK.transpose(1, 0, 3, 4, 2, 5)


def keys(parts_BSGK: Sequence[jax.Array], block: int) -> jax.Array:
  """Keys or values of parts of a sequence, in blocks behind each other: k_IBGJK."""
  return _split(parts_BSGK, block).transpose(1, 0, 3, 2, 4)


def slopes(slopes_H: jax.Array | None, num_groups: int) -> jax.Array | None:
  """Slopes by group, without gradient."""
  if slopes_H is None:
    return None
  return lax.stop_gradient(jnp.asarray(slopes_H)).reshape(num_groups, -1)


def padded(
  q_tokens: masks.Tokens, kv_tokens: masks.Tokens, block: int
) -> tuple[masks.Tokens, masks.Tokens]:
  """Both sides up to a multiple of the block; what is added is segment 0."""
  sides = [q_tokens, kv_tokens]
  extras = [-side.positions.shape[1] % block for side in sides]
  if any(extras) and q_tokens.segments is None:
    sides = [side._replace(segments=jnp.ones_like(side.positions)) for side in sides]
  q_side, kv_side = (
    masks.Tokens(*(None if x is None else jnp.pad(x, ((0, 0), (0, n))) for x in side))
    for side, n in zip(sides, extras, strict=True)
  )
  return q_side, kv_side


def heads(y_NBGRCW: jax.Array) -> jax.Array:
  """Blocks behind each other, padding included: y_BLHW."""
  _, num_rows, num_groups, num_repeats, _, value_dim = y_NBGRCW.shape
  y_BNCGRW = y_NBGRCW.transpose(1, 0, 4, 2, 3, 5)
  return y_BNCGRW.reshape(num_rows, -1, num_groups * num_repeats, value_dim)


def no_sums(q_NBGRCK: jax.Array, v_IBGJW: jax.Array) -> Sums:
  """The sums over no keys."""
  rows = q_NBGRCK.shape[:-1]
  return Sums(
    jnp.full(rows, _LOWEST, jnp.float32),
    jnp.zeros(rows, jnp.float32),
    jnp.zeros((*rows, v_IBGJW.shape[-1]), jnp.float32),
  )


def add(
  scoring: Scoring, pairs_P2: np.ndarray | jax.Array, sums: Sums, operands: Operands
) -> Sums:
  """The sums with the pairs of blocks (of queries, of keys) added to them."""
  v_IBGJW = operands.v_IBGJW

  def step(sums: Sums, pair: tuple[jax.Array, jax.Array]) -> tuple[Sums, None]:
    i, j = pair
    max_BGRC, sum_BGRC, y_BGRCW = (_at(x, i) for x in sums)
    s_BGRCJ, _ = _scores(scoring, i, j, operands)
    new_BGRC = jnp.maximum(max_BGRC, jnp.max(s_BGRCJ, axis=-1))
    e_BGRCJ = jnp.exp(s_BGRCJ - new_BGRC[..., None])
    shrink_BGRC = jnp.exp(max_BGRC - new_BGRC)
    sum_BGRC = sum_BGRC * shrink_BGRC + jnp.sum(e_BGRCJ, axis=-1)
    v_BGJW = _at(v_IBGJW, j)
    y_BGRCW = y_BGRCW * shrink_BGRC[..., None] + _product(
      e_BGRCJ.astype(v_BGJW.dtype), v_BGJW, -1, -2
    )
    new = (new_BGRC, sum_BGRC, y_BGRCW)
    return Sums(*(_put(x, i, u) for x, u in zip(sums, new, strict=True))), None

  return lax.scan(step, sums, (pairs_P2[:, 0], pairs_P2[:, 1]))[0]


def finished(sums: Sums, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """Outputs, and the float32 logarithms of the sums of exponentials of all scores."""
  max_NBGRC, sum_NBGRC, y_NBGRCW = sums
  alive = sum_NBGRC > 0
  y_NBGRCW *= jnp.where(alive, 1 / sum_NBGRC, 0.0)[..., None]
  # Where nothing is seen: so high that every weight computed from it is 0.
  log_sum_NBGRC = jnp.where(alive, max_NBGRC + jnp.log(sum_NBGRC), -masks.MASKED)
  return y_NBGRCW.astype(dtype), log_sum_NBGRC


def delta_NBGRC(y_NBGRCW: jax.Array, dy_NBGRCW: jax.Array) -> jax.Array:
  """The products of outputs with their gradients, float32."""
  wide = jnp.float32
  return jnp.sum(dy_NBGRCW.astype(wide) * y_NBGRCW.astype(wide), axis=-1)


def add_gradients(
  scoring: Scoring,
  pairs_P2: np.ndarray | jax.Array,
  gradients: Gradients,
  operands: Operands,
  kept: Kept,
) -> Gradients:
  """The gradients with those of the pairs of blocks added to them."""
  q_NBGRCK, k_IBGJK, v_IBGJW = operands[:3]

  def step(
    gradients: Gradients, pair: tuple[jax.Array, jax.Array]
  ) -> tuple[Gradients, None]:
    i, j = pair
    dq_NBGRCK, dk_IBGJK, dv_IBGJW = gradients
    dy_BGRCW = _at(kept.dy_NBGRCW, i)
    q_BGMK, dy_BGMW = _rows(_at(q_NBGRCK, i)), _rows(dy_BGRCW)
    s_BGRCJ, slope_BGRCJ = _scores(scoring, i, j, operands)
    p_BGRCJ = jnp.exp(s_BGRCJ - _at(kept.log_sum_NBGRC, i)[..., None])
    dp_BGRCJ = _product(dy_BGRCW, _at(v_IBGJW, j), -1, -1)
    ds_BGRCJ = p_BGRCJ * (dp_BGRCJ - _at(kept.delta_NBGRC, i)[..., None])
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

  return lax.scan(step, gradients, (pairs_P2[:, 0], pairs_P2[:, 1]))[0]


def _scores(
  scoring: Scoring, i: jax.Array, j: jax.Array, operands: Operands
) -> tuple[jax.Array, jax.Array | None]:
  """Scores of one pair with mask and bias, and the derivative of the cap, or None."""
  q_NBGRCK, k_IBGJK, _, q_tokens, kv_tokens, slopes_GR = operands
  s_BGRCJ = _product(_at(q_NBGRCK, i), _at(k_IBGJK, j), -1, -1)
  slope_BGRCJ = None
  if scoring.logit_cap is not None:
    tanh_BGRCJ = jnp.tanh(s_BGRCJ / scoring.logit_cap)
    s_BGRCJ = scoring.logit_cap * tanh_BGRCJ
    slope_BGRCJ = 1 - jnp.square(tanh_BGRCJ)
  q_part = _tokens_at(q_tokens, i, scoring.block)
  kv_part = _tokens_at(kv_tokens, j, scoring.block)
  bias_BCJ = masks.bias_BCS(scoring.pattern, q_part, kv_part)
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


def _tokens_at(tokens: masks.Tokens, index: jax.Array, block: int) -> masks.Tokens:
  """The tokens of a block."""
  cut = lambda x: lax.dynamic_slice_in_dim(x, index * block, block, axis=1)
  return masks.Tokens(*(None if x is None else cut(x) for x in tokens))


def _split(parts_BL: Sequence[jax.Array], block: int) -> jax.Array:
  """[B, L, ...] each as [B, N, block, ...], padded with zeros, behind each other."""

  def one(x_BL: jax.Array) -> jax.Array:
    extra = -x_BL.shape[1] % block
    if extra:
      x_BL = jnp.pad(x_BL, ((0, 0), (0, extra), *[(0, 0)] * (x_BL.ndim - 2)))
    return x_BL.reshape(x_BL.shape[0], -1, block, *x_BL.shape[2:])

  split = [one(part) for part in parts_BL]
  return split[0] if len(split) == 1 else jnp.concatenate(split, axis=1)
