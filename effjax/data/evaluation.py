"""The fixed evaluation text, and the windows that score each of its tokens once.

Sliding windows as in Press et al. 2021, arXiv:2012.15832, section 2: a window of
`context` tokens moves on by `stride`, and only tokens no earlier window predicted are
counted, so all but the first `context - stride` of them see at least that much before.
An example of which only the answers are scored is one window.

Shapes: W windows, L context, B batch.
"""

import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from effjax.core import config
from effjax.data import packing, tokenizers, tokens
from effjax.data.builders import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalSet:
  """What a model is scored on.

  Attributes:
    documents: the texts, in order; all but the last are whole documents.
    ids: for each text, `bos_id` and its ids.
    context, stride: of the windows, in tokens.
    scored: for each of `ids`, which are answers; None for text. With it there are no
      documents and no bytes, and each of `ids` is one window.
  """

  documents: tuple[str, ...] = dataclasses.field(repr=False)
  ids: tuple[np.ndarray, ...] = dataclasses.field(repr=False)
  context: int
  stride: int
  scored: tuple[np.ndarray, ...] | None = dataclasses.field(default=None, repr=False)

  @property
  def text(self) -> bytes:
    """The raw UTF-8 text: exactly the bytes that bits per byte divides by."""
    return "".join(self.documents).encode()

  @property
  def num_bytes(self) -> int | None:
    """Length of `text`; None where there is none."""
    return len(self.text) if self.scored is None else None

  @property
  def num_tokens(self) -> int:
    """Tokens that are scored: all but the one that starts each document, or answers."""
    if self.scored is not None:
      return sum(int(np.count_nonzero(scored)) for scored in self.scored)
    return sum(len(ids) - 1 for ids in self.ids)

  @property
  def num_windows(self) -> int:
    """Number of windows, so of rows over all batches but for padding."""
    if self.scored is not None:
      return len(self.ids)
    return sum(len(_starts(len(ids), self.context, self.stride)) for ids in self.ids)

  def windows(self) -> Iterator[dict[str, np.ndarray]]:
    """Each window as a row of the batch dict, [L] each, padded with segment 0."""
    if self.scored is not None:
      for ids, scored in zip(self.ids, self.scored, strict=True):
        yield packing.example_row(ids, scored, self.context)
      return
    for ids in self.ids:
      counted = 0  # Targets of this document that some window has counted.
      for start in _starts(len(ids), self.context, self.stride):
        num = min(self.context, len(ids) - 1 - start)
        row = {
          name: np.zeros(self.context, np.float32 if name == "weights" else np.int32)
          for name in ("inputs", "targets", "weights", "segments", "positions")
        }
        row["inputs"][:num] = ids[start : start + num]
        row["targets"][:num] = ids[start + 1 : start + 1 + num]
        row["weights"][counted - start : num] = 1
        row["segments"][:num] = 1
        row["positions"][:num] = np.arange(num)
        counted = start + num
        yield row

  def batches(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> Iterator[dict[str, np.ndarray]]:
    """Batches [B, L] of one fixed shape; missing rows of the last one are padding.

    Args:
      batch_size: rows of a global batch.
      process_index, process_count: this process yields its slice of each batch.
    """
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)
    rows: list[dict[str, np.ndarray]] = []
    for row in self.windows():
      rows.append(row)
      if len(rows) == batch_size:
        yield _stack(rows[mine])
        rows = []
    if rows:
      blank = {name: np.zeros_like(value) for name, value in rows[0].items()}
      rows += [blank] * (batch_size - len(rows))
      yield _stack(rows[mine])


def choose(
  corpus: base.Corpus,
  tokenizer: tokenizers.AnyTokenizer,
  num_bytes: int,
  context: int,
  stride: int,
) -> EvalSet:
  """The first `num_bytes` of the validation split, in an order that never changes.

  Documents come by the hash of their index, so a part of the split is a sample of it
  and not its beginning; the last one is cut before the character that would exceed
  `num_bytes`. A smaller split is taken whole.
  """
  source = corpus.sources["validation"]
  order = sorted(
    range(len(source)), key=lambda index: hashlib.sha256(b"%d" % index).digest()
  )
  texts: list[str] = []
  left = num_bytes
  for index in order:
    data = source[index]["text"][:left]
    # A cut inside a character leaves an incomplete one at the end only.
    text = data.decode("utf-8", errors="ignore")
    if text:
      texts.append(text)
    left -= len(data)
    if left <= 0:
      break
  return EvalSet(
    documents=tuple(texts),
    ids=tuple(tokenizer.encode_documents(texts)),
    context=context,
    stride=stride,
  )


def examples(array: tokens.TokenArray, context: int) -> EvalSet:
  """The whole of a validation split whose answers alone are scored.

  Raises:
    InputError: an example is longer than the context.
  """
  longest = int(np.diff(array.offsets_D1).max()) - 1
  config.require(
    longest <= context,
    f"data.eval_context is {context}, but the longest example needs {longest}",
  )
  cut = lambda flat: tuple(np.split(np.asarray(flat), array.offsets_D1[1:-1]))
  return EvalSet(
    documents=(),
    ids=cut(array.ids_T),
    context=context,
    stride=context,
    scored=cut(array.scored_T),
  )


def _starts(num_ids: int, context: int, stride: int) -> range:
  """Where windows start, so that the targets 1 ... num_ids - 1 are all covered."""
  uncovered = max(num_ids - 1 - context, 0)
  return range(0, -(-uncovered // stride) * stride + 1, stride)


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
