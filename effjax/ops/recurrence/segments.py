"""Where a packed row starts a new document, for ops that carry a state along it."""

import jax
import jax.numpy as jnp
from jax import lax

from effjax.ops.recurrence import across_devices


def documents(segments_BL: jax.Array, over: across_devices.Over = ()) -> jax.Array:
  """Numbers the documents of each row from 0, so that a change means a reset.

  A token resets the state when its segment differs from that of the last token before
  it that is no padding. Padding belongs to the document before it; padding at the start
  of a row belongs to the first one, as does any state the row starts from. A segment id
  that comes back after another one is a new document.

  Args:
    segments_BL: integer segment ids; 0 is padding.
    over: mesh axes, if these are slices of rows that are split over devices.

  Returns:
    int32 `[B, L]`, starting at 0 and never decreasing along a row. A slice whose first
    token is of a new document starts at 1: document 0 is that of the state it meets.
  """
  length = segments_BL.shape[1]
  index_BL = jnp.broadcast_to(jnp.arange(length)[None, :], segments_BL.shape)
  last_BL = lax.cummax(jnp.where(segments_BL != 0, index_BL, -1), axis=1)
  last_BL = jnp.pad(last_BL[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  previous_BL = jnp.take_along_axis(segments_BL, jnp.maximum(last_BL, 0), axis=1)
  resets_BL = (last_BL >= 0) & (segments_BL != 0) & (segments_BL != previous_BL)
  document_BL = jnp.cumsum(resets_BL, axis=1, dtype=jnp.int32)
  if not over:
    return document_BL
  return document_BL + across_devices.starts_anew(segments_BL, over)[:, None]
