"""Which keys a query may see, as a term added to its scores.

Local letters: C queries of one block, S the keys that block can see.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core.config import require
from effjax.ops.attention import patterns

# Far below any score, and its sum with a score is still finite in float32.
MASKED = -1e30


class Tokens(NamedTuple):
  """What the mask has to know of one side, the queries or the keys.

  Attributes:
    positions: int32 [B or 1, L], from 0 in each document.
    segments: int32 [B, L] or None; 0 is padding.
    lengths: int32 [B or 1, L], tokens of each token's document; None unless the pattern
      needs them.
  """

  positions: jax.Array
  segments: jax.Array | None = None
  lengths: jax.Array | None = None

  def cut(self, part: slice) -> "Tokens":
    """The tokens of a slice of the length."""
    return Tokens(*(None if x is None else x[:, part] for x in self))


def tokens(
  pattern: patterns.Pattern,
  q_len: int,
  kv_len: int,
  q_positions_BL: jax.Array | None = None,
  kv_positions_BS: jax.Array | None = None,
  q_segments_BL: jax.Array | None = None,
  kv_segments_BS: jax.Array | None = None,
) -> tuple[Tokens, Tokens]:
  """Both sides, with what was left out filled in.

  One side's positions or segments serve both if L == S. Positions default to those in
  the documents the segments mark, or to the indices where that is all the same: without
  segments, or for a pattern that only looks at differences.

  Raises:
    InputError: one side alone with L != S; unequal sides for a pattern that depends on
      the length of the document.
  """
  q_pos, kv_pos = _both(q_positions_BL, kv_positions_BS, q_len, kv_len, "positions")
  q_seg, kv_seg = _both(q_segments_BL, kv_segments_BS, q_len, kv_len, "segments")
  require(
    not pattern.needs_length or q_len == kv_len,
    f"{pattern} is for as many queries as keys, got {q_len} and {kv_len}",
  )
  sides = []
  for positions, segments, length in ((q_pos, q_seg, q_len), (kv_pos, kv_seg, kv_len)):
    lengths = None
    if segments is not None and not pattern.relative:
      places, lengths = documents(segments)
      positions = places if positions is None else positions
    if positions is None:
      positions = jnp.arange(length)[None]
    if lengths is None:
      lengths = jnp.full((1, length), length)
    sides.append(Tokens(positions, segments, lengths if pattern.needs_length else None))
  return sides[0], sides[1]


def documents(segments_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Position of each token in its run of equal segments, and the length of that run."""
  length = segments_BL.shape[1]
  index_1L = jnp.arange(length)[None]
  changes_BL = segments_BL[:, 1:] != segments_BL[:, :-1]
  edge = lambda at: jnp.pad(changes_BL, ((0, 0), at), constant_values=True)
  start_BL = lax.cummax(jnp.where(edge((1, 0)), index_1L, 0), axis=1)
  end_BL = jnp.where(edge((0, 1)), index_1L + 1, length)
  end_BL = lax.cummin(end_BL, axis=1, reverse=True)
  return index_1L - start_BL, end_BL - start_BL


def bias_BCS(
  pattern: patterns.Pattern,
  q: Tokens,
  kv: Tokens,
  *,
  lengths_B: jax.Array | None = None,
) -> jax.Array:
  """Zero where a query sees a key, `MASKED` where not.

  Args:
    pattern: who sees whom inside a document.
    q, kv: both sides; other segments and segment 0 are hidden.
    lengths_B: int32; keys whose *position* is not below it are hidden.

  Returns:
    float32 [B or 1, C, S].
  """
  kv_B1S = kv.positions[:, None, :]
  length_BC1 = None if q.lengths is None else q.lengths[:, :, None]
  seen = pattern.seen(q.positions[:, :, None], kv_B1S, length_BC1)
  if q.segments is not None:
    kv_seg_B1S = kv.segments[:, None, :]
    seen &= (q.segments[:, :, None] == kv_seg_B1S) & (kv_seg_B1S > 0)
  if lengths_B is not None:
    seen &= kv_B1S < lengths_B[:, None, None]
  return jnp.where(seen, 0.0, MASKED).astype(jnp.float32)


def _both(
  q_side: jax.Array | None,
  kv_side: jax.Array | None,
  q_len: int,
  kv_len: int,
  name: str,
) -> tuple[jax.Array | None, jax.Array | None]:
  """Both sides of a pair of arrays of which one may stand for the other."""
  if (q_side is None) != (kv_side is None):
    require(
      q_len == kv_len,
      f"attention {name} given for one side of {q_len} queries and {kv_len} keys; "
      "give both",
    )
    q_side = kv_side = kv_side if q_side is None else q_side
  return q_side, kv_side
