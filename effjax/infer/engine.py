"""Decoding with a state: one prefill, then one token at a time.

Weights are unstacked once, at load: an unrolled step over separate arrays, because
slicing stacked weights copies them on the CPU. The state is donated and updated in
place.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core import errors, layers


class Decoding:
  """A model made ready to decode.

  Attributes:
    model: the unrolled model.
    params: its parameters, one entry a layer.
    batch: rows decoded together.
    max_len: tokens a row can hold, prompt included.
  """

  def __init__(self, model: Any, params: Mapping[str, Any], batch: int, max_len: int):
    """Takes the model apart.

    Args:
      model: a Decoder.
      params: its parameters, of any leaf kinds.
      batch: rows decoded together.
      max_len: tokens a row can hold, prompt included.

    Raises:
      InputError: `max_len` is more than the model was trained for.
    """
    limit = model.config.max_len
    if max_len > limit:
      raise errors.InputError(
        f"{max_len} tokens (prompt and new ones) are more than the {limit} the model "
        "was trained for; shorten the prompt or ask for fewer tokens"
      )
    self.model, self.params = layers.unstack(model, params)
    self.batch = batch
    self.max_len = max_len

  def init_state(self) -> dict[str, Any]:
    """An empty decoding state."""
    return self.model.init_state(self.batch, self.max_len)

  def prefill(
    self, tokens_BL: jax.Array, segments_BL: jax.Array | None = None
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Reads prompts, padded on the right with segment 0.

    Returns:
      Logits after each row's last token `[B, V]`, and the state.
    """
    if segments_BL is None:
      segments_BL = jnp.ones(tokens_BL.shape, jnp.int32)
    return prefill(self.model, self.params, tokens_BL, segments_BL, self.init_state())

  def step(
    self, token_B: jax.Array, state: dict[str, Any]
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Feeds one token a row; the given state is consumed.

    Returns:
      Logits of the next token `[B, V]`, and the new state.
    """
    return step(self.model, self.params, token_B, state)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def prefill(
  model: Any,
  params: Mapping[str, Any],
  tokens_BL: jax.Array,
  segments_BL: jax.Array,
  state: dict[str, Any],
) -> tuple[jax.Array, dict[str, Any]]:
  """The compiled form of `Decoding.prefill`."""
  last_B = jnp.maximum(jnp.sum(segments_BL > 0, axis=1) - 1, 0)
  logits_B1V, state = model.apply(
    {"params": params}, tokens_BL, segments=segments_BL, state=state, at_B=last_B
  )
  return logits_B1V[:, 0], state


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def step(
  model: Any, params: Mapping[str, Any], token_B: jax.Array, state: dict[str, Any]
) -> tuple[jax.Array, dict[str, Any]]:
  """The compiled form of `Decoding.step`."""
  logits_BLV, state = model.apply({"params": params}, token_B[:, None], state=state)
  return logits_BLV[:, 0], state
