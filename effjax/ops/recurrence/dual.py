"""State space duality: the recurrence as products over chunks, and its gradient.

Dao and Gu 2024, arXiv:2405.21060, section 6. With X_s = dt_s x_s, and inside a chunk
L[l, s] the decay from s to l and e_l, f_s those from its start and to its end,

  y_l   = sum_{s <= l} L[l, s] (c_l . b_s) X_s + e_l c_l S_before
  S_end = decay of the chunk * S_before + sum_s f_s b_s X_s^T.

The gradient is written out, which takes about 0.7 of the time of the one XLA derives on
a CPU. Nothing of size chunk x chunk a head is kept for it: L is computed again. The log
decay at t acts on all pairs s < t <= l that it stands between: its gradient sums over
exactly those, never by the difference of larger sums.

Heads that share B and C are merged into one product wherever L is not involved, so
large arrays are transposed for the products with L only.

Letters: see `chunked.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from effjax.ops.recurrence import across_devices, decay

Residuals = tuple[jax.Array | None, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def ssd(
  x_BZCHP: jax.Array,
  dt_BZCH: jax.Array,
  a_H: jax.Array,
  b_BZGCN: jax.Array,
  c_BZGCN: jax.Array,
  document_BZC: jax.Array | None,
  state_BGNM: jax.Array,
  over: across_devices.Over,
) -> tuple[jax.Array, jax.Array]:
  """`chunked.ssd` on chunks.

  Args:
    x_BZCHP, b_BZGCN, c_BZGCN: inputs and projections, of one dtype.
    dt_BZCH, a_H: float32 step sizes, 0 at padding, and negative decay rates.
    document_BZC: what `segments.documents` gives, or None for one document a row.
    state_BGNM: float32 state before the first chunk.
    over: mesh axes, if these are the chunks of a slice.

  Returns:
    y_BZCHP in the dtype of x and the float32 state after the last chunk.
  """
  args = (x_BZCHP, dt_BZCH, a_H, b_BZGCN, c_BZGCN, document_BZC, state_BGNM)
  return _forward(*args, over)[0]


def _forward(
  x_BZCHP: jax.Array,
  dt_BZCH: jax.Array,
  a_H: jax.Array,
  b_BZGCN: jax.Array,
  c_BZGCN: jax.Array,
  document_BZC: jax.Array | None,
  state_BGNM: jax.Array,
  over: across_devices.Over,
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
  dtype, num_heads = x_BZCHP.dtype, x_BZCHP.shape[3]
  num_groups = b_BZGCN.shape[2]
  decays = decay.decays(dt_BZCH, a_H, document_BZC)

  mix_BZHCC = _mix(b_BZGCN, c_BZGCN, decays.within_BZHCC)
  scaled_BZCHP = x_BZCHP * dt_BZCH[..., None]
  inside_BZHCP = _product(mix_BZHCC, scaled_BZCHP.swapaxes(2, 3).astype(dtype), -1, -2)

  kept_BZCHP = x_BZCHP * (dt_BZCH * decays.to_end_BZCH)[..., None]
  added_BZGNM = _product(b_BZGCN, _merge(kept_BZCHP, num_groups, dtype), -2, -2)
  across_BZGM = _across(decays.across_BZH, added_BZGNM.shape)
  before_BZGNM, state_BGNM = _scan(across_BZGM, added_BZGNM, state_BGNM, over)
  carried_BZGCM = _product(c_BZGCN, before_BZGNM.astype(dtype), -1, -2)
  carried_BZCHP = _unmerge(carried_BZGCM, num_heads)

  y_BZCHP = inside_BZHCP.swapaxes(2, 3)
  y_BZCHP += carried_BZCHP * decays.from_start_BZCH[..., None]
  residuals = (x_BZCHP, dt_BZCH, a_H, b_BZGCN, c_BZGCN, document_BZC)
  kept = (before_BZGNM, carried_BZCHP.astype(dtype))
  return (y_BZCHP.astype(dtype), state_BGNM), (*residuals, *kept)


def _backward(
  over: across_devices.Over,
  residuals: Residuals,
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
  """Gradients of all arguments; d before a name is the gradient of what it names."""
  x_BZCHP, dt_BZCH, a_H, b_BZGCN, c_BZGCN, document_BZC, *states = residuals
  before_BZGNM, carried_BZCHP = states
  dy_BZCHP, dstate_BGNM = cotangents
  dtype, num_heads = x_BZCHP.dtype, x_BZCHP.shape[3]
  num_groups = b_BZGCN.shape[2]
  decays = decay.decays(dt_BZCH, a_H, document_BZC)

  # What each output asks of the state before its chunk, then of the chunks before.
  dcarried_BZCHP = dy_BZCHP * decays.from_start_BZCH[..., None]
  dcarried_BZGCM = _merge(dcarried_BZCHP, num_groups, dtype)
  dc_BZGCN = _product(dcarried_BZGCM, before_BZGNM.astype(dtype), -1, -1)
  asked_BZGNM = _product(c_BZGCN, dcarried_BZGCM, -2, -2)
  across_BZGM = _across(decays.across_BZH, asked_BZGNM.shape)
  dafter_BZGNM, dstate_BGNM = _scan(
    across_BZGM, asked_BZGNM, dstate_BGNM, over, reverse=True
  )

  # Through the state after the chunk.
  kept_scale_BZCH = dt_BZCH * decays.to_end_BZCH
  kept_BZCHP = x_BZCHP * kept_scale_BZCH[..., None]
  operand_BZGNM = dafter_BZGNM.astype(dtype)
  db_BZGCN = _product(_merge(kept_BZCHP, num_groups, dtype), operand_BZGNM, -1, -1)
  dkept_BZCHP = _unmerge(_product(b_BZGCN, operand_BZGNM, -1, -2), num_heads)

  # Inside the chunk.
  mix_BZHCC = _mix(b_BZGCN, c_BZGCN, decays.within_BZHCC)
  scaled_BZHCP = (x_BZCHP * dt_BZCH[..., None]).swapaxes(2, 3).astype(dtype)
  dy_BZHCP = dy_BZCHP.swapaxes(2, 3)
  dmix_BZHCC = _product(dy_BZHCP, scaled_BZHCP, -1, -1)
  dscores_BZGCC = _sum_heads(dmix_BZHCC, decays.within_BZHCC, num_groups).astype(dtype)
  dc_BZGCN += _product(dscores_BZGCC, b_BZGCN, -1, -2)
  db_BZGCN += _product(dscores_BZGCC, c_BZGCN, -2, -2)
  dscaled_BZCHP = _product(mix_BZHCC, dy_BZHCP, -2, -2).swapaxes(2, 3)
  dscaled_BZCHP += dkept_BZCHP * decays.to_end_BZCH[..., None]

  # Log decays, from the places they act in, then step sizes and rates.
  dlog_BZHC = _log_decay_inside(dmix_BZHCC, mix_BZHCC)
  used_BZCH = jnp.sum(dy_BZCHP * carried_BZCHP, axis=-1) * decays.from_start_BZCH
  dlog_BZHC += decay.running_sum(used_BZCH, reverse=True)
  fed_BZCH = jnp.sum(x_BZCHP * dkept_BZCHP, axis=-1) * kept_scale_BZCH
  earlier_BZCH = jnp.pad(fed_BZCH[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
  dlog_BZHC += decay.running_sum(earlier_BZCH)
  met_BZH = _sum_channels(dafter_BZGNM * before_BZGNM, num_heads) * decays.across_BZH
  dlog_BZCH = (dlog_BZHC + met_BZH[..., None]).swapaxes(2, 3)
  ddt_BZCH = jnp.sum(x_BZCHP * dscaled_BZCHP, axis=-1)
  ddt_BZCH += dlog_BZCH * a_H[None, None, None, :]
  da_H = jnp.sum(dlog_BZCH * dt_BZCH, axis=(0, 1, 2))
  dx_BZCHP = dscaled_BZCHP * dt_BZCH[..., None]
  return (
    dx_BZCHP.astype(dtype),
    ddt_BZCH,
    da_H,
    db_BZGCN.astype(dtype),
    dc_BZGCN.astype(dtype),
    None,
    dstate_BGNM,
  )


ssd.defvjp(_forward, _backward)


def _product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """Contracts an axis of a with one of b; all but the last two axes are batch."""
  batch = tuple(range(a.ndim - 2))
  contracted = ((a.ndim + axis_a,), (b.ndim + axis_b,))
  return lax.dot_general(
    a, b, (contracted, (batch, batch)), preferred_element_type=jnp.float32
  )


def _mix(b_BZGCN: jax.Array, c_BZGCN: jax.Array, within_BZHCC: jax.Array) -> jax.Array:
  """The attention-like matrix of each head, L * (C B^T), in the dtype of B."""
  scores_BZGCC = _product(c_BZGCN, b_BZGCN, -1, -1)
  mix = scores_BZGCC[:, :, :, None] * _by_group(within_BZHCC, b_BZGCN.shape[2])
  return mix.reshape(within_BZHCC.shape).astype(b_BZGCN.dtype)


def _sum_heads(
  dmix_BZHCC: jax.Array, within_BZHCC: jax.Array, num_groups: int
) -> jax.Array:
  """Sum of dmix * within over the heads of each group, as separate additions.

  XLA's CPU compiler would merge a reduction with the product before it into something
  several times slower than both.
  """
  dmix, within = _by_group(dmix_BZHCC, num_groups), _by_group(within_BZHCC, num_groups)
  return functools.reduce(
    jnp.add,
    (dmix[:, :, :, j] * within[:, :, :, j] for j in range(within.shape[3])),
  )


def _log_decay_inside(dmix_BZHCC: jax.Array, mix_BZHCC: jax.Array) -> jax.Array:
  """Gradient of the log decay at t, sum_{s < t <= l} dM[l, s] M[l, s], as BZHC.

  Sums of rows less sums of columns give the same without the product below, but only by
  cancelling: after strong decays little but rounding remains.
  """
  tokens = mix_BZHCC.shape[-1]
  ones_CC = np.ones((tokens, tokens), np.float32)
  # M is zero above the diagonal, and the diagonal is never before any t <= l.
  before_t_BZHCC = lax.dot_general(
    dmix_BZHCC * mix_BZHCC,
    np.triu(ones_CC, 1),
    (((4,), (0,)), ((), ())),
    precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  until_l_CC = np.tril(ones_CC).astype(bool)[None, None, None]
  return jnp.sum(jnp.where(until_l_CC, before_t_BZHCC, 0.0), axis=-2)


def _by_group(z_BZHCC: jax.Array, num_groups: int) -> jax.Array:
  shape = z_BZHCC.shape
  return z_BZHCC.reshape(*shape[:2], num_groups, shape[2] // num_groups, *shape[3:])


def _merge(z_BZCHP: jax.Array, num_groups: int, dtype: jnp.dtype) -> jax.Array:
  """[B, Z, C, H, P] -> [B, Z, G, C, M], which moves nothing if there is one group."""
  z_BZCGM = z_BZCHP.reshape(*z_BZCHP.shape[:3], num_groups, -1)
  return z_BZCGM.swapaxes(2, 3).astype(dtype)


def _unmerge(z_BZGCM: jax.Array, num_heads: int) -> jax.Array:
  z_BZCGM = z_BZGCM.swapaxes(2, 3)
  return z_BZCGM.reshape(*z_BZCGM.shape[:3], num_heads, -1)


def _across(across_BZH: jax.Array, shape_BZGNM: tuple[int, ...]) -> jax.Array:
  """The decay of each chunk for every merged channel, [B, Z, G, M]."""
  num_rows, num_chunks, num_groups, _, channels = shape_BZGNM
  across_BZH = jnp.repeat(
    across_BZH, num_groups * channels // across_BZH.shape[2], axis=2
  )
  return across_BZH.reshape(num_rows, num_chunks, num_groups, channels)


def _sum_channels(z_BZGNM: jax.Array, num_heads: int) -> jax.Array:
  num_rows, num_chunks = z_BZGNM.shape[:2]
  z_BZGM = jnp.sum(z_BZGNM, axis=3)
  return jnp.sum(z_BZGM.reshape(num_rows, num_chunks, num_heads, -1), axis=-1)


def _scan(
  across_BZGM: jax.Array,
  added_BZGNM: jax.Array,
  state_BGNM: jax.Array,
  over: across_devices.Over,
  *,
  reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Carries a state over the chunks: state = across * state + added.

  Chunks are indexed where they stand: scanning over them would move them to the front.

  Returns:
    the state each chunk meets and the state after the last one met.
  """
  shape_BZGNM = added_BZGNM.shape
  if shape_BZGNM[2] == 1:  # XLA would copy to move an axis of size 1
    across_BZGM, added_BZGNM = across_BZGM[:, :, 0], added_BZGNM[:, :, 0]
    state_BGNM = state_BGNM[:, 0]

  def body(carry, chunk):
    state, met = carry
    met = lax.dynamic_update_index_in_dim(met, state, chunk, 1)
    added = lax.dynamic_index_in_dim(added_BZGNM, chunk, 1, keepdims=False)
    across = lax.dynamic_index_in_dim(across_BZGM, chunk, 1, keepdims=False)
    return (across[..., None, :] * state + added, met), None

  chunks = jnp.arange(shape_BZGNM[1])
  carry = (state_BGNM, jnp.zeros_like(added_BZGNM))
  (state, met), _ = lax.scan(body, carry, chunks, reverse=reverse)
  if over:
    across = across_BZGM[..., None, :]
    met, state = across_devices.joined(met, state, across, 1, over, reverse=reverse)
  return met.reshape(shape_BZGNM), state.reshape(shape_BZGNM[:1] + shape_BZGNM[2:])
