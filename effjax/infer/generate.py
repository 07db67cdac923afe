"""Text from a prompt, token by token."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors
from effjax.infer import engine, sampling

# Prompts are padded up to a multiple of this, so that few lengths are compiled.
_PROMPT_BUCKET = 32


def stream(
  model: Any,
  params: Mapping[str, Any],
  tokenizer: Any,
  prompt: str,
  *,
  max_tokens: int = 128,
  options: sampling.SamplingOptions | None = None,
  seed: int = 0,
) -> Iterator[str]:
  """Yields the continuation of a prompt, piece by piece.

  Joined, the pieces are the text of all new tokens; bytes of a character that is not
  complete yet are held back. The beginning-of-text token ends the text.

  Args:
    model: a Decoder.
    params: its parameters, of any leaf kinds.
    tokenizer: the tokenizer the model was trained with.
    prompt: text to continue; may be empty.
    max_tokens: tokens to generate at most.
    options: how tokens are chosen; None for the defaults.
    seed: of the random choices; the same seed gives the same text.

  Raises:
    InputError: prompt and new tokens together are longer than trained for.
  """
  options = options or sampling.SamplingOptions()
  config.require(max_tokens > 0, f"max_tokens={max_tokens} must be positive")
  prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
  needed = len(prompt_ids) + max_tokens
  if needed > model.config.max_len:
    raise errors.InputError(
      f"a prompt of {len(prompt_ids)} tokens and {max_tokens} new ones are more than "
      f"the {model.config.max_len} the model was trained for; shorten one of them"
    )
  new_ids: list[int] = []
  shown = ""
  for token in _tokens(model, params, prompt_ids, max_tokens, options, seed):
    if token == tokenizer.bos_id:
      break
    new_ids.append(token)
    text = tokenizer.decode(new_ids)
    # A trailing replacement character may become a real one with the next token.
    if text.endswith("\ufffd") and len(new_ids) < max_tokens:
      continue
    if len(text) > len(shown):
      yield text[len(shown) :]
      shown = text
  text = tokenizer.decode(new_ids)
  if len(text) > len(shown):
    yield text[len(shown) :]


def _tokens(
  model: Any,
  params: Mapping[str, Any],
  prompt_ids: list[int],
  max_tokens: int,
  options: sampling.SamplingOptions,
  seed: int,
) -> Iterator[int]:
  padded_len = -(-len(prompt_ids) // _PROMPT_BUCKET) * _PROMPT_BUCKET
  padded_len = min(padded_len, model.config.max_len)
  tokens_BL = np.zeros((1, padded_len), np.int32)
  tokens_BL[0, : len(prompt_ids)] = prompt_ids
  segments_BL = (np.arange(padded_len) < len(prompt_ids)).astype(np.int32)[None]
  decoding = engine.Decoding(model, params, 1, model.config.max_len)
  logits_BV, state = decoding.prefill(jnp.asarray(tokens_BL), jnp.asarray(segments_BL))
  key = jax.random.key(seed)
  for i in range(max_tokens):
    token_B = _sample(jax.random.fold_in(key, i), logits_BV, options)
    yield int(token_B[0])
    if i + 1 < max_tokens:
      logits_BV, state = decoding.step(token_B, state)


@functools.partial(jax.jit, static_argnames="options")
def _sample(
  key: jax.Array, logits_BV: jax.Array, options: sampling.SamplingOptions
) -> jax.Array:
  return sampling.sample(key, logits_BV, options)
