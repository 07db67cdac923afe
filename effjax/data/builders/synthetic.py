"""Tiny deterministic text for tests and demonstrations: copying and adding.

Each document is a few lines such as `copy bdac > bdac` and `add 41 + 7 = 48`, so a
small model can bring the loss close to what the random part of a line leaves.
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from effjax.core import config
from effjax.data import documents
from effjax.data.builders import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(base.TextOptions):
  """Size of the corpus.

  Attributes:
    documents: number of documents.
    lines: most lines in a document; the least is 1.
    seed: of the content.
  """

  documents: int = 200
  lines: int = 8
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    config.require(
      self.documents >= 2, f"documents must be at least 2, got {self.documents}"
    )
    config.require(self.lines >= 1, f"lines must be at least 1, got {self.lines}")


class Synthetic(base.TextBuilder):
  """Lines of a copy task and of an addition task."""

  KEY = "synthetic"
  ORIGIN = "generated"
  LICENCE = "none needed"
  Options = Options

  @classmethod
  def fingerprint(cls, options: Any, manual_dir: str | None) -> Any:
    return []

  def read_documents(self) -> Iterator[documents.Document]:
    options = self.builder_config.options
    for index in range(options.documents):
      rng = random.Random(f"{options.seed} {index}")
      lines = [_line(rng) for _ in range(rng.randint(1, options.lines))]
      yield documents.Document(name=f"{index:06d}", text="".join(lines))


def _line(rng: random.Random) -> str:
  if rng.random() < 0.5:
    word = "".join(rng.choices("abcdefgh", k=rng.randint(2, 8)))
    return f"copy {word} > {word}\n"
  a, b = rng.randrange(100), rng.randrange(100)
  return f"add {a} + {b} = {a + b}\n"


TECHNIQUE = Synthetic
