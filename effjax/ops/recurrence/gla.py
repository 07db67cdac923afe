"""Gated linear attention: a memory with a decay of its own for every key channel.

Yang et al. 2023, arXiv:2312.06635, eq. 3 and section 4: inside a chunk a masked
attention through the decays, across chunks a short scan over states.

  S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t / sqrt(K)

Deviation: the paper's secondary chunking, with one level of sub-chunks and float32
differences of running sums inside them, is replaced by halving (see `halving.py`):
matrix products all the way, exact for any decay.

Letters beside the project's: Z chunks of C tokens, K and V sizes of a key and of a
value head.
"""

import jax
import jax.numpy as jnp

from effjax.core.config import require
from effjax.ops.recurrence import across_devices, carry, halving, layout
from effjax.ops.recurrence import segments as segment_ops

DEFAULT_CHUNK = 64


def gla(
  q_BLHK: jax.Array,
  k_BLHK: jax.Array,
  v_BLHV: jax.Array,
  g_BLHK: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHKV: jax.Array | None = None,
  chunk: int = DEFAULT_CHUNK,
  over: across_devices.Over = (),
) -> tuple[jax.Array, jax.Array]:
  """Gated linear attention; one token by `step`, more by `chunked`.

  Args:
    q_BLHK, k_BLHK, v_BLHV: queries, keys and values, float32 or bfloat16; matrix
      products take the dtype of v and accumulate in float32.
    g_BLHK: log decays, at most 0 (any strength, also -inf); computed in float32.
    segments_BL: integer segment ids; the state is reset where the id changes. 0 is
      padding: it leaves the state alone, and its outputs mean nothing (but are finite).
    initial_state_BHKV: state before the first token, zeros by default; it belongs to
      the segment of the first token that is no padding.
    chunk: tokens a chunk, rounded up to a power of two; changes speed and memory only.
    over: mesh axes, if these are slices of sequences that are split over devices; each
      slice then starts from its own initial state plus what the ones before hand on.

  Returns:
    o_BLHV in the dtype of v and the float32 state after the last token, `[B, H, K, V]`.
    Differentiable in reverse (also twice); pure forward mode is not defined.

  Raises:
    InputError: shapes that do not fit, or a chunk below 1.
  """
  _check(q_BLHK, k_BLHK, v_BLHV, g_BLHK, initial_state_BHKV, chunk)
  g_BLHK, k_BLHK = g_BLHK.astype(jnp.float32), k_BLHK.astype(jnp.float32)
  if segments_BL is not None:
    # A token that neither decays the state nor feeds it.
    real_BL11 = (segments_BL != 0)[..., None, None]
    g_BLHK, k_BLHK = (jnp.where(real_BL11, z, 0.0) for z in (g_BLHK, k_BLHK))
  if initial_state_BHKV is None:
    num_rows, _, num_heads, key_dim = k_BLHK.shape
    shape = (num_rows, num_heads, key_dim, v_BLHV.shape[-1])
    initial_state_BHKV = jnp.zeros(shape, jnp.float32)
  state_BHKV = initial_state_BHKV.astype(jnp.float32)
  if q_BLHK.shape[1] == 1 and not over:
    tokens = (z[:, 0] for z in (q_BLHK, k_BLHK, v_BLHV, g_BLHK))
    o_BHV, state_BHKV = step(*tokens, state_BHKV)
    return o_BHV[:, None], state_BHKV
  return chunked(q_BLHK, k_BLHK, v_BLHV, g_BLHK, segments_BL, state_BHKV, chunk, over)


def chunked(
  q_BLHK: jax.Array,
  k_BLHK: jax.Array,
  v_BLHV: jax.Array,
  g_BLHK: jax.Array,
  segments_BL: jax.Array | None,
  state_BHKV: jax.Array,
  chunk: int,
  over: across_devices.Over,
) -> tuple[jax.Array, jax.Array]:
  """The form by products over chunks; `gla` has masked g and k at padding."""
  length, dtype = q_BLHK.shape[1], v_BLHV.dtype
  tokens = layout.chunk_tokens(chunk, length)
  q_BLHK = q_BLHK.astype(jnp.float32) * q_BLHK.shape[-1] ** -0.5
  q_BHZCK, k_BHZCK, g_BHZCK = (
    layout.split(z, tokens) for z in (q_BLHK, k_BLHK, g_BLHK)
  )
  v_BHZCV = layout.split(v_BLHV, tokens)
  mix_BHZCC, q_BHZCK, k_BHZCK, across_BHZK = halving.decayed_products(
    q_BHZCK, k_BHZCK, jnp.exp(g_BHZCK), dtype
  )
  if segments_BL is not None:
    bounds = layout.boundaries(segment_ops.documents(segments_BL, over), tokens)
    mix_BHZCC = jnp.where(bounds.same_BZCC[:, None], mix_BHZCC, 0.0)
    q_BHZCK = jnp.where(bounds.carried_BZC[:, None, ..., None], q_BHZCK, 0.0)
    k_BHZCK = jnp.where(bounds.kept_BZC[:, None, ..., None], k_BHZCK, 0.0)
    across_BHZK = jnp.where(bounds.crossed_BZ[:, None, :, None], across_BHZK, 0.0)
  added_BHZKV = layout.product(k_BHZCK, v_BHZCV, -2, -2)
  before_BHZKV, state_BHKV = carry.linear(across_BHZK, added_BHZKV, state_BHKV, over)
  o_BHZCV = layout.product(mix_BHZCC, v_BHZCV, -1, -2)
  o_BHZCV += layout.product(q_BHZCK.astype(dtype), before_BHZKV, -1, -2)
  return layout.join(o_BHZCV.astype(dtype), length), state_BHKV


def step(
  q_BHK: jax.Array,
  k_BHK: jax.Array,
  v_BHV: jax.Array,
  g_BHK: jax.Array,
  state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One token: o_BHV in the dtype of v and the new float32 state."""
  q_BHK, k_BHK, g_BHK = (z.astype(jnp.float32) for z in (q_BHK, k_BHK, g_BHK))
  written_BHKV = k_BHK[..., None] * v_BHV.astype(jnp.float32)[..., None, :]
  state_BHKV = jnp.exp(g_BHK)[..., None] * state_BHKV + written_BHKV
  o_BHV = jnp.sum(q_BHK[..., None] * state_BHKV, axis=-2) * q_BHK.shape[-1] ** -0.5
  return o_BHV.astype(v_BHV.dtype), state_BHKV


def _check(
  q_BLHK: jax.Array,
  k_BLHK: jax.Array,
  v_BLHV: jax.Array,
  g_BLHK: jax.Array,
  state_BHKV: jax.Array | None,
  chunk: int,
) -> None:
  require(chunk >= 1, f"GLA's chunk must be at least 1 token, not {chunk}")
  require(q_BLHK.shape[1] > 0, "GLA needs at least one token")
  num_rows, _, num_heads, key_dim = q_BLHK.shape
  value_dim = v_BLHV.shape[-1]
  expected = {
    "k": (k_BLHK.shape, q_BLHK.shape),
    "v": (v_BLHV.shape, (*q_BLHK.shape[:3], value_dim)),
    "g": (g_BLHK.shape, q_BLHK.shape),
  }
  if state_BHKV is not None:
    shape = (num_rows, num_heads, key_dim, value_dim)
    expected["initial_state"] = (state_BHKV.shape, shape)
  for name, (got, wanted) in expected.items():
    require(got == wanted, f"GLA's {name} has shape {got}, the others need {wanted}")
