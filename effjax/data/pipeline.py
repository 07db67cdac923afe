"""From a data config to batches: one call opens everything a run reads.

    data = pipeline.open_data(config)
    iterator = data.train_iterator()
    batch = next(iterator)                  # dict of [B, L] NumPy arrays
    state = iterator.get_state()            # plain JSON; set_state resumes exactly

A batch holds `inputs`, `targets`, `segments`, `positions` (int32) and `weights`
(float32, 1 where the target counts); segment 0 is padding, positions start again in
each segment. In a corpus of examples only answers count, and a row is one example;
of text, every token but a document's first. Random access all the way (rows ->
batches -> this process's batches), so an iterator's state is one number, the same for
any number of processes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np

from effjax.core import config as config_lib
from effjax.core import errors, registry
from effjax.data import config as data_config
from effjax.data import evaluation, packing, tokenizers, tokens
from effjax.data.builders import base

# One thread keeps some batches ready; rows come from memory, so more would only
# contend for the interpreter.
_READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextData:
  """An opened corpus of text, or of examples that are token ids to begin with.

  Attributes:
    config: what it was opened with.
    corpus: the documents and their facts.
    tokenizer: text to ids and back.
    arrays: token ids of each split.
    eval_set: the fixed evaluation text and its windows, or the validation examples.
    process_index, process_count: which share of each global batch this process reads.
  """

  config: data_config.DataConfig
  corpus: base.Corpus
  tokenizer: tokenizers.AnyTokenizer
  arrays: Mapping[str, tokens.TokenArray] = dataclasses.field(repr=False)
  eval_set: evaluation.EvalSet
  process_index: int = 0
  process_count: int = 1

  def train_dataset(self, seed: int | None = None) -> grain.MapDataset:
    """This process's training batches, endless, by step.

    Args:
      seed: of the order of documents; the config's if None.
    """
    rows = self._train_rows(self.config.seed if seed is None else seed)
    share = self.config.batch_size // self.process_count
    # Batches of one process's share, dealt out in turn: global batch s is made of the
    # shares s * process_count to (s + 1) * process_count - 1.
    shares = rows.repeat().batch(share, drop_remainder=True)
    return shares[self.process_index :: self.process_count]

  def _train_rows(self, seed: int) -> grain.MapDataset:
    array, length = self.arrays["train"], self.config.sequence_length
    if array.scored_T is None:
      return packing.PackedRows(array, length, seed)
    return packing.ExampleRows(array, length, seed)

  def train_iterator(self, seed: int | None = None) -> grain.DatasetIterator:
    """Endless training batches with `get_state()` and `set_state(state)`."""
    return iter(self.train_dataset(seed).to_iter_dataset(_READING))

  def eval_batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches that predict each token of the evaluation text exactly once.

    All have the shape [batch_size, eval_context]; `batch_size` is global, and each
    process reads its slice.
    """
    _check_share("batch_size", batch_size, self.process_count)
    return self.eval_set.batches(batch_size, self.process_index, self.process_count)

  def train_text(self, max_bytes: int | None = None) -> bytes:
    """The raw training text (its first `max_bytes`), in the order stored."""
    pieces, size = [], 0
    for text in self.corpus.texts("train"):
      pieces.append(text.encode())
      size += len(pieces[-1])
      if max_bytes is not None and size >= max_bytes:
        break
    return b"".join(pieces)[:max_bytes]

  @property
  def tokens_per_epoch(self) -> int:
    """Training tokens, the ones that start a document included."""
    return len(self.arrays["train"].ids_T)

  @property
  def rows_per_epoch(self) -> int:
    """Training rows until every token was read once."""
    return len(self._train_rows(self.config.seed))

  @property
  def facts(self) -> dict[str, Any]:
    """Plain values about the corpus and its tokens, for a report."""
    facts = {
      "name": self.corpus.name,
      **self.corpus.facts,
      "tokenizer": self.config.tokenizer,
      "vocab_size": self.tokenizer.vocab_size,
      "tokens": {split: len(array.ids_T) for split, array in self.arrays.items()},
    }
    if "bytes" in self.corpus.facts:
      facts["bytes_per_token"] = {
        split: self.corpus.facts["bytes"][split] / array.num_targets
        for split, array in self.arrays.items()
      }
    return facts | {
      "eval": {
        "num_bytes": self.eval_set.num_bytes,
        "num_tokens": self.eval_set.num_tokens,
        "num_documents": len(self.eval_set.ids),
        "context": self.eval_set.context,
        "stride": self.eval_set.stride,
      },
    }


def check(config: data_config.DataConfig) -> None:
  """Checks a config against the files and clients it needs, reading no content.

  Raises:
    InputError: see `open_data`; what only the content shows is left to it.
  """
  technique = registry.find(data_config.BUILDERS, config.corpus)
  options = technique.check(config.options, config.manual_dir)
  is_ids = getattr(technique, "KIND", "text") == "tokens"
  config_lib.require(
    is_ids == (config.tokenizer == "ids"),
    f"corpus {config.corpus!r} is token ids: set data.tokenizer to 'ids', "
    f"got {config.tokenizer!r}"
    if is_ids
    else f"tokenizer 'ids' is for corpora of token ids, {config.corpus!r} is none",
  )
  if is_ids:
    size = len(technique.symbols(options))
    config_lib.require(
      config.vocab_size == size,
      f"corpus {config.corpus!r} has {size} ids: set data.vocab_size to {size}, "
      f"got {config.vocab_size}",
    )


def open_corpus(config: data_config.DataConfig) -> base.Corpus:
  """The config's corpus, fetched and built the first time; of any kind."""
  technique = registry.find(data_config.BUILDERS, config.corpus)
  return technique.open(config.options, config.manual_dir)


def open_data(
  config: data_config.DataConfig,
  process_index: int = 0,
  process_count: int = 1,
  tokenizer: Any = None,
) -> TextData:
  """Opens a corpus of text or of token ids: fetched, built, and tokenized once.

  Args:
    config: what to read.
    process_index: this process, from 0.
    process_count: processes that share each global batch.
    tokenizer: of the model, for data.tokenizer="model"; not used otherwise.

  Raises:
    InputError: an unknown option, a missing or unreadable file, a failed download, a
      corpus that is empty, images or shorter than a row, a tokenizer that does not fit
      it, or a batch that the processes cannot share evenly.
  """
  if not 0 <= process_index < process_count:
    raise errors.InputError(
      f"process_index must be from 0 to {process_count - 1}, got {process_index}"
    )
  _check_share("data.batch_size", config.batch_size, process_count)
  check(config)
  corpus = open_corpus(config)
  if corpus.kind == "image":
    raise errors.InputError(
      f"corpus {config.corpus!r} holds {corpus.kind}s; a language model needs text"
    )
  if config.tokenizer != "model":
    tokenizer = tokens.tokenizer_for(corpus, config.tokenizer, config.vocab_size)
  elif tokenizer is None:
    raise errors.InputError(
      "data.tokenizer='model' needs a model that came with a tokenizer: let the first "
      "stage import one"
    )
  context, stride = config.eval_window
  arrays = tokens.tokenize(corpus, tokenizer)
  if corpus.kind == "tokens":
    eval_set = evaluation.examples(arrays["validation"], context)
  else:
    eval_set = evaluation.choose(corpus, tokenizer, config.eval_bytes, context, stride)
  data = TextData(
    config=config,
    corpus=corpus,
    tokenizer=tokenizer,
    arrays=arrays,
    eval_set=eval_set,
    process_index=process_index,
    process_count=process_count,
  )
  data.train_dataset()  # Raises now if the text is shorter, or an example longer.
  return data


def _check_share(name: str, batch_size: int, process_count: int) -> None:
  config_lib.require(
    batch_size >= 1 and batch_size % process_count == 0,
    f"{name} must be a positive multiple of the {process_count} processes, "
    f"got {batch_size}",
  )
