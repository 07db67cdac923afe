"""The state-space recurrence of Mamba-2 by matrix products over chunks (SSD).

Dao and Gu 2024, arXiv:2405.21060, section 6 (Listing 1): inside a chunk the recurrence
is a masked attention, across chunks a short scan over states. This file cuts the
sequence into chunks; `decay.py` holds the decays and `dual.py` the products, with
what deviates from Listing 1.

Letters beside the project's: Z chunks of C tokens, P size of a head, N of its state,
J = H / G heads a group, M = J P merged channels of a group.
"""

import jax
import jax.numpy as jnp

from effjax.core.config import require
from effjax.ops.recurrence import across_devices, dual
from effjax.ops.recurrence import segments as segment_ops

DEFAULT_CHUNK = 64


def ssd(
  x_BLHP: jax.Array,
  dt_BLH: jax.Array,
  a_H: jax.Array,
  b_BLGN: jax.Array,
  c_BLGN: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHPN: jax.Array | None = None,
  chunk: int = DEFAULT_CHUNK,
  over: across_devices.Over = (),
) -> tuple[jax.Array, jax.Array]:
  """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T and y_t = h_t c_t, chunk by chunk.

  Differentiable in reverse (also twice); pure forward mode is not defined. The skip
  connection D x is the caller's.

  Args:
    x_BLHP: inputs, float32 or bfloat16; matrix products take this dtype and accumulate
      in float32.
    dt_BLH: step sizes, at least 0; decays are computed in float32.
    a_H: negative decay rates.
    b_BLGN, c_BLGN: input and output projections; G divides H, and group g serves heads
      g H/G to (g + 1) H/G - 1.
    segments_BL: integer segment ids; the state is reset where the id changes. 0 is
      padding: it leaves the state alone, and its outputs mean nothing (but are finite).
    initial_state_BHPN: state before the first token, zeros by default; it belongs to
      the segment of the first token that is no padding.
    chunk: tokens a chunk, any number; changes speed and memory only. Measured on two
      CPU cores, 64 is best or equal for P = 64 and N = 32 to 64.
    over: mesh axes, if these are slices of sequences that are split over devices; each
      slice then starts from its own initial state plus what the ones before hand on.

  Returns:
    y_BLHP in the dtype of x and the float32 state after the last token, `[B, H, P, N]`.

  Raises:
    InputError: shapes that do not fit, or a chunk below 1.
  """
  check_shapes(x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, initial_state_BHPN)
  require(chunk >= 1, f"SSD's chunk must be at least 1 token, not {chunk}")
  num_rows, length, num_heads, head_dim = x_BLHP.shape
  num_groups, state_dim = b_BLGN.shape[2:]
  chunk = min(chunk, length)

  dt_BLH = dt_BLH.astype(jnp.float32)
  document_BL = None
  if segments_BL is not None:
    dt_BLH = jnp.where(segments_BL[..., None] != 0, dt_BLH, 0.0)
    document_BL = segment_ops.documents(segments_BL, over)
  dtype = x_BLHP.dtype
  if initial_state_BHPN is None:
    state_BGNM = jnp.zeros(
      (num_rows, num_groups, state_dim, num_heads // num_groups * head_dim), jnp.float32
    )
  else:
    state_BGNM = _merge_state(initial_state_BHPN.astype(jnp.float32), num_groups)
  # A token whose step size is 0 neither decays nor feeds the state.
  y_BZCHP, state_BGNM = dual.ssd(
    _split(x_BLHP, chunk),
    _split(dt_BLH, chunk),
    a_H.astype(jnp.float32),
    _split(b_BLGN.astype(dtype), chunk).swapaxes(2, 3),
    _split(c_BLGN.astype(dtype), chunk).swapaxes(2, 3),
    None if document_BL is None else _split(document_BL, chunk, mode="edge"),
    state_BGNM,
    over,
  )
  y_BLHP = y_BZCHP.reshape(num_rows, -1, num_heads, head_dim)[:, :length]
  return y_BLHP, _split_state(state_BGNM, num_heads)


def check_shapes(
  x_BLHP: jax.Array,
  dt_BLH: jax.Array,
  a_H: jax.Array,
  b_BLGN: jax.Array,
  c_BLGN: jax.Array,
  state_BHPN: jax.Array | None,
) -> None:
  """Raises InputError unless the arguments of `ssd` fit each other."""
  num_rows, length, num_heads, head_dim = x_BLHP.shape
  require(length > 0, "SSD needs at least one token")
  num_groups, state_dim = b_BLGN.shape[2:]
  require(
    num_heads % num_groups == 0,
    f"SSD's {num_groups} groups must divide its {num_heads} heads",
  )
  expected = {
    "dt": (dt_BLH.shape, (num_rows, length, num_heads)),
    "a": (a_H.shape, (num_heads,)),
    "b": (b_BLGN.shape, (num_rows, length, num_groups, state_dim)),
    "c": (c_BLGN.shape, b_BLGN.shape),
  }
  if state_BHPN is not None:
    shape = (num_rows, num_heads, head_dim, state_dim)
    expected["initial_state"] = (state_BHPN.shape, shape)
  for name, (got, wanted) in expected.items():
    require(got == wanted, f"SSD's {name} has shape {got}, the others need {wanted}")


def _split(z_BLs: jax.Array, chunk: int, mode: str = "constant") -> jax.Array:
  """[B, L, ...] -> [B, Z, C, ...], filled at the end to a multiple of the chunk."""
  num_rows, length, *rest = z_BLs.shape
  missing = -length % chunk
  if missing:
    widths = [(0, 0), (0, missing)] + [(0, 0)] * len(rest)
    z_BLs = jnp.pad(z_BLs, widths, mode=mode)
  return z_BLs.reshape(num_rows, -1, chunk, *rest)


def _merge_state(state_BHPN: jax.Array, num_groups: int) -> jax.Array:
  num_rows, _, _, state_dim = state_BHPN.shape
  state_BGMN = state_BHPN.reshape(num_rows, num_groups, -1, state_dim)
  return state_BGMN.swapaxes(2, 3)


def _split_state(state_BGNM: jax.Array, num_heads: int) -> jax.Array:
  num_rows, _, state_dim, _ = state_BGNM.shape
  return state_BGNM.swapaxes(2, 3).reshape(num_rows, num_heads, -1, state_dim)
