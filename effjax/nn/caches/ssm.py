"""Decoding state of a state-space mixer: constant size, whatever the length.

B batch, H heads, P head size, N state size; K convolution taps.
"""

from collections.abc import Mapping
from typing import Any

import flax
import jax.numpy as jnp
from jax.typing import DTypeLike


@flax.struct.dataclass
class SSMState:
  """What a state-space mixer remembers.

  Attributes:
    ssm_BHPN: recurrent state, float32.
    conv: last K - 1 inputs of each short convolution, `[B, K - 1, channels]`.
    length_B: tokens seen by each row, int32.
  """

  # Any, because pytrees are also built around shapes and other placeholders.
  ssm_BHPN: Any
  conv: Any
  length_B: Any


def init(
  batch: int,
  ssm_shape: tuple[int, int, int],
  conv_taps: int,
  conv_channels: Mapping[str, int],
  dtype: DTypeLike,
) -> SSMState:
  """An empty state; `ssm_shape` is `(H, P, N)`."""
  return SSMState(
    ssm_BHPN=jnp.zeros((batch, *ssm_shape), jnp.float32),
    conv={
      name: jnp.zeros((batch, conv_taps - 1, channels), dtype)
      for name, channels in conv_channels.items()
    },
    length_B=jnp.zeros((batch,), jnp.int32),
  )
