"""The selective scan of a sequence that is split over devices.

Every state of every channel has decays of its own, so no product covers a slice, and a
scan whose initial state comes later could only be run again. But the state that a slice
leaves, if it starts from none, is a plain sum over its tokens, each decayed to the end
of the slice:

  B = sum_t exp(A (dt_{t+1} + ... + dt_L)) dt_t B_t x_t,

without the states in between. With it the states that meet the slices are known (see
`recurrence/across_devices.py`), and then each device runs its scan, once. So does the
gradient: what a slice's outputs ask of the state before it is such a sum again,

  D = sum_t exp(A (dt_1 + ... + dt_t)) C_t dy_t.

Both sums only say where the scan and its gradient start. Their own derivatives are
those of the scan.

Letters beside the project's: I inner channels, N state of each.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from effjax.ops.recurrence import across_devices
from effjax.ops.recurrence import segments as segment_ops

Scan = Callable[..., tuple[jax.Array, jax.Array]]


def selective_scan(
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BNI: jax.Array | None = None,
  scan: Scan,
  over: across_devices.Over = (),
) -> tuple[jax.Array, jax.Array]:
  """`scan`, here on the slices of a sequence.

  Args:
    x_BLI, dt_BLI, a_NI, b_BLN, c_BLN: as of `selective.selective_scan`.
    segments_BL, initial_state_BNI: as there.
    scan: one of the forms on one device.
    over: mesh axes that the sequence is split over; () for a whole one. Each slice
      starts from its own initial state plus what the ones before hand on.
  """
  if over:
    if initial_state_BNI is None:
      initial_state_BNI = jnp.zeros((x_BLI.shape[0], *a_NI.shape), jnp.float32)
    tokens = (x_BLI, dt_BLI, a_NI, b_BLN, c_BLN)
    return _on_slice(scan, over, *tokens, segments_BL, initial_state_BNI)
  return scan(
    x_BLI,
    dt_BLI,
    a_NI,
    b_BLN,
    c_BLN,
    segments_BL=segments_BL,
    initial_state_BNI=initial_state_BNI,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_slice(
  scan: Scan,
  over: across_devices.Over,
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  segments_BL: jax.Array | None,
  state_BNI: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  tokens = (x_BLI, dt_BLI, a_NI, b_BLN, c_BLN)
  return _forward(scan, over, *tokens, segments_BL, state_BNI)[0]


def _forward(
  scan: Scan,
  over: across_devices.Over,
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  segments_BL: jax.Array | None,
  state_BNI: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
  """Outputs; the gradient of the scan, and what it takes to know where that starts."""
  real_dt_BLI = dt_BLI.astype(jnp.float32)
  # Of the first document of the slice, and of the last one.
  first_BL = last_BL = jnp.ones(x_BLI.shape[:2], bool)
  if segments_BL is not None:
    real_dt_BLI = jnp.where(segments_BL[..., None] != 0, real_dt_BLI, 0.0)
    document_BL = segment_ops.documents(segments_BL, over)
    first_BL = document_BL == 0
    last_BL = document_BL == document_BL[:, -1:]
  joined_B11 = first_BL[:, :1, None]
  through_B11 = first_BL[:, -1:, None]

  upto_BLI = jnp.cumsum(real_dt_BLI, axis=1)
  after_BLI = jnp.flip(jnp.cumsum(jnp.flip(real_dt_BLI[:, 1:], 1), axis=1), 1)
  after_BLI = jnp.pad(after_BLI, ((0, 0), (0, 1), (0, 0)))
  decay_BNI = jnp.exp(upto_BLI[:, -1:] * a_NI.astype(jnp.float32)[None])
  decay_BNI = jnp.where(through_B11, decay_BNI, 0.0)
  fed_BLI = jnp.where(last_BL[..., None], real_dt_BLI * x_BLI, 0.0)
  added_BNI = _decayed_sum(a_NI, after_BLI, b_BLN, fed_BLI) + decay_BNI * state_BNI
  state_BNI += across_devices.arriving(decay_BNI, added_BNI, over)
  state_BNI = jnp.where(joined_B11, state_BNI, 0.0)

  run = lambda x, dt, a, b, c, state: scan(
    x, dt, a, b, c, segments_BL=segments_BL, initial_state_BNI=state
  )
  results, pull = jax.vjp(run, x_BLI, dt_BLI, a_NI, b_BLN, c_BLN, state_BNI)
  return results, (pull, a_NI, upto_BLI, c_BLN, first_BL, decay_BNI)


def _backward(
  scan: Scan,
  over: across_devices.Over,
  residuals: tuple[Any, ...],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
  """Gradients of all arguments; d before a name is the gradient of what it names."""
  del scan
  pull, a_NI, upto_BLI, c_BLN, first_BL, decay_BNI = residuals
  dy_BLI, dstate_BNI = cotangents
  asking_BLI = jnp.where(first_BL[..., None], dy_BLI.astype(jnp.float32), 0.0)
  asked_BNI = _decayed_sum(a_NI, upto_BLI, c_BLN, asking_BLI) + decay_BNI * dstate_BNI
  dstate_BNI += across_devices.arriving(decay_BNI, asked_BNI, over, reverse=True)
  *dtokens, dstate_BNI = pull((dy_BLI, dstate_BNI))
  return (*dtokens, None, jnp.where(first_BL[:, :1, None], dstate_BNI, 0.0))


_on_slice.defvjp(_forward, _backward)


def _decayed_sum(
  a_NI: jax.Array, time_BLI: jax.Array, b_BLN: jax.Array, z_BLI: jax.Array
) -> jax.Array:
  """sum_t exp(A time_t) b_t z_t, `[B, N, I]`: state by state, to hold few numbers."""

  def one(inputs):
    a_I, b_BL = inputs
    decay_BLI = jnp.exp(time_BLI * a_I[None, None])
    return jnp.sum(decay_BLI * b_BL[..., None] * z_BLI, axis=1)

  wide = lambda z: z.astype(jnp.float32)
  sum_NBI = lax.map(one, (wide(a_NI), jnp.moveaxis(wide(b_BLN), 2, 0)))
  return jnp.moveaxis(sum_NBI, 0, 1)
