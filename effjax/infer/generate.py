"""Text from a prompt, token by token."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors
from effjax.infer import chat as chat_lib
from effjax.infer import engine, sampling

# Prompts are padded up to a multiple of this, so that few lengths are compiled.
_PROMPT_BUCKET = 32
# Smallest decoding state; larger ones are powers of two. A model trained for very long
# texts would otherwise hold a state for one in every short answer.
_MIN_STATE_LEN = 1024
_REPLACEMENT = "\ufffd"


def stream(
  model: Any,
  params: Mapping[str, Any],
  tokenizer: Any,
  prompt: str,
  *,
  max_tokens: int = 128,
  options: sampling.SamplingOptions | None = None,
  seed: int = 0,
  stop: Sequence[str] = (),
  chat: bool = False,
  system: str | None = None,
) -> Iterator[str]:
  """Yields the continuation of a prompt, or the answer to it, piece by piece.

  Joined, the pieces are the text of all new tokens. Held back until it is decided are
  bytes of a character that is not complete yet and what may become a stop string. Any
  of the tokenizer's `eos_ids` ends the text.

  Args:
    model: a Decoder.
    params: its parameters, of any leaf kinds.
    tokenizer: the tokenizer the model was trained with.
    prompt: text to continue; may be empty. With `chat`, a user's message.
    max_tokens: tokens to generate at most.
    options: how tokens are chosen; None for the defaults.
    seed: of the random choices; the same seed gives the same text.
    stop: strings that end the text, before the first of them to be complete.
    chat: write the prompt as the tokenizer's chat template does, and yield the answer.
    system: with `chat`, how to answer.

  Raises:
    InputError: prompt and new tokens together are longer than trained for, the prompt
      is empty and nothing can stand for it, or there is no (fitting) chat template.
  """
  options = options or sampling.SamplingOptions()
  config.require(max_tokens > 0, f"max_tokens={max_tokens} must be positive")
  config.require(
    not isinstance(stop, str) and all(stop),
    f"stop must be a sequence of non-empty strings, got {stop!r}",
  )
  prompt_ids = _prompt_ids(tokenizer, prompt, chat, system)
  needed = len(prompt_ids) + max_tokens
  if needed > model.config.max_len:
    raise errors.InputError(
      f"a prompt of {len(prompt_ids)} tokens and {max_tokens} new ones are more than "
      f"the {model.config.max_len} the model was trained for; shorten one of them"
    )
  _check_ids(model, prompt_ids)
  tokens = _tokens(model, params, prompt_ids, max_tokens, options, seed)
  ended = itertools.takewhile(lambda token: token not in tokenizer.eos_ids, tokens)
  yield from _pieces(tokenizer, ended, tuple(stop), starts=chat)


def _prompt_ids(
  tokenizer: Any, prompt: str, chat: bool, system: str | None
) -> list[int]:
  """The ids to begin with: at least one."""
  try:
    f"{prompt}{system}".encode()
  except UnicodeEncodeError as error:
    raise errors.InputError(f"the prompt is not Unicode text: {error}") from None
  config.require(
    chat or system is None, "a system message needs chat: it is part of a conversation"
  )
  if chat:
    # The template writes the token that begins a text, where there is one.
    text = chat_lib.prompt(tokenizer, prompt, system)
    ids = tokenizer.encode(text, special=True)
  else:
    ids = tokenizer.encode(prompt)
    if tokenizer.add_bos:
      ids = [tokenizer.bos_id, *ids]
  if ids:
    return ids
  config.require(
    tokenizer.start_id is not None,
    "the prompt is empty, and the tokenizer has no bos, eos or pad token to begin "
    "with; give a prompt",
  )
  return [tokenizer.start_id]


def _check_ids(model: Any, ids: Sequence[int]) -> None:
  rows = model.config.vocab_size
  config.require(
    max(ids) < rows,
    f"the tokenizer gives id {max(ids)}, the model knows {rows} tokens: they do not "
    "belong together",
  )


def _pieces(
  tokenizer: Any, tokens: Iterator[int], stop: tuple[str, ...], *, starts: bool
) -> Iterator[str]:
  """The text of tokens, as far as the next ones cannot change it.

  Args:
    tokenizer: has `decode`, `decode_bytes` and `vocab_size`.
    tokens: the new tokens, without the one that ends the text.
    stop: strings that end the text.
    starts: the tokens begin a text of their own; else they continue one, and the first
      keeps its space.
  """
  ids: list[int] = []
  text, shown = "", 0
  for token in tokens:
    # A model may have more rows than the tokenizer has ids; they stand for no text.
    if token >= tokenizer.vocab_size:
      continue
    ids.append(token)
    if starts:
      text = tokenizer.decode(ids)
    else:
      text = tokenizer.decode_bytes(ids).decode("utf-8", errors="replace")
    found = [at for at in (text.find(end) for end in stop) if at >= 0]
    if found:
      yield text[shown : min(found)]
      return
    # A trailing replacement character may become a real one with the next token.
    decided = _decided(text.rstrip(_REPLACEMENT), stop)
    if decided > shown:
      yield text[shown:decided]
      shown = decided
  if len(text) > shown:
    yield text[shown:]


def _decided(text: str, stop: tuple[str, ...]) -> int:
  """How much of a text is before anything that could grow into a stop string."""
  longest = max((len(end) for end in stop), default=1) - 1
  for at in range(max(len(text) - longest, 0), len(text)):
    if any(end.startswith(text[at:]) for end in stop):
      return at
  return len(text)


def _tokens(
  model: Any,
  params: Mapping[str, Any],
  prompt_ids: list[int],
  max_tokens: int,
  options: sampling.SamplingOptions,
  seed: int,
) -> Iterator[int]:
  limit = model.config.max_len
  padded_len = -(-len(prompt_ids) // _PROMPT_BUCKET) * _PROMPT_BUCKET
  padded_len = min(padded_len, limit)
  tokens_BL = np.zeros((1, padded_len), np.int32)
  tokens_BL[0, : len(prompt_ids)] = prompt_ids
  segments_BL = (np.arange(padded_len) < len(prompt_ids)).astype(np.int32)[None]
  needed = max(len(prompt_ids) + max_tokens, padded_len, _MIN_STATE_LEN)
  state_len = min(1 << (needed - 1).bit_length(), limit)
  decoding = engine.Decoding(model, params, 1, state_len)
  logits_BV, state = decoding.prefill(jnp.asarray(tokens_BL), jnp.asarray(segments_BL))
  seen_BV = None
  if options.repetition_penalty != 1:
    seen = np.zeros((1, logits_BV.shape[-1]), bool)
    seen[0, prompt_ids] = True
    seen_BV = jnp.asarray(seen)
  key = jax.random.key(seed)
  for i in range(max_tokens):
    token_B = sampling.sample(jax.random.fold_in(key, i), logits_BV, options, seen_BV)
    yield int(token_B[0])
    if i + 1 < max_tokens:
      if seen_BV is not None:
        seen_BV = sampling.mark_seen(seen_BV, token_B)
      logits_BV, state = decoding.step(token_B, state)
