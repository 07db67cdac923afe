"""Multi-query associative recall: look up many keys that came with a value each.

Source: Arora et al. 2023 (Zoology), arXiv:2312.04927, section 4 and appendix E. A
sequence lists `num_pairs` key-value pairs, then asks for each key once:

    k7 v3 k2 v9 ... k2 v9 . . k7 v3          (v9 and v3 at the end are scored)

Keys and values come from the two halves of the vocabulary, without repetition within a
sequence. Queries stand at distinct places drawn with a probability that falls as
`alpha * place ** (alpha - 1)`, so most follow soon and some only at the end; places
without a query hold random ids. With `4 * num_pairs == length` every place has one.

Deviations: the answer stands in the sequence after its query, as it does in text (the
authors' code puts a random id there and holds the answers apart; each key is asked for
once, so an answer tells nothing about another); id 0 starts every sequence, so
`length` counts what the model reads: the start and all tokens but the last answer. Like
theirs, training may mix in sequences of fewer pairs (`train_pairs`), here shorter in
proportion; validation never does.

Shapes: N sequences, P pairs, S places, T ids of a sequence.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from effjax.core import config
from effjax.data import documents, symbols
from effjax.data.builders import base

_BLOCK = 1024  # Sequences drawn together.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The task and how much of it.

  Attributes:
    num_pairs: pairs in a sequence, each asked for once.
    train_pairs: pairs in training sequences, a thousand of each in turn, whose lengths
      are in proportion; `num_pairs` if empty.
    length: tokens of a sequence, pairs and queries with their answers.
    vocab_size: ids; the start is id 0, the lower half are keys, the upper half values.
    num_examples: training sequences.
    num_validation: validation sequences.
    alpha: exponent of the power law of the places of queries.
    seed: of the content.
  """

  num_pairs: int = 32
  train_pairs: tuple[int, ...] = ()
  length: int = 128
  vocab_size: int = 256
  num_examples: int = 50_000
  num_validation: int = 1_000
  alpha: float = 0.01
  seed: int = 0

  def __post_init__(self):
    for name in ("num_pairs", "num_examples", "num_validation"):
      value = getattr(self, name)
      config.require(value >= 1, f"{name} must be at least 1, got {value}")
    config.require(
      all(1 <= pairs <= self.num_pairs for pairs in self.train_pairs),
      f"train_pairs must be from 1 to num_pairs = {self.num_pairs}, "
      f"got {self.train_pairs}",
    )
    config.require(
      self.length % 2 == 0 and 4 * self.num_pairs <= self.length,
      f"length must be even and at least 4 * num_pairs = {4 * self.num_pairs} (a pair "
      f"and a query with its answer), got {self.length}",
    )
    config.require(
      2 * self.num_pairs + 2 <= self.vocab_size <= 1 << 16,
      f"vocab_size must be from 2 * num_pairs + 2 = {2 * self.num_pairs + 2} (distinct "
      f"keys and values) to 65536, got {self.vocab_size}",
    )
    config.require(
      0 < self.alpha <= 1, f"alpha must be above 0 and at most 1, got {self.alpha}"
    )
    config.require(0 <= self.seed < 2**64, f"seed={self.seed} is out of range")


class MQAR(base.ExampleBuilder):
  """Sequences with `num_pairs` answers each, or fewer in training."""

  KEY = "mqar"
  Options = Options

  @classmethod
  def symbols(cls, options: Options) -> tuple[str, ...]:
    half = options.vocab_size // 2
    keys = [f"k{index}" for index in range(1, half)]
    return symbols.START, *keys, *(f"v{i}" for i in range(options.vocab_size - half))

  def make_examples(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    options = self.builder_config.options
    left = options.num_examples if split == "train" else options.num_validation
    first = documents.SPLITS.index(split) << 32
    counts = split == "train" and options.train_pairs or (options.num_pairs,)
    for block in range(-(-left // _BLOCK)):
      # Blocks are drawn whole, so a larger corpus begins with the smaller one.
      rows = _block(options, counts[block % len(counts)], first + block)
      yield from zip(*(array[:left] for array in rows), strict=True)
      left -= _BLOCK


def _block(options: Options, pairs: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
  """Ids and whether they are answers, `[N, T]` each."""
  # Philox's raw output is fixed by NumPy's stability policy; its samplers are not.
  generator = np.random.Philox(key=[options.seed, stream])

  def uniform(*shape: int) -> np.ndarray:
    raw = generator.random_raw(int(np.prod(shape))).reshape(shape)
    return ((raw >> np.uint64(11)) + 0.5) / 2**53

  half = options.vocab_size // 2
  length = options.length * pairs // options.num_pairs // 2 * 2
  keys_NP = 1 + _distinct(uniform(_BLOCK, half - 1), pairs)
  values_NP = half + _distinct(uniform(_BLOCK, options.vocab_size - half), pairs)
  num_places = (length - 2 * pairs) // 2
  law_S = np.arange(1, num_places + 1) ** (options.alpha - 1.0)
  # The smallest of exponential variables over their weights: draws without
  # replacement, in order.
  places_NP = _distinct(-np.log(uniform(_BLOCK, num_places)) / law_S[None], pairs)
  ids_NT = 1 + np.floor(uniform(_BLOCK, 1 + length) * (options.vocab_size - 1)).astype(
    np.int64
  )
  scored_NT = np.zeros(ids_NT.shape, bool)
  ids_NT[:, 0] = 0
  ids_NT[:, 1 : 2 * pairs : 2] = keys_NP
  ids_NT[:, 2 : 2 * pairs + 1 : 2] = values_NP
  queries_NP = 1 + 2 * pairs + 2 * places_NP
  np.put_along_axis(ids_NT, queries_NP, keys_NP, axis=1)
  np.put_along_axis(ids_NT, queries_NP + 1, values_NP, axis=1)
  np.put_along_axis(scored_NT, queries_NP + 1, True, axis=1)
  return ids_NT.astype(np.uint16), scored_NT


def _distinct(random_NC: np.ndarray, count: int) -> np.ndarray:
  """The places of the `count` smallest numbers of each row, smallest first."""
  return np.argsort(random_NC, axis=1, kind="stable")[:, :count]


TECHNIQUE = MQAR
