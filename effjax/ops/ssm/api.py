"""The entries to the diagonal state-space models: the form is picked here.

| op               | tokens | form                       | why                        |
|------------------|--------|----------------------------|----------------------------|
| `selective_scan` | 1      | `step.selective_step`      | reads the state once       |
| `selective_scan` | more   | `selective.selective_scan` | states stay in the cache   |
|                  | on GPU | `selective_triton` kernels | states stay in registers   |
| `s4d`            | 1      | `step.s4d_step`            | reads the state once       |
| `s4d`            | more   | `s4d.s4d`                  | products of whole chunks   |

The length is static, so the choice costs nothing at run time. Where active rules split
the sequence over devices, each works on its slice of the tokens and of the channels,
and states go from device to device (`recurrence.across_devices`).
"""

import functools

import jax
import jax.numpy as jnp

from effjax.core import counting
from effjax.ops.recurrence import across_devices
from effjax.ops.ssm import s4d as s4d_ops
from effjax.ops.ssm import selective, selective_slices, selective_triton, step

selective_step = step.selective_step
s4d_step = step.s4d_step


def selective_scan(
  x_BLI: jax.Array,
  dt_BLI: jax.Array,
  a_NI: jax.Array,
  b_BLN: jax.Array,
  c_BLN: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BNI: jax.Array | None = None,
  chunk: int = selective.DEFAULT_CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """Selective scan over L tokens; see `selective.selective_scan` for the arguments.

  Returns:
    y_BLI in the dtype of x and the float32 state after the last token.

  Raises:
    InputError: shapes that do not fit, or a chunk below 1.
  """
  selective.check_shapes(x_BLI, dt_BLI, a_NI, b_BLN, c_BLN, initial_state_BNI)
  if x_BLI.shape[1] != 1:
    on_gpu = jax.default_backend() == "gpu" and not counting.active()
    scan = selective_triton.selective_scan if on_gpu else selective.selective_scan
    return across_devices.run(
      functools.partial(
        selective_slices.selective_scan, scan=functools.partial(scan, chunk=chunk)
      ),
      {
        "x_BLI": x_BLI,
        "dt_BLI": dt_BLI,
        "a_NI": a_NI,
        "b_BLN": b_BLN,
        "c_BLN": c_BLN,
        "segments_BL": segments_BL,
        "initial_state_BNI": initial_state_BNI,
      },
      ("BLI", "BNI"),
      {"B": "batch", "L": "length", "I": "inner"},
      state="initial_state_BNI",
    )
  dt_BI = dt_BLI[:, 0]
  if segments_BL is not None:
    dt_BI = jnp.where(segments_BL != 0, dt_BI, 0)
  if initial_state_BNI is None:
    initial_state_BNI = jnp.zeros((x_BLI.shape[0], *a_NI.shape), jnp.float32)
  y_BI, state_BNI = selective_step(
    x_BLI[:, 0], dt_BI, a_NI, b_BLN[:, 0], c_BLN[:, 0], initial_state_BNI
  )
  return y_BI[:, None], state_BNI


def s4d(
  x_BLI: jax.Array,
  dt_I: jax.Array,
  a_2NI: jax.Array,
  c_2NI: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_B2NI: jax.Array | None = None,
  chunk: int = s4d_ops.DEFAULT_CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """S4D over L tokens; see `s4d.s4d` for the arguments.

  Returns:
    y_BLI in the dtype of x and the float32 state after the last token.

  Raises:
    InputError: shapes that do not fit, or a chunk below 1.
  """
  s4d_ops.check_shapes(x_BLI, dt_I, a_2NI, c_2NI, initial_state_B2NI)
  if x_BLI.shape[1] != 1:
    return across_devices.run(
      functools.partial(s4d_ops.s4d, chunk=chunk),
      {
        "x_BLI": x_BLI,
        "dt_I": dt_I,
        "a_2NI": a_2NI,
        "c_2NI": c_2NI,
        "segments_BL": segments_BL,
        "initial_state_B2NI": initial_state_B2NI,
      },
      ("BLI", "B2NI"),
      {"B": "batch", "L": "length", "I": "embed_act"},
      state="initial_state_B2NI",
    )
  if initial_state_B2NI is None:
    initial_state_B2NI = jnp.zeros((x_BLI.shape[0], *a_2NI.shape), jnp.float32)
  y_BI, new_B2NI = s4d_step(x_BLI[:, 0], dt_I, a_2NI, c_2NI, initial_state_B2NI)
  if segments_BL is not None:
    real_B111 = (segments_BL != 0)[:, :, None, None]
    new_B2NI = jnp.where(real_B111, new_B2NI, initial_state_B2NI)
  return y_BI[:, None], new_B2NI
