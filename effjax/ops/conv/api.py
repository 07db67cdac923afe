"""The entry to short causal convolutions: the form is picked here.

| tokens       | form               | why                                           |
|--------------|--------------------|-----------------------------------------------|
| 1 and a state| `causal_conv_step` | a sum over K inputs, nothing shifted          |
| else         | `parallel`         | one pass over shifted inputs, written gradient|

The length is static, so the choice costs nothing at run time. It is the same on every
platform. Where active rules split the sequence over devices, each convolves its slice
(`slices`).
"""

import jax
import jax.numpy as jnp

from effjax.ops.conv import parallel, slices, step
from effjax.ops.recurrence import across_devices

causal_conv_step = step.causal_conv_step


def causal_conv(
  x_BLD: jax.Array,
  w_KD: jax.Array,
  bias_D: jax.Array | None = None,
  *,
  segments_BL: jax.Array | None = None,
  state_BKD: jax.Array | None = None,
  axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Depthwise causal convolution; see `parallel.causal_conv` for the arguments.

  Args:
    x_BLD, w_KD, bias_D: as there.
    segments_BL, state_BKD: as there.
    axis: logical axis of the channels, which may be split over devices as well.

  Returns:
    y_BLD in the dtype of x and the last K - 1 inputs, `[B, K - 1, D]`.

  Raises:
    InputError: shapes that do not fit.
  """
  if x_BLD.shape[1] != 1 or state_BKD is None:
    split = {"B": "batch", "L": "length"}
    return across_devices.run(
      slices.causal_conv,
      {
        "x_BLD": x_BLD,
        "w_KD": w_KD,
        "bias_D": bias_D,
        "segments_BL": segments_BL,
        "state_BKD": state_BKD,
      },
      ("BLD", "BKD"),
      split if axis is None else split | {"D": axis},
    )
  parallel.check_shapes(x_BLD, w_KD, bias_D, state_BKD)
  y_BD, new_BKD = causal_conv_step(x_BLD[:, 0], w_KD, bias_D, state_BKD)
  if segments_BL is not None:
    new_BKD = jnp.where((segments_BL != 0)[..., None], new_BKD, state_BKD)
  return y_BD[:, None], new_BKD
