"""What every task says of itself, and how its examples are read and chosen.

A task is a question with a few fixed answers, asked of labelled text: the model's
answer is the one it finds most likely (Brown et al. 2020, arXiv:2005.14165, section
2.4; "multiple choice" of lm-evaluation-harness). The text is read out of a package's
archive each time, and never stored anywhere else.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from effjax.core import config, registry
from effjax.data import fetch

TASKS = "effjax.data.tasks"
# Between prompt and answer, as in lm-evaluation-harness; it is part of the answer.
DELIMITER = " "
_PLACE = "{text}"


class Example(NamedTuple):
  """A text and the number of its right answer."""

  text: str
  label: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """A question about labelled texts in an archive.

  Attributes:
    name: registry key, equal to the file name.
    artefact: the archive.
    origin: where the texts and labels come from.
    licence: of the data.
    split: which part of the data this is.
    template: the prompt; the text takes the place of "{text}".
    answers: what the model chooses from; labels count through them.
    read: the examples of an archive, whole, in the archive's order.
    max_chars: longer texts are cut after that many characters; None for no limit.
  """

  name: str
  artefact: fetch.Artefact
  origin: str
  licence: str
  split: str
  template: str
  answers: tuple[str, ...]
  read: Callable[[pathlib.Path], Iterator[Example]]
  max_chars: int | None = None

  def __post_init__(self):
    config.require(
      self.template.count(_PLACE) == 1 and not self.template[-1:].isspace(),
      f"the template of task {self.name!r} must have one {_PLACE} and not end in space",
    )
    config.require(
      len(set(self.answers)) == len(self.answers) > 1 and all(self.answers),
      f"task {self.name!r} must have two or more different answers",
    )

  def examples(
    self, limit: int | None = None, seed: int = 0, manual_dir: str | None = None
  ) -> list[Example]:
    """The first examples in a shuffled order that only the seed decides.

    Args:
      limit: how many; None, or more than there are, for all.
      seed: of the order.
      manual_dir: a folder that holds the archive already; then nothing is downloaded.

    Raises:
      InputError: the archive cannot be fetched or is not the recorded file, or the
        limit is not positive.
    """
    config.require(limit is None or limit > 0, f"limit {limit} must be positive")
    path = fetch.fetch(self.artefact, self.name, manual_dir, "task")
    found = [Example(e.text[: self.max_chars], e.label) for e in self.read(path)]
    # By hash, so that no library's random numbers decide which examples are scored.
    order = sorted(
      range(len(found)), key=lambda i: hashlib.sha256(b"%d %d" % (seed, i)).digest()
    )
    return [found[i] for i in order[:limit]]

  def prompt(self, text: str) -> str:
    """The question about a text; no answer and no space after it."""
    return self.template.replace(_PLACE, text)

  @property
  def continuations(self) -> tuple[str, ...]:
    """The answers as they follow a prompt, with the space between."""
    return tuple(DELIMITER + answer for answer in self.answers)

  def counts(self, examples: Sequence[Example]) -> dict[str, int]:
    """How many examples have each answer."""
    labels = [example.label for example in examples]
    return {answer: labels.count(i) for i, answer in enumerate(self.answers)}

  def majority(self, examples: Sequence[Example]) -> float:
    """The share of the most frequent answer: what always giving it would get."""
    return max(self.counts(examples).values()) / len(examples)

  @property
  def record(self) -> dict[str, Any]:
    """What the numbers are of, for the record of a run."""
    return {
      "name": self.name,
      **self.artefact.record,
      "origin": self.origin,
      "licence": self.licence,
      "split": self.split,
      "template": self.template,
      "answers": list(self.answers),
      "max_chars": self.max_chars,
    }


def names() -> tuple[str, ...]:
  """Every task."""
  return registry.names(TASKS)


def find(name: str) -> Task:
  """A task by name.

  Raises:
    InputError: there is none of that name.
  """
  return registry.find(TASKS, name, "task")
