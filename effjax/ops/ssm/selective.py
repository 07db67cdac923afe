"""The selective scan of Mamba-1 over chunks of tokens, with its gradient written out.

Gu and Dao 2023, arXiv:2312.00752, section 3.3.2 and algorithm 2: every channel has its
own decays, so no matrix product covers a chunk as in Mamba-2, and the states of all
tokens must never be in memory at once. Here a loop runs over chunks: all exponentials
of a chunk are taken in one pass, then a loop over its tokens carries the state, both in
the cache of a core. Only the state before each chunk is kept for the gradient, whose
loop runs backwards and computes the states of a chunk again.

The channels are the last axis of all arrays, so every operation is over whole vectors,
and a token is one step of a loop rather than unrolled: XLA's CPU compiler would merge
tokens, and compute decays and states of the earlier ones again in each later one.

Letters beside the project's: Z chunks of C tokens, I inner channels, N state of each.
"""

import jax
import jax.numpy as jnp
from jax import lax

from effjax.core.config import require
from effjax.ops.recurrence import segments as segment_ops

DEFAULT_CHUNK = 8

Residuals = tuple[jax.Array | None, ...]


def selective_scan(
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BNI: jax.Array | None = None,
  chunk: int = DEFAULT_CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = C_t . h_t, in every channel.

  Differentiable in reverse (also twice); pure forward mode is not defined. The skip
  connection D x is the caller's.

  Args:
    x_BLI: inputs of any float dtype; everything is computed in float32.
    dt_BLI: step sizes, at least 0.
    a_NI: negative decay rates.
    b_BLN, c_BLN: input and output projections, shared by all channels.
    segments_BL: integer segment ids; the state is reset where the id changes. 0 is
      padding: it leaves the state alone, and its outputs mean nothing (but are finite).
    initial_state_BNI: state before the first token, zeros by default; it belongs to the
      segment of the first token that is no padding.
    chunk: tokens a chunk, any number; changes speed and memory only.

  Returns:
    y_BLI in the dtype of x and the float32 state after the last token, `[B, N, I]`.

  Raises:
    InputError: shapes that do not fit, or a chunk below 1.
  """
  check_shapes(x_BLI, dt_BLI, a_NI, b_BLN, c_BLN, initial_state_BNI)
  require(chunk >= 1, f"the scan's chunk must be at least 1 token, not {chunk}")
  num_rows, length, channels = x_BLI.shape
  chunk = min(chunk, length)
  dt_BLI, reset_BL = mask(dt_BLI, segments_BL)
  if initial_state_BNI is None:
    initial_state_BNI = jnp.zeros((num_rows, a_NI.shape[0], channels))
  y_ZCBI, state_BNI = _scan(
    _split(x_BLI.astype(jnp.float32), chunk),
    _split(dt_BLI, chunk),
    a_NI.astype(jnp.float32),
    _split(b_BLN.astype(jnp.float32), chunk),
    _split(c_BLN.astype(jnp.float32), chunk),
    None if reset_BL is None else _split(reset_BL, chunk),
    initial_state_BNI.astype(jnp.float32),
  )
  y_BLI = jnp.moveaxis(y_ZCBI.reshape(-1, num_rows, channels)[:length], 1, 0)
  return y_BLI.astype(x_BLI.dtype), state_BNI


def mask(
  dt_BLI: jax.Array, segments_BL: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """Step sizes, float32, with 0 for padding; and where a document starts."""
  dt_BLI = dt_BLI.astype(jnp.float32)
  if segments_BL is None:
    return dt_BLI, None
  # A token whose step size is 0 neither decays nor feeds the state.
  dt_BLI = jnp.where(segments_BL[..., None] != 0, dt_BLI, 0.0)
  document_BL = segment_ops.documents(segments_BL)
  return dt_BLI, jnp.diff(document_BL, axis=1, prepend=0) > 0


def check_shapes(
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  state_BNI: jax.Array | None,
) -> None:
  """Raises InputError unless the arguments of `selective_scan` fit each other."""
  num_rows, length, channels = x_BLI.shape
  require(length > 0, "the selective scan needs at least one token")
  state_dim = a_NI.shape[0]
  expected = {
    "dt": (dt_BLI.shape, x_BLI.shape),
    "a": (a_NI.shape, (state_dim, channels)),
    "b": (b_BLN.shape, (num_rows, length, state_dim)),
    "c": (c_BLN.shape, (num_rows, length, state_dim)),
  }
  if state_BNI is not None:
    expected["initial_state"] = (state_BNI.shape, (num_rows, state_dim, channels))
  for name, (got, wanted) in expected.items():
    require(
      got == wanted,
      f"the selective scan's {name} has shape {got}, the others need {wanted}",
    )


def _split(z_BLs: jax.Array, chunk: int) -> jax.Array:
  """[B, L, ...] -> [Z, C, B, ...], with zeros to a multiple of the chunk.

  Zeros as step sizes: what is filled in changes no state.
  """
  num_rows, length, *rest = z_BLs.shape
  z_LBs = jnp.moveaxis(z_BLs, 1, 0)
  missing = -length % chunk
  if missing:
    z_LBs = jnp.pad(z_LBs, [(0, missing)] + [(0, 0)] * (len(rest) + 1))
  return z_LBs.reshape(-1, chunk, num_rows, *rest)


@jax.custom_vjp
def _scan(
  x_ZCBI: jax.Array,
  dt_ZCBI: jax.Array,
  a_NI: jax.Array,
  b_ZCBN: jax.Array,
  c_ZCBN: jax.Array,
  reset_ZCB: jax.Array | None,
  state_BNI: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """`selective_scan` on chunks; reset is true where a document starts."""
  inputs = (x_ZCBI, dt_ZCBI, b_ZCBN, c_ZCBN, reset_ZCB)
  body = lambda h_BNI, inputs: _chunk_outputs(a_NI, h_BNI, *inputs)
  state_BNI, y_ZCBI = lax.scan(body, state_BNI, inputs)
  return y_ZCBI, state_BNI


def _forward(
  x_ZCBI: jax.Array,
  dt_ZCBI: jax.Array,
  a_NI: jax.Array,
  b_ZCBN: jax.Array,
  c_ZCBN: jax.Array,
  reset_ZCB: jax.Array | None,
  state_BNI: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Residuals]:
  """`_scan`, keeping the state before each chunk."""

  def body(h_BNI, inputs):
    end_BNI, y_CBI = _chunk_outputs(a_NI, h_BNI, *inputs)
    return end_BNI, (y_CBI, h_BNI)

  inputs = (x_ZCBI, dt_ZCBI, b_ZCBN, c_ZCBN, reset_ZCB)
  state_BNI, (y_ZCBI, before_ZBNI) = lax.scan(body, state_BNI, inputs)
  return (y_ZCBI, state_BNI), (*inputs, a_NI, before_ZBNI)


def _backward(
  residuals: Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
  """Gradients of all arguments; d before a name is the gradient of what it names."""
  *inputs, a_NI, before_ZBNI = residuals
  dy_ZCBI, dstate_BNI = cotangents

  body = lambda carry, inputs: _chunk_gradients(a_NI, carry, *inputs)
  carry = (dstate_BNI, jnp.zeros_like(dstate_BNI))
  (dstate_BNI, da_BNI), gradients = lax.scan(
    body, carry, (dy_ZCBI, before_ZBNI, *inputs), reverse=True
  )
  dx_ZCBI, ddt_ZCBI, db_ZCBN, dc_ZCBN = gradients
  da_NI = jnp.sum(da_BNI, axis=0)
  return dx_ZCBI, ddt_ZCBI, da_NI, db_ZCBN, dc_ZCBN, None, dstate_BNI


_scan.defvjp(_forward, _backward)


def _chunk_outputs(
  a_NI: jax.Array,
  h_BNI: jax.Array,
  x_CBI: jax.Array,
  dt_CBI: jax.Array,
  b_CBN: jax.Array,
  c_CBN: jax.Array,
  reset_CB: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """The state after a chunk and its outputs, from the state h before it."""

  def token(h_BNI, inputs):
    decay_BNI, input_BI, b_BN, c_BN = inputs
    h_BNI = decay_BNI * h_BNI + _outer(b_BN, input_BI)
    return h_BNI, _sum_states(h_BNI, c_BN)

  decay_CBNI = _decays(dt_CBI, a_NI, reset_CB)
  return lax.scan(token, h_BNI, (decay_CBNI, dt_CBI * x_CBI, b_CBN, c_CBN))


def _chunk_gradients(
  a_NI: jax.Array,
  carry: tuple[jax.Array, jax.Array],
  dy_CBI: jax.Array,
  before_BNI: jax.Array,
  x_CBI: jax.Array,
  dt_CBI: jax.Array,
  b_CBN: jax.Array,
  c_CBN: jax.Array,
  reset_CB: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
  """Gradients of a chunk's arguments.

  The carry is the gradient of the state after the chunk, and that of A from the chunks
  behind it.
  """
  decay_CBNI = _decays(dt_CBI, a_NI, reset_CB)
  input_CBI = dt_CBI * x_CBI

  def forward(h_BNI, inputs):
    decay_BNI, input_BI, b_BN, dy_BI = inputs
    after_BNI = decay_BNI * h_BNI + _outer(b_BN, input_BI)
    return after_BNI, (h_BNI, _sum_channels(after_BNI, dy_BI))

  tokens = (decay_CBNI, input_CBI, b_CBN, dy_CBI)
  _, (h_CBNI, dc_CBN) = lax.scan(forward, before_BNI, tokens)

  def backward(carry, inputs):
    dafter_BNI, da_BNI = carry
    h_BNI, decay_BNI, input_BI, x_BI, dt_BI, b_BN, c_BN, dy_BI = inputs
    dh_BNI = dafter_BNI + _outer(c_BN, dy_BI)
    dlog_BNI = dh_BNI * h_BNI * decay_BNI
    dinput_BI = _sum_states(dh_BNI, b_BN)
    # One addition a state: a sum over an axis would be computed number by number.
    ddt_BI = sum(dlog_BNI[:, n] * a_NI[n][None] for n in range(a_NI.shape[0]))
    gradients = (
      dinput_BI * dt_BI,
      ddt_BI + dinput_BI * x_BI,
      _sum_channels(dh_BNI, input_BI),
    )
    return (decay_BNI * dh_BNI, da_BNI + dlog_BNI * dt_BI[:, None, :]), gradients

  tokens = (h_CBNI, decay_CBNI, input_CBI, x_CBI, dt_CBI, b_CBN, c_CBN, dy_CBI)
  carry, gradients = lax.scan(backward, carry, tokens, reverse=True)
  return carry, (*gradients, dc_CBN)


def _decays(
  dt_CBI: jax.Array, a_NI: jax.Array, reset_CB: jax.Array | None
) -> jax.Array:
  """exp(dt A) of every token, 0 where it starts a document; `[C, B, N, I]`."""
  decay_CBNI = jnp.exp(dt_CBI[:, :, None, :] * a_NI[None, None])
  if reset_CB is not None:
    decay_CBNI = jnp.where(reset_CB[:, :, None, None], 0.0, decay_CBNI)
  return decay_CBNI


def _outer(b_BN: jax.Array, x_BI: jax.Array) -> jax.Array:
  return b_BN[:, :, None] * x_BI[:, None, :]


def _sum_states(h_BNI: jax.Array, c_BN: jax.Array) -> jax.Array:
  return jnp.einsum("bni,bn->bi", h_BNI, c_BN, precision=lax.Precision.HIGHEST)


def _sum_channels(h_BNI: jax.Array, x_BI: jax.Array) -> jax.Array:
  return jnp.einsum("bni,bi->bn", h_BNI, x_BI, precision=lax.Precision.HIGHEST)
