"""How often a language model finds the right one of a few answers the most likely.

Source: multiple choice as in lm-evaluation-harness (Gao et al. 2021,
doi:10.5281/zenodo.5371628): the log-likelihood of an answer is the sum of those of its
tokens given everything before. Deviations: the accuracy that accounts for the lengths
of answers divides by UTF-8 bytes, not characters; a continuation that has no token of
its own is an error; and a row in which another item's row begins is not computed again,
since a causal model says the same there.

Local letters: N items, A answers, P pairs of a position and its target.
"""

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import config, errors
from effjax.infer import lengths
from effjax.measure import answers as answers_lib
from effjax.parallel import hosts

log = logging.getLogger(__name__)

# Few lengths and few numbers of targets, so that few programs are compiled.
_MIN_LENGTH = 32
_MIN_PAIRS = 8
# Of one batch's logits, so that a large vocabulary does not need a small batch_size.
_MAX_LOGITS_BYTES = 2**30


class _Item(NamedTuple):
  """A pair as ids: inputs end before the last id, the last ones predict `targets`."""

  inputs: tuple[int, ...]
  targets: tuple[int, ...]


class _Row(NamedTuple):
  """What the model sees at once, and which items it answers (their numbers)."""

  inputs: tuple[int, ...]
  items: list[int]


def log_likelihoods(
  model: Any,
  params: Mapping[str, Any],
  tokenizer: Any,
  items: Sequence[tuple[str, str]],
  batch_size: int = 16,
) -> np.ndarray:
  """The log-probability of each continuation given its context.

  Context and continuation are encoded as one text; the continuation's tokens are those
  after as many as the context alone has, and spaces between the two belong to the
  continuation. A text begins with `bos_id` if the tokenizer's `add_bos` says so, and
  with `start_id` if there is no context. What is longer than the model was trained for
  loses ids at the start (`bos_id` too).

  Args:
    model: a Decoder.
    params: its parameters, of any leaf kinds.
    tokenizer: the tokenizer the model was trained with.
    items: contexts and continuations.
    batch_size: most rows of a batch; fewer where their logits would take over 1 GiB.

  Returns:
    Summed log-probabilities `[N]`, float64 nats. Those of a token are float32.

  Raises:
    InputError: a continuation has no token of its own or is longer than trained for, an
      id is not the model's, or a context is empty and the tokenizer has no start.
  """
  config.require(batch_size > 0, f"batch_size={batch_size} must be positive")
  limit = model.config.max_len
  coded = _encode(tokenizer, items)
  cut = sum(len(context) + len(rest) > limit + 1 for context, rest in coded)
  if cut:
    log.warning("%d of %d contexts are cut to the last %d ids", cut, len(items), limit)
  inputs = [_fit(model, *ids) for ids in coded]
  rows = _rows([item.inputs for item in inputs])
  log.info("%d continuations in %d rows", len(items), len(rows))
  totals_N = np.zeros(len(items))
  for length, group in _by_length(rows, limit).items():
    bytes_a_row = length * model.config.vocab_size * 4
    size = max(1, min(batch_size, _MAX_LOGITS_BYTES // bytes_a_row))
    most = max(sum(len(inputs[i].targets) for i in row.items) for row in group)
    num_pairs = max(_MIN_PAIRS, 1 << (most - 1).bit_length())
    for start in range(0, len(group), size):
      part = group[start : start + size]
      batch, pairs = _batch(part, inputs, size, length, num_pairs)
      found_BP = hosts.whole(_chosen(model, params, **batch)).astype(np.float64)
      for found_P, owners in zip(found_BP, pairs, strict=False):  # then padding
        np.add.at(totals_N, owners, found_P[: len(owners)])
  return totals_N


def accuracy(
  log_likelihoods_NA: np.ndarray, labels_N: Sequence[int], answers: Sequence[str]
) -> dict[str, Any]:
  """How often the right answer is the most likely one.

  Args:
    log_likelihoods_NA: of each answer to each question, in nats.
    labels_N: the right answers' numbers.
    answers: the answers' texts, without the space before them.

  Returns:
    What `answers.summarize` returns (the highest sum wins, the first of equal ones),
    and "accuracy_norm", the same with sums over the UTF-8 bytes of the answers. Without
    finite log-likelihoods the measured ones are None.

  Raises:
    InputError: no examples, or shapes or labels that do not fit.
  """
  scores_NA, labels_N = np.asarray(log_likelihoods_NA), np.asarray(labels_N)
  num = len(labels_N)
  config.require(
    scores_NA.shape == (num, len(answers)),
    f"log-likelihoods of shape {scores_NA.shape} do not fit {num} labels and "
    f"{len(answers)} answers",
  )
  finite = bool(np.isfinite(scores_NA).all())
  given_N = scores_NA.argmax(axis=1) if finite else None
  found = answers_lib.summarize(given_N, labels_N, answers)
  bytes_A = np.array([len(answer.encode()) for answer in answers])
  norm_N = (scores_NA / bytes_A[None]).argmax(axis=1) == labels_N
  return found | {"accuracy_norm": float(norm_N.mean()) if finite else None}


def _encode(
  tokenizer: Any, items: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
  """The ids of contexts, with what begins a text, and of continuations."""
  encode = functools.lru_cache(maxsize=1)(tokenizer.encode)
  start = [tokenizer.bos_id] if tokenizer.add_bos else []
  coded = []
  for context, continuation in items:
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    context_ids = encode(kept)
    rest = tokenizer.encode(kept + continuation)[len(context_ids) :]
    if not rest:
      raise errors.InputError(
        f"the continuation {continuation!r} has no token of its own after "
        f"{kept[-20:]!r}"
      )
    before = [*start, *context_ids]
    if not before:
      config.require(
        tokenizer.start_id is not None,
        "a context is empty, and the tokenizer has no bos, eos or pad token to begin "
        "with",
      )
      before = [tokenizer.start_id]
    coded.append((before, rest))
  return coded


def _fit(model: Any, context: Sequence[int], rest: Sequence[int]) -> _Item:
  """A pair cut on the left to what the model was trained for."""
  limit, vocab = model.config.max_len, model.config.vocab_size
  config.require(
    len(rest) <= limit,
    f"a continuation of {len(rest)} tokens is longer than the {limit} the model was "
    "trained for",
  )
  ids = (*context, *rest)[-(limit + 1) :]
  config.require(
    max(ids) < vocab,
    f"the tokenizer gives id {max(ids)}, the model knows {vocab} tokens: they do not "
    "belong together",
  )
  return _Item(ids[:-1], ids[len(ids) - len(rest) :])


def _rows(inputs: Sequence[tuple[int, ...]]) -> list[_Row]:
  """The fewest rows that begin with all of some inputs."""
  rows: list[_Row] = []
  # Sorted, everything that begins with some ids comes right after those ids alone.
  for number in sorted(range(len(inputs)), key=lambda n: inputs[n], reverse=True):
    ids = inputs[number]
    if rows and rows[-1].inputs[: len(ids)] == ids:
      rows[-1].items.append(number)
    else:
      rows.append(_Row(ids, [number]))
  return rows


def _by_length(rows: Iterable[_Row], limit: int) -> dict[int, list[_Row]]:
  """Rows by the length they are padded to: 32, 48, 64, 96, 128, 192, ... or limit."""
  groups: dict[int, list[_Row]] = {}
  for row in rows:
    length = lengths.padded(len(row.inputs), _MIN_LENGTH, limit)
    groups.setdefault(length, []).append(row)
  return dict(sorted(groups.items()))


def _batch(
  rows: Sequence[_Row], items: Sequence[_Item], size: int, length: int, num_pairs: int
) -> tuple[dict[str, np.ndarray], list[list[int]]]:
  """Arguments of `_chosen`, padded, and the item of each pair of each row."""
  tokens_BL, segments_BL = np.zeros((2, size, length), np.int32)
  positions_BP, targets_BP = np.zeros((2, size, num_pairs), np.int32)
  owners: list[list[int]] = []
  for b, row in enumerate(rows):
    tokens_BL[b, : len(row.inputs)] = row.inputs
    segments_BL[b, : len(row.inputs)] = 1
    owners.append([])
    for number in row.items:
      item = items[number]
      begin, count = len(owners[b]), len(item.targets)
      here = slice(begin, begin + count)
      last = len(item.inputs)
      positions_BP[b, here] = np.arange(last - count, last)
      targets_BP[b, here] = item.targets
      owners[b] += [number] * count
  arrays = {
    "tokens_BL": tokens_BL,
    "segments_BL": segments_BL,
    "positions_BP": positions_BP,
    "targets_BP": targets_BP,
  }
  return arrays, owners


@functools.partial(jax.jit, static_argnames="model")
def _chosen(
  model: Any,
  params: Mapping[str, Any],
  tokens_BL: jax.Array,
  segments_BL: jax.Array,
  positions_BP: jax.Array,
  targets_BP: jax.Array,
) -> jax.Array:
  """Log-probabilities `[B, P]` float32 of targets after positions."""
  logits_BLV, _ = model.apply({"params": params}, tokens_BL, segments=segments_BL)
  logits_BLV = logits_BLV.astype(jnp.float32)
  rows_B1 = jnp.arange(tokens_BL.shape[0])[:, None]
  # Not log_softmax: that would write all of its `[B, L, V]` to read few of them.
  norms_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
  return logits_BLV[rows_B1, positions_BP, targets_BP] - norms_BL[rows_B1, positions_BP]
