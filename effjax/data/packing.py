"""Documents packed into rows of equal length, any row computed on its own.

In each epoch the documents are put in an order drawn from (seed, epoch) and laid end to
end without being moved: a row of L tokens is a window of that imaginary stream, found
by a binary search over the cumulative lengths. The rows are then read in an order drawn
the same way, or a batch would be one long document. So a row depends on its index
alone, resuming is a number, and every token is an input exactly once an epoch.

Examples whose answers alone are scored are never cut: each has a row to itself.

Shapes: L sequence length, R rows of an epoch, N documents that touch a row,
D documents of the split, T tokens of the split.
"""

import functools

import grain
import numpy as np

from effjax.core import errors
from effjax.data import tokens


class PackedRows(grain.MapDataset):
  """The training rows, epoch after epoch: index `epoch * len(self) + row`.

  A row is a dict of arrays [L]: `inputs` and `targets` (int32; the target is the next
  token of the same document), `weights` (float32; 0 where there is none: at the end of
  a document and on padding), `segments` (int32; 1, 2, ... for the documents of the
  row, 0 on padding) and `positions` (int32; from 0 in each segment). A document that
  a row border cuts goes on in the next row, as a segment that starts at position 0.
  Only one row of an epoch has padding.

  Raises:
    InputError: the documents together are shorter than a row and its last target.
  """

  def __init__(self, array: tokens.TokenArray, sequence_length: int, seed: int):
    super().__init__()
    num_tokens = len(array.ids_T)
    if num_tokens < sequence_length + 1:
      raise errors.InputError(
        f"data.sequence_length is {sequence_length}, but the training text has only "
        f"{num_tokens} tokens: use shorter sequences or more text"
      )
    # A plain view of the same mapped pages: indexing np.memmap itself is slow.
    self._ids_T = np.asarray(array.ids_T)
    self._starts_D = array.offsets_D1[:-1]
    self._sizes_D = np.diff(array.offsets_D1)
    self._length = sequence_length
    self._num_rows = -(-num_tokens // sequence_length)
    self._seed = seed
    # An epoch's order is shared by its rows; two are alive where one goes over.
    self._order = functools.lru_cache(maxsize=2)(self._make_order)

  def __len__(self) -> int:
    return self._num_rows

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    epoch, place = divmod(index, len(self))
    order_D, ends_D, rows_R = self._order(epoch)
    start = int(rows_R[place]) * self._length
    stop = min(start + self._length, len(self._ids_T))
    # The documents that touch [start, stop) of the epoch's stream.
    first = ends_D.searchsorted(start, side="right")
    last = ends_D.searchsorted(stop, side="left")
    documents_N = order_D[first : last + 1]
    ends_N = ends_D[first : last + 1]
    begins_N = ends_N - self._sizes_D[documents_N]
    starts_N = np.maximum(begins_N, start)
    sizes_N = np.minimum(ends_N, stop) - starts_N
    stream_L = np.arange(start, stop)
    # From a place in the stream to its place in the array on disk.
    places_L = stream_L + np.repeat(self._starts_D[documents_N] - begins_N, sizes_N)
    has_next_L = stream_L + 1 < np.repeat(ends_N, sizes_N)
    targets_L = self._ids_T[places_L + has_next_L] * has_next_L
    return {
      "inputs": self._padded(self._ids_T[places_L], np.int32),
      "targets": self._padded(targets_L, np.int32),
      "weights": self._padded(has_next_L, np.float32),
      "segments": self._padded(
        np.repeat(np.arange(1, len(sizes_N) + 1), sizes_N), np.int32
      ),
      "positions": self._padded(stream_L - np.repeat(starts_N, sizes_N), np.int32),
    }

  def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An epoch's order of documents, where each ends in the stream, order of rows."""
    # Philox's raw output is fixed by NumPy's stability policy; its shuffles are not.
    # (grain's own shuffle takes milliseconds an index when there are few of them.)
    generator = np.random.Philox(key=[self._seed, epoch])
    order_D = np.argsort(generator.random_raw(len(self._sizes_D)), kind="stable")
    rows_R = np.argsort(generator.random_raw(len(self)), kind="stable")
    return order_D, np.cumsum(self._sizes_D[order_D]), rows_R

  def _padded(self, values_L: np.ndarray, dtype: type) -> np.ndarray:
    return _padded(values_L, self._length, dtype)


class ExampleRows(grain.MapDataset):
  """Rows of one example each, epoch after epoch: index `epoch * len(self) + row`.

  A row is a dict of arrays [L] as of PackedRows, with `weights` 1 where the target is
  an answer; the last token of an example is a target only, and padding is on the right.
  The examples of an epoch come in an order drawn from (seed, epoch).

  Raises:
    InputError: an example is longer than a row and its last target.
  """

  def __init__(self, array: tokens.TokenArray, sequence_length: int, seed: int):
    super().__init__()
    longest = int(np.diff(array.offsets_D1).max()) - 1
    if longest > sequence_length:
      raise errors.InputError(
        f"data.sequence_length is {sequence_length}, but the longest example needs "
        f"{longest}"
      )
    self._ids_T = np.asarray(array.ids_T)
    self._scored_T = np.asarray(array.scored_T)
    self._offsets_D1 = array.offsets_D1
    self._length = sequence_length
    self._seed = seed
    self._order = functools.lru_cache(maxsize=2)(self._make_order)

  def __len__(self) -> int:
    return len(self._offsets_D1) - 1

  def __getitem__(self, index):
    if isinstance(index, slice):
      return self.slice(index)
    epoch, place = divmod(index, len(self))
    example = self._order(epoch)[place]
    start, stop = self._offsets_D1[example : example + 2]
    return example_row(
      self._ids_T[start:stop], self._scored_T[start:stop], self._length
    )

  def _make_order(self, epoch: int) -> np.ndarray:
    generator = np.random.Philox(key=[self._seed, epoch])
    return np.argsort(generator.random_raw(len(self)), kind="stable")


def example_row(
  ids_T: np.ndarray, scored_T: np.ndarray, length: int
) -> dict[str, np.ndarray]:
  """An example as a row of the batch dict, `[L]` each, padded with segment 0."""
  num = len(ids_T) - 1
  return {
    "inputs": _padded(ids_T[:-1], length, np.int32),
    "targets": _padded(ids_T[1:], length, np.int32),
    "weights": _padded(scored_T[1:], length, np.float32),
    "segments": _padded(np.ones(num), length, np.int32),
    "positions": _padded(np.arange(num), length, np.int32),
  }


def _padded(values_L: np.ndarray, length: int, dtype: type) -> np.ndarray:
  if len(values_L) == length:
    return values_L.astype(dtype)
  out_L = np.zeros(length, dtype)
  out_L[: len(values_L)] = values_L
  return out_L
