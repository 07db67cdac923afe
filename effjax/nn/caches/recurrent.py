"""Decoding state of a recurrent mixer: constant size, whatever the length.

State-space models, linear attention and delta rules all keep one: a memory in float32,
and the last inputs of their short convolutions. B batch; K convolution taps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax
import jax.numpy as jnp
from jax.typing import DTypeLike


@flax.struct.dataclass
class RecurrentState:
  """What a recurrent mixer remembers.

  Attributes:
    memory: recurrent state, float32: one array `[B, ...]`, or a dict of them.
    conv: last K - 1 inputs of each short convolution, `[B, K - 1, channels]`.
    length_B: tokens seen by each row, int32.
  """

  # Any, because pytrees are also built around shapes and other placeholders.
  memory: Any
  conv: Any
  length_B: Any


def init(
  batch: int,
  memory_shape: Sequence[int] | Mapping[str, Sequence[int]],
  conv_taps: int,
  conv_channels: Mapping[str, int],
  dtype: DTypeLike,
) -> RecurrentState:
  """An empty state.

  Args:
    batch: rows.
    memory_shape: shape of the memory of one row, or a dict of such shapes.
    conv_taps: K, taps of the short convolutions (anything without them).
    conv_channels: channels of each short convolution by name; empty without them.
    dtype: of the inputs kept for the convolutions.
  """
  zeros = lambda shape: jnp.zeros((batch, *shape), jnp.float32)
  named = isinstance(memory_shape, Mapping)
  return RecurrentState(
    memory={name: zeros(shape) for name, shape in memory_shape.items()}
    if named
    else zeros(memory_shape),
    conv={
      name: jnp.zeros((batch, conv_taps - 1, channels), dtype)
      for name, channels in conv_channels.items()
    },
    length_B=jnp.zeros((batch,), jnp.int32),
  )


def grown(
  state: RecurrentState, memory: Any, conv: Mapping[str, Any], valid_BL: Any
) -> RecurrentState:
  """The state after more tokens, of which `valid_BL` (bool) marks the real ones."""
  seen_B = jnp.sum(valid_BL, axis=1, dtype=jnp.int32)
  return RecurrentState(
    memory=memory, conv=dict(conv), length_B=state.length_B + seen_B
  )
