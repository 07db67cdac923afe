"""Linear attention over the whole document of each token, linear in L.

Cut into chunks, a document is what its tokens in this chunk add, what those in chunks
before add and what those in chunks after add. Only one document can reach a chunk from
before, and one from after, so one state each way is enough, however many documents a
row holds.

Slices of a row on several devices are to each other what chunks are.

B batch, Z chunks of C tokens, H heads with N features and P values.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core.config import require
from effjax.ops.linear_attention import normalizer
from effjax.ops.recurrence import across_devices
from effjax.ops.recurrence import segments as segment_ops

# A sum of v k^T, `[B, H, P, N]`, and the document of each row that it is over.
State = tuple[jax.Array, jax.Array]


def linear_attention(
  q_BLHN: jax.Array,
  k_BLHN: jax.Array,
  v_BLHP: jax.Array,
  *,
  rotated: tuple[jax.Array, jax.Array] | None = None,
  segments_BL: jax.Array | None = None,
  chunk: int = 64,
  eps: float = 1e-10,
) -> jax.Array:
  """Linear attention over all tokens of a document; see `api.linear_attention`."""
  require(chunk >= 1, f"chunk={chunk} must be at least 1 token")
  num_rows, length = q_BLHN.shape[:2]
  if segments_BL is None:
    segments_BL = jnp.ones((num_rows, length), jnp.int32)
  sums = functools.partial(_sums, segments_BL=segments_BL, chunk=chunk)
  values = normalizer.with_ones(v_BLHP)
  if rotated is None:
    both = sums(q_BLHN, k_BLHN, values)
    return normalizer.divide(both[..., :-1], both[..., -1:], eps)
  sums_BLHP = sums(*rotated, v_BLHP)
  weight_BLH1 = sums(q_BLHN, k_BLHN, values[..., -1:])
  return normalizer.divide(sums_BLHP, weight_BLH1, eps)


def _sums(
  q_BLHN: jax.Array,
  k_BLHN: jax.Array,
  v_BLHP: jax.Array,
  *,
  segments_BL: jax.Array,
  chunk: int,
) -> jax.Array:
  """sum_s (q_l . k_s) v_s over the tokens s of l's document, in the dtype of v."""
  return across_devices.run(
    functools.partial(_sums_on_slice, chunk=chunk),
    {
      "q_BLHN": q_BLHN,
      "k_BLHN": k_BLHN,
      "v_BLHP": v_BLHP,
      "segments_BL": segments_BL,
    },
    "BLHP",
    {"B": "batch", "L": "length", "H": "heads"},
  )


def _sums_on_slice(
  q_BLHN: jax.Array,
  k_BLHN: jax.Array,
  v_BLHP: jax.Array,
  segments_BL: jax.Array,
  chunk: int,
  over: across_devices.Over = (),
) -> jax.Array:
  """`_sums` of a slice, with what those before and after it add."""
  length, dtype = q_BLHN.shape[1], v_BLHP.dtype
  chunk = min(chunk, length)
  document_BL = segment_ops.documents(segments_BL, over)
  document_BZC = _split(document_BL, chunk, "edge")
  # Padding is part of a document, but adds nothing to it.
  v_BLHP = jnp.where(segments_BL[..., None, None] != 0, v_BLHP, 0)
  q_BZHCN, k_BZHCN, v_BZHCP = (
    _split(z, chunk).swapaxes(2, 3) for z in (q_BLHN, k_BLHN.astype(dtype), v_BLHP)
  )
  q_BZHCN = q_BZHCN.astype(dtype)

  same_BZCC = document_BZC[..., :, None] == document_BZC[..., None, :]
  scores_BZHCC = _product("bzhln,bzhsn->bzhls", q_BZHCN, k_BZHCN)
  scores_BZHCC = jnp.where(same_BZCC[:, :, None], scores_BZHCC, 0.0).astype(dtype)
  y_BZHCP = _product("bzhls,bzhsp->bzhlp", scores_BZHCC, v_BZHCP)

  first_BZ, last_BZ = document_BZC[..., 0], document_BZC[..., -1]
  for reverse, edge_BZ in ((False, last_BZ), (True, first_BZ)):
    # What this chunk hands on: the sum over its tokens of the document at its edge.
    at_edge_BZC = document_BZC == edge_BZ[..., None]
    handed_BZHCP = jnp.where(at_edge_BZC[:, :, None, :, None], v_BZHCP, 0)
    handed_BZHPN = _product("bzhsp,bzhsn->bzhpn", handed_BZHCP, k_BZHCN)
    through_BZ = first_BZ == last_BZ
    chunks = handed_BZHPN, through_BZ, edge_BZ
    start = jnp.zeros_like(handed_BZHPN[:, 0]), jnp.full_like(edge_BZ[:, 0], -1)
    if over:
      (own_BHPN, _), *_ = _scan(*chunks, start, reverse=reverse)
      start = _arriving(own_BHPN, document_BL, over, reverse=reverse)
    _, met_BZHPN, met_BZ = _scan(*chunks, start, reverse=reverse)
    reached_BZC = document_BZC == met_BZ[..., None]
    q_reached_BZHCN = jnp.where(reached_BZC[:, :, None, :, None], q_BZHCN, 0)
    y_BZHCP += _product("bzhln,bzhpn->bzhlp", q_reached_BZHCN, met_BZHPN.astype(dtype))
  y_BZCHP = y_BZHCP.swapaxes(2, 3)
  return y_BZCHP.reshape(y_BZCHP.shape[0], -1, *v_BLHP.shape[2:])[:, :length].astype(
    dtype
  )


def _arriving(
  own_BHPN: jax.Array,
  document_BL: jax.Array,
  over: across_devices.Over,
  *,
  reverse: bool,
) -> State:
  """The sum that a slice meets, from before it or (reverse) from after it.

  Args:
    own_BHPN: the sum over the slice's tokens of the document at its far edge.
    document_BL: what `segments.documents` gives for the slice: it starts at 1 where
      nothing arrives from before, and then nothing goes there.
    over: the mesh axes.
    reverse: which way.
  """
  first_B, last_B = document_BL[:, 0], document_BL[:, -1]
  joined_B = first_B == 0
  if reverse:
    after_B = across_devices.receive(joined_B.astype(jnp.int32), 1, over, reverse=True)
    joined_B = after_B > 0
  through_B111 = ((first_B == last_B) & joined_B)[:, None, None, None]
  state_BHPN = across_devices.arriving(
    through_B111.astype(jnp.float32), own_BHPN, over, reverse=reverse
  )
  met_B = jnp.where(joined_B, last_B if reverse else first_B, -1)
  return state_BHPN, met_B


def _scan(
  handed_BZHPN: jax.Array,
  through_BZ: jax.Array,
  edge_BZ: jax.Array,
  start: State,
  *,
  reverse: bool,
) -> tuple[State, jax.Array, jax.Array]:
  """The state that each chunk meets, from before it or (reverse) from after it.

  A state goes through a chunk if one document fills the chunk and the state is of that
  document; else the chunk hands on its own sum alone.

  Args:
    handed_BZHPN: the sum over a chunk's tokens of the document at its far edge.
    through_BZ: whether one document fills a chunk.
    edge_BZ: the document at its far edge.
    start: the state that the first chunk meets.
    reverse: which way.

  Returns:
    What the last chunk hands on; met_BZHPN, and the document it belongs to, met_BZ (-1
    where there is none).
  """

  def body(carry, chunk):
    state_BHPN, document_B = carry
    handed_BHPN, through_B, edge_B = chunk
    kept_B = through_B & (edge_B == document_B)
    kept_BHPN = jnp.where(kept_B[:, None, None, None], state_BHPN, 0.0)
    return (kept_BHPN + handed_BHPN, edge_B), (state_BHPN, document_B)

  chunks = tuple(jnp.moveaxis(z, 1, 0) for z in (handed_BZHPN, through_BZ, edge_BZ))
  end, (met_ZBHPN, met_ZB) = lax.scan(body, start, chunks, reverse=reverse)
  return end, jnp.moveaxis(met_ZBHPN, 0, 1), jnp.moveaxis(met_ZB, 0, 1)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _split(z_BLs: jax.Array, chunk: int, mode: str = "constant") -> jax.Array:
  """[B, L, ...] -> [B, Z, C, ...], filled at the end to a multiple of the chunk."""
  num_rows, length, *rest = z_BLs.shape
  widths = [(0, 0), (0, -length % chunk)] + [(0, 0)] * len(rest)
  return jnp.pad(z_BLs, widths, mode=mode).reshape(num_rows, -1, chunk, *rest)
