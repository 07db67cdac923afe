"""Logits of whole sequences, without a decoding state."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors


def logits(model: Any, params: Mapping[str, Any], tokens_BL: Any) -> np.ndarray:
  """Float32 logits `[B, L, V]` for int32 tokens `[B, L]`.

  Raises:
    InputError: not a matrix of token ids of this model, or longer than trained for.
  """
  tokens_BL = np.asarray(tokens_BL)
  config.require(
    tokens_BL.ndim == 2 and np.issubdtype(tokens_BL.dtype, np.integer),
    f"tokens must be integers [batch, length], got {tokens_BL.dtype} "
    f"of shape {tokens_BL.shape}",
  )
  limit, vocab = model.config.max_len, model.config.vocab_size
  if tokens_BL.shape[1] > limit:
    raise errors.InputError(
      f"sequences of {tokens_BL.shape[1]} tokens are longer than the {limit} the model "
      "was trained for; cut them"
    )
  config.require(
    tokens_BL.size > 0 and bool(0 <= tokens_BL.min() and tokens_BL.max() < vocab),
    f"token ids must be from 0 to {vocab - 1}",
  )
  return np.asarray(_logits(model, params, jnp.asarray(tokens_BL, jnp.int32)))


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: Any, params: Mapping[str, Any], tokens_BL: jax.Array) -> jax.Array:
  return model.apply({"params": params}, tokens_BL)[0]
