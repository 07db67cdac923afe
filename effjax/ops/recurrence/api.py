"""The entry to the linear recurrences: the form is picked here.

| tokens | form       | why                                                          |
|--------|------------|--------------------------------------------------------------|
| 1      | `ssd_step` | reads the state once; no chunk, nothing padded               |
| more   | `chunked`  | matrix products inside a chunk, a short scan across chunks   |

The length is static, so the choice costs nothing at run time. It is the same on every
platform. Gated linear attention (`gla`) and the delta rules (`delta_rule`, with or
without decay) choose likewise, in files of those names.

Where active rules split the sequence over devices, each works on its slice of the
tokens and of the heads, and states go from device to device (`across_devices`).
"""

import functools

import jax
import jax.numpy as jnp

from effjax.ops.recurrence import across_devices, chunked, delta, step
from effjax.ops.recurrence import gla as gla_forms

ssd_step = step.ssd_step
unit = delta.unit


def ssd(
  x_BLHP: jax.Array,
  dt_BLH: jax.Array,
  a_H: jax.Array,
  b_BLGN: jax.Array,
  c_BLGN: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHPN: jax.Array | None = None,
  chunk: int = chunked.DEFAULT_CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """State-space recurrence over L tokens; see `chunked.ssd` for the arguments.

  Returns:
    y_BLHP in the dtype of x and the float32 state after the last token.

  Raises:
    InputError: shapes that do not fit, or a chunk below 1.
  """
  chunked.check_shapes(x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, initial_state_BHPN)
  if x_BLHP.shape[1] != 1:
    return across_devices.run(
      functools.partial(chunked.ssd, chunk=chunk),
      {
        "x_BLHP": x_BLHP,
        "dt_BLH": dt_BLH,
        "a_H": a_H,
        "b_BLGN": b_BLGN,
        "c_BLGN": c_BLGN,
        "segments_BL": segments_BL,
        "initial_state_BHPN": initial_state_BHPN,
      },
      ("BLHP", "BHPN"),
      _split(b_BLGN.shape[2]),
      state="initial_state_BHPN",
    )
  dt_BH = dt_BLH[:, 0]
  if segments_BL is not None:
    dt_BH = jnp.where(segments_BL != 0, dt_BH, 0)
  if initial_state_BHPN is None:
    num_rows, _, *rest = x_BLHP.shape
    shape = (num_rows, *rest, b_BLGN.shape[-1])
    initial_state_BHPN = jnp.zeros(shape, jnp.float32)
  y_BHP, state_BHPN = ssd_step(
    x_BLHP[:, 0], dt_BH, a_H, b_BLGN[:, 0], c_BLGN[:, 0], initial_state_BHPN
  )
  return y_BHP[:, None], state_BHPN


def gla(
  q_BLHK: jax.Array,
  k_BLHK: jax.Array,
  v_BLHV: jax.Array,
  g_BLHK: jax.Array,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHKV: jax.Array | None = None,
  chunk: int = gla_forms.DEFAULT_CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """Gated linear attention; see `gla.gla` for the arguments, results and errors."""
  return across_devices.run(
    functools.partial(gla_forms.gla, chunk=chunk),
    {
      "q_BLHK": q_BLHK,
      "k_BLHK": k_BLHK,
      "v_BLHV": v_BLHV,
      "g_BLHK": g_BLHK,
      "segments_BL": segments_BL,
      "initial_state_BHKV": initial_state_BHKV,
    },
    ("BLHV", "BHKV"),
    _split(),
    state="initial_state_BHKV",
  )


def delta_rule(
  q_BLGK: jax.Array,
  k_BLGK: jax.Array,
  v_BLHV: jax.Array,
  beta_BLH: jax.Array,
  g_BLH: jax.Array | None = None,
  *,
  segments_BL: jax.Array | None = None,
  initial_state_BHKV: jax.Array | None = None,
  chunk: int = delta.DEFAULT_CHUNK,
) -> tuple[jax.Array, jax.Array]:
  """The delta rules; see `delta.delta_rule` for the arguments, results and errors."""
  return across_devices.run(
    functools.partial(delta.delta_rule, chunk=chunk),
    {
      "q_BLGK": q_BLGK,
      "k_BLGK": k_BLGK,
      "v_BLHV": v_BLHV,
      "beta_BLH": beta_BLH,
      "g_BLH": g_BLH,
      "segments_BL": segments_BL,
      "initial_state_BHKV": initial_state_BHKV,
    },
    ("BLHV", "BHKV"),
    _split(k_BLGK.shape[2]),
    state="initial_state_BHKV",
  )


def _split(num_groups: int = 1) -> dict[str, str]:
  """What may be split over devices: heads with their groups, but one group is whole."""
  split = {"B": "batch", "L": "length", "H": "heads"}
  return split if num_groups == 1 else split | {"G": "heads"}
