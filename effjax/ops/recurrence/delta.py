"""The delta rules: a memory that is corrected instead of added to.

  S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - e^{g_t} S_{t-1}^T k_t))^T,
  o_t = S_t^T q_t / sqrt(K)

Without decay (g = 0) it is DeltaNet, Yang et al. 2024, arXiv:2406.06484, section 3;
with it Gated DeltaNet, Yang, Kautz and Hatamizadeh 2024, arXiv:2412.06464, section 3.
Inside a chunk the corrections depend on each other through a unit lower triangular
matrix, whose inverse gives them all (the WY form):

  M = I + tril(diag(beta) K K^T * D, -1),  U = M^-1 diag(beta) V,
  W = M^-1 diag(beta d) K,                 N = U - W S,

with D[l, s] the decay from s to l, d_l the one from the start of the chunk, S the state
before it, and N what its tokens really write. Deviation: M is inverted by halves (see
`halving.py`), not by substitution row by row.

Letters beside the project's: G key heads, H value heads, Z chunks of C tokens, K and V
sizes of a key and of a value head.
"""

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.config import require
from effjax.ops.recurrence import across_devices, carry, halving, layout
from effjax.ops.recurrence import segments as segment_ops

DEFAULT_CHUNK = 64


def delta_rule(
  q_BLGK: jax.Array,
  k_BLGK: jax.Array,
  v_BLHV: jax.Array,
  beta_BLH: jax.Array,
  g_BLH: jax.Array | None = None,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHKV: jax.Array | None = None,
  chunk: int = DEFAULT_CHUNK,
  over: across_devices.Over = (),
) -> tuple[jax.Array, jax.Array]:
  """The delta rule, gated or not; one token by `step`, more by `chunked`.

  Args:
    q_BLGK, k_BLGK, v_BLHV: queries, keys and values, float32 or bfloat16; matrix
      products take the dtype of v and accumulate in float32. G divides H, and key head
      j serves value heads j H/G to (j + 1) H/G - 1. The rule is stable for keys of
      length 1 (see `unit`) and beta in 0 to 2.
    beta_BLH: how much of the error of its key a token corrects; float32 inside.
    g_BLH: log decays, at most 0 (any strength), or None for none; float32 inside.
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
  _check(q_BLGK, k_BLGK, v_BLHV, beta_BLH, g_BLH, initial_state_BHKV, chunk)
  beta_BLH = beta_BLH.astype(jnp.float32)
  g_BLH = None if g_BLH is None else g_BLH.astype(jnp.float32)
  if segments_BL is not None:
    # A token that neither decays the state nor corrects it.
    real_BL1 = (segments_BL != 0)[..., None]
    beta_BLH = jnp.where(real_BL1, beta_BLH, 0.0)
    g_BLH = None if g_BLH is None else jnp.where(real_BL1, g_BLH, 0.0)
  if initial_state_BHKV is None:
    num_rows, _, num_heads, value_dim = v_BLHV.shape
    shape = (num_rows, num_heads, k_BLGK.shape[-1], value_dim)
    initial_state_BHKV = jnp.zeros(shape, jnp.float32)
  state_BHKV = initial_state_BHKV.astype(jnp.float32)
  if q_BLGK.shape[1] == 1 and not over:
    tokens = (z[:, 0] for z in (q_BLGK, k_BLGK, v_BLHV, beta_BLH))
    g_BH = None if g_BLH is None else g_BLH[:, 0]
    o_BHV, state_BHKV = step(*tokens, g_BH, state_BHKV)
    return o_BHV[:, None], state_BHKV
  return chunked(
    q_BLGK, k_BLGK, v_BLHV, beta_BLH, g_BLH, segments_BL, state_BHKV, chunk, over
  )


def chunked(
  q_BLGK: jax.Array,
  k_BLGK: jax.Array,
  v_BLHV: jax.Array,
  beta_BLH: jax.Array,
  g_BLH: jax.Array | None,
  segments_BL: jax.Array | None,
  state_BHKV: jax.Array,
  chunk: int,
  over: across_devices.Over,
) -> tuple[jax.Array, jax.Array]:
  """The form by products over chunks; `delta_rule` has masked beta and g at padding."""
  length, dtype = q_BLGK.shape[1], v_BLHV.dtype
  per_key = v_BLHV.shape[2] // k_BLGK.shape[2]
  tokens = layout.chunk_tokens(chunk, length)
  q_BGZCK = layout.split((q_BLGK * q_BLGK.shape[-1] ** -0.5).astype(dtype), tokens)
  k_BGZCK = layout.split(k_BLGK.astype(dtype), tokens)
  v_BHZCV = layout.split(v_BLHV, tokens)
  beta_BHZC = layout.split(beta_BLH[..., None], tokens)[..., 0]
  g_BHZC = None
  if g_BLH is not None:
    g_BHZC = layout.split(g_BLH[..., None], tokens)[..., 0]
  within, start, end, across = _decays(g_BHZC, segments_BL, tokens, over)

  # Scores belong to key heads, decays and corrections to value heads.
  each = lambda z: jnp.repeat(z, per_key, axis=1) if per_key > 1 else z
  overlap_BHZCC = each(layout.product(k_BGZCK, k_BGZCK, -1, -1))
  mix_BHZCC = each(layout.product(q_BGZCK, k_BGZCK, -1, -1)) * within
  q_BHZCK, k_BHZCK = each(q_BGZCK), each(k_BGZCK)
  u_BHZCV, w_BHZCK = halving.solve(
    overlap_BHZCC * within * beta_BHZC[..., None],
    (
      (v_BHZCV * beta_BHZC[..., None]).astype(dtype),
      (k_BHZCK * (beta_BHZC * start)[..., None]).astype(dtype),
    ),
  )
  new_BHZCV, before_BHZKV, state_BHKV = carry.delta(
    w_BHZCK.astype(dtype),
    u_BHZCV.astype(dtype),
    (k_BHZCK * end[..., None]).astype(dtype),
    jnp.broadcast_to(across, v_BHZCV.shape[:3]),
    state_BHKV,
    over,
  )
  o_BHZCV = layout.product(mix_BHZCC, new_BHZCV, -1, -2)
  started_BHZCK = (q_BHZCK * start[..., None]).astype(dtype)
  o_BHZCV += layout.product(started_BHZCK, before_BHZKV, -1, -2)
  return layout.join(o_BHZCV.astype(dtype), length), state_BHKV


def _decays(
  g_BHZC: jax.Array | None,
  segments_BL: jax.Array | None,
  tokens: int,
  over: across_devices.Over,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """From token to token, from the chunk's start, to its end and over all of it.

  0 wherever a document starts on the way. Of axes along which all are equal, these may
  have size 1.
  """
  if g_BHZC is None:
    within = jnp.asarray(np.tril(np.ones((1, 1, 1, tokens, tokens), np.float32)))
    start = end = jnp.ones((1, 1, 1, tokens), jnp.float32)
    across = jnp.ones((1, 1, 1), jnp.float32)
  else:
    within, start, end, across = halving.decay_matrix(g_BHZC)
  if segments_BL is not None:
    bounds = layout.boundaries(segment_ops.documents(segments_BL, over), tokens)
    within = jnp.where(bounds.same_BZCC[:, None], within, 0.0)
    start = jnp.where(bounds.carried_BZC[:, None], start, 0.0)
    end = jnp.where(bounds.kept_BZC[:, None], end, 0.0)
    across = jnp.where(bounds.crossed_BZ[:, None], across, 0.0)
  return within, start, end, across


def step(
  q_BGK: jax.Array,
  k_BGK: jax.Array,
  v_BHV: jax.Array,
  beta_BH: jax.Array,
  g_BH: jax.Array | None,
  state_BHKV: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """One token: o_BHV in the dtype of v and the new float32 state."""
  num_rows, num_heads, key_dim, value_dim = state_BHKV.shape
  # J value heads a key head: keys are broadcast to them, never copied.
  grouped = (num_rows, q_BGK.shape[1], num_heads // q_BGK.shape[1])
  q_BGK, k_BGK = q_BGK.astype(jnp.float32), k_BGK.astype(jnp.float32)
  v_BGJV = v_BHV.astype(jnp.float32).reshape(*grouped, value_dim)
  state_BGJKV = state_BHKV.reshape(*grouped, key_dim, value_dim)
  if g_BH is not None:
    state_BGJKV = jnp.exp(g_BH).reshape(grouped)[..., None, None] * state_BGJKV
  read = lambda z_BGK, s: jnp.sum(z_BGK[:, :, None, :, None] * s, axis=-2)
  new_BGJV = beta_BH.reshape(grouped)[..., None] * (v_BGJV - read(k_BGK, state_BGJKV))
  state_BGJKV += k_BGK[:, :, None, :, None] * new_BGJV[..., None, :]
  o_BHV = (read(q_BGK, state_BGJKV) * key_dim**-0.5).reshape(v_BHV.shape)
  return o_BHV.astype(v_BHV.dtype), state_BGJKV.reshape(state_BHKV.shape)


def unit(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """Length 1 along the last axis: x / sqrt(sum x^2 + eps), computed in float32."""
  wide = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(square + eps)).astype(x.dtype)


def _check(
  q_BLGK: jax.Array,
  k_BLGK: jax.Array,
  v_BLHV: jax.Array,
  beta_BLH: jax.Array,
  g_BLH: jax.Array | None,
  state_BHKV: jax.Array | None,
  chunk: int,
) -> None:
  require(chunk >= 1, f"the delta rule's chunk must be at least 1 token, not {chunk}")
  require(q_BLGK.shape[1] > 0, "the delta rule needs at least one token")
  num_rows, length, num_keys, key_dim = q_BLGK.shape
  num_heads, value_dim = v_BLHV.shape[2:]
  require(
    num_heads % num_keys == 0,
    f"the delta rule's {num_keys} key heads must divide its {num_heads} value heads",
  )
  per_token = (num_rows, length, num_heads)
  expected = {
    "k": (k_BLGK.shape, q_BLGK.shape),
    "v": (v_BLHV.shape, (*per_token, value_dim)),
    "beta": (beta_BLH.shape, per_token),
  }
  if g_BLH is not None:
    expected["g"] = (g_BLH.shape, per_token)
  if state_BHKV is not None:
    shape = (num_rows, num_heads, key_dim, value_dim)
    expected["initial_state"] = (state_BHKV.shape, shape)
  for name, (got, wanted) in expected.items():
    message = f"the delta rule's {name} has shape {got}, the others need {wanted}"
    require(got == wanted, message)
