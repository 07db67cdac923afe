"""Asks a loaded run the questions of a task."""

from typing import Any

from effjax.core import config, errors
from effjax.data import symbols
from effjax.data.tasks import base
from effjax.measure import choices
from effjax.recipe import api


def score_task(
  run: api.Run,
  name: str,
  limit: int | None = None,
  seed: int = 0,
  manual_dir: str | None = None,
) -> dict[str, Any]:
  """How often a run gives the right answer to a task's examples, zero-shot.

  No example of the task is shown to the model before it is asked.

  Args:
    run: a loaded stage, of a language model.
    name: key of effjax.data.tasks.
    limit: how many examples, of all in the order of the seed; None for all.
    seed: of that order.
    manual_dir: a folder that holds the task's archive already.

  Returns:
    What `choices.accuracy` returns, with "task", "class_counts" (of the examples that
    were scored), "all_examples" and "all_majority" (of the task's whole split) and
    "about": the task's record.

  Raises:
    InputError: no such task, a model that gives texts no probability, a run without a
      tokenizer of text, or an archive that cannot be had.
  """
  task = base.find(name)
  _check(run)
  config.require(limit is None or limit > 0, f"limit {limit} must be positive")
  everything = task.examples(seed=seed, manual_dir=manual_dir)
  examples = everything[:limit]
  items = [
    (task.prompt(example.text), continuation)
    for example in examples
    for continuation in task.continuations
  ]
  batch_size = run.config.measure.eval_batch_size
  scores_N = choices.log_likelihoods(
    run.model, run.params, run.tokenizer, items, batch_size
  )
  scores_NA = scores_N.reshape(len(examples), len(task.answers))
  labels_N = [example.label for example in examples]
  return {
    "task": name,
    **choices.accuracy(scores_NA, labels_N, task.answers),
    "class_counts": task.counts(examples),
    "all_examples": len(everything),
    "all_majority": task.majority(everything),
    "about": task.record,
  }


def _check(run: api.Run) -> None:
  """Raises InputError unless the run is a language model that reads text."""
  api.require_language_model(run, "gives answers no probability")
  if run.tokenizer is None or isinstance(run.tokenizer, symbols.Symbols):
    raise errors.InputError(
      f"stage {run.stage!r} has no tokenizer of text, so it cannot read a task; import "
      "the model with its tokenizer, or train on text"
    )
