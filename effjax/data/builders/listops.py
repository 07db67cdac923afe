"""ListOps: nested lists of digits under MIN, MAX, MED and SM; only the value is scored.

Source: Nangia and Bowman 2018, arXiv:1804.06028, and the authors' generator: a node is
an operator with probability `operator_probability`, else a digit; an operator has 2 to
`max_args` arguments; MED is the median rounded down, SM the sum modulo 10.

    [MAX 2 9 [MIN 4 7 ] 0 ] 9                (the 9 at the end is scored)

Deviations: no parentheses around the arguments, as in Long Range Arena (Tay et al.
2020, arXiv:2011.04006), since the brackets say the same; `max_depth` counts operators
inside one another (the generator's own limit counts the digits below them as well);
expressions are kept if their length is in [min_length, max_length], so the root is
always an operator; no expression occurs twice in the corpus.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence

import numpy as np

from effjax.core import config, errors
from effjax.data import symbols
from effjax.data.builders import base

OPERATORS = {
  "[MIN": min,
  "[MAX": max,
  "[MED": lambda values: int(np.median(values)),
  "[SM": lambda values: sum(values) % 10,
}
_END = "]"
_NAMES = (symbols.START, *OPERATORS, _END, *"0123456789")
_IDS = {name: index for index, name in enumerate(_NAMES)}
# Options that keep nearly nothing are a mistake.
_MAX_TRIES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The task and how much of it.

  Attributes:
    min_length, max_length: symbols of an expression that is kept.
    max_depth: most operators inside one another.
    max_args: most arguments of an operator; the least is 2.
    operator_probability: that an argument is an operator rather than a digit.
    num_examples: training expressions.
    num_validation: validation expressions.
    seed: of the content.
  """

  min_length: int = 16
  max_length: int = 64
  max_depth: int = 3
  max_args: int = 5
  operator_probability: float = 0.25
  num_examples: int = 50_000
  num_validation: int = 2_000
  seed: int = 0

  def __post_init__(self):
    for name in ("max_depth", "num_examples", "num_validation"):
      value = getattr(self, name)
      config.require(value >= 1, f"{name} must be at least 1, got {value}")
    config.require(
      self.max_args >= 2, f"max_args must be at least 2, got {self.max_args}"
    )
    config.require(
      4 <= self.min_length <= self.max_length,
      f"min_length must be from 4 to max_length={self.max_length}, "
      f"got {self.min_length}",
    )
    config.require(
      0 < self.operator_probability <= 1,
      "operator_probability must be above 0 and at most 1, "
      f"got {self.operator_probability}",
    )


class ListOps(base.ExampleBuilder):
  """Expressions of many lengths with one answer each."""

  KEY = "listops"
  Options = Options

  @classmethod
  def symbols(cls, options: Options) -> tuple[str, ...]:
    del options
    return _NAMES

  def make_examples(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    options = self.builder_config.options
    if split == "train":
      # Validation is drawn first, so it does not change with the training split.
      seen = {words for words, _ in _expressions(options, "validation", set())}
    else:
      seen = set()
    for words, value in _expressions(options, split, seen):
      ids = np.array([_IDS[word] for word in (*words, str(value))], np.uint16)
      ids = np.concatenate([np.zeros(1, np.uint16), ids])
      yield ids, np.arange(len(ids)) == len(ids) - 1


def _expressions(
  options: Options, split: str, seen: set[tuple[str, ...]]
) -> Iterator[tuple[tuple[str, ...], int]]:
  """The symbols and the value of each expression of a split; none that was seen."""
  rng = random.Random(f"{options.seed} {split}")
  wanted = options.num_examples if split == "train" else options.num_validation
  made = tries = 0
  while made < wanted:
    words, value = _operation(rng, options, 1)
    tries += 1
    key = tuple(words)
    if options.min_length <= len(words) <= options.max_length and key not in seen:
      seen.add(key)
      made, tries = made + 1, 0
      yield key, value
    elif tries == _MAX_TRIES:
      raise errors.InputError(
        f"corpus 'listops': {_MAX_TRIES} expressions in a row were shorter than "
        f"min_length={options.min_length}, longer than max_length="
        f"{options.max_length}, or known already; change these, max_depth or max_args"
      )


def _operation(
  rng: random.Random, options: Options, depth: int
) -> tuple[list[str], int]:
  # Only random() gives the same numbers in every version of Python.
  num_args = 2 + int(rng.random() * (options.max_args - 1))
  words: list[str] = []
  values: list[int] = []
  for _ in range(num_args):
    if depth < options.max_depth and rng.random() < options.operator_probability:
      inner, value = _operation(rng, options, depth + 1)
      words += inner
    else:
      value = int(rng.random() * 10)
      words.append(str(value))
    values.append(value)
  name = _choice(rng, tuple(OPERATORS))
  return [name, *words, _END], OPERATORS[name](values)


def _choice(rng: random.Random, items: Sequence[str]) -> str:
  return items[int(rng.random() * len(items))]


TECHNIQUE = ListOps
