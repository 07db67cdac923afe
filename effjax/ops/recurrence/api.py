"""The entry to the linear recurrences: the form is picked here.

| tokens | form       | why                                                          |
|--------|------------|--------------------------------------------------------------|
| 1      | `ssd_step` | reads the state once; no chunk, nothing padded               |
| more   | `chunked`  | matrix products inside a chunk, a short scan across chunks   |

The length is static, so the choice costs nothing at run time. It is the same on every
platform. Gated linear attention (`gla`) and the delta rules (`delta_rule`, with or
without decay) choose likewise, in files of those names.
"""

import jax
import jax.numpy as jnp

from effjax.ops.recurrence import chunked, delta, step
from effjax.ops.recurrence import gla as gla_forms

ssd_step = step.ssd_step
gla = gla_forms.gla
delta_rule, unit = delta.delta_rule, delta.unit


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
  if x_BLHP.shape[1] != 1:
    return chunked.ssd(
      x_BLHP,
      dt_BLH,
      a_H,
      b_BLGN,
      c_BLGN,
      segments_BL=segments_BL,
      initial_state_BHPN=initial_state_BHPN,
      chunk=chunk,
    )
  chunked.check_shapes(x_BLHP, dt_BLH, a_H, b_BLGN, c_BLGN, initial_state_BHPN)
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
