"""Embeddings of texts: one vector a text, by an encoder.

Source: Reimers and Gurevych 2019, arXiv:1908.10084, section 3: the mean over the tokens
of the last layer, [CLS] and [SEP] among them; normalized. An encoder with a head is
read below it, which is how BERT's own features are commonly taken.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors
from effjax.infer import lengths
from effjax.models import encoder
from effjax.parallel import hosts

_MIN_LENGTH = 16


def embed(
  model: Any,
  params: Mapping[str, Any],
  tokenizer: Any,
  texts: Sequence[str],
  batch_size: int = 16,
) -> np.ndarray:
  """The embedding `[N, D]` of each text, float32 and of length 1.

  A text stands between what the tokenizer puts around one (`prefix_ids` and
  `suffix_ids`); what is longer than the model was trained for loses its end.

  Args:
    model: an Encoder.
    params: its parameters, of any leaf kinds.
    tokenizer: the tokenizer the model was trained with.
    texts: N texts.
    batch_size: rows of a batch.

  Raises:
    InputError: the model is no encoder, or an id is not the model's.
  """
  if not isinstance(model, encoder.Encoder):
    raise errors.InputError(
      "only an encoder embeds texts; this is a model that writes them"
    )
  config.require(batch_size > 0, f"batch_size={batch_size} must be positive")
  ids = [_encode(model, tokenizer, text) for text in texts]
  groups: dict[int, list[int]] = {}
  for number, row in enumerate(ids):
    length = lengths.padded(len(row), _MIN_LENGTH, model.config.max_len)
    groups.setdefault(length, []).append(number)
  reader = _without_head(model)
  found_ND = np.zeros((len(ids), model.config.embed_dim), np.float32)
  for length, numbers in sorted(groups.items()):
    for start in range(0, len(numbers), batch_size):
      part = numbers[start : start + batch_size]
      tokens_BL, segments_BL = np.zeros((2, batch_size, length), np.int32)
      for b, number in enumerate(part):
        tokens_BL[b, : len(ids[number])] = ids[number]
        segments_BL[b, : len(ids[number])] = 1
      found_BD = hosts.whole(_apply(reader, params, tokens_BL, segments_BL))
      found_ND[part] = found_BD[: len(part)]
  return found_ND


def _encode(model: encoder.Encoder, tokenizer: Any, text: str) -> list[int]:
  limit, vocab = model.config.max_len, model.config.vocab_size
  before, after = tokenizer.prefix_ids, tokenizer.suffix_ids
  room = limit - len(before) - len(after)
  ids = [*before, *tokenizer.encode(text)[:room], *after]
  config.require(
    bool(ids), "an empty text has no tokens, and the tokenizer puts none around it"
  )
  config.require(
    max(ids) < vocab,
    f"the tokenizer gives id {max(ids)}, the model knows {vocab} tokens: they do not "
    "belong together",
  )
  return ids


def _without_head(model: encoder.Encoder) -> encoder.Encoder:
  """The same encoder with the mean as its output; a head's parameters are not read."""
  if model.config.pooling is not None:
    return model
  cfg = dataclasses.replace(model.config, pooling="mean", num_classes=None)
  return encoder.Encoder(cfg, model.precision)


@functools.partial(jax.jit, static_argnames="model")
def _apply(
  model: Any, params: Mapping[str, Any], tokens_BL: jax.Array, segments_BL: jax.Array
) -> jax.Array:
  embedding_BD, _ = model.apply({"params": params}, tokens_BL, segments=segments_BL)
  return embedding_BD.astype(jnp.float32)
