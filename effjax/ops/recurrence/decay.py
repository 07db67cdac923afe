"""The decays of the state-space recurrence inside chunks and across them.

The log decay from token s to token l of a chunk is a difference of running sums. Plain
float32 sums lose it to cancellation after strong decays, so each sum is kept in two
parts: a coarse one of multiples of 1/512, whose sums and differences float32 holds
exactly, and a small fine one. That is as accurate as the segment sum of Listing 1 in
arXiv:2405.21060, without its cumulative sum of chunk x chunk numbers a head.

B batch, Z chunks of C tokens, H heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# exp(-128) is 0 in float32, so the clip changes no decay; and up to 256 tokens a chunk
# the coarse sums stay below 2^24 steps, where float32 is exact.
_LOWEST_LOG_DECAY = -128.0
_COARSE_STEPS = 512.0


class Decays(NamedTuple):
  """Factors a state is multiplied by; 0 wherever a document starts on the way.

  Attributes:
    within_BZHCC: from token s (last axis) to token l >= s of the same chunk.
    from_start_BZCH: from the end of the chunk before up to and with each token.
    to_end_BZCH: from after each token to the end of its chunk.
    across_BZH: over a whole chunk.
  """

  within_BZHCC: jax.Array
  from_start_BZCH: jax.Array
  to_end_BZCH: jax.Array
  across_BZH: jax.Array


def decays(
  dt_BZCH: jax.Array, a_H: jax.Array, document_BZC: jax.Array | None
) -> Decays:
  """All decays of exp(dt a), float32; documents as numbered by `segments.documents`."""
  log_BZCH = jnp.maximum(dt_BZCH * a_H[None, None, None, :], _LOWEST_LOG_DECAY)
  coarse_BZCH = jnp.round(log_BZCH * _COARSE_STEPS) / _COARSE_STEPS
  coarse_BZHC = running_sum(coarse_BZCH)
  fine_BZHC = running_sum(log_BZCH - coarse_BZCH)

  coarse_BZHCC = coarse_BZHC[..., :, None] - coarse_BZHC[..., None, :]
  fine_BZHCC = fine_BZHC[..., :, None] - fine_BZHC[..., None, :]
  tokens = dt_BZCH.shape[2]
  seen = np.tril(np.ones((tokens, tokens), bool))[None, None, None]
  if document_BZC is not None:
    same_BZCC = document_BZC[..., :, None] == document_BZC[..., None, :]
    seen = seen & same_BZCC[:, :, None]
  # Masked before exp: the differences above the diagonal are positive and overflow.
  within_BZHCC = jnp.exp(jnp.where(seen, coarse_BZHCC + fine_BZHCC, -jnp.inf))

  from_start_BZHC = jnp.exp(coarse_BZHC + fine_BZHC)
  to_end_BZHC = jnp.exp(
    (coarse_BZHC[..., -1:] - coarse_BZHC) + (fine_BZHC[..., -1:] - fine_BZHC)
  )
  from_start_BZCH = from_start_BZHC.swapaxes(2, 3)
  to_end_BZCH = to_end_BZHC.swapaxes(2, 3)
  across_BZH = from_start_BZHC[..., -1]
  if document_BZC is not None:
    last_BZ = document_BZC[..., -1]
    before_BZ = jnp.pad(last_BZ[:, :-1], ((0, 0), (1, 0)))  # a row starts in document 0
    carried_BZC = document_BZC == before_BZ[..., None]
    kept_BZC = document_BZC == last_BZ[..., None]
    from_start_BZCH = jnp.where(carried_BZC[..., None], from_start_BZCH, 0.0)
    to_end_BZCH = jnp.where(kept_BZC[..., None], to_end_BZCH, 0.0)
    across_BZH = jnp.where(carried_BZC[..., -1:], across_BZH, 0.0)
  return Decays(within_BZHCC, from_start_BZCH, to_end_BZCH, across_BZH)


def running_sum(z_BZCH: jax.Array, *, reverse: bool = False) -> jax.Array:
  """Sums up to and with each token of its chunk (from it on, if reversed): BZHC.

  A product with a triangle of ones: XLA merges a cumulative sum into every consumer and
  computes it again for each of their elements.
  """
  tokens = z_BZCH.shape[2]
  ones_CC = np.tril(np.ones((tokens, tokens), np.float32))
  return lax.dot_general(
    z_BZCH,
    ones_CC,
    (((2,), (0 if reverse else 1,)), ((), ())),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
