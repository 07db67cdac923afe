"""Labelled text as a ruler: a model is asked a task's question about each example.

A language model answers untrained, by log-likelihood (measure.choices). An encoder
gives answers no probability; of it, a linear probe on its embeddings is fitted and
scored (measure.probe). The two accuracies are of different things, and of different
examples: compare rows of one kind.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax.core import config, errors
from effjax.data import symbols
from effjax.data.tasks import base
from effjax.infer import embed
from effjax.measure import choices, probe
from effjax.models import encoder

ZERO_SHOT, PROBE = "log-likelihood", "linear probe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Questions:
  """A task, to be asked of one model after another.

  Attributes:
    task: key of effjax.data.tasks.
    tokenizer: of the models.
    limit: how many examples, of all in the order of the seed; None for all.
    seed: of that order.
    manual_dir: a folder that holds the task's archive already.
  """

  task: str
  tokenizer: Any
  limit: int | None = None
  seed: int = 0
  manual_dir: str | None = None

  def __post_init__(self):
    base.find(self.task)
    config.require(
      self.limit is None or self.limit > 0, f"limit {self.limit} must be positive"
    )
    if self.tokenizer is None or isinstance(self.tokenizer, symbols.Symbols):
      raise errors.InputError(
        "without a tokenizer of text a model cannot read a task; import the model with "
        "its tokenizer, or train on text"
      )

  @property
  def record(self) -> dict[str, Any]:
    """What the task's numbers are of, with origin and licence."""
    return base.find(self.task).record

  def examples(self) -> list[base.Example]:
    """What is asked; read out of the archive, which is fetched the first time."""
    return self._all()[: self.limit]

  def ask(
    self, model: Any, params: Mapping[str, Any], batch_size: int = 16
  ) -> dict[str, Any]:
    """How often a model gives the right answer.

    Args:
      model: a Decoder or Encoder.
      params: its parameters, of any leaf kinds.
      batch_size: rows of a batch.

    Returns:
      "task", "answered_by" and what `choices.accuracy` or `probe.accuracy` returns,
      with "class_counts" (of the examples that were taken), "all_examples" and
      "all_majority" (of the task's whole split) and "about": the task's record.

    Raises:
      InputError: the archive cannot be had, or see `choices` and `probe`.
    """
    task, everything = base.find(self.task), self._all()
    examples = everything[: self.limit]
    if isinstance(model, encoder.Encoder):
      how, found = PROBE, self._probe(task, examples, model, params, batch_size)
    else:
      how, found = ZERO_SHOT, self._choose(task, examples, model, params, batch_size)
    return {
      "task": self.task,
      "answered_by": how,
      **found,
      "class_counts": task.counts(examples),
      "all_examples": len(everything),
      "all_majority": task.majority(everything),
      "about": task.record,
    }

  def quality(
    self, model: Any, params: Mapping[str, Any], batch_size: int = 16
  ) -> dict[str, Any]:
    """What `ask` returns, as a row of the results table holds it."""
    found = self.ask(model, params, batch_size)
    kept = ("task", "answered_by", "accuracy", "stderr", "majority", "num_examples")
    return {name: found[name] for name in kept}

  def _all(self) -> list[base.Example]:
    return base.find(self.task).examples(seed=self.seed, manual_dir=self.manual_dir)

  def _choose(
    self,
    task: base.Task,
    examples: list[base.Example],
    model: Any,
    params: Mapping[str, Any],
    batch_size: int,
  ) -> dict[str, Any]:
    items = [
      (task.prompt(example.text), continuation)
      for example in examples
      for continuation in task.continuations
    ]
    scores_N = choices.log_likelihoods(model, params, self.tokenizer, items, batch_size)
    scores_NA = scores_N.reshape(len(examples), len(task.answers))
    return choices.accuracy(scores_NA, _labels(examples), task.answers)

  def _probe(
    self,
    task: base.Task,
    examples: list[base.Example],
    model: encoder.Encoder,
    params: Mapping[str, Any],
    batch_size: int,
  ) -> dict[str, Any]:
    texts = [example.text for example in examples]
    found_ND = embed.embed(model, params, self.tokenizer, texts, batch_size)
    return probe.accuracy(found_ND, _labels(examples), texts, task.answers)


def _labels(examples: list[base.Example]) -> list[int]:
  return [example.label for example in examples]
