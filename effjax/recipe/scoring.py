"""Scores a user's own text or token ids with a loaded run."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from effjax.core import config, errors
from effjax.data import documents, evaluation
from effjax.infer import score
from effjax.measure import quality
from effjax.recipe import api

# A larger power of e is no float64.
_MAX_EXPONENT = 700


def read_text(path: pathlib.Path) -> str:
  """A UTF-8 text file.

  Raises:
    InputError: missing, empty or not UTF-8; the message names the byte offset.
  """
  text = documents.decode(_read(path), str(path))
  config.require(bool(text), f"{path} is empty: there is nothing to score")
  return text


def read_tokens(path: pathlib.Path) -> np.ndarray:
  """Token ids `[B, L]` from a .npy file of shape `[B, L]` or `[L]`.

  Raises:
    InputError: missing, or not integers of such a shape.
  """
  if not path.is_file():
    raise errors.InputError(f"{path} does not exist or is not a file")
  try:
    ids = np.load(path, allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise errors.InputError(f"{path} is not a .npy file of ids: {error}") from None
  config.require(
    ids.ndim in (1, 2) and ids.shape[-1] >= 2 and np.issubdtype(ids.dtype, np.integer),
    f"{path} must hold integers [B, L] or [L], L at least 2, got {ids.dtype} of shape "
    f"{ids.shape}",
  )
  return np.atleast_2d(ids)


def score_text(
  run: api.Run,
  text: str,
  logits_path: pathlib.Path | None = None,
  context: int | None = None,
  stride: int | None = None,
) -> Mapping[str, Any]:
  """Loss, perplexity (per token and per word) and bits per byte of a text, in windows.

  A word is what white space separates, as in the protocol of WikiText (Merity et al.
  2016, arXiv:1609.07843): perplexity per word compares models of other tokenizers.
  With a stride equal to the context the windows do not overlap, which is how published
  perplexities of long texts are often taken; every token is predicted either way.

  Args:
    run: a loaded stage.
    text: of any length.
    logits_path: where to write logits `[1, L, V]` float32 of the whole text as one
      sequence that begins with `bos_id`; it must not be longer than trained for.

    context: tokens the model sees at once; None for the run's own.
    stride: tokens a window moves on; None for the run's own, or with a context for half
      of it.

  Raises:
    InputError: logits are wanted of a text longer than trained for, or such windows
      are not possible.
  """
  api.require_language_model(run, "gives texts no probability")
  context, stride = _window(run, context, stride)
  ids = run.tokenizer.encode_documents([text])
  if logits_path is not None:
    # The last id is never an input: it is only predicted.
    _write_logits(run, ids[0][None, :-1], logits_path)
  eval_set = evaluation.EvalSet(
    documents=(text,), ids=tuple(ids), context=context, stride=stride
  )
  batch_size = run.config.measure.eval_batch_size
  found = quality.evaluate(run.model, run.params, eval_set, batch_size)
  return found | _by_words(found, len(text.split()))


def _by_words(found: Mapping[str, Any], num_words: int) -> dict[str, Any]:
  """The summed loss over words; None where it is not finite, or there are none."""
  nats = math.inf
  if found["loss"] is not None and num_words:
    nats = found["loss"] * found["num_tokens"] / num_words
  fits = nats < _MAX_EXPONENT
  return {"word_perplexity": math.exp(nats) if fits else None, "num_words": num_words}


def _window(run: api.Run, context: int | None, stride: int | None) -> tuple[int, int]:
  own_context, own_stride = run.config.data.eval_window
  if stride is None:
    stride = own_stride if context is None else max(1, context // 2)
  context = own_context if context is None else context
  limit = run.model.config.max_len
  config.require(
    1 <= context <= limit,
    f"--context {context} must be from 1 to {limit}, the longest text of the model",
  )
  config.require(
    1 <= stride <= context,
    f"--stride {stride} must be from 1 to the context ({context}): a longer one would "
    "leave tokens unscored",
  )
  return context, stride


def score_tokens(
  run: api.Run, ids_BL: np.ndarray, logits_path: pathlib.Path | None = None
) -> Mapping[str, Any]:
  """Loss, perplexity and bits per byte of rows of ids.

  The first id of a row is context; bytes are those of the ids that are predicted.

  Args:
    run: a loaded stage.
    ids_BL: token ids.
    logits_path: where to write the logits `[B, L, V]`, float32.

  Raises:
    InputError: rows longer than trained for, or ids outside of the vocabulary.
  """
  api.require_language_model(run, "gives tokens no probability")
  logits_BLV = score.logits(run.model, run.params, ids_BL)
  if logits_path is not None:
    _save(logits_path, logits_BLV)
  shifted_BLV = logits_BLV[:, :-1].astype(np.float64)
  shifted_BLV -= shifted_BLV.max(axis=-1, keepdims=True)
  targets_BL1 = ids_BL[:, 1:, None].astype(np.int64)
  chosen_BL = np.take_along_axis(shifted_BLV, targets_BL1, axis=-1)[..., 0]
  nll_BL = np.log(np.exp(shifted_BLV).sum(axis=-1)) - chosen_BL
  num_bytes = sum(len(run.tokenizer.decode_bytes(row[1:].tolist())) for row in ids_BL)
  config.require(num_bytes > 0, "these ids stand for no text: nothing to score")
  return quality.summarize(float(nll_BL.sum()), nll_BL.size, num_bytes)


def _write_logits(run: api.Run, ids_BL: np.ndarray, path: pathlib.Path) -> None:
  _save(path, score.logits(run.model, run.params, ids_BL.astype(np.int32)))


def _save(path: pathlib.Path, logits_BLV: np.ndarray) -> None:
  with open(path, "wb") as file:  # np.save would add a suffix to other names.
    np.save(file, logits_BLV)


def _read(path: pathlib.Path) -> bytes:
  if not path.is_file():
    raise errors.InputError(f"{path} does not exist or is not a file")
  return path.read_bytes()
