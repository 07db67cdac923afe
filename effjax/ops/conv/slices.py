"""Depthwise causal convolution of a sequence that is split over devices.

Each device asks those before it for the K - 1 inputs in front of its slice, and for
their segments; a slice shorter than that takes them from several devices. The first
ones are the state, or nothing.
"""

import jax
import jax.numpy as jnp
from jax import lax

from effjax.ops.conv import parallel
from effjax.ops.recurrence import across_devices


def causal_conv(
  x_BLD: jax.Array,
  w_KD: jax.Array,
  bias_D: jax.Array | None = None,
  *,
  segments_BL: jax.Array | None = None,
  state_BKD: jax.Array | None = None,
  over: across_devices.Over = (),
) -> tuple[jax.Array, jax.Array]:
  """`parallel.causal_conv`, here on the slices of a sequence.

  Args:
    x_BLD, w_KD, bias_D: as there.
    segments_BL, state_BKD: as there; the state is that before the whole sequence.
    over: mesh axes that the sequence is split over; () for a whole one.

  Returns:
    As there; the last inputs of the whole sequence, on every device.
  """
  past = w_KD.shape[0] - 1
  if not over or not past:
    return parallel.causal_conv(
      x_BLD, w_KD, bias_D, segments_BL=segments_BL, state_BKD=state_BKD
    )
  parallel.check_shapes(x_BLD, w_KD, bias_D, state_BKD)
  index = lax.axis_index(over)
  halo_BKD = _before(x_BLD, past, over)
  # Where what is in front of the slice lies in the sequence: below 0, in the state.
  place_K = jnp.arange(-past, 0) + index * x_BLD.shape[1]
  if state_BKD is not None:
    old_BKD = jnp.take(state_BKD, jnp.minimum(place_K + past, past - 1), axis=1)
    in_state_1K1 = (place_K < 0)[None, :, None]
    halo_BKD = jnp.where(in_state_1K1, old_BKD.astype(x_BLD.dtype), halo_BKD)
  newest = index == across_devices.num_slices(over) - 1
  if segments_BL is not None:
    ids_B2 = across_devices.first_and_last(segments_BL)
    has_B = ids_B2[:, 0] != 0
    newest_B = lax.pmax(jnp.where(has_B, index, 0), over) == index
    newest = newest_B[:, None, None]
    halo_BK = _before(segments_BL, past, over)
    if state_BKD is not None:  # of the first token's segment; any in a row without one
      first_B = across_devices.of_one(ids_B2[:, 0], index == 0, over)
      first_B1 = jnp.where(first_B == 0, 1, first_B)[:, None]
      halo_BK = jnp.where((place_K < 0)[None], first_B1, halo_BK)
    segments_BL = jnp.concatenate([halo_BK, segments_BL], axis=1)
  y_BLD, new_BKD = parallel.causal_conv(
    jnp.concatenate([halo_BKD, x_BLD], axis=1), w_KD, bias_D, segments_BL=segments_BL
  )
  new_BKD = across_devices.of_one(new_BKD, newest, over)
  return y_BLD[:, past:], new_BKD.astype(
    (x_BLD if state_BKD is None else state_BKD).dtype
  )


def _before(z_BLs: jax.Array, past: int, over: across_devices.Over) -> jax.Array:
  """The last `past` positions before each slice, zeros before the first one."""
  length = z_BLs.shape[1]
  found: list[jax.Array] = []
  asked = min(-(-past // length), across_devices.num_slices(over) - 1)
  for distance in range(1, asked + 1):
    wanted = min(length, past - (distance - 1) * length)
    part_BKs = z_BLs[:, length - wanted :]
    found.insert(0, across_devices.receive(part_BKs, distance, over))
  missing = past - sum(part.shape[1] for part in found)
  zeros = jnp.zeros((z_BLs.shape[0], missing, *z_BLs.shape[2:]), z_BLs.dtype)
  return jnp.concatenate([zeros, *found], axis=1)
