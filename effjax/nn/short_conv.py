"""The short causal depthwise convolution in front of many recurrent mixers.

Source: Gu and Dao 2023, arXiv:2312.00752, section 3.4 (4 taps, then SiLU); Yang et al.
2024, arXiv:2406.06484, section 3.3 (on queries, keys and values). No deviations.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from effjax.weights import verbs
from effjax.weights import weight as weight_lib

# The initialization of a depthwise convolution with K taps in PyTorch.
_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", 0, 1)


def short_conv(
  module: nn.Module,
  x_BLI: jax.Array,
  name: str,
  *,
  taps: int,
  axis: str,
  segments: jax.Array,
  state_BKI: jax.Array | None,
  bias: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Convolution and SiLU of one stream; its weights belong to the calling module.

  Args:
    module: the mixer, inside its compact method.
    x_BLI: the stream.
    name: of the stream; the weights are `conv_<name>` and `conv_<name>_bias`.
    taps: K (tokens), the last tap for the token itself.
    axis: logical axis of the channels.
    segments: int32 `[B, L]`; 0 is padding. With a state, all others continue it.
    state_BKI: the last K - 1 inputs, or None without a decoding state.
    bias: whether there is a bias.

  Returns:
    The stream in its dtype, and the last K - 1 inputs.
  """
  size = x_BLI.shape[-1]
  kernel = weight_lib.weight(
    module, f"conv_{name}", kernel_init, (taps, size), axes=("taps", axis), kind="conv"
  )
  bias_I = None
  if bias:
    w = weight_lib.weight(
      module,
      f"conv_{name}_bias",
      nn.initializers.zeros,
      (size,),
      axes=(axis,),
      kind="bias",
    )
    bias_I = verbs.dense(w).astype(x_BLI.dtype)
  if state_BKI is not None:
    segments = (segments > 0).astype(jnp.int32)
  y_BLI, new_state = verbs.conv(
    x_BLI, kernel, bias_D=bias_I, segments_BL=segments, state_BKD=state_BKI, axis=axis
  )
  return nn.silu(y_BLI), new_state


def kernel_init(key: jax.Array, shape: tuple[int, int], dtype: DTypeLike) -> jax.Array:
  """Initial taps `[K, channels]`."""
  return _init(key, (shape[0], 1, shape[1]), dtype)[:, 0]
